"""The mutation check makes the changes it says, all of them whole Python, and leaves messages alone."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

SOURCE = '''
def f(x: int = 3) -> bool:
    """Above 3."""
    if not x:
        raise ValueError(f"expected more than {1 + 1}")
    return x < 4 and -x + 1.5 != (
        2
    )
'''


@pytest.fixture(scope="module")
def mutate(root: Path) -> Any:
    spec = importlib.util.spec_from_file_location("mutate", root / "tools" / "mutate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutate"] = module
    spec.loader.exec_module(module)
    return module


def test_every_kind_of_change_is_made(mutate: Any) -> None:
    found = mutate.mutants("a.py", SOURCE)
    after = "\n".join(" ".join(one.after.split()) for one in found)
    for piece in ("x: int = 4", "x: int = 2", "if (x):", "if (not not x):", "return None", "(x <= 4)", "x < 5",
                  "x < 3", " or ", "(-x - 1.5)", "(x) + 1.5", "-x + 3.0", "== 2"):  # fmt: skip
        assert piece in after, (piece, after)
    assert "1 - 1" not in after and "Above 4" not in after, "a message is no behaviour"


def test_each_change_is_one_and_compiles(mutate: Any) -> None:
    found = mutate.mutants("a.py", SOURCE)
    sources = {one.source for one in found}
    assert len(sources) == len(found) and SOURCE not in sources
    for one in found:
        ast.parse(one.source)
        assert SOURCE.replace(one.before, one.after, 1) == one.source


def test_every_module_of_the_check_is_there(mutate: Any, root: Path) -> None:
    for module, tests in mutate.TESTS.items():
        assert (root / module).is_file() and all((root / test).is_file() for test in tests)


def test_survivors_count_against_the_share(mutate: Any) -> None:
    rows = [mutate.Outcome("a.py", 1, "x", "y", result) for result in ("killed", "killed (time)", "survived", "killed")]
    assert mutate.share(rows) == 0.75
    assert "75%  below 85%" in mutate.table(rows) and "- x\n+ y" in mutate.table(rows)
