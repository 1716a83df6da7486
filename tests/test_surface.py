"""What users build on does not change unseen: commands, options, settings and tables, against `surface.json`.

After a change that is meant: `python tests/test_surface.py` writes the file again; say the change in CHANGELOG.md.
"""

from __future__ import annotations

import json
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from pydantic import BaseModel, Field

from freqkd_analysis import cli as analysis_cli
from freqkd_analysis import schema
from freqkd_train import cli as train_cli
from freqkd_train.config import Config
from freqkd_train.downstream import Downstream

STORED = Path(__file__).with_name("surface.json")
AGAIN = "If this is meant, say it in CHANGELOG.md and run: python tests/test_surface.py"


def kind(hint: Any) -> str:
    """A type as one would write it, the same from every version of Python.

    `float | None`, `Literal['a', 'b']`, `list[Path]`; what `Annotated` adds is left out.
    """
    if hint is type(None):
        return "None"
    if hint is Ellipsis:
        return "..."
    origin, given = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return kind(given[0])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(kind(one) for one in given)
    if origin is Literal:
        return f"Literal[{', '.join(map(repr, given))}]"
    if origin is not None:
        return f"{origin.__name__}[{', '.join(kind(one) for one in given)}]"
    return str(hint.__name__)


def plain(value: Any) -> Any:
    """A default as JSON has it."""
    return json.loads(json.dumps(value, default=str))


def commands(app: typer.Typer) -> dict[str, dict[str, str]]:
    """Command, with its group -> parameter -> kind and default."""
    return dict(_commands(typer.main.get_command(app), ()))


def _commands(group: Any, above: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    told = {"/".join(p.opts): "bool = false" for p in group.params if p.name == "version"}
    if told:
        yield " ".join(above) or "(alone)", told
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, (*above, name))
        else:
            yield " ".join((*above, name)), parameters(command)


def parameters(command: Any) -> dict[str, str]:
    """`--name` (or NAME, an argument) -> `kind = default`, or the kind alone where one must be given."""
    hints = typing.get_type_hints(command.callback)
    found = {}
    for one in command.params:
        if one.name == "help":
            continue
        names = [name for name in (*one.opts, *one.secondary_opts) if name.startswith("-")]
        limits = "".join(
            f", {end} {getattr(one, end)}" for end in ("min", "max") if getattr(one, end, None) is not None
        )
        default = "" if one.required else f" = {json.dumps(plain(one.default))}"
        found["/".join(names) or one.name.upper()] = f"{kind(hints[one.name])}{default}{limits}"
    return found


def settings(section: BaseModel, prefix: str = "") -> dict[str, str]:
    """Dotted key -> `kind = default`, with limits; defaults as the whole has them, not the section alone."""
    found: dict[str, str] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            found |= settings(value, f"{prefix}{name}.")
        else:
            limits = "".join(f", {limit!r}" for limit in field.metadata)
            found[f"{prefix}{name}"] = f"{kind(field.annotation)} = {json.dumps(plain(value))}{limits}"
    return found


def tables() -> dict[str, dict[str, str]]:
    """Table -> column -> kind, the place of the column before it: order is part of a table."""
    listed = {name: list(columns.items()) for name, columns in schema.TABLES.items()}
    listed["convergence.csv"] = [(column, "as written") for column in schema.CONVERGENCE]
    return {name: {column: f"{place} {what}" for place, (column, what) in enumerate(columns)}
            for name, columns in listed.items()}  # fmt: skip


def surface() -> dict[str, Any]:
    """Everything that users build on, as it is now."""
    return {
        "freqkd-analyze": commands(analysis_cli.app),
        "freqkd-train": commands(train_cli.app),
        "settings of distill": settings(Config()),
        "settings of a downstream run": settings(Downstream()),
        f"tables, schema {schema.VERSION}": tables(),
    }


