"""Change one thing in a module, in a copy, and see whether its tests notice: what they let pass is not tested.

    python tools/mutate.py                                # the five modules that numbers come from, 25 changes each
    python tools/mutate.py freqkd_analysis/bands.py --count 100 --seed 1 --json mutants.json

A change is one of: a comparison with the other edge, a sum for a difference, a product for a quotient, a number one up,
one down or doubled, a condition turned round, a returned value withheld. Messages, annotations and decorators are left
alone. Some survivors change nothing that can be seen (an array that is a little too large); look before writing a test.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = 0.85
"""Share of changes that the tests should notice."""

TESTS: dict[str, tuple[str, ...]] = {
    "freqkd_analysis/bands.py": ("tests/test_bands.py",),
    "freqkd_analysis/spectral.py": (
        "tests/test_spectral.py",
        "tests/test_standardize.py",
        "tests/test_registration.py",
        "tests/test_losses_reference.py",
    ),
    "freqkd_analysis/statistics.py": ("tests/test_statistics.py",),
    "freqkd_train/losses.py": ("tests/test_losses_reference.py", "tests/test_losses.py"),
    "freqkd_train/metrics/kaist.py": ("tests/test_miss_rate.py",),
}
"""Module -> the tests that are its own, quick ones first. The module's examples and `test_mutants.py` run as well."""

SLOW = "tests/test_losses.py::test_the_benchmark_agrees_before_it_times"
COPIED = ("freqkd_analysis", "freqkd_train", "tests", "benchmarks", "pyproject.toml", "README.md", "docs")

SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.And: ast.Or,
    ast.Or: ast.And,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change: where, what the lines were, what they became, and the whole changed source."""

    module: str
    line: int
    before: str
    after: str
    source: str


@dataclass(frozen=True)
class Outcome:
    """What the tests made of a mutant: `killed`, `survived`, or `killed (time)` where they did not end."""

    module: str
    line: int
    before: str
    after: str
    result: str


def changed(node: ast.AST) -> Iterator[ast.AST]:
    """Every change of one node itself, its children left as they are."""
    if isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            if type(operator) in SWAPPED:
                one = copy.deepcopy(node)
                one.ops[place] = SWAPPED[type(operator)]()  # type: ignore[call-overload]
                yield one
    elif isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPPED:
        other = copy.deepcopy(node)
        other.op = SWAPPED[type(node.op)]()  # type: ignore[assignment]
        yield other
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield from (ast.Constant(node.value + 1), ast.Constant(node.value - 1))
    elif isinstance(node, ast.Constant) and isinstance(node.value, float):
        yield ast.Constant(2 * node.value or 1.0)
    elif isinstance(node, ast.Return) and node.value is not None:
        yield ast.Return(ast.Constant(None))
    elif isinstance(node, ast.If | ast.IfExp):
        yield ast.UnaryOp(ast.Not(), node.test)  # takes the place of the test alone, see `points`


def points(node: ast.AST) -> Iterator[tuple[ast.expr | ast.Return, ast.AST]]:
    """(node of the source, what to put there) for every change below a node; messages and annotations left out."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.Raise | ast.JoinedStr | ast.Assert):
                continue
            for other in changed(child):
                place = child.test if isinstance(child, ast.If | ast.IfExp) else child
                assert isinstance(place, ast.expr | ast.Return)
                yield place, other
            yield from points(child)


def mutants(module: str, source: str) -> list[Mutant]:
    """Every change of a module that still compiles, in the order of the source."""
    lines = source.encode().splitlines(keepends=True)
    starts = [sum(map(len, lines[:k])) for k in range(len(lines))]
    whole, found, seen = source.encode(), [], set()
    for node, other in points(ast.parse(source)):
        text = ast.unparse(ast.fix_missing_locations(other))
        text = text if isinstance(other, ast.Return | ast.Constant) else f"({text})"
        assert node.end_lineno is not None and node.end_col_offset is not None
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        new = (whole[:start] + text.encode() + whole[end:]).decode()
        if new in seen or ast.dump(ast.parse(new)) == ast.dump(ast.parse(source)):
            continue
        seen.add(new)
        before = source.splitlines()[node.lineno - 1 : node.end_lineno]
        after = new.splitlines()[node.lineno - 1 : node.end_lineno - text.count("\n") + len(new.splitlines())
                                 - len(source.splitlines())]  # fmt: skip
        found.append(Mutant(module, node.lineno, "\n".join(before), "\n".join(after), new))
    return found


