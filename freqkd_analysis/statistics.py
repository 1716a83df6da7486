"""Resampling by group: bootstrap intervals, sign-flip tests, effect size, false discovery. Arrays in, results out.

The unit is the group (a sequence, a clip): frames of one clip are one observation, not many. Values are summed per
group once; every draw is then a weighted sum of group rows, so that all draws of all quantities are one matrix product.

Letters: P pairs, G groups, Q summed columns, R results of a statistic, D draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

Array = np.ndarray[Any, np.dtype[Any]]
Statistic = Callable[[Array], Array]

DRAWS = 2000
LEVEL = 0.95
FEW_GROUPS = 10
CONVERGENCE_N = (50, 100, 200, 500)


@dataclass(frozen=True)
class Units:
    """What is resampled: `index` (P,) each pair's unit, `names` (G,), `kind` "group" or "pair", a `warning` or ""."""

    index: Array
    names: tuple[str, ...]
    kind: str
    warning: str

    def __len__(self) -> int:
        return len(self.names)

    @property
    def effective(self) -> float:
        """How many equally large units are worth as much: (sum of sizes)^2 / sum of squared sizes."""
        sizes = np.bincount(self.index, minlength=len(self)).astype(float)
        return float(sizes.sum() ** 2 / (sizes**2).sum())


class Interval(NamedTuple):
    """An estimate and its limits, each (R,); `method` (R,) is "bca", "percentile" or "none" (no number to give)."""

    estimate: Array
    low: Array
    high: Array
    method: Array


class Totals(NamedTuple):
    """Column totals over groups: `all` (Q,), `draws` (D, Q) and `jackknife` (G, Q), one group left out a row."""

    all: Array
    draws: Array
    jackknife: Array


def units(pairs: Sequence[str], groups: Sequence[str | None]) -> Units:
    """The resampling unit of each pair: its group, or the pair itself when one group or none is known.

    A pair without a group stands for itself. The order of names is sorted, so it does not depend on the order of pairs.

    Example:
        >>> units(["a", "b", "c"], ["s1", "s0", "s1"]).names, units(["a", "b"], ["s", "s"]).kind
        (('s0', 's1'), 'pair')
    """
    known = {str(g) for g in groups if _known(g)}
    kind, warning = "group", ""
    if len(known) < 2:
        kind = "pair"
        warning = (
            f"{'one group' if known else 'no groups'} known: pairs are the unit of the intervals, "
            "which are too narrow if neighbouring frames resemble each other"
        )
        labels = [f"pair {p}" for p in pairs]
    else:
        labels = [str(g) if _known(g) else f"pair {p}" for p, g in zip(pairs, groups, strict=True)]
    names, index = np.unique(np.asarray(labels, dtype=object).astype(str), return_inverse=True)
    if kind == "group" and len(names) < FEW_GROUPS:
        warning = f"only {len(names)} groups: intervals and p values are rough below {FEW_GROUPS}"
    return Units(index=index, names=tuple(names.tolist()), kind=kind, warning=warning)


def _known(group: object) -> bool:
    return isinstance(group, str) and group != ""


def group_sums(values: Array, index: Array, n_groups: int) -> tuple[Array, Array]:
    """Sums and counts per group of `values` (P, ...); NaN counts as absent. Returns two arrays (G, ...).

    Example:
        >>> sums, counts = group_sums(np.array([1.0, 2.0, np.nan, 5.0]), np.array([0, 0, 1, 1]), 2)
        >>> sums.tolist(), counts.tolist()
        ([3.0, 5.0], [2.0, 1.0])
    """
    flat = np.asarray(values, dtype=float).reshape(len(values), -1)
    present = ~np.isnan(flat)
    member = (np.asarray(index) == np.arange(n_groups)[:, None]).astype(float)
    sums, counts = member @ np.where(present, flat, 0.0), member @ present.astype(float)
    shape = (n_groups, *np.shape(values)[1:])
    return sums.reshape(shape), counts.reshape(shape)


@lru_cache(maxsize=8)
def bootstrap_weights(n_groups: int, draws: int = DRAWS, seed: int = 0) -> Array:
    """How often each draw takes each group: (D, G), every row sums to G.

    Example:
        >>> bootstrap_weights(4, draws=3).sum(axis=1).tolist()
        [4.0, 4.0, 4.0]
    """
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(n_groups, np.full(n_groups, 1.0 / n_groups), size=draws).astype(float)
    weights.flags.writeable = False  # shared by every caller
    return weights


