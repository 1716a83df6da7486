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
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from freqkd_analysis.bands import Bands, mode_numbers
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
    return x_BNC if how == "none" else _Standardized.apply(_real(x_BNC), how)


class _Standardized(torch.autograd.Function):
    """y = (x - mean) / size, constant channels 0; mean over tokens, size of a channel (`channel`) or of a token.

    One step of autograd: the gradient takes a fifth of the time of that of its parts.
    """

    @staticmethod
    def forward(ctx: Any, x_BNC: Tensor, how: str) -> Tensor:
        with _island(x_BNC):
            mean = x_BNC.new_zeros(()) if how == "token" else x_BNC.mean(1, keepdim=True)
            x, constant = x_BNC - mean, None
            if how != "token":
                size = x.square().mean(1, keepdim=True)
                # The mean of equal numbers is not always that number: a rest of its rounding counts as constant.
                constant = size <= (16 * torch.finfo(x.dtype).eps * mean).square()
                size = size.masked_fill(constant, 1).sqrt()
                if x.device.type != "cpu" or constant.any():  # asking would halt another device
                    x.masked_fill_(constant, 0)
            if how != "channel":
                norm = x.norm(dim=2, keepdim=True)
                size = torch.where(norm > 0, norm, 1)
        ctx.how = how
        ctx.save_for_backward(x.div_(size), size, constant)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BNC: Tensor) -> tuple[Tensor, None]:
        y, size, constant = ctx.saved_tensors
        dot = (grad_BNC * y).mean(1, keepdim=True) if ctx.how == "channel" else (grad_BNC * y).sum(2, keepdim=True)
        grad = torch.addcmul(grad_BNC, y, dot, value=-1).div_(size)
        if constant is not None:
            if y.device.type != "cpu" or constant.any():
                grad.masked_fill_(constant, 0)
            grad.sub_(grad.mean(1, keepdim=True))
        return grad, None


class BandFilter:
    """Splits maps into bands through a few real coefficients (`real_basis` along both axes), and takes gradients back.

    Only the rectangle of low modes is computed that the bands before the last reach into. The last of bands that cover
    the plane is then the rest, x - lift(...) itself: a difference of energies would cancel. Where a mode and its mirror
    image differ (`released`), their four coefficients are turned so that each belongs to one of the two.

    Shapes: x (B, N, C), N row by row; z (B, h, w, C) coefficients; precision and device are the filter's. rest: which
    band is the rest, -1 for none. amplitudes: (K, h, w, 1); of the rest what it lacks, negative. pull: (K, h w) the
    gradient of half a band's energy as amplitudes; the rest keeps a part of modes that it shares.

    Example:
        >>> split = band_filter(Bands.parse("split:0.5", (8, 8)), torch.float64, torch.device("cpu"))
        >>> x = torch.ones(1, 64, 2, dtype=torch.float64)
        >>> [round(float(split.part(x, split.project(x), k).square().sum())) for k in (0, 1)]
        [128, 0]
    """

    def __init__(self, bands: Bands, dtype: torch.dtype, device: torch.device) -> None:
        amplitudes, self.turns, (h, w), self.rest = _amplitudes(bands)
        self.grid = bands.grid
        self.rows, self.columns, self.amplitudes, self.turn = (
            torch.as_tensor(array, dtype=dtype, device=device)
            for array in (real_basis(self.grid[0])[:h], real_basis(self.grid[1])[:w], amplitudes[..., None], _TURN)
        )
        pull = amplitudes * (amplitudes + (np.arange(len(bands)) == self.rest)[:, None, None])
        self.pull = torch.as_tensor(pull.reshape(len(bands), -1), dtype=torch.float64, device=device)

    def project(self, x_BNC: Tensor) -> Tensor:
        """(B, h, w, C) the coefficients."""
        (height, width), h, w, (images, _, channels) = self.grid, len(self.rows), len(self.columns), x_BNC.shape
        with _island(x_BNC):
            half = torch.bmm(self.rows.expand(images, -1, -1), x_BNC.reshape(images, height, -1))
            z = torch.bmm(self.columns.expand(images * h, -1, -1), half.view(images * h, width, channels))
            return self._turned(z.view(images, h, w, channels), self.turn)

    def lift(self, z: Tensor, onto_BNC: Tensor | None = None) -> Tensor:
        """(B, N, C) the map of these coefficients, added to `onto`. May overwrite z."""
        (height, width), (images, h, w, channels) = self.grid, z.shape
        with _island(z):
            z = self._turned(z, self.turn.T).reshape(images * h, w, channels)
            half = torch.bmm(self.columns.T.expand(images * h, -1, -1), z).view(images, h, width * channels)
            onto = half.new_zeros(()) if onto_BNC is None else onto_BNC.reshape(images, height, width * channels)
            whole = torch.baddbmm(onto, self.rows.T.expand(images, -1, -1), half, beta=int(onto_BNC is not None))
            return whole.view(images, height * width, channels)

    def part(self, x_BNC: Tensor, z: Tensor, band: int) -> Tensor:
        """(B, N, C) one band of x; z = project(x)."""
        return self.lift(z * self.amplitudes[band], x_BNC if band == self.rest else None)

    def adjoint(self, grad_BNC: Tensor, band: int) -> Tensor:
        """Coefficients whose lift is the gradient at x, given that at `part`; of the rest, what to add to that."""
        return self.project(grad_BNC) * self.amplitudes[band]

    def _turned(self, z: Tensor, turn: Tensor) -> Tensor:
        for i, j in self.turns:
            block = z[:, i : i + 2, j : j + 2]
            block.copy_(torch.bmm(turn.expand(len(z), 4, 4), block.flatten(1, 2)).view_as(block))
        return z


