"""Tables of RESULTS.md on the analyses: where the modalities differ, and how that was measured."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import pandas as pd
from cells import commit, markdown
from outputs import RESULTS

from freqkd_analysis.conditions import NOISE_LEVELS
from freqkd_analysis.runfolder import Run, measured, number, read_run

FLOORS = {"noise": f"noise of {NOISE_LEVELS:g} grey levels", "shifted": "the measured displacement"}
SMALLEST = "smallest third"
CHANGED = {
    "paired": "the infrared image of the scene", "shuffled": "an infrared image of another scene",
    "inverted": "the visible image, in grey and inverted", "grey": "the visible image in grey",
    "blur": "the visible image, blurred", "noise": f"the visible image with {FLOORS['noise']}",
    "shifted:2": "the visible image, shifted by 2 px",
    "pixels": "the infrared image, pixels instead of features",
    "without_artefacts": "the infrared image, tokens of outlying norm replaced",
    "random": "the infrared image, in the untrained network",
}  # fmt: skip
"""Condition -> what the visible image is held against."""


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


def whole() -> dict[str, Run]:
    """The analyses with the usual spectra: those with a window or another geometry have a table of their own."""
    return {name: run for name, run in runs().items() if not variant(run)}


def variant(run: Run) -> str:
    """What is unusual in how a run made its spectra; empty for most, and for a preset, which fixes it."""
    if run.get("config", "preset"):
        return ""
    window = {"none": "", "hann": "Hann window", "dct": "cosine transform"}[str(run.get("config", "window"))]
    padded = "padded, not cropped" if run.get("config", "geometry") == "pad" else ""
    return ", ".join(filter(None, (window, padded)))


def windows() -> str:
    """How much the window and the geometry matter, by network and size."""
    every = runs()
    rows = []
    for base, name in ((name.removesuffix("-hann"), name) for name in every if name.endswith("-hann")):
        for one in (base, name, *(n for n in every if n.startswith(f"{base}-") and n != name and variant(every[n]))):
            run, asked = every[one], all_row(every[one], every[one].condition, every[one].measure)
            rows.append([f"`{one}`", network(run), variant(run) or "as in the main runs",
                         told(all_row(run, "paired", "cosine")), told(all_row(run, "shuffled", "cosine")),
                         f"**{told(asked, 'calibrated_ratio', 'calibrated_ci')}**"])  # fmt: skip
    return markdown(["run", "network, input", "spectra", "cosine", "unrelated scenes, cosine", "calibrated"], rows)


def controls() -> str:
    """Raw ratio of the visible image against changes of it: what a network makes of a change that is no modality."""
    columns = {name: run for name, run in whole().items() if (run.ratio["condition"] == "grey").any()}
    rows = [[words, *(told(all_row(run, condition, "cosine")) for run in columns.values())]
            for condition, words in CHANGED.items()]  # fmt: skip
    return markdown(["visible image held against", *(f"`{name}`" for name in columns)], rows)


def script() -> str:
    """The three numbers that the FreqKD release's analysis prints, with its settings, and what is left of the first."""
    rows = []
    for name, run in whole().items():
        if run.get("config", "preset") != "paper":
            continue
        asked, name_ = all_row(run, run.condition, run.measure), str(run.get("network", "name")).split(".")[0]
        rows.append([f"`{name}`", name_, len(run.get("taps")), run.manifest["n"],
                     *(told(all_row(run, "paired", m)) for m in ("cosine", "nmse", "mse")),
                     told(all_row(run, "shuffled", "cosine")),
                     f"**{told(asked, 'calibrated_ratio', 'calibrated_ci')}**"])  # fmt: skip
    return markdown(["run", "network", "layers", "pairs", "cosine", "nmse", "mse", "unrelated scenes, cosine",
                     "calibrated"], rows)  # fmt: skip


def ratios() -> str:
    """High over low by measure (raw), of unrelated scenes, and without the mean map, calibrated."""
    rows = []
    for name, run in whole().items():
        raw = [told(all_row(run, "paired", m)) for m in ("cosine", "nmse", "mse")]
        asked = all_row(run, run.condition, run.measure)
        rows.append([f"`{name}`", network(run), *raw, told(all_row(run, "shuffled", run.measure)), told(asked),
                     f"**{told(asked, 'calibrated_ratio', 'calibrated_ci')}**", asked["verdict"]])  # fmt: skip
    head = ["run", "network, input", "cosine", "nmse", "mse", "unrelated scenes, cosine", "cosine, mean map removed",
            "calibrated", "verdict"]  # fmt: skip
    return markdown(head, rows)


def account() -> str:
    """From the raw ratio to what is left of it, a column a network that has every control."""
    named = {name: run for name, run in runs().items() if (RESULTS / name / "floors.csv").is_file()}
    full = {name: run for name, run in named.items() if (run.ratio["condition"] == "noise").any()}
    full = {name: run for name, run in full.items() if name in set(_subsets()["run"])}
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
        "its low band: 0 no gap, 1 unrelated scenes": lambda _, run: placed(run, "low"),
        "its high band": lambda _, run: placed(run, "high"),
        "shared content, low / high band": lambda _, run: " / ".join(f"{1 - c:.2f}" for c in ends(run)),
        "most that the calibrated ratio could be with this low band": lambda _, run: number(1 / ends(run)[0], 3),
        "the same ratio, noise as the floor": lambda name, _: calibrated(again.get(f"noise{name}")),
        "the same, the measured displacement as the floor": lambda name, _: calibrated(again.get(f"shifted{name}")),
        "the same, straight line through the pairs at 0 px": lambda name, _: at_zero(name),
        "the same, third of the pairs with the smallest displacement": lambda name, _: part(name, SMALLEST),
        "the same, by day": lambda name, _: part(name, "day"),
        "the same, by night": lambda name, _: part(name, "night"),
        "equivalent shift of the visible image, low / high band": lambda _, run: equivalent(run),
        "verdict on `the high band diverges more`": lambda _, run: str(run.verdict["verdict"]),
    }
    rows = [[words, *(cell(name, run) for name, run in full.items())] for words, cell in lines.items()]
    return markdown(["high / low, mean over layers", *(f"`{name}`" for name in full)], rows)


def calibrated(run: Run | None) -> str:
    return told(all_row(run, run.condition, run.measure), "calibrated_ratio", "calibrated_ci") if run else "–"


def placed(run: Run, band: str) -> str:
    """Where a band lies between no gap (0) and unrelated scenes (1)."""
    return measured(run.verdict["all"][f"calibrated_{band}"], *run.verdict["all"][f"calibrated_{band}_ci"])


def ends(run: Run) -> tuple[float, float]:
    """Calibrated divergence of the low and the high band, mean over layers."""
    return run.verdict["all"]["calibrated_low"], run.verdict["all"]["calibrated_high"]


def equivalent(run: Run) -> str:
    """Pixels by which the visible image would have to be shifted to diverge from itself as far, by band."""
    row = all_row(run, run.condition, run.measure)
    return " / ".join(f"{row[f'shift_{band}_px']} px" for band in ("low", "high"))


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
    for name, run in whole().items():
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
