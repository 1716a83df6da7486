"""Synthetic data: rendered scenes (`records`, `render`, `scene`, `write`) and pairs whose answer is known.

`known_fields` and `known_image_pairs` prescribe how much the two modalities share in each band, as
Y = g X + sqrt(1 - g^2) N with X and N independent and of unit energy per mode. Cosine and relative divergence are
then 1 - g, whatever the grid; every measure and the whole pipeline are validated on them.

Letters: n pairs, C channels, H x W positions, K bands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from freqkd_analysis.bands import Bands, mode_numbers
from freqkd_analysis.data.records import PairedSample
from freqkd_analysis.data.scenes import CLASSES, DEFAULTS, parse_options, records, render, scene
from freqkd_analysis.data.writers import write
from freqkd_analysis.errors import DataError

if TYPE_CHECKING:
    import torch

__all__ = [
    "CLASSES", "DEFAULTS", "known_answer", "known_fields", "known_image_pairs", "parse_options", "records", "render",
    "scene", "write",
]  # fmt: skip


def known_fields(
    grid: tuple[int, int], coherence_per_band: Sequence[float] | np.ndarray, bands: str | Bands, channels: int,
    seed: int, n: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Pairs of feature fields with a prescribed coherence in each band.

    Args:
        grid: (H, W), any sides: odd, even, prime, non-square.
        coherence_per_band: g of each band, -1..1; 1 same, 0 unrelated, -1 opposite.
        bands: a specification such as "octave:3", or Bands of this grid. Modes outside all bands hold nothing.
    Returns: x, y, each (n, C, H, W) float32 of unit mean energy per mode in an orthonormal transform, so that cosine =
        relative = 1 - g and mse per mode = 2 (1 - g), within Monte-Carlo error.
    Raises: DataError when the number or range of the coherences does not fit the bands.

    Example:
        >>> x, y = known_fields((9, 7), (1.0, 0.0), "0.25", channels=4, seed=0, n=2)
        >>> tuple(x.shape), bool((x == y).all())
        ((2, 4, 9, 7), False)
    """
    import torch

    from freqkd_analysis.spectral import split_bands

    ring = bands if isinstance(bands, Bands) else Bands.parse(bands, grid=grid)
    g = _coherence(coherence_per_band, ring)
    draw = torch.Generator().manual_seed(seed)
    x, noise = torch.randn((2, n, channels, *grid), generator=draw)
    parts_x, parts_n = split_bands(x, ring), split_bands(noise, ring)
    weights = torch.tensor(g, dtype=torch.float32).view(-1, 1, 1, 1, 1)
    return parts_x.sum(0), (weights * parts_x + (1 - weights.square()).sqrt() * parts_n).sum(0)


def known_image_pairs(
    coherence_per_band: Sequence[float], bands: str = "octave:3", *, n: int = 32, groups: int = 8,
    size: tuple[int, int] = (64, 48), shift: tuple[float, float] = (0.0, 0.0), shared_map: float = 0.0,
    contrast: float = 0.1, seed: int = 0,
) -> list[PairedSample]:  # fmt: skip
    """Grey image pairs whose divergence per band is known end to end, in pixels.

    Both images are fields of roughly 1/f amplitude around mid-grey with the prescribed coherence; the infrared one is
    then displaced, and a map that is the same in all images (a horizon and a vignette) is added to both.

    Args:
        coherence_per_band, bands: as for `known_fields`, on the grid (height, width) in cycles per pixel.
        size: (width, height) in pixels. groups: sequences the pairs are dealt to, in equal runs.
        shift: (right, down) in pixels by which the infrared content is displaced, wrapping round, exact below a pixel.
        shared_map: standard deviation of the shared map in grey levels of 0..1. contrast: that of the fields.
    Returns: n PairedSamples, not quantised; rgb is grey three times. meta["expected"] is `known_answer`.
    Raises: DataError when the coherences do not fit the bands, or contrast and map leave the range of grey.

    Example:
        >>> pairs = known_image_pairs((0.9, 0.5, 0.0), n=4, groups=2)
        >>> pairs[0].ir.shape, pairs[3].group
        ((48, 64), 'k001')
    """
    import torch

    if 4.5 * contrast + 2.5 * shared_map > 0.5:
        raise DataError(f"contrast={contrast} and shared_map={shared_map} leave the grey range. Lower one of them.")
    if not 1 <= groups <= n:
        raise DataError(f"Expected 1 <= groups <= n, got groups={groups}, n={n}. Ask for fewer groups.")
    width, height = size
    ring = Bands.parse(bands, grid=(height, width))
    g, amplitude = _coherence(coherence_per_band, ring), _amplitude(ring, contrast)
    from freqkd_analysis.spectral import split_bands

    level = torch.tensor(amplitude, dtype=torch.float32).view(-1, 1, 1, 1, 1)
    fields = known_fields((height, width), g, ring, 1, seed, n)
    x, y = ((split_bands(field, ring) * level).sum(0)[:, 0].numpy() for field in fields)
    if any(shift):
        y = _displace(height, shift[1]) @ y @ _displace(width, shift[0]).T
    mean = 0.5 + shared_map * _map(height, width)
    expected = known_answer(g, ring, amplitude, shift, mean)
    meta = {"source": "known", "shift": shift, "expected": expected, "visible_is_grey": True, "ir_conversion": "unit",
            "time": ""}  # fmt: skip
    first, second = (np.clip(part + mean, 0, 1).astype(np.float32) for part in (x, y))
    return [
        PairedSample(np.repeat(a[..., None], 3, axis=2), b, f"k{i * groups // n:03d}_{i:05d}",
                     f"k{i * groups // n:03d}", meta)
        for i, (a, b) in enumerate(zip(first, second, strict=True))
    ]  # fmt: skip


