"""A checkpoint is whole or absent; the newest whole one is found; a full disk costs the new one only."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch
from torch import nn

from freqkd_analysis.errors import FreqkdError, RunError
from freqkd_train import checkpoint
from freqkd_train.checkpoint import CheckpointError

STATE: dict[str, Any] = {"version": 1, "step": 3, "x": torch.arange(500.0), "names": ["a", "b"], "best": None}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints of steps 1, 2 and 3."""
    for step in (1, 2, 3):
        checkpoint.save_step(tmp_path, step, STATE | {"step": step}, keep=5)
    return tmp_path


def names(run: Path) -> list[str]:
    return sorted(path.name for path in checkpoint.folder_of(run).iterdir())


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    checkpoint.save(path, STATE)
    assert tiny_training.same(checkpoint.load(path), STATE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.pt"]
    assert json.loads((tmp_path / "a.json").read_text())["size"] == path.stat().st_size


def test_the_last_few_are_kept(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        checkpoint.save_step(tmp_path, step, STATE, keep=2)
    checkpoint.save(checkpoint.folder_of(tmp_path) / checkpoint.BEST, STATE)
    checkpoint.save_step(tmp_path, 12, STATE, keep=2)
    assert names(tmp_path) == ["best.json", "best.pt", "step-00000011.json", "step-00000011.pt",
                               "step-00000012.json", "step-00000012.pt"]  # fmt: skip


def test_the_newest_is_used(run: Path) -> None:
    said: list[str] = []
    found = checkpoint.newest_valid(run, said.append)
    assert found is not None and found[1]["step"] == 3 and said == []
    assert checkpoint.newest_valid(run / "other") is None


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


BROKEN = {
    "is cut": half,
    "is damaged": flip,
    "is cut: 0 of": lambda path: path.write_bytes(b""),
    "has no readable digest": lambda path: path.with_suffix(".json").unlink(),
    "has no readable digest beside": lambda path: path.with_suffix(".json").write_text('{"size"'),
    "has version 99, expected 1": lambda path: checkpoint.save(path, STATE | {"version": 99}),
}


@pytest.mark.parametrize("says", BROKEN)
def test_a_broken_one_is_passed_over_and_said(run: Path, says: str) -> None:
    BROKEN[says](checkpoint.steps(run)[-1])
    said: list[str] = []
    found = checkpoint.newest_valid(run, said.append)
    assert found is not None and found[1]["step"] == 2
    assert len(said) == 1 and f"step-00000003.pt {says}" in said[0]
    assert said[0].endswith("; using step-00000002.pt instead")


def test_all_broken_is_an_error(run: Path) -> None:
    for path in checkpoint.steps(run):
        half(path)
    with pytest.raises(RunError, match=r"no whole checkpoint in .*: step-00000003.pt is cut: .* and 2 more; start"):
        checkpoint.newest_valid(run)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


def test_no_code_is_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole file with a right digest, but with a call in it."""
    monkeypatch.chdir(run)
    path = checkpoint.steps(run)[-1]
    checkpoint.save(path, {"version": 1, "payload": Payload()})
    with pytest.raises(CheckpointError, match=r"step-00000003.pt is no checkpoint \(UnpicklingError\)"):
        checkpoint.load(path)
    assert not (run / "ran").exists()


@pytest.mark.parametrize("after", [0, 5])
def test_a_full_disk_leaves_what_was_there(run: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    before, write, calls = names(run), checkpoint._Digest.write, []

    def full(self: checkpoint._Digest, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) > after:
            self.error = OSError(errno.ENOSPC, "No space left on device")
            raise self.error
        return write(self, data)

    monkeypatch.setattr(checkpoint._Digest, "write", full)
    with pytest.raises(CheckpointError, match="step-00000004.pt could not be written .No space left on device.; the"):
        checkpoint.save_step(run, 4, STATE, keep=1)
    monkeypatch.undo()
    assert names(run) == before
    found = checkpoint.newest_valid(run)
    assert found is not None and found[1]["step"] == 3


def test_a_full_disk_under_the_digest_too(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    before = names(run)
    monkeypatch.setattr("freqkd_analysis.schema.write_text", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoint.save_step(run, 4, STATE, keep=1)
    assert names(run) == before


def test_a_run_on_a_disk_that_fills_up_ends_with_one_line(tmp_path: Path) -> None:
    """The limit of the operating system, not of a mock: the save of step 6 fails, that of step 5 lives."""
    done = subprocess.run([sys.executable, tiny_training.__file__, "full", str(tmp_path), "6000"],
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "step-00000006.pt could not be written (File too large); the checkpoint before it is whole" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    found = checkpoint.newest_valid(tmp_path)
    assert found is not None and found[1]["step"] == 5
    assert [name for name in names(tmp_path) if "tmp" in name] == []
    tiny_training.train(tmp_path, resume=True)
    tiny_training.train(tmp_path / "whole")
    assert tiny_training.unlike(tmp_path / "whole", tmp_path) == []


def test_an_error_of_ours_is_not_taken_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(torch, "save", wrong)
    with pytest.raises(RuntimeError, match="something else"):
        checkpoint.save(tmp_path / "a.pt", STATE)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_are_swept(run: Path) -> None:
    before = names(run)
    (checkpoint.folder_of(run) / ".step-00000004.pt.123.tmp").write_bytes(b"half")
    (checkpoint.folder_of(run) / "step-00000004.json").write_text("{}")  # killed before the rename
    checkpoint.sweep(run, checkpoint.steps(run)[-1], keep=5)
    assert names(run) == before
    checkpoint.sweep(run, checkpoint.steps(run)[-1], keep=2)  # killed before the oldest was removed
    assert names(run) == before[2:]


def test_a_broken_one_does_not_take_the_place_of_a_whole_one(run: Path) -> None:
    """With keep=1, the next save would otherwise keep the broken one, which is newer, and remove itself."""
    half(checkpoint.steps(run)[-1])
    found = checkpoint.newest_valid(run, tiny_training.quiet)
    assert found is not None
    checkpoint.sweep(run, found[0], keep=1)
    assert names(run) == ["step-00000002.json", "step-00000002.pt"]
    checkpoint.save_step(run, 2, STATE, keep=1)
    assert names(run) == ["step-00000002.json", "step-00000002.pt"]


def test_frozen_weights_are_left_out_and_buffers_are_in() -> None:
    held = checkpoint.module_state(tiny_training.Student())
    assert set(held) == {"first.weight", "first.bias", "last.weight", "last.bias", "norm.weight", "norm.bias",
                         "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}  # fmt: skip


def test_restoring_brings_back_parameters_buffers_or_their_average() -> None:
    source, target = tiny_training.Student(), tiny_training.Student()
    frozen = target.frozen.weight.clone()
    for value in source.state_dict().values():
        value.add_(1)
    state = {"module": checkpoint.module_state(source), "ema": {"last.bias": torch.tensor([5.0, 6.0])}}
    checkpoint.restore(target, state)
    assert tiny_training.same(checkpoint.module_state(target), checkpoint.module_state(source))
    assert torch.equal(target.frozen.weight, frozen)
    checkpoint.restore(target, state, averaged=True)
    assert target.last.bias.tolist() == [5.0, 6.0]
    assert torch.equal(target.first.weight, source.first.weight)
    checkpoint.restore(target, state | {"ema": {}}, averaged=True)
    assert torch.equal(target.last.bias, source.last.bias)


@pytest.mark.parametrize(
    "other, says",
    [
        (nn.Linear(3, 8), r"weight has shape None there and \(8, 3\) here"),
        (tiny_training.Student(norm=False), r"norm.weight has shape \(8,\) there and None here"),
    ],
)
def test_another_student_is_refused_untouched(other: nn.Module, says: str) -> None:
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=says):
        checkpoint.restore(other, {"module": checkpoint.module_state(tiny_training.Student()), "ema": {}})
    assert tiny_training.same(before, dict(other.state_dict()))


@pytest.mark.parametrize(
    "metric, new, old, better",
    [
        ("val/loss", 1.0, None, True),
        ("val/loss", 0.5, 1.0, True),
        ("val/loss", 1.0, 1.0, False),
        ("held/Divergence/high", 0.5, 1.0, True),
        ("held/divergence", 2.0, 1.0, False),
        ("val/accuracy", 2.0, 1.0, True),
        ("val/accuracy", 0.5, 1.0, False),
        ("val/loss", float("nan"), None, False),
        ("val/accuracy", float("nan"), 1.0, False),
    ],
)
def test_what_is_better(metric: str, new: float, old: float | None, better: bool) -> None:
    assert checkpoint.is_better(metric, new, old) is better


def test_a_missing_checkpoint_is_an_error(run: Path) -> None:
    with pytest.raises(FreqkdError, match="no checkpoint .*best.pt; expected"):
        checkpoint.load(checkpoint.folder_of(run) / checkpoint.BEST)
    checkpoint.steps(run)[0].unlink()
    with pytest.raises(FreqkdError, match="no checkpoint .*step-00000001.pt; expected"):
        checkpoint.load(checkpoint.folder_of(run) / "step-00000001.pt")
