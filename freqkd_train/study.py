"""The downstream recipes: which distillations, which fine-tuning, on which data; and their stages in order.

analyse -> distil -> finetune -> evaluate -> compare. Each stage of each method and seed is a run folder under --out;
one that is there with the same settings is used again, whatever interrupted the study.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freqkd_analysis import schema
from freqkd_analysis.errors import FreqkdError, nearest
from freqkd_train import annotations as annotated_images
from freqkd_train import compare, config, evaluate, finetune, job, recipes
from freqkd_train.config import Config, ConfigError, Section
from freqkd_train.downstream import Downstream

if TYPE_CHECKING:
    import pandas as pd

Say = Callable[[str], None]

CONTROLS = ("shuffled", "ir_teacher", "grey")
METHODS: dict[str, dict[str, Any]] = {
    "none": recipes.CONTROLS["none"],
    "mse": recipes.CONTROLS["uniform_matched"],
    "cosine": {"loss.name": "cosine"},
    "response": recipes.CONTROLS["none"],
    "freqkd": {"loss.name": "released"},
    "measured": {"loss.name": "measured"},
    **{name: recipes.CONTROLS[name] for name in CONTROLS},
    "rgb": recipes.CONTROLS["none"],
}
"""Arms of a study. `response`: no distillation of features, but of a detector trained on visible images in the
fine-tuning; `rgb`: that detector, on visible images, for reference. Every arm has the same fine-tuning, merge and
consistency term."""
STAGES = ("analyse", "distil", "finetune", "evaluate", "compare")
SCENES = "pairs=60,groups=12,size=640x512"
"""The synthetic data of a study without data."""
TASKS = {"kaist": "detect", "flir": "detect", "mfnet": "segment", "resnet50": "detect"}


@dataclass(frozen=True)
class Study:
    """A recipe with its choices. data: layout and root of annotated pairs, or `synthetic`."""

    recipe: str
    data: str
    preset: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    model: str = ""
    weights: str = ""
    device: str = "auto"


def methods(text: str, controls: bool) -> tuple[str, ...]:
    """Arms from a comma-separated list, the controls with them when asked.

    Example:
        >>> methods("none,freqkd", False)
        ('none', 'freqkd')
    """
    asked = [part.strip() for part in text.split(",") if part.strip()]
    for name in asked:
        if name not in METHODS:
            raise ConfigError(f'no method "{name}"; expected some of {", ".join(METHODS)}.{nearest(name, METHODS)}')
    return tuple(dict.fromkeys([*asked, *(CONTROLS if controls else ())]))


def distillation(study: Study, method: str, seed: int, spec: str, weights_from: Path | None) -> Config:
    """Settings of stage 1 for one arm."""
    base = recipes.make("resnet50" if study.recipe == "resnet50" else "kaist", study.preset)
    changes: dict[str, Any] = {"recipe": f"{study.recipe}/{method}", "seed": seed, "data.spec": spec,
                               "training.device": study.device, **METHODS[method]}  # fmt: skip
    if study.preset == "smoke":
        changes |= {"data.limit": 0, "data.holdout": 0.25, "data.size": [192, 240], "training.lr": 1e-3}
    if study.model:
        changes |= {"teacher.name": study.model, "teacher.layers": "all"}
    if study.weights:
        changes["teacher.weights"] = study.weights
    if method == "measured":
        changes["loss.weights_from"] = str(weights_from)
    return base.updated(changes)


def finetuning(study: Study, method: str, seed: int, spec: str, stage1: Path, out: Path) -> Downstream:
    """Settings of stage 2 for one arm: the same for all but the student's weights."""
    made = config.read(stage1 / "config.yaml")
    task = TASKS[study.recipe]
    smoke = study.preset == "smoke"
    head: dict[str, Any] = {"kind": "light" if task == "segment" else "faster_rcnn",
                            "train": "frozen" if task == "segment" else "full"}  # fmt: skip
    if study.preset == "paper" and task == "detect":
        head["neck"] = "single"
    if smoke:
        head |= {"channels": 64, "hidden": 128, "regions": 64}
    rates = {"detect": (5e-5, 0.1), "segment": (1e-3, 1.0)}[task]
    training: dict[str, Any] = {"epochs": 12 if task == "detect" else 20, "batch": 8, "lr": rates[0], "clip": rates[1],
                                "device": study.device}  # fmt: skip
    if smoke:
        training |= {"epochs": 8, "batch": 4, "lr": 1e-3, "clip": 1.0}
    return Downstream.model_validate({
        "task": task, "method": method, "seed": seed, "model": made.student.name,
        "weights": str(stage1 / "student.safetensors"), "modality": "rgb" if method == "rgb" else "ir",
        "teacher": str(out / f"finetune/rgb-{seed}") if method == "response" else "",
        "targets": {"spec": spec},
        "data": {"size": list(made.data.size), "geometry": "pad", "holdout": 0.2 if smoke else 0.1, "flip": 0.5},
        "head": head, "training": training,
    })  # fmt: skip


