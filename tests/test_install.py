"""Set-up: what pyproject.toml promises is there, tools/bootstrap.py decides rightly. Nothing is installed here."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import freqkd_analysis

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_entry_points_name_functions_that_are_there() -> None:
    scripts = PROJECT["project"]["scripts"]
    assert set(scripts) == {"freqkd-analyze", "freqkd-train"}
    for target in scripts.values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_version_has_one_home_and_the_citation_follows() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert (ROOT / PROJECT["tool"]["hatch"]["version"]["path"]) == Path(freqkd_analysis.__file__)
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M)
    assert cited and cited.group(1) == freqkd_analysis.__version__
    assert f"## {freqkd_analysis.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_library_that_is_imported_is_declared() -> None:
    """What the packages import is the standard library, ourselves, or declared (optional parts in an extra)."""
    distribution = {"PIL": "pillow", "skimage": "scikit-image", "yaml": "pyyaml"}
    # Never apart from the library they come with, so they need no bound of their own.
    distribution |= {"markupsafe": "jinja2", "huggingface_hub": "timm", "click": "typer"}
    extras = PROJECT["project"]["optional-dependencies"]
    declared = PROJECT["project"]["dependencies"] + extras["weights"] + extras["export"]
    names = {re.split(r"[\[<>=~! ]", d)[0].lower().replace("-", "_") for d in declared}
    for package in ("freqkd_analysis", "freqkd_train"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                found = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    found = [node.module]
                for name in (f.split(".")[0] for f in found):
                    known = name in sys.stdlib_module_names or name in ("freqkd_analysis", "freqkd_train")
                    wanted = distribution.get(name, name).lower().replace("-", "_")
                    assert known or wanted in names, (
                        f"{path.name} imports {name}, which pyproject.toml does not declare"
                    )


def test_package_data_is_built_in() -> None:
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["freqkd_analysis", "freqkd_train"]
    assert {"freqkd_analysis/templates/*", "freqkd_analysis/weights/*", "freqkd_train/templates/*"} <= set(
        wheel["artifacts"]
    )


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    assert text.rstrip().endswith("exec make test")
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_ci_points_to_the_data_beside_the_checkout_and_passes_failure_on(tmp_path: Path) -> None:
    """Run the real script in a checkout whose `make` prints what it was given and fails."""
    checkout, tools = tmp_path / "main", tmp_path / "bin"
    for folder in (checkout / ".ci", tools, tmp_path / "shared" / "data"):
        folder.mkdir(parents=True)
    (checkout / ".ci" / "run").write_bytes((ROOT / ".ci" / "run").read_bytes())
    (tools / "make").write_text('#!/bin/sh\necho "$PWD $* $FREQKD_TEST_DATA"\nexit 3\n')
    (tools / "make").chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "FREQKD_TEST_DATA"}
    environment["PATH"] = f"{tools}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", ".ci/run"], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == [str(checkout), "test", str(tmp_path / "shared")]
    assert done.returncode == 3


def test_the_first_commands_of_the_readme_are_the_two_makes() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^\s*(?:\$ )?((?:make|pip|python3?|freqkd-\w+|git|source|cd) .*)$", readme, re.M)
    commands = [c for c in commands if not c.startswith(("git clone", "cd "))]
    assert [" ".join(c.split("#")[0].split()) for c in commands[:2]] == ["make analyze", "make test"]


def test_make_targets() -> None:
    """`make -n`: which commands each target would run, without running them."""
    for target, parts in {
        "analyze": ["bootstrap.py run", "freqkd-analyze layers --pairs 500"],
        "test": ["bootstrap.py test", "-m pytest"],
        "slow": ["bootstrap.py test", "-m slow"],
        "lint": ["bootstrap.py test", "ruff", "mypy"],
        "install": ["bootstrap.py run"],
    }.items():
        printed = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert all(part in printed for part in parts), f"make {target} would run:\n{printed}"


@pytest.fixture
def bootstrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/bootstrap.py, pointed at an empty checkout."""
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "tools" / "bootstrap.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    venv = tmp_path / ".venv"
    for name, path in {
        "ROOT": tmp_path,
        "VENV": venv,
        "PYTHON": venv / "bin" / "python",
        "STAMP": venv / "freqkd-setup.json",
        "UNFINISHED": venv / "freqkd-setup.unfinished",
    }.items():
        monkeypatch.setattr(module, name, path)
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    return module


