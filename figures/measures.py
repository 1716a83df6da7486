"""Why the measure matters: high over low of the same features by six measures, and calibrated."""

from __future__ import annotations

import numpy as np
import pandas as pd
from common import RESULTS, publish, ratio_rows

from freqkd_analysis.divergence import DIVERGENCES
from freqkd_analysis.runfolder import read_run, rows

NETWORKS = {"vit": "ViT-S/14", "lite0": "EfficientNet-Lite0", "mnv2": "MobileNetV2"}
WANTED = [("paired", measure, "ratio", f"raw {measure}") for measure in DIVERGENCES] + [
    ("mean_removed", "cosine", "ratio", "cosine,\nmean map removed"),
    ("mean_removed", "cosine", "calibrated_ratio", "the same, calibrated"),
]  # fmt: skip

records = []
for name, series in NETWORKS.items():
    run = read_run(RESULTS / name)
    for condition, measure, column, row in WANTED:
        layers = rows(run.ratio, condition=condition, measure=measure)
        values = layers.loc[layers["layer"] != "all", column]
        records.append((row, series, np.exp(np.log(values).mean()), values.min(), values.max()))
table = pd.DataFrame(records, columns=["row", "series", "ratio", "low", "high"])

n, groups = run.get("data", "n"), run.get("data", "groups")
label = "divergence, high / low band\n(no unit; geometric mean; log axis)"
title = f"The same features by every measure, mean of layers\nn = {n} pairs in {groups} groups; bars: range of layers"
figure = publish("measures", table, lambda t, ax: ratio_rows(t, ax, label), title, 8.0)
