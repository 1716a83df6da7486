"""Figures of a run, one function each: a tidy table and an `ax` in, the `ax` out.

Nothing here reads, saves or computes: the table holds the numbers as they are drawn. Made for 8.5 cm width. Colours
are seaborn's `colorblind` palette and matplotlib's `viridis`; series also differ by marker, so grey print works.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from freqkd_analysis.runfolder import number

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

INK, GRID, PAPER = "#262626", "#d0d0d0", "#ffffff"
"""Text and frame, grid lines, background: three colours that occur nowhere else, so a page may replace them."""

BLUE, ORANGE, GREEN, RED, GREY = "#0173b2", "#de8f05", "#029e73", "#d55e00", "#949494"

STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica", "sans-serif"],
    "font.size": 7.0,
    "axes.titlesize": 7.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 7.0,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "grid.color": GRID,
    "grid.linewidth": 0.4,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.5,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "savefig.facecolor": "auto",
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "svg.fonttype": "none",
}
"""One look for every figure. SVG text stays text: small files, searchable, and it follows the page's colours."""

UNITS = {
    "cosine": "0 same, 1 unrelated",
    "relative": "0 same, 1 unrelated",
    "nmse": "share of RGB energy, 0 same",
    "mse": "squared feature units, 0 same",
    "mse_per_mode": "squared feature units a mode, 0 same",
    "log_spectral": "abs. log ratio of energies, 0 same",
}
"""What the numbers of a measure mean, for axis labels."""


def axis_label(measure: str) -> str:
    """Name and unit of a measure on two lines.

    Example:
        >>> axis_label("cosine")
        'divergence, cosine\\n(0 same, 1 unrelated)'
    """
    unit = UNITS.get(measure)
    return f"divergence, {measure}" + (f"\n({unit})" if unit else "")


def layer_band_map(table: pd.DataFrame, ax: Axes, measure: str) -> Axes:
    """Divergence as colour: one row a layer, one column a band; the number stands in the cell.

    Args:
        table: layer (int), band (str, low to high in order of appearance), mean.
    """
    wide = table.pivot(index="layer", columns="band", values="mean")[list(dict.fromkeys(table["band"]))]
    values = wide.to_numpy(dtype=float)
    mesh = ax.pcolormesh(np.ma.masked_invalid(values), cmap="viridis", edgecolors=PAPER, linewidth=0.3)
    span = float(np.nanmax(values) - np.nanmin(values)) or 1.0
    for (row, column), value in np.ndenumerate(values):
        bright = np.isfinite(value) and (value - np.nanmin(values)) / span > 0.6
        ax.text(column + 0.5, row + 0.5, number(value) if np.isfinite(value) else "no mode", ha="center", va="center",
                size=6.0, color="#111111" if bright or not np.isfinite(value) else "#fefefe")  # fmt: skip
    ax.set_xticks(np.arange(len(wide.columns)) + 0.5, [_band_tick(str(c)) for c in wide.columns])
    ax.set_yticks(np.arange(len(wide.index)) + 0.5, [str(i) for i in wide.index])
    ax.invert_yaxis()
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_xlabel("band, cycles per token")
    ax.set_ylabel("layer (0 = first block)")
    bar = ax.figure.colorbar(mesh, ax=ax, fraction=0.06, pad=0.03)
    bar.set_label(axis_label(measure))
    bar.outline.set_visible(False)
    return ax


def low_high_by_layer(table: pd.DataFrame, ax: Axes, measure: str) -> Axes:
    """Low and high band by layer, each with its interval; dashed: the same for unrelated scenes (the ceiling).

    Args:
        table: layer (int), series (`low`, `high`, `low ceiling`, `high ceiling`), mean, ci_low, ci_high.
    """
    looks = {"low": (BLUE, "o", -0.06), "high": (ORANGE, "s", 0.06)}
    for name, (colour, marker, move) in looks.items():
        part = table[table["series"] == name]
        part = part.assign(layer=part["layer"] + move)
        _with_interval(ax, part, "mean", "ci_low", "ci_high", colour, marker, f"{name} band")
        ceiling = table[table["series"] == f"{name} ceiling"]
        if len(ceiling):
            ax.plot(ceiling["layer"] + move, ceiling["mean"], color=colour, ls=(0, (3, 2)), lw=0.9, marker=marker,
                    mfc="none", ms=2.5, mew=0.6, label=f"{name}, unrelated scenes")  # fmt: skip
    ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    ax.set_ylabel(axis_label(measure))
    _layer_axis(ax, table["layer"])
    _legend_below(ax, 2)
    return ax


