"""The project's docstrings as reStructuredText.

They are plain English with `code` in single backticks, `Args:` and its like on one line or as a block, indented
equations, and doctests. Read as reStructuredText as they stand, half of them would warn; so each is rewritten here
before Sphinx parses it. `Example:` blocks are left to napoleon.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

SECTIONS = ("Args", "Returns", "Yields", "Raises", "Source", "Letters", "Command", "Hours", "Expected", "Shapes")
LONGEST_VALUE = 40
_NAMES = "|".join(SECTIONS)
_HEAD = re.compile(rf"({_NAMES}):(?: +(.*))?$")
_INSIDE = re.compile(rf"(?<=[.)]) ({_NAMES}): ")
_BULLET = re.compile(r"[-*] ")


def setup(app: Sphinx) -> dict[str, Any]:
    """Before napoleon, whose priority is 500."""
    app.connect("autodoc-process-docstring", _process, priority=400)
    app.connect("doctree-read", _without_long_values)
    return {"parallel_read_safe": True}


def _process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    # Napoleon takes a constant's first line up to a colon for its type; an empty comment is a first line without one.
    first = ["..", ""] if what in ("attribute", "data") else []
    lines[:] = first + rewritten(lines, parameters(obj))


def _without_long_values(app: Sphinx, doctree: nodes.document) -> None:
    """A constant's value is shown where it is short; a dictionary of functions says nothing."""
    for node in list(doctree.findall(addnodes.desc_annotation)):
        text = node.astext().strip()
        if text.startswith("=") and len(text) > LONGEST_VALUE:
            node.parent.remove(node)


def parameters(obj: Any) -> tuple[str, ...]:
    """Names of a function's arguments; none where Python cannot tell."""
    try:
        return tuple(inspect.signature(obj).parameters)
    except (TypeError, ValueError):
        return ()


def rewritten(lines: Sequence[str], names: Sequence[str] = ()) -> list[str]:
    """A docstring's lines as reStructuredText.

    Args:
        names: of the arguments, which part an `Args:` written on one line.

    Example:
        >>> rewritten(["Sum of x_* | `y`.", "", "Args: a: one. b: other."], ["a", "b"])
        ['Sum of x_\\\\* \\\\| ``y``.', '', ':Args:', '    - ``a``: one.', '    - ``b``: other.', '']
    """
    out: list[str] = []
    for kind, block in blocks([line.rstrip() for line in lines]):
        if kind == "text" and _lists(block[0], names):
            out += section("Fields", block, names)
        elif kind == "text":
            first, *rest = _INSIDE.split(" ".join(block))
            out += [marked(first), ""]
            for head, text in zip(rest[::2], rest[1::2], strict=True):
                out += section(head, [text], names)
        elif kind == "bullets":
            out += [*(f"- {marked(item)}" for item in items(block)), ""]
        elif kind == "literal":
            out += ["::", "", *(f"    {line}".rstrip() for line in block), ""]
        elif kind == "as is":
            out += [*block, ""]
        else:
            out += section(kind, block, names)
    return out


def blocks(lines: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(kind, lines) of each piece: text, bullets, literal, "as is", or the name of a section."""
    at = 0
    while at < len(lines):
        line, start = lines[at], at
        head = _HEAD.match(line)
        at += 1
        if not line:
            continue
        if line.startswith(">>>"):
            at = _until(lines, at, lambda text: not text)
            yield "as is", list(lines[start:at])
        elif line in ("Example:", "Examples:"):
            at = _until(lines, at, lambda text: bool(text) and not text.startswith(" "))
            yield "as is", list(lines[start:at])
        elif head and not head[2]:
            at = _until(lines, at, lambda text: bool(text) and not text.startswith(" "))
            yield head[1], [text for text in lines[start + 1 : at] if text]
        elif head:
            at = _until(lines, at, lambda text: not text or bool(_HEAD.match(text)))
            yield head[1], [head[2], *(text.strip() for text in lines[start + 1 : at])]
        elif line.startswith(" "):
            at = _until(lines, at, lambda text: bool(text) and not text.startswith(" "))
            yield "literal", list(_bare(lines[start:at]))
        elif _BULLET.match(line):
            at = _until(lines, at, lambda text: not text or not (text.startswith(" ") or _BULLET.match(text)))
            yield "bullets", list(lines[start:at])
        else:
            at = _until(lines, at, lambda text: not text or text[0] == " " or bool(_HEAD.match(text) or
                                                                                   _BULLET.match(text)))  # fmt: skip
            yield "text", list(lines[start:at])


def _lists(line: str, names: Sequence[str]) -> bool:
    """Whether a paragraph runs through fields of a class: `kind: ... neck: ...`."""
    found = re.match(r"(\w+(?:, \w+)*): ", line)
    return found is not None and set(found[1].split(", ")) <= set(names)


def section(head: str, block: Sequence[str], names: Sequence[str]) -> list[str]:
    """A section as a field; arguments and the fields of a class as a list in theirs."""
    if head not in ("Args", "Fields"):
        return [f":{head}: {marked(' '.join(line.strip() for line in block))}", ""]
    return [f":{head}:", *(f"    - {text}" for text in arguments(block, names)), ""]


def arguments(block: Sequence[str], names: Sequence[str]) -> list[str]:
    """One line an argument, whether they came on lines of their own or in a row."""
    bare = _bare(block)
    own = [line for line in bare if not line.startswith(" ")]
    if len(bare) > 1 and all(re.match(r"[\w*, ]+:", line) for line in own):
        whole: list[str] = []
        for line in bare:
            if line.startswith(" "):
                whole[-1] += " " + line.strip()
            else:
                whole.append(line)
    else:
        joined = " ".join(line.strip() for line in bare)
        known = "|".join(map(re.escape, names)) or r"(?!)"
        whole = re.split(rf"(?<=\.) (?=(?:{known})(?:, \w+)*: )", joined)
    return [_argument(text) for text in whole]


def _argument(text: str) -> str:
    name, colon, about = text.partition(": ")
    if not colon or not re.fullmatch(r"[\w*]+(, [\w*]+)*", name):
        return marked(text)
    return ", ".join(f"``{part}``" for part in name.split(", ")) + f": {marked(about)}"


def items(block: Sequence[str]) -> list[str]:
    """Bullets with their continued lines joined."""
    found: list[str] = []
    for line in block:
        if _BULLET.match(line):
            found.append(line[2:])
        else:
            found[-1] += " " + line.strip()
    return found


def marked(text: str) -> str:
    """Text with its code in double backticks and nothing else that reStructuredText would read as markup."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        parts = [text.replace("`", "'")]
    out = ""
    for i, part in enumerate(parts):
        if i % 2 == 0 or not part.strip():
            out += _escaped(part)
            continue
        # Markup must not touch a letter: an escaped space parts them and is not printed.
        before, after = parts[i - 1][-1:], parts[i + 1][:1]
        out += ("\\ " if before.isalnum() else "") + f"``{part.strip()}``" + ("\\ " if after.isalnum() else "")
    return out


def _escaped(text: str) -> str:
    return re.sub(r"([\\*|]|_(?!\w))", r"\\\1", text)


def _until(lines: Sequence[str], at: int, ends: Any) -> int:
    while at < len(lines) and not ends(lines[at]):
        at += 1
    return at


def _bare(lines: Sequence[str]) -> list[str]:
    """Without the indentation that all of them share, and without empty lines at the end."""
    return inspect.cleandoc("\n" + "\n".join(lines)).split("\n")
