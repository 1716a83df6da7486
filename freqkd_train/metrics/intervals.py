"""How sure a figure and the difference of two runs are: paired bootstrap by video of AP50, miss rate and mIoU.

Frames of one video are one observation, so whole videos are drawn, the same ones for every run. Detections are matched
once; a draw only weighs them. Precision peaks, and recall moves, at true positives alone: for each of them its own
weight and the weight of the false positives before it are all that a draw needs, one matrix product for all draws.

Letters: G groups, D draws, T true positives, R runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from freqkd_analysis import statistics
from freqkd_analysis.statistics import DRAWS, Units
from freqkd_train.metrics import coco, kaist
from freqkd_train.metrics.boxes import Detections, Truth
from freqkd_train.metrics.matching import FALSE, TRUE, by_score, match, ranked

Figure = Callable[[np.ndarray], np.ndarray]
"""How often each group is taken, (D, G) whole numbers -> the figure of each draw, (D,)."""

RECALLS = np.linspace(0.0, 1.0, 101)
CHUNK = 4_000_000
"""Numbers held at once while weighing draws."""
_APART = float(2**40)


@dataclass(frozen=True)
class Tally:
    """One run, one class, one ignore rule, ready to be weighed."""

    group: np.ndarray
    """(T,) group of each true positive, by falling score."""
    before: np.ndarray
    """(G, T) float32: how many false positives of each group come before it."""
    counted: np.ndarray
    """(G,) boxes that count."""
    images: np.ndarray
    """(G,) images."""


def units(truth: Truth) -> Units:
    """The videos of a truth as units of resampling (its images where no videos are known).

    Example:
        >>> from freqkd_train.metrics.boxes import make_truth
        >>> units(make_truth(["a", "b", "c"], classes=["person"], groups=["v1", "v0", "v1"])).names
        ('v0', 'v1')
    """
    return statistics.units(truth.names, truth.groups)


def average_precision_50(truth: Truth, detections: Detections, counted: np.ndarray, unit: Units) -> Figure:
    """COCO AP50 in 0..1, mean over classes with counted boxes; NaN without any. All weights 1 give `coco.ap50`."""
    numbers, classes, counts_here = coco.rows_by_class(truth, counted)
    n = len(truth.classes)
    key = detections.image * n + detections.category
    order = ranked(key, detections.score, coco.MAX_DETECTIONS)
    image = detections.image[order]
    state, _ = match(
        truth.image[numbers] * n + classes, truth.box[numbers], counts_here[None], key[order], detections.box[order]
    )
    tallies = []
    for k in range(n):
        mine = detections.category[order] == k
        boxes = truth.image[numbers[(classes == k) & counts_here]]
        tallies.append(_tally(state[0, mine], detections.score[order][mine], image[mine], boxes, unit))
    return lambda weights: _mean_of_known(np.stack([_in_pieces(_average_precision, t, weights) for t in tallies]))


def miss_rate(
    truth: Truth, detections: Detections, unit: Units, setting: str = "Reasonable", person: int = 0
) -> Figure:
    """Log-average miss rate in 0..1, MATLAB style; NaN where nothing counts. Weights of 1 give `kaist.miss_rates`."""
    counted = kaist.counts(truth, kaist.SETTINGS[setting], person)
    detections = detections.of(detections.category == person)
    order = ranked(detections.image, detections.score, kaist.MAX_DETECTIONS)
    image = detections.image[order]
    state, _ = match(truth.image, truth.box, counted[None], image, detections.box[order])
    tally = _tally(state[0], detections.score[order], image, truth.image[counted], unit)
    return lambda weights: _in_pieces(_log_average, tally, weights)


def from_confusions(confusions: np.ndarray, unit: Units, statistic: Callable[[np.ndarray], np.ndarray]) -> Figure:
    """A figure of summed confusion matrices, such as mIoU.

    Args:
        confusions: (N, K, K) one matrix an image.
        statistic: summed matrices (..., K, K) -> (...).

    Example:
        >>> two = np.array([[[8, 0], [0, 2]], [[0, 5], [5, 0]]])
        >>> unit = statistics.units(["a", "b"], ["", ""])
        >>> share_right = lambda m: np.trace(m, axis1=-2, axis2=-1) / m.sum(axis=(-2, -1))
        >>> from_confusions(two, unit, share_right)(np.array([[1, 1], [2, 0]])).tolist()
        [0.5, 1.0]
    """
    shape = confusions.shape[1:]
    sums, _ = statistics.group_sums(confusions.reshape(len(confusions), -1), unit.index, len(unit))
    return lambda weights: statistic((weights @ sums).reshape(len(weights), *shape))


def paired(figures: Mapping[str, Sequence[Figure]], unit: Units, draws: int = DRAWS, seed: int = 0) -> dict[str, Any]:
    """Figures of R runs and all their differences, each with its 95 % interval.

    Args:
        figures: name of the figure -> one Figure a run, all over the units of `unit`.
    Returns: draws, seed, unit (group or pair), groups, warning (empty when there are groups enough), and `figures`:
        name -> {"runs": [{value, low, high, method}], "differences": [{"runs": [i, j], ...}]}; a difference is the
        later run minus the earlier one, and `clear` says whether its interval leaves 0 out. `method` is bca,
        percentile, or none (no interval: its limits are None).
    """
    weights = statistics.bootstrap_weights(len(unit), draws, seed)
    everything, without = np.ones((1, len(unit))), 1.0 - np.eye(len(unit))
    result: dict[str, Any] = {}
    for name, runs in figures.items():
        pairs = list(combinations(range(len(runs)), 2))
        got = []
        for rows in (everything, weights, without):
            values = np.stack([figure(rows) for figure in runs], axis=1)
            gaps = [values[:, j] - values[:, i] for i, j in pairs]
            got.append(np.column_stack([values, *gaps]))
        interval = statistics.bca(got[0][0], got[1], got[2], unit.effective)
        entries = [
            {"value": _number(value), "low": _number(low), "high": _number(high), "method": str(method)}
            for value, low, high, method in zip(*interval, strict=True)
        ]
        gaps_of = [
            {"runs": list(pair), **entry, "clear": _leaves_out_zero(entry)}
            for pair, entry in zip(pairs, entries[len(runs) :], strict=True)
        ]
        result[name] = {"runs": entries[: len(runs)], "differences": gaps_of}
    return {"draws": draws, "seed": seed, "unit": unit.kind, "groups": len(unit), "warning": unit.warning,
            "figures": result}  # fmt: skip


def _tally(state: np.ndarray, score: np.ndarray, image: np.ndarray, boxes: np.ndarray, unit: Units) -> Tally:
    """`boxes`: image number of each counted box."""
    sort = by_score(score)
    state, group = state[sort], unit.index[image[sort]]
    right = state == TRUE
    n_true, n_groups = int(right.sum()), len(unit)
    before = np.zeros((n_groups, n_true + 1), dtype=np.float32)
    wrong = state == FALSE
    np.add.at(before, (group[wrong], np.cumsum(right)[wrong]), 1.0)
    return Tally(
        group=group[right],
        before=np.cumsum(before, axis=1)[:, :n_true],
        counted=np.bincount(unit.index[boxes], minlength=n_groups).astype(float),
        images=np.bincount(unit.index, minlength=n_groups).astype(float),
    )


def _in_pieces(figure: Callable[[Tally, np.ndarray], np.ndarray], tally: Tally, weights: np.ndarray) -> np.ndarray:
    rows = max(1, CHUNK // max(1, len(tally.group)))
    parts = [figure(tally, weights[start : start + rows]) for start in range(0, len(weights), rows)]
    return np.concatenate(parts) if parts else np.zeros(0)


def _average_precision(tally: Tally, weights: np.ndarray) -> np.ndarray:
    positives = weights @ tally.counted
    if not len(tally.group):
        return np.where(positives > 0, 0.0, np.nan)
    true, false = _weighed(tally, weights)
    precision = true / (true + false + np.spacing(1.0))
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    at = _search(true, _least_whole(positives[:, None], RECALLS), "left")
    read = np.take_along_axis(envelope, np.minimum(at, true.shape[1] - 1), axis=1)
    return np.where(positives > 0, np.where(at < true.shape[1], read, 0.0).mean(axis=1), np.nan)


def _log_average(tally: Tally, weights: np.ndarray) -> np.ndarray:
    positives, images = weights @ tally.counted, weights @ tally.images
    recall = np.zeros((len(weights), len(kaist.POINTS)))
    with np.errstate(invalid="ignore", divide="ignore"):
        if len(tally.group):
            true, false = _weighed(tally, weights)
            at = _search(false, _largest_whole(images[:, None], kaist.POINTS), "right")
            found = np.where(at > 0, np.take_along_axis(true, np.maximum(at - 1, 0), axis=1), 0.0)
            recall = found / positives[:, None]
        missed = np.exp(np.log(np.maximum(1.0 - recall, kaist.FLOOR)).mean(axis=1))
    return np.where((positives > 0) & (images > 0), missed, np.nan)


def _weighed(tally: Tally, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(D, T) true positives up to and false positives before each true positive. Whole numbers: float32 is exact."""
    true = np.cumsum(weights[:, tally.group], axis=1)
    return true, (weights.astype(np.float32) @ tally.before).astype(np.float64)


def _search(ordered: np.ndarray, wanted: np.ndarray, side: Any) -> np.ndarray:
    """`searchsorted` row by row in whole numbers: (D, T) ascending rows and (D, Q) -> (D, Q) positions."""
    rows, width = ordered.shape
    offset = np.arange(rows)[:, None] * _APART
    flat = np.searchsorted((ordered + offset).ravel(), (wanted + offset).ravel(), side=side)
    return flat.reshape(wanted.shape) - np.arange(rows)[:, None] * width


def _least_whole(total: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The least whole k with k / total >= share, as floating point sees it."""
    k = np.ceil(share * total)
    with np.errstate(invalid="ignore", divide="ignore"):
        k = np.where((k > 0) & ((k - 1) / total >= share), k - 1, k)
        return np.where(k / total < share, k + 1, k)


def _largest_whole(total: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The largest whole k with k / total <= share, as floating point sees it."""
    k = np.floor(share * total)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((k + 1) / total <= share, k + 1, k)


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    return statistics.mean_over_pairs(values)


def _leaves_out_zero(entry: Mapping[str, Any]) -> bool:
    return entry["low"] is not None and (entry["low"] > 0 or entry["high"] < 0)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
