"""Two gloo processes give what one gives, write once, and stop together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch

from freqkd_train import checkpoint, metrics_file

SETTINGS = tiny_training.SETTINGS.model_copy(update={"ema": 0.0, "batch": 5})


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `together`, run by torchrun as two processes."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
               "--nproc-per-node", "2", tiny_training.__file__, "together", str(folder)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    module = tiny_training.Student(dropout=0, norm=False)
    tiny_training.train(folder / "whole", SETTINGS, module=module)
    torch.save(module.state_dict(), folder / "weights.pt")
    return folder


@pytest.fixture(scope="module")
def told(two: Path) -> list[dict[str, Any]]:
    return [json.loads((two / f"told-{rank}.json").read_text()) for rank in (0, 1)]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / metrics_file.METRICS).read_text().splitlines()]


def numbers(run: Path) -> list[dict[str, float]]:
    """Metrics by flat name, but for shares, which are those of the main process' own pairs."""
    return [metrics_file.flat({k: v for k, v in row.items() if k != "shares"}) for row in lines(run)]


@pytest.mark.parametrize("name", ["weights", "resumed"])
@pytest.mark.parametrize("rank", [0, 1])
def test_weights_are_those_of_one_process(one: Path, two: Path, name: str, rank: int) -> None:
    alone = torch.load(one / "weights.pt", weights_only=True)
    other = torch.load(two / f"{name}-{rank}.pt", weights_only=True)
    assert list(alone) == list(other)
    assert max(float((alone[key] - other[key]).abs().max()) for key in alone) < 1e-5
    start = tiny_training.Student(dropout=0, norm=False).state_dict()
    assert max(float((alone[key] - start[key]).abs().max()) for key in alone) > 1e-2


def test_metrics_are_those_of_one_process(one: Path, two: Path) -> None:
    """Three pairs in one process and two in the other: a mean of means would not do. Each line is there once."""
    alone, other = numbers(one / "whole"), numbers(two / "whole")
    assert len(alone) == len(other) == 12 + 3
    for a, b in zip(alone, other, strict=True):
        assert b == pytest.approx(a, abs=1e-5)


def test_the_stop_of_one_process_stops_both_at_the_same_step(two: Path, told: list[dict[str, Any]]) -> None:
    assert [rank["stopped"] for rank in told] == ["KeyboardInterrupt: "] * 2
    assert [rank["steps"] for rank in told] == [3, 3]
    assert [rank["resumed"] for rank in told] == ["", ""]
    assert numbers(two / "stopped") == numbers(two / "whole")


def test_a_step_that_is_not_finite_in_one_process_stops_both(two: Path, told: list[dict[str, Any]]) -> None:
    bundle = two / "poisoned" / "nonfinite-step-3"
    assert told[0]["poisoned"] == told[1]["poisoned"]
    assert "NonFiniteError: step 3: term 0/low is nan for the pairs pair-" in told[0]["poisoned"]
    assert sorted(path.name for path in bundle.glob("*.pt")) == ["rank-0.pt", "rank-1.pt"]
    (bad,) = told[0]["replayed"].values()
    assert bad[0] in told[0]["poisoned"] and bad[0] in checkpoint.load(bundle / "rank-1.pt")["batch"]["ids"]
    assert len(lines(two / "poisoned")) == 2


def test_a_missing_term_and_a_parameter_out_of_reach_stop_before_anything_moves(told: list[dict[str, Any]]) -> None:
    for rank in told:
        assert rank["missing"] == ("FreqkdError: step 1: the loss has no term 0/hihg, which the settings ask for. "
                                   'Did you mean "0/high"?')  # fmt: skip
        assert "does not reach extra.weight, extra.bias" in rank["unused"]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are told by /proc")
def test_no_thread_of_the_group_outlives_it(two: Path) -> None:
    """Alive at the end of the interpreter they aborted it, once in many runs: "terminate called"."""
    for rank in (0, 1):
        names = json.loads((two / f"threads-{rank}.json").read_text())
        assert names and not [name for name in names if "gloo" in name]


def test_both_runs_end_well(told: list[dict[str, Any]]) -> None:
    assert [rank["whole"] for rank in told] == ["", ""]
    assert [rank["trial"] for rank in told] == [3 * 8 + 8 + 8 * 2 + 2] * 2
