"""The figures of a run: which rows each one shows, how to read it, and writing SVG, PNG and CSV.

Selecting and reshaping only; the drawing itself is in `plots`. A figure whose rows a run does not hold is left out
with a reason, never drawn empty. The same tables give the same bytes: no dates, no random identifiers.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from freqkd_analysis import plots, schema
from freqkd_analysis.divergence import MEASURES, ROUNDING
from freqkd_analysis.errors import RunError
from freqkd_analysis.runfolder import CEILINGS, Run, number, read_run, rows
from freqkd_analysis.schema import condition_order

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

WIDTH_CM = 8.5


class Absent(Exception):
    """Why a figure cannot be drawn from this run; not an error for the user."""


@dataclass(frozen=True)
class Drawing:
    """One figure before it is drawn: its rows, how to draw them, and the words around it."""

    title: str
    table: pd.DataFrame
    draw: Callable[[pd.DataFrame, Axes], Axes]
    height_cm: float
    reading: str
    """How to read it, one or two sentences."""


@dataclass(frozen=True)
class Drawn:
    """A finished figure: its name, title, reading, SVG text and data."""

    name: str
    title: str
    reading: str
    svg: str
    csv: str
    png: bytes


def write_figures(run: Path) -> list[Path]:
    """Write `figures/NAME.svg`, `.png` and `.csv` for every figure that the run's tables can fill.

    Args:
        run: a finished run folder.
    Returns: the paths written, figure by figure. `figures/left_out.json` names the others with the reason each;
        files of a figure that is left out now but was drawn before are removed.
    Raises: RunError when the folder or one of its tables is missing or of another schema.
    """
    drawn, left_out = draw_figures(read_run(run))
    folder = run / "figures"
    paths = [path for figure in drawn for path in write_drawn(folder, figure)]
    for name in left_out:
        for suffix in ("svg", "png", "csv"):
            (folder / f"{name}.{suffix}").unlink(missing_ok=True)
    schema.write_text(folder / "left_out.json", json.dumps(left_out, indent=1) + "\n")
    return paths


def write_drawn(folder: Path, figure: Drawn) -> list[Path]:
    """NAME.svg, .png and .csv of one figure, each whole or not at all; the paths."""
    paths = []
    for suffix, content in (("svg", figure.svg.encode()), ("png", figure.png), ("csv", figure.csv.encode())):
        paths.append(folder / f"{figure.name}.{suffix}")
        with schema.atomic(paths[-1]) as temporary:
            temporary.write_bytes(content)
    return paths


def draw_figures(run: Run, png: bool = True) -> tuple[list[Drawn], dict[str, str]]:
    """Draw everything that the run's tables can fill.

    Args:
        png: False skips the raster image (its bytes are then empty), which saves most of the time.
    Returns: the figures in the order of the report, and name -> reason for those left out.
    """
    drawn, left_out = [], {}
    for name, make in FIGURES.items():
        try:
            drawn.append(render(name, make(run), png))
        except Absent as reason:
            left_out[name] = str(reason)
    return drawn, left_out


def render(name: str, drawing: Drawing, png: bool = True) -> Drawn:
    """One figure as SVG, PNG and CSV; the same drawing gives the same bytes."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context(["default", {**plots.STYLE, "svg.hashsalt": f"freqkd-{name}"}]):
        figure = Figure(figsize=(WIDTH_CM / 2.54, drawing.height_cm / 2.54), layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.add_subplot()
        drawing.draw(drawing.table, ax)
        figure.suptitle(drawing.title, x=0.01, ha="left", size=7.5)
        text, raster = io.StringIO(), io.BytesIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=nothing)
        if png:
            figure.savefig(raster, format="png", metadata={"Software": None})
    csv = drawing.table.to_csv(index=False, lineterminator="\n")
    return Drawn(name, drawing.title, drawing.reading, text.getvalue(), csv, raster.getvalue())


def _sizes(run: Run, table: pd.DataFrame) -> str:
    """`n = 500 pairs in 41 groups` of rows that carry n and groups."""
    return f"n = {int(table['n'].max())} pairs in {int(table['groups'].max())} groups"


