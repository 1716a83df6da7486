"""Low and high band by depth, between what a shift or noise alone makes and what unrelated scenes make."""

from __future__ import annotations

import pandas as pd
from common import RESULTS, publish
from matplotlib.axes import Axes

from freqkd_analysis import plots
from freqkd_analysis.figures import FIGURES
from freqkd_analysis.runfolder import read_run

run = read_run(RESULTS / "vit")
drawing = FIGURES["low_high_by_layer"](run)
kinds = {"registration": f"{run.get('data', 'registration_px'):.1f} px shift", "mean_removed_noise": "noise"}
floors = pd.read_csv(RESULTS / "vit" / "floors.csv")
floors = floors[floors["condition"].isin(kinds) & floors["band"].isin(run.ends)]
floors = floors.assign(series=floors["band"] + " floor: " + floors["condition"].map(kinds))
table = pd.concat([drawing.table, floors], ignore_index=True)


def draw(rows: pd.DataFrame, ax: Axes) -> None:
    for name, part in rows[rows["series"].str.contains("floor")].groupby("series", sort=False):
        colour = plots.BLUE if name.startswith(run.ends[0]) else plots.ORANGE
        dotted = (0, (1, 1.5)) if name.endswith("noise") else (0, (4, 1, 1, 1))
        ax.plot(part["layer"], part["mean"], color=colour, ls=dotted, lw=0.9, label=name.replace("floor: ", "band, "))
    plots.low_high_by_layer(rows, ax, run.measure)


n, groups, few = run.get("data", "n"), run.get("data", "groups"), int(floors["n"].max())
title = f"Low and high band by depth, mean map removed; ViT-S/14\nn = {n} pairs in {groups} groups, floors {few}"
figure = publish("low_high_by_depth", table, draw, f"{title}; bars 95 %", 8.6)
