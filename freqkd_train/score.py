"""Detections against annotations by the field's protocols: one report for a run, a comparison for several.

All figures in a report are percent; a miss rate is better when lower, a precision when higher. None stands where no box
counts. The protocol card travels with every report.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from freqkd_analysis import schema, statistics
from freqkd_analysis.errors import FreqkdError, first, nearest
from freqkd_train.metrics import coco, intervals, kaist
from freqkd_train.metrics.boxes import Detections, Truth
from freqkd_train.metrics.card import Card
from freqkd_train.metrics.matching import THRESHOLD
from freqkd_train.result_files import Annotations, read_annotations, read_results

PROTOCOLS = ("kaist", "coco")
KAIST_TEST_IMAGES = 2252
RULES = {
    "kaist": "Reasonable (height from 55 px, occlusion none or partial, 5 px off the border), the rest ignore regions",
    "coco": "boxes marked iscrowd or ignore are ignore regions",
}


@dataclass(frozen=True)
class Run:
    """One run's detections under its name."""

    name: str
    detections: Detections


def score(
    annotations: Path,
    results: Sequence[Path],
    protocol: str = "",
    *,
    style: str = "matlab",
    draws: int = statistics.DRAWS,
    seed: int = 0,
    out: Path | None = None,
) -> dict[str, Any]:
    """Score detection files; several of them are also compared, with intervals.

    Args:
        annotations: KAIST json, COCO json or a folder of bbGt text files.
        results: `image,x,y,w,h,score` lines or json lists; see `result_files`.
        protocol: kaist, coco, or empty: by the annotations.
        style: of the miss rate, a name of `kaist.STYLES`.
        out: where to write the report as json.
    Returns: for one file the report of `report`; for several {"results": [report, ...], "comparison", "card"}.
    Raises: FreqkdError for files, lines or names that are not as expected.
    """
    if not results:
        raise FreqkdError("no detections to score; give at least one --results FILE.")
    read = read_annotations(annotations)
    return scored(read, read_runs(results, read), protocol, style=style, draws=draws, seed=seed, out=out)


