"""results/ -> the tables of RESULTS.md, each between two comments that name it. No number is typed by hand.

    python study/page.py RESULTS.md

A table stands between `<!-- table NAME -->` and `<!-- end NAME -->`; what is outside stays as it is.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from outputs import RESULTS, main

from freqkd_analysis import schema
from freqkd_analysis.conditions import NOISE_LEVELS
from freqkd_analysis.errors import FreqkdError, first, nearest
from freqkd_analysis.runfolder import Run, measured, number, read_run

FLOORS = {"noise": f"noise of {NOISE_LEVELS:g} grey levels", "shifted": "the measured displacement"}
SMALLEST = "smallest third"
HELD = ("low", "high")


def markdown(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table.

    Example:
        >>> print(markdown(["run", "n"], [["vit", 500]]))
        | run | n |
        |---|---|
        | vit | 500 |
    """
    head = list(head)
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    joined = ["|" + "|".join(line) + "|" if i == 1 else "| " + " | ".join(line) + " |" for i, line in enumerate(lines)]
    return "\n".join(joined)


def runs(derived: bool = False) -> dict[str, Run]:
    """The analyses in results/, by name; `derived` ones are told again from the spectra of another."""
    found = {path.parent.name: read_run(path.parent) for path in sorted(RESULTS.glob("*/verdict.json"))}
    return {name: run for name, run in found.items() if bool(run.get("derived_from")) == derived}


def all_row(run: Run, condition: str, measure: str) -> dict[str, Any]:
    """The row of ratio.csv that is the mean over layers; empty where the run lacks it."""
    table = run.ratio
    found = table[(table["condition"] == condition) & (table["measure"] == measure) & (table["layer"] == "all")]
    return dict(found.iloc[0]) if len(found) else {}


def told(row: dict[str, Any], name: str = "ratio", ends: str = "ratio_ci") -> str:
    return measured(row.get(name), row.get(f"{ends}_low"), row.get(f"{ends}_high"))


def network(run: Run) -> str:
    trained = "" if run.get("network", "trained") else ", random weights"
    size = "x".join(str(side) for side in run.get("data", "input"))
    preset = f", preset {run.get('config', 'preset')}" if run.get("config", "preset") else ""
    return f"{run.get('network', 'name').split('.')[0]}{trained}, {size}{preset}"


def ratios() -> str:
    """High over low by measure (raw), of unrelated scenes, and without the mean map, calibrated."""
    rows = []
    for name, run in runs().items():
        raw = [told(all_row(run, "paired", m)) for m in ("cosine", "nmse", "mse", "mse_per_mode")]
        asked = all_row(run, run.condition, run.measure)
        rows.append([f"`{name}`", network(run), *raw, told(all_row(run, "shuffled", run.measure)), told(asked),
                     f"**{told(asked, 'calibrated_ratio', 'calibrated_ci')}**", asked["verdict"]])  # fmt: skip
    head = ["run", "network, input", "cosine", "nmse", "mse", "mse per mode", "unrelated scenes, cosine",
            "cosine, mean map removed", "calibrated", "verdict"]  # fmt: skip
    return markdown(head, rows)


