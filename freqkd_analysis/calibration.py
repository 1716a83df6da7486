"""Calibrated divergence, equivalent shift and verdict: divergences beside what else would make them.

    C = (D - D_floor) / (D_ceiling - D_floor)      0: no more than the floor; 1: no better than unrelated scenes

The ceiling is the same comparison between unrelated scenes. Numerator, denominator, floor and the shifted curve are
resampled together: a draw takes the same groups in all of them.

Letters: L layers (L + 1 with the row `all` last), K bands, S shifts; leading `...` is empty, draws, or left-out groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from freqkd_analysis import schema, statistics
from freqkd_analysis.divergence import DIVERGENCES, Cube
from freqkd_analysis.errors import FreqkdError, RunError
from freqkd_analysis.statistics import Array, Interval

if TYPE_CHECKING:
    import pandas as pd

PRIMARY, QUESTIONS = schema.PRIMARY_MEASURE, schema.PRIMARY_CONDITIONS
"""The primary measure, and the conditions that get a verdict, the primary one first."""

BEYOND = 1.25
"""A shift beyond the largest tested one is carried as this multiple of it and written as `> 8`."""


@dataclass
class Answer:
    """What one condition and measure say, per layer and for `all` (last): intervals (L + 1,) by name.

    `low`, `high`: mean divergence; `ratio`: high / low; `difference`: high - low; `c_low`, `c_high`, `c_ratio`:
    calibrated; `shift_low`, `shift_high`: input px. `p` (L + 1,) of the difference, `p_fdr` adjusted over layers
    (`all` keeps its p), `effect` its size, `mean_of_ratios` over pairs, `geometric`, `c_geometric` (1,) over layers.
    """

    intervals: dict[str, Interval]
    p: Array
    p_fdr: Array
    effect: Array
    mean_of_ratios: Array
    unit: statistics.Units
    largest_shift: float
    reasons: list[str] = field(default_factory=list)
    """Per layer and `all`: why there is no calibrated ratio, or an empty string."""

    def verdict(self, row: int) -> str:
        """`supports`, `against` or `undetermined` for one row of the table."""
        ratio = self.intervals["c_ratio"]
        return verdict(float(ratio.low[row]), float(ratio.high[row]))


def verdict(low: float, high: float) -> str:
    """What an interval of C_high / C_low says on "the high band diverges more".

    Example:
        >>> verdict(1.2, 2.0), verdict(0.5, 0.9), verdict(0.9, 1.1), verdict(float("nan"), 2.0)
        ('supports', 'against', 'undetermined', 'undetermined')
    """
    return "supports" if low > 1 else "against" if high < 1 else "undetermined"


def ceiling_of(condition: str, conditions: Sequence[str]) -> str | None:
    """The condition that stands for unrelated scenes, or None where nothing comparable was measured.

    `random`, `pixels` and `without_artefacts` are other features than those shuffled: `shuffled` says nothing on them.

    Example:
        >>> known = ["paired", "shuffled", "mean_removed", "mean_removed_shuffled", "grey", "random"]
        >>> [ceiling_of(c, known) for c in known]
        ['shuffled', None, 'mean_removed_shuffled', None, 'shuffled', None]
    """
    if condition.endswith("shuffled"):
        return None
    own = f"{condition}_shuffled"
    if own in conditions:
        return own
    if condition in ("random", "pixels", "without_artefacts", "mean_removed") or "shuffled" not in conditions:
        return None
    return "shuffled"


def map_free(spectra: pd.DataFrame) -> pd.DataFrame:
    """Rows of `shifted:d` and `noise` as they would be with the visible mean map taken out of both images.

    Both sides of these controls are the same visible image, so the map drops out of their difference: Pd stays, and Pa
    is that of the pair's `mean_removed` row. Pb is set equal to it, which holds on average; gains have no meaning here.
    Conditions are named `mean_removed_shifted:d` and `mean_removed_noise`; no rows where `mean_removed` has none.
    This is what `mean_removed` may be told against: with the map in it, a shift costs next to nothing.
    """
    keys = ["pair", "layer", "radius"]
    kind = spectra["condition"]
    controls = spectra[kind.str.startswith("shifted:") | (kind == "noise")]
    own = spectra.loc[kind == "mean_removed", [*keys, "p_rgb"]]
    if controls.empty or own.empty:
        return spectra.iloc[:0]
    found = controls.drop(columns=["p_rgb"]).merge(own, on=keys, how="inner")
    energy = found["p_rgb"]
    found = found.assign(
        condition="mean_removed_" + found["condition"], p_ir=energy, cross=energy - found["p_diff"] / 2
    )
    return found[list(spectra.columns)]


def shifts(conditions: Sequence[str], prefix: str = "") -> list[tuple[float, str]]:
    """The shifts that were measured: (input px, condition), smallest first.

    Example:
        >>> shifts(["paired", "shifted:4", "shifted:1", "mean_removed_shifted:1"])
        [(1.0, 'shifted:1'), (4.0, 'shifted:4')]
    """
    stem = f"{prefix}shifted:"
    found = [(float(name.removeprefix(stem)), name) for name in conditions if name.startswith(stem)]
    return sorted(pair for pair in found if pair[0] > 0)


def floor_pixels(
    floor: str, conditions: Sequence[str], registration_px: float | None, prefix: str = ""
) -> float | None:
    """Check a floor: None for `none` and `noise`, the shift in input px for `shifted` or `shifted:d`.

    `shifted` alone takes the registration shift that was measured. Raises FreqkdError for anything else, RunError
    when the run holds no rows for it.
    """
    if floor == "none":
        return None
    if floor == "noise":
        if f"{prefix}noise" not in conditions:
            raise RunError("floor noise: the run holds no rows of `noise`; run `layers` with --conditions noise.")
        return None
    stem, _, amount = floor.partition(":")
    try:
        d = float(amount) if amount else registration_px
    except ValueError:
        d = float("nan")
    if stem != "shifted" or (d is not None and not d >= 0):
        raise FreqkdError(f'expected the floor none, noise, shifted or shifted:PIXELS; got "{floor}".')
    known = shifts(conditions, prefix)
    if d is None:
        raise RunError("floor shifted: no registration shift was measured for this run; give one as shifted:PIXELS.")
    if not known or d > known[-1][0]:
        most = f"shifts up to {known[-1][0]:g} px" if known else "no shifted rows"
        raise RunError(f"floor shifted:{d:g}: the run holds {most}; run `layers` with --conditions shifted:{d:g}.")
    return d


def divergence_at(d: float, pixels: Array, curve: Array) -> Array:
    """Divergence of a shift by `d` input px, from `curve` (..., S, n) at `pixels` (S,); (..., n).

    Linear in sqrt(D) over the distance, made monotone: a small shift costs 1 - cos(2 pi f d), which grows with d^2.
    D(0) = 0. With shifts of 1, 2, 4, 8 px this is within 1 % for one frequency of 0.02 cycles per input pixel, 8 % at
    0.05 (the corner of a stride of 14).

    Example:
        >>> divergence_at(1.5, np.array([1.0, 2.0]), np.array([[1.0], [4.0]])).tolist()
        [2.25]
    """
    grid, root = _rooted(pixels, curve)
    k = int(np.clip(np.searchsorted(grid, d, side="left"), 1, len(grid) - 1))
    share = (d - grid[k - 1]) / (grid[k] - grid[k - 1])
    return (root[..., k - 1, :] * (1 - share) + root[..., k, :] * share) ** 2


def equivalent_shift(target: Array, pixels: Array, curve: Array) -> Array:
    """The shift in input px that costs as much as `target` (..., n): the inverse of `divergence_at`.

    A target above the largest shift's divergence gets BEYOND times that shift.

    Example:
        >>> equivalent_shift(np.array([2.25]), np.array([1.0, 2.0]), np.array([[1.0], [4.0]])).tolist()
        [1.5]
    """
    grid, root = _rooted(pixels, curve)
    with np.errstate(invalid="ignore", divide="ignore"):
        wanted = np.sqrt(np.maximum(target, 0.0))
        k = np.sum(root < wanted[..., None, :], axis=-2)
        upper = np.clip(k, 1, len(grid) - 1)
        at = [np.take_along_axis(root, (upper - step)[..., None, :], axis=-2)[..., 0, :] for step in (1, 0)]
        share = np.where(wanted > at[0], (wanted - at[0]) / (at[1] - at[0]), 0.0)
        found = grid[upper - 1] + share * (grid[upper] - grid[upper - 1])
        found = np.where(k == len(grid), BEYOND * grid[-1], found)
    return np.where(np.isnan(wanted) | np.isnan(root[..., -1, :]), np.nan, found)


def _rooted(pixels: Array, curve: Array) -> tuple[Array, Array]:
    root = np.sqrt(np.maximum(np.maximum.accumulate(curve, axis=-2), 0.0))
    zero = np.zeros_like(root[..., :1, :])
    return np.concatenate([[0.0], pixels]), np.concatenate([zero, root], axis=-2)


def shift_text(px: float, largest: float) -> str:
    """A shift for a table: `3.1`, `> 8` beyond the largest one tested, empty where there is none.

    Example:
        >>> shift_text(3.14159, 8.0), shift_text(10.0, 8.0), shift_text(float("nan"), 8.0)
        ('3.14', '> 8', '')
    """
    if np.isnan(px):
        return ""
    return f"> {largest:g}" if px > largest else f"{px:.3g}"


class Means:
    """Mean divergence of several conditions over the same resampled groups."""

    def __init__(
        self, cube: Cube, conditions: Sequence[str], measure: str, bands: Sequence[int], draws: int, seed: int
    ):
        group = {p: g for c in conditions for p, g in zip(cube.pairs[c], cube.groups[c], strict=True)}
        names = sorted(group)
        self.unit = statistics.units(names, [group[p] for p in names])
        place = dict(zip(names, self.unit.index.tolist(), strict=True))
        self.values = {c: cube.of(c, measure)[:, :, list(bands)] for c in conditions}
        self.index = {c: np.array([place[p] for p in cube.pairs[c]]) for c in conditions}
        parts = [statistics.group_sums(self.values[c], self.index[c], len(self.unit)) for c in conditions]
        self.shape = (len(conditions), 2, *self.values[conditions[0]].shape[1:])
        sums = np.stack([np.stack(part, axis=1) for part in parts], axis=1).reshape(len(self.unit), -1)
        self.conditions = list(conditions)
        self.totals = statistics.resample(sums, statistics.bootstrap_weights(len(self.unit), draws, seed))

    def each(self, derive: Callable[[dict[str, Array]], dict[str, Array]]) -> dict[str, Interval]:
        """Intervals of what `derive` makes of {condition: mean (..., L, K)}; each result is (..., R)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            estimate, draws, jackknife = (derive(self._of(t)) for t in self.totals)
        found = {}
        for name, value in estimate.items():
            many, without = (x[name].reshape(len(x[name]), -1) for x in (draws, jackknife))
            got = statistics.bca(value.reshape(-1), many, without, self.unit.effective)
            found[name] = Interval(*(part.reshape(value.shape) for part in got))
        return found

    def _of(self, totals: Array) -> dict[str, Array]:
        split = totals.reshape(*totals.shape[:-1], *self.shape)
        means = split[..., 0, :, :] / split[..., 1, :, :]
        return {c: means[..., i, :, :] for i, c in enumerate(self.conditions)}


