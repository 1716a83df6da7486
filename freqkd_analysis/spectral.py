"""Spatial spectra of feature grids: the project's only home of a Fourier transform.

Two roads. The *real* one multiplies by an orthonormal matrix of cosines and sines along each axis; a band that holds
(u, v) and (u, -v) together holds whole groups of these coefficients, so sums of squares and products over them equal
the sums over complex modes, with no complex numbers and no special Nyquist column. The *complex* one (torch.fft)
serves bands that lack this symmetry, coherence and phase. Everything runs in float32 (or float64 when given) whatever
the autocast, and is never compiled: half-precision transforms lose a tenth of the weak bands.

Shapes: B images or pairs, C channels, H x W tokens, N = H W, K bands, A atoms.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from freqkd_analysis.bands import Bands
from freqkd_analysis.errors import FreqkdError, nearest

STANDARDIZATIONS = ("none", "token", "channel", "released")
WINDOWS = ("none", "hann", "dct")


class CrossSpectrum(NamedTuple):
    """Per image and band, each (B, K): energies of x and y, real cross energy, energy of x - y."""

    pa: Tensor
    pb: Tensor
    re: Tensor
    pd: Tensor


def band_energies(x_BCHW: Tensor, bands: Bands) -> Tensor:
    """Energy of each image in each band.

    Args:
        x_BCHW: real features (B, C, H, W), any floating type; half types are raised to float32.
        bands: bands of the same H x W grid.
    Returns: (B, K), summed over the band's modes and the channels, in squared feature units. For bands that cover
        the plane the sum over K is the sum of squares of the image (Parseval).
    Raises: FreqkdError when x is not 4-D or its grid is not the bands' grid.

    Example:
        >>> column = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 1, 8, 8)  # 0.5 cycles per token
        >>> band_energies(column, Bands.parse("0.25", grid=(8, 8))).round().tolist()
        [[0.0, 64.0]]
    """
    return _binned(_modes(x_BCHW, bands).square(), bands)


def cross_spectrum(x_BCHW: Tensor, y_BCHW: Tensor, bands: Bands) -> CrossSpectrum:
    """Band energies of two batches, their real cross energy and the energy of their difference.

    The difference is transformed itself: pa + pb - 2 re would cancel near equality.

    Example:
        >>> x = torch.ones(1, 2, 4, 4)
        >>> (cross_spectrum(x, -x, Bands.parse("split:0.5", grid=(4, 4))).re.round() + 0).tolist()
        [[-32.0, 0.0]]
    """
    if x_BCHW.shape != y_BCHW.shape:
        raise FreqkdError(f"expected two batches of one shape, got {_size(x_BCHW)} and {_size(y_BCHW)}.")
    x, y = _modes(x_BCHW, bands), _modes(y_BCHW, bands)
    d = _modes(_real(x_BCHW) - _real(y_BCHW), bands)
    return CrossSpectrum(*(_binned(part, bands) for part in (x.square(), y.square(), x * y, d.square())))


def split_bands(x_BCHW: Tensor, bands: Bands) -> Tensor:
    """The part of each image in each band, back in space.

    Returns: (K, B, C, H, W), real. For bands that cover the plane the parts add up to x.

    Example:
        >>> x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
        >>> bool(torch.allclose(split_bands(x, Bands.parse("octave:3", grid=(5, 7))).sum(0), x, atol=1e-6))
        True
    """
    x = _checked(x_BCHW, bands)
    with _island(x):
        half = bands.weights[..., : bands.grid[1] // 2 + 1]
        weights = torch.as_tensor(half, dtype=x.dtype, device=x.device)[:, None, None]
        parts = torch.fft.irfft2(weights * torch.fft.rfft2(x, norm="ortho"), s=bands.grid, norm="ortho")
        if bands.covers:  # the last part as the rest, so that the sum is x and not x to rounding of K inverses
            parts = torch.cat([parts[:-1], (x - parts[:-1].sum(0))[None]])
        return parts


def cross_modes(x_BCHW: Tensor, y_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Complex cross spectrum sum over C of X conj(Y) and both energies, per mode: each (B, H, W), FFT order."""
    x, y = _real(x_BCHW), _real(y_BCHW)
    with _island(x):
        xf, yf = torch.fft.fft2(x, norm="ortho"), torch.fft.fft2(y, norm="ortho")
        return (xf * yf.conj()).sum(1), xf.abs().square().sum(1), yf.abs().square().sum(1)


