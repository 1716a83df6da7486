"""The loop against a float64 AdamW of NumPy; what stops it, and what it logs."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_training
import torch
from tiny_training import PAIRS, SETTINGS, STEPS, Samples, Student, train
from torch import nn

from freqkd_analysis.errors import FreqkdError
from freqkd_train import checkpoint, engine, metrics_file, schedule
from freqkd_train.config import Training


class Linear(nn.Module):
    """y = x W + b under two terms."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(5)
        self.w = nn.Parameter(torch.from_numpy(rng.standard_normal((3, 2))).float())
        self.b = nn.Parameter(torch.from_numpy(rng.standard_normal(2)).float())

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        squares = (batch["x"] @ self.w + self.b - batch["y"]).square().mean(0)
        return {"loss": squares.sum(), "terms": {"a": squares[0], "b": squares[1]}}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / metrics_file.METRICS).read_text().splitlines()]


def reference(settings: Training, steps: int) -> tuple[list[dict[str, Any]], list[list[np.ndarray]]]:
    """Loss, gradient norm and rate of each step, and w, b after each: all in float64, gradients by hand."""
    p = [value.detach().double().numpy() for value in Linear().parameters()]
    m, v = ([np.zeros_like(x) for x in p] for _ in range(2))
    rows, states = [], []
    for step in range(steps):
        made = Samples().batch(schedule.keys(7, step, PAIRS, settings.batch))
        x, y = made["x"].double().numpy(), made["y"].double().numpy()
        r = x @ p[0] + p[1] - y
        g = [2 * x.T @ r / len(x), 2 * r.mean(0)]
        norm = math.sqrt(sum((part**2).sum() for part in g))
        if settings.clip:
            g = [part * min(1.0, settings.clip / norm) for part in g]
        warm = settings.warmup
        rate = settings.lr * (settings.warmup_start + (1 - settings.warmup_start) * step / warm)
        if step >= warm:
            angle = math.pi * (step - warm) / (steps - warm)
            rate = settings.min_lr + (settings.lr - settings.min_lr) * math.cos(angle / 2) ** 2
        for i, part in enumerate(g):
            m[i], v[i] = 0.9 * m[i] + 0.1 * part, 0.999 * v[i] + 0.001 * part**2
            p[i] = p[i] * (1 - rate * (settings.weight_decay if p[i].ndim > 1 else 0))
            top, under = m[i] / (1 - 0.9 ** (step + 1)), np.sqrt(v[i] / (1 - 0.999 ** (step + 1)))
            p[i] = p[i] - rate * top / (under + 1e-8)
        rows.append({"loss": (r**2).mean(0).sum(), "terms": dict(zip("ab", (r**2).mean(0), strict=True)),
                     "grad_norm": norm, "lr": rate})  # fmt: skip
        states.append([x.copy() for x in p])
    return rows, states


