"""Does the answer hang on the pairs? By source, light, image size and registration, from runs and their pairs.

    python study/subsets.py runs/vit runs/lite0 ...   -> results/subsets/{subsets,registration}.csv

`subsets.csv` is the verdict's own calculation (`calibration.answer`, groups resampled) on a part of the pairs; ceiling
and mean maps stay those of the whole run, so unrelated scenes of a part may come from other parts.
`registration.csv` regresses on the displacement of the pairs that the data set's manifest tells.

Letters: P pairs, L layers, K two bands (low, high).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from outputs import RESULTS, main, started, write_manifest, write_table

from freqkd_analysis import calibration, provenance, statistics
from freqkd_analysis.conditions import Geometry
from freqkd_analysis.data import layouts
from freqkd_analysis.data.records import PairRecord
from freqkd_analysis.data.verify import CONFIDENT
from freqkd_analysis.divergence import Cube, cube
from freqkd_analysis.errors import DataError
from freqkd_analysis.runfolder import CEILINGS, Run, read_run
from freqkd_analysis.schema import PRIMARY_CONDITIONS, PRIMARY_MEASURE

QUESTION, PAIRED = PRIMARY_CONDITIONS
CEILING = CEILINGS[QUESTION]
THIRDS = ("smallest third", "middle third", "largest third")
Array = np.ndarray[Any, np.dtype[Any]]


def read_cube(folder: Path) -> Cube:
    """The primary measure of paired and mean-removed images and of their ceilings, from divergence.parquet."""
    import pyarrow.parquet as pq

    wanted = [("condition", "in", [QUESTION, CEILING, PAIRED, "shuffled"]), ("measure", "=", PRIMARY_MEASURE)]
    return cube(pq.read_table(folder / "divergence.parquet", filters=wanted).to_pandas())


def part_of(whole: Cube, pairs: set[str]) -> Cube:
    """The same cube with the rows of `pairs` alone."""
    kept = {c: np.array([p in pairs for p in names], dtype=bool) for c, names in whole.pairs.items()}
    pick = {c: np.flatnonzero(rows) for c, rows in kept.items()}
    return Cube(
        whole.layers, whole.bands, whole.measures,
        {c: tuple(whole.pairs[c][i] for i in rows) for c, rows in pick.items()},
        {c: tuple(whole.groups[c][i] for i in rows) for c, rows in pick.items()},
        {c: whole.values[c][rows] for c, rows in pick.items()},
    )  # fmt: skip


def displacement(records: Sequence[PairRecord], run: Run) -> dict[str, float]:
    """Displacement of each pair in px of the network's input; pairs whose peak is below CONFIDENT are left out."""
    size, content = (tuple(run.get("data", key, default=run.get("config", "size"))) for key in ("input", "content"))
    kind = str(run.get("config", "geometry"))
    geometry = Geometry(kind, (size[0], size[1]), (content[0], content[1]))
    found = {}
    for record in records:
        meta = record.meta
        if (meta.get("est_shift_conf") or 0.0) >= CONFIDENT and meta.get("est_shift_px") is not None:
            scale = geometry.scale(int(meta["height"]), int(meta["width"]))
            found[record.id] = float(meta["est_shift_px"]) * scale
    return found


def parts(records: Sequence[PairRecord], shift: dict[str, float]) -> Iterator[tuple[str, str, set[str]]]:
    """(kind, part, pairs): everything, then every way to cut the pairs."""
    yield "all", "all pairs", {r.id for r in records}
    keys: dict[str, Callable[[PairRecord], str]] = {
        "source": lambda r: str(r.meta.get("source", "")),
        "light": lambda r: r.time,
        "source and light": lambda r: f"{r.meta.get('source', '')}, {r.time}",
        "image size": lambda r: f"{r.meta.get('width')} x {r.meta.get('height')}",
    }
    for kind, key in keys.items():
        names = sorted({key(r) for r in records})
        cut = [(name, {r.id for r in records if key(r) == name}) for name in names]
        if kind == "image size" and len(cut) > 8:  # crops of any size: halves by area say what can be said
            area = {r.id: int(r.meta["width"]) * int(r.meta["height"]) for r in records}
            middle = float(np.median(list(area.values())))
            small = {name for name, pixels in area.items() if pixels < middle}
            cut = [(f"under {middle:g} px", small), (f"from {middle:g} px", set(area) - small)]
        for name, pairs in cut:
            yield kind, name, pairs
    if len(shift) < len(THIRDS):
        return  # a data set whose manifest tells no displacement
    ends = np.quantile(list(shift.values()), [1 / 3, 2 / 3])
    place = {name: int(np.searchsorted(ends, px, side="right")) for name, px in shift.items()}
    for number, third in enumerate(THIRDS):
        px = [shift[name] for name in shift if place[name] == number]
        yield "displacement", f"{third}: {min(px):.1f} to {max(px):.1f} px", {n for n in shift if place[n] == number}
    yield "displacement", "not measured", {r.id for r in records} - set(shift)


