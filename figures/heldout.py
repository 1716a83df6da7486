"""What each loss changes on held-out pairs: low and high band, below 0 is closer to the teacher's RGB features."""

from __future__ import annotations

import pandas as pd
from common import RESULTS, panels, publish
from matplotlib.axes import Axes

from freqkd_analysis import plots

STUDENTS = {"vit-to-vit": "ViT to itself", "vit-to-lite0": "ViT to Lite0", "lite2-to-lite0": "Lite2 to Lite0"}
BANDS = {"low": (plots.BLUE, "o", -0.14), "high": (plots.ORANGE, "s", 0.14)}

table = pd.read_csv(RESULTS / "distilled" / "heldout.csv")
table = table[(table["measure"] == "calibrated cosine") & table["band"].isin(BANDS)]
table = table[table["study"].isin(STUDENTS) & (table["arm"] != "none") & (table["seed"] == 0)]
table = table[~table["arm"].str.startswith("cutoff")]


def draw(rows: pd.DataFrame, ax: Axes) -> None:
    axes = panels(ax, "ABC", sharey=True)
    names = list(rows[rows["band"] == "low"].groupby("arm")["change"].mean().sort_values().index)
    for one, (study, words) in zip(axes, STUDENTS.items(), strict=True):
        for band, (colour, marker, move) in BANDS.items():
            part = rows[(rows["study"] == study) & (rows["band"] == band)]
            ends = [part["change"] - part["ci_low"], part["ci_high"] - part["change"]]
            y = [names.index(name) + move for name in part["arm"]]
            one.errorbar(part["change"], y, xerr=ends, fmt=marker, color=colour, ms=3, elinewidth=0.9, label=band)
        one.axvline(0, color=plots.INK, lw=0.6)
        one.set(title=words, yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5))
        one.set_yticklabels(names)
        one.grid(axis="x")
        one.set_xlabel("change")
    axes[0].figure.legend(*axes[0].get_legend_handles_labels(), title="band", loc="outside lower center", ncols=2)


n, groups = int(table["n"].max()), int(table["groups"].max())
title = f"Held-out change of calibrated cosine (below 0: closer)\n95 %, n = {n} pairs in {groups} groups, one seed"
figure = publish("heldout", table, draw, title, 9.5)