@pytest.mark.parametrize("accumulate", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_steps_are_those_of_adamw_in_float64(tmp_path: Path, accumulate: int, clip: float) -> None:
    """Parts of unlike size too: the gradient is the mean over the batch, not over the parts."""
    settings = SETTINGS.model_copy(update={"accumulate": accumulate, "clip": clip, "batch": 5, "ema": 0.0})
    module = train(tmp_path, settings, module=Linear(), evaluate=None)
    rows, states = reference(settings, 12)
    logged = lines(tmp_path)
    assert [row["step"] for row in logged] == list(range(1, 13))
    assert [row["epoch"] for row in logged] == [0] * 4 + [1] * 4 + [2] * 4
    for row, expected in zip(logged, rows, strict=True):
        assert metrics_file.flat({key: row[key] for key in expected}) == pytest.approx(
            metrics_file.flat(expected), rel=2e-5
        )
    for value, expected in zip(module.parameters(), states[-1], strict=True):
        assert np.allclose(value.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_the_moving_average_is_what_remains(tmp_path: Path) -> None:
    module = train(tmp_path, SETTINGS.model_copy(update={"clip": 1.0}), module=Linear(), evaluate=None)
    mean = [value.detach().double().numpy() for value in Linear().parameters()]
    for step, state in enumerate(reference(SETTINGS.model_copy(update={"clip": 1.0}), STEPS)[1], start=1):
        decay = min(0.9, (1 + step) / (10 + step))
        mean = [decay * a + (1 - decay) * b for a, b in zip(mean, state, strict=True)]
    for value, expected in zip(module.parameters(), mean, strict=True):
        assert np.allclose(value.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    state = checkpoint.load(checkpoint.steps(tmp_path)[-1])
    assert not torch.equal(state["module"]["w"], module.w) and torch.equal(state["ema"]["w"], module.w)


def test_evaluation_is_of_the_average_in_evaluation_mode(tmp_path: Path) -> None:
    module, seen = Student(), []

    def evaluate() -> dict[str, float]:
        seen.append((module.training, module.last.bias.detach().clone()))
        return {"val/loss": 0.0}

    train(tmp_path, module=module, evaluate=evaluate)
    assert [training for training, _ in seen] == [False] * 3
    assert torch.equal(seen[-1][1], module.last.bias)


def test_frozen_parameters_stay_to_the_bit(tmp_path: Path) -> None:
    module = train(tmp_path)
    assert torch.equal(module.frozen.weight, Student().frozen.weight)
    assert not torch.equal(module.first.weight, Student().first.weight)
    assert all(p.grad is None for p in module.parameters())


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        import timm

        self.student = timm.create_model("test_vit", num_classes=0)
        self.projector = nn.Conv2d(4, 4, 1)


def test_layer_decay_falls_from_the_last_block_to_the_first() -> None:
    module = Blocks()
    settings = Training(layer_decay=0.5, weight_decay=0.1, lr=1.0)
    optimiser = schedule.adamw(module, settings)
    schedule.set_rate(optimiser, 0.2)
    depth = len(module.student.blocks)
    groups = {id(p): group for group in optimiser.param_groups for p in group["params"]}
    assert len(groups) == len(list(module.parameters()))
    for i, block in enumerate(module.student.blocks):
        assert groups[id(block.attn.qkv.weight)]["lr"] == pytest.approx(0.2 * 0.5 ** (depth - 1 - i))
        assert groups[id(block.attn.qkv.weight)]["weight_decay"] == 0.1
        assert groups[id(block.norm1.weight)]["weight_decay"] == groups[id(block.attn.qkv.bias)]["weight_decay"] == 0
    assert groups[id(module.projector.weight)]["lr"] == groups[id(module.student.norm.weight)]["lr"] == 0.2


def test_layer_decay_without_layers_is_refused() -> None:
    with pytest.raises(FreqkdError, match="layer_decay needs a student of timm"):
        schedule.adamw(Linear(), Training(layer_decay=0.5))


def test_nothing_to_train_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FreqkdError, match="nothing to train: all parameters are frozen"):
        train(tmp_path, module=Linear().requires_grad_(False))


@pytest.mark.parametrize("n, batch", [(8, 4), (7, 7), (23, 5), (1, 1), (30, 7)])
def test_an_epoch_shows_each_sample_once_in_another_order(n: int, batch: int) -> None:
    per_epoch = schedule.steps_per_epoch(n, batch)
    orders = []
    for epoch in range(3):
        found = [key for i in range(per_epoch) for key in schedule.keys(3, epoch * per_epoch + i, n, batch)]
        assert {e for e, _ in found} == {epoch}
        indices = [index for _, index in found]
        assert len(set(indices)) == len(indices) == per_epoch * batch and set(indices) <= set(range(n))
        assert indices == engine.order(3, epoch, n)[: len(indices)].tolist()
        orders.append(tuple(indices))
    assert n < 5 or len(set(orders)) == 3
    assert n < 5 or engine.order(4, 0, n).tolist() != engine.order(3, 0, n).tolist()


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shares_of_processes_are_the_whole(world: int) -> None:
    parts = [schedule.share(list(range(7)), rank, world) for rank in range(world)]
    assert [item for part in parts for item in part] == list(range(7))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_what_is_drawn_depends_on_seed_step_and_process() -> None:
    def drawn(*numbers: int) -> float:
        schedule.seed_step(*numbers)
        return float(torch.rand(()))

    found = [drawn(0, 0, 0), drawn(1, 0, 0), drawn(0, 1, 0), drawn(0, 0, 1)]
    assert len(set(found)) == 4 and drawn(0, 0, 0) == found[0]


@pytest.mark.parametrize("warmup, warm", [(0.0, 0), (0.25, 25), (10.0, 10), (100.0, 100), (500.0, 100), (1.0, 1)])
def test_the_rate_is_the_closed_form(warmup: float, warm: int) -> None:
    settings = Training(lr=3e-4, warmup=warmup, warmup_start=0.1, min_lr=1e-6)
    found = [schedule.rate(step, 100, settings) for step in range(100)]
    t = np.arange(100, dtype=np.float64)
    rising = 3e-4 * np.interp(t, [0, max(warm, 1)], [0.1, 1.0])
    falling = 1e-6 + (3e-4 - 1e-6) * np.cos(np.pi / 2 * np.clip((t - warm) / max(100 - warm, 1), 0, 1)) ** 2
    assert np.allclose(found, np.where(t < warm, rising, falling), rtol=1e-12, atol=0)


def test_fewer_pairs_than_a_batch_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(FreqkdError, match="3 pairs are fewer than a batch of 4; set training.batch"):
        train(folder, source=Samples(3))
    assert not folder.exists()


def test_a_missing_term_is_named_before_anything_moves(tmp_path: Path) -> None:
    module = Student(norm=False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(FreqkdError, match='step 1: the loss has no term 0/hi, which .*Did you mean "0/high"'):
        train(tmp_path, module=module, expected=frozenset({"0/low", "0/hi"}))
    assert tiny_training.same(before, dict(module.state_dict()))


def test_what_is_logged(tmp_path: Path) -> None:
    train(tmp_path, SETTINGS.model_copy(update={"log_every": 4}), evaluate=lambda: {"val/loss": float("nan")})
    rows = lines(tmp_path)
    assert [row["step"] for row in rows if "loss" in row] == [1, 4, 8, 12, 15]
    assert [row["step"] for row in rows if "shares" in row] == [1, 4, 8, 12]
    assert [row for row in rows if "val/loss" in row] == [
        {"step": step, "epoch": epoch, "val/loss": None} for epoch, step in enumerate((5, 10, 15))
    ]
    assert sum(rows[0]["shares"].values()) == pytest.approx(1)
    assert not (checkpoint.folder_of(tmp_path) / checkpoint.BEST).exists()  # NaN is no best
    times = [json.loads(line) for line in (tmp_path / metrics_file.TIMINGS).read_text().splitlines()]
    assert all(row["images_per_s"] > 0 and row["memory"] > 1e6 for row in times) and len(times) == 3


def test_shares_leave_the_run_as_it_is(tmp_path: Path) -> None:
    with_shares, without = (train(tmp_path / str(n), shares_every=n).state_dict() for n in (2, 999))
    assert tiny_training.same(dict(with_shares), dict(without))


@pytest.mark.parametrize("metric, best", [("val/loss", 10), ("val/accuracy", 5)])
def test_the_best_is_kept(tmp_path: Path, metric: str, best: int) -> None:
    values = iter([2.0, 1.0, 1.5])
    settings = SETTINGS.model_copy(update={"best": metric, "keep": 1})
    module = Student()
    outcome = engine.fit(module, Samples(), settings, 7, tmp_path, evaluate=lambda: {metric: next(values)},
                         say=tiny_training.quiet)  # fmt: skip
    held = checkpoint.load(checkpoint.folder_of(tmp_path) / checkpoint.BEST)
    assert outcome.best == held["best"] == {"metric": metric, "value": {10: 1.0, 5: 2.0}[best], "step": best}
    assert held["step"] == best and outcome.last[metric] == 1.5
    assert (outcome.steps, outcome.epochs, outcome.resumed_at) == (STEPS, 3, 0) and outcome.seconds > 0


def test_a_metric_that_there_is_not_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(FreqkdError, match='training.best "val/los" is no metric .*Did you mean "val/loss"'):
        train(tmp_path, SETTINGS.model_copy(update={"best": "val/los"}))


def test_no_epochs_take_no_step(tmp_path: Path) -> None:
    module = train(tmp_path, SETTINGS.model_copy(update={"epochs": 0}))
    assert tiny_training.same(dict(module.state_dict()), dict(Student().state_dict()))


def test_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FreqkdError, match='no tracker "tensorbord".*Did you mean "tensorboard"'):
        train(tmp_path / "a", SETTINGS.model_copy(update={"track": ("tensorbord",)}))
    monkeypatch.setattr(metrics_file.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FreqkdError, match="training.track wandb is not installed: pip install wandb"):
        train(tmp_path / "a", SETTINGS.model_copy(update={"track": ("wandb",)}))
    assert not (tmp_path / "a").exists()


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, SETTINGS.model_copy(update={"track": ("tensorboard",)}))
    events = EventAccumulator(str(tmp_path / "freqkd"))
    events.Reload()
    assert [e.step for e in events.Scalars("terms/0/high")] == list(range(1, STEPS + 1))
    assert [e.step for e in events.Scalars("val/loss")] == [5, 10, 15]


class Casts(Linear):
    """Notes the type that a product comes out in."""

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.seen = (batch["x"] @ self.w).dtype
        return super().forward(batch)


def test_precision_holds_for_one_run_and_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    module = Casts()
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        folder = tmp_path / f"{precision}-{len(list(tmp_path.iterdir()))}"
        settings = SETTINGS.model_copy(update={"precision": precision})
        engine.trial(module, Samples(), settings, 7)
        assert module.seen == dtype
        evaluated: list[torch.dtype] = []

        def evaluate(evaluated: list[torch.dtype] = evaluated) -> dict[str, float]:
            evaluated.append((torch.ones(1, 3) @ module.w).dtype)
            return {"val/loss": 0.0}

        train(folder, settings, module=module, evaluate=evaluate)
        assert module.seen == dtype and evaluated == [dtype] * 3
        assert all(p.dtype == torch.float32 for p in module.parameters())
    module(Samples().batch([(0, 0)]))
    assert module.seen == torch.float32 and "forward" not in vars(module)


def test_a_trial_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = Student().eval()
    before, random = {k: v.clone() for k, v in module.state_dict().items()}, torch.get_rng_state()
    found = engine.trial(module, Samples(), SETTINGS, 7)
    assert tiny_training.same(before, dict(module.state_dict()))
    assert torch.equal(random, torch.get_rng_state()) and not any(m.training for m in module.modules())
    assert all(p.grad is None for p in module.parameters()) and list(tmp_path.iterdir()) == []
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert found["trained"] == trained and found["steps_per_epoch"] == 5 and found["parts"] == 2
    assert found["seconds_per_epoch"] == pytest.approx(5 * found["seconds"]) and found["memory"] > 1e6
    train(tmp_path)
    size = checkpoint.steps(tmp_path)[-1].stat().st_size
    assert 4 * 4 * trained < found["checkpoint_bytes"] < size  # parameters, two moments, average; no container


def test_handlers_come_back_after_an_error(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(FreqkdError):
        train(tmp_path, expected=frozenset({"nothing"}))
    assert signal.getsignal(signal.SIGTERM) is before
