"""What distillation did, on pairs it never saw: teacher(RGB) against student(IR), per layer and band, before and after.

The measuring, its controls and its statistics are the analysis' own: both states of the student become run folders
(`heldout/before`, `heldout/after`), and their comparison is `freqkd-analyze compare`. A student of another width is
read through a ridge regression of the teacher's channels, fitted on training pairs for either state, so that a
projector that training threw away, or never had, decides nothing.

Shapes: B images, C channels, H x W tokens, T tokens.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from freqkd_analysis import layers, measure, plan, provenance, schema, shards, terminal
from freqkd_analysis.conditions import Geometry
from freqkd_analysis.data.records import PairRecord
from freqkd_analysis.features import Tap, read_taps
from freqkd_analysis.models import Network
from freqkd_train import taps
from freqkd_train.taps import Match, Paired

if TYPE_CHECKING:
    import pandas as pd

BANDS = "octave:3"
CONDITIONS = ("paired", "shuffled", "mean_removed")
FIT_PAIRS = 64
"""Training pairs that the regression of a student of other width sees."""
RIDGE = 1e-3
"""Of the mean squared student channel: keeps nearly dependent channels from exploding."""

Say = Callable[[str], None]


@dataclass
class CrossBench(measure.Bench):
    """A bench whose visible images go through the teacher and whose infrared images go through the student."""

    student: Network | None = None
    match: Match | None = field(default=None, repr=False)

    def forward(
        self, views: Sequence[Tensor], sink: Callable[[Tap, Tensor], None], network: Network | None = None
    ) -> None:
        assert self.student is not None and self.match is not None
        half = len(views) // 2
        with torch.no_grad():
            teachers = read_taps(self.network.model, self.taps, self.input(views[:half], self.network),
                                 self.plan.settings.norm)  # fmt: skip
            wanted = [student for _, student in self.match.pairs]
            read = read_taps(self.student.model, wanted, self.input(views[half:], self.student))
            students = self.match(read)
        for tap in self.taps:
            both = torch.cat([teachers[tap.tap], students[tap.tap]])
            sink(tap, both.flatten(2).transpose(1, 2).contiguous())


@dataclass(frozen=True)
class Question:
    """What stays the same between before and after: teacher, pairing, pairs, geometry, machine."""

    teacher: Network
    pairs: Sequence[Paired]
    held: Sequence[PairRecord]
    geometry: Geometry
    conversion: str
    data: str
    layers: str
    norm: bool
    seed: int
    device: str
    fit: Callable[[], Iterable[Mapping[str, Any]]]
    """Batches of training pairs, for the regression."""


def evaluate(question: Question, before: Network, after: Network, out: Path, command: Sequence[str]) -> pd.DataFrame:
    """Measure both states into out/before and out/after; write change.csv and the figure; return the comparison.

    Returns: rows of `comparison.compare`, after - before: negative is closer to the teacher.
    """
    from freqkd_analysis.comparison import compare

    for name, student in (("before", before), ("after", after)):
        with terminal.counting(f"held-out pairs {name} training") as count:
            measured(question, student, out / name, [*command, f"({name} training)"], count)
    table = compare(out / "after", out / "before")
    table = table.rename(columns={"a": "after", "b": "before"})
    schema.write_text(out / "change.csv", table.to_csv(index=False, lineterminator="\n"))
    draw(table, out)
    return table


def measured(question: Question, student: Network, run: Path, command: Sequence[str],
             progress: Callable[[int, int], None]) -> None:  # fmt: skip
    """One state as a run folder of the analysis; kept when it is there already for the same weights."""
    from freqkd_analysis.summary import summarize

    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    digest = state_digest(student.model)
    if (run / "ratio.csv").is_file() and provenance.read_manifest(run)["network"].get("student_sha256") == digest:
        return
    shutil.rmtree(run, ignore_errors=True)
    settings = plan.Settings(
        pairs=len(question.held), data=question.data, model=question.teacher.name, layers=question.layers,
        norm=question.norm, size=question.geometry.size, geometry=question.geometry.kind, bands=BANDS,
        conditions=CONDITIONS, seed=question.seed,
    )  # fmt: skip
    made = plan.make(question.held, settings)
    named = _Named(**{**vars(question.teacher), "name": f"{question.teacher.name} (RGB) - {student.name} (IR)"})
    named.student_sha256 = digest
    bench = CrossBench(made, named, [t for t, _ in question.pairs], question.geometry, question.conversion,
                       device=question.device, student=student, match=_fitted(question, student))  # fmt: skip
    job = layers.Job(settings, made, bench, [])
    done = 0

    def step(count: int, what: str) -> None:
        nonlocal done
        done += count
        progress(done, job.work)

    layers.measure_all(job, run, step)
    began = {"started": started, "commit": provenance.commit(), "command": list(command)}
    layers.finish(job, run, began, time.monotonic() - clock, plan.Machine())
    summarize(run)
    shutil.rmtree(run / shards.FOLDER)


@dataclass
class _Named(Network):
    """The teacher as the run's network, with the student's hash beside its own."""

    student_sha256: str = ""

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"student_sha256": self.student_sha256}


def state_digest(model: nn.Module) -> str:
    """SHA-256 over names and bytes of a state dict."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _fitted(question: Question, student: Network) -> Match:
    """Matching by grid, with a regression in place of a projector where widths differ."""
    match = Match(question.pairs, project="unlike").to(question.device).requires_grad_(False)
    if len(match.projectors):
        unlike = [(t, s) for t, s in question.pairs if match.keys[t.tap] in match.projectors]
        for tap, solution in ridge(question, student, unlike).items():
            projector = match.projectors[match.keys[tap]]
            projector.weight.copy_(solution[:-1].T[:, :, None, None])  # type: ignore[operator]
            projector.bias.copy_(solution[-1])  # type: ignore[operator]
    return match


