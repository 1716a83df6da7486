"""From stored spectra to divergences per pair, layer and band: one function a measure, all in one plain dict.

Every measure takes the band's sums over modes and channels, arrays of one shape (or broadcastable):
    pa, pb      energy of X (visible) and of Y (infrared), squared feature units
    re          real part of the cross spectrum, summed
    pd          energy of X - Y, summed from the difference itself
    modes       Fourier modes in the band;   positions = H W of the grid;   channels = C
A band without a mode, or without energy in both images, has no divergence: NaN, never 0.

Letters: N blocks (condition, pair) of one layer, A atoms, K bands, M measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from freqkd_analysis.bands import FINE, Atoms, Bands
from freqkd_analysis.errors import BandsError, FreqkdError, RunError, nearest
from freqkd_analysis.schema import condition_order

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray[Any, np.dtype[Any]]
Measure = Callable[[Array, Array, Array, Array, Array, Array, Array], Array]

ROUNDING = 1e-13
"""A band below this share of the pair's whole energy holds the rounding of float32, not a signal."""

BAND_NAMES = ("low", *(f"b{k}" for k in range(1, FINE)), "mid", "high", "all")
"""Every name that Bands gives, by frequency."""


def _where(valid: Array, value: Array) -> Array:
    return np.where(valid, value, np.nan)


def _cosine(pa: Array, pb: Array, re: Array, pd: Array, modes: Array, positions: Array, channels: Array) -> Array:
    # 1 - R / sqrt(Pa Pb) cancels near equality; the same number from Pd does not.
    root = np.sqrt(pa * pb)
    value = (pd - (np.sqrt(pa) - np.sqrt(pb)) ** 2) / (2.0 * root)
    return _where((root > 0) & (modes > 0), np.clip(value, 0.0, 2.0))


def _relative(pa: Array, pb: Array, re: Array, pd: Array, modes: Array, positions: Array, channels: Array) -> Array:
    return _where((pa + pb > 0) & (modes > 0), pd / (pa + pb))


def _nmse(pa: Array, pb: Array, re: Array, pd: Array, modes: Array, positions: Array, channels: Array) -> Array:
    return _where((pa > 0) & (modes > 0), pd / pa)


def _mse(pa: Array, pb: Array, re: Array, pd: Array, modes: Array, positions: Array, channels: Array) -> Array:
    return _where((pa + pb > 0) & (modes > 0), pd / (positions * channels))


def _per_mode(pa: Array, pb: Array, re: Array, pd: Array, modes: Array, positions: Array, channels: Array) -> Array:
    return _where((pa + pb > 0) & (modes > 0), pd / (modes * channels))


def _log(pa: Array, pb: Array, re: Array, pd: Array, modes: Array, positions: Array, channels: Array) -> Array:
    return _where((pa > 0) & (pb > 0) & (modes > 0), np.abs(np.log(pa / pb)))


def _gain(pa: Array, pb: Array, re: Array, pd: Array, modes: Array, positions: Array, channels: Array) -> Array:
    value = (np.sqrt(pa) - np.sqrt(pb)) ** 2 / (positions * channels)
    return _where((pa + pb > 0) & (modes > 0), value)


def _content(pa: Array, pb: Array, re: Array, pd: Array, modes: Array, positions: Array, channels: Array) -> Array:
    value = (pd - (np.sqrt(pa) - np.sqrt(pb)) ** 2) / (positions * channels)
    return _where((pa + pb > 0) & (modes > 0), np.maximum(value, 0.0))


def _energy_rgb(pa: Array, pb: Array, re: Array, pd: Array, modes: Array, positions: Array, channels: Array) -> Array:
    return _where(modes > 0, pa / (positions * channels))


def _energy_ir(pa: Array, pb: Array, re: Array, pd: Array, modes: Array, positions: Array, channels: Array) -> Array:
    return _where(modes > 0, pb / (positions * channels))


