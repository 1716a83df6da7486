"""The one table that a run prints: layer by layer, low and high, their ratio, calibrated, and the verdict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from freqkd_analysis.errors import RunError, nearest
from freqkd_analysis.runfolder import beside, measured, number, read_run, rows, text

if TYPE_CHECKING:
    from rich.table import Table

COLOURS = {"supports": "green", "against": "magenta", "undetermined": "yellow"}


def console_table(run: Path, condition: str | None = None, measure: str | None = None, narrow: bool = False) -> Table:
    """The table of one condition and measure, a row a layer and `all` last.

    Args:
        run: a finished run folder.
        condition, measure: by default the primary ones of the run.
        narrow: leave out the equivalent shifts and most of the frame, for 80 columns.
    Returns: a rich Table: layer, low, high, ratio and calibrated ratio with 95 % intervals, equivalent shift in input
        pixels, verdict.
    Raises: RunError for a run folder without tables, or without rows of that condition and measure.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    read = read_run(run)
    condition, measure = condition or read.condition, measure or read.measure
    for name, column in ((condition, "condition"), (measure, "measure")):
        known = list(read.ratio[column].unique())
        if name not in known:
            raise RunError(
                f'no rows of {column} "{name}" in ratio.csv.{nearest(name, known)} It has: {", ".join(known)}.'
            )
    table = rows(read.ratio, condition=condition, measure=measure)
    if table.empty:
        raise RunError(f'ratio.csv has no rows of condition "{condition}" with measure "{measure}".')
    sizes = rows(read.summary, condition=condition, measure=measure)
    count = f", {int(sizes['n'].max())} pairs in {int(sizes['groups'].max())} groups" if len(sizes) else ""
    name = f"{read.get('network', 'name', default='')} ({read.get('network', 'weights', default='not recorded')})"
    out = Table(title=Text(f"{name}: {condition}, {measure}{count}"), caption=Text("[..]: 95 % interval"))
    if narrow:
        out.box, out.show_edge, out.pad_edge, out.collapse_padding = SIMPLE_HEAD, False, False, True
        out.caption = Text("[..]: 95 % interval; equivalent shifts: ratio.csv, or a terminal of 110 columns")
    shifts = ("shift px low", "shift px high")
    for title in ("layer", "low", "high", "high / low", "calibrated", "shift px low", "shift px high", "verdict"):
        if narrow and title in shifts:
            continue
        left = title in ("high / low", "calibrated", "verdict")
        out.add_column(Text(title), justify="left" if left else "right", no_wrap=True)
    if measure == "mse":  # never alone: it grows with a band's energy and with its number of modes
        for title in ("per mode", "cosine", "energy low, high", "modes low, high"):
            out.add_column(Text(title), justify="right", no_wrap=True)
    for row in table.to_dict("records"):
        verdict = text(row["verdict"])
        cells = [
            str(row["layer"]), number(row["low"]), number(row["high"]),
            measured(row["ratio"], row["ratio_ci_low"], row["ratio_ci_high"]),
            measured(row["calibrated_ratio"], row["calibrated_ci_low"], row["calibrated_ci_high"]),
            *([] if narrow else [text(row["shift_low_px"]) or "–", text(row["shift_high_px"]) or "–"]),
        ]  # fmt: skip
        last = row["layer"] == "all"
        if last and out.row_count:
            out.add_section()
        extra = _beside_mse(beside(read, condition, row["layer"])) if measure == "mse" else []
        out.add_row(*map(Text, cells), Text(verdict or "–", style=COLOURS.get(verdict, "")), *map(Text, extra),
                    style="bold" if last else None)  # fmt: skip
    return out


RELEASED_MEASURES = ("mse", "nmse", "cosine")


def released_table(run: Path) -> Table:
    """The released script's view of a run: `paired` images, mse, nmse and cosine side by side, raw.

    Args:
        run: a finished run folder.
    Returns: a rich Table, a row a layer and `all` last: low band, high band and high / low of each of the three
        measures (0 same; mse of values squared, nmse and cosine without unit); a dash where the run lacks one.
    Raises: RunError for a run folder without tables, or without rows of `paired`.
    """
    from rich.table import Table
    from rich.text import Text

    read = read_run(run)
    table = rows(read.ratio, condition="paired")
    if table.empty:
        raise RunError(f"{run / 'ratio.csv'} has no rows of condition paired; run `freqkd-analyze layers` with it.")
    found = {(row["layer"], row["measure"]): row for row in table.to_dict("records")}
    out = Table(title=Text("as the FreqKD release prints it: paired, nothing calibrated"))
    out.add_column(Text("layer"), justify="right", no_wrap=True)
    for measure in RELEASED_MEASURES:
        for title in ("low", "high", "high / low"):
            out.add_column(Text(f"{measure} {title}"), justify="right", no_wrap=True)
    for layer in table["layer"].unique():
        cells = [number(found.get((layer, measure), {}).get(column))
                 for measure in RELEASED_MEASURES for column in ("low", "high", "ratio")]  # fmt: skip
        last = layer == "all"
        if last and out.row_count:
            out.add_section()
        out.add_row(Text(layer), *map(Text, cells), style="bold" if last else None)
    return out


def _beside_mse(found: dict[str, Any]) -> list[str]:
    pairs = [f"{number(found[f'{word}_low'])}, {number(found[f'{word}_high'])}" for word in ("energy", "modes")]
    return [number(found["mse_per_mode"]), number(found["cosine"]), *pairs]
