"""What a shared map, a shift, noise or blur alone produce: high over low of every control."""

from __future__ import annotations

import pandas as pd
from common import RESULTS, publish, ratio_rows

from freqkd_analysis.runfolder import read_run, rows
from freqkd_analysis.schema import condition_order

WORDS = {
    "paired": "RGB and infrared", "mean_removed": "the same, mean map removed", "shuffled": "unrelated scenes",
    "mean_removed_shuffled": "unrelated, map removed", "grey": "RGB made grey", "inverted": "RGB inverted",
    "blur": "RGB blurred", "noise": "RGB with noise", "random": "random weights", "pixels": "bare pixels",
    "without_artefacts": "without artefact tokens",
}  # fmt: skip
NETWORKS = {"vit": "ViT-S/14", "lite0": "EfficientNet-Lite0"}

parts = []
for name, series in NETWORKS.items():
    run = read_run(RESULTS / name)
    part = rows(run.ratio, measure=run.measure, layer="all").dropna(subset="ratio")
    sizes = run.summary.groupby("condition")["n"].max()
    place = part["condition"].map(lambda c: WORDS.get(c, f"RGB moved by {c.partition(':')[2]} px"))
    row = place + part["condition"].map(lambda c, s=sizes: f" ({s[c]})")
    part = part.assign(row=row, series=series, low=part["ratio_ci_low"], high=part["ratio_ci_high"])
    parts.append(part[["condition", "row", "series", "ratio", "low", "high"]])
table = pd.concat(parts, ignore_index=True)
table = table.sort_values("condition", key=lambda c: c.map(condition_order), kind="stable")

title = "What else makes the high band diverge more, cosine\n(n pairs); mean over layers; bars 95 %"
label = "divergence, high / low band\n(no unit; log axis)"
figure = publish("controls", table, lambda t, ax: ratio_rows(t, ax, label), title, 9.5)