def account() -> str:
    """From the raw ratio to what is left of it, a column a network that has every control."""
    named = {name: run for name, run in runs().items() if (RESULTS / name / "floors.csv").is_file()}
    whole = {name: run for name, run in named.items() if (run.ratio["condition"] == "noise").any()}
    whole = {name: run for name, run in whole.items() if name in set(_subsets()["run"])}
    again = {str(run.verdict["floor"]).partition(":")[0] + str(run.get("derived_from")): run
             for run in runs(derived=True).values()}  # fmt: skip
    lines: dict[str, Callable[[str, Run], str]] = {
        f"raw {measure}": lambda _, run, m=measure: told(all_row(run, "paired", m))  # type: ignore[misc]
        for measure in ("cosine", "nmse", "mse", "mse_per_mode")
    }
    lines |= {
        "cosine of unrelated scenes: chance and the shared map": lambda _, run: told(
            all_row(run, "shuffled", "cosine")
        ),
        "unrelated scenes, mean map removed": lambda _, run: told(all_row(run, f"{run.condition}_shuffled", "cosine")),
        "cosine, mean map removed": lambda _, run: told(all_row(run, run.condition, "cosine")),
        "**calibrated against unrelated scenes**": lambda _, run: f"**{calibrated(run)}**",
        "the same, noise as the floor": lambda name, _: calibrated(again.get(f"noise{name}")),
        "the same, the measured displacement as the floor": lambda name, _: calibrated(again.get(f"shifted{name}")),
        "the same, straight line through the pairs at 0 px": lambda name, _: at_zero(name),
        "the same, third of the pairs with the smallest displacement": lambda name, _: part(name, SMALLEST),
        "the same, by day": lambda name, _: part(name, "day"),
        "the same, by night": lambda name, _: part(name, "night"),
        "verdict on `the high band diverges more`": lambda _, run: str(run.verdict["verdict"]),
    }
    rows = [[words, *(cell(name, run) for name, run in whole.items())] for words, cell in lines.items()]
    return markdown(["high / low, mean over layers", *(f"`{name}`" for name in whole)], rows)


def calibrated(run: Run | None) -> str:
    return told(all_row(run, run.condition, run.measure), "calibrated_ratio", "calibrated_ci") if run else "–"


def _subsets() -> pd.DataFrame:
    return pd.read_csv(RESULTS / "subsets" / "subsets.csv", keep_default_na=False, na_values=[""])


def part(name: str, start: str) -> str:
    table = _subsets()
    row = table[(table["run"] == name) & table["part"].str.startswith(start)].iloc[0]
    return told(dict(row), "calibrated_ratio", "calibrated_ratio_ci")


def at_zero(name: str) -> str:
    table = pd.read_csv(RESULTS / "subsets" / "registration.csv")
    row = table[(table["run"] == name) & table["quantity"].str.endswith("at 0 px")].iloc[0]
    return measured(row["value"], row["ci_low"], row["ci_high"])


def floors() -> str:
    """The calibrated ratio with other floors than 0."""
    rows = []
    for name, run in runs(derived=True).items():
        kind, _, amount = str(run.verdict["floor"]).partition(":")
        floor = FLOORS[kind] + (f", {float(amount):.1f} px" if amount else "")
        asked = all_row(run, run.condition, run.measure)
        rows.append([f"`{name}`", floor, told(asked, "calibrated_ratio", "calibrated_ci"), asked["verdict"],
                     f"`{shlex.join(run.get('summarized'))}`"])  # fmt: skip
    return markdown(["run", "floor", "calibrated", "verdict", "command"], rows)


def layers() -> str:
    """The smallest and the largest layer of each run, and in how many the interval lies above 1."""
    rows = []
    for name, run in runs().items():
        table = run.ratio[(run.ratio["condition"] == run.condition) & (run.ratio["measure"] == run.measure)]
        table = table[table["layer"] != "all"].dropna(subset="calibrated_ratio")
        ends = [table.loc[table["calibrated_ratio"].idxmin()], table.loc[table["calibrated_ratio"].idxmax()]]
        cells = [f"{told(dict(row), 'calibrated_ratio', 'calibrated_ci')} (layer {row['layer']})" for row in ends]
        above = int((table["calibrated_ci_low"] > 1).sum())
        rows.append([f"`{name}`", *cells, f"{above} of {len(run.get('taps'))}"])
    return markdown(["run", "smallest", "largest", "layers with the interval above 1"], rows)


def subsets() -> str:
    """The calibrated ratio on parts of the pairs, a column a run."""
    table = _subsets()
    names = list(dict.fromkeys(table["run"]))
    rows = []
    for (kind, part), some in table.groupby(["kind", "part"], sort=False):
        cells = {row["run"]: told(row, "calibrated_ratio", "calibrated_ratio_ci") for row in some.to_dict("records")}
        rows.append([kind, part, some["n"].iloc[0], some["groups"].iloc[0], *(cells[name] for name in names)])
    return markdown(["cut by", "part", "pairs", "groups", *(f"`{name}`" for name in names)], rows)


