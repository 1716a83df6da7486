"""From the command line's words to one configuration, and what the commands print. Nothing is trained here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freqkd_analysis import options, shards
from freqkd_analysis.errors import FreqkdError, RunError, nearest
from freqkd_analysis.provenance import plain
from freqkd_analysis.runfolder import measured, number
from freqkd_train import config as files
from freqkd_train import recipes
from freqkd_train.config import Config, ConfigError

if TYPE_CHECKING:
    import pandas as pd

    from freqkd_train import score
    from freqkd_train.result_files import Annotations


def settings(given: Mapping[str, Any], changes: Sequence[str], file: Path | None = None, recipe: str = "",
             preset: str = "", resumed: Path | None = None) -> Config:  # fmt: skip
    """A file, recipe or resumed run's settings, then options, then --set.

    Args: given: dotted key -> value of the options that were typed.

    Example:
        >>> settings({"loss.name": "uniform", "data.size": "64"}, ["training.epochs=3"]).data.size
        (64, 64)
    """
    if sum(map(bool, (file, recipe or preset))) > 1:
        raise ConfigError("expected --config or --recipe, got both; change single settings with --set.")
    if resumed is not None and not (file or recipe or preset):
        shards.check_place(resumed, True, *files.PLACE)
        start = files.read(resumed / "config.yaml")
    elif file is not None:
        start = files.read(file)
    else:
        start = recipes.make(recipe or "kaist", preset or "compact") if recipe or preset else Config()
    typed = dict(given)
    if "data.size" in typed:
        typed["data.size"] = list(options.size(typed["data.size"]))
    # --weights-from alone says which loss is meant.
    if typed.get("loss.weights_from") and "loss.name" not in typed and start.loss.name != "measured":
        typed["loss.name"] = "measured"
    return start.updated({**typed, **dict(map(files.assignment, changes))})


def folder(out: Path | None, resume: bool) -> Path:
    """--out, or runs/TIME-distill; with `resume` the newest distillation in runs/ that has no student yet."""
    if out is not None:
        return out
    if not resume:
        return Path("runs") / f"{datetime.now():%Y-%m-%d-%H%M%S}-distill"
    found = [path.parent for path in Path("runs").glob("*/config.yaml") if not (path.parent / "manifest.json").exists()]
    if not found:
        raise RunError("no interrupted distillation in runs/; name one with --out.")
    return max(found, key=lambda path: (path / "config.yaml").stat().st_mtime)


def named(what: str, preset: str) -> Config:
    """The settings of a recipe, a YAML file, or a run folder.

    Example:
        >>> named("controls:grey", "compact").data.teacher_input
        'grey'
    """
    path = Path(what)
    if path.is_dir():
        return files.read(path / "config.yaml")
    if path.is_file():
        return files.read(path)
    if what.partition(":")[0] not in recipes.RECIPES:
        raise ConfigError(f'expected a recipe, a YAML file or a run folder, got "{what}".'
                          f"{nearest(what, recipes.RECIPES)}")  # fmt: skip
    return recipes.make(what, preset)


def losses() -> list[dict[str, Any]]:
    """Every loss: its kind, published weight, source."""
    from freqkd_train.baselines import BASELINES
    from freqkd_train.losses import PRESETS

    rows: list[dict[str, Any]] = []
    for name, preset in PRESETS.items():
        rows.append({"loss": name, "kind": "FreqKD", "weight": 1.0, "about": _words(preset)})
    for name, found in BASELINES.items():
        rows.append({"loss": name, "kind": "baseline", "weight": found.weight, "about": found.source})
    return [*rows, {"loss": "none", "kind": "control", "weight": 0.0, "about": "nothing is trained"}]


def _words(preset: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {' '.join(map(str, value)) if isinstance(value, list | tuple) else value}"
                     for key, value in preset.items())  # fmt: skip


def show(found: Mapping[str, Any], as_json: bool) -> None:
    """The end of a run: the held-out change as a table on stdout, files on stderr; or all of it as JSON."""
    from freqkd_analysis import terminal

    if as_json:
        print(json.dumps(plain(found)))
        return
    if found["heldout"]:
        terminal.show([_shown(row) for row in found["heldout"]], False)
    else:
        print(f"steps: {found['steps']}")
    terminal.say(str(found["student"]))


def _shown(row: Mapping[str, Any]) -> dict[str, str]:
    return {"measure": row["measure"], "band": row["band"], "before": number(row["before"]),
            "after": number(row["after"]), "change [95 %]": measured(row["change"], row["ci_low"], row["ci_high"]),
            "held-out pairs": f"{row['n']} in {row['groups']} groups"}  # fmt: skip


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers from a comma-separated list.

    Example:
        >>> numbers("0,1,2")
        (0, 1, 2)
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and part.isascii() for part in parts):
        raise ConfigError(f'expected seeds such as 0,1,2, got "{text}".')
    return tuple(dict.fromkeys(map(int, parts)))


def show_comparison(table: pd.DataFrame, out: Path | None, as_json: bool) -> None:
    """Method x metric on stdout, files on stderr; or all rows as JSON."""
    from freqkd_analysis import terminal
    from freqkd_train import compare

    if as_json:
        print(json.dumps(plain(table.to_dict("records"))))
        return
    if table.attrs["unlike"]:
        print(f"Not evaluated alike:\n{table.attrs['unlike']}\n")
    head, *rows = compare.cells(table)
    terminal.show([dict(zip(head, row, strict=True)) for row in rows], False)
    if table.attrs["note"]:
        print(f"note: {table.attrs['note']}")
    if out is not None:
        terminal.say(str(out))


def show_metrics(found: Mapping[str, Any], out: Path, as_json: bool) -> None:
    """The figures of one evaluation on stdout."""
    from freqkd_analysis import terminal
    from freqkd_train import score

    if as_json:
        print(json.dumps(plain(found)))
        return
    if found["task"] == "segment":
        terminal.show([{"images": name, **{k: v for k, v in part.items() if k.startswith(("miou", "macc"))}}
                       for name, part in found["figures"].items()], False)  # fmt: skip
    else:
        print(score.text(found))
    terminal.say(str(out))


def check_drawing(draw: int, images: Path | None, curves: Path | None) -> None:
    """Raises FreqkdError for a contact sheet without images or without a folder to lie in."""
    if draw and (images is None or curves is None):
        missing = "the images: give --images FOLDER" if images is None else "a folder: give --figures FOLDER"
        raise FreqkdError(f"--draw {draw} needs {missing}.")


def draw_scored(read: Annotations, runs: Sequence[score.Run], protocol: str, style: str, curves: Path,
                draw: int, images: Path | None) -> None:  # fmt: skip
    """The curves of detections, and a contact sheet of each run where one is asked for.

    Raises: FreqkdError for a folder of images that lacks one to be drawn.
    """
    from freqkd_analysis import terminal
    from freqkd_train import score, score_figures

    drawn = score_figures.write_figures(read.truth, runs, score.protocol_of(read, protocol), curves, style)
    if draw and images is not None:
        picture = score_figures.pictures(read.truth.names, images)
        for one in runs:
            path = curves / f"{one.name.replace('/', '_')}_detections.png"
            drawn.append(score_figures.contact_sheet(read.truth, one.detections, picture, path, draw))
    for path in drawn:
        terminal.say(str(path))