def _divergence_rows(run: Run, condition: str, band: str | None = None) -> pd.DataFrame:
    """Rows of summary.csv in the primary measure, by layer as int, without `all`."""
    wanted = {"condition": condition, "measure": run.measure} | ({"band": band} if band else {})
    table = rows(run.summary, **wanted)
    table = table[table["layer"] != "all"]
    return table.assign(layer=table["layer"].astype(int)).reset_index(drop=True)


def _map(run: Run) -> Drawing:
    table = _divergence_rows(run, run.condition)
    if table.empty:
        raise Absent(f"summary.csv has no rows of condition {run.condition} by layer")
    place = {name: i for i, name in enumerate(run.bands)}
    table = table.sort_values(["layer", "band"], key=lambda c: c.map(place) if c.name == "band" else c)
    table = table.assign(band=table["band"].map(run.band_text))
    table = table[["layer", "band", "mean", "ci_low", "ci_high", "n", "groups"]].reset_index(drop=True)
    return Drawing(
        title=f"Divergence by layer and band ({run.condition})\n{_sizes(run, table)}",
        table=table,
        draw=lambda t, ax: plots.layer_band_map(t, ax, run.measure),
        height_cm=max(5.0, 3.7 + 0.42 * table["layer"].nunique()),
        reading="Each cell is the mean divergence of one band at one layer; brighter means that RGB and IR features "
        "differ more. Compare along a row for bands, along a column for depth. Not yet calibrated: the ceiling of "
        "unrelated scenes differs from band to band.",
    )


def _low_high(run: Run) -> Drawing:
    import pandas as pd

    ceiling = CEILINGS.get(run.condition, "shuffled")
    parts = []
    for name, series in zip(run.ends, ("low", "high"), strict=True):
        parts.append(_divergence_rows(run, run.condition, name).assign(series=series))
        parts.append(_divergence_rows(run, ceiling, name).assign(series=f"{series} ceiling"))
    table = pd.concat(parts, ignore_index=True)
    if not table["series"].isin(["low", "high"]).any():
        raise Absent(f"summary.csv has no rows of condition {run.condition} by layer")
    table = table[["series", "condition", "layer", "band", "mean", "ci_low", "ci_high", "n", "groups"]]
    return Drawing(
        title=f"Low and high band by layer ({run.condition})\n{_sizes(run, table)}; bars: 95 % intervals",
        table=table,
        draw=lambda t, ax: plots.low_high_by_layer(t, ax, run.measure),
        height_cm=6.6,
        reading="Solid: how far paired RGB and IR features differ. Dashed: the same for unrelated scenes, as far as "
        "features of this network differ at all. A solid line near its dashed line says that the band shares "
        "little beyond chance."
        + ("" if (table["condition"] == ceiling).any() else " This run has no ceiling (no shuffled pairs)."),
    )


def _ratio(run: Run) -> Drawing:
    import pandas as pd

    table = rows(run.ratio, condition=run.condition, measure=run.measure)
    table = table[table["layer"] != "all"]
    kinds = {"raw": ("ratio", "ratio_ci_low", "ratio_ci_high"),
             "calibrated": ("calibrated_ratio", "calibrated_ci_low", "calibrated_ci_high")}  # fmt: skip
    parts = []
    for kind, columns in kinds.items():
        part = table[["layer", *columns]].set_axis(["layer", "ratio", "ci_low", "ci_high"], axis=1)
        if part["ratio"].notna().any():
            parts.append(part.assign(kind=kind, layer=part["layer"].astype(int)))
    if not parts or not any((part["ratio"] > 0).any() for part in parts):
        raise Absent(f"ratio.csv has no positive ratio of condition {run.condition} by layer")
    table = pd.concat(parts, ignore_index=True)[["kind", "layer", "ratio", "ci_low", "ci_high"]]
    return Drawing(
        title=f"High over low band by layer ({run.condition})\n{_primary_sizes(run)}; bars: 95 % intervals",
        table=table,
        draw=lambda t, ax: plots.ratio_by_layer(t, ax, run.measure),
        height_cm=6.6,
        reading="Above 1 the high band differs more than the low band; the dotted line is the paper's 2.4. "
        "Calibrated means each band on its own scale from none (0) to unrelated scenes (1): an interval above 1 "
        "supports the claim at that layer, below 1 speaks against it, across 1 leaves it open. Neighbouring layers "
        "are nearly copies of each other, so they are not independent confirmations.",
    )