def complex_maps(x_NC: Tensor, grid: tuple[int, int]) -> Tensor:
    """(N, 2C) real and imaginary parts of the transform of one (N, C) map, rows in FFT order."""
    z = torch.fft.fft2(_real(x_NC).reshape(*grid, -1), dim=(0, 1), norm="ortho").flatten(0, 1)
    return torch.cat(_parts(z), dim=1)


def standardize(x_BNC: Tensor, how: str) -> Tensor:
    """Standardise feature maps laid out (B, N, C).

    `none`; `token`: each token to unit L2 norm over channels; `channel`: each channel to zero mean and unit variance
    over the tokens; `released`: zero mean per channel over tokens, then each token to unit norm (the order of the
    paper's released code). A constant channel or an all-zero token stays zero.

    Example:
        >>> standardize(torch.tensor([[[3.0, 4.0]]]), "token").tolist()
        [[[0.6000000238418579, 0.800000011920929]]]
    """
    if how not in STANDARDIZATIONS:
        raise FreqkdError(f'expected --standardize {"|".join(STANDARDIZATIONS)}, got "{how}".'
                          f"{nearest(how, STANDARDIZATIONS)}")  # fmt: skip
    if how == "none":
        return x_BNC
    x = _real(x_BNC)
    with _island(x):
        if how in ("channel", "released"):
            mean = x.mean(1, keepdim=True)
            x = x - mean
            variance = x.square().mean(1, keepdim=True)
            # The mean of equal numbers is not always that number: a rest of its rounding counts as constant.
            constant = variance <= (16 * torch.finfo(x.dtype).eps * mean).square()
            x = x.masked_fill(constant, 0)
        if how == "channel":
            return x / variance.masked_fill(constant, 1).sqrt()
        norm = x.norm(dim=2, keepdim=True)
        return x / torch.where(norm > 0, norm, 1)


def phase_correlation(a_HW: np.ndarray, b_HW: np.ndarray, max_shift: int = 24) -> tuple[float, float, float]:
    """One global translation between two images of unlike contrast, by partly whitened phase correlation.

    Works on gradient magnitudes (blind to the sign of contrast), tapered at the border.

    Args: two (H, W) images, any unit. max_shift: largest shift looked for, px.
    Returns: (dx, dy, confidence). Moving b by (dx, dy) px (positive right, down) brings it onto a; confidence is the
        height of the peak in robust standard deviations of the surface; below 6 the shift is "not measured".

    Example:
        >>> rng = np.random.default_rng(0)
        >>> image = np.cumsum(np.cumsum(rng.standard_normal((80, 96)), 0), 1)
        >>> dx, dy, confidence = phase_correlation(image[8:72, 8:88], image[8:72, 5:85])
        >>> round(dx), round(dy), confidence > 6
        (-3, 0, True)
    """
    from scipy.ndimage import gaussian_gradient_magnitude

    height, width = a_HW.shape
    taper = np.hanning(height + 2)[1:-1, None] * np.hanning(width + 2)[None, 1:-1]
    spectra = []
    for image in (a_HW, b_HW):
        edges = np.sqrt(gaussian_gradient_magnitude(image.astype(np.float64), 1.0))
        spectra.append(np.fft.rfft2((edges - edges.mean()) * taper))
    cross = spectra[0] * spectra[1].conj()
    # Fine detail of two sensors agrees by chance alone; what is left above 0.15 cycles per px only adds noise.
    smooth = np.exp(-0.5 * (np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)) / 0.15) ** 2)
    surface = np.fft.irfft2(smooth * cross / np.maximum(np.abs(cross), 1e-12) ** 0.75, s=(height, width))
    return _peak(np.fft.fftshift(surface), max_shift)


def _peak(surface: np.ndarray, reach: int) -> tuple[float, float, float]:
    cy, cx = surface.shape[0] // 2, surface.shape[1] // 2
    ry, rx = min(reach, cy - 1), min(reach, cx - 1)
    near = surface[cy - ry : cy + ry + 1, cx - rx : cx + rx + 1]
    row, column = np.unravel_index(np.argmax(near), near.shape)
    middle = np.median(near)
    spread = 1.4826 * np.median(np.abs(near - middle))
    confidence = float((near[row, column] - middle) / max(spread, 1e-12))
    shift = [float(row - ry), float(column - rx)]
    for axis, (place, size) in enumerate(zip((row, column), near.shape, strict=True)):
        if 0 < place < size - 1:  # vertex of the parabola through the peak and its neighbours
            line = near[:, column] if axis == 0 else near[row]
            below, top, above = line[place - 1 : place + 2]
            curve = below - 2 * top + above
            shift[axis] += float(0.5 * (below - above) / curve) if curve < 0 else 0.0
    return shift[1], shift[0], confidence


