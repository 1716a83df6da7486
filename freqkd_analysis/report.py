"""report.html of a run: one file that opens offline, rebuilt from the tables alone.

Nothing is computed here beyond formatting. Every text from outside (file names, settings) passes the template's
autoescape; the only markup let through is the SVG that `figures` draws, whose texts matplotlib escapes itself.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
from pathlib import Path
from typing import Any

from freqkd_analysis import plots, schema
from freqkd_analysis.divergence import DIVERGENCES
from freqkd_analysis.figures import Drawn, draw_figures
from freqkd_analysis.methods_text import condition_words, methods_paragraphs, write_methods
from freqkd_analysis.runfolder import (
    CEILINGS,
    MISSING,
    Run,
    beside,
    interval,
    measured,
    number,
    read_run,
    rows,
    text,
)
from freqkd_analysis.schema import PRIMARY_CONDITIONS, condition_order
from freqkd_analysis.statistics import FEW_GROUPS

__all__ = ["write_methods", "write_report"]

TEMPLATES = Path(__file__).parent / "templates"
SKIPPED_SHOWN = 200

VERDICTS = {
    "supports": "The high band shares less between the modalities than the low band, beyond what unrelated scenes "
    "differ in each band anyway.",
    "against": "The high band does not share less than the low band: on the scale from none to unrelated scenes it "
    "is the low band that differs more.",
    "undetermined": "These pairs do not decide it: the interval holds 1, or there is no interval.",
}


def write_report(run: Path) -> Path:
    """Write RUN/report.html: verdict, table of layers, figures with how to read them, settings, warnings.

    Args:
        run: a finished run folder; only its tables and json files are read.
    Returns: the path written. The same tables give the same bytes.
    Raises: RunError when the folder or one of its tables is missing or of another schema.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "say": lambda v: MISSING if v is None or v == "" else v}
    path = run / "report.html"
    schema.write_text(path, environment.get_template("report.html").render(_context(read_run(run))))
    return path


def _context(run: Run) -> dict[str, Any]:
    from markupsafe import Markup

    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    drawn, left_out = draw_figures(run, png=False)
    skipped = run.get("data", "skipped", default=[])
    return {
        "script": Markup(script),
        "script_hash": digest,
        "style": Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        "run": run,
        "network": run.get("network", "name", default=run.get("config", "model", default=MISSING)),
        "notices": _notices(run),
        "verdict": _verdict(run),
        "warnings": _warnings(run),
        "facts": _facts(run),
        "layers": _layers_table(run),
        "conditions": _conditions_table(run),
        "figures": [(f, Markup(inline_svg(f))) for f in drawn],
        "left_out": left_out,
        "weights": _weights_table(run),
        "artefacts": run.get("artefacts", default=[]),
        "skipped": skipped[:SKIPPED_SHOWN],
        "skipped_more": max(0, len(skipped) - SKIPPED_SHOWN),
        "methods": methods_paragraphs(run),
        "environment": sorted((str(k), str(v)) for k, v in run.get("environment", default={}).items()),
        "settings": [(k, _setting(v)) for k, v in run.get("config", default={}).items()],
    }


def inline_svg(figure: Drawn) -> str:
    """A figure's SVG for use inside a page: no prolog, no fixed size, own identifiers, the page's ink and paper.

    Without the prefix the identifiers of two figures would meet and one would borrow the other's clip paths.
    """
    import markupsafe

    svg = figure.svg[figure.svg.index("<svg") :]
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.S)  # it would rule the whole page; report.css has it
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{figure.name}-", svg)
    for colour, page in ((plots.INK, "currentColor"), (plots.GRID, "var(--grid)"), (plots.PAPER, "var(--card)")):
        svg = svg.replace(colour, page)
    svg = re.sub(r'^<svg([^>]*?) width="[^"]*"', r"<svg\1", svg)
    svg = re.sub(r'^<svg([^>]*?) height="[^"]*"', r"<svg\1", svg)
    label = markupsafe.escape(figure.title.splitlines()[0])
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _notices(run: Run) -> list[str]:
    """What a reader must know before any number: made by a stand-in network, or from made-up scenes."""
    source, name = str(run.get("network", "weights", default="")), str(run.get("network", "name", default=""))
    found = []
    if "demo" in (source, name) or name.startswith("freqkd_demo"):
        found.append(
            "DEMO NETWORK: a small network trained on this project's own synthetic scenes. It shows the tool; its "
            "numbers say nothing about other networks."
        )
    elif source == "random" or run.get("network", "trained") is False:
        found.append(
            "RANDOM WEIGHTS: nothing was learned by this network. Its numbers show the architecture alone and are "
            "no evidence on trained features."
        )
    elif not source:
        found.append("WEIGHTS NOT RECORDED: it is unknown which weights made these numbers.")
    if str(run.get("data", "spec", default=run.get("config", "data", default=""))).startswith("synthetic"):
        found.append(
            "SYNTHETIC SCENES: the pairs were rendered, not photographed. Nothing here is a finding on real images."
        )
    return found


