"""Miss rate of published KAIST detectors against false positives, with 95 % intervals over videos."""

from __future__ import annotations

import json

import pandas as pd
from common import RESULTS, publish

from freqkd_train.score_figures import miss_rate_curves

folder = RESULTS / "detectors"
curves, figures = (pd.read_csv(folder / f"{name}.csv") for name in ("curves", "figures"))
rates = figures[figures["figure"] == "mr_all"].sort_values("value").set_index("detector")
words = {name: f"{name} {row.value:.1f} % [{row.low:.1f}, {row.high:.1f}]" for name, row in rates.iterrows()}
order = curves["detector"].map(list(words).index)
table = curves.assign(run=curves["detector"].map(words), order=order).sort_values(["order", "fppi"])

n = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["n"]
videos = int(rates["groups"].max())
title = f"KAIST test, Reasonable, n = {n} images in {videos} videos\n[95 % over videos]; lower is better"
figure = publish("detectors", table, miss_rate_curves, title, 8.0)