def finished(bootstrap: Any, mode: str) -> None:
    bootstrap.PYTHON.parent.mkdir(parents=True, exist_ok=True)
    bootstrap.PYTHON.touch()
    bootstrap.STAMP.write_text(json.dumps({**bootstrap.wanted(), "mode": mode}))


def test_bootstrap_knows_when_nothing_is_to_do(bootstrap: Any) -> None:
    assert not bootstrap.ready("run"), "no .venv"
    finished(bootstrap, "run")
    assert bootstrap.ready("run")
    assert not bootstrap.ready("test"), "the test extra is missing"
    finished(bootstrap, "test")
    assert bootstrap.ready("run") and bootstrap.ready("test")


def _change_pyproject(b: Any) -> None:
    (b.ROOT / "pyproject.toml").write_text("[project]\nname = 'x'\n")


def _move(b: Any) -> None:
    b.STAMP.write_text(b.STAMP.read_text().replace(str(b.ROOT), "/elsewhere"))


@pytest.mark.parametrize(
    "what",
    [
        _change_pyproject,
        _move,
        lambda b: b.UNFINISHED.touch(),
        lambda b: b.PYTHON.unlink(),
        lambda b: b.STAMP.write_text('{"mode": "te'),
        lambda b: b.STAMP.unlink(),
    ],
    ids=["pyproject changed", "checkout moved", "interrupted", "python gone", "stamp torn", "no stamp"],
)
def test_bootstrap_sets_up_again(bootstrap: Any, what: Any) -> None:
    finished(bootstrap, "test")
    what(bootstrap)
    assert not bootstrap.ready("run")


