"""Figures of detections: miss rate against false positives per image, precision against recall, a contact sheet.

The drawing functions take a tidy table and an `ax`, as in `freqkd_analysis.plots`; `write_figures` makes the tables,
and SVG, PNG and CSV of each figure.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from freqkd_analysis import plots, schema
from freqkd_analysis.errors import FreqkdError
from freqkd_analysis.figures import Drawing, render, write_drawn
from freqkd_train.metrics import coco, kaist
from freqkd_train.metrics.boxes import Detections, Truth
from freqkd_train.metrics.matching import FALSE, REMOVED, TRUE, by_score, match, ranked
from freqkd_train.score import Run, person_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from PIL import Image

COLOURS = (plots.BLUE, plots.ORANGE, plots.GREEN, plots.RED, plots.GREY, plots.INK)
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))
LEAST_MISS, LEAST_FPPI, MOST_FPPI = 0.01, 1e-3, 10.0
SHEET_FPPI = 1.0
"""Detections on a contact sheet go down to the score with so many false positives an image, as scores have no range."""
FOUND_COLOUR, WRONG_COLOUR, MISSED_COLOUR, IGNORED_COLOUR = "#3ddc84", "#ff5a36", "#ffd23f", "#a8a8a8"
Picture = Callable[[int], np.ndarray]
"""Image number -> (H, W) or (H, W, 3) in 0..1, native size."""


def write_figures(truth: Truth, runs: Sequence[Run], protocol: str, folder: Path, style: str = "matlab") -> list[Path]:
    """miss_rate (protocol kaist, Reasonable) and precision_recall (overlap 0.5) as SVG, PNG and CSV; the paths.

    style: of the miss rate, a name of `kaist.STYLES`.
    """
    drawings = {"precision_recall": _precision_recall_drawing(truth, runs, protocol)}
    if protocol == "kaist":
        drawings = {"miss_rate": _miss_rate_drawing(truth, runs, style), **drawings}
    return [path for name, drawing in drawings.items() for path in write_drawn(folder, render(name, drawing))]


def miss_rate_curves(table: pd.DataFrame, ax: Axes) -> Axes:
    """Miss rate against false positives per image, both axes logarithmic; dotted: the range that is averaged.

    Args:
        table: run (legend text), fppi, miss_rate, in the order of the curve.
    """
    for number, (name, part) in enumerate(table.groupby("run", sort=False)):
        fppi, missed = np.maximum(part["fppi"], LEAST_FPPI / 10), np.maximum(part["miss_rate"], LEAST_MISS / 10)
        ax.plot(fppi, missed, drawstyle="steps-post", color=COLOURS[number % len(COLOURS)],
                ls=DASHES[number % len(DASHES)], label=str(name))  # fmt: skip
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(LEAST_FPPI, MOST_FPPI)
    ax.set_ylim(LEAST_MISS, 1.0)
    ticks = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
    ax.set_yticks([], minor=True)
    ax.set_xticks([1e-3, 1e-2, 1e-1, 1, 10], ["0.001", "0.01", "0.1", "1", "10"])
    for edge in (kaist.POINTS[0], kaist.POINTS[-1]):
        ax.axvline(edge, color=plots.INK, lw=0.6, ls=(0, (1, 2)), zorder=1)
    ax.grid(True)
    ax.set_xlabel("false positives per image")
    ax.set_ylabel("miss rate (lower is better)")
    # On a ground between the dotted lines, which would run through its numbers, and the curves, which it must not hide.
    ground = {"frameon": True, "facecolor": "white", "framealpha": 1, "edgecolor": "none"}
    ax.legend(loc="lower left", **ground).set_zorder(1.9)
    return ax


def precision_recall_curves(table: pd.DataFrame, ax: Axes) -> Axes:
    """Precision against recall at overlap 0.5, the mean over classes at 101 recalls.

    Args:
        table: run (legend text), recall, precision.
    """
    for number, (name, part) in enumerate(table.groupby("run", sort=False)):
        ax.plot(part["recall"], part["precision"], color=COLOURS[number % len(COLOURS)],
                ls=DASHES[number % len(DASHES)], label=str(name))  # fmt: skip
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1.02)
    ax.grid(True)
    ax.set_xlabel("recall")
    ax.set_ylabel("precision (higher is better)")
    ax.legend(loc="lower left")
    return ax


def contact_sheet(
    truth: Truth, detections: Detections, picture: Picture, out: Path, n: int = 16, *,
    counted: np.ndarray | None = None, columns: int = 4, width: int = 320,
) -> Path:  # fmt: skip
    """A PNG of `n` images with boxes: found (green), false (red), missed (yellow), ignored (grey).

    Images are spread evenly over those that hold a counted box (all images, where fewer do). Detections are shown down
    to the score with one false positive an image over the whole list.

    Args:
        picture: image number -> pixels; see `Picture`.
        counted: (M,) boxes that count; default those not marked `ignore`.
        width: of one image on the sheet, px.
    Raises: FreqkdError when there is no image or `n` is below 1.
    """
    from PIL import Image, ImageDraw

    if n < 1 or not truth.names:
        raise FreqkdError(f"a contact sheet needs images: asked for {n} of {len(truth.names)}.")
    counted = ~truth.ignore if counted is None else counted
    outcome = _outcome(truth, detections, counted)
    with_boxes = np.unique(truth.image[counted])
    pool = with_boxes if len(with_boxes) >= min(n, len(truth.names)) else np.arange(len(truth.names))
    chosen = pool[np.linspace(0, len(pool) - 1, min(n, len(pool))).round().astype(int)]
    tiles = [_tile(truth, detections, outcome, counted, int(number), picture(int(number)), width) for number in chosen]
    columns = min(columns, len(tiles))
    height, label = max(tile.height for tile in tiles), 14
    rows = math.ceil(len(tiles) / columns)
    sheet = Image.new("RGB", (columns * (width + 4) + 4, rows * (height + label + 4) + 4 + label), plots.PAPER)
    pen = ImageDraw.Draw(sheet)
    x = 6
    for words, colour in (("found", FOUND_COLOUR), ("false", WRONG_COLOUR), ("missed", MISSED_COLOUR),
                          ("ignored", IGNORED_COLOUR)):  # fmt: skip
        pen.rectangle((x, 4, x + 8, 12), fill=colour, outline=plots.INK)
        pen.text((x + 12, 2), words, fill=plots.INK)
        x += 64
    for place, (number, tile) in enumerate(zip(chosen, tiles, strict=True)):
        left, top = 4 + place % columns * (width + 4), 4 + label + place // columns * (height + label + 4)
        sheet.paste(tile, (left, top + label))
        pen.text((left, top + 1), truth.names[int(number)][-width // 6 :], fill=plots.INK)
    content = io.BytesIO()
    sheet.save(content, format="PNG")
    with schema.atomic(out) as temporary:
        temporary.write_bytes(content.getvalue())
    return out


def pictures(names: Sequence[str], folder: Path) -> Picture:
    """Images by the names of an annotation file: of KAIST below FOLDER[/images]/setXX/VXXX/lwir, else by file name.

    Raises, when called: FreqkdError for a name without image, DataError for one that cannot be read.
    """
    from freqkd_analysis.data import decode

    def picture(number: int) -> np.ndarray:
        name = Path(names[number])
        bases = [base / name.parent / part for base in (folder, folder / "images") for part in ("lwir", "")]
        tries = (path for base in [*bases, folder] for path in sorted(base.glob(f"{name.stem}.*"))
                 if path.suffix.lower() in decode.SUFFIXES)  # fmt: skip
        found = next(tries, None)
        if found is None:
            raise FreqkdError(f"no image of {name} in {folder}; looked for {name.parent}/lwir/{name.stem}.* (KAIST) "
                              f"and {name.stem}.*, there and in images/.")  # fmt: skip
        pixels, _ = decode.read_ir(found, "image")
        return pixels

    return picture


def _outcome(truth: Truth, detections: Detections, counted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(D,) state of each detection, REMOVED too below the score shown, and (M,) which boxes a shown one found."""
    numbers, classes, counts_here = coco.rows_by_class(truth, counted)
    n = len(truth.classes)
    key = detections.image * n + detections.category
    order = ranked(key, detections.score, coco.MAX_DETECTIONS)
    rows = match(truth.image[numbers] * n + classes, truth.box[numbers], counts_here[None], key[order],
                 detections.box[order])  # fmt: skip
    state = np.full(len(key), REMOVED, dtype=np.int8)
    state[order] = rows.state[0]
    sort = by_score(detections.score)
    state[sort[np.cumsum(state[sort] == FALSE) > SHEET_FPPI * len(truth.names)]] = REMOVED
    found = np.zeros(len(truth.image), dtype=bool)
    found[numbers[rows.held[0][(rows.held[0] >= 0) & (state[order] == TRUE)]]] = True
    return state, found


