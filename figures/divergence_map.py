"""Where RGB and infrared features differ: layer by spatial frequency, each ring between none and unrelated scenes."""

from __future__ import annotations

import numpy as np
import pandas as pd
from common import RESULTS, publish
from matplotlib.axes import Axes

from freqkd_analysis import plots
from freqkd_analysis.runfolder import CEILINGS, read_run

run = read_run(RESULTS / "vit")
profile = pd.read_csv(RESULTS / "vit" / "profile.csv").set_index(["condition", "layer", "radius"])
own, ceiling = profile.loc[run.condition], profile.loc[CEILINGS[run.condition]]
table = own.assign(calibrated=own["value"] / ceiling["value"]).drop(columns="value").reset_index()


def draw(rows: pd.DataFrame, ax: Axes) -> None:
    layers = sorted(rows["layer"].unique())
    ends = np.append(rows.loc[rows["layer"] == layers[0], "f_lo"], rows["f_hi"].max())  # one grid in all layers
    wide = rows.pivot(index="layer", columns="radius", values="calibrated")
    mesh = ax.pcolormesh(ends, np.arange(len(layers) + 1) - 0.5, wide, cmap="viridis", vmax=1.0, rasterized=True)
    for edge in run.weights["bands"]["f_lo"][1:]:
        ax.axvline(edge, color=plots.PAPER, lw=0.8, ls=(0, (2, 2)))
    ax.invert_yaxis()
    ax.set_yticks(layers)
    ax.set_xlabel("spatial frequency, cycles per token (dashed: band edges)")
    ax.set_ylabel("layer (0 = first block)")
    bar = ax.figure.colorbar(mesh, ax=ax, fraction=0.06, pad=0.03, extend="max")
    bar.set_label("calibrated divergence\n(0 same, 1 unrelated scenes)")
    bar.outline.set_visible(False)


n, groups = run.get("data", "n"), run.get("data", "groups")
title = f"Divergence of RGB and infrared features, calibrated\nViT-S/14, n = {n} pairs in {groups} groups"
figure = publish("divergence_map", table, draw, title, 7.0)
