"""The documentation site: it builds without a warning, its commands run or can be typed, its reference is whole.

Fences in `docs/*.md`: `console` holds commands after `$ ` that are run as they stand, a page's in order in one empty
folder; a `{code-block} text` with a caption is a file that is there beforehand; `sh` holds commands that need real data
and must parse. Other fences hold no command.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_docs import PROGRAMS, ROOT, check_line, commands, program

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
_FENCE = re.compile(r"^```(\S+)(?: .*)?\n(.*?)^```$", re.M | re.S)
_FILE = re.compile(r"^```\{code-block\} text\n:caption: (\S+)\n(.*?)^```$", re.M | re.S)

needs_sphinx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("sphinx", "furo", "myst_nb"))),
    reason="the site needs sphinx, furo and myst-nb: pip install -e '.[docs]'",
)


def fences(text: str, kind: str) -> list[str]:
    """The lines of all fences of a kind, continued lines joined; of `console` those after `$ `."""
    found = [body for name, body in _FENCE.findall(text) if name == kind]
    lines = re.sub(r"\s*\\\n\s*", " ", "".join(found)).splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ") or (kind != "console" and line.strip())]


def runnable() -> list[Path]:
    return [page for page in PAGES if fences(page.read_text(encoding="utf-8"), "console")]


def typed() -> list[tuple[str, str]]:
    return [(page.name, line) for page in PAGES for line in fences(page.read_text(encoding="utf-8"), "sh")]


# The commands of the pages ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("page", runnable(), ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = page.read_text(encoding="utf-8")
    for name, content in _FILE.findall(text):
        (tmp_path / name).write_text(content, encoding="utf-8")
    for line in fences(text, "console"):
        status, said = run(line, capsys)
        assert status == 0, f"{page.name}: {line}\n{said[-1500:]}"


def run(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """A command in this process: its exit status and what it said. Another program than ours is none of the pages'."""
    name, *words = shlex.split(line)
    main = importlib.import_module(PROGRAMS[name]).main
    status: object = 0
    try:
        main(words)
    except SystemExit as ended:
        status = ended.code or 0
    out, err = capsys.readouterr()
    return int(str(status)), out + err


def test_a_command_that_fails_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    status, said = run("freqkd-analyze data verify folder:nowhere:nowhere", capsys)
    assert status == 2 and "no folder nowhere" in said


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_to_run_are_ours_and_can_be_typed(page: Path) -> None:
    for line in fences(page.read_text(encoding="utf-8"), "console"):
        assert shlex.split(line)[0] in PROGRAMS, f"{line}: only the programs of this project are run"
        check_line(line)


@pytest.mark.parametrize("page, line", typed())
def test_commands_on_real_data_can_be_typed(page: str, line: str) -> None:
    found = re.fullmatch(r"torchrun --nproc-per-node \d+ -m freqkd_(\w+) (.*)", line)
    if found:
        line = f"freqkd-{'analyze' if found[1] == 'analysis' else 'train'} {found[2]}"
    assert shlex.split(line)[0] in PROGRAMS, f"{page}: {line} is no command of ours"
    check_line(line)


def test_no_command_hides_in_another_fence() -> None:
    for page in PAGES:
        for kind, body in _FENCE.findall(page.read_text(encoding="utf-8")):
            shown = re.findall(r"^\s*(?:\$ )?freqkd-(?:analyze|train) .*$", body, re.M)
            assert kind in ("console", "sh") or not shown, f"{page.name}: {shown} in a fence {kind} is not tested"


def test_the_fences_are_found() -> None:
    text = "```console\n$ freqkd-train a \\\n    --b\nits output\n```\n\n```sh\nfreqkd-train c\n```\n"
    assert fences(text, "console") == ["freqkd-train a --b"]
    assert fences(text, "sh") == ["freqkd-train c"]
    assert len(runnable()) >= 4 and len(typed()) >= 20


# The built site ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built from nothing with every warning an error."""
    out = tmp_path_factory.mktemp("site")
    made = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "-n", "-q", "-E", "-d", str(out / "doctrees"), "-b", "html", str(DOCS),
         str(out / "html")],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-3000:]
    return out / "html"


