"""Evaluations side by side: method x metric, mean over seeds, paired differences, as CSV, Markdown, LaTeX and figure.

A method's figure is the mean over its seeds; the test images' groups are resampled for all methods together, so an
interval covers the test set, not the seeds: with few seeds the spread of these stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from freqkd_analysis import provenance, schema, statistics
from freqkd_analysis.errors import RunError
from freqkd_analysis.runfolder import number
from freqkd_train import annotations as annotated
from freqkd_train import evaluate, predictions, score
from freqkd_train.metrics import intervals, miou
from freqkd_train.metrics.card import Card, require_alike

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

REFERENCES = ("none", "mse")
"""Methods that the others are told against, where they are there."""
LOWER = ("mr_all",)
"""Metrics of which less is better."""


def compare(folders: Sequence[Path], draws: int = statistics.DRAWS, seed: int = 0, force: bool = False) -> pd.DataFrame:
    """One row a method and metric.

    Args: folders: of evaluations. force: go on where their cards differ.
    Returns: method, metric, seeds, value (percent), low, high, spread (standard deviation over seeds), and for each
        reference `to_REF`, `to_REF_low`, `to_REF_high`: the method minus the reference. groups: resampled units.
        attrs["note"]: what is to be said of the intervals; attrs["unlike"]: in what cards and seeds differ, with force;
        each may be empty.
    Raises: RunError for folders that are no evaluations, of another task, twice the same, or (without force) of unlike
        seeds; CardError for unlike cards without force (saying in what).
    """
    import pandas as pd

    runs = [_read(folder) for folder in folders]
    unlike = _unlike(runs, folders, force)
    methods = list(dict.fromkeys(str(run["method"]) for run in runs))
    figures, unit = _figures(runs, folders)
    weights = statistics.bootstrap_weights(len(unit), draws, seed)
    everything, without = np.ones((1, len(unit))), 1.0 - np.eye(len(unit))
    rows = []
    for metric, found in figures.items():
        of_method = {name: [f for f, run in zip(found, runs, strict=True) if run["method"] == name] for name in methods}
        values = [np.stack([np.mean([f(w) for f in of_method[name]], axis=0) for name in methods], axis=1)
                  for w in (everything, weights, without)]  # fmt: skip
        references = [name for name in REFERENCES if name in methods]
        gaps = [np.concatenate([v] + [v - v[:, [methods.index(r)]] for r in references], axis=1) for v in values]
        got = statistics.bca(gaps[0][0], gaps[1], gaps[2], unit.effective)
        part = np.stack([got.estimate, got.low, got.high]) * 100
        for i, name in enumerate(methods):
            single = [float(f(everything)[0]) * 100 for f in of_method[name]]
            spread = float(np.std(single, ddof=1)) if len(single) > 1 else float("nan")
            row = {"method": name, "metric": metric, "seeds": len(single), "value": part[0, i], "low": part[1, i],
                   "high": part[2, i], "spread": spread}  # fmt: skip
            for k, reference in enumerate(references, start=1):
                at = part[:, k * len(methods) + i]
                row |= {f"to_{reference}": at[0], f"to_{reference}_low": at[1], f"to_{reference}_high": at[2]}
            rows.append(row | {"groups": len(unit)})
    table = pd.DataFrame(rows)
    table.attrs |= {"note": unit.warning, "unlike": unlike}
    return table


def _read(folder: Path) -> dict[str, Any]:
    path = folder / evaluate.METRICS
    if not path.is_file():
        raise RunError(f"no {evaluate.METRICS} in {folder}; expected the folder of `freqkd-train evaluate`.")
    target = {"spec": str, "split": str, "annotations": str, "policy": str}
    shape: dict[str, Any] = {"method": str, "seed": int, "task": str, "protocol": str, "card": dict, "target": target}
    return provenance.read_object(path, shape, "expected what `freqkd-train evaluate` wrote; evaluate again.")


def _unlike(runs: Sequence[dict[str, Any]], folders: Sequence[Path], force: bool) -> str:
    """In what evaluations differ from the first; an error without force, and where they cannot be compared at all."""
    for run, folder in zip(runs, folders, strict=True):
        if run["task"] != runs[0]["task"]:
            raise RunError(f"{folders[0]} and {folder} are of two tasks: {runs[0]['task']} and {run['task']}.")
    seeds: dict[str, list[int]] = {}
    for run, folder in zip(runs, folders, strict=True):
        of_method = seeds.setdefault(str(run["method"]), [])
        if run["seed"] in of_method:
            raise RunError(f"{folder} is {run['method']} of seed {run['seed']} once more; give each evaluation once.")
        of_method.append(run["seed"])
    told = "; ".join(f"{name} {', '.join(map(str, sorted(found)))}" for name, found in seeds.items())
    uneven = len({tuple(sorted(found)) for found in seeds.values()}) > 1
    if uneven and not force:
        raise RunError(f"the methods have unlike seeds: {told}. Give the same of each; --force compares them anyway.")
    cards = [Card.read(run["card"], str(folder)) for run, folder in zip(runs, folders, strict=True)]
    unlike = require_alike(cards, [str(folder) for folder in folders], force)
    return "\n".join(filter(None, [unlike, f"seeds: {told}" if uneven else ""]))


def _figures(runs: Sequence[dict[str, Any]], folders: Sequence[Path]) -> tuple[dict[str, list[Any]], Any]:
    wanted = runs[0]["target"]
    target = annotated.load(wanted["spec"], wanted["split"], annotations=wanted["annotations"],
                            policy=wanted["policy"])  # fmt: skip
    if target.card["annotation_sha256"] != runs[0]["card"]["annotation_sha256"]:
        raise RunError(f"the annotations of {wanted['spec']} are not those that {folders[0]} was evaluated on; "
                       "evaluate again.")  # fmt: skip
    if runs[0]["task"] == "segment":
        unit = statistics.units([record.id for record in target.records], [record.group for record in target.records])
        matrices = [predictions.read_confusions(folder, target) for folder in folders]
        statistics_of = {f"miou_{9 if b else 8}": partial(miou.mean_iou, background=b) for b in (True, False)}
        return {name: [intervals.from_confusions(m, unit, statistic) for m in matrices]
                for name, statistic in statistics_of.items()}, unit  # fmt: skip
    truth = target.truth
    assert truth is not None
    found = [predictions.read(folder, target) for folder in folders]
    for one, run, folder in zip(found, runs, folders, strict=True):
        if len(one.score) != run.get("detections"):
            raise RunError(f"{folder / predictions.PREDICTIONS} holds {len(one.score)} detections, {evaluate.METRICS} "
                           f"tells of {run.get('detections')}; {predictions.AGAIN}")  # fmt: skip
    unit = intervals.units(truth)
    figures = score.precisions(truth, found, runs[0]["protocol"], unit)
    if runs[0]["protocol"] == "kaist":
        figures["mr_all"] = score.miss_rates(truth, found, unit)
    return figures, unit


def markdown(table: pd.DataFrame) -> str:
    """Method x metric as Markdown; bold where the difference to `none` is clear of 0 and better."""
    head, *rows = cells(table, "**{}**")
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def latex(table: pd.DataFrame) -> str:
    """The same as a LaTeX tabular."""
    rows = cells(table, r"\textbf{{{}}}")
    body = [" & ".join(cell.replace("_", r"\_").replace("%", r"\%") for cell in row) + r" \\" for row in rows]
    return "\n".join([rf"\begin{{tabular}}{{l{'c' * (len(rows[0]) - 1)}}}", r"\hline", body[0], r"\hline", *body[1:],
                      r"\hline", r"\end{tabular}"]) + "\n"  # fmt: skip


def cells(table: pd.DataFrame, bold: str = "{}") -> list[list[str]]:
    """Header and one row a method; `bold` frames a value that is better than `none` by its interval."""
    metrics = list(dict.fromkeys(table["metric"]))
    references = [name for name in REFERENCES if f"to_{name}" in table]
    head = ["method (seeds)"]
    for metric in metrics:
        head += [f"{metric} %", *(f"{metric} to {name}" for name in references)]
    rows = [head]
    for method in dict.fromkeys(table["method"]):
        part = {row["metric"]: row for row in table[table["method"] == method].to_dict("records")}
        cells = [f"{method} ({part[metrics[0]]['seeds']})"]
        for metric in metrics:
            row = part[metric]
            text = f"{number(row['value'])} {_between(row['low'], row['high'])}".strip()
            cells.append(bold.format(text) if _better(row, metric) else text)
            for name in references:
                value = row[f"to_{name}"]
                gap = f"{value:+.2f} {_between(row[f'to_{name}_low'], row[f'to_{name}_high'])}".strip()
                cells.append("" if method == name or np.isnan(value) else gap)
        rows.append(cells)
    return rows


def _between(low: float, high: float) -> str:
    return "" if np.isnan(low) or np.isnan(high) else f"[{low:.2f}, {high:.2f}]"


def _better(row: dict[str, Any], metric: str) -> bool:
    low, high = row.get("to_none_low", float("nan")), row.get("to_none_high", float("nan"))
    return bool(high < 0 if metric in LOWER else low > 0)


def write(table: pd.DataFrame, out: Path) -> list[Path]:
    """compare.csv, .md, .tex and the figure; in what the cards differ is told above the table."""
    from freqkd_analysis import figures

    paths = [out / f"compare.{suffix}" for suffix in ("csv", "md", "tex")]
    note, unlike = table.attrs["note"], table.attrs["unlike"]
    told = f"Not evaluated alike:\n\n{unlike}\n\n" if unlike else ""
    remarks = [*(f"not evaluated alike: {line}" for line in unlike.splitlines()), *([note] if note else [])]
    texts = (table.to_csv(index=False, lineterminator="\n"), told + markdown(table) + (f"\n{note}\n" if note else ""),
             "".join(f"% {line}\n" for line in remarks) + latex(table))  # fmt: skip
    for path, text in zip(paths, texts, strict=True):
        schema.write_text(path, text)
    drawing = figures.Drawing("methods on the test split, 95 % over its groups", table, dots,
                              2.5 + 0.55 * len(table), "Points: mean over seeds.")  # fmt: skip
    return [*paths, *figures.write_drawn(out, figures.render("compare", drawing))]


def dots(table: pd.DataFrame, ax: Axes) -> Axes:
    """One row a metric and method: value with its interval, percent."""
    from freqkd_analysis import plots

    names = [f"{row['metric']}  {row['method']}" for row in table.to_dict("records")]
    ends = np.nan_to_num(np.stack([table["value"] - table["low"], table["high"] - table["value"]]).astype(float))
    y = np.arange(len(table))[::-1]
    ax.errorbar(table["value"], y, xerr=np.clip(ends, 0, None), fmt="o", color=plots.BLUE, elinewidth=0.9, capsize=1.5)
    ax.set_yticks(y, names)
    ax.set_xlabel("percent")
    ax.grid(axis="x")
    return ax
