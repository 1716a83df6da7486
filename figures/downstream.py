"""What distillation changes on the test split: difference of each arm to no distillation, by study, with intervals."""

import json

import pandas as pd
from common import RESULTS, panels, publish
from matplotlib.axes import Axes

from freqkd_analysis import plots

METRICS = {"miou_8": "mIoU of 8 classes, points\n(weak masks)", "ap50": "AP50, points"}
STUDIES = {
    "vit-mfnetseg": ("ViT, all pairs", plots.BLUE, "o"), "lite0-mfnetseg": ("Lite0, all pairs", plots.ORANGE, "s"),
    "lite0-flir": ("Lite0, FLIR", plots.GREEN, "D"), "lite0-mfnetbox": ("Lite0, MFNet boxes", plots.ORANGE, "s"),
    "lite0-hituav": ("Lite0, HIT-UAV", plots.BLUE, "^")}  # fmt: skip
ARMS = ("mse", "freqkd", "measured", "shuffled")

table = pd.read_csv(RESULTS / "downstream" / "methods.csv")
table = table[table["metric"].isin(METRICS) & table["study"].isin(STUDIES) & table["method"].isin(ARMS)]
table = table[["study", "metric", "method", "seeds", "to_none", "to_none_low", "to_none_high"]]


def draw(rows: pd.DataFrame, ax: Axes) -> None:
    for one, (metric, words) in zip(panels(ax, "AB", sharey=True), METRICS.items(), strict=True):
        part = rows[rows["metric"] == metric]
        for k, name in enumerate(named := [name for name in STUDIES if name in set(part["study"])]):
            own, (label, colour, marker) = part[part["study"] == name], STUDIES[name]
            y = [ARMS.index(arm) + 0.2 * (k - (len(named) - 1) / 2) for arm in own["method"]]
            ends = (own["to_none"] - own["to_none_low"], own["to_none_high"] - own["to_none"])
            one.errorbar(own["to_none"], y, xerr=ends, fmt=marker, color=colour, ms=3.5, elinewidth=0.9, label=label)
        one.axvline(0, color=plots.INK, lw=0.6)
        one.set(xlabel=words, yticks=range(len(ARMS)), yticklabels=ARMS, ylim=(len(ARMS) - 0.5, -0.5))
        one.grid(axis="x")
        one.legend(loc="upper center", bbox_to_anchor=(0.4, -0.32), fontsize="small")


studies = json.loads((RESULTS / "downstream" / "manifest.json").read_text(encoding="utf-8"))["studies"]
frames = [one["test"] for one in studies if one["study"] in STUDIES]
title = f"Difference to no distillation, mean of seeds, 95 %\nn = {min(frames)} to {max(frames)} test frames"
figure = publish("downstream", table, draw, title, 8.6)
