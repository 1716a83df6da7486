"""The arms of a downstream study: which student each starts from, and the settings of its two stages.

Arms differ in their distillation alone: fine-tuning, merge and consistency term are the same for all. An arm whose name
says otherwise is one that the FreqKD paper compares, and is named for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from freqkd_analysis.errors import FreqkdError, nearest
from freqkd_train import config, distill, recipes
from freqkd_train.config import Config, ConfigError
from freqkd_train.downstream import Downstream

CONTROLS = ("shuffled", "ir_teacher", "grey")
STUDENTS: dict[str, dict[str, Any]] = {
    "none": recipes.CONTROLS["none"],
    "mse": recipes.CONTROLS["uniform_matched"],
    "cosine": {"loss.name": "cosine"},
    "freqkd": {"loss.name": "released"},
    "measured": {"loss.name": "measured"},
    **{name: recipes.CONTROLS[name] for name in CONTROLS},
    "paper_loss": {"loss.name": "paper"},
    "low_only": {"loss.name": "low_only"},
    "high_only": {"loss.name": "high_only"},
    "mse_high": recipes.high_form("mse", 0.1),
    "signed_high": recipes.high_form("signed_log", 0.1),
    "precision": {"loss.name": "measured", "loss.rule": "precision"},
    **{f"cutoff_{percent}": recipes.cutoff(str(percent / 100)) for percent in (10, 25, 75)},
}
"""Stage 1: the student, and what its distillation changes of the recipe. From `paper_loss` on, ablations of
FreqKD's loss: as its text has it, one band alone, another form of the high band, the other rule of weights, other
cut-offs in percent of Nyquist."""
TASKS = {"kaist": "detect", "flir": "detect", "mfnet": "segment", "resnet50": "detect"}


@dataclass(frozen=True)
class Arm:
    """student: of `STUDENTS`. tasks: it is for. tuned: the finished fine-tuning whose backbone is taken instead.
    changes: of stage 2."""

    student: str
    tasks: tuple[str, ...] = ("detect", "segment")
    tuned: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)


ARMS: dict[str, Arm] = {
    **{name: Arm(name) for name in STUDENTS},
    "rgb": Arm("none", changes={"modality": "rgb"}),
    "response": Arm("none", ("detect",)),
    "none_paper": Arm("none", ("detect",), changes={"head.consistency": 0.0}),
    "none_stage2": Arm("none", ("segment",), "none"),
    "freqkd_stage2": Arm("freqkd", ("segment",), "freqkd"),
}
"""`rgb`: a detector of visible images, for reference. `response`: no distillation of features, but of that detector in
the fine-tuning. `none_paper`: the paper's baseline, which lacks the consistency term that its own arm has. `*_stage2`:
the backbone of a finished detector, as in the paper's segmentation."""


@dataclass(frozen=True)
class Study:
    """A recipe with its choices.

    data: layout and root of annotated images, or `synthetic`. distil_on: pairs of stage 1, where not those of the
    training split. students: another study, whose students are taken. changes: `distil.KEY=VALUE` and
    `finetune.KEY=VALUE`, of any setting.
    """

    recipe: str
    data: str
    preset: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    model: str = ""
    weights: str = ""
    device: str = "auto"
    distil_on: str = ""
    students: str = ""
    allow_leak: bool = False
    changes: tuple[str, ...] = ()


def methods(text: str, controls: bool) -> tuple[str, ...]:
    """Arms from a comma-separated list, the controls with them when asked.

    Example:
        >>> methods("none,freqkd", False)
        ('none', 'freqkd')
    """
    asked = [part.strip() for part in text.split(",") if part.strip()]
    for name in asked:
        if name not in ARMS:
            raise ConfigError(f'no method "{name}"; expected some of {", ".join(ARMS)}.{nearest(name, ARMS)}')
    if not asked:
        raise ConfigError(f"expected some methods of {', '.join(ARMS)}.")
    return tuple(dict.fromkeys([*asked, *(CONTROLS if controls else ())]))


def needs_analysis(student: str) -> bool:
    """Whether its band weights come from an analysis of the training pairs."""
    return STUDENTS[student].get("loss.name") == "measured"