def _modes(pa: Array, pb: Array, re: Array, pd: Array, modes: Array, positions: Array, channels: Array) -> Array:
    return np.broadcast_to(modes, np.shape(pa)).astype(float)


MEASURES: dict[str, Measure] = {
    "cosine": _cosine,  # 0 same content, 1 unrelated, 2 opposite; blind to gain; the primary measure
    "relative": _relative,  # Pd / (Pa + Pb): 0, 1, 2 as above; content and gain
    "nmse": _nmse,  # Pd / Pa: 0 upwards; error against the visible energy
    "mse": _mse,  # Pd / (H W C): adds up over bands to the plain MSE; grows with energy and modes
    "mse_per_mode": _per_mode,  # Pd / (m C)
    "log_spectral": _log,  # |ln(Pa / Pb)|: 0 upwards; amplitude only
    "gain": _gain,  # the part of mse that a gain alone would make
    "content": _content,  # the rest: mse = gain + content
    "energy_rgb": _energy_rgb,  # Pa / (H W C)
    "energy_ir": _energy_ir,  # Pb / (H W C)
    "modes": _modes,  # modes in the band
}
DIVERGENCES = ("cosine", "relative", "nmse", "mse", "mse_per_mode", "log_spectral")
"""The measures proper: 0 means no difference. The others say what mse is made of."""
BESIDE_MSE = ("cosine", "mse_per_mode", "gain", "content", "energy_rgb", "energy_ir", "modes")


def chosen(measures: Iterable[str] | None = None) -> tuple[str, ...]:
    """Measure names in table order; `mse` brings along what it must not be read without. None: all.

    Raises: FreqkdError for an unknown name, with the nearest.

    Example:
        >>> chosen(["nmse"]), chosen(["mse"])[:3]
        (('nmse',), ('cosine', 'mse', 'mse_per_mode'))
    """
    if measures is None:
        return tuple(MEASURES)
    wanted = set(measures)
    for name in sorted(wanted - MEASURES.keys()):
        raise FreqkdError(f'expected measures among {", ".join(MEASURES)}; got "{name}".{nearest(name, MEASURES)}')
    if "mse" in wanted:
        wanted |= set(BESIDE_MSE)
    return tuple(name for name in MEASURES if name in wanted)


def atom_matrix(run: Bands, wanted: Bands) -> Array:
    """(A, K) share of each atom of `run` that belongs to each band of `wanted`; the sum is exact or not done.

    Raises: BandsError when a band edge cuts an atom, with the nearest edges that the run can give.

    Example:
        >>> stored, two = (Bands.parse(text, grid=(16, 16)) for text in ("octave:3", "0.25"))
        >>> atom_matrix(stored, two).sum(axis=0).astype(int).tolist()
        [17, 30]
    """
    atoms = run.atoms()
    if run.text == wanted.text:
        return atoms.to_bands
    power = wanted.weights.reshape(len(wanted), -1).T ** 2
    index, count = atoms.index.ravel(), np.maximum(atoms.modes, 1)
    matrix = np.stack([np.bincount(index, w, len(atoms)) / count for w in power.T], axis=1)
    straddling = np.abs(power - matrix[index]).max(axis=1) > 1e-9
    if straddling.any():
        raise BandsError(_straddle(run, wanted, atoms, int(index[straddling][0])))
    # A ring without modes on this grid still has its place (`pixels` has modes there).
    for atom in np.flatnonzero(atoms.modes == 0) if wanted.edges2 is not None else []:
        edges = np.sqrt([float(edge) for edge in wanted.edges2 or ()])
        matrix[atom] = np.eye(len(wanted))[int((edges <= atoms.f_lo[atom]).sum())]
    return matrix