def subset_row(whole: Cube, pairs: set[str], seed: int) -> dict[str, Any]:
    """n, groups, raw and calibrated numbers of a part of the pairs, means over layers, with intervals."""
    some = part_of(whole, pairs)
    asked, raw = (calibration.answer(some, c, PRIMARY_MEASURE, seed=seed) for c in (QUESTION, PAIRED))
    row: dict[str, Any] = {"n": len(some.pairs[QUESTION]), "groups": len(set(some.groups[QUESTION]))}
    named = {"raw_ratio": raw.intervals["geometric"], "mean_removed_ratio": asked.intervals["ratio"],
             "calibrated_low": asked.intervals["c_low"], "calibrated_high": asked.intervals["c_high"],
             "calibrated_ratio": asked.intervals["c_ratio"]}  # fmt: skip
    for name, got in named.items():
        row |= {name: got.estimate[-1], f"{name}_ci_low": got.low[-1], f"{name}_ci_high": got.high[-1]}
    few = f"{row['groups']} groups make no interval" if row["groups"] < 3 else ""
    note = few or asked.reasons[-1] or asked.unit.warning
    return row | {"verdict": asked.verdict(len(some.layers)), "note": note}


def regression(whole: Cube, shift: dict[str, float], source: dict[str, str], seed: int) -> list[dict[str, Any]]:
    """Three numbers with intervals: see `_fitted`. Only pairs with a measured displacement enter."""
    some = part_of(whole, set(shift))
    names, groups = some.pairs[QUESTION], some.groups[QUESTION]
    unit = statistics.units(names, groups)
    x_P = np.array([shift[name] for name in names])
    d_PLK = some.of(QUESTION, PRIMARY_MEASURE)[:, :, [some.low, some.high]]
    place = {name: i for i, name in enumerate(some.pairs[CEILING])}
    other = some.of(CEILING, PRIMARY_MEASURE)[:, :, [some.low, some.high]]
    empty = np.full(other.shape[1:], np.nan)
    ceiling_PLK = np.stack([other[place[name]] if name in place else empty for name in names])
    with np.errstate(divide="ignore", invalid="ignore"):
        y_P = np.log(d_PLK[..., 1] / d_PLK[..., 0]).mean(axis=1)
    assert np.isfinite(y_P).all() and np.isfinite(d_PLK).all(), "a pair without energy in a band has no log ratio"
    sources = sorted({source[name] for name in names})
    own_PS = np.array([[source[name] == one for one in sources] for name in names], dtype=float)
    moments = np.stack([np.ones_like(x_P), x_P, y_P, x_P * x_P, x_P * y_P], axis=-1)
    columns = [
        (own_PS[:, :, None] * moments[:, None, :]).reshape(len(names), -1),
        d_PLK.reshape(len(names), -1), (d_PLK * x_P[:, None, None]).reshape(len(names), -1),
    ]  # fmt: skip
    sums = [statistics.group_sums(c, unit.index, len(unit))[0] for c in columns]
    sums += list(statistics.group_sums(ceiling_PLK.reshape(len(names), -1), unit.index, len(unit)))
    sizes = [part.shape[1] for part in sums]
    at = float(np.median(x_P))

    def fitted(totals: Array) -> Array:
        return _fitted(np.split(totals, np.cumsum(sizes)[:-1], axis=-1), len(sources), d_PLK.shape[1], at)

    weights = statistics.bootstrap_weights(len(unit), statistics.DRAWS, seed)
    got = statistics.interval(np.concatenate(sums, axis=1), fitted, weights, unit.effective)
    return [
        {"quantity": name, "value": got.estimate[i], "ci_low": got.low[i], "ci_high": got.high[i],
         "method": got.method[i], "n": len(names), "groups": len(unit), "median_px": at}
        for i, name in enumerate(QUANTITIES)
    ]  # fmt: skip


