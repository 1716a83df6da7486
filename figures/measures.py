"""Why the measure matters: high over low of the same features by six measures, and calibrated."""

from __future__ import annotations

import pandas as pd
from common import RESULTS, publish, ratio_rows

from freqkd_analysis.divergence import DIVERGENCES
from freqkd_analysis.runfolder import read_run, rows

NETWORKS = {"vit": "ViT-S/14", "lite0": "EfficientNet-Lite0", "mnv2": "MobileNetV2"}
COLUMNS = {"raw": ["ratio", "ratio_ci_low", "ratio_ci_high"],
           "calibrated": ["calibrated_ratio", "calibrated_ci_low", "calibrated_ci_high"]}  # fmt: skip
WANTED = [("paired", measure, "raw", f"raw {measure}") for measure in DIVERGENCES] + [
    ("mean_removed", "cosine", "raw", "cosine,\nmean map removed"), ("mean_removed", "cosine", "calibrated", "calibrated"),
]  # fmt: skip

parts = []
for name, series in NETWORKS.items():
    run = read_run(RESULTS / name)
    for condition, measure, kind, row in WANTED:
        part = rows(run.ratio, condition=condition, measure=measure, layer="all")[COLUMNS[kind]]
        parts.append(part.set_axis(["ratio", "low", "high"], axis=1).assign(series=series, row=row))
table = pd.concat(parts, ignore_index=True)

n, groups = run.get("data", "n"), run.get("data", "groups")
label = "divergence of high over low band (no unit; log axis; 95 %)"
title = f"The same features by every measure, mean over layers\nn = {n} pairs in {groups} groups"
figure = publish("measures", table, lambda t, ax: ratio_rows(t, ax, label), title, 8.0)
