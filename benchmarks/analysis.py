"""How much time and memory the analysis adds to a network's forward pass, and what else a user could run.

    python benchmarks/analysis.py [--quick] [--json]

Every row checks its numbers before its time is taken; a row with other numbers fails. `benchmarks/README.md` says
what each row means. Exit status 1 when a row failed; a bar that is not met is told, not an error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import rivals
import stand
import torch
from stand import FEATURE, Case

from freqkd_analysis.bands import Bands
from freqkd_analysis.divergence import MEASURES
from freqkd_analysis.spectral import cross_spectrum

Row = dict[str, Any]
GRIDS = ((14, 14), (16, 16), (37, 46), (7, 7), (5, 8), (8, 5), (1, 7), (13, 1), (2, 2), (9, 16), (24, 24))
TIES = (((14, 14), 7), ((24, 24), 12), ((18, 18), 9), ((32, 40), 10))
MIB = 2**20
BUSY_BAR = 1.05

SHARE = [
    Case("vit_small_patch16_224", (224, 224), "fp32", 8, 1.02),
    Case("vit_small_patch16_224", (224, 224), "bf16", 8, 1.035),
    Case("vit_small_patch14_dinov2", (518, 644), "fp32", 1, 1.02),
    Case("vit_small_patch14_dinov2", (518, 644), "bf16", 1, 1.03),
    Case("vit_base_patch16_224", (224, 224), "fp32", 4, 1.01),
    Case("vit_base_patch16_224", (224, 224), "bf16", 4, 1.03),
]
MEMORY = [
    *(Case("vit_small_patch16_224", (224, 224), "fp32", 8, 10, c) for c in (("paired",), FEATURE)),
    *(Case("vit_small_patch14_dinov2", (518, 644), "bf16", 1, 10, c) for c in (("paired",), FEATURE)),
    Case("vit_base_patch16_224", (224, 224), "bf16", 4, 10),
    Case("vit_large_patch14_dinov2", (518, 644), "bf16", 1, 20),
]
GPU = ("vit_small_patch14_dinov2", "vit_base_patch14_dinov2", "vit_large_patch14_dinov2")


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe(case: Case) -> str:
    kind = "paired" if case.conditions == ("paired",) else "with shuffled and mean_removed"
    return f"{case.model} {case.size[0]}x{case.size[1]} {case.dtype}, {case.batch} pairs, {kind}"


def judged(row: Row, value: float, bar: float) -> Row:
    row.update(bar=bar, verdict="met" if value <= bar else "not met")
    return row


def share_rows(cases: list[Case], rounds: int, pairs: int) -> list[Row]:
    """Share of the taps, one thread, process CPU time; for each case paired alone, then with the feature controls."""
    rows, network = [], stand.networks()
    for case in cases:
        for conditions in (("paired",), FEATURE):
            case = case._replace(conditions=conditions)
            row: Row = {"row": f"share: {describe(case)}"}
            rows.append(row)
            with threads(1), stand.stand(case, network(case), max(3, min(pairs, 2 * case.batch))) as made:
                row["difference"] = stand.agreement(made)
                if row["difference"] > stand.FEATURE_TOLERANCE:
                    row["verdict"] = "FAILED: other numbers"
                    continue
                shares, times = stand.share(made, rounds)
            row["median"], row["least"], row["most"] = stand.summary(shares)
            per_map = 1e6 * statistics.median(times.inside) / (case.batch * len(made.bench.taps))
            row["note"] = f"{per_map:.0f} us a pair and layer; bare forward {statistics.median(times.bare):.2f} s"
            judged(row, row["median"], case.bar)
            if conditions != ("paired",):
                row["note"] += "; bar of paired alone"
    return rows


def memory_rows(cases: list[Case], pairs: int) -> list[Row]:
    """Extra peak of a block by the allocator's own events, plus the scratch that is held between forwards."""
    rows, network = [], stand.networks()
    for case in cases:
        with threads(1), stand.stand(case, network(case), max(2, min(pairs, 2 * case.batch))) as made:
            extra, scratch = (size / MIB for size in stand.extra_memory(made))
        total = extra + scratch
        note = f"scratch {scratch:.1f} MiB held + allocator peak {extra:+.1f} MiB"
        row: Row = {
            "row": f"memory MiB: {describe(case)}",
            "median": total,
            "least": total,
            "most": total,
            "note": note,
        }
        if case.conditions == ("paired",):
            judged(row, total, case.bar)
        else:
            row.update(verdict="measured", note=note + ": mean maps, first and previous map, 4 a layer")
        rows.append(row)
    return rows


