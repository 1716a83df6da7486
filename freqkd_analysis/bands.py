"""Spatial-frequency bands on a grid: which Fourier mode belongs to which band. One object for analysis and loss.

Mode (u, v) of an H x W grid has f = sqrt((u/H)^2 + (v/W)^2) in cycles per token, u and v folded to their shorter
half: 0 (DC) to 0.7071 (the corner). Bands are half-open rings [lo, hi); the last one is open to the corner, the
first holds DC. Whether a mode reaches an edge is decided in integers: as floats, modes that lie exactly on an edge
(16 of 196 on a 14 x 14 grid cut into 7) would fall now on one side, now on the other. f / stride is in cycles per
input pixel, the axis on which networks of unlike strides compare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from math import ceil, sqrt

import numpy as np

from freqkd_analysis.errors import BandsError, nearest

FINE = 64
"""Stored spectra resolve 1/64 cycle per token; re-banding is exact at these edges and at the run's own."""

CORNER = sqrt(0.5)
_CORNER2 = Fraction(1, 2)


@dataclass(frozen=True, eq=False)
class Atoms:
    """The partition of modes that a run stores: DC alone, then fine rings, none of them across a band edge.

    For bands that are rings, the atoms are the same rings on every grid, so that atom numbers compare.

    index: (H, W) atom of each mode, in the order of np.fft.fftfreq. f_lo, f_hi: (A,) cycles per token.
    modes: (A,) counts, 0 where the grid has no mode in a ring.
    to_bands: (A, K); band energies are atom energies @ to_bands.
    """

    index: np.ndarray
    f_lo: np.ndarray
    f_hi: np.ndarray
    modes: np.ndarray
    to_bands: np.ndarray

    def __len__(self) -> int:
        return len(self.modes)


@dataclass(frozen=True, eq=False)
class Bands:
    """K bands on one grid. Build with `Bands.parse`.

    names: K labels, lowest first. f_lo, f_hi: (K,) cycles per token (nominal for bands that are not rings).
    index: (H, W) band of each mode in the order of np.fft.fftfreq, -1 for none. weights: (K, H, W) amplitude kept
    of each mode; 0 or 1 except for `released`. edges2: squared inner edges of rings, None for other shapes.

    Example:
        >>> bands = Bands.parse("octave:3", grid=(14, 14))
        >>> bands.names, bands.modes.tolist()
        (('low', 'mid', 'high'), [9, 28, 159])
    """

    text: str
    grid: tuple[int, int]
    stride: int | None
    names: tuple[str, ...]
    f_lo: np.ndarray
    f_hi: np.ndarray
    index: np.ndarray
    weights: np.ndarray
    edges2: tuple[Fraction, ...] | None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def modes(self) -> np.ndarray:
        """(K,) number of modes in each band; 0 for a band that this grid cannot resolve."""
        return np.array([(self.index == k).sum() for k in range(len(self))])

    @property
    def covers(self) -> bool:
        """Whether every mode has a band, so that the parts add up to the whole."""
        return bool((self.index >= 0).all())

    @property
    def mirrored(self) -> bool:
        """Whether (u, v) and (u, -v) always share their weights, as the real transform needs."""
        rows, columns = ((-np.arange(n)) % n for n in self.grid)
        flipped = self.weights[:, rows]
        return bool((self.weights == flipped).all() and (self.weights == self.weights[:, :, columns]).all())

    @staticmethod
    def parse(text: str, grid: tuple[int, int], stride: int | None = None) -> Bands:
        """Read a band specification for one grid.

        Args:
            text: `octave:K` (edges 1/4, 1/8, ...), `linear:K` (equal widths up to 1/2, corners in the last),
                `equal-modes:K`, inner edges such as `0.1,0.25` (cycles per token) or `0.01,0.02/px` (cycles per
                input pixel, needs `stride`; a band above the corner has no mode), `split:C` (one ring edge at C of
                Nyquist), `paper` (disc and ring of the FreqKD paper's analysis, the middle in neither), `released:C`
                (the half-open rectangle of its released loss; not conjugate-symmetric, so that boundary modes keep
                half their amplitude in both), `random:SEED` (a control: half of the modes of every radius, `chosen`,
                and the `rest`).
            grid: rows and columns of tokens.
            stride: input pixels per token.
        Raises: BandsError (a ValueError) with the numbers that do not fit.

        Example:
            >>> Bands.parse("paper", grid=(37, 46)).modes.tolist()
            [69, 1125]
            >>> Bands.parse("random:0", grid=(14, 14)).modes.tolist()
            [98, 98]
        """
        return _parse(text.strip(), (int(grid[0]), int(grid[1])), stride)

    def atoms(self) -> Atoms:
        """The fine partition of this grid, refined by these bands."""
        return _atoms(self)