def _warnings(run: Run) -> list[str]:
    """What limits these numbers: first what the statistics found, then what the settings leave open."""
    data = lambda key: run.get("data", key)
    found = [_sentence(str(w)) for w in run.verdict.get("warnings", [])]
    groups = data("groups")
    if groups is None:
        found.append("The number of groups was not recorded.")
    elif groups < FEW_GROUPS and not any("group" in w for w in found):
        unit = (
            "pairs were resampled instead, so intervals are too narrow for a claim" if groups < 2 else "rough intervals"
        )
        found.append(f"{groups} groups, fewer than {FEW_GROUPS}: {unit}.")
    found.append(
        "Layers are not independent confirmations: the residual stream makes neighbouring layers near copies of each "
        "other. Ten layers that agree are not ten findings."
    )
    ceiling = CEILINGS.get(run.condition, "shuffled")
    if ceiling not in set(run.summary["condition"].unique()):
        found.append(f"No ceiling ({ceiling} was not run): nothing is calibrated, and the verdict stays undetermined.")
    if run.condition != PRIMARY_CONDITIONS[0]:
        found.append(f"{PRIMARY_CONDITIONS[0]} was not run: a position map that both images share is still inside.")
    if data("registration_px") is None:
        found.append("Registration of the pairs was not measured; a shift of a few pixels raises the high band too.")
    if data("night") == 0 or data("day") == 0:
        found.append(f"Only {'day' if data('night') == 0 else 'night'} pairs: nothing is said about the other.")
    found += [_sentence(str(note)) for note in data("notes") or []]
    skipped = data("skipped") or []
    if skipped:
        found.append(f"Skipped pairs: {len(skipped)}, listed below.")
    return found


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:] + ("" if words.endswith(".") else ".")


def _verdict(run: Run) -> dict[str, Any]:
    """The row `all` (or the only one there is) of the primary condition and measure, as it is shown on top."""
    table = rows(run.ratio, condition=run.condition, measure=run.measure)
    row = table.iloc[-1].to_dict() if len(table) else {}
    sizes = rows(run.summary, condition=run.condition, measure=run.measure)
    word = text(row.get("verdict")) or "undetermined"
    reason = text((run.verdict.get("all") or {}).get("reason"))
    return {
        "word": word,
        "sentence": VERDICTS.get(word, ""),
        "reason": f"No calibrated ratio: {reason}." if reason else "",
        "layer": "mean over layers" if row.get("layer", "all") == "all" else f"layer {row['layer']}",
        "sizes": f"{int(sizes['n'].max())} pairs in {int(sizes['groups'].max())} groups" if len(sizes) else MISSING,
        "calibrated": _with(row, "calibrated_ratio", "calibrated_ci_low", "calibrated_ci_high"),
        "raw": _with(row, "ratio", "ratio_ci_low", "ratio_ci_high"),
        "numbers": [
            ("calibrated divergence, low band", number(row.get("calibrated_low"))),
            ("calibrated divergence, high band", number(row.get("calibrated_high"))),
            *_beside_verdict(run, str(row.get("layer", "all"))),
            *((f"equivalent shift, {band} band, px", _shift(run, row, band)) for band in ("low", "high")),
        ],
    }