def distillation(study: Study, student: str, seed: int, spec: str, weights_from: Path | None) -> Config:
    """Settings of stage 1 for one student, on the pairs of `spec`."""
    base = recipes.make("resnet50" if study.recipe == "resnet50" else "kaist", study.preset)
    changes: dict[str, Any] = {"recipe": f"{study.recipe}/{student}", "seed": seed, "data.spec": spec,
                               "training.device": study.device, **STUDENTS[student]}  # fmt: skip
    if study.preset == "smoke":
        changes |= {"data.limit": 0, "data.holdout": 0.25, "data.size": [192, 240], "training.lr": 1e-3}
    if study.model:
        changes |= {"teacher.name": study.model, "teacher.layers": "all"}
    if study.weights:
        changes["teacher.weights"] = study.weights
    if needs_analysis(student):
        changes["loss.weights_from"] = str(weights_from)
    given = _given(study.changes, "distil")
    if changes.get("loss.name") == distill.NONE:  # no loss, so nothing of one is written down as if it were used
        given = {key: value for key, value in given.items() if not key.startswith("loss.")}
    return base.updated(changes).updated(given)


def finetuning(study: Study, method: str, seed: int, spec: str, made: Config, weights: Path, out: Path) -> Downstream:
    """Settings of stage 2 for one arm: the same for all but the weights it starts from.

    Args: made: settings of the distillation that left the student. weights: of the backbone. out: the study's folder.
    """
    task = TASKS[study.recipe]
    smoke = study.preset == "smoke"
    head: dict[str, Any] = {"kind": "light" if task == "segment" else "faster_rcnn",
                            "train": "frozen" if task == "segment" else "full"}  # fmt: skip
    if study.preset == "paper" and task == "detect" and study.recipe != "resnet50":
        head["neck"] = "single"  # of a plain ViT; the paper's ResNet-50 has a feature pyramid
    if smoke:
        head |= {"channels": 64, "hidden": 128, "regions": 64}
    rates = {"detect": (5e-5, 0.1), "segment": (1e-3, 1.0)}[task]
    training: dict[str, Any] = {"epochs": 12 if task == "detect" else 20, "batch": 8, "lr": rates[0], "clip": rates[1],
                                "device": study.device}  # fmt: skip
    if smoke:
        training |= {"epochs": 8, "batch": 4, "lr": 1e-3, "clip": 1.0}
    settings = config.parsed(Downstream, {
        "task": task, "method": method, "seed": seed, "model": made.student.name or made.teacher.name,
        "weights": str(weights), "teacher": str(out / f"finetune/rgb-{seed}") if method == "response" else "",
        "stage1": {"pairs": made.data.spec, "exclude": made.data.exclude},
        "targets": {"spec": spec, "allow_leak": study.allow_leak},
        "data": {"size": list(made.data.size), "geometry": "pad", "holdout": 0.2 if smoke else 0.1, "flip": 0.5},
        "head": head, "training": training,
    })  # fmt: skip
    settings = config.updated(settings, _given(study.changes, "finetune"), "finetune.")
    return config.updated(settings, ARMS[method].changes)


def check(study: Study) -> None:
    """All words of a study, before anything is done.

    Raises: ConfigError for an arm of another task, an unknown preset, a change that names neither stage, or no setting
        of it, whose value does not fit, or whose loss cannot be built: the arm is named.
    """
    task = TASKS[study.recipe]
    for name in study.methods:
        if task not in ARMS[name].tasks:
            fit = [other for other, arm in ARMS.items() if task in arm.tasks]
            raise ConfigError(f"the method {name} is not for {study.recipe}, whose task is to {task}; for it are "
                              f"{', '.join(fit)}.")  # fmt: skip
    for word in study.changes:
        key, _ = config.assignment(word)
        stage, _, rest = key.partition(".")
        if stage not in ("distil", "finetune"):
            raise ConfigError(f'expected --set distil.KEY=VALUE or finetune.KEY=VALUE, got "{word}".'
                              f"{nearest(stage, ('distil', 'finetune'))}")  # fmt: skip
        known = config.all_keys(Config if stage == "distil" else Downstream)
        if rest not in known:
            raise ConfigError(f'no setting "{rest}" of the stage {stage}.{nearest(rest, known)}')
    for name in study.methods:
        student = ARMS[name].student
        try:
            made = distillation(study, student, 0, "synthetic", Path("RUN") if needs_analysis(student) else None)
            distill.check_loss(made.loss, made.data.size)
            finetuning(study, name, 0, "synthetic", made, Path(), Path())
        except FreqkdError as error:
            raise ConfigError(f"the arm {name}: {error}") from None


def _given(changes: Sequence[str], stage: str) -> dict[str, Any]:
    pairs = dict(map(config.assignment, changes))
    return {key.removeprefix(f"{stage}."): value for key, value in pairs.items() if key.startswith(f"{stage}.")}