def change_by_layer(table: pd.DataFrame, ax: Axes, measure: str) -> Axes:
    """What changed between two runs by layer, one series a band, with 95 % intervals; a line at 0.

    Args:
        table: layer (int), band (low to high in order of appearance), difference, ci_low, ci_high.
    """
    names = list(dict.fromkeys(table["band"]))
    for place, name in enumerate(names):
        part = table[table["band"] == name]
        shift = 0.24 * (place / max(len(names) - 1, 1) - 0.5)
        part = part.assign(layer=part["layer"] + shift)
        colour = (BLUE, GREY, ORANGE)[place] if len(names) == 3 else _viridis(place / max(len(names) - 1, 1))
        marker = "osD^vP"[place % 6]
        _with_interval(ax, part, "difference", "ci_low", "ci_high", colour, marker, name)  # type: ignore[arg-type]
    ax.axhline(0, color=INK, lw=0.6)
    ax.set_ylabel(f"change of {measure}\n(below 0: closer)")
    _layer_axis(ax, table["layer"])
    _legend_below(ax, 3)
    return ax


def ratio_by_layer(table: pd.DataFrame, ax: Axes, measure: str) -> Axes:
    """High over low by layer on a log axis, raw and calibrated; lines at 1 (equal) and at the paper's 2.4.

    Args:
        table: layer (int), kind (`raw`, `calibrated`), ratio, ci_low, ci_high. Ratios that are not positive have no
            place on a log axis; they are left out and counted in the corner.
    """
    drawn = table[table["ratio"] > 0]
    low = float(np.nanmin([drawn["ratio"].min(), drawn["ci_low"][drawn["ci_low"] > 0].min(), 1.0])) / 1.25
    high = float(np.nanmax([drawn["ratio"].max(), drawn["ci_high"].max(), 2.4])) * 1.25
    low, high = max(low, 1e-2), min(high, 1e3)
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    for value, words, style in ((1.0, "equal", "-"), (2.4, "paper:\n2.4", (0, (1, 1)))):
        ax.axhline(value, color=INK, lw=0.7, ls=style)
        ax.annotate(words, (1, value), xycoords=("axes fraction", "data"), xytext=(3, 0),
                    textcoords="offset points", size=6, ha="left", va="center")  # fmt: skip
    for kind, colour, marker, move in (("raw", GREEN, "o", -0.12), ("calibrated", RED, "D", 0.12)):
        part = drawn[drawn["kind"] == kind]
        clipped = part.assign(layer=part["layer"] + move, ci_low=part["ci_low"].clip(lower=low / 2),
                              ci_high=part["ci_high"].clip(upper=high * 2))  # fmt: skip
        _with_interval(ax, clipped, "ratio", "ci_low", "ci_high", colour, marker, f"{kind} ratio")
    ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if low <= t <= high]
    ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
    ax.set_yticks([], minor=True)
    hidden = len(table) - len(drawn)
    if hidden:
        ax.annotate(f"{hidden} not above 0 or undetermined: not drawn", (0, 0), xycoords="axes fraction",
                    xytext=(2, 2), textcoords="offset points", size=6)  # fmt: skip
    ax.set_ylabel(f"high / low, {measure}\n(ratio, no unit; log axis)")
    _layer_axis(ax, table["layer"])
    _legend_below(ax, 2)
    return ax