def displacement() -> str:
    """Regression on the displacement of the pairs."""
    table = pd.read_csv(RESULTS / "subsets" / "registration.csv")
    names = list(dict.fromkeys(table["quantity"]))
    rows = []
    for run, some in table.groupby("run", sort=False):
        cells = {row["quantity"]: measured(row["value"], row["ci_low"], row["ci_high"])
                 for row in some.to_dict("records")}  # fmt: skip
        rows.append([f"`{run}`", some["n"].iloc[0], some["groups"].iloc[0], *(cells[name] for name in names)])
    median = number(table["median_px"].iloc[0], 2)
    return markdown(["run", "pairs", "groups", *(n.replace("the median", f"{median} px") for n in names)], rows)


def commands() -> str:
    """How each analysis was made."""
    rows = []
    for name, run in runs().items():
        made = run.manifest
        rows.append([f"`{name}`", made["n"], run.get("data", "groups"), made["seed"], f"{made['seconds'] / 60:.0f}",
                     commit(made["commit"]), f"`{shlex.join(made['command'])}`"])  # fmt: skip
    return markdown(["run", "pairs", "groups", "seed", "minutes", "commit", "command"], rows)


def commit(text: str | None) -> str:
    """Ten digits of a commit, `+changes` where files differed from it."""
    head, _, changed = (text or "").partition("+")
    return f"`{head[:10]}`{'+' + changed if changed else ''}" if head else "not recorded"


def heldout() -> str:
    """Held-out pairs before and after each loss, calibrated cosine."""
    table = pd.read_csv(RESULTS / "distilled" / "heldout.csv", keep_default_na=False)
    table = table[table["measure"] == "calibrated cosine"]
    rows = []
    for _, some in table.groupby("run", sort=False):
        by = {row["band"]: row for row in some.to_dict("records")}
        head = some.iloc[0]
        cells = [f"{by[b]['before']:.3f} to {by[b]['after']:.3f}, {change(by[b])}" for b in HELD]
        rows.append([head["teacher"].split(".")[0], head["student"].split(".")[0], head["loss"], *cells])
    return markdown(["teacher", "student", "loss", *(f"{band} band" for band in HELD)], rows)


def change(row: dict[str, Any]) -> str:
    return f"{row['change']:+.3f} [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]"


def options(words: Iterable[str]) -> list[str]:
    """A command cut before every option, each piece one text.

    Example:
        >>> options(["tool", "run", "--size", "168", "--flag", "--out", "a b"])
        ['tool run', '--size 168', '--flag', "--out 'a b'"]
    """
    pieces: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            pieces.append([])
        pieces[-1].append(word)
    return [shlex.join(piece) for piece in pieces]