class Text(HTMLParser):
    """The words of a page, cell by cell, and what it would load from elsewhere."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.loaded: list[str] = []
        self.feed(html)

    def handle_data(self, data: str) -> None:
        self.words += data.split()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe"):
            self.loaded += [value or "" for name, value in attrs if name in ("src", "href")]


@needs_sphinx
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("of", PROGRAMS)
def test_the_reference_shows_every_command_and_option(site: Path, of: str) -> None:
    html = (site / f"cli-{of.removeprefix('freqkd-')}.html").read_text(encoding="utf-8")
    parts = re.split(r"<h2>", html)
    for name, command in commands(program(of)).items():
        part = next((one for one in parts if re.match(rf"<code.*?>{of} {name}</span>", plain_code(one))), None)
        assert part is not None, f"{of} {name} is not in the reference"
        words = set(Text(part).words)
        for parameter in command.params:
            if parameter.name != "help":
                shown = [*parameter.opts, *parameter.secondary_opts]
                shown = shown if shown[0].startswith("-") else [parameter.metavar or parameter.name.upper()]
                assert set(shown) <= words, f"{of} {name}: {shown} is not in the reference"


def plain_code(html: str) -> str:
    """Code in one span, whatever spans its words came in."""
    return re.sub(r'</span> <span class="pre">', " ", html)


@needs_sphinx
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_table_and_public_module_has_its_place(site: Path) -> None:
    from freqkd_analysis import schema

    words = set(Text((site / "output.html").read_text(encoding="utf-8")).words)
    assert {*schema.TABLES, *(name for table in schema.TABLES.values() for name in table)} <= words
    pages = {path.stem for path in (site / "api").glob("*.html")}
    assert {"freqkd_analysis.spectral", "freqkd_train.losses", "freqkd_train.metrics.kaist"} <= pages
    assert "split_bands" in (site / "api" / "freqkd_analysis.spectral.html").read_text(encoding="utf-8")


@needs_sphinx
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_site_asks_no_server(site: Path) -> None:
    for path in site.rglob("*.html"):
        away = [link for link in Text(path.read_text(encoding="utf-8")).loaded if re.match(r"(https?:)?//", link)]
        assert away == [], f"{path.relative_to(site)} loads {away}"


# How it is made ---------------------------------------------------------------------------------------------------


@pytest.fixture
def extensions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))


@needs_sphinx
def test_what_is_generated_follows_the_program(extensions: None, monkeypatch: pytest.MonkeyPatch) -> None:
    generated = importlib.import_module("generated")
    for of in PROGRAMS:
        made = generated.filled(f"<!-- generated: commands {of} -->\n")
        for name, command in commands(program(of)).items():
            assert f"## `{of} {name}`" in made
            options = [one.opts[0] for one in command.params if one.name != "help" and one.opts[0].startswith("-")]
            assert [option for option in options if f"`{option}`" not in made] == [], name
    monkeypatch.setitem(generated.COLUMNS, ("", "ratio"), "by another word")
    assert "by another word" in generated.filled("<!-- generated: run-tables -->")
    with pytest.raises(Exception, match='nothing is generated under the name "comands"; known: commands'):
        generated.filled("<!-- generated: comands -->")
    with pytest.raises(Exception, match='README.md has no section "Nowhere"'):
        generated.filled("<!-- generated: readme Nowhere -->")


@needs_sphinx
def test_docstrings_become_markup_that_says_the_same(extensions: None) -> None:
    docstrings = importlib.import_module("docstrings")
    text = "Sum of x_* over `a`s | b. Raises: NoError ever.\n\nArgs: a, b: one `c`. d: two\n    lines.\n\n    y = x * 2"
    made = docstrings.rewritten(text.splitlines(), ["a", "b", "d"])
    assert made == [
        "Sum of x\\_\\* over ``a``\\ s \\| b.", "", ":Raises: NoError ever.", "", ":Args:",
        "    - ``a``, ``b``: one ``c``.", "    - ``d``: two lines.", "", "::", "", "    y = x * 2", "",
    ]  # fmt: skip
    assert docstrings.rewritten(["a: one. b: two."], ["a", "b"])[0] == ":Fields:"
    assert docstrings.rewritten(["Note: one. b: two."], ["a", "b"])[0] == "Note: one. b: two."