def _straddle(run: Bands, wanted: Bands, atoms: Atoms, atom: int) -> str:
    grid = f"{run.grid[0]}x{run.grid[1]}"
    lo, hi = float(atoms.f_lo[atom]), float(atoms.f_hi[atom])
    edge = next((float(e) ** 0.5 for e in wanted.edges2 or () if lo < float(e) ** 0.5 < hi), None)
    if edge is None:
        return (
            f'bands "{wanted.text}" cut through the stored ring {lo:.6g} to {hi:.6g} cycles per token on a {grid} '
            f"grid; they are exact only in a run made with --bands {wanted.text}."
        )
    return (
        f'bands "{wanted.text}": edge {edge:.6g} cycles per token lies inside a stored ring on a {grid} grid; nearest '
        f"edges of this run: {lo:.6g} and {hi:.6g}. Use one of them, or run `layers` again with --bands {wanted.text}."
    )


def band_table(
    spectra: pd.DataFrame,
    taps: Sequence[Mapping[str, Any]],
    bands_text: str,
    measures: Iterable[str] | None = None,
    run_bands_text: str | None = None,
) -> pd.DataFrame:
    """Divergences of every condition, pair, layer and band: the columns of schema.DIVERGENCE, text as categories.

    Args:
        spectra: rows of spectra.parquet, in any order.
        taps: the manifest's `taps`: layer, grid, stride, channels.
        bands_text: the bands wanted; run_bands_text: those of the run (its atoms), the same by default.
        measures: names of MEASURES, see `chosen`.
    Energies of `pixels` are those of one grey channel over H W stride^2 pixels; for bands that are not rings the
    rows of `pixels` are left out, since atoms of tokens and of pixels then do not correspond.
    Raises: BandsError (see `atom_matrix`); RunError for rows twice, missing, or of other modes than the grid's.
    """
    import pandas as pd

    names = chosen(measures)
    conditions, condition = _sorted_codes(spectra["condition"], condition_order)
    pairs, pair = _sorted_codes(spectra["pair"], str)
    groups = _group_of_pair(spectra["group"], pair, len(pairs))
    by_layer = {int(tap["layer"]): tap for tap in taps}
    layer = spectra["layer"].to_numpy()
    unknown = sorted(set(np.unique(layer).tolist()) - by_layer.keys())
    if unknown:
        raise RunError(f"spectra.parquet holds layer {unknown[0]}, which manifest.json lacks; is it of this run?")
    columns = [spectra[c].to_numpy() for c in ("p_rgb", "p_ir", "cross", "p_diff", "modes")]
    radius, parts = spectra["radius"].to_numpy().astype(np.int64), []
    for number in sorted(by_layer):
        rows = np.flatnonzero(layer == number)
        if len(rows) == 0:
            continue
        blocks, block = np.unique(condition[rows].astype(np.int64) * len(pairs) + pair[rows], return_inverse=True)
        where = _Layer(by_layer[number], bands_text, run_bands_text or bands_text)
        kind, who = np.divmod(blocks, len(pairs))
        pixels = np.array([c == "pixels" for c in conditions])[kind]
        sums = where.sums([c[rows] for c in columns], radius[rows], block, len(blocks), pixels)
        values = where.measure(sums, names, pixels)
        keep = np.flatnonzero(~pixels | (where.run.edges2 is not None))
        parts.append(where.frame(values[keep], kind[keep], who[keep]))
    if not parts:
        raise RunError("spectra.parquet holds no rows; run `freqkd-analyze layers` again.")
    table = pd.concat(parts, ignore_index=True)
    kinds, group_names = sorted(set(groups)), pd.Categorical(groups).codes
    table["group"] = pd.Categorical.from_codes(group_names[table["pair"]], kinds)
    for column, labels in (("condition", conditions), ("pair", pairs), ("measure", names), ("band", BAND_NAMES)):
        table[column] = pd.Categorical.from_codes(table[column], list(labels)).remove_unused_categories()
    return table


