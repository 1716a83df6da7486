"""Finished distillations -> results/distilled: what held-out pairs say, the terms by band, the shares of the gradient.

    python study/distilled.py runs/distilled/vit-released runs/distilled/vit-uniform ...

The name of a run is STUDY-LOSS, or STUDY-LOSS-sSEED for another seed.

`heldout.csv`  teacher(RGB) against student(IR) before and after, mean over taps, from each run's manifest
`terms.csv`    the loss by step and band, summed over taps, as the loss adds it up (its weights included), first seed
`shares.csv`   each tap's and band's share of the gradient at the student's features, where a run measured it
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from outputs import RESULTS, main, started, write_manifest, write_table

from freqkd_analysis import provenance
from freqkd_analysis.errors import RunError


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a finished distillation. Raises: RunError when there is none, or the run did not end."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "heldout" not in content or "outcome" not in content:
        raise RunError(f"{folder} holds no finished distillation; expected the --out folder of `freqkd-train distill`.")
    return dict(content)


def arm(name: str, made: dict[str, Any]) -> dict[str, Any]:
    """Names of a run in the tables. A run is called STUDY-LOSS, or STUDY-LOSS-sSEED."""
    trained = "" if made["student"]["trained"] else ", random start"
    return {
        "run": name, "study": name.split("-")[0], "teacher": made["teacher"]["name"],
        "student": made["student"]["name"] + trained, "loss": loss(made["config"]), "seed": made["config"]["seed"],
    }  # fmt: skip


def loss(config: dict[str, Any]) -> str:
    """The preset of a loss with what was changed of it.

    Example:
        >>> loss({"data": {"pairing": "paired"}, "loss": {"name": "released", "forms": ["mse", "mse"]}})
        'released, high band mse'
    """
    chosen, pairing = config["loss"], config["data"]["pairing"]
    words = [str(chosen["name"])]
    if chosen.get("match_gradient"):
        words[0] = "mse at matched gradient"
    if chosen.get("forms"):
        words.append(f"high band {chosen['forms'][1]}")
    if chosen.get("bands", "").startswith("released:"):
        words.append(f"cut-off {chosen['bands'].partition(':')[2]}")
    if chosen["name"] == "measured" and chosen.get("rule", "shared") != "shared":
        words.append(f"rule {chosen['rule']}")
    return ", ".join([*words, *([] if pairing == "paired" else [f"{pairing} pairs"])])


def command(made: dict[str, Any]) -> list[str]:
    """The words of a run; the analysis that its weights came from under the name that it has in results/, if any."""
    words = [str(word) for word in made["command"]]
    source = Path(made["config"]["loss"]["weights_from"] or "none")
    if (source / "manifest.json").is_file():
        started_at = json.loads((source / "manifest.json").read_text(encoding="utf-8"))["started"]
        for path in sorted(RESULTS.glob("*/manifest.json")):
            if json.loads(path.read_text(encoding="utf-8")).get("started") == started_at:
                return [f"runs/{path.parent.name}" if word == str(source) else word for word in words]
    return words


def lines(folder: Path) -> Iterator[dict[str, Any]]:
    """What metrics.jsonl logged, in order; a run of no step has none."""
    path = folder / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        yield json.loads(line)


def split(name: str) -> tuple[str, str]:
    """Tap and band of a term's name; a loss without bands has one, `whole`.

    Example:
        >>> split("blocks.2/low"), split("blocks.2")
        (('blocks.2', 'low'), ('blocks.2', 'whole'))
    """
    tap, _, band = name.partition("/")
    return tap, band or "whole"


def learned(folder: Path, name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of terms.csv and of shares.csv of one run."""
    terms: list[dict[str, Any]] = []
    shares: list[dict[str, Any]] = []
    for line in lines(folder):
        bands: dict[str, list[float]] = {}
        for term, value in line.get("terms", {}).items():
            bands.setdefault(split(term)[1], []).append(value)
        terms += [{"run": name, "step": line["step"], "band": b, "term": math.fsum(v)} for b, v in bands.items()]
        for term, share in line.get("shares", {}).items():
            tap, band = split(term)
            shares.append({"run": name, "step": line["step"], "tap": tap, "band": band, "share": share})
    return terms, shares


def body(folders: list[str], out: Path = RESULTS / "distilled") -> None:
    heldout, terms, shares, arms = [], [], [], []
    for folder in sorted(map(Path, folders), key=lambda path: path.name):
        made, name = read(folder), folder.absolute().name
        heldout += [arm(name, made) | row for row in made["heldout"]]
        if not re.search(r"-s\d+$", name):  # the curves of other seeds look the same and are many
            more = learned(folder, name)
            terms += more[0]
            shares += more[1]
        arms.append(arm(name, made) | {
            "command": command(made), "seconds": made["seconds"],
            "commit": made["commit"], "steps": made["outcome"].get("steps"),
            "epochs": made["config"]["training"]["epochs"],
            "sha256": {role: made[role]["sha256"] for role in ("teacher", "student")},
        })  # fmt: skip
    for rows, file in ((heldout, "heldout.csv"), (terms, "terms.csv"), (shares, "shares.csv")):
        write_table(pd.DataFrame(rows), out / file)
    names = [one["run"] for one in arms]
    write_manifest({
        "schema": 1, "data": made["data"], "network": {role: made[role] for role in ("teacher", "student")} | {
            "note": "of the last arm; `arms` names each one's"},
        "n": made["data"]["held"], "command": started("distilled.py", *(f"runs/{name}" for name in names)),
        "seed": made["config"]["seed"], "seconds": math.fsum(float(one["seconds"]) for one in arms),
        "commit": provenance.commit(), "size": made["config"]["data"]["size"], "arms": arms,
    }, out, names)  # fmt: skip


if __name__ == "__main__":
    main(body, "python study/distilled.py RUN [RUN ...]")