def test_an_interrupted_set_up_starts_from_an_empty_venv(bootstrap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(bootstrap, "run")
    torn = bootstrap.VENV / "half-a-library"
    torn.touch()
    bootstrap.UNFINISHED.touch()
    asked: list[tuple[str, ...]] = []

    def create(self: Any, folder: str) -> None:
        assert bootstrap.UNFINISHED.exists() and not torn.exists()
        bootstrap.PYTHON.parent.mkdir()
        bootstrap.PYTHON.touch()

    monkeypatch.setattr(bootstrap.venv.EnvBuilder, "create", create)
    monkeypatch.setattr(bootstrap, "has_pip", lambda: True)
    monkeypatch.setattr(bootstrap, "pip", lambda lock, *arguments: asked.append(arguments))
    assert bootstrap.main(["test"]) == 0
    assert not torn.exists()
    assert asked[0][-1] == f"{bootstrap.ROOT}[test]"
    assert bootstrap.ready("test")
    assert bootstrap.main(["test"]) == 0 and bootstrap.main(["run"]) == 0
    assert len(asked) == 1, "a second call does no set-up"


def test_a_failing_pip_leaves_the_set_up_unfinished(
    bootstrap: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(bootstrap, "run")

    def fail(*_: object) -> None:
        raise subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(bootstrap, "has_pip", lambda: True)
    monkeypatch.setattr(bootstrap, "pip", fail)
    assert bootstrap.main(["test"]) == 1
    assert bootstrap.UNFINISHED.exists() and not bootstrap.ready("run")
    assert "pip ended with status 1" in capsys.readouterr().err


@pytest.mark.parametrize("version", [(3, 10, 2), (3, 14, 0)])
def test_a_python_out_of_range_is_one_line(
    bootstrap: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], version: tuple[int, ...]
) -> None:
    monkeypatch.setattr(bootstrap.sys, "version_info", version)
    monkeypatch.setenv("PATH", str(bootstrap.ROOT))
    assert bootstrap.main(["run"]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(
        rf"freqkd: expected Python 3\.11 to 3\.13, got {'.'.join(map(str, version))} and none .*\n", said
    )


def test_a_suitable_python_on_the_path_takes_over_and_a_dead_shim_does_not(
    bootstrap: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, status in {"python3.12": 127, "python3.13": 0}.items():
        (bootstrap.ROOT / name).write_text(f"#!/bin/sh\nexit {status}\n")
        (bootstrap.ROOT / name).chmod(0o755)
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 9, 1))
    monkeypatch.setenv("PATH", str(bootstrap.ROOT))
    started: list[str] = []
    monkeypatch.setattr(bootstrap.os, "execv", lambda path, arguments: started.extend([path, arguments[-1]]))
    bootstrap.main(["run"])
    assert started[:2] == [str(bootstrap.ROOT / "python3.13"), "run"]


FILES = {
    "pip-9.0.3-py3-none-any.whl": ">=2.7",
    "pip-26.2-py3-none-any.whl": ">=3.9",
    "pip-26.10-py3-none-any.whl": ">=3.9",
    "pip-27.0b1-py3-none-any.whl": ">=3.9",
    "pip-28.0-py3-none-any.whl": ">=3.99",
    "pip-29.0.tar.gz": ">=3.9",
}


def _page(form: str) -> tuple[str, str]:
    if form == "json":
        files = [
            {"url": f"../f/{n}", "hashes": {"sha256": hashlib.sha256(n.encode()).hexdigest()}, "requires-python": r}
            for n, r in FILES.items()
        ]
        withdrawn = {**files[2], "url": "../f/pip-26.11-py3-none-any.whl", "yanked": "broken"}
        return json.dumps({"files": [*files, withdrawn]}), "application/vnd.pypi.simple.v1+json"
    links = [
        f'<a href="../f/{n}#sha256={hashlib.sha256(n.encode()).hexdigest()}" '
        f'data-requires-python="{r.replace(">", "&gt;")}">{n}</a>'
        for n, r in FILES.items()
    ]
    withdrawn_link = '<a href="../f/pip-26.11-py3-none-any.whl#sha256=00" data-yanked="broken">x</a>'
    return f"<html><body>{' '.join([*links, withdrawn_link])}</body></html>", "text/html"


@pytest.mark.parametrize("form", ["json", "html"])
def test_the_newest_usable_pip_is_chosen(bootstrap: Any, form: str) -> None:
    """26.10 is newer than 26.2; a beta, an archive, a withdrawn one and one for another Python are passed over."""
    url, digest = bootstrap.newest_wheel(*_page(form), "https://index.example/simple/pip/")
    assert url == "https://index.example/simple/f/pip-26.10-py3-none-any.whl"
    assert digest == hashlib.sha256(b"pip-26.10-py3-none-any.whl").hexdigest()


def test_an_index_without_pip_is_one_line(bootstrap: Any) -> None:
    with pytest.raises(ValueError, match=r"no wheel of pip for this Python at https://i/;"):
        bootstrap.newest_wheel('{"files": []}', "application/json", "https://i/")


def test_a_wheel_that_does_not_match_its_hash_is_not_run(bootstrap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    page, kind = _page("json")
    answers = iter([(page.encode(), kind, "https://i/simple/pip/"), (b"something else", "", "")])
    monkeypatch.setattr(bootstrap, "fetch", lambda *_, **__: next(answers))
    monkeypatch.setattr(bootstrap.subprocess, "run", lambda *_, **__: pytest.fail("the wheel was run"))
    with pytest.raises(ValueError, match=r"does not match the index: expected sha256 .*, got "):
        bootstrap.install_pip()


def test_the_index_is_the_one_that_pip_would_use(bootstrap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(bootstrap.ROOT))
    configured = bootstrap.ROOT / ".config" / "pip" / "pip.conf"
    configured.parent.mkdir(parents=True)
    configured.write_text("[global]\nindex-url = https://from-file/%simple\n")
    assert bootstrap.setting("index-url", "default") == "https://from-file/%simple"
    monkeypatch.setenv("PIP_INDEX_URL", "https://from-environment/")
    assert bootstrap.setting("index-url", "default") == "https://from-environment/"
    assert bootstrap.setting("no-such-setting", "default") == "default"


@pytest.mark.parametrize("arguments", [[], ["all"], ["run", "test"]])
def test_wrong_use_of_the_bootstrap(bootstrap: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bootstrap.main(arguments) == 2
    assert "expected one of run, test" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["freqkd_analysis", "freqkd_train"])
def test_each_command_line_tells_its_version(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"{package}.cli").main(["--version"])
    assert ended.value.code == 0
    assert f"freqkd {freqkd_analysis.__version__}" in capsys.readouterr().out
