"""Finished downstream studies -> results/downstream: the methods of each on its test split, and how they were made.

    python study/downstream.py runs/vit-mfnetseg runs/lite0-flir ...

Rows of studies that are not named stay.
`methods.csv`  each study's compare.csv: method x metric, mean over seeds, differences to `none` and `mse` by group
`seeds.csv`    the figure of each seed by itself
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
from outputs import RESULTS, main, merge_rows, merge_table, started, write_manifest

from freqkd_analysis import provenance
from freqkd_analysis.errors import RunError

FIGURES = {"detect": ("ap50",), "segment": ("miou_8", "miou_9")}


def read(path: Path) -> dict[str, Any]:
    """A json file of a study. Raises: RunError when it is not there or cut."""
    return provenance.read_object(path, {}, "expected the --out folder of a finished `freqkd-train kaist` or the like.")


def seeds(folder: Path) -> list[dict[str, Any]]:
    """One row an evaluation and metric, percent."""
    rows = []
    for path in sorted(folder.glob("evaluate/*/metrics.json")):
        found = read(path)
        figures = found["figures"]["all"] if found["task"] == "segment" else found
        # Until segmentation was told in percent its files said `fraction`.
        scale = 100.0 if found.get("units") == "fraction" else 1.0
        rows += [{"study": folder.absolute().name, "method": found["method"], "seed": found["seed"], "metric": name,
                  "value": scale * figures[name]} for name in FIGURES[found["task"]]]  # fmt: skip
    return rows


def made(folder: Path) -> dict[str, Any]:
    """What all arms of a study share, from the fine-tuning of the first, and the time of all."""
    runs = [read(path) for path in sorted(folder.glob("finetune/*/manifest.json"))]
    if not runs:
        raise RunError(f"{folder} holds no finished fine-tuning; expected the --out folder of `freqkd-train kaist`.")
    head, test = runs[0], read(next(iter(sorted(folder.glob("evaluate/*/metrics.json")))))["card"]
    settings = head["config"]
    return {
        "study": folder.absolute().name, "command": max(runs, key=lambda run: str(run["started"]))["command"],
        "commit": head["commit"], "seconds": math.fsum(run["seconds"] for run in runs),
        "network": head["network"]["name"], "task": settings["task"], "head": settings["head"],
        "size": settings["data"]["size"], "epochs": settings["training"]["epochs"], "steps": head["steps"],
        "data": test["data_set"], "annotations": test["annotation_set"], "train": head["train"]["frames"],
        "test": test["frames"], "split": test["split"], "seeds": sorted({run["config"]["seed"] for run in runs}),
        "leak": {"distil": read(folder / "distil_leak.json"), "finetune": head["leak"]}, "students": students(runs),
    }  # fmt: skip


def students(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """How each student was distilled, by STUDY/ARM-SEED, where its folder is still there."""
    folders = {Path(run["config"].get("weights", "none")).parent for run in runs}
    found = {f"{folder.parent.parent.name}/{folder.name}": read(folder / "manifest.json") for folder in sorted(folders)
             if (folder / "manifest.json").is_file()}  # fmt: skip
    return {name: {"command": one["command"], "commit": one["commit"], "seconds": one["seconds"],
                   "steps": one["outcome"]["steps"], "data": one["data"]} for name, one in found.items()}  # fmt: skip


def body(folders: list[str], out: Path = RESULTS / "downstream") -> None:
    methods, single, studies = [], [], []
    for folder in sorted(map(Path, folders), key=lambda path: path.name):
        studies.append(made(folder))
        table = pd.read_csv(folder / "compare" / "compare.csv")
        table.insert(0, "study", folder.absolute().name)
        methods.append(table)
        single += seeds(folder)
    merge_table(pd.concat(methods, ignore_index=True), out / "methods.csv", "study")
    merge_table(pd.DataFrame(single), out / "seeds.csv", "study")
    studies = merge_rows(studies, out, "studies", "study")
    names = [one["study"] for one in studies]
    write_manifest({
        "schema": 1, "data": {one["data"]: {"test": one["test"]} for one in studies},
        "network": {one["network"]: {} for one in studies}, "n": sum(one["test"] for one in studies),
        "seed": studies[0]["seeds"][0], "seconds": math.fsum(one["seconds"] for one in studies),
        "command": started("downstream.py", *(f"runs/{name}" for name in names)), "commit": provenance.commit(),
        "studies": studies,
    }, out, [*names, *(name.partition("/")[0] for one in studies for name in one["students"])])  # fmt: skip


if __name__ == "__main__":
    main(body, "python study/downstream.py STUDY [STUDY ...]")
