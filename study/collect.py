"""Finished analyses -> results/NAME: the rows that figures and tables need, small enough to be committed.

    python study/collect.py runs/vit runs/lite0 ...

Each results/NAME can be read as a run folder (`freqkd_analysis.runfolder.read_run`). Beside the run's own tables, cut
to the primary measure where other ones say nothing more, it holds
`profile.csv`  divergence by layer and frequency ring of pairs and of unrelated scenes, with and without the mean map
`floors.csv`   divergence by layer and band of a shift and of noise alone, as the verdict takes them (mean map removed)
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from outputs import RESULTS, main, write_json, write_manifest, write_table

from freqkd_analysis import calibration, schema, statistics
from freqkd_analysis.divergence import DIVERGENCES, band_table, cube
from freqkd_analysis.figures import FIGURES, Absent
from freqkd_analysis.runfolder import CEILINGS, Run, read_run
from freqkd_analysis.schema import PRIMARY_CONDITIONS, PRIMARY_MEASURE

WHOLE = (*PRIMARY_CONDITIONS, "shuffled", CEILINGS[PRIMARY_CONDITIONS[0]])
"""Conditions whose rows are kept in every measure; of the controls, the primary measure alone."""
BESIDE = ("energy_rgb", "modes")
"""What a raw `mse` must not be read without."""


def collect(folder: Path, out: Path = RESULTS) -> Path:
    """Write `out`/NAME from the run folder `folder` (NAME is the folder's own name) and return it.

    Raises: RunError when the folder is no finished run.
    """
    run, target = read_run(folder), out / folder.absolute().name
    again = bool(run.get("derived_from"))  # the same spectra told with another floor: the verdict is what is new
    write_table(_kept(run.summary, again), target / "summary.csv")
    write_table(_kept(run.ratio, again), target / "ratio.csv")
    if run.convergence is not None and not again:
        part = run.convergence[(run.convergence["measure"] == PRIMARY_MEASURE) & (run.convergence["layer"] == "all")]
        write_table(part, target / "convergence.csv")
    profile = _profile(run)
    if not profile.empty:
        write_table(profile, target / "profile.csv")
    floors = _floors(run) if not again else pd.DataFrame()
    if not floors.empty:
        write_table(floors, target / "floors.csv")
    write_json(run.verdict, target / "verdict.json")
    write_json(run.weights, target / "band_weights.json", runs=[target.name, str(run.get("derived_from"))])
    write_manifest(_manifest(run, target.name), target, runs=[target.name, str(run.get("derived_from"))])
    return target


def _kept(table: pd.DataFrame, again: bool) -> pd.DataFrame:
    primary = table["measure"] == PRIMARY_MEASURE
    if again:
        return table[primary & table["condition"].isin(WHOLE)]
    return table[primary | (table["condition"].isin(WHOLE) & table["measure"].isin([*DIVERGENCES, *BESIDE]))]


def _profile(run: Run) -> pd.DataFrame:
    """condition, layer, radius, f_lo, f_hi, frequency, modes, value; empty where the run kept no spectra."""
    parts = []
    for condition in WHOLE:
        try:
            drawing = FIGURES["radial_profile"](replace(run, verdict=run.verdict | {"condition": condition}))
        except Absent:
            continue
        if condition in set(run.ratio["condition"]):
            parts.append(drawing.table.assign(condition=condition))
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    return table[["condition", *table.columns.drop("condition")]] if parts else table


def _floors(run: Run) -> pd.DataFrame:
    """condition, layer, band, mean, n: `calibration.map_free` controls; `registration` is the measured shift."""
    if not (run.folder / "spectra.parquet").is_file():
        return pd.DataFrame()
    stored = list(schema.parts(run.folder / "spectra.parquet"))
    names = [set(part["condition"]) for part in stored]
    kept = [p for p, has in zip(stored, names, strict=True) if has & {"noise", "mean_removed"} or _shifted(has)]
    free = calibration.map_free(pd.concat(kept, ignore_index=True)) if kept else pd.DataFrame()
    if free.empty:
        return free
    got = cube(band_table(free, run.get("taps"), str(run.get("config", "bands")), [PRIMARY_MEASURE]))
    means = {c: statistics.mean_over_pairs(got.of(c, PRIMARY_MEASURE)) for c in got.values}
    counts = {c: len(got.pairs[c]) for c in got.values}
    curve, px = calibration.shifts(list(means), "mean_removed_"), run.get("data", "registration_px")
    if curve and px is not None and px <= curve[-1][0]:
        pixels, stack = np.array([d for d, _ in curve]), np.stack([means[c].ravel() for _, c in curve])
        means["registration"] = calibration.divergence_at(px, pixels, stack).reshape(means[curve[0][1]].shape)
        counts["registration"] = counts[curve[0][1]]
    return pd.DataFrame([
        {"condition": c, "layer": layer, "band": band, "mean": mean[i, k], "n": counts[c]}
        for c, mean in means.items() for i, layer in enumerate(got.layers) for k, band in enumerate(got.bands)
    ])  # fmt: skip


def _shifted(names: set[str]) -> bool:
    return any(name.startswith("shifted:") for name in names)


def _manifest(run: Run, name: str) -> dict[str, Any]:
    """The run's own manifest with n, seed and, for tables told again with another floor, how that was done."""
    content = {key: value for key, value in run.manifest.items() if key != "artefacts"}
    words = [str(word) for word in content["command"]]
    if "--out" in words and not run.get("derived_from"):
        words[words.index("--out") + 1] = f"runs/{name}"  # a run may have been moved to a telling name since
    content["command"] = words
    content |= {"n": run.get("data", "n"), "seed": run.get("config", "seed")}
    if run.get("derived_from"):
        floor = run.verdict["floor"]
        content["summarized"] = ["freqkd-analyze", "summarize", f"runs/{run.get('derived_from')}", "--floor", floor,
                                 "--out", f"runs/{name}"]  # fmt: skip
    return content


def body(folders: list[str]) -> None:
    for folder in folders:
        print(collect(Path(folder)))


if __name__ == "__main__":
    main(body, "python study/collect.py RUN [RUN ...]")