QUANTITIES = ("calibrated ratio at 0 px", "calibrated ratio at the median", "factor a px", "factor a px within sources")


def _fitted(totals: list[Array], n_sources: int, n_layers: int, at: float) -> Array:
    """QUANTITIES from column totals (..., Q): calibrated high / low, mean over layers, where straight lines through
    divergence against displacement stand at 0 px and at the median; then exp(slope) of a pair's log ratio of high to
    low (mean over layers) against displacement, over all pairs and with a level of its own for each source."""
    moments, d, dx, ceiling, count = totals
    m = moments.reshape(*moments.shape[:-1], n_sources, 5)
    n, x, y, xx, xy = np.moveaxis(m.sum(axis=-2), -1, 0)
    spread = xx - x * x / n
    slope = (xy - x * y / n) / spread
    with np.errstate(divide="ignore", invalid="ignore"):
        each_n, each_x, each_y, each_xx, each_xy = np.moveaxis(m, -1, 0)
        below = np.where(each_n > 0, each_xx - each_x**2 / each_n, 0.0).sum(axis=-1)
        within = np.where(each_n > 0, each_xy - each_x * each_y / each_n, 0.0).sum(axis=-1) / below
    line = (dx - d * (x / n)[..., None]) / spread[..., None]
    ratios = []
    for px in (0.0, at):
        c = ((d / n[..., None]) + line * (px - x / n)[..., None]) / (ceiling / count)
        c = c.reshape(*c.shape[:-1], n_layers, 2)
        ratios.append((c[..., 1] / c[..., 0]).mean(axis=-1))
    return np.stack([*ratios, np.exp(slope), np.exp(within)], axis=-1)


def body(folders: list[str], out: Path = RESULTS / "subsets") -> None:
    tables: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    runs = {Path(folder).absolute().name: read_run(Path(folder)) for folder in folders}
    for name, run in runs.items():
        whole, seed = read_cube(run.folder), int(run.get("config", "seed"))
        known = set(whole.pairs[QUESTION])
        records = [r for r in layouts.load(str(run.get("data", "spec"))) if r.id in known]
        if {r.id for r in records} != known:
            raise DataError(f"{run.get('data', 'spec')} lacks pairs of {run.folder}; is it the data of that run?")
        shift = displacement(records, run)
        for kind, part, pairs in parts(records, shift):
            tables[0].append({"run": name, "kind": kind, "part": part} | subset_row(whole, pairs, seed))
        sources = {r.id: str(r.meta.get("source", "")) for r in records}
        if len(shift) >= len(THIRDS):
            tables[1].extend({"run": name} | row for row in regression(whole, shift, sources, seed))
    for rows, file in zip(tables, ("subsets.csv", "registration.csv"), strict=True):
        write_table(pd.DataFrame(rows), out / file)
    write_manifest(derived(runs, "subsets.py"), out, list(runs))


def derived(runs: dict[str, Run], script: str) -> dict[str, Any]:
    """The manifest of tables made from several runs; `seconds` is the time of those runs."""
    first = next(iter(runs.values()))
    return {
        "schema": 1, "data": first.get("data"), "network": {name: run.get("network") for name, run in runs.items()},
        "n": max(int(run.get("data", "n")) for run in runs.values()), "seed": first.get("config", "seed"),
        "command": started(script, *(f"runs/{name}" for name in runs)),
        "seconds": math.fsum(float(run.get("seconds")) for run in runs.values()), "commit": provenance.commit(),
        "statistics": {"draws": statistics.DRAWS, "level": statistics.LEVEL, "unit": "group"},
    }  # fmt: skip


if __name__ == "__main__":
    main(body, "python study/subsets.py RUN [RUN ...]")
