"""A run taken up again from its folder: another export of its student, or the step it stopped at, once more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from freqkd_analysis.errors import RunError, nearest, nearest_folder
from freqkd_train import checkpoint, export, job
from freqkd_train import config as files
from freqkd_train import student as students

Say = Callable[[str], None]


def _prepared(run: Path, say: Say) -> job.Job:
    path = run / "config.yaml"
    if not path.is_file():
        raise RunError(f"no settings in {run}; expected the folder of a `distill` run.")
    made = job.prepare(files.read(path), say)
    job.ready(made, lambda text: None)
    return made


def export_run(run: Path, which: str, merge: float | None, onnx: bool, out: Path, say: Say) -> list[Path]:
    """The student of a run's newest or best checkpoint, at its own or another merge; returns what was written.

    Raises: RunError for a folder without settings or checkpoints; ConfigError for a merge outside 0 to 1.
    """
    if onnx:
        export.check_onnx()
    made = _prepared(run, say)
    if merge is not None:
        made.config = made.config.updated({"student.merge": merge})
    checkpoint.restore(made.step, _checkpoint(run, which, say), averaged=True)
    state = students.merged(made.step.student, made.origin, float(made.config.student.merge or 0))
    export.save(made.step.student, state, out)
    paths = [out / export.STUDENT]
    if students.has_lora(made.step.student):
        paths.append(out / export.ADAPTER)
    if onnx:
        records = (made.held or made.train)[:4]
        images = next(iter(made.source.evaluation_batches(records, len(records))))["student"]
        plain = job.standing(made, state, "distilled")
        worst = export.to_onnx(plain.model.cpu(), images, out / export.ONNX)
        say(f"ONNX agrees with torch on {len(records)} pairs to {worst:.1e} of the largest feature")
        paths.append(out / export.ONNX)
    return paths


def _checkpoint(run: Path, which: str, say: Say) -> checkpoint.State:
    if which not in ("newest", "best"):
        raise RunError(f'expected --checkpoint newest or best, got "{which}".{nearest(which, ("newest", "best"))}')
    if which == "best":
        return checkpoint.load(checkpoint.folder_of(run) / checkpoint.BEST)
    found = checkpoint.newest_valid(run, say)
    if found is None:
        raise RunError(f"no checkpoint in {run}; expected the folder of a `distill` run that took a step.")
    return found[1]


def replay(bundle: Path, say: Say) -> dict[str, Any]:
    """Loss and terms of the step that a run stopped at. Raises RunError for what is no bundle of a run."""
    from freqkd_train import engine

    what = "a bundle is the folder RUN/nonfinite-step-N that a `distill` run leaves where a step was not finite"
    if not bundle.is_dir():
        raise RunError(f"no bundle {bundle}.{nearest_folder(bundle)} For `replay`, {what}.")
    if not (bundle.resolve().parent / "config.yaml").is_file():
        raise RunError(f"{bundle} is no bundle in the folder of a run: {what}.")
    made = _prepared(bundle.resolve().parent, say)
    return engine.replay(bundle, made.step)
