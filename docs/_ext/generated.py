"""Parts of pages that are read off the program: a line `<!-- generated: NAME [WORD] -->` becomes Markdown.

A mark that no function of `PARTS` knows stops the build.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import api_pages
from columns import COLUMNS, FILES
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

PROGRAMS = {"freqkd-analyze": "freqkd_analysis.cli", "freqkd-train": "freqkd_train.cli"}
ROOT = Path(__file__).resolve().parents[2]
_MARK = re.compile(r"^<!-- generated: (\S+)(?: (.+))? -->$", re.M)
_PLACES = {"LOG.md": "log.md", "GLOSSARY.md": "glossary.md", "CHANGELOG.md": "changes.md",
           "RESULTS.md": "results.md", "benchmarks/README.md": "benchmarks.md"}  # fmt: skip
"""Where a paper of the project stands in the site."""


def setup(app: Sphinx) -> dict[str, Any]:
    """Marks are filled when a page is read, so headings made here are headings like any other."""
    app.connect("source-read", _fill)
    # What is generated depends on the program, not on the page: read the pages with marks each time.
    app.connect("env-get-outdated", lambda app, env, added, changed, removed: [
        name for name in env.found_docs if _MARK.search(env.doc2path(name).read_text(encoding="utf-8"))
    ])  # fmt: skip
    return {"parallel_read_safe": True}


def _fill(app: Sphinx, name: str, content: list[str]) -> None:
    content[0] = filled(content[0])


def filled(text: str) -> str:
    """A page with its marks replaced."""
    return _MARK.sub(lambda mark: _part(mark[1], *filter(None, [mark[2]])), text)


def _part(name: str, *words: str) -> str:
    if name not in PARTS:
        raise ExtensionError(f'nothing is generated under the name "{name}"; known: {", ".join(PARTS)}.')
    return PARTS[name](*words)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; cells are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def code(text: str) -> str:
    """Text as code; empty stays empty."""
    return f"`{text}`" if text else ""


def plain(text: str) -> str:
    """Text that Markdown reads as it stands, code in backticks left alone."""
    parts = text.split("`")
    return "`".join(part if i % 2 else re.sub(r"([\\*<\[\]])", r"\\\1", part) for i, part in enumerate(parts))


def program(name: str) -> Any:
    """The command line as typer builds it."""
    import typer

    return typer.main.get_command(importlib.import_module(PROGRAMS[name]).app)


def commands(group: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """(words that reach it, command), in the order of the help."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*above, name))
        else:
            yield " ".join((*above, name)), command


def command_line(name: str) -> str:
    """Every command of a program: its help, its example, its arguments and options by panel."""
    return "\n".join(_command(f"{name} {words}", command) for words, command in commands(program(name)))