def mode_numbers(grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Signed integer mode numbers u (H, 1) and v (1, W) in the order of np.fft.fftfreq."""
    rows, columns = (np.rint(np.fft.fftfreq(n) * n).astype(np.int64) for n in grid)
    return rows[:, None], columns[None, :]


def frequency(grid: tuple[int, int]) -> np.ndarray:
    """(H, W) radial frequency of each mode in cycles per token, for axes and figures (not for binning)."""
    u, v = mode_numbers(grid)
    return np.hypot(u / grid[0], v / grid[1])


def rings(grid: tuple[int, int], edges2: tuple[Fraction, ...]) -> np.ndarray:
    """(H, W) how many of the squared edges each mode reaches: exact, f >= edge in integers."""
    squared, scale = _squared(grid)
    thresholds = [ceil(edge * scale) for edge in edges2]  # integers, so n >= t decides n / scale >= edge exactly
    return np.searchsorted(np.array(thresholds, dtype=np.int64), squared, side="right")


def _squared(grid: tuple[int, int]) -> tuple[np.ndarray, int]:
    """f^2 of each mode as integers over one common denominator."""
    (height, width), (u, v) = grid, mode_numbers(grid)
    return u**2 * width**2 + v**2 * height**2, height**2 * width**2


@lru_cache(maxsize=256)
def _parse(text: str, grid: tuple[int, int], stride: int | None) -> Bands:
    if min(grid) < 1 or max(grid) > 4096:
        raise BandsError(f"expected a grid of 1 to 4096 tokens a side, got {grid[0]}x{grid[1]}.")
    kind, _, argument = text.partition(":")
    if kind in _SHAPES:
        return _SHAPES[kind](text, argument, grid, stride)
    if kind in _EDGES:
        edges2 = _EDGES[kind](argument, grid)
    elif text[:1].isdigit() or text[:1] == ".":
        edges2 = _explicit(text, stride)
    else:
        known = [*_EDGES, *_SHAPES]
        raise BandsError(
            f'expected bands {", ".join(known)} or edges such as 0.1,0.25; got "{text}".{nearest(kind, known)}'
        )
    return _from_edges(text, grid, stride, edges2)


def _from_edges(text: str, grid: tuple[int, int], stride: int | None, edges2: tuple[Fraction, ...]) -> Bands:
    index = rings(grid, edges2)
    count = len(edges2) + 1
    edges = np.minimum(np.sqrt(np.array([float(e) for e in edges2])), CORNER)
    weights = (index == np.arange(count)[:, None, None]).astype(np.float64)
    lows, highs = np.concatenate([[0.0], edges]), np.concatenate([edges, [CORNER]])
    return Bands(text, grid, stride, _names(count), lows, highs, index, weights, edges2)


def _names(count: int) -> tuple[str, ...]:
    if count == 1:
        return ("all",)
    middle = ["mid"] if count == 3 else [f"b{k}" for k in range(1, count - 1)]
    return ("low", *middle, "high")


def _count(argument: str, kind: str) -> int:
    if not (argument.isascii() and argument.isdigit()) or not 1 <= int(argument) <= FINE:
        raise BandsError(f'expected {kind}:K with 1 <= K <= {FINE}, got "{kind}:{argument}".')
    return int(argument)


def _octave(argument: str, grid: tuple[int, int]) -> tuple[Fraction, ...]:
    count = _count(argument, "octave")
    return tuple(Fraction(1, 2 ** (k + 1)) ** 2 for k in range(count - 1, 0, -1))


def _linear(argument: str, grid: tuple[int, int]) -> tuple[Fraction, ...]:
    count = _count(argument, "linear")
    return tuple(Fraction(k, 2 * count) ** 2 for k in range(1, count))


def _equal_modes(argument: str, grid: tuple[int, int]) -> tuple[Fraction, ...]:
    """Edges at the radii of modes, so that each band holds as near N / K modes as whole rings allow."""
    count = _count(argument, "equal-modes")
    squared, scale = _squared(grid)
    radii, sizes = np.unique(squared, return_counts=True)
    if len(radii) < count:
        raise BandsError(f"expected at most {len(radii)} bands on a {grid[0]}x{grid[1]} grid, got equal-modes:{count}.")
    below = np.concatenate([[0], np.cumsum(sizes)])[:-1]
    edges: list[int] = []
    for k in range(1, count):
        free = [i for i in range(1, len(radii)) if i > (edges[-1] if edges else 0) and len(radii) - i >= count - k]
        edges.append(min(free, key=lambda i: abs(int(below[i]) - k * squared.size / count)))
    return tuple(Fraction(int(radii[i]), scale) for i in edges)


def _number(text: str) -> Fraction:
    try:
        return Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        raise BandsError(f'expected a number as band edge or cut-off, got "{text}".') from None


def _cutoff(argument: str, kind: str) -> Fraction:
    cut = _number(argument)
    if not 0 < cut < 1:
        raise BandsError(f"expected {kind}:C with 0 < C < 1 (a share of Nyquist), got {kind}:{argument}.")
    return cut


def _split(argument: str, grid: tuple[int, int]) -> tuple[Fraction, ...]:
    return ((_cutoff(argument, "split") / 2) ** 2,)


def _explicit(text: str, stride: int | None) -> tuple[Fraction, ...]:
    listed, per_pixel = text.removesuffix("/px"), text.endswith("/px")
    if per_pixel and stride is None:
        raise BandsError(f'edges in cycles per pixel ("{text}") need the stride of the layer, got none.')
    edges = [_number(part) * ((stride or 1) if per_pixel else 1) for part in listed.split(",")]
    if any(b <= a for a, b in pairwise(edges)):
        raise BandsError(f'expected increasing band edges, got "{text}".')
    # Cycles per pixel above a layer's corner stay: its bands keep their names and hold no mode.
    inner = [edge for edge in edges if edge > 0 and (per_pixel or edge**2 < _CORNER2)]
    if not inner:
        raise BandsError(f'expected an edge between 0 and {CORNER:.4f} cycles per token, got "{text}".')
    return tuple(edge**2 for edge in inner)


def _paper(text: str, argument: str, grid: tuple[int, int], stride: int | None) -> Bands:
    """r <= 0.25 and r >= 0.75, both edges included; r in index units over min(H // 2, W // 2)."""
    if argument:
        raise BandsError(f'the bands "paper" take no argument, got "{text}".')
    u, v = mode_numbers(grid)
    reach, squared = min(grid[0] // 2, grid[1] // 2), u**2 + v**2
    index = np.where(16 * squared <= reach**2, 0, np.where(16 * squared >= 9 * reach**2, 1, -1))
    weights = (index == np.arange(2)[:, None, None]).astype(np.float64)
    unit = reach / min(grid)
    return Bands(text, grid, stride, ("low", "high"), np.array([0, 0.75 * unit]), np.array([0.25 * unit, CORNER]),
                 index, weights, None)  # fmt: skip


def _released(text: str, argument: str, grid: tuple[int, int], stride: int | None) -> Bands:
    """Rows and columns [c - h, c + h) of the centred spectrum, h = max(1, int(side * C / 2)).

    The rectangle lacks the mirror of its first row and column. The release takes the real part of the inverse
    transform, which equals the mean of mask and mirrored mask: those modes keep half their amplitude in each band.
    """
    cut = float(_cutoff(argument, "released"))
    halves = [max(1, int(side * cut / 2)) for side in grid]
    u, v = mode_numbers(grid)
    mask = (u >= -halves[0]) & (u < halves[0]) & (v >= -halves[1]) & (v < halves[1])
    mirror = mask[(-np.arange(grid[0])) % grid[0]][:, (-np.arange(grid[1])) % grid[1]]
    low = (mask.astype(np.float64) + mirror) / 2
    edge = halves[0] / grid[0]
    return Bands(text, grid, stride, ("low", "high"), np.array([0, edge]), np.array([edge, CORNER]),
                 np.where(mask, 0, 1), np.stack([low, 1 - low]), None)  # fmt: skip


def _random(text: str, argument: str, grid: tuple[int, int], stride: int | None) -> Bands:
    """Two halves of the modes that hold about the same energy, since that goes by radius; DC is in the first.

    Groups of modes with one (|u|, |v|), which no real map can tell apart by energy, are dealt in pairs of one size and
    one radius; what a radius has left over is paired with what the next one has. A coin decides each pair.
    """
    if not (argument.isascii() and argument.isdigit()):
        raise BandsError(f'expected random:SEED with a whole number of at least 0, got "{text}".')
    rng = np.random.default_rng(int(argument))
    groups: dict[int, list[np.ndarray]] = {}
    row, column = (np.abs(number) for number in np.broadcast_arrays(*mode_numbers(grid)))
    squared = _squared(grid)[0]
    for group in np.unique(np.stack([squared, row, column], -1).reshape(-1, 3), axis=0):
        groups.setdefault(int(group[0]), []).append((row == group[1]) & (column == group[2]))
    index, waiting = np.ones(grid, dtype=np.int64), dict[int, np.ndarray]()
    index[0, 0] = 0
    for radius in sorted(groups.keys() - {0}):
        left: dict[int, np.ndarray] = {}
        for group in groups[radius]:
            left = _paired(left, group, index, rng)
        for group in left.values():
            waiting = _paired(waiting, group, index, rng)
    for group in waiting.values():
        index[group] = int((index == 0).sum() > (index == 1).sum() - group.sum())
    weights = (index == np.arange(2)[:, None, None]).astype(np.float64)
    return Bands(text, grid, stride, ("chosen", "rest"), np.zeros(2), np.full(2, CORNER), index, weights, None)


def _paired(waiting: dict[int, np.ndarray], group: np.ndarray, index: np.ndarray, rng: np.random.Generator,
            ) -> dict[int, np.ndarray]:  # fmt: skip
    """`waiting` by size with the group added, or with its partner gone: one of the two is then in band 0."""
    size = int(group.sum())
    if size not in waiting:
        return waiting | {size: group}
    index[(group, waiting[size])[rng.integers(2)]] = 0
    return {n: other for n, other in waiting.items() if n != size}


_EDGES: dict[str, Callable[[str, tuple[int, int]], tuple[Fraction, ...]]] = {
    "octave": _octave,
    "linear": _linear,
    "equal-modes": _equal_modes,
    "split": _split,
}
_SHAPES: dict[str, Callable[[str, str, tuple[int, int], int | None], Bands]] = {
    "paper": _paper,
    "released": _released,
    "random": _random,
}


def fine_edges2(bands: Bands) -> tuple[Fraction, ...]:
    """Squared edges of the atoms: multiples of 1/64 and, for rings, the bands' own. DC is cut off separately."""
    fine = {Fraction(k, FINE) ** 2 for k in range(1, FINE) if Fraction(k, FINE) ** 2 < _CORNER2}
    return tuple(sorted(fine | {edge for edge in bands.edges2 or () if edge < _CORNER2}))


@lru_cache(maxsize=256)
def _atoms(bands: Bands) -> Atoms:
    edges2 = fine_edges2(bands)
    ring = fine_rings(bands, bands.grid)
    edges = np.sqrt(np.array([0.0, 0.0, *map(float, edges2), 0.5]))  # DC alone is ring 0: its width is 0
    if bands.edges2 is not None:
        lows = [Fraction(0), Fraction(0), *edges2]
        band = np.array([sum(edge <= low for edge in bands.edges2) for low in lows])
        modes = np.bincount(ring.ravel(), minlength=len(lows))
        return Atoms(ring, edges[:-1], edges[1:], modes, np.eye(len(bands))[band])
    keys = np.column_stack([ring.ravel(), bands.weights.reshape(len(bands), -1).T])
    unique, index, modes = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    number = unique[:, 0].astype(int)
    return Atoms(index.reshape(bands.grid), edges[number], edges[number + 1], modes, unique[:, 1:] ** 2)


def fine_rings(bands: Bands, grid: tuple[int, int], stride: int = 1) -> np.ndarray:
    """(H, W) fine ring of each mode of `grid`; ring 0 is DC.

    With `stride` > 1 the grid is finer than the bands' by that factor (input pixels instead of tokens) and rings are
    the same physical frequencies; modes above the tokens' corner get -1. For rings, ring number = atom number.
    """
    edges2 = tuple(edge / stride**2 for edge in (*fine_edges2(bands), _CORNER2))
    ring = rings(grid, edges2) + 1
    if stride > 1:
        ring[ring > len(edges2)] = -1
    else:
        ring = np.minimum(ring, len(edges2))
    ring[0, 0] = 0
    return ring