class _Layer:
    """One tap's grid, bands and atoms; what turns its rows into band values."""

    def __init__(self, tap: Mapping[str, Any], wanted: str, stored: str) -> None:
        self.number, self.tap = int(tap["layer"]), str(tap.get("tap", ""))
        grid, self.stride = (int(tap["grid"][0]), int(tap["grid"][1])), int(tap["stride"])
        self.run, self.bands = (Bands.parse(text, grid, self.stride) for text in (stored, wanted))
        self.atoms, self.matrix = self.run.atoms(), atom_matrix(self.run, self.bands)
        self.positions, self.channels = grid[0] * grid[1], int(tap["channels"])

    def sums(self, columns: list[Array], radius: Array, block: Array, n: int, pixels: Array) -> list[Array]:
        """Band sums (N, K) of p_rgb, p_ir, cross, p_diff, modes."""
        a = len(self.atoms)
        if len(radius) and (radius.min() < 0 or radius.max() >= a):
            raise RunError(f"layer {self.number}: radius {int(radius.max())} is not in 0 to {a - 1}; {_OTHER}")
        cell = block * a + radius
        if np.bincount(cell, minlength=n * a).max(initial=0) > 1:
            raise RunError(f"layer {self.number}: rows of spectra.parquet occur twice; {_OTHER}")
        if self.run.edges2 is not None:
            # One grey channel's mean is brightness: of two positive numbers the cosine distance is 0 by construction.
            kept = ~(pixels[block] & (radius == 0))
            columns, cell = [column[kept] for column in columns], cell[kept]
        flat = np.zeros((len(columns), n * a))
        for k, column in enumerate(columns):
            flat[k, cell] = column
        dense = flat.reshape(len(columns), n, a)
        if not (dense[4][~pixels].sum(axis=1) == self.positions).all():
            raise RunError(f"layer {self.number}: rows are missing or count other modes than the grid has; {_OTHER}")
        whole = dense[:2].sum(axis=2)[:, :, None]
        pa, pb, re, pd, modes = dense @ self.matrix
        silent = pa <= ROUNDING * whole[0], pb <= ROUNDING * whole[1]
        pa[silent[0]], pb[silent[1]] = 0.0, 0.0
        re[silent[0] & silent[1]] = pd[silent[0] & silent[1]] = 0.0
        return [pa, pb, re, pd, modes]

    def measure(self, sums: list[Array], names: Sequence[str], pixels: Array) -> Array:
        """Values (N, K, M)."""
        positions = np.where(pixels, self.positions * self.stride**2, self.positions)[:, None]
        channels = np.where(pixels, 1, self.channels)[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            pa, pb, re, pd, modes = sums
            each = [MEASURES[name](pa, pb, re, pd, modes, positions, channels) for name in names]
            return np.stack(each, axis=-1)

    def frame(self, values: Array, condition: Array, pair: Array) -> pd.DataFrame:
        """Rows in the order of the blocks, then bands, then measures; text columns still as numbers."""
        import pandas as pd

        n, k, m = values.shape
        band = np.repeat(np.tile(np.arange(k), n), m)
        number = np.array([BAND_NAMES.index(name) for name in self.bands.names], dtype=np.int8)
        each = k * m
        return pd.DataFrame({
            "condition": np.repeat(condition.astype(np.int16), each), "pair": np.repeat(pair.astype(np.int32), each),
            "group": np.int32(0), "layer": np.full(n * each, self.number, dtype=np.int32), "band": number[band],
            "f_lo": self.bands.f_lo[band], "f_hi": self.bands.f_hi[band],
            "measure": np.tile(np.arange(m, dtype=np.int8), n * k), "value": values.ravel(),
        })  # fmt: skip


_OTHER = "was the run made with other bands or layers than its manifest says? Run `freqkd-analyze layers` again."


def _sorted_codes(column: pd.Series, key: Callable[[str], Any]) -> tuple[list[str], Array]:
    """Distinct names in the order of `key`, and each row's place among them."""
    import pandas as pd

    codes, names = pd.factorize(column)
    listed = [str(name) for name in names]
    order = sorted(range(len(listed)), key=lambda i: key(listed[i]))
    place = np.empty(len(listed), dtype=np.int64)
    place[order] = np.arange(len(listed))
    return [listed[i] for i in order], place[codes]


def _group_of_pair(column: pd.Series, pair: Array, n: int) -> list[str]:
    codes, names = _sorted_codes(column.astype("str").fillna("") if column.hasnans else column, str)
    found = np.zeros(n, dtype=np.int64)
    found[pair] = names
    if (found[pair] != names).any():
        raise RunError("spectra.parquet gives one pair two groups; expected one group a pair. Run `layers` again.")
    return [codes[i] for i in found]


@dataclass(frozen=True)
class Cube:
    """The divergence table as arrays: per condition its pairs, groups and values (P, L, K, M), NaN where absent."""

    layers: tuple[int, ...]
    bands: tuple[str, ...]
    measures: tuple[str, ...]
    pairs: dict[str, tuple[str, ...]]
    groups: dict[str, tuple[str, ...]]
    values: dict[str, Array]

    @property
    def low(self) -> int:
        return self.bands.index("low") if "low" in self.bands else 0

    @property
    def high(self) -> int:
        return self.bands.index("high") if "high" in self.bands else len(self.bands) - 1

    def of(self, condition: str, measure: str) -> Array:
        """(P, L, K) values of one condition and measure."""
        return self.values[condition][..., self.measures.index(measure)]


def joined(a: Cube, b: Cube) -> Cube:
    """One cube with the conditions of both; same layers, bands and measures."""
    assert (a.layers, a.bands, a.measures) == (b.layers, b.bands, b.measures)
    return Cube(a.layers, a.bands, a.measures, a.pairs | b.pairs, a.groups | b.groups, a.values | b.values)


def stacked(pieces: Sequence[Cube]) -> Cube:
    """Pieces of one table (each with other pairs of a condition, or other conditions) as one cube, pairs sorted."""
    first = pieces[0]
    assert all((p.layers, p.bands, p.measures) == (first.layers, first.bands, first.measures) for p in pieces)
    result = Cube(first.layers, first.bands, first.measures, {}, {}, {})
    for name in sorted({name for piece in pieces for name in piece.values}, key=condition_order):
        having = [piece for piece in pieces if name in piece.values]
        pairs = [pair for piece in having for pair in piece.pairs[name]]
        groups = [group for piece in having for group in piece.groups[name]]
        if len(set(pairs)) < len(pairs):
            raise RunError(f"spectra.parquet holds a pair of {name} twice; run `freqkd-analyze layers` again.")
        order = sorted(range(len(pairs)), key=pairs.__getitem__)
        result.pairs[name] = tuple(pairs[i] for i in order)
        result.groups[name] = tuple(groups[i] for i in order)
        result.values[name] = np.concatenate([piece.values[name] for piece in having])[order]
    return result


def cube(table: pd.DataFrame) -> Cube:
    """Dense arrays of a divergence table, whatever the order of its rows. Bands are ordered by frequency."""
    bands, band = _sorted_codes(table["band"], BAND_NAMES.index)
    measures, measure = _sorted_codes(table["measure"], lambda m: [*MEASURES, m].index(m))
    conditions, condition = _sorted_codes(table["condition"], condition_order)
    pairs, pair = _sorted_codes(table["pair"], str)
    groups = _group_of_pair(table["group"], pair, len(pairs))
    layers, layer = np.unique(table["layer"].to_numpy(), return_inverse=True)
    value, result = table["value"].to_numpy(), Cube(tuple(map(int, layers)), tuple(bands), tuple(measures), {}, {}, {})
    for k, name in enumerate(conditions):
        rows = np.flatnonzero(condition == k)
        present, who = np.unique(pair[rows], return_inverse=True)
        dense = np.full((len(present), len(layers), len(bands), len(measures)), np.nan)
        dense[who, layer[rows], band[rows], measure[rows]] = value[rows]
        result.pairs[name] = tuple(pairs[i] for i in present)
        result.groups[name] = tuple(groups[i] for i in present)
        result.values[name] = dense
    return result
