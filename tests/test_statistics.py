"""Group resampling: known intervals, coverage, null, invariances."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats

from freqkd_analysis import statistics
from freqkd_analysis.calibration import Means
from freqkd_analysis.divergence import Cube


def means(high: np.ndarray, low: np.ndarray, names: list[str], draws: int = 2000, seed: int = 0) -> Means:
    """The pipeline's own means of a low and a high band, one layer, a pair a row in the group `names` gives it."""
    pairs = tuple(f"p{i:05d}" for i in range(len(high)))
    values = np.stack([low, high], axis=1)[:, None, :, None]
    cube = Cube((0,), ("low", "high"), ("cosine",), {"paired": pairs}, {"paired": tuple(names)}, {"paired": values})
    return Means(cube, ["paired"], "cosine", (0, 1), draws, seed)


def grouped(index: np.ndarray) -> list[str]:
    """Groups whose order by name is that of their numbers."""
    return [f"g{i:04d}" for i in index]


def ratio(of: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """High over low, as the calibration derives it."""
    return {"ratio": of["paired"][..., 1] / of["paired"][..., 0]}


def clustered(rng: np.random.Generator, groups: int, share: float = 0.6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(high, low, group of each row): positive, skewed, unequal groups; the true ratio of means is 2."""
    index = np.repeat(np.arange(groups), rng.integers(1, 30, groups))
    of_group = rng.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], groups)[index]
    z = np.sqrt(share) * of_group + np.sqrt(1 - share) * rng.standard_normal((len(index), 2))
    high, low = (np.exp(0.4 * z - 0.08) * [0.6, 0.3]).T
    return high, low, index


def test_bca_equals_scipys_where_scipy_can_do_it(rng):
    """Equal groups, one column of means, no widening: scipy.stats.bootstrap on group means is the same problem."""
    x = rng.lognormal(0, 1, size=25)  # skewed and few, so that bias and acceleration matter
    sums = np.stack([x, np.ones_like(x)], axis=1)
    weights = statistics.bootstrap_weights(25, 50_000, 1)
    got = statistics.interval(sums, statistics.mean, weights, effective=1e9)
    reference = scipy.stats.bootstrap((x,), np.mean, n_resamples=50_000, rng=2).confidence_interval
    width = reference.high - reference.low
    assert got.method.tolist() == ["bca"]
    assert got.low[0] == pytest.approx(reference.low, abs=0.02 * width)
    assert got.high[0] == pytest.approx(reference.high, abs=0.02 * width)


def test_few_groups_widen_the_interval_by_students_t(rng):
    """Symmetric values, 8 groups: the half width is t(7) sqrt(8 / 7) over z times the plain one."""
    x = np.array([-3.0, -2, -1, -0.5, 0.5, 1, 2, 3])
    sums, weights = np.stack([x, np.ones(8)], axis=1), statistics.bootstrap_weights(8, 200_000, 1)
    plain, wide = (statistics.interval(sums, statistics.mean, weights, effective=e) for e in (1e9, 8.0))
    expected = scipy.stats.t.ppf(0.975, 7) * (8 / 7) ** 0.5 / 1.96
    assert (wide.high[0] - wide.low[0]) / (plain.high[0] - plain.low[0]) == pytest.approx(expected, rel=0.04)


def test_draws_equal_resampling_rows_one_by_one(rng):
    high, low, index = clustered(rng, 6)
    told = means(high, low, grouped(index), draws=20, seed=3)
    draws = ratio(told._of(told.totals.draws))["ratio"]
    for weight, got in zip(statistics.bootstrap_weights(6, 20, 3).astype(int), draws[:, 0], strict=True):
        rows = np.concatenate([np.flatnonzero(index == g) for g in np.repeat(np.arange(6), weight)])
        assert got == pytest.approx(high[rows].mean() / low[rows].mean(), rel=1e-12)


def test_jackknife_leaves_one_group_out(rng):
    high, low, index = clustered(rng, 5)
    told = means(high, low, grouped(index), draws=1)
    without = ratio(told._of(told.totals.jackknife))["ratio"]
    for g in range(5):
        keep = index != g
        assert without[g, 0] == pytest.approx(high[keep].mean() / low[keep].mean(), rel=1e-12)


def test_two_names_for_two_ratios():
    """The ratio of means 2.5 is not the mean of ratios 2; the difference of means is 3."""
    high, low = np.array([1.0, 9.0]), np.array([1.0, 3.0])
    told = means(high, low, ["a", "b"]).each(lambda of: {**ratio(of), "difference": of["paired"] @ np.array([-1.0, 1])})
    assert (told["ratio"].estimate.tolist(), told["difference"].estimate.tolist()) == ([2.5], [3.0])
    assert statistics.mean(np.array([(high / low).sum(), 2]))[0] == 2.0


def test_nan_counts_as_absent():
    sums, counts = statistics.group_sums(np.array([[1.0, np.nan], [3.0, np.nan]]), np.array([0, 0]), 1)
    assert (sums.tolist(), counts.tolist()) == ([[4.0, 0.0]], [[2.0, 0.0]])
    got = statistics.interval(
        np.array([[1.0, 0.0, 1, 0], [2.0, 0.0, 1, 0]]), statistics.mean, statistics.bootstrap_weights(2)
    )
    assert np.isnan(got.estimate[1]) and np.isnan(got.low[1]) and got.method[1] == "none"


def test_no_spread_falls_back_and_says_so():
    got = statistics.interval(np.tile([2.0, 1.0], (12, 1)), statistics.mean, statistics.bootstrap_weights(12))
    assert (got.low[0], got.high[0], got.method[0]) == (2.0, 2.0, "percentile")


def test_one_group_gives_no_interval_by_groups_but_pairs():
    unit = statistics.units(["a", "b", "c"], ["only", "only", "only"])
    assert (unit.kind, len(unit)) == ("pair", 3)
    assert "one group known: pairs are the unit" in unit.warning
    assert "no groups known" in statistics.units(["a", "b"], ["", None]).warning


def test_few_groups_warn():
    names = [f"p{i}" for i in range(24)]
    assert "only 9 groups" in statistics.units(names, [f"g{i % 9}" for i in range(24)]).warning
    assert statistics.units(names, [f"g{i % 10}" for i in range(24)]).warning == ""


def test_effective_groups_by_hand():
    unit = statistics.units(list("abcd"), ["s", "s", "s", "t"])
    assert unit.effective == 16 / 10
    assert statistics.units(list("abcd"), ["s", "s", "t", "t"]).effective == 2


def test_a_pair_without_a_group_stands_for_itself():
    unit = statistics.units(["a", "b", "c"], ["s", "t", ""])
    assert (unit.kind, unit.names) == ("group", ("pair c", "s", "t"))


def test_the_order_of_pairs_does_not_matter(rng):
    high, low, index = clustered(rng, 11)
    order = rng.permutation(len(high))
    rows = (high, low, np.array(grouped(index)))
    a, b = (means(*some).each(ratio)["ratio"] for some in (rows, [part[order] for part in rows]))
    np.testing.assert_allclose([a.low, a.high], [b.low, b.high], rtol=1e-12)


def test_sign_flip_is_exact_for_few_groups(rng):
    sums = rng.normal(0.5, 1, (7, 1))
    patterns = np.array(list(itertools.product((-1, 1), repeat=7)))
    expected = np.mean(np.abs(patterns @ sums[:, 0]) >= abs(sums.sum()) - 1e-12)
    assert statistics.sign_flip(sums)[0] == expected


def test_sign_flip_sampled_never_says_zero(rng):
    p = statistics.sign_flip(np.full((40, 1), 1.0), draws=2000)
    assert p[0] == 1 / 2001
    assert np.isnan(statistics.sign_flip(np.full((40, 1), np.nan))[0])
    assert statistics.sign_flip(np.zeros((5, 1)))[0] == 1.0


def test_false_discovery_by_hand():
    p = np.array([0.01, 0.02, 0.03, 0.5])
    np.testing.assert_allclose(statistics.false_discovery(p), [0.04, 0.04, 0.04, 0.5])


def test_effect_size_ignores_absent_groups_and_lack_of_spread():
    assert statistics.effect_size(np.array([[1.0], [np.nan], [3.0]]))[0] == pytest.approx(2 / np.sqrt(2))
    assert np.isnan(statistics.effect_size(np.ones((4, 1)))[0])
    assert np.isnan(statistics.effect_size(np.ones((1, 1)))[0])


def test_convergence_narrows_with_pairs_and_ends_with_all(rng):
    pairs = [f"p{i:04d}" for i in range(240)]
    groups = [f"g{i % 60}" for i in range(240)]
    rows = statistics.convergence(rng.normal(1, 0.3, (240, 1)), statistics.mean, pairs, groups, sizes=(50, 100, 500))
    assert [(n, units) for n, units, _ in rows][-1] == (240, 60)
    assert [n for n, _, _ in rows] == [50, 100, 240]
    widths = [float(got.high[0] - got.low[0]) for _, _, got in rows]
    assert widths[0] > widths[1] > widths[2]


@pytest.mark.slow
@pytest.mark.parametrize("groups", [12, 40])
def test_coverage_of_the_cluster_interval_and_failure_of_the_frame_wise_one(groups):
    """1,000 data sets of unequal, skewed, correlated groups: 95 % means 92 to 98 %; frames as units: far below."""
    rng, hits, n = np.random.default_rng(1), np.zeros(2), 1000
    for i in range(n):
        high, low, index = clustered(rng, groups)
        for k, (names, draws) in enumerate(((grouped(index), 1000), ([""] * len(index), 200))):
            got = means(high, low, names, draws, seed=i).each(ratio)["ratio"]
            hits[k] += got.low[0] <= 2 <= got.high[0]
    by_group, by_frame = hits / n
    assert 0.92 <= by_group <= 0.98
    assert by_frame < 0.75


@pytest.mark.slow
@pytest.mark.parametrize("groups", [9, 30])
def test_null_stays_null(groups):
    """Groups without a difference: sign-flip rejects at 0.05 in 3 to 7 % of 2,000 data sets."""
    rng, n, rejected = np.random.default_rng(2), 2000, 0
    for i in range(n):
        index = np.repeat(np.arange(groups), rng.integers(1, 30, groups))
        gap = (rng.standard_t(5, groups)[index] + rng.standard_t(5, len(index))) * 0.1
        sums, _ = statistics.group_sums(gap[:, None], index, groups)
        rejected += statistics.sign_flip(sums, seed=i)[0] <= 0.05
    assert 0.03 <= rejected / n <= 0.07


def test_two_groups_make_no_interval(rng):
    """Their bootstrap has three outcomes, and two mirrored groups would give an interval of no width."""
    for count, known in ((2, False), (3, True)):
        sums = np.column_stack([rng.random(count) + 1, np.ones(count)])
        got = statistics.interval(sums, lambda t: t[..., :1] / t[..., 1:], statistics.bootstrap_weights(count))
        assert np.isfinite(got.estimate).all() and bool(np.isfinite(got.low)[0]) is known
        assert (got.method[0] == "none") is not known
