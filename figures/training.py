"""What a distillation learns by band: the terms of its loss by step, and each band's share of the gradient."""

import json

import pandas as pd
from common import RESULTS, log_ticks, panels, publish
from matplotlib.axes import Axes

from freqkd_analysis import plots

RUNS = {"vit-to-vit/freqkd-0": "released", "vit-to-vit/measured-0": "measured"}
LOOKS = {"low": (plots.BLUE, "o"), "mid": (plots.GREEN, "D"), "high": (plots.ORANGE, "s")}
SMOOTH = 9

terms, shares = (pd.read_csv(RESULTS / "distilled" / f"{name}.csv") for name in ("terms", "shares"))
shares = shares.groupby(["run", "step", "band"], sort=False)["share"].sum().reset_index()
table = pd.concat([terms[terms["run"].isin(RUNS)], shares[shares["run"].isin(RUNS)]], ignore_index=True)


def draw(rows: pd.DataFrame, ax: Axes) -> None:
    axes = panels(ax, "AB;CD", sharex=True)
    for column, (run, words) in enumerate(RUNS.items()):
        above, below = axes[column], axes[column + 2]
        for band, (colour, marker) in LOOKS.items():
            part = rows[(rows["run"] == run) & (rows["band"] == band)]
            curve, share = part.dropna(subset="term"), part.dropna(subset="share")
            middle = curve["term"].rolling(SMOOTH, center=True, min_periods=1).mean()
            above.plot(curve["step"], middle, color=colour)
            below.plot(share["step"], share["share"], color=colour, marker=marker, label=f"{band} band")
        above.set(title=f"loss: {words}", yscale="log")
        log_ticks(above, "y")
        below.set(xlabel="step", ylim=(0, 1))
    axes[0].set_ylabel("term of the loss,\nsum over taps (log)")
    axes[2].set_ylabel("share of the gradient\n(sums to 1)")
    axes[0].figure.legend(*axes[3].get_legend_handles_labels(), loc="outside lower center", ncols=3)


n = json.loads((RESULTS / "distilled" / "manifest.json").read_text(encoding="utf-8"))["data"]["train"]
title = f"Learning by band, ViT-S/14, one seed\nn = {n} training pairs; terms are means of {SMOOTH} steps"
figure = publish("training", table, draw, title, 8.6)