def _beside_verdict(run: Run, layer: str) -> list[tuple[str, str]]:
    """Raw ratios of `paired` with intervals, what misregistration alone gives, and the geometric mean over layers."""
    found = []
    for measure, words in (("mse", "raw mse"), ("mse_per_mode", "mse per mode"), ("cosine", "cosine")):
        table = rows(run.ratio, condition="paired", measure=measure, layer=layer)
        shown = _with(table.iloc[0].to_dict(), "ratio", "ratio_ci_low", "ratio_ci_high") if len(table) else "–"
        found.append((f"{words} (paired), high / low", shown))
    moved = run.verdict.get("beside", {}).get("shifted_at_registration") or {}
    near = beside(run, "paired", layer)
    if moved.get("ratio") is not None:
        found.append((f"misregistration alone ({number(moved['px'], 2)} px), high / low", number(moved["ratio"])))
    elif near["shift"]:
        found.append((f"misregistration alone ({near['shift']}), high / low", number(near["shifted"])))
    else:
        found.append(("misregistration alone, high / low", "not measured"))
    over = run.verdict.get("layer_ratios") or {}
    if over.get("calibrated_geometric") is not None:
        ends = over.get("calibrated_geometric_ci") or (None, None)
        found.append(("calibrated ratio, geometric mean", measured(over["calibrated_geometric"], *ends)))
    return found


def _shift(run: Run, row: dict[str, Any], band: str) -> str:
    shown = text(row.get(f"shift_{band}_px"))
    ends = run.shift_ends(run.condition, str(row.get("layer", "all")), band)
    return f"{shown} [{ends[0]}, {ends[1]}]" if shown and all(ends) else shown or "–"


def _with(row: dict[str, Any], middle: str, low: str, high: str) -> str:
    return measured(row.get(middle), row.get(low), row.get(high))


def _facts(run: Run) -> list[tuple[str, str]]:
    data = lambda key: run.get("data", key, default=MISSING)
    digest = run.get("network", "sha256", default=MISSING)
    registration = run.get("data", "registration_px")
    return [
        ("network", str(run.get("network", "name", default=MISSING))),
        ("weights", f"{run.get('network', 'weights', default=MISSING)} (SHA-256 {str(digest)[:16]})"),
        ("note on the network", str(run.get("network", "note", default="") or "none")),
        ("data", str(data("spec"))),
        ("pairs", f"{data('n')} in {data('groups')} groups; day {data('day')}, night {data('night')}"),
        ("pairs of the controls", str(data("control_n"))),
        ("registration", MISSING if registration is None else
         f"{number(registration)} px (median of {data('registration_n')} measured pairs)"),
        ("bands, cycles per token", "; ".join(run.band_text(b) for b in run.bands)),
        ("floor of the calibration", str(run.verdict.get("floor", MISSING))),
        ("primary measure and condition", f"{run.measure}, {run.condition}"),
        ("command", shlex.join(map(str, run.get("command", default=[]))) or MISSING),
        ("made", f"{run.get('started', default=MISSING)}, {number(run.get('seconds'))} s, version "
         f"{run.get('version', default=MISSING)}, commit {run.get('commit', default=MISSING)}"),
    ]  # fmt: skip