@contextlib.contextmanager
def neighbour() -> Iterator[None]:
    """A process that holds a core."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        yield
    finally:
        process.kill()
        process.wait()


def busy_rows(case: Case, rounds: int) -> list[Row]:
    """Two threads in wall time, by themselves and beside a process that holds a core, in turn."""
    forms = {"2 threads": contextlib.nullcontext, "2 threads, busy neighbour": neighbour}
    shares: dict[str, list[float]] = {name: [] for name in forms}
    with threads(2), stand.stand(case, stand.networks()(case), 2 * case.batch) as made:
        difference = stand.agreement(made)
        for _ in range(rounds):
            for name, beside in forms.items():
                with beside():
                    shares[name] += stand.share(made, 1, time.perf_counter)[0]
    rows = []
    for name, found in shares.items():
        median, least, most = stand.summary(found)
        row: Row = {"row": f"{name}: {describe(case)}", "median": median, "least": least, "most": most,
                    "difference": difference, "note": "wall time; bar: no collapse"}  # fmt: skip
        rows.append(judged(row, median, BUSY_BAR))
        if difference > stand.FEATURE_TOLERANCE:
            row["verdict"] = "FAILED: other numbers"
    return rows


def exactness_rows() -> list[Row]:
    """Bars of exactness: the worst over grids, bands and seeds, as a share of the largest band unless said."""
    rng = np.random.default_rng(0)
    double = parseval = single = near = 0.0
    for grid in GRIDS:
        bands = Bands.parse("octave:3", grid)
        x, y = (3 + rng.standard_normal((2, 24, *grid)) for _ in range(2))
        expected = rivals.expected(torch.from_numpy(x), torch.from_numpy(y), bands)
        got = torch.stack(cross_spectrum(torch.from_numpy(x), torch.from_numpy(y), bands), -1).numpy()
        double = max(double, _worst(got, expected))
        whole = np.stack([(x * x).sum((1, 2, 3)), (y * y).sum((1, 2, 3))], -1)
        parseval = max(parseval, float(np.abs(got[..., :2].sum(1) / whole - 1).max()))
        x32, y32 = (torch.from_numpy(z).float() for z in (x, y))
        single = max(single, _worst(rivals.ours(x32, y32, bands)(), rivals.expected(x32, y32, bands)))
        y32 = x32 + 1e-4 * torch.from_numpy(rng.standard_normal(x.shape)).float()
        close = rivals.expected(x32, y32, bands)[..., 3]
        there = close > 0
        near = max(near, float(np.abs(rivals.ours(x32, y32, bands)()[..., 3][there] / close[there] - 1).max()))
    wrong = sum(edges_that_differ(grid, count) for grid, count in TIES)
    return [
        _exact("float64 spectra against np.fft and masks", double, 1e-12, f"{len(GRIDS)} grids"),
        _exact("float64 Parseval", parseval, 1e-12, "sum over bands against the sum of squares"),
        _exact("float32 spectrometer against float64", single, 2e-6, f"{len(GRIDS)} grids"),
        _exact("energy of the difference of y = x + 1e-4 n", near, 1e-5, "float32, relative error of each band"),
        _exact("modes on another side of an edge than exact fractions", wrong, 0, "grids full of ties"),
        _exact("measures that report a band without modes", empty_reported(), 0, "expected: none, all are NaN"),
    ]


def _worst(got: np.ndarray, expected: np.ndarray) -> float:
    return float((np.abs(got - expected).max((1, 2)) / np.abs(expected).max((1, 2))).max())


def _exact(name: str, value: float, bar: float, note: str) -> Row:
    return judged({"row": f"exact: {name}", "difference": float(value), "note": note}, value, bar)


def edges_that_differ(grid: tuple[int, int], count: int) -> int:
    """Modes of `linear:count` that lie in another band than exact fractions say."""
    index = Bands.parse(f"linear:{count}", grid).index
    edges2 = [Fraction(k, 2 * count) ** 2 for k in range(1, count)]
    wrong = 0
    for u, v in np.ndindex(*grid):
        squared = Fraction(min(u, grid[0] - u), grid[0]) ** 2 + Fraction(min(v, grid[1] - v), grid[1]) ** 2
        wrong += int(index[u, v] != sum(squared >= edge for edge in edges2))
    return wrong


def empty_reported() -> int:
    """Measures that give a number for a band that holds no mode (0.01 to 0.03 cycles per token on 14 x 14)."""
    bands = Bands.parse("0.01,0.03", (14, 14))
    assert bands.modes.tolist()[1] == 0
    x, y = torch.randn(2, 1, 8, 14, 14, generator=torch.Generator().manual_seed(0)).unbind(0)
    pa, pb, re, pd = np.moveaxis(rivals.ours(x, y, bands)()[:, 1], -1, 0)
    count = np.array([0.0])
    with np.errstate(all="ignore"):
        values = [measure(pa, pb, re, pd, count, 196.0, 8.0) for name, measure in MEASURES.items() if name != "modes"]
    return sum(bool(np.isfinite(value).any()) for value in values)


def rival_rows(quick: bool, share: float) -> list[Row]:
    rounds = 1 if quick else 3
    with threads(1):
        rows = rivals.spectra("14x14x384, 4 pairs", (14, 14), 384, 4, rounds, "octave:3")
        if not quick:
            rows += rivals.spectra("37x46x384, 1 pair", (37, 46), 384, 1, rounds, "octave:3")
        model = stand.networks()(SHARE[0]).model
        rng = np.random.default_rng(0)
        visible = torch.from_numpy(stand.smooth(rng, 8, 3, 224, 224)).float()
        infrared = visible.mean(1, keepdim=True) + 0.3 * visible
        names = [f"blocks.{i}" for i in range(12)]
        return rows + rivals.whole_run(model, visible, infrared, names, share, rounds)


def gpu_rows(quick: bool) -> list[Row]:
    """Pairs a second at 644x518 in bf16 and overhead between two device events, eager and compiled."""
    names = [f"GPU 644x518 bf16 {how}: {model}" for model in GPU for how in ("eager", "compiled")]
    if not torch.cuda.is_available():
        return [{"row": name, "verdict": "not measured (no GPU)", "note": "goal 1.05"} for name in names]
    rows = []
    for model in GPU:
        case = Case(model, (644, 518), "bf16", 16, 1.05)
        for how in ("eager", "compiled"):
            network = stand.networks()(case)
            if how == "compiled":  # the blocks' insides: hooks stay outside the compiled code
                for block in network.model.blocks:
                    block.forward = torch.compile(block.forward)
            with stand.stand(case, network, case.batch, "cuda") as made:
                difference = stand.agreement(made)
                bare, full = stand.device_seconds(made, 3 if quick else 10)
            ratios = [b / a for a, b in zip(bare, full, strict=True)]
            row: Row = {"row": f"GPU 644x518 bf16 {how}: {model}", "difference": difference,
                        "median": statistics.median(ratios), "least": min(ratios), "most": max(ratios),
                        "note": f"{case.batch / statistics.median(full):.0f} pairs/s"}  # fmt: skip
            rows.append(judged(row, row["median"], case.bar))
            if difference > stand.FEATURE_TOLERANCE:
                row["verdict"] = "FAILED: other numbers"
    return rows


def cpu_model() -> str:
    """The processor's name, without which no time means anything."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    except OSError:
        return platform.processor() or "unknown"


