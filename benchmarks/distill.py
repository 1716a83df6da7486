"""How much FreqKD's loss adds to a distillation step, and how much of a step a cached teacher saves.

    python benchmarks/distill.py [--quick] [--json]

A loss costs 1 + (its time - that of plain MSE on the tokens) / (a step with plain MSE): forward and backward of the
loss between the networks' own, one thread, process CPU time, so that it stays valid beside other work. Every form
first agrees with masked complex transforms in float64, value and gradient; one that does not is not timed. Exit status
1 then; a bar that is not met is told, not an error.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from analysis import Row, judged, run, threads
from torch import Tensor
from torch.nn.functional import mse_loss

from freqkd_analysis.bands import Bands
from freqkd_analysis.features import Tap, find_taps, read_taps
from freqkd_train import student
from freqkd_train.config import Student
from freqkd_train.losses import FreqKDLoss

Loss = Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]
TOLERANCE = 2e-5
"""Largest relative error of value or gradient, float32 against float64."""


class Form(NamedTuple):
    """A row: name, bands, standardize, a form and a weight a band, and bars for few and for all layers."""

    name: str
    bands: str
    standardize: str
    forms: tuple[str, ...]
    weights: tuple[float, ...]
    bars: tuple[float, float] | None
    naive: bool = False


PARSEVAL, LOG, SIGNED = (1.005, 1.01), (1.007, 1.015), (1.012, 1.025)
FORMS = [
    Form("mse + mse", "split:0.5", "none", ("mse", "mse"), (1, 0.1), PARSEVAL),
    Form("mse + log_of_sum", "split:0.5", "none", ("mse", "log_of_sum"), (1, 0.1), PARSEVAL),
    Form("mse + log_of_mse", "split:0.5", "none", ("mse", "log_of_mse"), (1, 0.1), PARSEVAL),
    Form("octave:3 mse", "octave:3", "none", ("mse",) * 3, (1, 0.6, 0.3), PARSEVAL),
    Form("mse + log1p_abs", "released:0.5", "none", ("mse", "log1p_abs"), (1, 0.1), LOG),
    Form("mse + signed_log", "split:0.5", "none", ("mse", "signed_log"), (1, 0.1), SIGNED),
    Form("uniform preset, standardised", "linear:1", "released", ("mse",), (1,), None),
    Form("measured preset, octave:3, standardised", "octave:3", "released", ("mse",) * 3, (1, 0.6, 0.3), PARSEVAL),
    Form("released preset, standardised", "released:0.5", "released", ("mse", "log1p_abs"), (1, 0.1), LOG),
    Form("naive mse + log_of_mse", "split:0.5", "none", ("mse", "log_of_mse"), (1, 0.1), None, True),
    Form("naive mse + log1p_abs", "released:0.5", "none", ("mse", "log1p_abs"), (1, 0.1), None, True),
    Form("naive mse + signed_log", "split:0.5", "none", ("mse", "signed_log"), (1, 0.1), None, True),
]


def plain(students: dict[str, Tensor], teachers: dict[str, Tensor]) -> Tensor:
    """MSE on the tokens: what a step costs without any of this."""
    return torch.stack([mse_loss(x, teachers[tap]) for tap, x in students.items()]).sum()


def naive(form: Form) -> Loss:
    """The same loss as one would write it: transform, mask, inverse transform, a band at a time."""

    def loss(students: dict[str, Tensor], teachers: dict[str, Tensor]) -> Tensor:
        total = torch.zeros(())
        for tap, s in students.items():
            s, t = (_standardized(x, form.standardize) for x in (s, teachers[tap]))
            index = torch.from_numpy(Bands.parse(form.bands, tuple(s.shape[2:])).index)
            spectra = torch.fft.fft2(s), torch.fft.fft2(t)
            for k, (name, weight) in enumerate(zip(form.forms, form.weights, strict=True)):
                low, high = (torch.fft.ifft2(x * (index == k)).real for x in spectra)
                total = total + weight * _naive_form(name, low, high)
        return total

    return loss


def _standardized(x_BCHW: Tensor, how: str) -> Tensor:
    if how == "none":
        return x_BCHW
    x = x_BCHW - x_BCHW.mean((2, 3), keepdim=True)
    return x / x.norm(dim=1, keepdim=True)


def _naive_form(name: str, s: Tensor, t: Tensor) -> Tensor:
    if name == "log1p_abs":
        return mse_loss(s.abs().log1p(), t.abs().log1p())
    if name == "signed_log":
        return mse_loss(s.sign() * s.abs().log1p(), t.sign() * t.abs().log1p())
    square = (s - t).square()
    if name == "log_of_sum":
        return square.sum((1, 2, 3)).log1p().mean()
    return square.mean((1, 2, 3)).log1p().mean() if name == "log_of_mse" else square.mean()


class Stage:
    """Teacher and student of one network, random weights and images, and one step of training between them."""

    def __init__(self, model: str, size: tuple[int, int], pairs: int, layers: str, adapt: str) -> None:
        torch.manual_seed(0)
        self.teacher = student.start(model, "random", size).model.eval().requires_grad_(False)
        self.student = student.start(model, "random", size, seed=1).model.eval()
        self.taps: list[Tap] = find_taps(self.teacher, size, layers)
        student.adapt(self.student, Student(adapt=adapt, rank=8))
        trained = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, 1e-5)
        self.rgb, self.ir = torch.randn(2, pairs, 3, *size).unbind()
        self.cached = self.teach()

    @torch.no_grad()
    def teach(self) -> dict[str, Tensor]:
        return read_taps(self.teacher, self.taps, self.rgb)

    def step(self, loss: Loss, cached: bool = False) -> tuple[float, float]:
        """CPU seconds of the loss with its gradient at the features, and of the whole step."""
        start = time.process_time()
        teachers = self.cached if cached else self.teach()
        features = read_taps(self.student, self.taps, self.ir)
        leaves = {tap: x.detach().requires_grad_() for tap, x in features.items()}
        before = time.process_time()
        loss(leaves, teachers).backward()
        inside = time.process_time() - before
        torch.autograd.backward(list(features.values()), [leaf.grad for leaf in leaves.values()])
        self.optimizer.step()
        self.optimizer.zero_grad()
        return inside, time.process_time() - start


def made(form: Form, stage: Stage) -> Loss:
    if form.naive:
        return naive(form)
    grids = {tap.tap: tap.grid for tap in stage.taps}
    module = FreqKDLoss(grids, form.bands, form.standardize, form.forms, form.weights)
    return lambda students, teachers: module(students, teachers)["loss"]


def difference(form: Form, stage: Stage) -> float:
    """Largest relative error of value and gradient against the naive form in float64, on the stage's features."""
    with torch.no_grad():
        features = read_taps(stage.student, stage.taps, stage.ir)
    double = [{tap: x.double() for tap, x in side.items()} for side in (features, stage.cached)]
    expected, wanted = _gradient(naive(form), *double)
    value, gradient = _gradient(made(form, stage), features, stage.cached)
    off = [float((a.double() - b).norm() / b.norm()) for a, b in zip(gradient, wanted, strict=True)]
    return max(abs(value / expected - 1), *off)