def resample(sums: Array, weights: Array) -> Totals:
    """Totals of group columns `sums` (G, Q): over all groups, each draw of `weights` (D, G), and without each group."""
    total = sums.sum(axis=0)
    return Totals(total, weights @ sums, total - sums)


def interval(sums: Array, statistic: Statistic, weights: Array, effective: float | None = None) -> Interval:
    """Cluster-bootstrap interval of `statistic`, a function of column totals (..., Q) -> (..., R).

    BCa with a jackknife over groups; see `bca` for the fallback and for `effective`.

    Example:
        >>> sums = np.column_stack([np.arange(1.0, 21.0), np.full(20, 2.0)])
        >>> got = interval(sums, lambda t: t[..., :1] / t[..., 1:], bootstrap_weights(20))
        >>> got.estimate.tolist(), got.method.tolist(), bool(got.low[0] < 5.25 < got.high[0])
        ([5.25], ['bca'], True)
    """
    totals = resample(sums, weights)
    with np.errstate(divide="ignore", invalid="ignore"):
        return bca(statistic(totals.all), statistic(totals.draws), statistic(totals.jackknife), effective)


def bca(estimate: Array, draws: Array, jackknife: Array, effective: float | None = None) -> Interval:
    """Bias-corrected and accelerated limits from `draws` (D, R) and `jackknife` (G, R) values of a statistic.

    The tail probabilities are those of Student's t with G - 1 degrees of freedom, widened by sqrt(G / (G - 1)): the
    bootstrap's own spread is too small by that factor when groups are few (Hesterberg's expanded limits). G is
    `effective`, the number of equally large groups that are worth as much (`Units.effective`); all by default.
    Where bias or acceleration has no value (no spread, all draws on one side, a jackknife value missing) the limits
    are plain percentiles and `method` says so. A statistic without a value, or with under half of its draws finite,
    gets NaN and "none"; so does everything on two groups, whose three possible draws make no interval.
    """
    estimate, draws, jackknife = np.atleast_1d(estimate), np.atleast_2d(draws), np.atleast_2d(jackknife)
    n_groups = len(jackknife)
    draws = np.sort(np.where(np.isfinite(draws), draws, np.nan), axis=0)  # NaN goes last
    valid = np.sum(~np.isnan(draws), axis=0)
    usable = np.isfinite(estimate) & (valid * 2 > len(draws)) & (n_groups > 2)
    tail = _tail(n_groups if effective is None else effective)
    with np.errstate(divide="ignore", invalid="ignore"):
        below = np.sum(draws < estimate, axis=0) + 0.5 * np.sum(draws == estimate, axis=0)
        bias = ndtri(below / valid)
        spread = jackknife.mean(axis=0) - jackknife
        acceleration = np.sum(spread**3, axis=0) / (6.0 * np.sum(spread**2, axis=0) ** 1.5)
        z = ndtri(tail)
        ends = []
        for side in (z, -z):
            shifted = bias + side
            ends.append(ndtr(bias + shifted / (1.0 - acceleration * shifted)))
            usable_side = (1.0 - acceleration * shifted) > 0
            ends[-1] = np.where(usable_side, ends[-1], np.nan)
    corrected = usable & np.isfinite(ends[0]) & np.isfinite(ends[1])
    low = _quantile(draws, np.where(corrected, ends[0], tail), valid)
    high = _quantile(draws, np.where(corrected, ends[1], 1.0 - tail), valid)
    method = np.where(corrected, "bca", np.where(usable, "percentile", "none"))
    return Interval(estimate, np.where(usable, low, np.nan), np.where(usable, high, np.nan), method)


def _tail(n_groups: float) -> float:
    if n_groups <= 1:
        return (1.0 - LEVEL) / 2.0
    t = stdtrit(n_groups - 1.0, (1.0 - LEVEL) / 2.0) * np.sqrt(n_groups / (n_groups - 1.0))
    return float(ndtr(t))


def _quantile(ordered: Array, probability: Array, valid: Array) -> Array:
    """Linear quantile of each column of `ordered` (D, R), its first `valid` entries, at its own probability (R,)."""
    at = np.clip(probability, 0.0, 1.0) * np.maximum(valid - 1, 0)
    lower = np.floor(at).astype(int)
    upper = np.minimum(lower + 1, np.maximum(valid - 1, 0))
    column = np.arange(ordered.shape[1])
    share = at - lower
    return ordered[lower, column] * (1.0 - share) + ordered[upper, column] * share


