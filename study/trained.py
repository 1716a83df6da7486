"""Tables of RESULTS.md on distillation: held-out features, downstream studies, and how they were made."""

from __future__ import annotations

import json
import math
import shlex
from typing import Any

import pandas as pd
from cells import commit, markdown, options
from outputs import RESULTS

HELD = ("low", "high")
FEWEST = 10
"""Blocks of frames below which an interval is rough: marked by a star."""
RUN_ALONE = ("--out ", "--seed ", "--cache-gb ", "--device ")
"""Options that say where a run lies, which seed it has, or how the machine is used."""


def heldout() -> str:
    """Held-out pairs before and after each loss, calibrated cosine, of the first seed."""
    table = pd.read_csv(RESULTS / "distilled" / "heldout.csv", keep_default_na=False)
    table = table[table["measure"] == "calibrated cosine"]
    rows = []
    for (study, name), some in table.groupby(["study", "arm"], sort=False):
        row = [f"`{study}`", f"`{name}`"]
        for band in HELD:
            seeds = some[some["band"] == band].sort_values("seed").to_dict("records")
            row += [f"{seeds[0]['before']:.3f}, {change(seeds[0])}", gap(seeds[0])]
        rows.append(row)
    heads = [text for band in HELD for text in (f"{band} band: before, change", f"{band}: to `mse`")]
    return markdown(["study", "arm", *heads], rows)


def gap(row: dict[str, Any]) -> str:
    """The difference to `mse` with its interval; bold where the interval leaves out 0."""
    if row["to_mse"] == "":
        return ""
    value, low, high = (float(row[name]) for name in ("to_mse", "to_mse_low", "to_mse_high"))
    text = f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def change(row: dict[str, Any]) -> str:
    return f"{row['change']:+.3f} [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]"


def studies() -> dict[str, tuple[list[str], list[dict[str, Any]]]]:
    """Study -> the pieces of a command that all its arms share, and the arms with the pieces of their own."""
    made = json.loads((RESULTS / "distilled" / "manifest.json").read_text(encoding="utf-8"))["arms"]
    found: dict[str, tuple[list[str], list[dict[str, Any]]]] = {}
    for name in dict.fromkeys(one["study"] for one in made):
        arms_ = [
            one | {"pieces": [p for p in options(one["command"]) if not p.startswith(RUN_ALONE)]}
            for one in made
            if one["study"] == name
        ]
        shared = [piece for piece in arms_[0]["pieces"] if all(piece in one["pieces"] for one in arms_)]
        found[name] = shared, arms_
    return found


def shared() -> str:
    """What all arms of a study have in common."""
    rows = [[f"`{name}`", f"`{' '.join(pieces)}`"] for name, (pieces, _) in studies().items()]
    return markdown(["study", "command"], rows)


def arms() -> str:
    """What each arm adds to its study's command."""
    rows = []
    for study, (pieces, runs) in studies().items():
        for name in dict.fromkeys(one["arm"] for one in runs):
            some = [one for one in runs if one["arm"] == name]
            own = [piece for piece in some[0]["pieces"] if piece not in pieces]
            minutes = math.fsum(one["seconds"] for one in some) / 60 / len(some)
            commits = ", ".join(dict.fromkeys(commit(one["commit"]) for one in some))
            rows.append([f"`{study}`", f"`{name}`", f"`{' '.join(own)}`" if own else "", some[0]["steps"],
                         ", ".join(str(one["seed"]) for one in some), f"{minutes:.1f}", commits])  # fmt: skip
    return markdown(["study", "arm", "options of its own", "steps", "seeds", "minutes each", "commit"], rows)


def downstream() -> str:
    """Arms on the images that each downstream study judges by; `miou_9`, with the background, stays in the csv."""
    table = pd.read_csv(RESULTS / "downstream" / "methods.csv")
    table = table[table["metric"] != "miou_9"]
    rows = []
    for row in table.to_dict("records"):
        gaps = [signed(row, f"to_{name}") if row["method"] != name else "" for name in ("none", "mse")]
        few = row["groups"] < FEWEST
        rows.append([f"`{row['study']}`", row["metric"], row["method"], row["seeds"], f"{row['groups']}{'*' * few}",
                     f"{row['value']:.2f} [{row['low']:.1f}, {row['high']:.1f}]",
                     "" if pd.isna(row["spread"]) else f"{row['spread']:.2f}", *gaps])  # fmt: skip
    head = ["study", "metric, %", "arm", "seeds", "blocks", "mean", "spread of seeds", "to none", "to mse"]
    return markdown(head, rows)


def signed(row: dict[str, Any], name: str) -> str:
    """A difference with its interval; bold where the interval leaves out 0."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    text = f"{row[name]:+.2f} [{low:+.1f}, {high:+.1f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def downstream_runs() -> str:
    """How each downstream study was made."""
    made = json.loads((RESULTS / "downstream" / "manifest.json").read_text(encoding="utf-8"))["studies"]
    rows = []
    for one in made:
        head, size = one["head"], "x".join(map(str, one["size"]))
        shared = one["leak"]["finetune"]["shared"]
        rows.append([f"`{one['study']}`", f"{one['data']}, {one['annotations']}, list {one['split']}",
                     f"{one['train']} / {one['test']}" + (f", {shared} shared or alike" if shared else ""),
                     one["network"].split(".")[0], f"{head['kind']}, backbone {head['train']}", size, one["epochs"],
                     ", ".join(map(str, one["seeds"])), f"{one['seconds'] / 60:.0f}", commit(one["commit"]),
                     f"`{shlex.join(one['command'])}`"])  # fmt: skip
    head_ = ["study", "data, judged on", "frames trained on / judged on", "network", "head", "size", "epochs", "seeds",
             "minutes", "commit", "command"]  # fmt: skip
    return markdown(head_, rows)


def students() -> str:
    """How the students of downstream studies were distilled that stand in no other table: the first seed of each."""
    made = json.loads((RESULTS / "downstream" / "manifest.json").read_text(encoding="utf-8"))["studies"]
    told = {one["run"] for _, runs in studies().values() for one in runs}
    found = {name: row for one in made for name, row in one["students"].items()
             if name.endswith("-0") and name not in told}  # fmt: skip
    rows = [[*(f"`{part}`" for part in name.removesuffix("-0").split("/")), row["data"]["train"], row["steps"],
             f"{row['seconds'] / 60:.1f}", commit(row["commit"]), f"`{shlex.join(row['command'])}`"]
            for name, row in sorted(found.items())]  # fmt: skip
    return markdown(["study", "arm", "pairs", "steps", "minutes", "commit", "command"], rows)


def detectors() -> str:
    """Published KAIST detections scored here."""
    table = pd.read_csv(RESULTS / "detectors" / "figures.csv")
    names = list(dict.fromkeys(table["figure"]))
    rows = []
    for detector, some in table.groupby("detector", sort=False):
        cells = {r["figure"]: f"{r['value']:.2f} [{r['low']:.1f}, {r['high']:.1f}]" for r in some.to_dict("records")}
        rows.append([detector, *(cells[name] for name in names)])
    return markdown(["detector", *names], rows)