def known_answer(
    coherence: np.ndarray, bands: Bands, amplitude: np.ndarray, shift: tuple[float, float], mean: np.ndarray
) -> dict[str, Any]:
    """What `known_image_pairs` must give per band: `cosine` of paired grey images, and `cosine_mean_removed`.

    A displacement takes from each mode's cross energy the factor cos(2 pi (fu down + fv right)); what both images share
    in every pair, mid-grey included, adds its energy to both sides.

    Example:
        >>> ring = Bands.parse("0.25", grid=(8, 8))
        >>> known_answer(np.array([0.5, 0.0]), ring, np.ones(2), (0.0, 0.0), np.zeros((8, 8)))["cosine"]
        [0.5, 1.0]
    """
    import torch

    from freqkd_analysis.spectral import band_energies

    (u, v), (height, width) = mode_numbers(bands.grid), bands.grid
    turn = np.cos(2 * np.pi * (u * shift[1] / height + v * shift[0] / width))
    factor = np.array([turn[bands.index == k].mean() for k in range(len(bands))])
    kept = np.array([_nyquist(bands, shift)[bands.index == k].mean() for k in range(len(bands))])
    own = amplitude**2 * bands.modes
    shared = band_energies(torch.from_numpy(np.asarray(mean, np.float64))[None, None], bands)[0].numpy()
    cross = coherence * own * factor
    clean, raw = (
        1 - coherence * factor / np.sqrt(kept),
        1 - (cross + shared) / np.sqrt((own + shared) * (own * kept + shared)),
    )
    return {"bands": bands.text, "cosine": raw.tolist(), "cosine_mean_removed": clean.tolist()}


def _coherence(values: Sequence[float] | np.ndarray, bands: Bands) -> np.ndarray:
    g = np.asarray(values, dtype=np.float64)
    if g.shape != (len(bands),) or not (np.abs(g) <= 1).all():
        raise DataError(f'Expected {len(bands)} coherences in -1..1 for the bands "{bands.text}", got {list(values)}.')
    return g


def _amplitude(bands: Bands, contrast: float) -> np.ndarray:
    """Amplitude per mode in each band: 1/f at the band's middle, scaled to the pixel standard deviation `contrast`."""
    middle = (bands.f_lo + np.minimum(bands.f_hi, 0.5**0.5)) / 2
    share = 1 / middle**2
    return np.asarray(contrast * np.sqrt(share * np.prod(bands.grid) / (share * bands.modes).sum()))


def _map(height: int, width: int) -> np.ndarray:
    """A horizon and a vignette, mean 0, standard deviation 1: (H, W)."""
    row, col = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None]
    shape = np.tanh(6 * (row + 0.1)) - 0.5 * (row**2 + col**2)
    return np.asarray((shape - shape.mean()) / shape.std())


def _displace(n: int, by: float) -> np.ndarray:
    """Circulant (n, n) matrix that moves a periodic signal by a fraction of a sample, all modes kept but Nyquist's.

    Mode n/2 of an even length cannot carry a phase in a real signal: it keeps cos(pi by) of its amplitude.
    """
    modes = np.arange(-((n - 1) // 2), n // 2 + 1)
    kernel = np.cos(2 * np.pi * modes[:, None] * (np.arange(n)[None] - by) / n)
    if n % 2 == 0:
        kernel[-1] = np.cos(np.pi * np.arange(n)) * np.cos(np.pi * by)
    column = kernel.sum(0) / n
    return column[(np.arange(n)[:, None] - np.arange(n)[None]) % n]


def _nyquist(bands: Bands, shift: tuple[float, float]) -> np.ndarray:
    """Share of its energy that each mode (H, W) keeps under `_displace`: below 1 at the Nyquist row and column only."""
    (u, v), (height, width) = mode_numbers(bands.grid), bands.grid
    rows = np.where(2 * np.abs(u) == height, np.cos(np.pi * shift[1]) ** 2, 1.0)
    columns = np.where(2 * np.abs(v) == width, np.cos(np.pi * shift[0]) ** 2, 1.0)
    return np.asarray(rows * columns)