def mean(totals: Array) -> Array:
    """sum / n from columns (..., 2R) = [sum, n], each R wide. Of pairwise quotients this is the mean of ratios."""
    total, n = np.split(totals, 2, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return total / n


def mean_over_pairs(values: Array) -> Array:
    """Mean over the first axis, infinite and NaN entries left out; NaN where none is left.

    Example:
        >>> mean_over_pairs(np.array([[1.0, np.nan], [3.0, np.inf]])).tolist()
        [2.0, nan]
    """
    known = np.isfinite(values)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(known, values, 0.0).sum(axis=0) / known.sum(axis=0)


def sign_flip(group_differences: Array, draws: int = DRAWS, seed: int = 0) -> Array:
    """Two-sided p of "the differences are symmetric about 0", groups flipped whole: (G, R) sums per group -> (R,).

    Exact over all 2^G sign patterns where these are no more than `draws`, else (k + 1) / (draws + 1). A column with
    NaN or without any non-zero difference has no p of use: NaN, and 1.

    Example:
        >>> sign_flip(np.array([[1.0], [2.0], [3.0], [1.5], [2.5]])).tolist()
        [0.0625]
    """
    sums = np.asarray(group_differences, dtype=float)
    n_groups = len(sums)
    exact = n_groups < 63 and 2**n_groups <= draws
    if exact:
        patterns = (np.arange(2**n_groups)[:, None] >> np.arange(n_groups)) & 1
    else:
        patterns = np.random.default_rng(seed).integers(0, 2, size=(draws, n_groups))
    observed = np.abs(sums.sum(axis=0))
    # Equal patterns must count as equal: a relative margin of rounding.
    margin = 1e-12 * np.abs(sums).sum(axis=0)
    reached = np.sum(np.abs((patterns * 2.0 - 1.0) @ sums) >= observed - margin, axis=0)
    p = reached / 2**n_groups if exact else (reached + 1) / (draws + 1)
    return np.where(np.isnan(observed), np.nan, p)


def effect_size(group_means: Array) -> Array:
    """Mean over standard deviation of group differences, (G, R) -> (R,): Cohen's d for paired groups, any sign.

    Example:
        >>> effect_size(np.array([[1.0], [2.0], [3.0]])).tolist()
        [2.0]
    """
    if len(group_means) < 2:
        return np.full(np.shape(group_means)[1:], np.nan)
    present = ~np.isnan(group_means)
    n = present.sum(axis=0)
    filled = np.where(present, group_means, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        centre = filled.sum(axis=0) / n
        variance = np.where(present, (filled - centre) ** 2, 0.0).sum(axis=0) / (n - 1)
        return np.where((n > 1) & (variance > 0), centre / np.sqrt(variance), np.nan)


def false_discovery(p: Array) -> Array:
    """Benjamini-Hochberg adjusted p over a family; NaN stays NaN and is not counted.

    Example:
        >>> false_discovery(np.array([0.01, 0.04, np.nan])).tolist()
        [0.02, 0.04, nan]
    """
    from scipy.stats import false_discovery_control

    adjusted = np.full(len(p), np.nan)
    known = ~np.isnan(p)
    if known.any():
        adjusted[known] = false_discovery_control(np.asarray(p)[known])
    return adjusted


def convergence(
    values: Array,
    statistic: Statistic,
    pairs: Sequence[str],
    groups: Sequence[str | None],
    sizes: Sequence[int] = CONVERGENCE_N,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[tuple[int, int, Interval]]:
    """Intervals on growing subsets of the pairs: [(n, units, Interval (R,)), ...].

    `values` (P, Q); `statistic` maps totals (..., 2Q) = [sums, counts] to (..., R). Subsets are nested in one seeded
    order of the sorted pair names; sizes beyond P are left out and P itself is always the last.
    """
    by_name = sorted(range(len(pairs)), key=lambda i: pairs[i])
    order = np.asarray(by_name)[np.random.default_rng(seed).permutation(len(pairs))]
    rows = []
    for n in sorted({min(int(size), len(pairs)) for size in (*sizes, len(pairs))}):
        picked = np.sort(order[:n])
        unit = units([pairs[i] for i in picked], [groups[i] for i in picked])
        columns = np.concatenate(group_sums(values[picked], unit.index, len(unit)), axis=1)
        weights = bootstrap_weights(len(unit), draws, seed)
        rows.append((n, len(unit), interval(columns, statistic, weights, unit.effective)))
    return rows
