"""Does the answer hang on the pairs? Calibrated ratio by source, light and displacement of the pairs."""

from __future__ import annotations

import pandas as pd
from common import RESULTS, publish, ratio_rows

NETWORKS = {"vit": "ViT-S/14", "lite0": "EfficientNet-Lite0", "mnv2": "MobileNetV2"}
KINDS = ("all", "source", "light", "displacement")

read = pd.read_csv(RESULTS / "subsets" / "subsets.csv")
read = read[read["run"].isin(NETWORKS) & read["kind"].isin(KINDS) & read["calibrated_ratio"].notna()]
place = read["part"].str.replace(": ", ",\n") + " (" + read["n"].astype(str) + ", " + read["groups"].astype(str) + ")"
columns = {"calibrated_ratio": "ratio", "calibrated_ratio_ci_low": "low", "calibrated_ratio_ci_high": "high"}
table = read.assign(row=place, series=read["run"].map(NETWORKS)).rename(columns=columns)

label = "calibrated divergence, high / low band\n(no unit; log axis)"
title = "Calibrated ratio by part of the pairs (n pairs, groups)\nmean over layers; bars: 95 % over groups"
figure = publish("subsets", table, lambda t, ax: ratio_rows(t, ax, label), title, 9.0)