def radial_profile(
    table: pd.DataFrame, ax: Axes, measure: str, stride: float | None = None, edges: Iterable[float] = ()
) -> Axes:
    """Divergence by spatial frequency, one line a layer (dark = early, bright = late).

    Args:
        table: layer (int), frequency (cycles per token, centre of the bin), value.
        stride: input pixels per token when all layers agree; adds an axis in cycles per input pixel above.
        edges: band edges in cycles per token, drawn as thin lines.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    layers = sorted(table["layer"].unique())
    colours = [_viridis(i / max(1, len(layers) - 1)) for i in range(len(layers))]
    for edge in edges:
        ax.axvline(edge, color=INK, lw=0.5, ls=(0, (1, 2)))
    for layer, colour in zip(layers, colours, strict=True):
        part = table[table["layer"] == layer].sort_values("frequency")
        ax.plot(part["frequency"], part["value"], color=colour, lw=0.9, marker="o" if len(layers) == 1 else None, ms=2)
    ax.set_xlim(-0.01, 0.7172)
    ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    ax.set_xlabel("spatial frequency, cycles per token")
    ax.set_ylabel(axis_label(measure))
    ax.grid(axis="y")
    if stride:
        pixels = float(stride)
        top = ax.secondary_xaxis("top", functions=(lambda f: np.asarray(f) / pixels, lambda f: np.asarray(f) * pixels))
        top.set_xlabel(f"cycles per input pixel (stride {stride:g})")
    if len(layers) > 1:
        norm = BoundaryNorm(np.arange(len(layers) + 1) - 0.5, len(layers))
        bar = ax.figure.colorbar(ScalarMappable(norm, ListedColormap(colours)), ax=ax, fraction=0.05, pad=0.03)
        step = max(1, -(-len(layers) // 8))
        bar.set_ticks(list(range(0, len(layers), step)), labels=[str(v) for v in layers[::step]])
        bar.ax.tick_params(length=0)
        bar.minorticks_off()
        bar.set_label("layer (0 = first block)")
        bar.outline.set_visible(False)
    return ax


def controls(table: pd.DataFrame, ax: Axes, measure: str) -> Axes:
    """Every condition as a row: low and high band with intervals, over all layers.

    Args:
        table: condition (in drawing order), band (`low`, `high`), mean, ci_low, ci_high, n.
    """
    names = list(dict.fromkeys(table["condition"]))
    place = {name: len(names) - 1 - i for i, name in enumerate(names)}
    for band, colour, marker, move in (("low", BLUE, "o", 0.16), ("high", ORANGE, "s", -0.16)):
        part = table[table["band"] == band]
        y = part["condition"].map(place).astype(float) + move  # a band may have no row at all
        errors = _errors(part, "mean", "ci_low", "ci_high")
        ax.errorbar(part["mean"], y, xerr=errors, color=colour, fmt=marker, ms=3, elinewidth=0.9, capsize=1.5,
                    label=f"{band} band")  # fmt: skip
    sizes = table.groupby("condition")["n"].max()
    ax.set_yticks([place[n] for n in names], [f"{n} (n={int(sizes[n])})" for n in names])
    for i in range(1, len(names), 2):
        ax.axhspan(i - 0.5, i + 0.5, color=GRID, alpha=0.25, lw=0)
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.set_xlim(left=min(0.0, ax.get_xlim()[0]))
    ax.set_xlabel(axis_label(measure))
    ax.grid(axis="x")
    _legend_below(ax, 2)
    return ax


def equivalent_shift(table: pd.DataFrame, ax: Axes) -> Axes:
    """The misregistration, in input pixels, that alone would cost as much as the modality does.

    Args:
        table: layer (int), band (`low`, `high`), and as text in input pixels shift_px, ci_low, ci_high: `3.1`, `> 8`,
            or empty. Beyond the largest tested shift there is a triangle at that shift, not a point.
    """
    beyond_any = False
    for band, colour, marker, move in (("low", BLUE, "o", -0.1), ("high", ORANGE, "s", 0.1)):
        for _, row in table[table["band"] == band].iterrows():
            x = row["layer"] + move
            value, beyond = parse_shift(row["shift_px"])
            low, high = (parse_shift(row[end])[0] for end in ("ci_low", "ci_high"))
            if low is not None and high is not None:
                ax.plot([x, x], [low, high], color=colour, lw=0.9, marker="_", ms=3)
            if value is not None:
                ax.plot(x, value, color=colour, marker="^" if beyond else marker, mfc=PAPER if beyond else colour,
                        ls="none", ms=4.5 if beyond else None)  # fmt: skip
            beyond_any |= beyond
        ax.plot([], [], color=colour, marker=marker, ls="none", label=f"{band} band")
    if beyond_any:
        ax.plot([], [], color=GREY, marker="^", mfc=PAPER, ls="none", ms=4.5, label="beyond the largest shift")
    ax.set_ylim(0, ax.get_ylim()[1] * 1.05)
    ax.set_ylabel("equivalent shift,\ninput pixels")
    _layer_axis(ax, table["layer"])
    _legend_below(ax, 3)
    return ax


def convergence(table: pd.DataFrame, ax: Axes, measure: str) -> Axes:
    """Width of the 95 % interval against the number of pairs, log axes.

    Args:
        table: band (`low`, `high`), n, groups, width (in the measure's unit).
    """
    for band, colour, marker in (("low", BLUE, "o"), ("high", ORANGE, "s")):
        part = table[(table["band"] == band) & (table["width"] > 0)].sort_values("n")
        ax.plot(part["n"], part["width"], color=colour, marker=marker, label=f"{band} band")
    ax.set_xscale("log")
    ax.set_yscale("log")
    sizes = table.drop_duplicates("n").sort_values("n")
    ax.set_xticks(sizes["n"], [f"{int(n)}\n{int(g)}" for n, g in zip(sizes["n"], sizes["groups"], strict=True)])
    ax.set_xticks([], minor=True)
    widths = table["width"][table["width"] > 0]
    steps = [m * 10.0**e for e in range(-9, 7) for m in (1, 2, 5)]
    ticks = [t for t in steps if widths.min() / 2.5 <= t <= widths.max() * 2.5]
    ax.set_ylim(ticks[0], ticks[-1])
    ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
    ax.set_yticks([], minor=True)
    ax.set_xlabel("pairs (second line: groups)")
    ax.set_ylabel(f"95 % interval, width\n(in units of {measure})")
    ax.grid()
    _legend_below(ax, 2)
    return ax


def parse_shift(words: Any) -> tuple[float | None, bool]:
    """Value of a `shift_*_px` cell, and whether it is only a lower bound.

    Example:
        >>> parse_shift("3.1"), parse_shift("> 8"), parse_shift(float("nan")), parse_shift("")
        ((3.1, False), (8.0, True), (None, False), (None, False))
    """
    found = re.search(r"[-+.\de]*\d", words) if isinstance(words, str) else None
    return (float(found.group()), words.lstrip().startswith(">")) if found else (None, False)


def _band_tick(words: str) -> str:
    """`low [0, 0.125)` on three lines, narrow enough for six bands."""
    return re.sub(r" \[(.+), (.+)\)$", r"\n\1 to\n\2", words)


def _with_interval(
    ax: Axes, part: pd.DataFrame, middle: str, low: str, high: str, colour: str, marker: str, label: str
) -> None:
    part = part.sort_values("layer")
    ax.errorbar(part["layer"], part[middle], yerr=_errors(part, middle, low, high), color=colour, marker=marker,
                elinewidth=0.9, capsize=1.5, label=label)  # fmt: skip


def _errors(part: pd.DataFrame, middle: str, low: str, high: str) -> np.ndarray:
    """(2, n) distances to the interval's ends; 0 where there is no interval or the mean lies outside (BCa may)."""
    ends = np.stack([part[middle] - part[low], part[high] - part[middle]])
    return np.clip(np.nan_to_num(ends.astype(float)), 0, None)


def _layer_axis(ax: Axes, layers: Iterable[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    numbers = sorted({int(layer) for layer in layers})
    if len(numbers) <= 12 and (len(numbers) < 2 or min(np.diff(numbers)) * 24 >= numbers[-1] - numbers[0]):
        ax.set_xticks(numbers)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.set_xlim(numbers[0] - 0.6, numbers[-1] + 0.6)
    ax.set_xlabel("layer (0 = first block)")
    ax.grid(axis="y")


def _legend_below(ax: Axes, columns: int) -> None:
    ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=columns, columnspacing=1.2,
                     handlelength=1.8)  # fmt: skip


def _viridis(position: float) -> tuple[float, float, float, float]:
    """Viridis without its ends, which vanish on a black or on a white page."""
    from matplotlib import colormaps

    return tuple(float(v) for v in colormaps["viridis"](0.22 + 0.7 * position))  # type: ignore[return-value]
