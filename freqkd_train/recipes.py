"""Recipes: one function an experiment, which returns the whole configuration. Its docstring is the lab card.

`preset` is the scale of a recipe: `paper` keeps the FreqKD release's numbers (arXiv 2606.11572; its stage 1 as
configured), `compact` fits one 24 GB GPU in hours, `smoke` a minute on two cores. A recipe with a value takes it after
a colon on the command line: `--recipe ablation_cutoff:0.25`. The data come from --data.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from freqkd_analysis.errors import nearest
from freqkd_train.config import Config, ConfigError

PRESETS = ("paper", "compact", "smoke")

_PAPER: dict[str, Any] = {
    "data.size": [512, 640], "data.geometry": "pad", "data.holdout": 0.0, "data.flip": 0.5,
    "teacher.name": "vit_large_patch14_reg4_dinov2.lvd142m", "teacher.layers": "7,15,19,21,23",
    "student.adapt": "lora", "student.rank": 64, "student.alpha": 64.0, "student.dropout": 0.05, "student.merge": 0.5,
    "loss.name": "released",
    "training.epochs": 12, "training.batch": 32, "training.accumulate": 4, "training.lr": 2e-4,
    "training.weight_decay": 1e-4, "training.warmup": 500.0, "training.warmup_start": 0.01, "training.min_lr": 1e-7,
    "training.clip": 1.0,
}  # fmt: skip
_COMPACT: dict[str, Any] = _PAPER | {
    "data.size": [448, 560], "data.geometry": "crop", "data.holdout": 0.1,
    "teacher.name": "vit_small_patch14_reg4_dinov2.lvd142m", "teacher.layers": "3,7,9,10,11",
    "student.rank": 16, "student.alpha": 16.0, "training.warmup": 0.05, "training.accumulate": 2,
    "training.precision": "bf16",
}  # fmt: skip


def kaist(preset: str = "compact") -> Config:
    """Stage 1 on KAIST: the teacher's features of the visible image into a LoRA student of the infrared image.

    Source: FreqKD, its release's stage-1 configuration (preset `paper`). Deviations of `paper`: the rate falls along
    the cosine every step instead of every epoch; one process with accumulation instead of four GPUs.
    Command: freqkd-train distill --recipe kaist --preset paper --data kaist:KAIST:train-all-02
    Hours: 4 x A40 in the release, not told; not measured here.
    Expected: no score of its own; the detector built on it reaches 64.1 mAP50 in the paper, 61.7 without it.
    """
    changes = _PAPER if preset == "paper" else _COMPACT
    config = Config().updated({"recipe": "kaist", **changes})
    return smoke(config) if preset == "smoke" else config


def resnet50(preset: str = "compact") -> Config:
    """Cross-architecture: a ViT teacher into a ResNet-50 student, four stages, 1x1 projectors, all weights trained.

    Source: FreqKD, its release's ResNet-50 configuration (blocks 7, 15, 21, 23 to stages 0 to 3; preset `paper`).
    Command: freqkd-train distill --recipe resnet50 --preset paper --data kaist:KAIST:train-all-02
    Hours: not told in the release; not measured here.
    Expected: +1.0 mAP50 of the detector in the paper.
    """
    layers = "7,15,21,23" if preset == "paper" else "3,7,9,11"
    return kaist(preset).updated({
        "recipe": "resnet50", "teacher.layers": "all" if preset == "smoke" else layers,
        "student.name": "resnet18" if preset == "smoke" else "resnet50.a1_in1k", "student.layers": "1,2,3,4",
        "student.weights": "random" if preset == "smoke" else "auto", "student.adapt": "full",
        "student.merge": 1.0 if preset == "smoke" else 0.5,
        "training.lr": 1e-4, "training.batch": 4 if preset == "smoke" else 16,
    })  # fmt: skip


def ablation_cutoff(value: str = "0.5", preset: str = "compact") -> Config:
    """Cut-off of the low band: .1, .25, .5 or .75 of Nyquist, in the release's rectangle.

    Source: FreqKD's ablation. Command: freqkd-train distill --recipe ablation_cutoff:0.25
    Expected: all four above 61.7 mAP50 in the paper, .5 the best; the values are not published.
    """
    return _changed(kaist(preset), "ablation_cutoff", value, cutoff(value))


def cutoff(value: str) -> dict[str, Any]:
    """Settings of another cut-off of the released loss, as a share of Nyquist."""
    return {"loss.name": "released", "loss.bands": f"released:{value}"}


def ablation_bands(value: str = "low_only", preset: str = "compact") -> Config:
    """Which band is supervised: released (both), low_only, high_only or uniform (no decoupling).

    Source: FreqKD's ablation. Command: freqkd-train distill --recipe ablation_bands:high_only
    Expected: about +0.9 mAP50 for the low band alone and -3.3 for the high band alone in the paper.
    """
    return _changed(kaist(preset), "ablation_bands", value, {"loss.name": value})


def ablation_rank(value: str = "16", preset: str = "compact") -> Config:
    """LoRA rank 16, 64 or 128 with alpha = rank, or full fine-tuning at the same rate (`full`).

    Source: FreqKD's ablation. Command: freqkd-train distill --recipe ablation_rank:64
    Expected: not published. For `full` the merge works on all weights, so rank and merge are confounded there.
    """
    full: dict[str, Any] = {"student.adapt": "full"}
    rank = full if value == "full" else {"student.rank": int(value), "student.alpha": float(value)}
    return _changed(kaist(preset), "ablation_rank", value, rank)


def ablation_merge(value: str = "0.5", preset: str = "compact") -> Config:
    """Share of the change that the exported student keeps: .25, .5, .75 or 1.

    Source: FreqKD's ablation. Command: freqkd-train distill --recipe ablation_merge:1
    Expected: not published.
    """
    return _changed(kaist(preset), "ablation_merge", value, {"student.merge": float(value)})


def ablation_high_form(value: str = "mse,0.1", preset: str = "compact") -> Config:
    """Form and weight of the high band crossed: FORM,WEIGHT; the low band stays `mse` at weight 1.

    Source: METHOD of this project: splits sign-blindness from the small weight. Weights 0, 0.01, 0.1, 1.
    Command: freqkd-train distill --recipe ablation_high_form:signed_log,0.1
    Expected: unknown; nobody has published it.
    """
    form, _, weight = value.partition(",")
    return _changed(kaist(preset), "ablation_high_form", value, high_form(form, float(weight or 0.1)))


def high_form(form: str, weight: float) -> dict[str, Any]:
    """Settings of another form and weight of the released loss's high band."""
    return {"loss.name": "released", "loss.forms": ["mse", form], "loss.weights": [1.0, weight]}


