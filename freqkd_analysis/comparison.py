"""Two runs side by side: the difference of every measure they share, with a paired interval where they share pairs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from freqkd_analysis import provenance, schema, statistics
from freqkd_analysis.calibration import Means, Scale, with_all
from freqkd_analysis.divergence import Cube, cube
from freqkd_analysis.errors import RunError
from freqkd_analysis.schema import PRIMARY_MEASURE
from freqkd_analysis.statistics import Array, Interval
from freqkd_analysis.summary import mean_columns, mean_interval

if TYPE_CHECKING:
    import pandas as pd

COMPARISON = (
    "condition", "layer", "band", "measure", "a", "b", "difference", "ci_low", "ci_high", "n", "groups", "how",
)  # fmt: skip

CALIBRATED = f"calibrated {PRIMARY_MEASURE}"


def compare(run_a: Path, run_b: Path, draws: int = statistics.DRAWS, seed: int = 0) -> pd.DataFrame:
    """Difference a - b of every measure that two runs share, per condition, layer (and `all`) and band.

    The measure CALIBRATED is the calibrated cosine divergence C of a condition that has a ceiling in both runs; it is
    there when the runs share pairs, and empty where either C is undetermined. Where the runs share pairs, only those
    count, and both sides are resampled by the same groups (`how` = "paired"); else each run is resampled by itself
    ("unpaired", percentile interval).
    Raises: RunError when the bands, conditions, layers or measures have nothing in common.
    """
    import pandas as pd

    a, b = (cube(schema.read(run / "divergence.parquet")) for run in (run_a, run_b))
    texts = [str(provenance.read_manifest(run)["config"]["bands"]) for run in (run_a, run_b)]
    if texts[0] != texts[1] or a.bands != b.bands:
        raise RunError(
            f'expected two runs with the same bands, got "{texts[0]}" and "{texts[1]}"; '
            f"run `freqkd-analyze summarize {run_b} --bands {texts[0]}` and compare with its folder."
        )
    layers = [n for n in a.layers if n in b.layers]
    shared = [(c, m) for c in a.values if c in b.values for m in a.measures if m in b.measures]
    if not layers or not shared:
        raise RunError(f"{run_a} and {run_b} share no {'layers' if not layers else 'conditions and measures'}.")
    frames = []
    for condition, measure in shared:
        sides = [x.of(condition, measure)[:, [x.layers.index(n) for n in layers]] for x in (a, b)]
        frame = _difference(sides, [(x.pairs[condition], x.groups[condition]) for x in (a, b)], draws, seed)
        frames.append(_keyed(frame, condition, measure, layers, a.bands))
    for condition in dict.fromkeys(c for c, m in shared if m == PRIMARY_MEASURE):
        frame = _calibrated(_of_layers(a, layers), _of_layers(b, layers), condition, draws, seed)
        if frame is not None:
            frames.append(_keyed(frame, condition, CALIBRATED, layers, a.bands))
    return pd.concat(frames, ignore_index=True)[list(COMPARISON)]


def _keyed(
    frame: pd.DataFrame, condition: str, measure: str, layers: list[int], bands: tuple[str, ...]
) -> pd.DataFrame:
    keys = {"condition": condition, "layer": np.repeat([*map(str, layers), "all"], len(bands)),
            "band": np.tile(np.array(bands), len(layers) + 1), "measure": measure}  # fmt: skip
    return frame.assign(**keys)


def _of_layers(x: Cube, layers: list[int]) -> Cube:
    places = [x.layers.index(n) for n in layers]
    return replace(x, layers=tuple(layers), values={c: v[:, places] for c, v in x.values.items()})


def _calibrated(a: Cube, b: Cube, condition: str, draws: int, seed: int) -> pd.DataFrame | None:
    """C of both runs and their difference, all resampled by the same groups; None where it cannot be told."""
    import pandas as pd

    scales = [Scale(x, condition, PRIMARY_MEASURE, "none", None) for x in (a, b)]
    needed = scales[0].needed
    if scales[0].ceiling is None or needed != scales[1].needed or a.measures != b.measures:
        return None
    both = Cube(a.layers, a.bands, a.measures, {}, {}, {})
    for side, x, other in (("a", a, b), ("b", b, a)):
        for name in needed:
            there = set(other.pairs[name])
            keep = [i for i, pair in enumerate(x.pairs[name]) if pair in there]
            both.pairs[f"{side}/{name}"] = tuple(x.pairs[name][i] for i in keep)
            both.groups[f"{side}/{name}"] = tuple(x.groups[name][i] for i in keep)
            both.values[f"{side}/{name}"] = x.values[name][keep]
    n = min(len(pairs) for pairs in both.pairs.values())
    if n < 2:
        return None
    means = Means(both, list(both.values), PRIMARY_MEASURE, range(len(a.bands)), draws, seed)

    def split(m: dict[str, Array], side: str) -> tuple[Array, Array]:
        return scales[0].calibrated({name: m[f"{side}/{name}"] for name in needed})

    spans = means.each(lambda m: {side: split(m, side)[1] for side in "ab"})
    known = (spans["a"].low > 0) & (spans["b"].low > 0)

    def derive(m: dict[str, Array]) -> dict[str, Array]:
        c = {side: with_all(np.where(known, split(m, side)[0], np.nan), axis=-2) for side in "ab"}
        return c | {"difference": c["a"] - c["b"]}

    found = means.each(derive)
    got = found["difference"]
    columns = {"a": found["a"].estimate, "b": found["b"].estimate, "difference": got.estimate, "ci_low": got.low,
               "ci_high": got.high}  # fmt: skip
    table = pd.DataFrame({name: values.ravel() for name, values in columns.items()})
    return table.assign(n=n, groups=len(means.unit), how="paired")


def _difference(sides: list[Array], who: list[tuple[Any, Any]], draws: int, seed: int) -> pd.DataFrame:
    import pandas as pd

    (pairs_a, groups_a), (pairs_b, groups_b) = who
    common = sorted(set(zip(pairs_a, groups_a, strict=True)) & set(zip(pairs_b, groups_b, strict=True)))
    if len(common) > 1:
        a, b = (
            side[[pairs.index(p) for p, _ in common]] for side, pairs in zip(sides, (pairs_a, pairs_b), strict=True)
        )
        both = np.isnan(a) | np.isnan(b)
        a, b = np.where(both, np.nan, a), np.where(both, np.nan, b)
        unit = statistics.units(*zip(*common, strict=True))
        got = mean_interval(a - b, unit, draws, seed)
        n, groups, how = len(common), len(unit), "paired"
    else:
        a, b = sides
        units = [statistics.units(*w) for w in who]
        got = _unpaired(sides, units, draws, seed)
        n, groups, how = min(len(a), len(b)), min(map(len, units)), "unpaired"
    means = [with_all(statistics.mean_over_pairs(x), axis=0).ravel() for x in (a, b)]
    return pd.DataFrame({"a": means[0], "b": means[1], "difference": got.estimate, "ci_low": got.low,
                         "ci_high": got.high, "n": n, "groups": groups, "how": how})  # fmt: skip


def _unpaired(sides: list[Array], units: list[statistics.Units], draws: int, seed: int) -> Interval:
    parts = []
    for i, (values, unit) in enumerate(zip(sides, units, strict=True)):
        columns, means, weights = mean_columns(values, unit, draws, seed + i)
        parts.append([means(t) for t in statistics.resample(columns, weights)[:2]])
    estimate, spread = (a - b for a, b in zip(*parts, strict=True))
    # Without one jackknife for two samples there is no acceleration: percentile.
    none = np.zeros((min(map(len, units)), len(estimate)))
    return statistics.bca(estimate, spread, none, min(unit.effective for unit in units))