def annotated(study: Study, out: Path, say: Say) -> str:
    """The spec of the annotated data; without data, synthetic scenes are written first."""
    if study.data != "synthetic":
        return study.data
    from freqkd_analysis import terminal
    from freqkd_analysis.data import synthetic

    layout = {"flir": "flir", "mfnet": "mfnet"}.get(study.recipe, "kaist")
    root = out / "data"
    if not (root / ".whole").exists():
        say(f"no data given: writing synthetic scenes in the layout of {layout}; they show the tool, not the world")
        shutil.rmtree(root, ignore_errors=True)
        with terminal.counting("rendering") as count:
            synthetic.write(root, layout, SCENES, progress=count)
        (root / ".whole").touch()
    return f"{layout}:{root}"


def training_pairs(spec: str, out: Path) -> str:
    """The pairs to distil on: KAIST's train-all-02 where it is there, else those of the annotated training split.

    They are written down as a list, so that no test frame can be among them.
    """
    layout, _, root = spec.partition(":")
    if layout == "kaist" and (Path(root) / "imageSets" / "train-all-02.txt").is_file():
        return f"kaist:{root}:train-all-02"
    target = annotated_images.load(spec, "train")
    path = out / "train_pairs.csv"
    lines = io.StringIO()
    table = csv.writer(lines, lineterminator="\n")
    table.writerow(["rgb", "ir", "id", "group", "time"])
    for record in target.records:
        table.writerow([record.rgb.resolve(), record.ir.resolve(), record.id, record.group, record.time])
    schema.write_text(path, lines.getvalue())
    return f"csv:{path}"


def stage(folder: Path, settings: Any, work: Callable[[Path, bool], None], say: Say, again: bool = False) -> None:
    """Do one stage unless its folder holds it with the same settings; one that was interrupted goes on."""
    told = settings.model_dump(mode="json") if isinstance(settings, Section) else settings
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
    mark = folder.parent / f".{folder.name}.json"
    found = json.loads(mark.read_text()) if mark.is_file() else {}
    same = found.get("settings") == digest and folder.exists()
    if same and found.get("done") and not again:
        say(f"{folder.parent.name}/{folder.name}: there already")
        return
    if folder.exists() and (not same or again):
        shutil.rmtree(folder)
    say(f"{folder.parent.name}/{folder.name}")
    schema.write_text(mark, json.dumps({"settings": digest, "done": False}))
    work(folder, same and folder.exists() and not again)
    schema.write_text(mark, json.dumps({"settings": digest, "done": True}))


def run(study: Study, out: Path, say: Say, command: Sequence[str], start: str = "") -> pd.DataFrame:
    """Every stage of every arm and seed; returns the comparison.

    Args: start: redo from this stage on. Raises: FreqkdError of the stage that cannot go on.
    """
    if start and start not in STAGES:
        raise FreqkdError(f'expected --from {"|".join(STAGES)}, got "{start}".{nearest(start, STAGES)}')
    redo = {name: bool(start) and i >= STAGES.index(start) for i, name in enumerate(STAGES)}
    spec = annotated(study, out, say)
    train_pairs = training_pairs(spec, out)
    arms = list(study.methods)
    if "response" in arms and "rgb" not in arms:
        arms.insert(0, "rgb")
    arms.sort(key=lambda name: name != "rgb")  # the response arm needs that detector
    evaluated = []
    for seed in study.seeds:
        for method in arms:
            name = f"{method}-{seed}"
            weights_from = _analysed(study, out, train_pairs, say, redo["analyse"]) if method == "measured" else None
            settings = distillation(study, method, seed, train_pairs, weights_from)
            first = out / "distil" / name
            stage(first, settings, partial(_distil, settings, say, command), say, redo["distil"])
            tuned = finetuning(study, method, seed, spec, first, out)
            second = out / "finetune" / name
            stage(second, tuned, partial(_finetune, tuned, say, command), say, redo["finetune"])
            third = out / "evaluate" / name
            told = {"run": str(second), "of": tuned.model_dump(mode="json")}
            stage(third, told, partial(_evaluate, second, study.device), say, redo["evaluate"])
            evaluated.append(third)
    table = compare.compare(evaluated)
    compare.write(table, out / "compare")
    return table


def _distil(settings: Config, say: Say, command: Sequence[str], folder: Path, resume: bool) -> None:
    job.run(settings, folder, resume, say, command)


def _finetune(settings: Downstream, say: Say, command: Sequence[str], folder: Path, resume: bool) -> None:
    finetune.run(settings, folder, resume, say, command)


def _evaluate(model: Path, device: str, folder: Path, resume: bool) -> None:
    evaluate.run(model, folder, device=device)


def _analysed(study: Study, out: Path, spec: str, say: Say, again: bool) -> Path:
    """The analysis of the training pairs with the teacher, for measured weights."""
    from freqkd_analysis import layers, plan, terminal

    base = distillation(study, "freqkd", 0, spec, None)
    settings = plan.Settings(
        pairs=500, data=spec, model=base.teacher.name, weights=base.teacher.weights, layers=base.teacher.layers,
        size=base.data.size, geometry=base.data.geometry, conditions=("paired", "shuffled", "mean_removed"),
    )  # fmt: skip
    folder = out / "analyse" / "teacher"

    def work(place: Path, resume: bool) -> None:
        layers.run(settings, plan.Machine(study.device), place, resume, say, terminal.progress, ["freqkd-train"])

    stage(folder, vars(settings) | {}, work, say, again)
    return folder
