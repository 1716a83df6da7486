"""The papers of the project keep up with the program: each command is explained and shown, examples can be typed."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAPERS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


PROGRAMS = {"freqkd-analyze": "freqkd_analysis.cli", "freqkd-train": "freqkd_train.cli"}


def program(name: str) -> Any:
    """The command line as typer builds it."""
    import typer

    return typer.main.get_command(importlib.import_module(PROGRAMS[name]).app)


def commands(group: Any, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """Every command by the words that reach it, such as `data verify`."""
    found = {}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found |= commands(command, (*above, name))
        else:
            found[" ".join((*above, name))] = command
    return found


def lines(text: str) -> list[str]:
    """The command lines of a text: in docstrings and blocks; continued lines are joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    shown = re.findall(r"^[ \t]*(?:Example: |Command: |\$ )?(freqkd-(?:analyze|train) .+)$", joined, re.M)
    return [line.split(" #")[0].strip() for line in shown]


def check_line(line: str) -> None:
    """Parse a command line without running it: commands and options are there, values have their types."""
    name, *words = shlex.split(line)
    command = program(name)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        name, words = words[0], words[1:]
        assert name in command.commands, f"{line}: no command {name}"
        command = command.commands[name]
    if words not in (["--help"], ["--version"]):
        command.make_context(name, words).close()


def papers_with_lines() -> list[tuple[str, str]]:
    return [(path.name, line) for path in PAPERS for line in lines(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("of", PROGRAMS)
def test_every_command_has_help_with_an_example_that_can_be_typed(of: str) -> None:
    for name, command in commands(program(of)).items():
        shown = lines(command.help or "")
        assert shown, f"{name}: its help has no example"
        assert any(line.startswith(f"{of} {name}") for line in shown), f"{name}: its example is of another"
        for line in shown:
            check_line(line)


def test_the_commands_of_the_lab_cards_can_be_typed() -> None:
    from freqkd_train import recipes

    for name in recipes.RECIPES:
        shown = lines(recipes.card(name).replace(". Command:", ".\nCommand:"))
        assert shown, f"{name}: its lab card has no command"
        for line in shown:
            check_line(line)


def printed(text: str) -> str:
    """A text as the help prints it: rich reads [words] as style and :names: as a picture."""
    from rich.text import Text

    return Text.from_markup(text).plain


@pytest.mark.parametrize("of", PROGRAMS)
def test_help_is_printed_as_it_is_written(of: str) -> None:
    assert printed("mix:A:FILE") != "mix:A:FILE" and printed("forms=[mse]") != "forms=[mse]"
    top = program(of)
    groups = {name: one for name, one in top.commands.items() if hasattr(one, "commands")}
    for name, command in (commands(top) | groups | {of: top}).items():
        texts = [command.help, command.epilog, *(getattr(one, "help", None) for one in command.params)]
        for text in filter(None, texts):
            assert printed(text) == text, f"{name}: word this otherwise, the help prints it as {printed(text)!r}"


@pytest.mark.parametrize("of", PROGRAMS)
def test_every_option_is_explained(of: str) -> None:
    for name, command in commands(program(of)).items():
        for parameter in command.params:
            if parameter.name != "help":
                assert getattr(parameter, "help", None), f"{name}: {parameter.name} has no help"


@pytest.mark.parametrize("of", PROGRAMS)
def test_every_command_is_in_the_readme(of: str) -> None:
    text = README.read_text(encoding="utf-8")
    missing = [name for name in commands(program(of)) if not re.search(rf"{of} {name}\b|`{name}\b", text)]
    assert missing == [], f"README.md does not show {missing}"


@pytest.mark.parametrize("paper, line", papers_with_lines())
def test_command_lines_in_the_papers_can_be_typed(paper: str, line: str) -> None:
    check_line(line)


@pytest.mark.parametrize("line", ["freqkd-analyze layrs", "freqkd-analyze layers --no-such 3", "freqkd-analyze data x"])
def test_the_line_check_can_fail(line: str) -> None:
    with pytest.raises(Exception, match=r"no command|[Nn]o such option"):
        check_line(line)


@pytest.mark.parametrize("path", PAPERS, ids=lambda p: p.name)
def test_links_between_papers_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_contributing_fits_a_page() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 60


def test_the_glossary_has_each_word_once_and_those_of_the_tables() -> None:
    from freqkd_analysis import schema

    rows = re.findall(r"^\| ([^|]+?) \|", (ROOT / "GLOSSARY.md").read_text(encoding="utf-8"), re.M)
    words = [word for row in rows[1:] for word in row.split(", ")]
    assert len(words) == len(set(words))
    columns = {"condition", "pair", "group", "layer", "tap", "depth", "radius", "band", "measure", "ratio", "verdict"}
    assert columns <= {name for table in schema.TABLES.values() for name in table}
    assert columns <= set(words)