@torch.no_grad()
def ridge(question: Question, student: Network, pairs: Sequence[Paired]) -> dict[str, Tensor]:
    """Least squares of the teacher's channels on the student's and a constant, a tap: (C_student + 1, C_teacher).

    Both on the teacher's grid, in float64; RIDGE times the mean squared channel on the diagonal, none on the constant.
    """
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    device, unlike = question.device, ([t for t, _ in pairs], [s for _, s in pairs])
    networks = question.teacher.model.to(device), student.model.to(device)
    for batch in question.fit():
        teachers = read_taps(networks[0], unlike[0], batch["teacher"].to(device), question.norm)
        students = read_taps(networks[1], unlike[1], batch["student"].to(device))
        for teacher, own in pairs:
            y = teachers[teacher.tap].transpose(0, 1).flatten(1).T.double()
            x = taps.resized(students[own.tap], teacher.grid).transpose(0, 1).flatten(1).T.double()
            x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
            xx, xy = sums.get(teacher.tap, (0, 0))
            sums[teacher.tap] = (xx + x.T @ x, xy + x.T @ y)
    found = {}
    for tap, (xx, xy) in sums.items():
        penalty = RIDGE * xx.diagonal()[:-1].mean().clamp_min(torch.finfo(xx.dtype).tiny)
        added = torch.full_like(xx.diagonal(), float(penalty))
        added[-1] = 0
        found[tap] = torch.linalg.solve(xx + torch.diag(added), xy).float()
    return found


def draw(table: pd.DataFrame, out: Path) -> None:
    """out/change.svg, .png, .csv data: the calibrated change where it is known, else cosine, by layer and band."""
    from freqkd_analysis import figures, plots
    from freqkd_analysis.comparison import CALIBRATED

    chosen = rows(table, CALIBRATED)
    name = CALIBRATED
    if chosen["difference"].isna().all():
        chosen, name = rows(table, "cosine"), "cosine"
    chosen = chosen[chosen["layer"] != "all"]
    chosen = chosen.assign(layer=chosen["layer"].astype(int)).reset_index(drop=True)
    n, groups = int(table["n"].max()), int(table["groups"].max())
    drawing = figures.Drawing(
        f"held-out change, teacher(RGB) to student(IR)\nn = {n} pairs in {groups} groups", chosen,
        lambda t, ax: plots.change_by_layer(t, ax, name), 6.5, "Below 0 the student moved towards the teacher.",
    )  # fmt: skip
    figures.write_drawn(out, figures.render("change_by_layer", drawing))


def rows(table: pd.DataFrame, measure_: str, condition: str = "mean_removed") -> pd.DataFrame:
    """Rows of one measure; of `paired` where the mean-removed condition was not measured."""
    have = set(table["condition"])
    condition = condition if condition in have else "paired"
    return table[(table["measure"] == measure_) & (table["condition"] == condition)].reset_index(drop=True)


def told(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The comparison in short: over all layers, per band, raw cosine and calibrated, before, after and change."""
    from freqkd_analysis.comparison import CALIBRATED

    found = []
    for name in ("cosine", CALIBRATED):
        for row in rows(table, name).query("layer == 'all'").to_dict("records"):
            found.append({"measure": name, "band": row["band"], "before": row["before"], "after": row["after"],
                          "change": row["difference"], "ci_low": row["ci_low"], "ci_high": row["ci_high"],
                          "n": row["n"], "groups": row["groups"]})  # fmt: skip
    return found
