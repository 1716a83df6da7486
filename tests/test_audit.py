"""`make audit` never says that all is well of packages that it could not look up."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

FINE = {"name": "numpy", "version": "2.0", "vulns": []}
WEAK = {"name": "pillow", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"]},
                                                      {"id": "PYSEC-2", "fix_versions": []}]}  # fmt: skip
UNKNOWN = {"name": "torch", "skip_reason": "Dependency not found on PyPI"}


@pytest.fixture(scope="module")
def audit(root: Path) -> dict:
    return runpy.run_path(str(root / "tools" / "audit.py"))


@pytest.mark.parametrize("packages, status, says", [
    ([FINE], 0, ["audit: all 1 packages looked up; 0 known weaknesses"]),
    ([FINE, WEAK], 1, ["pillow 1.0: PYSEC-1, mended in 1.1", "pillow 1.0: PYSEC-2, mended in no version",
                       "audit: all 2 packages looked up; 2 known weaknesses"]),
    ([FINE, UNKNOWN], 2, ["audit: the service knows nothing of 1 of 2 packages (torch); 0 known weaknesses"]),
    ([UNKNOWN], 2, ["audit: the service knows nothing of 1 of 1 packages (torch); 0 known weaknesses, for nothing was "
                    "looked up"]),
    ([], 2, ["audit: not done, pip-audit gave no answer: last line"]),
])  # fmt: skip
def test_what_is_said_and_the_status(audit: dict, packages: list, status: int, says: list[str]) -> None:
    assert audit["judged"](packages, "last line") == (says, status)


def test_findings_are_told_even_where_others_are_unknown(audit: dict) -> None:
    lines, status = audit["judged"]([WEAK, UNKNOWN], "")
    assert status == 1 and len(lines) == 3 and "knows nothing of 1 of 2" in lines[-1]


@pytest.mark.parametrize("program, says", [
    ("raise OSError('the service does not answer')", "OSError: the service does not answer"),
    ("print('{}')", "no output, status 0"), ("raise SystemExit(3)", "no output, status 3"),
])  # fmt: skip
def test_a_program_that_falls_is_one_line(
    audit: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, says: str
) -> None:
    (tmp_path / "pip_audit.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    lines, status = audit["judged"](*audit["answer"](tmp_path / "requirements.lock", []))
    assert (lines, status) == ([f"audit: not done, pip-audit gave no answer: {says}"], 2)


def test_the_program_is_that_of_this_python(audit: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pip_audit.py").write_text("import json, sys; print(json.dumps({'dependencies': [{'name': "
                                           "sys.executable, 'version': '1', 'argv': sys.argv[1:]}]}))")  # fmt: skip
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (got,), _ = audit["answer"](tmp_path / "x.lock", ["--timeout", "5"])
    assert got["name"] == sys.executable
    assert {"--require-hashes", "--disable-pip", str(tmp_path / "x.lock"), "--timeout", "5"} <= set(got["argv"])