def _tile(
    truth: Truth, detections: Detections, outcome: tuple[np.ndarray, np.ndarray], counted: np.ndarray, number: int,
    pixels: np.ndarray, width: int,
) -> Image.Image:  # fmt: skip
    from PIL import Image, ImageDraw

    state, found = outcome
    stored = np.asarray(pixels, dtype=float)
    colour = np.repeat(stored[..., None], 3, axis=2) if stored.ndim == 2 else stored
    dark, bright = np.percentile(colour, [0.5, 99.5])  # a thermal image uses a small part of its range
    stretched = (colour - dark) / max(bright - dark, 1e-6)
    image = Image.fromarray((np.clip(stretched, 0, 1) * 255).round().astype(np.uint8))
    scale = width / image.width
    image = image.resize((width, max(1, round(image.height * scale))))
    pen = ImageDraw.Draw(image)

    def boxes(which: np.ndarray, rows: np.ndarray, colour: str, line: int = 1) -> None:
        for x, y, w, h in rows[which] * scale:
            pen.rectangle((x, y, max(x, x + w), max(y, y + h)), outline=colour, width=line)

    here, there = truth.image == number, detections.image == number
    boxes(here & ~counted, truth.box, IGNORED_COLOUR)
    boxes(here & counted & ~found, truth.box, MISSED_COLOUR, 2)
    boxes(there & (state == FALSE), detections.box, WRONG_COLOUR)
    boxes(there & (state == TRUE), detections.box, FOUND_COLOUR, 2)
    return image