def _radial(run: Run) -> Drawing:
    table, pairs = _profile(run)
    strides = {tap.get("stride") for tap in run.get("taps", default=[])}
    stride = float(strides.pop()) if len(strides) == 1 and None not in strides else None
    edges = run.weights.get("bands", {}).get("f_lo", [])
    return Drawing(
        title=f"Divergence by spatial frequency ({run.condition})\nn = {pairs} pairs, energies summed over pairs",
        table=table,
        draw=lambda t, ax: plots.radial_profile(t, ax, run.measure, stride, [e for e in edges if e > 0]),
        height_cm=6.8 if stride else 6.0,
        reading="Left: coarse structure, right: fine structure; one line a layer, dark for early, bright for late. "
        "Dotted lines are the band edges. A rise to the right is what misregistration and noise give as well: "
        "compare with the controls.",
    )


def _profile(run: Run) -> tuple[pd.DataFrame, int]:
    """Energies of the primary condition summed over pairs per layer and bin, and the divergence of those sums."""
    import numpy as np
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = run.folder / "spectra.parquet"
    if not path.is_file() and run.get("derived_from") == run.folder.parent.name:
        path = run.folder.parent / "spectra.parquet"  # other bands of a run, in a folder within it
    if not path.is_file():
        raise Absent("the run folder has no spectra.parquet")
    keys, energies = ["layer", "radius", "f_lo", "f_hi", "modes"], ["p_rgb", "p_ir", "cross", "p_diff"]
    try:
        schema.check(pd.DataFrame(columns=pq.read_schema(path).names), schema.SPECTRA, path.name)
        table = pq.read_table(path, columns=["pair", *keys, *energies], filters=[("condition", "=", run.condition)])
    except (OSError, pa.ArrowInvalid) as error:
        raise RunError(f"{path} cannot be read as a table ({type(error).__name__}); make it again.") from error
    # Arrow's threads may add in another order from run to run; one thread gives the same bytes every time.
    sums = table.group_by(keys, use_threads=False).aggregate([(name, "sum") for name in energies]).to_pandas()
    whole = sums.groupby("layer")[["p_rgb_sum", "p_ir_sum"]].transform("sum")
    sums = sums[(sums["modes"] > 0) & (sums[["p_rgb_sum", "p_ir_sum"]] > ROUNDING * whole).all(axis=1)]
    if sums.empty:
        raise Absent(f"spectra.parquet has no rows of condition {run.condition}")
    taps = {int(tap["layer"]): tap for tap in run.get("taps", default=[])}
    places = sums["layer"].map({layer: int(np.prod(tap["grid"])) for layer, tap in taps.items()}).to_numpy(float)
    channels = sums["layer"].map({layer: tap["channels"] for layer, tap in taps.items()}).to_numpy(float)
    p_rgb, p_ir, cross, p_diff = (sums[f"{name}_sum"].to_numpy() for name in energies)
    pairs = len(table["pair"].unique())
    with np.errstate(divide="ignore", invalid="ignore"):
        value = MEASURES[run.measure](
            p_rgb, p_ir, cross, p_diff, sums["modes"].to_numpy(float), places, channels * pairs
        )
    sums = sums.assign(frequency=(sums["f_lo"] + sums["f_hi"]) / 2, value=value).dropna(subset="value")
    sums.loc[sums["radius"] == 0, "frequency"] = 0.0
    sums = sums.sort_values(["layer", "radius"]).reset_index(drop=True)
    return sums[["layer", "radius", "f_lo", "f_hi", "frequency", "modes", "value"]], pairs