def scored(
    read: Annotations, runs: Sequence[Run], protocol: str = "", *, style: str = "matlab",
    draws: int = statistics.DRAWS, seed: int = 0, out: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """As `score`, of what was read already."""
    card = card_of(read, protocol, style)
    content = compared(read.truth, runs, card, protocol_of(read, protocol), style=style, draws=draws, seed=seed)
    if out is not None:
        write(content, out)
    return content


def compared(
    truth: Truth, runs: Sequence[Run], card: Card, protocol: str, *, style: str = "matlab",
    draws: int = statistics.DRAWS, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """The report of one run, or of several with their comparison; arguments and result as in `score`."""
    reports = [report(truth, run, card, protocol, style) for run in runs]
    if len(runs) == 1:
        return reports[0]
    comparison = compare(truth, runs, protocol, draws=draws, seed=seed)
    return {"results": reports, "comparison": comparison, "card": card.as_dict()}


def report(truth: Truth, run: Run, card: Card, protocol: str, style: str = "matlab") -> dict[str, Any]:
    """One run's figures.

    Returns: name, detections (their number), units, card; ap, ap50, ap75, ap_small, ap_medium, ap_large, ar1, ar10,
        ar100 and `classes`. With protocol kaist these follow the Reasonable ignore rule, and there are mr_all, mr_day,
        mr_night, `settings` (setting -> subset -> miss_rate, recall, counted, images), ap50_all_boxes, ap50_by_time and
        `ap50_readings` (rule -> ap50, counted).

    Example:
        >>> from freqkd_train.metrics.boxes import make_detections, make_truth
        >>> truth = make_truth(["a"], classes=["person"], image=[0], category=[0], box=[[100, 100, 30, 80]])
        >>> card = Card("made up", "", "", "test", 1, "Reasonable", ("person",))
        >>> got = report(truth, Run("nothing", make_detections()), card, "kaist")
        >>> got["mr_all"], got["mr_day"], got["ap50"]
        (100.0, None, 0.0)
    """
    detections = run.detections.validate(len(truth.names), len(truth.classes))
    head = {"name": run.name, "detections": len(detections.score), "units": "percent", "card": card.as_dict()}
    if protocol == "coco":
        figures = percent(coco.average_precision(truth, detections))
        dropped = coco.keep(truth, ~truth.ignore)
        if truth.ignore.any():
            figures["ap50_ignored_dropped"] = percent(coco.ap50(dropped, detections))
        return head | figures
    table: dict[str, dict[str, Any]] = {}
    person = person_of(truth)
    for rate in kaist.miss_rates(truth, detections, style=style, person=person):
        table.setdefault(rate.setting, {})[rate.subset] = {
            "miss_rate": percent(rate.miss_rate), "recall": percent(rate.recall),
            "counted": rate.counted, "images": rate.images,
        }  # fmt: skip
    reasonable = table["Reasonable"]
    rates = {f"mr_{subset}": reasonable.get(subset, {}).get("miss_rate") for subset in kaist.SUBSETS}
    rules = coco.readings(truth, person)
    figures = percent(coco.average_precision(*_swapped(rules["reasonable"], detections)))
    readings = {
        name: {"ap50": _ap50(changed, detections, counted)["all"], "counted": int(counted.sum())}
        for name, (changed, counted) in rules.items()
    }
    by_time = {name: _ap50(*_swapped(rules[name], detections)) for name in ("reasonable", "all_boxes")}
    return head | rates | figures | {
        "ap50_all_boxes": readings["all_boxes"]["ap50"], "ap50_by_time": by_time, "ap50_readings": readings,
        "settings": table,
    }  # fmt: skip


def compare(
    truth: Truth, runs: Sequence[Run], protocol: str, *, draws: int = statistics.DRAWS, seed: int = 0
) -> dict[str, Any]:
    """Figures of several runs and their differences with 95 % intervals, whole videos resampled, the same for all.

    Miss rates are MATLAB style whatever the style of the table. Day and night are resampled among their own videos.

    Returns: runs (names), draws, seed, warnings, and `figures`: name -> {"runs", "differences", "groups"}, in percent.
    """
    content: dict[str, Any] = {"runs": [run.name for run in runs], "draws": draws, "seed": seed, "warnings": [],
                               "units": "percent", "figures": {}}  # fmt: skip
    found = [run.detections for run in runs]
    for subset, within in kaist.subsets(truth).items() if protocol == "kaist" else [("all", None)]:
        images = np.arange(len(truth.names)) if within is None else np.flatnonzero(within)
        part, parts = truth.take(images), [one.take(images, len(truth.names)) for one in found]
        unit = intervals.units(part)
        figures: dict[str, list[intervals.Figure]] = {}
        if protocol == "kaist":
            figures[f"mr_{subset}"] = miss_rates(part, parts, unit)
        if subset == "all":
            figures |= precisions(part, parts, protocol, unit)
        result = intervals.paired(figures, unit, draws, seed)
        if result["warning"]:
            content["warnings"].append(f"{subset}: {result['warning']}")
        for name, rows in result["figures"].items():
            scaled = {key: [_scaled(row) for row in rows[key]] for key in ("runs", "differences")}
            content["figures"][name] = scaled | {"groups": result["groups"], "unit": result["unit"]}
    return content


def miss_rates(truth: Truth, found: Sequence[Detections], unit: statistics.Units) -> list[intervals.Figure]:
    """The Reasonable miss rate of each run as a figure that can be resampled."""
    person = person_of(truth)
    return [intervals.miss_rate(truth, one, unit, person=person) for one in found]


def precisions(
    truth: Truth, found: Sequence[Detections], protocol: str, unit: statistics.Units
) -> dict[str, list[intervals.Figure]]:
    """AP50 of each run, by name of the rule that says which boxes count: of kaist both, else the truth's own."""
    rules = {"ap50": (truth, ~truth.ignore)}
    if protocol == "kaist":
        readings = coco.readings(truth, person_of(truth))
        rules = {"ap50": readings["reasonable"], "ap50_all_boxes": readings["all_boxes"]}
    return {name: [intervals.average_precision_50(changed, one, counted, unit) for one in found]
            for name, (changed, counted) in rules.items()}  # fmt: skip


def card_of(read: Annotations, protocol: str = "", style: str = "matlab") -> Card:
    """The protocol card of scoring detections against an annotation file."""
    n = len(read.truth.names)
    protocol = protocol_of(read, protocol)
    return make_card(
        read.truth, protocol, style,
        data_set="KAIST" if read.kaist else Path(read.name).stem, annotation_set=read.name,
        annotation_sha256=read.sha256,
        split="test-all-20" if read.kaist and n == KAIST_TEST_IMAGES else f"the {n} images of the file",
        policy=read.policy,
    )  # fmt: skip


def make_card(
    truth: Truth, protocol: str, style: str = "matlab", *, data_set: str, annotation_set: str, annotation_sha256: str,
    split: str, policy: str, box_source: str = "",
) -> Card:  # fmt: skip
    """A card with what the protocol fixes filled in: ignore rule, limits, overlaps, names of the metrics."""
    from importlib.metadata import version

    precision = f"COCO AP (faster-coco-eval {version('faster-coco-eval')})"
    with_rate = protocol == "kaist"
    return Card(
        data_set=data_set, annotation_set=annotation_set, annotation_sha256=annotation_sha256, split=split,
        frames=len(truth.names), ignore_rule=RULES[protocol], classes=truth.classes, policy=policy,
        box_source=box_source,
        max_detections=(kaist.MAX_DETECTIONS, coco.MAX_DETECTIONS) if with_rate else (coco.MAX_DETECTIONS,),
        thresholds=(THRESHOLD, *(round(float(t), 2) for t in coco.OVERLAPS)) if with_rate
        else tuple(round(float(t), 2) for t in coco.OVERLAPS),
        metric=f"log-average miss rate ({style}); {precision}" if with_rate else precision,
    )  # fmt: skip


def person_of(truth: Truth) -> int:
    """The class that the miss rate is about: "person" in any case, or the only class there is."""
    lower = [name.lower() for name in truth.classes]
    if "person" in lower:
        return lower.index("person")
    if len(lower) == 1:
        return 0
    raise FreqkdError(
        f"the protocol kaist is about persons, but the classes are {first(truth.classes, 8)}; use --protocol coco."
    )


def write(content: Mapping[str, Any], path: Path) -> None:
    """The report as json, whole or not at all."""
    schema.write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def text(content: Mapping[str, Any]) -> str:
    """The report as lines for a terminal: the card in one line, the figures, for several runs the differences."""
    card, reports = content["card"], content.get("results", [content])
    lines = [
        f"{card['data_set']}, {card['split']}, {card['frames']} images, annotations {card['annotation_set']} "
        f"({card['annotation_sha256'][:12]})",
        f"{card['metric']}; {card['ignore_rule']}; classes {first(card['classes'], 8)}; {card['policy']}",
    ]
    width = max(len(one["name"]) for one in reports)
    shown = [key for key in ("mr_all", "mr_day", "mr_night", "ap", "ap50", "ap50_all_boxes", "ap50_ignored_dropped",
                             "ap75", "ap_small", "ap_medium", "ap_large") if key in reports[0]]  # fmt: skip
    lines += ["", " " * width + "".join(f"  {key:>9}" for key in shown)]
    lines += [
        f"{one['name']:<{width}}" + "".join(f"  {_shown(one[key]):>{max(9, len(key))}}" for key in shown)
        for one in reports
    ]
    for one in reports:
        lines += _details(one)
    if "comparison" in content:
        lines += ["", *_differences(content["comparison"])]
    return "\n".join(lines)


def _details(one: Mapping[str, Any]) -> list[str]:
    if "settings" not in one:
        kinds = one["classes"].items()
        return ["", f"{one['name']}: by class", *(
            f"  {name:<16} AP {_shown(row['ap']):>6}  AP50 {_shown(row['ap50']):>6}  {row['counted']} boxes"
            for name, row in kinds)]  # fmt: skip
    lines = [
        "",
        f"{one['name']}: miss rate by setting" + "".join(f"  {s:>6}" for s in next(iter(one["settings"].values()))),
    ]
    for name, row in one["settings"].items():
        cells = "".join(f"  {_shown(cell['miss_rate']):>6}" for cell in row.values())
        lines.append(f"  {name:<22}{cells}   {row['all']['counted']} boxes")
    lines += [f"{one['name']}: AP50 under other rules"]
    lines += [f"  {name:<24}{_shown(r['ap50']):>6}   {r['counted']} boxes" for name, r in one["ap50_readings"].items()]
    return lines


def _differences(comparison: Mapping[str, Any]) -> list[str]:
    names = comparison["runs"]
    rule = "; miss rates MATLAB style" if any(name.startswith("mr_") for name in comparison["figures"]) else ""
    told = f"95 % interval ({comparison['draws']} draws; * leaves out 0{rule})"
    lines = [f"differences, later minus earlier, {told}"]
    for figure, rows in comparison["figures"].items():
        for row in rows["differences"]:
            i, j = row["runs"]
            ends = f"[{_shown(row['low'])}, {_shown(row['high'])}]{' *' if row['clear'] else ''}"
            lines.append(f"  {figure:<16}{names[j]} - {names[i]}: {_shown(row['value'])} {ends}")
    return lines + [f"  note, {warning}" for warning in comparison["warnings"]]


def _ap50(truth: Truth, detections: Detections, counted: np.ndarray) -> dict[str, Any]:
    """AP50 in percent by subset: the images of day and of night as groups, each taken once or not."""
    masks = kaist.subsets(truth)
    names = ("day", "night", "")
    index = np.array([names.index(time) if time in names else 2 for time in truth.times], dtype=np.int64)
    unit = statistics.Units(index, names, "group", "")
    rows = {"all": [1.0, 1.0, 1.0], "day": [1.0, 0.0, 0.0], "night": [0.0, 1.0, 0.0]}
    values = intervals.average_precision_50(truth, detections, counted, unit)(np.array([rows[name] for name in masks]))
    return {name: percent(float(value)) for name, value in zip(masks, values, strict=True)}


def _swapped(rule: tuple[Truth, np.ndarray], detections: Detections) -> tuple[Truth, Detections, np.ndarray]:
    return rule[0], detections, rule[1]


def percent(value: Any) -> Any:
    """Fractions, in nested dicts too, as percent; whole numbers stay, NaN becomes None."""
    if isinstance(value, dict):
        return {key: percent(inner) for key, inner in value.items()}
    if isinstance(value, float):
        return None if math.isnan(value) else 100.0 * value
    return value


def _scaled(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: percent(value) if key in ("value", "low", "high") else value for key, value in row.items()}


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def protocol_of(read: Annotations, protocol: str = "") -> str:
    """The protocol asked for, or the one that the annotations suggest. Raises FreqkdError for an unknown name."""
    return checked(protocol) or ("kaist" if read.kaist else "coco")


def checked(protocol: str) -> str:
    """The name of a protocol, or empty. Raises FreqkdError for an unknown one."""
    if protocol and protocol not in PROTOCOLS:
        raise FreqkdError(f'no protocol "{protocol}"; known: {first(PROTOCOLS)}.{nearest(protocol, PROTOCOLS)}')
    return protocol


def read_runs(results: Sequence[Path], read: Annotations) -> list[Run]:
    """The detections of each file, under a name that tells them apart."""
    return [Run(name, read_results(path, read)) for name, path in zip(_names(results), results, strict=True)]


def _names(results: Sequence[Path]) -> list[str]:
    """What to call each file: its stem, or its path where two stems are alike."""
    stems = [path.name.removesuffix(".gz").rsplit(".", 1)[0] for path in results]
    return [stem if stems.count(stem) == 1 else str(path) for stem, path in zip(stems, results, strict=True)]