def with_all(values: Array, axis: int = -1) -> Array:
    """Append the arithmetic mean over layers; layers without a number are left out of it."""
    known = ~np.isnan(values)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(known, values, 0.0).sum(axis=axis, keepdims=True) / known.sum(axis=axis, keepdims=True)
    return np.concatenate([values, mean], axis=axis)


def _geometric(values: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.exp(with_all(np.log(values))[..., -1:])


class Scale:
    """Ceiling, floor and shifted curve of one condition, by the conditions that they need."""

    def __init__(self, cube: Cube, condition: str, measure: str, floor: str, registration_px: float | None) -> None:
        known = list(cube.values)
        self.condition = condition
        # What lost its mean map is told against controls that lost it too (map_free).
        prefix = "mean_removed_" if condition.startswith("mean_removed") else ""
        self.noise, self.curve = f"{prefix}noise", shifts(known, prefix)
        self.ceiling = ceiling_of(condition, known) if measure in DIVERGENCES else None
        comparable = measure in DIVERGENCES and (self.ceiling is not None or condition in QUESTIONS)
        # Those controls have no gain of their own, hence no amplitude to compare.
        plain = not (prefix and measure == "log_spectral")
        self.shifted = bool(self.curve) and comparable and plain and not condition.startswith("shifted:")
        calibrated = self.ceiling is not None and plain
        self.at = floor_pixels(floor, known, registration_px, prefix) if calibrated else None
        self.floor = floor if calibrated else "none"
        names = [condition, *([self.ceiling] if self.ceiling else [])]
        names += [self.noise] if self.floor == "noise" else []
        names += [name for _, name in self.curve] if self.shifted or self.at is not None else []
        self.needed = list(dict.fromkeys(names))
        self.pixels = np.array([d for d, _ in self.curve])

    def calibrated(self, means: dict[str, Array]) -> tuple[Array, Array]:
        """(C, D_ceiling - D_floor), both (..., L, K)."""
        floor = self._floor(means)
        span = means[self.ceiling] - floor if self.ceiling else np.full_like(means[self.condition], np.nan)
        return (means[self.condition] - floor) / span, span

    def _floor(self, means: dict[str, Array]) -> Array:
        if self.floor == "noise":
            return means[self.noise]
        if self.at is None:
            return np.zeros_like(means[self.condition])
        shape = means[self.condition].shape
        curve = np.stack([_flat(means[name]) for _, name in self.curve], axis=-2)
        return divergence_at(self.at, self.pixels, curve).reshape(shape)

    def equivalent(self, means: dict[str, Array]) -> Array:
        """Equivalent shift (..., L + 1, K) in input px."""
        target = with_all(means[self.condition], axis=-2)
        if not self.shifted:
            return np.full_like(target, np.nan)
        curve = np.stack([_flat(with_all(means[name], axis=-2)) for _, name in self.curve], axis=-2)
        return equivalent_shift(_flat(target), self.pixels, curve).reshape(target.shape)


def _flat(values: Array) -> Array:
    return values.reshape(*values.shape[:-2], -1)


def answer(
    cube: Cube,
    condition: str,
    measure: str,
    floor: str = "none",
    registration_px: float | None = None,
    draws: int = statistics.DRAWS,
    seed: int = 0,
) -> Answer:
    """Low against high band of one condition and measure, raw and calibrated, with intervals and tests.

    A layer has no calibrated number where the interval of its denominator (ceiling minus floor) does not lie above
    0, and no calibrated ratio where that of C_low does not; such layers are left out of `all`.
    """
    scale = Scale(cube, condition, measure, floor, registration_px)
    means = Means(cube, scale.needed, measure, (cube.low, cube.high), draws, seed)
    checked = means.each(lambda m: dict(zip(("c", "span"), scale.calibrated(m), strict=True)))
    known = checked["span"].low > 0
    known_ratio = known.all(axis=-1) & (checked["c"].low[..., 0] > 0)

    def derive(m: dict[str, Array]) -> dict[str, Array]:
        d = m[condition]
        c = np.where(known, scale.calibrated(m)[0], np.nan)
        ratio, c_ratio = d[..., 1] / d[..., 0], np.where(known_ratio, c[..., 1] / c[..., 0], np.nan)
        px = scale.equivalent(m)
        return {
            "low": with_all(d[..., 0]), "high": with_all(d[..., 1]), "difference": with_all(d[..., 1] - d[..., 0]),
            "ratio": with_all(ratio), "c_low": with_all(c[..., 0]), "c_high": with_all(c[..., 1]),
            "c_ratio": with_all(c_ratio), "shift_low": px[..., 0], "shift_high": px[..., 1],
            "geometric": _geometric(ratio), "c_geometric": _geometric(c_ratio),
        }  # fmt: skip

    intervals, values = means.each(derive), means.values[condition]
    gap = with_all(values[..., 1] - values[..., 0])
    sums, counts = statistics.group_sums(gap, means.index[condition], len(means.unit))
    p = np.where(counts.sum(axis=0) > 0, statistics.sign_flip(sums, draws, seed), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        effect = statistics.effect_size(sums / counts)
        quotients = with_all(statistics.mean_over_pairs(values[..., 1] / values[..., 0]))
    p_fdr = np.append(statistics.false_discovery(p[:-1]), p[-1])
    largest = scale.curve[-1][0] if scale.curve else float("nan")
    reasons = _reasons(scale, known, known_ratio)
    return Answer(intervals, p, p_fdr, effect, quotients, means.unit, largest, reasons)


def _reasons(scale: Scale, known: Array, known_ratio: Array) -> list[str]:
    if scale.ceiling is None:
        rows = ["no rows of unrelated scenes to calibrate against"] * len(known)
    else:
        low = {True: "", False: "C of the low band may be 0"}
        rows = [
            low[bool(ratio)] if span.all() else f"{scale.ceiling} is not above the floor"
            for span, ratio in zip(known, known_ratio, strict=True)
        ]
    return [*rows, "" if known_ratio.any() else rows[0]]


def calibrated_bands(
    cube: Cube,
    condition: str,
    measure: str = PRIMARY,
    floor: str = "none",
    registration_px: float | None = None,
    draws: int = statistics.DRAWS,
    seed: int = 0,
) -> Array:
    """C of every band (L, K), NaN where undetermined or empty."""
    scale = Scale(cube, condition, measure, floor, registration_px)
    means = Means(cube, scale.needed, measure, range(len(cube.bands)), draws, seed)
    found = means.each(lambda m: dict(zip(("c", "span"), scale.calibrated(m), strict=True)))
    return np.where(found["span"].low > 0, found["c"].estimate, np.nan)


def rounded(values: Array, digits: int = 8) -> list[Any]:
    """Numbers for JSON: `digits` significant ones, null for NaN.

    Example:
        >>> rounded(np.array([1 / 3, np.nan]), 3)
        [0.333, None]
    """
    return [None if np.isnan(v) else float(f"{v:.{digits}g}") for v in np.asarray(values, dtype=float).tolist()]
