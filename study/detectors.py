"""Published KAIST detections -> results/detectors: miss-rate curves and figures with intervals, never a detection.

    FREQKD_TEST_DATA=DATA python study/detectors.py ANNOTATIONS RESULTS [RESULTS ...]

`curves.csv`       miss rate at rates of false positives per image, Reasonable, all images
`figures.csv`      miss rate and AP50 of each detector with 95 % intervals over videos
`differences.csv`  the same of every two detectors, later minus earlier
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from outputs import RESULTS, main, started, write_manifest, write_table

from freqkd_analysis import provenance, statistics
from freqkd_analysis.errors import FreqkdError
from freqkd_train import score
from freqkd_train.metrics import kaist
from freqkd_train.metrics.boxes import Truth
from freqkd_train.result_files import read_annotations, read_results

SETTING = "Reasonable"
GRID = 10.0 ** np.linspace(-3, 1, 161)
"""False positives per image at which a curve is kept: 40 a decade, the nine points of the average among them."""


def curve(truth: Truth, run: score.Run) -> pd.DataFrame:
    """detector, fppi, miss_rate: 1 - recall at the last score with no more than `fppi` false positives an image."""
    found = kaist.curves(truth, run.detections, [SETTING], person=score.person_of(truth))[SETTING, "all"]
    at = np.searchsorted(found.fppi, GRID, side="right") - 1
    recall = np.where(at < 0, 0.0, found.recall[np.maximum(at, 0)])
    return pd.DataFrame({"detector": run.name, "fppi": GRID, "miss_rate": 1.0 - recall})


def rows(comparison: dict[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Figures of each detector and differences of every two, in percent."""
    names, ends = comparison["runs"], ("value", "low", "high", "method")
    figures, gaps = [], []
    for figure, got in comparison["figures"].items():
        for name, one in zip(names, got["runs"], strict=True):
            figures.append({"figure": figure, "detector": name, **{k: one[k] for k in ends}, "groups": got["groups"]})
        for one in got["differences"]:
            earlier, later = (names[i] for i in one["runs"])
            gaps.append({"figure": figure, "later": later, "earlier": earlier, **{k: one[k] for k in ends}})
    return pd.DataFrame(figures), pd.DataFrame(gaps)


def body(words: list[str], out: Path = RESULTS / "detectors") -> None:
    if len(words) < 3:
        raise FreqkdError("expected annotations and at least two files of detections to compare.")
    begun = time.monotonic()
    read = read_annotations(Path(words[0]))
    if not read.kaist:
        raise FreqkdError(f"expected KAIST annotations, got {read.name}.")
    names = [Path(word).name.removesuffix(".gz").removesuffix(".txt").removesuffix("_result") for word in words[1:]]
    runs = [score.Run(name, read_results(Path(word), read)) for name, word in zip(names, words[1:], strict=True)]
    figures, gaps = rows(score.compare(read.truth, runs, "kaist"))
    write_table(pd.concat([curve(read.truth, run) for run in runs], ignore_index=True), out / "curves.csv")
    write_table(figures, out / "figures.csv")
    write_table(gaps, out / "differences.csv")
    digests = {name: provenance.sha256_file(Path(word)) for name, word in zip(names, words[1:], strict=True)}
    write_manifest({
        "schema": 1, "data": score.card_of(read).as_dict(), "network": {n: {"sha256": d} for n, d in digests.items()},
        "n": len(read.truth.names), "command": started("detectors.py", *words), "seed": 0,
        "seconds": round(time.monotonic() - begun, 1), "commit": provenance.commit(),
        "statistics": {"draws": statistics.DRAWS, "level": statistics.LEVEL, "unit": "video"},
    }, out)  # fmt: skip


if __name__ == "__main__":
    main(body, "python study/detectors.py ANNOTATIONS RESULTS RESULTS [RESULTS ...]")