def lines(tree: Any, above: tuple[str, ...] = ()) -> dict[str, str]:
    """The leaves of a tree by their path. An empty branch is a leaf: a command without parameters is a command."""
    if not isinstance(tree, dict) or not tree:
        return {": ".join(above): tree or ""} if above else {}
    return {path: leaf for key, node in tree.items() for path, leaf in lines(node, (*above, key)).items()}


def difference(before: Any, now: Any) -> list[str]:
    """What is gone (-), new (+) or another (!), a line each."""
    old, new = lines(before), lines(now)
    gone = [f"- {path}: {leaf}" for path, leaf in old.items() if path not in new]
    came = [f"+ {path}: {leaf}" for path, leaf in new.items() if path not in old]
    other = [f"! {path}: {old[path]}  ->  {new[path]}" for path in old if path in new and old[path] != new[path]]
    return gone + came + other


def write() -> None:
    """Store the surface as it is now."""
    STORED.write_text(json.dumps(surface(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def test_the_surface_is_the_stored_one() -> None:
    changed = difference(json.loads(STORED.read_text(encoding="utf-8")), surface())
    if changed:
        pytest.fail("\n".join(["the surface has changed:", *changed, AGAIN]), pytrace=False)


def test_it_holds_what_it_should() -> None:
    """A walk that went past a group or a section would freeze less than it says."""
    found = lines(surface())
    for path in ("freqkd-analyze: data verify: SPEC", "freqkd-analyze: layers: --pairs",
                 "freqkd-train: (alone): --version", "freqkd-train: kaist: --controls", "freqkd-train: cache purge",
                 "settings of distill: data.rgb.noise", "settings of a downstream run: head.kind",
                 "tables, schema 1: spectra.parquet: p_diff"):  # fmt: skip
        assert path in found, path
    assert found["settings of distill: data.geometry"] == "Literal['crop', 'pad'] = \"crop\""
    assert found["settings of a downstream run: data.geometry"] == "Literal['crop', 'pad'] = \"pad\""
    assert found["settings of distill: student.merge"] == "float | None = null, Ge(ge=0), Le(le=1)"


class Tiny(BaseModel):
    depth: int = Field(3, ge=1)
    names: tuple[str, ...] = ()


class Deeper(Tiny):
    depth: int = Field(4, ge=1)


class Renamed(BaseModel):
    rows: int = Field(3, ge=1)
    names: tuple[str, ...] = ()


@pytest.mark.parametrize("other, told", [
    (Tiny, []),
    (Deeper, ["! depth: int = 3, Ge(ge=1)  ->  int = 4, Ge(ge=1)"]),
    (Renamed, ["- depth: int = 3, Ge(ge=1)", "+ rows: int = 3, Ge(ge=1)"]),
])  # fmt: skip
def test_a_changed_setting_is_told(other: type[BaseModel], told: list[str]) -> None:
    assert difference(settings(Tiny()), settings(other())) == told


def app_of(command: Callable[..., None]) -> typer.Typer:
    app = typer.Typer()
    app.command("go")(command)
    app.command("stay")(lambda: None)
    return app


def test_a_changed_option_is_told() -> None:
    def before(run: Path, rate: float = 0.1, names: Annotated[list[str] | None, typer.Option()] = None) -> None: ...

    def now(run: Path, rate: int = 1, force: bool = False) -> None: ...

    assert difference(commands(app_of(before)), commands(app_of(before))) == []
    assert difference(commands(app_of(before)), commands(app_of(now))) == [
        "- go: --names: list[str] | None = null",
        "+ go: --force/--no-force: bool = false",
        "! go: --rate: float = 0.1  ->  int = 1",
    ]


if __name__ == "__main__":
    try:
        old = json.loads(STORED.read_text(encoding="utf-8"))
    except FileNotFoundError:
        old = {}
    write()
    print("\n".join(difference(old, surface())) or "nothing has changed", file=sys.stderr)
