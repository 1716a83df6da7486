"""YAML as settings use it: no aliases, no tags, nothing too large to be settings."""

from __future__ import annotations

from typing import Any

import yaml

SETTINGS_CAP = 2**17
"""Most bytes of a settings file; a run's own has 3 kB, and a parser in Python takes a second for this much."""


class NoYaml(ValueError):
    """A text that is no YAML; says where and why, where that is known."""


class _Loader(yaml.SafeLoader):
    """YAML without aliases: ten lines of them can stand for more lists than memory holds, and settings need none."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not taken", self.peek_event().start_mark)
        return super().compose_node(parent, index)


def loaded(text: str | bytes) -> Any:
    """The content of a YAML text. Raises: NoYaml.

    Example:
        >>> loaded("loss: {name: released}")
        {'loss': {'name': 'released'}}
    """
    try:
        found = _Loader(text).get_single_data()
        repr(found)  # a number of thousands of digits cannot be written, so it can be no setting
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date of no calendar, lists thousands deep
        mark, problem = (getattr(error, name, None) for name in ("problem_mark", "problem"))
        raise NoYaml("is no YAML" + (f" (line {mark.line + 1}: {cut(problem or '')})" if mark else "")) from None
    return found


def value(text: str) -> Any:
    """A value of --set: as YAML, but 1e-4 is a number, which YAML 1.1 reads as text. Raises: NoYaml.

    Example:
        >>> value("1e-4"), value("[mse, 2]"), value("")
        (0.0001, ['mse', 2], '')
    """
    return _number(loaded(text)) if text.strip() else ""


def _number(found: Any) -> Any:
    if isinstance(found, str):
        try:
            return float(found)
        except ValueError:
            return found
    return [_number(item) for item in found] if isinstance(found, list) else found


def cut(text: str) -> str:
    """A text short enough for a message."""
    return text if len(text) <= 80 else f"{text[:77]}..."
