"""Finished distillations -> results/distilled: what held-out pairs say, the terms by band, the shares of the gradient.

    python study/distilled.py runs/vit-to-vit/distil/freqkd-0 runs/vit-to-vit/distil/mse-0 ...

Rows of runs that are not named stay.
`heldout.csv`  teacher(RGB) against student(IR) before and after, mean over taps; and after against the arm `mse`
`terms.csv`    the loss by step and band, summed over taps, as the loss adds it up (its weights included), first seed
`shares.csv`   each tap's and band's share of the gradient at the student's features, where a run measured it
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from outputs import RESULTS, main, merge_rows, merge_table, started, write_manifest

from freqkd_analysis import comparison, provenance
from freqkd_analysis.errors import RunError
from freqkd_train.heldout import told as heldout_rows


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a finished distillation. Raises: RunError when there is none, or the run did not end."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "heldout" not in content or "outcome" not in content:
        raise RunError(f"{folder} holds no finished distillation; expected the --out folder of `freqkd-train distill`.")
    return dict(content)


def arm(folder: Path, made: dict[str, Any]) -> dict[str, Any]:
    """Names of a run in the tables, from its folder STUDY/distil/ARM-SEED.

    Example:
        >>> network = {"name": "vit", "trained": True}
        >>> arm(Path("runs/a-to-b/distil/mse_high-2"), {"teacher": network, "student": network})["run"]
        'a-to-b/mse_high-2'
    """
    study, (name, _, seed) = folder.parent.parent.name, folder.name.rpartition("-")
    trained = "" if made["student"]["trained"] else ", random start"
    return {"run": f"{study}/{folder.name}", "study": study, "arm": name, "seed": int(seed),
            "teacher": made["teacher"]["name"], "student": made["student"]["name"] + trained}  # fmt: skip


def to_mse(folder: Path) -> dict[tuple[str, str], dict[str, float]]:
    """(measure, band) -> how much further from the teacher an arm left the same held-out pairs than `mse` did, with the
    interval over groups; below 0 is closer. Empty where no `mse` of the same study and seed is there."""
    other = folder.with_name(f"mse-{folder.name.rpartition('-')[2]}")
    if folder == other or not (other / "heldout").is_dir():
        return {}
    table = comparison.compare(folder / "heldout" / "after", other / "heldout" / "after")
    rows = heldout_rows(table.rename(columns={"a": "after", "b": "before"}))
    return {(row["measure"], row["band"]): {"to_mse": row["change"], "to_mse_low": row["ci_low"],
                                            "to_mse_high": row["ci_high"]} for row in rows}  # fmt: skip


def command(name: str, made: dict[str, Any]) -> list[str]:
    """The words of a run, its folder by `name`; the analysis that its weights came from by its name in results/."""
    words = [str(word) for word in made["command"]]
    words[words.index("--out") + 1] = name
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
    for folder in sorted(Path(folder).absolute() for folder in folders):
        made = read(folder)
        told = arm(folder, made)
        gaps = to_mse(folder)
        heldout += [told | row | gaps.get((row["measure"], row["band"]), {}) for row in made["heldout"]]
        if told["seed"] == 0:  # the curves of other seeds look the same and are many
            more = learned(folder, told["run"])
            terms += more[0]
            shares += more[1]
        arms.append(told | {
            "command": command(f"runs/{told['study']}/distil/{folder.name}", made), "seconds": made["seconds"],
            "commit": made["commit"], "steps": made["outcome"].get("steps"),
            "epochs": made["config"]["training"]["epochs"],
            "sha256": {role: made[role]["sha256"] for role in ("teacher", "student")},
        })  # fmt: skip
    for rows, file in ((heldout, "heldout.csv"), (terms, "terms.csv"), (shares, "shares.csv")):
        if rows:
            merge_table(pd.DataFrame(rows), out / file, "run")
    arms = merge_rows(arms, out, "arms", "run")
    write_manifest({
        "schema": 1, "data": made["data"], "network": {role: made[role] for role in ("teacher", "student")} | {
            "note": "of the last arm; `arms` names each one's"},
        "n": made["data"]["held"], "command": started("distilled.py", "runs/*/distil/*"),
        "seed": made["config"]["seed"], "seconds": math.fsum(float(one["seconds"]) for one in arms),
        "commit": provenance.commit(), "size": made["config"]["data"]["size"], "arms": arms,
    }, out)  # fmt: skip


if __name__ == "__main__":
    main(body, "python study/distilled.py RUN [RUN ...]")
