"""Steps that go wrong: not finite, and out of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch
from tiny_training import PAIRS, SETTINGS, Samples, Student, train
from torch import Tensor

from freqkd_analysis.errors import FreqkdError, NonFiniteError, RunError
from freqkd_train import checkpoint, engine, faults, revisit, schedule

STEP = 7
IDS = [f"pair-{i}" for _, i in schedule.keys(7, STEP - 1, PAIRS, SETTINGS.batch)]


class Bad(Student):
    """Goes wrong in the way `how`, for the third pair of step 7."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.how = how

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        out = super().forward(batch)
        if IDS[2] not in batch["ids"] or not self.training:
            return out
        if self.how == "term":
            out["terms"]["0/high"] = out["terms"]["0/high"] * float("inf")
        elif self.how == "loss":
            out["loss"] = out["loss"] + float("nan")
        elif self.how == "gradient":
            out["loss"] = out["loss"] + _Infinite.apply(self.last.bias.sum())
        return out


class _Infinite(torch.autograd.Function):
    """Zero, with an infinite gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 0

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * float("inf")


class Once(Samples):
    """The bad step is the first that asks for its third pair: earlier epochs name theirs otherwise."""

    def batch(self, keys: list[tuple[int, int]]) -> dict[str, Any]:
        made = super().batch(keys)
        epoch = schedule.keys(7, STEP - 1, PAIRS, SETTINGS.batch)[0][0]
        made["ids"] = [name if e == epoch else f"early-{name}" for name, (e, _) in zip(made["ids"], keys, strict=True)]
        return made


WAYS = {
    "term": (r"term 0/high is inf for the pairs", IDS[2:]),
    "loss": (r"term loss is nan for the pairs", IDS[2:]),
    "gradient": (r"the gradient of last.bias is not finite for the pairs", IDS),
}


@pytest.mark.parametrize("how", WAYS)
def test_it_stops_within_the_step_and_can_be_replayed(tmp_path: Path, how: str) -> None:
    says, ids = WAYS[how]
    module = Bad(how)
    with pytest.raises(NonFiniteError, match=f"step {STEP}: {says} {', '.join(ids)}; nothing was changed") as raised:
        train(tmp_path, source=Once(), module=module)
    bundle = tmp_path / f"nonfinite-step-{STEP}"
    assert str(raised.value).endswith(f"Lower training.lr, or look at these pairs. To run it again: freqkd-train "
                                      f"replay {bundle}")  # fmt: skip
    train(tmp_path / "until", SETTINGS.model_copy(update={"checkpoint_every": 1, "keep": 99}), Once())
    state = checkpoint.load(checkpoint.folder_of(tmp_path / "until") / f"step-{STEP - 1:08d}.pt")
    assert tiny_training.same(checkpoint.module_state(module), state["module"])  # batch statistics too
    assert checkpoint.load(checkpoint.steps(tmp_path)[-1])["step"] == STEP - 1

    again = Bad(how)
    found = engine.replay(bundle, again)
    assert found["step"] == STEP and list(found["bad"].values()) == [ids[-2:]]
    assert next(iter(found["bad"])) in str(raised.value)
    assert tiny_training.same(dict(again.named_parameters()), dict(module.named_parameters()))


def test_a_replay_gives_the_numbers_of_the_step(tmp_path: Path) -> None:
    """The bundle of a step whose gradient was bad, run by a module in which it is good: as in the run without fault."""
    with pytest.raises(NonFiniteError):
        train(tmp_path / "bad", source=Once(), module=Bad("gradient"))
    train(tmp_path / "good", source=Once())
    found = engine.replay(tmp_path / "bad" / f"nonfinite-step-{STEP}", Student())
    import json

    rows = [json.loads(line) for line in (tmp_path / "good" / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["step"] == STEP and "loss" in row]
    assert found["bad"] == {} and found["loss"] == pytest.approx(row["loss"], rel=1e-12)
    assert found["terms"] == pytest.approx(row["terms"], rel=1e-12)
    assert found["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-6)


def test_no_bundle_to_replay(tmp_path: Path) -> None:
    with pytest.raises(FreqkdError, match="no bundle in .*; expected a folder such as RUN/nonfinite-step-12"):
        engine.replay(tmp_path, Student())


def test_what_is_no_bundle_is_told_with_what_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    what = r"a bundle is the folder RUN/nonfinite-step-N that a `distill` run leaves"
    (tmp_path / "nonfinite-step-12").mkdir()
    for path, says in (("nope", r"no bundle nope\. For `replay`, "), (".", r"\. is no bundle in the folder of a run: "),
                       ("nonfinite-step-1", r'no bundle nonfinite-step-1\. Did you mean "nonfinite-step-12"\? .*'),
                       ("nonfinite-step-12", "nonfinite-step-12 is no bundle in the folder")):  # fmt: skip
        with pytest.raises(RunError, match=says if path == "nonfinite-step-12" else says + what):
            revisit.replay(Path(path), print)


def test_a_rate_that_diverges_is_stopped(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"lr": 1e30, "clip": 0.0, "epochs": 20})
    with pytest.raises(NonFiniteError, match="Lower training.lr"):
        train(tmp_path, settings, module=Student(norm=False))


class Small(Student):
    """Has room for `room` pairs a forward; otherwise what CUDA or the CPU's allocator say."""

    def __init__(self, room: int, error: Exception, norm: bool = True) -> None:
        super().__init__(norm=norm)
        self.room, self.error, self.refused = room, error, 0

    @property
    def shares(self) -> None:
        raise AttributeError("their forward would put the statistics back by itself")

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        out = super().forward(batch)  # the statistics have moved by now
        if self.training and len(batch["ids"]) > self.room:
            self.refused += 1
            raise self.error
        return out


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you ...")


