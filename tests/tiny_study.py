"""A downstream study small enough for a test."""

from __future__ import annotations

from freqkd_train import arms

TINY = ("distil.data.size=[48, 64]", "distil.training.epochs=1", "finetune.training.epochs=1")


def tiny(recipe: str, *, data: str = "synthetic", names: tuple[str, ...] = ("none", "freqkd"), **more) -> arms.Study:
    changes = (*TINY, *more.pop("changes", ()))
    return arms.Study(recipe, data, "smoke", names, (0,), device="cpu", changes=changes, **more)