def real_basis(n: int, window: str = "none") -> np.ndarray:
    """(n, n) orthonormal rows: constant, then cosine and sine of each frequency, then the alternating row if n is even.

    With window `dct` the rows are the DCT-II instead (half cycles, no wrap-round). Frequencies: `real_numbers`.
    """
    t = np.arange(n)
    if window == "dct":
        basis = np.cos(np.pi * (t + 0.5) * t[:, None] / n) * np.sqrt(2 / n)
        basis[0] = np.sqrt(1 / n)
        return basis
    k, basis = np.arange(1, (n + 1) // 2)[:, None], np.empty((n, n))
    basis[0] = np.sqrt(1 / n)
    basis[1 : 2 * len(k) : 2] = np.sqrt(2 / n) * np.cos(2 * np.pi * k * t / n)
    basis[2 : 2 * len(k) + 1 : 2] = np.sqrt(2 / n) * np.sin(2 * np.pi * k * t / n)
    if n % 2 == 0:
        basis[-1] = np.sqrt(1 / n) * (-1.0) ** t
    return basis


def real_numbers(n: int) -> np.ndarray:
    """(n,) the mode number |u| of each row of `real_basis(n)`."""
    return (np.arange(n) + 1) // 2


def hann(n: int) -> np.ndarray:
    """(n,) periodic Hann window with unit mean square, so that white noise keeps its energy."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * (np.arange(n) + 0.5) / n)
    return window / np.sqrt(np.mean(window**2))


def _size(x: Tensor) -> str:
    return "x".join(map(str, x.shape))


def _real(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _island(x: Tensor) -> torch.autocast:
    """Autocast off: inside it a matrix product would silently run in bfloat16."""
    return torch.autocast(x.device.type, enabled=False)


def _checked(x_BCHW: Tensor, bands: Bands) -> Tensor:
    if x_BCHW.ndim != 4 or not x_BCHW.is_floating_point():
        raise FreqkdError(f"expected real features (B, C, H, W), got {x_BCHW.dtype} of {_size(x_BCHW)}.")
    if tuple(x_BCHW.shape[2:]) != bands.grid:
        raise FreqkdError(f"expected the bands' grid {bands.grid[0]}x{bands.grid[1]}, got {_size(x_BCHW[0, 0])}.")
    return _real(x_BCHW)


def _modes(x_BCHW: Tensor, bands: Bands) -> Tensor:
    """(B, C, H, W) coefficients whose squares are mode energies: real if the bands allow, else (re, im) stacked."""
    x = _checked(x_BCHW, bands)
    with _island(x):
        if bands.mirrored:
            rows, columns = (torch.as_tensor(real_basis(n), dtype=x.dtype, device=x.device) for n in bands.grid)
            return rows @ x @ columns.T
        return torch.cat(_parts(torch.fft.fft2(x, norm="ortho")), dim=1)


def _binned(products_BCHW: Tensor, bands: Bands) -> Tensor:
    """(B, K) sums over channels and modes of products of `_modes`."""
    with _island(products_BCHW):
        return products_BCHW.sum(1).flatten(1) @ _selection(bands, products_BCHW)


def _parts(z: Tensor) -> tuple[Tensor, Tensor]:
    return z.real, z.imag


def _selection(bands: Bands, like: Tensor) -> Tensor:
    """(N, K) squared amplitude of each coefficient of `_modes` in each band."""
    dtype = like.dtype if like.dtype == torch.float64 else torch.float32
    return torch.as_tensor(_selection_array(bands), dtype=dtype, device=like.device)


@lru_cache(maxsize=256)
def _selection_array(bands: Bands) -> np.ndarray:
    squared = bands.weights**2
    if bands.mirrored:
        rows, columns = (real_numbers(n) for n in bands.grid)
        squared = squared[:, rows[:, None], columns[None, :]]
    return squared.reshape(len(bands), -1).T