def _gradient(loss: Loss, students: dict[str, Tensor], teachers: dict[str, Tensor]) -> tuple[float, Sequence[Tensor]]:
    leaves = {tap: x.detach().clone().requires_grad_() for tap, x in students.items()}
    value = loss(leaves, teachers)
    return float(value.detach()), torch.autograd.grad(value, list(leaves.values()))


def loss_rows(stage: Stage, forms: Sequence[Form], rounds: int, all_layers: bool) -> list[Row]:
    """One row a form; forms take turns, so that a drift of the machine meets all of them."""
    rows: list[Row] = []
    ready: dict[str, Loss] = {"plain": plain}
    for form in forms:
        row: Row = {"row": f"{form.name}, {len(stage.taps)} taps", "difference": difference(form, stage)}
        rows.append(row)
        if row["difference"] > TOLERANCE:
            row["verdict"] = "FAILED: other numbers"
        else:
            ready[form.name] = made(form, stage)
    stage.step(plain)
    inside: dict[str, list[float]] = {name: [] for name in ready}
    steps = []
    for _ in range(rounds):
        for name, loss in ready.items():
            seconds, whole = stage.step(loss)
            inside[name].append(seconds)
            steps += [whole] if name == "plain" else []
    base, step = statistics.median(inside["plain"]), statistics.median(steps)
    for form, row in zip(forms, rows, strict=True):
        if form.name not in ready:
            continue
        costs = [1 + (seconds - base) / step for seconds in inside[form.name]]
        row.update(median=statistics.median(costs), least=min(costs), most=max(costs))
        ms = 1e3 * statistics.median(inside[form.name]) / len(stage.taps)
        row["note"] = f"{ms:.2f} ms a tap (plain MSE {1e3 * base / len(stage.taps):.2f}); step {step:.2f} s"
        if form.bars is None:
            row["verdict"] = "measured"
        else:
            judged(row, row["median"], form.bars[all_layers])
    return rows


def cache_row(stage: Stage, name: str, rounds: int, bar: float) -> Row:
    """A step with the teacher's features at hand, in memory, over one with the teacher's forward."""
    stage.step(plain)
    ratios = []
    for _ in range(rounds):
        (_, whole), (_, without) = stage.step(plain), stage.step(plain, cached=True)
        ratios.append(without / whole)
    row: Row = {"row": f"cached teacher, {name}, {len(stage.taps)} taps", "note": "in memory, no reading of files"}
    row.update(median=statistics.median(ratios), least=min(ratios), most=max(ratios))
    return judged(row, row["median"], bar)


def table(rows: Sequence[Row]) -> str:
    """Markdown, so that a run can go into the README as it is."""
    lines = ["| row | cost (min..max) | bar | verdict | difference | note |", "|---|---|---|---|---|---|"]
    for row in rows:
        value = f"{row['median']:.4f} ({row['least']:.4f}..{row['most']:.4f})" if "median" in row else ""
        apart = f"{row['difference']:.1e}" if "difference" in row else ""
        lines.append(f"| {row['row']} | {value} | {row.get('bar', '')} | {row['verdict']} | {apart} "
                     f"| {row.get('note', '')} |")  # fmt: skip
    return "\n".join(lines)


def measure(quick: bool, say: Callable[[str], None], model: str = "vit_small_patch16_224",
            size: tuple[int, int] = (224, 224), pairs: int = 4, few: str = "2,5,8,11") -> list[Row]:  # fmt: skip
    rows: list[Row] = []
    with threads(1):
        for layers in (few, "all"):
            say(f"losses, layers {layers}")
            forms = [form for form in FORMS if not (quick and layers == "all" and form.naive)]
            rows += loss_rows(Stage(model, size, pairs, layers, "lora"), forms, 1 if quick else 7, layers == "all")
        for adapt, bar in (("lora", 0.75), ("full", 0.8)):
            say(f"cached teacher, {adapt}")
            rows.append(cache_row(Stage(model, size, pairs, few, adapt), adapt, 1 if quick else 5, bar))
    return rows


def main(arguments: list[str] | None = None) -> int:
    return run(str(__doc__), "one round: a minute", measure, table, {"torch": torch.__version__}, arguments)


if __name__ == "__main__":
    sys.exit(main())