def table(rows: list[Row]) -> str:
    """Markdown, so that a run can go into the README as it is."""
    lines = ["| row | median (min..max) | bar | verdict | difference | note |", "|---|---|---|---|---|---|"]
    for row in rows:
        digits = 4 if row["row"].startswith(("share", "2 threads", "GPU", "whole")) else 1
        value = (
            f"{row['median']:.{digits}f} ({row['least']:.{digits}f}..{row['most']:.{digits}f})"
            if "least" in row
            else ""
        )
        value = value or (f"{row['median']:.{digits}f}" if "median" in row else "")
        difference = f"{row['difference']:.1e}" if "difference" in row else ""
        note = f"{row['ms']:.3g} ms a pair; {row.get('note', '')}" if "ms" in row else row.get("note", "")
        lines.append(f"| {row['row']} | {value} | {row.get('bar', '')} | {row['verdict']} | {difference} | {note} |")
    return "\n".join(lines)


def measure(quick: bool, say: Callable[[str], None]) -> list[Row]:
    rows: list[Row] = []
    say("exactness")
    rows += exactness_rows()
    say("share of the taps")
    rows += share_rows(SHARE[:2] if quick else SHARE, 1 if quick else 2, 16)
    share = next(
        (row["median"] - 1 for row in rows if row["row"].startswith("share") and "median" in row), float("nan")
    )
    say("memory")
    rows += memory_rows(MEMORY[:2] if quick else MEMORY, 16)
    say("busy neighbour")
    rows += busy_rows(SHARE[0], 1 if quick else 2)
    say("rivals")
    rows += rival_rows(quick, share)
    say("GPU")
    return rows + gpu_rows(quick)


def run(about: str, quick: str, measured: Callable[[bool, Callable[[str], None]], list[Row]],
        shown: Callable[[list[Row]], str], libraries: dict[str, str], arguments: list[str] | None) -> int:  # fmt: skip
    """A benchmark's command line: measure, then the machine, the table and one line of JSON; 1 if a row failed."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", action="store_true", help="the JSON line alone on stdout")
    options = parser.parse_args(arguments)
    rows = measured(options.quick, lambda text: print(text, file=sys.stderr, flush=True))
    machine = {"date": time.strftime("%Y-%m-%d"), "cpu": cpu_model(), "cores": os.cpu_count(), **libraries,
               "python": platform.python_version()}  # fmt: skip
    if not options.json:
        print(" · ".join(f"{key} {value}" for key, value in machine.items()) + "\n\n" + shown(rows) + "\n")
    print(json.dumps({**machine, "rows": rows}))
    return int(any(row["verdict"].startswith("FAILED") for row in rows))


def main(arguments: list[str] | None = None) -> int:
    libraries = {"torch": torch.__version__, "numpy": np.__version__}
    return run(str(__doc__), "one network, one round: two minutes", measure, table, libraries, arguments)


if __name__ == "__main__":
    sys.exit(main())