def _miss_rate_drawing(truth: Truth, runs: Sequence[Run], style: str) -> Drawing:
    import pandas as pd

    parts = []
    for run in runs:
        curve = kaist.curves(truth, run.detections, ["Reasonable"], person=person_of(truth))["Reasonable", "all"]
        value = kaist.log_average(curve, kaist.STYLES[style])
        recall = curve.recall if curve.counted else np.full(len(curve.true), np.nan)
        kept = _corners(curve.false)
        parts.append(pd.DataFrame({
            "run": f"{run.name}, {100 * value:.2f} %", "fppi": np.r_[0.0, curve.fppi[kept]],
            "miss_rate": np.r_[1.0, 1.0 - recall[kept]],
        }))  # fmt: skip
    return Drawing(
        "Miss rate, Reasonable, all images", pd.concat(parts, ignore_index=True), miss_rate_curves, 7.5,
        "Lower is better. The figure in the legend averages the curve between the dotted lines in the logarithm.",
    )  # fmt: skip


def _corners(false: np.ndarray) -> np.ndarray:
    """The last position at each number of false positives: all that a step curve needs."""
    return np.flatnonzero(np.r_[false[1:] != false[:-1], True]) if len(false) else np.zeros(0, dtype=int)


def _precision_recall_drawing(truth: Truth, runs: Sequence[Run], protocol: str) -> Drawing:
    import pandas as pd

    counted = ~truth.ignore
    if protocol == "kaist":
        truth, counted = coco.readings(truth, person_of(truth))["reasonable"]
    parts = []
    for run in runs:
        recall, precision = coco.precision_recall(truth, run.detections, counted)
        parts.append(pd.DataFrame({
            "run": f"{run.name}, AP50 {100 * float(np.mean(precision)):.2f}", "recall": recall, "precision": precision,
        }))  # fmt: skip
    rule = "Reasonable, rest ignored" if protocol == "kaist" else "all classes"
    return Drawing(
        f"Precision and recall at overlap 0.5, {rule}", pd.concat(parts, ignore_index=True), precision_recall_curves,
        7.0, "Higher is better. AP50 is the mean height of the curve.",
    )  # fmt: skip