def _setting(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "–" if value is None else str(value)


def _layers_table(run: Run) -> dict[str, Any]:
    """One row a layer, condition and measure; every band's mean and what stands beside mse come along."""
    conditions = [c for c in PRIMARY_CONDITIONS if c in set(run.ratio["condition"].unique())]
    measures = [m for m in run.ratio["measure"].unique() if m in DIVERGENCES]
    listed: list[dict[str, Any]] = []
    near: dict[tuple[str, str], dict[str, Any]] = {}
    for condition in conditions:
        for measure in measures:
            for row in rows(run.ratio, condition=condition, measure=measure).to_dict("records"):
                key = (condition, str(row["layer"]))
                near[key] = near.get(key) or beside(run, *key)
                cells = _row_cells(run, row) + _band_cells(run, (condition, measure, str(row["layer"])))
                listed.append({
                    "condition": condition, "measure": measure, "cells": cells + _beside_cells(near[key]),
                    "all": row["layer"] == "all", "verdict": text(row["verdict"]),
                    "shown": condition == run.condition and measure == run.measure,
                })  # fmt: skip
    bands = [("bands", run.band_text(b)) for b in run.bands]
    side = ["mse ratio", "mse per mode ratio", "cosine ratio", "shifted ratio", "RGB energy low", "RGB energy high",
            "modes low", "modes high"]  # fmt: skip
    main = ["layer", "tap", "low", "high", "high / low", "calibrated low", "calibrated high", "calibrated ratio",
            "shift px low", "shift px high", "p (FDR)", "verdict"]  # fmt: skip
    heads = [("", name) for name in main] + bands + [("side", name) for name in side]
    return {"rows": listed, "heads": heads, "conditions": conditions, "measures": measures}


def _cell(shown: str, value: Any = None, small: str = "", group: str = "") -> dict[str, Any]:
    return {"text": shown, "value": "" if value is None else value, "small": small, "group": group}


def _row_cells(run: Run, row: dict[str, Any]) -> list[dict[str, Any]]:
    def value(name: str, low: str = "", high: str = "") -> dict[str, Any]:
        return _cell(number(row[name]), row[name], interval(row[low], row[high]) if low else "")

    primary = row["condition"] if row["measure"] == run.measure else ""
    shifts = [(text(row[f"shift_{b}_px"]), run.shift_ends(primary, row["layer"], b)) for b in ("low", "high")]
    order = 1e9 if row["layer"] == "all" else float(row["layer"])
    return [
        _cell(str(row["layer"]), order), _cell(run.tap(row["layer"])), value("low"), value("high"),
        value("ratio", "ratio_ci_low", "ratio_ci_high"), value("calibrated_low"), value("calibrated_high"),
        value("calibrated_ratio", "calibrated_ci_low", "calibrated_ci_high"),
        *(_cell(words or "–", plots.parse_shift(words)[0], f"[{low}, {high}]" if words and low and high else "")
          for words, (low, high) in shifts),
        _cell(number(row["p_fdr"], 2), row["p_fdr"]), _cell(text(row["verdict"]) or "–"),
    ]  # fmt: skip


def _band_cells(run: Run, key: tuple[str, str, str]) -> list[dict[str, Any]]:
    cells = []
    for band in run.bands:
        row = run.means.get((*key, band))
        if row is None:
            cells.append(_cell("–", group="bands"))
        else:
            cells.append(_cell(number(row["mean"]), row["mean"], interval(row["ci_low"], row["ci_high"]), "bands"))
    return cells


def _beside_cells(near: dict[str, Any]) -> list[dict[str, Any]]:
    keys = ("mse", "mse_per_mode", "cosine", "shifted", "energy_low", "energy_high", "modes_low", "modes_high")
    return [_cell(number(near[key]), near[key], group="side") for key in keys]


def _conditions_table(run: Run) -> list[dict[str, str]]:
    """Every condition in the primary measure over all layers, with what it compares."""
    table = rows(run.ratio, measure=run.measure, layer="all")
    found = []
    for row in sorted(table.to_dict("records"), key=lambda r: condition_order(r["condition"])):
        sizes = rows(run.summary, condition=row["condition"], measure=run.measure, layer="all")
        found.append({
            "condition": row["condition"], "words": condition_words(row["condition"]),
            "n": f"{int(sizes['n'].max())} / {int(sizes['groups'].max())}" if len(sizes) else "–",
            "low": number(row["low"]), "high": number(row["high"]),
            "ratio": _with(row, "ratio", "ratio_ci_low", "ratio_ci_high"),
            "calibrated": _with(row, "calibrated_ratio", "calibrated_ci_low", "calibrated_ci_high"),
        })  # fmt: skip
    return found


def _weights_table(run: Run) -> list[dict[str, Any]]:
    found = []
    for layer in run.weights.get("layers", []):
        given = layer.get("weights", {})
        rules = {
            rule: [number(v, 2) if v is not None else "no mode" for v in values or []] for rule, values in given.items()
        }
        found.append(
            {"layer": layer.get("layer"), "tap": layer.get("tap", ""), "modes": layer.get("modes", []), **rules}
        )
    return found
