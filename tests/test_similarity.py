"""CKA and MMD against plain sums, and against what is known of independent, equal and shifted samples."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from freqkd_analysis import similarity


def hsic_by_sums(k: np.ndarray, m: np.ndarray) -> float:
    """The U-statistic itself: mean over ordered quadruples of distinct images (Song et al. 2012, eq. 4)."""
    quadruples = np.array(list(permutations(range(len(k)), 4)))
    i, j, q, r = quadruples.T
    return float(np.mean(k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])))


def test_debiased_cka_is_the_u_statistic_over_quadruples(rng):
    x, y = rng.standard_normal((7, 3)), rng.standard_normal((7, 5))
    k, m = x @ x.T, y @ y.T
    expected = hsic_by_sums(k, m) / np.sqrt(hsic_by_sums(k, k) * hsic_by_sums(m, m))
    assert similarity.debiased_cka(x, y) == pytest.approx(expected, rel=1e-10)


def test_debiased_cka_of_independent_rows_is_zero_on_average_where_the_biased_one_is_not(rng):
    """Wide descriptors, few images: the biased estimator says 0.9."""
    found = [similarity.debiased_cka(*rng.standard_normal((2, 64, 512))) for _ in range(100)]
    assert abs(np.mean(found)) < 0.01
    x, y = (z - z.mean(0) for z in rng.standard_normal((2, 64, 512)))
    biased = np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    assert biased > 0.8


def test_cka_ignores_scale_offset_and_rotation_and_sees_the_pairing(rng):
    x = rng.standard_normal((40, 6))
    turned = x @ np.linalg.qr(rng.standard_normal((6, 6)))[0]
    assert similarity.debiased_cka(x, 5 * turned - 2) == pytest.approx(1, abs=1e-10)
    assert abs(similarity.debiased_cka(x, rng.permutation(x))) < 0.3


def test_mmd_is_the_plain_double_sum(rng):
    x, y = rng.standard_normal((9, 3)), rng.standard_normal((9, 3)) + 1
    z = np.concatenate([x, y])
    pairs = [np.sum((a - b) ** 2) for i, a in enumerate(z) for b in z[i + 1 :]]
    sigma2 = np.median(pairs) / 2

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.exp(-np.sum((a - b) ** 2) / (2 * sigma2)))

    within = [np.mean([kernel(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j]) for s in (x, y)]
    expected = sum(within) - 2 * np.mean([kernel(a, b) for a in x for b in y])
    assert similarity.mmd2(x, y) == pytest.approx(expected, rel=1e-10)


def test_table_stands_each_value_beside_its_null(rng):
    shared = rng.standard_normal((30, 2, 16))
    values = np.stack([shared, shared + 0.1 * rng.standard_normal(shared.shape)], axis=1)
    values[:, 1, 1] = rng.standard_normal((30, 16))  # the second band is unrelated
    groups = [f"g{i // 3}" for i in range(30)]
    got = similarity.table({4: values}, groups, {4: ("low", "high")}, ("cka", "mmd"))
    cka = got[got["measure"] == "cka"].set_index("band")
    assert cka.loc["low", "value"] > 0.95 > 0.3 > abs(cka.loc["high", "adjusted"])
    assert (cka["null"].abs() < 0.1).all() and set(got["n"]) == {30}
    again = similarity.table({4: values}, groups, {4: ("low", "high")}, ("cka", "mmd"))
    assert got.equals(again)


def test_too_few_images_give_no_number():
    few = np.ones((3, 2, 1, 4))
    got = similarity.table({0: few}, ["a", "b", "c"], {0: ("all",)}, ("cka", "mmd"))
    assert got[["value", "null", "adjusted"]].isna().all(axis=None)
