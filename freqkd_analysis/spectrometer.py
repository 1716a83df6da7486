"""The fast road from two feature maps of one tap to their spectra, inside a forward pass.

Same real transform as `spectral`, arranged for speed: two matrix products a map, three maps of scratch that are used
again for every pair, the difference of the maps formed before anything is transformed, and one float64 product at the
end that bins all pairs of a block. With `references` it also takes, from the coefficients at hand, the products that
the shuffled and mean-removed comparisons need; neither costs a further transform.

Shapes: N = H W tokens, C channels, A atoms, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from freqkd_analysis.bands import Bands, fine_rings
from freqkd_analysis.errors import BandsError
from freqkd_analysis.spectral import complex_maps, hann, real_basis, real_numbers, standardize

PENDING = 2**13
"""Values per mode that wait for binning, a tap, before they are binned early."""


def atom_index(bands: Bands, window: str = "none") -> np.ndarray:
    """(H, W) atom of each coefficient of the real transform; its (k, l)-th coefficient has |u| = numbers(k) / H."""
    if not bands.mirrored:
        return bands.atoms().index
    if window == "dct":  # row k is k half cycles: the same radius as mode k of a grid twice the size
        doubled = (2 * bands.grid[0], 2 * bands.grid[1])
        return fine_rings(bands, doubled)[: bands.grid[0], : bands.grid[1]]
    rows, columns = (real_numbers(n) for n in bands.grid)
    return bands.atoms().index[rows[:, None], columns[None, :]]


@dataclass
class References:
    """What a block compares its pairs with, as coefficients of the transform, (N, C) each.

    stack: mean map of the visible features, mean map of the infrared features (other groups' pairs), previous
    infrared map in the chain. first: the first visible map, kept to close the chain.
    """

    stack: Tensor
    first: Tensor | None = None

    @property
    def previous(self) -> Tensor:
        return self.stack[2]


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Where there are few cores, one does the small products alone.

    Beside a process that holds a core, every one of their parallel regions would wait for the thread that lost its
    core (measured with two threads: overhead 100 % instead of 1 to 2 %). Many cores gain more than they risk.
    """
    before = torch.get_num_threads()
    if device.type != "cpu" or not 1 < before <= 4:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Spectrometer:
    """Spectra of pairs of (N, C) maps on one grid with one number of channels. Not thread-safe: scratch is shared.

    Args:
        bands: its atoms are the bins.
        channels: C.
        window: `none`, `hann` (multiplies both maps) or `dct`.
        standardization: applied to both maps first, see `spectral.standardize`.
        like: another of the same grid, channels and window whose scratch to share.

    Example:
        >>> meter = Spectrometer(Bands.parse("octave:3", grid=(4, 6)), channels=5)
        >>> x = torch.ones(24, 5)
        >>> meter.measure(x, -x)
        >>> pa, pb, re, pd = meter.collect()["energies"][0].T
        >>> round(float(pa.sum())), round(float(re.sum())), round(float(pd.sum()))
        (120, -120, 480)
    """

    def __init__(self, bands: Bands, channels: int, window: str = "none", standardization: str = "none",
                 device: torch.device | str = "cpu", like: Spectrometer | None = None) -> None:  # fmt: skip
        height, width = bands.grid
        self.bands, self.channels, self.standardization = bands, channels, standardization
        self.complex = not bands.mirrored
        if bands.edges2 is None and window == "dct":
            raise BandsError(f'bands "{bands.text}" are defined on Fourier modes; expected rings with --window dct.')
        self.forget()
        if like is not None:  # same grid and channels: one scratch for all
            for name in ("rows", "columns", "taper", "atoms", "select", "modes", "z", "half", "views"):
                setattr(self, name, getattr(like, name))
            return
        self.rows = torch.as_tensor(real_basis(height, window), dtype=torch.float32, device=device)
        self.columns = torch.as_tensor(real_basis(width, window), dtype=torch.float32, device=device)
        self.taper: Tensor | None = None
        if window == "hann":
            taper = hann(height)[:, None] * hann(width)
            self.taper = torch.as_tensor(taper, dtype=torch.float32, device=device).reshape(-1, 1)
        index = atom_index(bands, window).reshape(-1)
        self.atoms = len(bands.atoms())
        self.select = torch.as_tensor(np.eye(self.atoms)[index], dtype=torch.float64, device=device)
        self.modes = np.bincount(index, minlength=self.atoms)
        self.z = torch.empty(2, height * width, channels * (2 if self.complex else 1), device=device)
        self.half = torch.empty(height, width * channels, device=device)
        grid, flat = (height, width, -1), (height, -1)
        self.views = (self.columns.expand(height, width, width), self.half.view(grid), self.z[1].view(flat),
                      self.z[0].view(grid), self.z[1].view(grid))  # fmt: skip

    def transform(self, x: Tensor, place: int) -> None:
        """Coefficients of one map, (N, C) or (H, W C), into `z[place]`; rows are ordered as `atom_index`."""
        if self.complex:
            self.z[place].copy_(complex_maps(x, self.bands.grid))
            return
        columns, half, _, *out = self.views
        torch.mm(self.rows, x.reshape(self.half.shape), out=self.half)
        torch.bmm(columns, half, out=out[place])

    def measure(self, x_NC: Tensor, y_NC: Tensor, references: References | None = None) -> None:
        """Add one pair. Both maps (N, C), any floating type, on this device."""
        self.measure_pairs(x_NC[None], y_NC[None], references)

    @torch.no_grad()
    def measure_pairs(self, x_PNC: Tensor, y_PNC: Tensor, references: References | None = None) -> None:
        """Add pairs in order. A call and a view cost as much as reading rows of a map, so the loop makes none."""
        (zx, zd), (columns, half, d, zx_grid, zd_grid) = self.z.unbind(0), self.views
        rows, flat = self.rows, self.half
        mm, bmm, sub, norm = torch.mm, torch.bmm, torch.sub, torch.linalg.vector_norm
        norms = torch.empty(len(x_PNC), 3, zx.shape[0], device=zx.device)
        out = norms.flatten(0, 1).unbind(0)
        with _one_thread(zx.device), torch.autocast(zx.device.type, enabled=False):
            for i, (x, y) in enumerate(zip(self._flat(x_PNC), self._flat(y_PNC), strict=True)):
                # The difference first: transformed energies would cancel where the maps nearly agree.
                if self.complex:
                    self.transform(x, 0)
                    self.transform(x - y, 1)
                else:
                    sub(x, y, out=d)
                    mm(rows, x, out=flat)
                    bmm(columns, half, out=zx_grid)
                    mm(rows, d, out=flat)
                    bmm(columns, half, out=zd_grid)
                norm(zx, dim=1, out=out[3 * i])
                norm(zd, dim=1, out=out[3 * i + 2])
                norm(sub(zx, zd, out=zd), dim=1, out=out[3 * i + 1])
                if references is not None:
                    self._compare(references)
            self.norms.append(norms)
            if sum(part.numel() for part in self.norms) > PENDING:
                self._settle()

    def _flat(self, maps_PNC: Tensor) -> Iterable[Tensor]:
        """Each map as (H, W C) float32, standardised and tapered; plain maps as views, others made one at a time."""
        height, shape = self.bands.grid[0], maps_PNC.shape
        plain = self.standardization == "none" and self.taper is None and maps_PNC.dtype == torch.float32
        if plain and maps_PNC.stride()[1:] == (shape[2], 1):
            return maps_PNC.view(shape[0], height, -1).unbind(0)
        return (self.prepared(x_NC).view(height, -1) for x_NC in maps_PNC)

    def _compare(self, references: References) -> None:
        """Products of this pair's coefficients with the mean maps and with the chain's previous infrared map."""
        right = references.stack.permute(1, 2, 0)
        self.products.append(torch.bmm(self.z.permute(1, 0, 2), right))  # (N, 2, 3)
        references.previous.copy_(self.z[1])
        if references.first is None:
            references.first = self.z[0].clone()

    def link(self, references: References) -> Tensor:
        """(N,) product of the first visible map with the last infrared map: the link that closes the chain."""
        assert references.first is not None
        return torch.bmm(references.first[:, None], references.previous[:, :, None])[:, 0, 0]

    def constants(self, references: References) -> np.ndarray:
        """(3, A) energies of both mean maps and their cross energy."""
        both = references.stack[:2]
        gram = torch.bmm(both.permute(1, 0, 2), both.permute(1, 2, 0)).flatten(1)  # (N, xx xy yx yy)
        return self.bin(gram[:, [0, 3, 1]].T)

    @torch.no_grad()
    def coefficients(self, x_NC: Tensor) -> Tensor:
        """Coefficients of one map, in scratch that the next call overwrites."""
        with torch.autocast(self.z.device.type, enabled=False):
            self.transform(self.prepared(x_NC), 0)
        return self.z[0]

    def band_amplitudes(self, x_NC: Tensor) -> np.ndarray:
        """(K, C) square root of one map's energy in each band, a channel."""
        squares = self.coefficients(x_NC).square()
        if self.complex:
            squares = squares[:, : self.channels] + squares[:, self.channels :]
        to_bands = torch.as_tensor(self.bands.atoms().to_bands, dtype=torch.float32, device=squares.device)
        return ((self.select.float() @ to_bands).T @ squares).sqrt().cpu().numpy()

    def forget(self) -> None:
        """Drop pairs not yet collected."""
        self.norms: list[Tensor] = []
        self.products: list[Tensor] = []
        self.binned: list[tuple[Tensor, ...]] = []

    def prepared(self, x_NC: Tensor) -> Tensor:
        if self.standardization != "none":
            x_NC = standardize(x_NC[None], self.standardization)[0]
        if self.taper is not None:
            x_NC = x_NC * self.taper
        return x_NC if x_NC.dtype == torch.float32 and x_NC.is_contiguous() else x_NC.float().contiguous()

    def bin(self, per_mode: Tensor) -> np.ndarray:
        """Sum (..., N) values per mode into (..., A), in float64."""
        return (per_mode.double() @ self.select).cpu().numpy()

    def collect(self) -> dict[str, np.ndarray]:
        """Binned sums of all pairs since the last call, and forget them.

        Returns: `energies` (P, A, 4): pa, pb, re, pd. With references also `products` (P, A, 6): the pair's x and y
            (outer) with mean x, mean y and previous y (inner).
        """
        self._settle()
        squares, *products = (torch.cat(parts).cpu().numpy() for parts in zip(*self.binned, strict=True))
        pa, pb, pd = squares[:, 0], squares[:, 1], squares[:, 2]
        out = {"energies": np.stack([pa, pb, (pa + pb - pd) / 2, pd], axis=-1)}
        if products:
            out["products"] = products[0]
        self.forget()
        return out

    def _settle(self) -> None:
        """Bin what waits. Late is cheaper, but values per mode of a whole block would outgrow the scratch."""
        if not self.norms:
            return
        binned = [torch.cat(self.norms).double().square() @ self.select]
        if self.products:
            flat = torch.stack(self.products, dim=1).flatten(1).double()  # (N, P 6): one product without transposing
            binned.append((self.select.T @ flat).view(self.atoms, len(self.products), -1).transpose(0, 1))
        self.binned.append(tuple(binned))
        self.norms, self.products = [], []


def shuffled(energies: np.ndarray, cross: np.ndarray, partner: list[int]) -> np.ndarray:
    """(P, A, 4) energies of visible p against infrared partner[p]; cross: (P, A) their cross energy."""
    pa, pb = energies[:, :, 0], energies[partner][:, :, 1]
    return np.stack([pa, pb, cross, pa + pb - 2 * cross], axis=-1)  # far from equal: the formula is safe


def mean_removed(energies: np.ndarray, products: np.ndarray, constants: np.ndarray) -> np.ndarray:
    """(P, A, 4) energies after each modality's mean map is subtracted.

    products: (P, A, 6) of `Spectrometer.collect`; constants: (3, A) of `Spectrometer.constants`.
    """
    pa, pb, re, pd = np.moveaxis(energies, -1, 0)
    xmx, xmy, _, ymx, ymy, _ = np.moveaxis(products, -1, 0)
    mxx, myy, mxy = constants
    difference = pd - 2 * (xmx - xmy - ymx + ymy) + mxx - 2 * mxy + myy
    parts = [pa - 2 * xmx + mxx, pb - 2 * ymy + myy, re - xmy - ymx + mxy, difference]
    squares = (0, 1, 3)  # below zero only by rounding
    return np.stack([np.maximum(part, 0) if i in squares else part for i, part in enumerate(parts)], axis=-1)


def pixel_products(visible_HW: np.ndarray, infrared_HW: np.ndarray) -> np.ndarray:
    """(4, H W) squares and product of the coefficients of two grey images: x^2, y^2, x y, (x - y)^2."""
    height, width = visible_HW.shape
    rows, columns = torch.from_numpy(real_basis(height)), torch.from_numpy(real_basis(width))
    images = torch.from_numpy(np.stack([visible_HW, infrared_HW, visible_HW - infrared_HW])).double()
    x, y, d = (rows @ images @ columns.T).flatten(1).numpy()
    return np.stack([x * x, y * y, x * y, d * d])


def pixel_spectra(products: np.ndarray, size: tuple[int, ...], bands: Bands) -> tuple[np.ndarray, np.ndarray]:
    """`pixel_products` summed at the physical frequencies of a tap's bands.

    Returns: (A, 4) pa, pb, re, pd, and (A,) modes in each ring (0 where the image has none).
    """
    assert bands.stride is not None
    height, width = size
    index = fine_rings(bands, (height, width), bands.stride)
    ring = index[real_numbers(height)[:, None], real_numbers(width)[None, :]].ravel()
    count, inside = len(bands.atoms()), ring >= 0
    sums = [np.bincount(ring[inside], part[inside], count) for part in products]
    return np.stack(sums, axis=-1), np.bincount(ring[inside], minlength=count)