def _controls(run: Run) -> Drawing:
    import pandas as pd

    ends = dict(zip(run.ends, ("low", "high"), strict=True))
    table = rows(run.summary, measure=run.measure, layer="all")
    layer = "all"
    if table.empty:
        numbers = [n for n in run.summary["layer"].unique() if n != "all"]
        layer = max(numbers, key=float, default="all")
        table = rows(run.summary, measure=run.measure, layer=layer)
    table = table[table["band"].isin(list(ends)) & table["mean"].notna()]
    if table["condition"].nunique() < 2:
        raise Absent("the run holds one condition only, there is nothing to compare")
    table = table.assign(band=table["band"].map(ends))
    table = table.sort_values("condition", key=lambda c: c.map(condition_order), kind="stable")
    table = pd.DataFrame(table[["condition", "layer", "band", "mean", "ci_low", "ci_high", "n", "groups"]])
    where = "mean over layers" if layer == "all" else f"layer {layer}"
    return Drawing(
        title=f"What else makes a divergence ({where})\nn per row; bars: 95 % intervals",
        table=table.reset_index(drop=True),
        draw=lambda t, ax: plots.controls(t, ax, run.measure),
        height_cm=3.0 + 0.55 * table["condition"].nunique(),
        reading="Top rows: the question (paired RGB and IR) and its ceiling (shuffled). Below: the RGB image against "
        "a changed copy of itself (moved, grey, inverted, blurred, noisy), then random weights and the bare pixels. "
        "A control that lies as far right as the paired row can explain that row without any modality.",
    )


def _shift(run: Run) -> Drawing:
    import pandas as pd

    for condition in dict.fromkeys([run.condition, *run.ratio["condition"].unique()]):
        table = rows(run.ratio, condition=condition, measure=run.measure)
        table = table[table["layer"] != "all"]
        records = []
        for band in ("low", "high"):
            for layer, words in zip(table["layer"], table[f"shift_{band}_px"], strict=True):
                ends = run.shift_ends(condition, layer, band)
                if isinstance(words, str) and words:
                    records.append((int(layer), band, words, *ends))
        if records:
            break
    else:
        raise Absent("ratio.csv holds no equivalent shift (it needs the shifted conditions)")
    registration = run.get("data", "registration_px")
    measured = f" Measured registration of these pairs: {number(registration, 2)} px (median)." if registration else ""
    return Drawing(
        title=f"Gap told as misregistration ({condition})\n{_primary_sizes(run)}; bars: 95 % intervals",
        table=pd.DataFrame(records, columns=["layer", "band", "shift_px", "ci_low", "ci_high"]),
        draw=plots.equivalent_shift,
        height_cm=5.8,
        reading="How many input pixels the RGB image must be moved against itself to cost as much as the modality "
        "does. A triangle: more than the largest shift tested." + measured,
    )


def _convergence(run: Run) -> Drawing:
    if run.convergence is None or run.convergence.empty:
        raise Absent("the run folder has no convergence.csv, or it is empty")
    table = rows(run.convergence, condition=run.condition, measure=run.measure)
    layer = "all" if (table["layer"] == "all").any() else str(table["layer"].iloc[-1]) if len(table) else "all"
    ends = dict(zip(run.ends, ("low", "high"), strict=True))
    table = table[(table["layer"] == layer) & table["band"].isin(list(ends)) & (table["width"] > 0)]
    if table.empty:
        raise Absent(f"convergence.csv has no rows of condition {run.condition}, measure {run.measure}")
    if table["n"].nunique() < 2:
        raise Absent(f"there is one sample size only (n = {int(table['n'].iloc[0])}), nothing to compare it with")
    table = table.assign(band=table["band"].map(ends)).reset_index(drop=True)
    where = "all layers" if layer == "all" else f"layer {layer}"
    return Drawing(
        title=f"How sure at which size ({run.condition}, {where})\nn = {int(table['n'].max())} pairs at the most",
        table=table,
        draw=lambda t, ax: plots.convergence(t, ax, run.measure),
        height_cm=5.8,
        reading="Width of the 95 % interval of the mean when only n pairs are used. It falls with the number of "
        "groups rather than of pairs; a flat end says that more frames of the same sequences would not help.",
    )


def _primary_sizes(run: Run) -> str:
    table = rows(run.summary, condition=run.condition, measure=run.measure)
    return _sizes(run, table) if len(table) else "n not recorded"


FIGURES: dict[str, Callable[[Run], Drawing]] = {
    "ratio_by_layer": _ratio,
    "low_high_by_layer": _low_high,
    "layer_band_map": _map,
    "radial_profile": _radial,
    "controls": _controls,
    "equivalent_shift": _shift,
    "convergence": _convergence,
}
