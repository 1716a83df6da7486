"""The arms of a downstream study: their words, their settings, and what is refused before anything is done."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_study import tiny

from freqkd_analysis.errors import RunError
from freqkd_train import annotations, arms, assembly, compare, config
from freqkd_train.config import ConfigError
from freqkd_train.downstream import Downstream


def test_bad_words():
    with pytest.raises(ConfigError, match='no method "frekd"'):
        arms.methods("none,frekd", False)
    with pytest.raises(ConfigError, match="expected some methods"):
        arms.methods(" ,", False)
    for change, words in (("training.epochs=3", r"expected --set distil\.KEY=VALUE or finetune"),
                          ("finetune.training.epoch=3", r'no setting "training.epoch" of the stage finetune'),
                          ("finetune.training.epochs=-1", "greater than or equal to 0")):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            arms.check(tiny("kaist", changes=(change,)))
    with pytest.raises(ConfigError, match="the method response is not for mfnet, whose task is to segment"):
        arms.check(tiny("mfnet", names=("none", "response")))
    with pytest.raises(ConfigError, match="teacher with task segment"):
        config.parsed(Downstream, {"task": "segment", "teacher": "runs/x"})
    with pytest.raises(RunError, match=r"no metrics\.json"):
        compare.compare([Path("nowhere")])


def test_the_words_of_the_command_line_are_the_arms():
    from freqkd_train import cli

    assert set(cli._METHODS) == set(arms.ARMS)


@pytest.mark.parametrize(("student", "recipe"), [
    ("low_only", "ablation_bands:low_only"), ("high_only", "ablation_bands:high_only"),
    ("mse", "controls:uniform_matched"), ("cutoff_10", "ablation_cutoff:0.1"),
    ("mse_high", "ablation_high_form:mse,0.1"), ("signed_high", "ablation_high_form:signed_log,0.1"),
    ("cutoff_25", "ablation_cutoff:0.25"), ("freqkd", "ablation_bands:released"),
])  # fmt: skip
def test_an_ablation_is_one_thing_as_an_arm_and_as_a_recipe(student, recipe):
    from freqkd_train import recipes

    study_ = arms.Study("kaist", "synthetic", "compact", (student,), (0,), device="cpu")
    assert arms.distillation(study_, student, 0, "synthetic", None).loss == recipes.make(recipe).loss


def test_arms_of_measured_weights_ask_for_an_analysis():
    assert [name for name in arms.STUDENTS if arms.needs_analysis(name)] == ["measured", "precision"]
    study_ = arms.Study("kaist", "synthetic", "smoke", ("precision",), (0,), device="cpu")
    made = arms.distillation(study_, "precision", 0, "synthetic", Path("runs/a"))
    assert (made.loss.rule, made.loss.weights_from) == ("precision", "runs/a")


@pytest.mark.parametrize("preset", ["paper", "compact", "smoke"])
@pytest.mark.parametrize("recipe", ["kaist", "flir", "mfnet", "resnet50"])
def test_the_second_stage_of_every_recipe_can_be_built(recipe, preset):
    """A neck that does not fit the network was told only after all of stage 1. Small twins of the networks."""
    chosen = arms.Study(recipe, "kaist:x", preset, ("none",), (0,))
    made = arms.distillation(chosen, "none", 0, "kaist:x", None)
    settings = arms.finetuning(chosen, "none", 0, "kaist:x", made, Path("random"), Path("out"))
    small = "resnet18" if recipe == "resnet50" else "vit_tiny_patch16_224"
    fit = {"model": small, "weights": "random", "data.size": [64, 64], "head.channels": 32, "head.hidden": 16}
    assert assembly.build(config.updated(settings, fit), annotations.MASK_LABELS, "cpu").step is not None
