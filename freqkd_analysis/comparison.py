"""Two runs side by side: the difference of every measure they share, with a paired interval where they share pairs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from freqkd_analysis import provenance, schema, statistics
from freqkd_analysis.calibration import with_all
from freqkd_analysis.divergence import cube
from freqkd_analysis.errors import RunError
from freqkd_analysis.statistics import Array, Interval
from freqkd_analysis.summary import mean_columns, mean_interval

if TYPE_CHECKING:
    import pandas as pd

COMPARISON = (
    "condition", "layer", "band", "measure", "a", "b", "difference", "ci_low", "ci_high", "n", "groups", "how",
)  # fmt: skip


def compare(run_a: Path, run_b: Path, draws: int = statistics.DRAWS, seed: int = 0) -> pd.DataFrame:
    """Difference a - b of every measure that two runs share, per condition, layer (and `all`) and band.

    Where the runs share pairs, only those count, and both sides are resampled by the same groups (`how` = "paired");
    else each run is resampled by itself ("unpaired", percentile interval).
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
        frame.insert(0, "condition", condition)
        frame.insert(1, "layer", np.repeat([*map(str, layers), "all"], len(a.bands)))
        frame.insert(2, "band", np.tile(np.array(a.bands), len(layers) + 1))
        frame.insert(3, "measure", measure)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)[list(COMPARISON)]


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