def studies() -> dict[str, tuple[list[str], list[dict[str, Any]]]]:
    """Study -> the pieces of a command that all its arms share, and the arms with the pieces of their own."""
    made = json.loads((RESULTS / "distilled" / "manifest.json").read_text(encoding="utf-8"))["arms"]
    found: dict[str, tuple[list[str], list[dict[str, Any]]]] = {}
    for name in dict.fromkeys(one["run"].rpartition("-")[0] for one in made):
        arms_ = [
            one | {"pieces": [p for p in options(one["command"]) if not p.startswith("--out ")]}
            for one in made
            if one["run"].rpartition("-")[0] == name
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
    for pieces, arms_ in studies().values():
        for one in arms_:
            own = [piece for piece in one["pieces"] if piece not in pieces]
            rows.append([f"`{one['run']}`", f"`{' '.join(own)}`" if own else "", one["steps"], one["seed"],
                         f"{one['seconds'] / 60:.1f}", commit(one["commit"])])  # fmt: skip
    return markdown(["run", "options of its own", "steps", "seed", "minutes", "commit"], rows)


def downstream() -> str:
    """Methods on the test split of each downstream study."""
    table = pd.read_csv(RESULTS / "downstream" / "methods.csv")
    rows = []
    for row in table.to_dict("records"):
        gaps = [signed(row, f"to_{name}") if row["method"] != name else "" for name in ("none", "mse")]
        rows.append([f"`{row['study']}`", row["metric"], row["method"], row["seeds"],
                     f"{row['value']:.2f} [{row['low']:.1f}, {row['high']:.1f}]",
                     "" if pd.isna(row["spread"]) else f"{row['spread']:.2f}", *gaps])  # fmt: skip
    head = ["study", "metric, %", "method", "seeds", "mean", "spread of seeds", "to none", "to mse"]
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
        rows.append([f"`{one['study']}`", f"{one['data']}, {one['annotations']}", f"{one['train']} / {one['test']}",
                     one["network"].split(".")[0], f"{head['kind']}, backbone {head['train']}", size, one["epochs"],
                     ", ".join(map(str, one["seeds"])), f"{one['seconds'] / 60:.0f}", commit(one["commit"]),
                     f"`{shlex.join(one['command'])}`"])  # fmt: skip
    head_ = ["study", "data", "frames trained on / tested on", "network", "head", "size", "epochs", "seeds", "minutes",
             "commit", "command"]  # fmt: skip
    return markdown(head_, rows)


def students() -> str:
    """How the students of the downstream studies were distilled, a command a network and method, of the first seed."""
    made = json.loads((RESULTS / "downstream" / "manifest.json").read_text(encoding="utf-8"))["studies"]
    first_of = {(one["network"].split(".")[0], name): row for one in reversed(made)
                for name, row in one["students"].items() if name.endswith("-0")}  # fmt: skip
    rows = [[network_, f"`{name.removesuffix('-0')}`", row["data"]["train"], row["steps"], f"{row['seconds'] / 60:.1f}",
             commit(row["commit"]), f"`{shlex.join(row['command'])}`"]
            for (network_, name), row in sorted(first_of.items())]  # fmt: skip
    return markdown(["network", "student", "pairs", "steps", "minutes", "commit", "command"], rows)


def detectors() -> str:
    """Published KAIST detections scored here."""
    table = pd.read_csv(RESULTS / "detectors" / "figures.csv")
    names = list(dict.fromkeys(table["figure"]))
    rows = []
    for detector, some in table.groupby("detector", sort=False):
        cells = {r["figure"]: f"{r['value']:.2f} [{r['low']:.1f}, {r['high']:.1f}]" for r in some.to_dict("records")}
        rows.append([detector, *(cells[name] for name in names)])
    return markdown(["detector", *names], rows)


TABLES: dict[str, Callable[[], str]] = {
    "account": account, "ratios": ratios, "floors": floors, "layers": layers, "subsets": subsets,
    "displacement": displacement, "commands": commands, "heldout": heldout, "shared": shared, "arms": arms,
    "detectors": detectors, "downstream": downstream, "downstream_runs": downstream_runs,
    "students": students,
}  # fmt: skip


def filled(text: str) -> str:
    """`text` with every named table written anew. Raises: FreqkdError for an unknown or unclosed name."""

    def table(found: re.Match[str]) -> str:
        name = found.group(1)
        if name not in TABLES:
            raise FreqkdError(f'no table "{name}"; known: {first(TABLES, 12)}.{nearest(name, TABLES)}')
        return f"<!-- table {name} -->\n\n{TABLES[name]()}\n\n<!-- end {name} -->"

    pattern = re.compile(r"<!-- table (\S+) -->.*?<!-- end \1 -->", re.DOTALL)
    if len(pattern.findall(text)) != text.count("<!-- table "):
        raise FreqkdError("a `<!-- table NAME -->` has no `<!-- end NAME -->`.")
    return pattern.sub(table, text)


def body(words: list[str]) -> None:
    path = Path(words[0])
    schema.write_text(path, filled(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main(body, "python study/page.py RESULTS.md")