CONTROLS: dict[str, dict[str, Any]] = {
    "none": {"loss.name": "none"},
    "shuffled": {"data.pairing": "shuffled"},
    "ir_teacher": {"data.teacher_input": "ir"},
    "grey": {"data.teacher_input": "grey"},
    "random_modes": {"loss.bands": "random:0", "loss.forms": ["mse", "mse"], "loss.weights": [1.0, 0.0]},
    "uniform_matched": {"loss.name": "uniform", "loss.match_gradient": "released"},
}
"""What each control changes: no distillation (merge and consistency remain); visible images of other groups; the
teacher on the infrared image; on the grey visible image; a random half of the modes, of about equal energy; plain MSE
at FreqKD's gradient."""


def controls(value: str = "shuffled", preset: str = "compact") -> Config:
    """What else could explain a gain: none, shuffled, ir_teacher, grey, random_modes or uniform_matched.

    Source: METHOD of this project. Equal compute is a control of the fine-tuning that follows, not of this stage.
    Command: freqkd-train distill --recipe controls:shuffled
    Expected: unknown; no source reports them.
    """
    return _changed(kaist(preset), "controls", value, CONTROLS[value])


def smoke(config: Config) -> Config:
    """Any configuration shrunk to about a minute on two cores: demo network, 24 synthetic pairs, two short epochs."""
    return config.updated({
        "data.spec": "synthetic:pairs=24,groups=12", "data.size": [96, 128], "data.geometry": "crop", "data.limit": 24,
        "data.holdout": 0.34, "teacher.name": "freqkd_demo", "teacher.layers": "1,3,5,7",
        "student.rank": 4, "student.alpha": 4.0, "training.epochs": 2, "training.batch": 4, "training.accumulate": 1,
        "training.warmup": 0.1, "training.precision": "fp32",
    })  # fmt: skip


def _changed(config: Config, name: str, value: str, changes: dict[str, Any]) -> Config:
    return config.updated({"recipe": f"{name}:{value}", **changes})


RECIPES: dict[str, tuple[Callable[..., Config], tuple[str, ...]]] = {
    "kaist": (kaist, ()),
    "resnet50": (resnet50, ()),
    "ablation_cutoff": (ablation_cutoff, ("0.1", "0.25", "0.5", "0.75")),
    "ablation_bands": (ablation_bands, ("released", "low_only", "high_only", "uniform")),
    "ablation_rank": (ablation_rank, ("16", "64", "128", "full")),
    "ablation_merge": (ablation_merge, ("0.25", "0.5", "0.75", "1")),
    "ablation_high_form": (ablation_high_form, tuple(
        f"{form},{weight}" for form in ("mse", "log1p_abs", "signed_log", "log_of_sum") for weight in (0, 0.01, 0.1, 1)
    )),
    "controls": (controls, tuple(CONTROLS)),
}  # fmt: skip
"""Every recipe with the values it takes."""


def make(text: str, preset: str = "compact") -> Config:
    """The configuration of `NAME` or `NAME:VALUE`.

    Raises: ConfigError for an unknown recipe, value or preset, with the nearest.

    Example:
        >>> make("ablation_rank:64").student.alpha
        64.0
        >>> make("ablation_cutof")
        Traceback (most recent call last):
        ...
        freqkd_train.config.ConfigError: no recipe "ablation_cutof". Did you mean "ablation_cutoff"?
    """
    name, _, value = text.partition(":")
    if name not in RECIPES:
        raise ConfigError(f'no recipe "{name}".{nearest(name, RECIPES)}')
    if preset not in PRESETS:
        raise ConfigError(f'expected --preset {"|".join(PRESETS)}, got "{preset}".{nearest(preset, PRESETS)}')
    function, values = RECIPES[name]
    if not values:
        if value:
            raise ConfigError(f"the recipe {name} takes no value, got {value}.")
        return function(preset=preset)
    if value and value not in values:
        raise ConfigError(f"expected {name}:{'|'.join(values)}, got {value}.{nearest(value, values)}")
    return function(value, preset=preset) if value else function(preset=preset)


def listing() -> list[dict[str, str]]:
    """Recipe, its values and the first line of its card."""
    return [{"recipe": name, "values": " ".join(values), "about": (inspect.getdoc(function) or "").split("\n")[0]}
            for name, (function, values) in RECIPES.items()]  # fmt: skip


def card(name: str) -> str:
    """The lab card of a recipe."""
    return inspect.getdoc(RECIPES[name.partition(":")[0]][0]) or ""
