"""What every figure script shares: where tables lie, where figures go, and how one is written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from freqkd_analysis import plots
from freqkd_analysis.figures import Drawing, render, write_drawn

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"


def publish(name: str, table: pd.DataFrame, draw: Callable[[pd.DataFrame, Axes], object], title: str,
            height_cm: float = 6.6) -> Figure:  # fmt: skip
    """NAME.pdf, .svg, .png and .csv in figures/out, or in the folder given on the command line; the figure itself."""
    drawn: list[Figure] = []

    def kept(rows: pd.DataFrame, ax: Axes) -> Axes:
        drawn.append(ax.figure)
        draw(rows, ax)
        return ax

    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "figures" / "out"
    write_drawn(out, render(name, Drawing(title, table, kept, height_cm, reading="")))
    with style.context(["default", plots.STYLE, {"pdf.fonttype": 42}]), matplotlib.rc_context():
        drawn[0].savefig(out / f"{name}.pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
    return drawn[0]


def panels(ax: Axes, layout: str, **shared: bool) -> list[Axes]:
    """Axes in the place of `ax`, one a letter of `layout` ("AB;CD" is two rows of two), in the letters' order."""
    figure = ax.figure
    ax.remove()
    made = figure.subplot_mosaic(layout, **shared)
    return [made[letter] for letter in sorted(made)]


def log_ticks(ax: Axes, axis: str) -> None:
    """Plain numbers on a log axis, `x` or `y`, more of them where it spans less; its limits stay."""
    low, high = getattr(ax, f"get_{axis}lim")()
    steps = (1, 1.2, 1.5, 2, 3, 5) if high < 5 * low else (1, 2, 5) if high < 200 * low else (1,)
    ticks = [t for t in (step * 10.0**e for e in range(-6, 5) for step in steps) if low <= t <= high]
    getattr(ax, f"set_{axis}ticks")(ticks, [f"{t:g}" for t in ticks])
    getattr(ax, f"set_{axis}ticks")([], minor=True)
    getattr(ax, f"set_{axis}lim")(low, high)


def ratio_rows(table: pd.DataFrame, ax: Axes, label: str) -> None:
    """High over low on a log axis, one line a `row`, one colour and marker a `series`; lines at 1 and at 2.4.

    Args:
        table: row and series (in order of appearance), ratio, low, high.
    """
    looks = ((plots.BLUE, "o"), (plots.ORANGE, "s"), (plots.GREEN, "D"))
    names, series = list(dict.fromkeys(table["row"])), list(dict.fromkeys(table["series"]))
    for number, one in enumerate(series):
        part, (colour, marker) = table[table["series"] == one], looks[number]
        y = [names.index(row) + 0.44 * ((number + 0.5) / len(series) - 0.5) for row in part["row"]]
        ends = np.nan_to_num([part["ratio"] - part["low"], part["high"] - part["ratio"]]).clip(min=0)
        ax.errorbar(part["ratio"], y, xerr=ends, fmt=marker, color=colour, ms=3, elinewidth=0.9, label=one)
    for value, dashes in ((1.0, "-"), (2.4, (0, (1, 1)))):
        ax.axvline(value, color=plots.INK, lw=0.7, ls=dashes, zorder=0)
    ax.annotate("paper: 2.4", (2.4, 1), xycoords=("data", "axes fraction"), xytext=(2, 1), size=6,
                textcoords="offset points", va="bottom")  # fmt: skip
    for i in range(1, len(names), 2):
        ax.axhspan(i - 0.5, i + 0.5, color=plots.GRID, alpha=0.25, lw=0)
    ax.set_xscale("log")
    log_ticks(ax, "x")
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel(label)
    ax.grid(axis="x")
    if len(series) > 1:
        ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=len(series))
