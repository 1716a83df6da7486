"""Masks of the release and of rings, and the energy that the release's rectangle loses from both bands."""

import numpy as np
import pandas as pd
from common import panels, publish
from matplotlib.axes import Axes

from freqkd_analysis import plots
from freqkd_analysis.bands import Bands, frequency

GRID, MASKS = (37, 46), {"released:0.5": "released loss", "paper": "its analysis", "split:0.5": "ring"}
SLOPES = {0: ("white maps", plots.BLUE, "o"), 2: ("energy as 1 / f²", plots.ORANGE, "s")}


def lost(side: int, slope: int) -> float:
    """Percent of energy in neither part of `released:0.5`, for maps of energy f^-slope (the mean as f = 1 / side)."""
    energy = np.maximum(frequency((side, side)), 1.0 / side) ** -float(slope)
    kept = (Bands.parse("released:0.5", (side, side)).weights ** 2).sum(axis=0)
    return float(100.0 - 100.0 * np.average(kept, weights=energy))


def draw(rows: pd.DataFrame, ax: Axes) -> None:
    *maps, below = panels(ax, "ABC;DDD")
    for (text, words), one in zip(MASKS.items(), maps, strict=True):
        weights = Bands.parse(text, GRID).weights
        low = np.fft.fftshift(np.where(weights.sum(axis=0) > 0, weights[0], np.nan))
        one.imshow(low, cmap="cividis", extent=(-0.5, 0.5, 0.5, -0.5), vmin=0, vmax=1)
        one.set(title=words, xlabel="cycles / token", xticks=(-0.5, 0, 0.5), yticks=())
    maps[0].set(ylabel="cycles / token", yticks=(-0.5, 0, 0.5))
    for slope, part in rows.groupby("slope"):
        words, colour, marker = SLOPES[slope]
        below.plot(part["side"], part["lost_percent"], color=colour, marker=marker, ms=2, label=words)
    below.set(xlabel="side of the grid, tokens", ylabel="energy in neither\nband, %", ylim=(0, None))
    below.legend()


losses = [(side, slope, lost(side, slope)) for slope in SLOPES for side in range(7, 65)]
table = pd.DataFrame(losses, columns=["side", "slope", "lost_percent"])
title = "Yellow: low band, blue: high, grey: half each, white: neither\n(37 x 46 tokens). Below: energy the loss lacks"
figure = publish("masks", table, draw, title, 8.6)
