"""The words of a downstream study are refused before anything is done; each arm's settings are what its name says."""

from __future__ import annotations

import pytest

from freqkd_train import arms
from freqkd_train.config import ConfigError


def asked(*names: str, recipe: str = "kaist", changes: tuple[str, ...] = (), **more) -> arms.Study:
    return arms.Study(recipe, "synthetic", "smoke", names, (0,), device="cpu", changes=changes, **more)


@pytest.mark.parametrize(
    ("names", "change", "says"),
    [
        (("none", "mse"), "distil.loss.bands=released:0.25", r"^the arm mse: expected one of forms for each band"),
        (("none", "cosine"), "distil.loss.bands=released:0.25", r"^the arm cosine: loss\.bands belongs to the FreqKD"),
        (("none", "freqkd"), "distil.loss.bands=releasd:0.25", r"^the arm freqkd: .*releasd"),
        (("none", "freqkd"), "distil.loss.forms=[mse, msee]", r"^the arm freqkd: expected forms .*Did you mean"),
        (("measured",), "distil.loss.weights=[1, 0.5]", r"^the arm measured: expected one of weights for each band"),
        (("freqkd",), "distil.loss.match_gradient=relased", r"^the arm freqkd: no loss \"relased\"\. Did you mean"),
        (("measured", "mse"), "distil.loss.rule=precision", r"^the arm mse: loss\.rule precision"),
        (("none", "freqkd"), "finetune.training.epochs=-1", r"^the arm none: .*greater than or equal to 0"),
    ],
)
def test_a_loss_that_cannot_be_built_is_told_before_any_arm_is_trained(names, change, says):
    with pytest.raises(ConfigError, match=says) as caught:
        arms.check(asked(*names, changes=(change,)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("recipe", arms.TASKS)
def test_every_arm_of_every_recipe_passes(recipe):
    fit = [name for name, arm in arms.ARMS.items() if arms.TASKS[recipe] in arm.tasks]
    arms.check(asked(*fit, recipe=recipe))


@pytest.mark.parametrize(
    ("arm", "change"),
    [
        ("freqkd", "loss.bands=released:0.25"),
        ("freqkd", "loss.bands=random:3"),
        ("measured", "loss.bands=0.004,0.3/px"),
        ("measured", "loss.bands=octave:7"),
        ("measured", "loss.bands=equal-modes:4"),
        ("cosine", "loss.match_gradient=paper"),
    ],
)
def test_what_some_tap_can_have_is_let_through(arm, change):
    arms.check(asked("none", arm, changes=(f"distil.{change}", "distil.data.size=[512, 640]")))


def test_the_arm_without_a_loss_keeps_nothing_of_one():
    study = asked("none", changes=("distil.loss.match_gradient=released", "distil.training.epochs=3"))
    made = arms.distillation(study, "none", 0, "synthetic", None)
    assert (made.loss.name, made.loss.match_gradient, made.training.epochs) == ("none", "", 3)


def test_another_model_is_the_teacher_of_resnet50_and_both_networks_elsewhere():
    """As the help of --model says, recipe by recipe."""
    from typer.testing import CliRunner

    from freqkd_train import cli

    for recipe in arms.TASKS:
        made = arms.distillation(asked("none", recipe=recipe, model="resnet18"), "none", 0, "synthetic", None)
        usual = arms.distillation(asked("none", recipe=recipe), "none", 0, "synthetic", None)
        assert (made.teacher.name, made.teacher.layers, made.student) == ("resnet18", "all", usual.student)
        shown = " ".join(CliRunner().invoke(cli.app, [recipe, "--help"]).output.replace("│", " ").split())
        stays = "Teacher alone, read at all its layers; the student stays a ResNet"
        assert (stays in shown) == (made.student.name != "") == (recipe == "resnet50")
        assert ("Teacher and student, read at all layers" in shown) == (recipe != "resnet50")