def scratch() -> Path:
    """A copy of what the tests need. Nothing is ever changed in place."""
    folder = Path(tempfile.mkdtemp(prefix="mutants-"))
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def run(folder: Path, module: str, limit: float) -> str:
    """What the module's tests say in a process of its own: `passed`, `failed` or `time`."""
    extra = [name for name in ("tests/test_mutants.py",) if (folder / name).exists()]
    child = os.fork()
    if child == 0:
        os.setsid()
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        import pytest

        status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--deselect", SLOW, *TESTS[module], *extra, module])
        os._exit(int(status))
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "passed" if status == 0 else "failed"
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "time"


def examine(folder: Path, module: str, count: int, seed: int) -> Iterator[Outcome]:
    """The outcomes of a sample of a module's mutants, as they come. SystemExit where the tests fail unchanged."""
    path = folder / module
    source = path.read_text(encoding="utf-8")
    start = time.monotonic()
    if run(folder, module, 600) != "passed":
        raise SystemExit(f"{module}: its tests fail without any change; mend them first.")
    limit = 20 + 3 * (time.monotonic() - start)
    every = mutants(module, source)
    for mutant in sorted(random.Random(seed).sample(every, min(count, len(every))), key=lambda m: m.line):
        path.write_text(mutant.source, encoding="utf-8")
        said = run(folder, module, limit)
        path.write_text(source, encoding="utf-8")
        result = {"passed": "survived", "failed": "killed", "time": "killed (time)"}[said]
        yield Outcome(module, mutant.line, mutant.before, mutant.after, result)


def share(outcomes: Sequence[Outcome]) -> float:
    """The share of changes that were noticed."""
    return sum(one.result != "survived" for one in outcomes) / len(outcomes)


def table(outcomes: Sequence[Outcome]) -> str:
    """A row a module, and the lines of each survivor."""
    rows = [f"{'module':34} {'changes':>7} {'killed':>6} {'survived':>8} {'share':>6}"]
    modules = list(dict.fromkeys(one.module for one in outcomes))
    for name in [*modules, *(["all"] if len(modules) > 1 else [])]:
        those = [one for one in outcomes if name in ("all", one.module)]
        survived = sum(one.result == "survived" for one in those)
        mark = "" if share(those) >= TARGET else f"  below {TARGET:.0%}"
        rows.append(f"{name:34} {len(those):7} {len(those) - survived:6} {survived:8} {share(those):6.0%}{mark}")
    for one in outcomes:
        if one.result == "survived":
            rows += ["", f"{one.module}:{one.line}", *(f"- {line.strip()}" for line in one.before.splitlines()),
                     *(f"+ {line.strip()}" for line in one.after.splitlines())]  # fmt: skip
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where a module stays below the target."""
    parser = argparse.ArgumentParser(description="Change a module in a copy and see whether its tests notice.")
    parser.add_argument("modules", nargs="*", default=[], help=f"some of {', '.join(TESTS)} [all]")
    parser.add_argument("--count", type=int, default=25, help="changes a module [25]")
    parser.add_argument("--seed", type=int, default=0, help="of the sample [0]")
    parser.add_argument("--json", type=Path, help="write every outcome there")
    chosen = parser.parse_args(arguments)
    if unknown := [name for name in chosen.modules if name not in TESTS]:
        parser.error(f"no tests are known for {unknown[0]}; known: {', '.join(TESTS)}")
    sys.dont_write_bytecode = True  # a changed file of one size and second would be taken from its old bytecode
    folder = scratch()
    outcomes: list[Outcome] = []
    try:
        os.chdir(folder)
        os.environ["PYTHONPATH"] = str(folder)
        os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        sys.path[:] = [str(folder), *(entry for entry in sys.path if Path(entry or ".").resolve() not in
                                      (ROOT, ROOT / "tools"))]  # fmt: skip
        # Loaded once and shared by the processes of all mutants; none of them imports a module of ours.
        for heavy in ("torch", "scipy.stats", "scipy.ndimage", "pandas", "pytest", "pydantic"):
            __import__(heavy)
        for module in chosen.modules or TESTS:
            for outcome in examine(folder, module, chosen.count, chosen.seed):
                outcomes.append(outcome)
                print(f"{outcome.module}:{outcome.line} {outcome.result}", file=sys.stderr, flush=True)
    finally:
        os.chdir(ROOT)
        shutil.rmtree(folder, ignore_errors=True)
    print(table(outcomes))
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(one) for one in outcomes], indent=1) + "\n", encoding="utf-8")
    return int(any(share([one for one in outcomes if one.module == name]) < TARGET for name in TESTS
                   if any(one.module == name for one in outcomes)))  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