def _command(name: str, command: Any) -> str:
    lines = inspect.cleandoc(command.help or "").split("\n")
    examples = [line.strip().removeprefix("Example: ") for line in lines if line.strip().startswith("Example: ")]
    about = "\n".join(plain(line) for line in lines if not line.strip().startswith("Example: "))
    parts = [f"## `{name}`", about, "```sh\n" + "\n".join(examples) + "\n```" if examples else ""]
    panels: dict[str, list[Any]] = defaultdict(list)
    for parameter in command.params:
        if parameter.name != "help":
            is_option = parameter.opts[0].startswith("-")
            panels[(getattr(parameter, "rich_help_panel", None) or "Options") if is_option else ""].append(parameter)
    for panel, parameters in panels.items():
        head = [panel or "Argument", "Default", "Meaning"]
        parts.append(table(head, [_parameter(one) for one in parameters]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _parameter(one: Any) -> list[str]:
    is_option = one.opts[0].startswith("-")
    names = [*one.opts, *one.secondary_opts] if is_option else [one.metavar or one.name.upper()]
    value = one.default() if callable(one.default) else one.default
    if one.required:
        shown = "required"
    elif getattr(one, "is_flag", False):
        shown = code(one.secondary_opts[0]) if one.secondary_opts and not value else "on" if value else "off"
    else:
        shown = code("" if value is None else str(value))
    if is_option and one.metavar:
        names.append(one.metavar)
    again = " Repeatable." if getattr(one, "multiple", False) else ""
    return [" ".join(map(code, names)), shown, plain(one.help or "") + again]


def run_tables() -> str:
    """The tables of a run of the analysis, column by column."""
    from sphinx.pycode import ModuleAnalyzer

    from freqkd_analysis import schema

    said = {name: " ".join(lines).strip() for (_, name), lines in
            ModuleAnalyzer.for_module(schema.__name__).find_attr_docs().items()}  # fmt: skip
    names = {id(value): name for name, value in vars(schema).items() if isinstance(value, dict)}
    parts = [f"Schema version {schema.VERSION}; it stands in the metadata of each Parquet file (`freqkd_schema`)."]
    for file, columns in schema.TABLES.items():
        about = f"{FILES[file]} {plain(said.get(names[id(columns)], ''))}"
        rows = [[code(name), kind, COLUMNS[file, name] if (file, name) in COLUMNS else COLUMNS["", name]]
                for name, kind in columns.items()]  # fmt: skip
        parts.append(f"## `{file}`\n\n{about}\n\n{table(['Column', 'Type', 'Meaning'], rows)}")
    rows = [[code(name), COLUMNS["", name]] for name in schema.CONVERGENCE]
    parts.append(f"## `convergence.csv`\n\n{FILES['convergence.csv']}\n\n{table(['Column', 'Meaning'], rows)}")
    return "\n\n".join(parts)


def layouts() -> str:
    """The layouts that --data takes, with the documentation of their functions."""
    from freqkd_analysis.data.layouts import LAYOUTS

    rows = [[code(one.usage), plain(one.about), plain(_first(one.read))] for one in LAYOUTS.values()]
    return table(["`--data`", "Data set", "Where files are looked for"], rows)


def annotation_sets() -> str:
    """The annotated layouts, with the documentation of their readers."""
    from freqkd_train.annotation_sets import SETS

    return table(["`--data`", "What is read"], [[code(usage), plain(_first(read))] for read, usage in SETS.values()])


def losses() -> str:
    """Every loss with its weight and source."""
    from freqkd_train import choose

    rows = [[code(row["loss"]), row["kind"], f"{row['weight']:g}", plain(row["about"])] for row in choose.losses()]
    return table(["Loss", "Kind", "Weight", "What it is, or where it is from"], rows)


def recipes() -> str:
    """The lab card of every recipe."""
    from freqkd_train import recipes as made

    parts = []
    for name, (_, values) in made.RECIPES.items():
        first, *more = re.split(r"\n+|(?<=[.)]) (?=(?:Command|Expected|Hours): )", made.card(name))
        lines: list[str] = []
        for line in filter(None, map(str.strip, more)):
            head = re.match(r"(Source|Command|Hours|Expected): (.*)", line)
            if head and head[1] == "Command":
                lines.append(f"- Command: `{head[2]}`")
            elif head:
                lines.append(f"- {head[1]}: {plain(head[2])}")
            else:
                lines[-1] += " " + plain(line)
        if values:
            lines.append("- Values: " + ", ".join(map(code, values)))
        parts.append(f"### `{name}`\n\n{plain(first)}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def arms() -> str:
    """The arms of a study: what each changes in its distillation and in its fine-tuning."""
    from freqkd_train.arms import ARMS, STUDENTS

    rows = []
    for name, arm in ARMS.items():
        tuned = [f"backbone of the finished `{arm.tuned}`"] if arm.tuned else []
        rows.append([code(name), _settings(STUDENTS[arm.student]) or "the recipe as it stands",
                     ", ".join([*tuned, *filter(None, [_settings(arm.changes)])])])  # fmt: skip
    return table(["Arm", "Its distillation", "Its fine-tuning"], rows)


def _settings(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}={value}`" for key, value in changes.items())


def modules(package: str) -> str:
    """A list of a package's public modules, each with its first line, and the pages themselves in the tree."""
    names = [name for name in api_pages.modules() if name.startswith(f"{package}.")]
    rows = [[f"[`{name}`](api/{name}.rst)", plain(_first(importlib.import_module(name)))] for name in names]
    tree = "\n".join(f"api/{name}" for name in names)
    return table(["Module", "What it is for"], rows) + f"\n```{{toctree}}\n:hidden:\n\n{tree}\n```\n"


def paper(name: str) -> str:
    """A paper from outside this folder, its links turned to the pages of the site."""
    return _linked((ROOT / name).read_text(encoding="utf-8"))


def log() -> str:
    """The log of experiments; the parts of an entry become paragraphs."""
    joined = re.sub(r"\n {9,}", " ", paper("LOG.md"))
    return re.sub(r"^(Idea|Change|Number|Verdict): +", r"\n**\1.** ", joined, flags=re.M)


def readme(heading: str) -> str:
    """One section of the README without its heading."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", paper("README.md"), re.M | re.S)
    if not found:
        raise ExtensionError(f'README.md has no section "{heading}", which a page of the site shows.')
    return found[1].strip()


def _linked(text: str) -> str:
    text = text.replace("](docs/", "](")
    for path, page in _PLACES.items():
        text = text.replace(f"]({path})", f"]({page})")
    return text


def _first(what: Any) -> str:
    return (inspect.getdoc(what) or "").split("\n\n")[0].replace("\n", " ")


PARTS: dict[str, Callable[..., str]] = {
    "commands": command_line, "run-tables": run_tables, "layouts": layouts, "annotation-sets": annotation_sets,
    "losses": losses, "recipes": recipes, "arms": arms, "modules": modules, "paper": paper, "log": log,
    "readme": readme,
}  # fmt: skip