@pytest.mark.parametrize("error", [CUDA, CPU])
def test_out_of_memory_takes_smaller_parts_and_says_so(tmp_path: Path, error: Exception) -> None:
    """The step is taken again from its start: the run is then that of a user who asked for these parts."""
    said: list[str] = []
    module = Small(2, error)
    train(tmp_path / "small", SETTINGS.model_copy(update={"accumulate": 1}), module=module, say=said.append)
    assert said == ["out of memory at 4 pairs a part: from here on 2 a part, 2 parts a step"]
    assert module.refused == 1
    asked = train(tmp_path / "asked", SETTINGS.model_copy(update={"accumulate": 2}))
    assert tiny_training.same(dict(module.state_dict()), dict(asked.state_dict()))


def test_out_of_memory_twice(tmp_path: Path) -> None:
    said: list[str] = []
    module = Small(1, CUDA, norm=False)
    train(tmp_path, SETTINGS.model_copy(update={"accumulate": 1}), module=module, say=said.append)
    assert said[1:] == ["out of memory at 2 pairs a part: from here on 1 a part, 4 parts a step"]
    assert module.refused == 2


def test_smaller_parts_are_remembered(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"accumulate": 1})
    source = Samples(before=lambda keys: stop() if len(source.seen) == 6 else None)

    def stop() -> None:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, settings, source, module=Small(2, CUDA))
    module = Small(2, CUDA)
    train(tmp_path, settings, module=module, resume=True)
    assert module.refused == 0


def test_no_room_for_one_pair_ends_with_the_line_to_change(tmp_path: Path) -> None:
    with pytest.raises(FreqkdError, match="out of memory for a single pair on cpu; set a smaller data.size"):
        train(tmp_path, module=Small(0, CUDA, norm=False))


def test_no_room_for_the_optimiser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise CUDA

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    with pytest.raises(FreqkdError, match="out of memory for the optimiser's state on cpu; set"):
        train(tmp_path)


@pytest.mark.parametrize("text", ["expected memory format", "shape mismatch", "alloc"])
def test_other_errors_pass(tmp_path: Path, text: str) -> None:
    assert not faults.out_of_memory(RuntimeError(text))
    with pytest.raises(RuntimeError, match=text):
        train(tmp_path, module=Small(1, RuntimeError(text)))
