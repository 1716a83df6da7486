"""Optional similarities of two modalities over images: debiased CKA and MMD of one descriptor an image and band.

A descriptor is the image's band amplitude a channel, sqrt of the energy over the band's modes: one row an image:
the tokens of one image are no independent samples and a band has fewer modes than channels; debiasing over tokens does
not repair that. Every value stands beside its null. CKA depends on the pairing; MMD compares the two sets as wholes.

Letters: n images, C channels, K bands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

DRAWS = 100
LEAST = 4
"""Images below which the debiased estimator does not exist."""


def debiased_cka(x_nC: np.ndarray, y_nC: np.ndarray) -> float:
    """Linear CKA with the unbiased estimator of HSIC: about 0 for independent rows, 1 for equal ones; may be negative.

    Source: Song et al. 2012 (HSIC_1), Nguyen et al. 2021. NaN below 4 images or without variation.

    Example:
        >>> x = np.random.default_rng(0).standard_normal((50, 8))
        >>> round(debiased_cka(x, 3 * x + 1), 6)
        1.0
    """
    if len(x_nC) < LEAST:
        return float("nan")
    k, m = (z @ z.T for z in (x_nC - x_nC.mean(0), y_nC - y_nC.mean(0)))
    for gram in (k, m):
        np.fill_diagonal(gram, 0.0)
    own = _hsic(k, k) * _hsic(m, m)
    return float(_hsic(k, m) / np.sqrt(own)) if own > 0 else float("nan")


def _hsic(k: np.ndarray, m: np.ndarray) -> float:
    """HSIC_1 of two Gram matrices with zero diagonals."""
    n = len(k)
    whole = (k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ m.sum(0))
    return float(whole / (n * (n - 3)))


def mmd2(x_nC: np.ndarray, y_nC: np.ndarray) -> float:
    """Unbiased squared MMD with an RBF kernel, sigma^2 half the median squared distance of the pooled rows.

    About 0 for two samples of one distribution (may be negative), towards 2 for far ones. NaN below 4 images.
    Source: Gretton et al. 2012.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x, y = rng.standard_normal((2, 200, 4))
        >>> abs(mmd2(x, y)) < 0.02 < mmd2(x, y + 3)
        True
    """
    kernel = _kernel(x_nC, y_nC)
    return _mmd2(kernel, np.arange(len(kernel)) < len(x_nC)) if len(x_nC) >= LEAST else float("nan")


def _kernel(x_nC: np.ndarray, y_nC: np.ndarray) -> np.ndarray:
    z = np.concatenate([x_nC, y_nC]).astype(np.float64)
    squares = (z**2).sum(1)
    distance = np.maximum(squares[:, None] + squares - 2 * z @ z.T, 0)
    median = np.median(distance[np.triu_indices(len(z), 1)])
    return np.exp(-distance / max(median, 1e-300))


def _mmd2(kernel: np.ndarray, first: np.ndarray) -> float:
    total = 0.0
    for side in (first, ~first):
        block = kernel[np.ix_(side, side)]
        n = len(block)
        total += (block.sum() - np.trace(block)) / (n * (n - 1))
    return float(total - 2 * kernel[np.ix_(first, ~first)].mean())


def cka_null(x_nC: np.ndarray, y_nC: np.ndarray, groups: Sequence[str], rng: np.random.Generator) -> float:
    """Mean CKA when each image meets an infrared image of another group (`DRAWS` random pairings)."""
    labels, found = np.array(groups), []
    for _ in range(DRAWS):
        order = rng.permutation(len(labels))
        kept = labels != labels[order]
        found.append(debiased_cka(x_nC[kept], y_nC[order][kept]))
    return float(np.nanmean(found)) if np.isfinite(found).any() else float("nan")


def mmd_null(x_nC: np.ndarray, y_nC: np.ndarray, groups: Sequence[str], rng: np.random.Generator) -> float:
    """Mean squared MMD when each pair's two images swap sides at random (`DRAWS` swaps)."""
    kernel, n = _kernel(x_nC, y_nC), len(x_nC)
    if n < LEAST:
        return float("nan")
    found = []
    for _ in range(DRAWS):
        swap = rng.random(n) < 0.5
        found.append(_mmd2(kernel, np.concatenate([~swap, swap])))
    return float(np.mean(found))


MEASURES = {"cka": (debiased_cka, cka_null), "mmd": (mmd2, mmd_null)}


def table(
    descriptors: Mapping[int, np.ndarray],
    groups: Sequence[str],
    bands: Mapping[int, Sequence[str]],
    wanted: Sequence[str],
    seed: int = 0,
) -> pd.DataFrame:
    """Rows of similarity.csv: layer, band, measure, value, null, adjusted, n.

    Args:
        descriptors: a layer, (n, 2, K, C): visible and infrared.
        wanted: names of MEASURES.
    `adjusted` is (value - null) / (1 - null) for CKA and value - null for MMD.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for layer, values in sorted(descriptors.items()):
        for k, band in enumerate(bands[layer]):
            x, y = values[:, 0, k].astype(np.float64), values[:, 1, k].astype(np.float64)
            for name in wanted:
                measure, chance = MEASURES[name]
                value, null = measure(x, y), chance(x, y, groups, np.random.default_rng(seed))
                adjusted = (value - null) / (1 - null) if name == "cka" else value - null
                rows.append({"layer": layer, "band": band, "measure": name, "value": value, "null": null,
                             "adjusted": adjusted, "n": len(values)})  # fmt: skip
    return pd.DataFrame(rows)
