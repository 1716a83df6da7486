"""Finished analyses -> results/NAME: the rows that figures and tables need, small enough to be committed.

    python study/collect.py runs/vit runs/lite0 ...

Each results/NAME can be read as a run folder (`freqkd_analysis.runfolder.read_run`). Beside the run's own tables, cut
to the primary measure where other ones say nothing more, it holds `profile.csv`: divergence by layer and frequency ring
of the primary condition, of unrelated scenes, and of both before the mean map was removed.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from outputs import RESULTS, main, write_json, write_manifest, write_table

from freqkd_analysis.divergence import DIVERGENCES
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
        content["summarized"] = ["freqkd-analyze", "summarize", f"runs/{run.get('derived_from')}", "--floor", floor]
    return content


def body(folders: list[str]) -> None:
    for folder in folders:
        print(collect(Path(folder)))


if __name__ == "__main__":
    main(body, "python study/collect.py RUN [RUN ...]")