_TURN = np.array([[1, 0, 0, -1], [0, 1, 1, 0], [0, -1, 1, 0], [1, 0, 0, 1]]) / np.sqrt(2)
"""Of (cos cos, cos sin, sin cos, sin sin): rows 0 and 1 hold the mode (u, v), rows 2 and 3 the mode (u, -v)."""


@lru_cache(maxsize=256)
def band_filter(bands: Bands, dtype: torch.dtype, device: torch.device) -> BandFilter:
    """The `BandFilter` of these bands, made once a precision and device."""
    return BandFilter(bands, dtype, device)


def _amplitudes(bands: Bands) -> tuple[np.ndarray, list[tuple[int, int]], tuple[int, int], int]:
    """Amplitudes (K, h, w), corners of the 2x2 blocks of coefficients to be turned, (h, w), and which is the rest."""
    inner = bands.weights[:-1] if bands.covers else bands.weights
    reach = [int(np.abs(m)[inner.any(0)].max(initial=-1)) for m in np.broadcast_arrays(*mode_numbers(bands.grid))]
    h, w = (max(0, min(n, 2 * r + 1)) for n, r in zip(bands.grid, reach, strict=True))
    rest = len(inner) if bands.covers and (h, w) != bands.grid else -1
    weights = np.concatenate([inner, -inner.sum(0, keepdims=True)]) if rest >= 0 else bands.weights
    u, v = real_numbers(bands.grid[0])[:h, None], real_numbers(bands.grid[1])[None, :w]
    same, mirrored = weights[:, u, v], weights[:, u, -v]
    sines = np.arange(h)[:, None] % 2 == 0  # the constant row is its own mirror image
    turns = np.argwhere((same != mirrored).any(0)[1::2, 1::2]) * 2 + 1
    return np.where(sines, mirrored, same), [(int(i), int(j)) for i, j in turns], (h, w), rest


_TINY = np.finfo(np.float64).tiny
"""Under a quotient that may be 0 / 0, so small that no unit of the images meets it."""


def phase_correlation(a_HW: np.ndarray, b_HW: np.ndarray, max_shift: int = 24) -> tuple[float, float, float]:
    """One global translation between two images of unlike contrast, by partly whitened phase correlation.

    Works on square roots of gradient magnitudes (blind to the sign of contrast) less their mean, tapered at the border.
    Their cross spectrum X is turned to X |X|^-0.75 exp(-f^2 / (2 0.15^2)), f in cycles per px; the shift is the highest
    place of its inverse transform.

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
    surface = np.fft.irfft2(smooth * cross / np.maximum(np.abs(cross), _TINY) ** 0.75, s=(height, width))
    return _peak(np.fft.fftshift(surface), max_shift)


def _peak(surface: np.ndarray, reach: int) -> tuple[float, float, float]:
    cy, cx = surface.shape[0] // 2, surface.shape[1] // 2
    ry, rx = min(reach, cy - 1), min(reach, cx - 1)
    near = surface[cy - ry : cy + ry + 1, cx - rx : cx + rx + 1]
    row, column = np.unravel_index(np.argmax(near), near.shape)
    middle = np.median(near)
    spread = 1.4826 * np.median(np.abs(near - middle))
    confidence = float((near[row, column] - middle) / max(spread, _TINY))
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
