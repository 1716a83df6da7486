"""The stages of a downstream study in their order: analyse -> distil -> finetune -> evaluate -> compare.

Each stage of each arm and seed is a run folder under --out; one that is there with the same settings is used again,
whatever interrupted the study. Students may come from another study instead, so that several data sets share them.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freqkd_analysis import provenance, schema, terminal
from freqkd_analysis.data import layouts
from freqkd_analysis.errors import FreqkdError, RunError, first, nearest
from freqkd_train import annotations as annotated_images
from freqkd_train import arms, assembly, compare, config, evaluate, export, finetune, job, leaks
from freqkd_train.arms import ARMS, Study
from freqkd_train.config import Config, Section
from freqkd_train.downstream import Downstream

if TYPE_CHECKING:
    import pandas as pd

Say = Callable[[str], None]

STAGES = ("analyse", "distil", "finetune", "evaluate", "compare")
SCENES = "pairs=60,groups=12,size=640x512"
"""The synthetic data of a study without data."""
LEAK = "distil_leak.json"
"""What the pairs of stage 1 share with the test split, in the study's folder."""


def annotated(study: Study, out: Path, say: Say) -> str:
    """The spec of the annotated data; without data, synthetic scenes are written first."""
    if study.data != "synthetic":
        return study.data
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


def training_pairs(study: Study, spec: str, out: Path) -> str:
    """The pairs to distil on: those asked for, KAIST's train-all-02 or MFNet's train where such a list is there, else
    the training split's.

    The last are written down as a list, so that no test frame can be among them.
    """
    if study.distil_on:
        return study.distil_on
    layout, _, root = spec.partition(":")
    for name, file in {"kaist": "imageSets/train-all-02.txt", "mfnet": "train.txt"}.items():
        if layout == name and (Path(root) / file).is_file():
            return f"{layout}:{root}:{Path(file).stem}"
    target = annotated_images.load(spec, "train")
    if any(record.rgb == record.ir for record in target.records):
        raise FreqkdError(f"{spec} has infrared images alone: there is nothing to distil on. Give --distil-on "
                          "LAYOUT:ROOT with pairs, or --students STUDY.")  # fmt: skip
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
    work(folder, same and (folder / "config.yaml").is_file() and not again)
    schema.write_text(mark, json.dumps({"settings": digest, "done": True}))


def run(study: Study, out: Path, say: Say, command: Sequence[str], start: str = "") -> pd.DataFrame:
    """Every stage of every arm and seed; returns the comparison.

    Args: start: redo from this stage on. Raises: FreqkdError of the stage that cannot go on.
    """
    if start and start not in STAGES:
        raise FreqkdError(f'expected --from {"|".join(STAGES)}, got "{start}".{nearest(start, STAGES)}')
    arms.check(study.changes)
    going = Going(study, out, say, command, start)
    evaluated = [going.arm(method, seed) for seed in study.seeds for method in going.order()]
    table = compare.compare(evaluated)
    compare.write(table, out / "compare")
    return table


class Going:
    """A study under way: its data, and one arm at a time."""

    def __init__(self, study: Study, out: Path, say: Say, command: Sequence[str], start: str) -> None:
        self.study, self.out, self.say, self.command = study, out, say, command
        self.redo = {name: bool(start) and i >= STAGES.index(start) for i, name in enumerate(STAGES)}
        self._fresh: set[Path] = set()
        self.spec = annotated(study, out, say)
        self.students = Path(study.students) if study.students else out
        self.pairs = self._students_pairs() if study.students else training_pairs(study, self.spec, out)
        self._check_leak()

    def order(self) -> list[str]:
        """The arms, the reference detector first, which the response arm needs."""
        names = list(self.study.methods)
        if "response" in names and "rgb" not in names:
            names.append("rgb")
        return sorted(names, key=lambda name: name != "rgb")

    def arm(self, method: str, seed: int) -> Path:
        """All stages of one arm and seed; the folder of its evaluation."""
        name = f"{method}-{seed}"
        first = self._student(ARMS[method].student, seed)
        weights = first / export.STUDENT
        if ARMS[method].tuned:
            weights = self._tuned(f"{ARMS[method].tuned}-{seed}")
        made = config.read(first / "config.yaml")
        tuned = arms.finetuning(self.study, method, seed, self.spec, made, weights, self.out)
        second, third = (self.out / part / name for part in ("finetune", "evaluate"))
        # Weights of the same name may be others, when another study was run again.
        told = {"of": tuned.model_dump(mode="json"), "weights": provenance.sha256_file(weights)}
        stage(second, told, partial(self._finetune, tuned), self.say, self.redo["finetune"])
        stage(third, {"run": str(second)} | told, partial(self._evaluate, second), self.say, self.redo["evaluate"])
        return third

    def _student(self, name: str, seed: int) -> Path:
        folder = self.students / "distil" / f"{name}-{seed}"
        if self.study.students:
            if not (folder / export.STUDENT).is_file():
                there = sorted(path.parent.name for path in self.students.glob(f"distil/*/{export.STUDENT}"))
                raise RunError(f"no student {folder.name} in {self.students}/distil, which holds "
                               f"{first(there) or 'none'}; distil it there first.")  # fmt: skip
            return folder
        weights_from = self._analysed() if name == "measured" else None
        settings = arms.distillation(self.study, name, seed, self.pairs, weights_from)
        again = self.redo["distil"] and folder not in self._fresh
        self._fresh.add(folder)
        stage(folder, settings, partial(self._distil, settings), self.say, again)
        return folder

    def _tuned(self, name: str) -> Path:
        """The backbone of a finished detector of the study that the students come from, as plain weights."""
        run_ = self.students / "finetune" / name
        if not self.study.students or not (run_ / assembly.WEIGHTS).is_file():
            raise RunError(f"an arm _stage2 takes the backbone of the finished detector {name} of another study; "
                           f"{run_} holds none. Give --students STUDY, such as runs/kaist.")  # fmt: skip
        path = self.out / "backbones" / f"{name}.safetensors"
        assembly.save_backbone(run_, path)
        return path

    def _analysed(self) -> Path:
        """The analysis of the training pairs with the teacher, for measured weights."""
        from freqkd_analysis import layers, plan

        base = arms.distillation(self.study, "freqkd", 0, self.pairs, None)
        settings = plan.Settings(
            pairs=500, data=self.pairs, model=base.teacher.name, weights=base.teacher.weights,
            layers=base.teacher.layers, size=base.data.size, geometry=base.data.geometry,
            conditions=("paired", "shuffled", "mean_removed"),
        )  # fmt: skip
        folder = self.out / "analyse" / "teacher"
        machine = plan.Machine(self.study.device)

        def work(place: Path, resume: bool) -> None:
            layers.run(settings, machine, place, resume, self.say, terminal.progress, ["freqkd-train"])

        again = self.redo["analyse"] and folder not in self._fresh
        self._fresh.add(folder)
        stage(folder, vars(settings) | {}, work, self.say, again)
        return folder

    def _distil(self, settings: Config, folder: Path, resume: bool) -> None:
        job.run(settings, folder, resume, self.say, self.command)

    def _finetune(self, settings: Downstream, folder: Path, resume: bool) -> None:
        finetune.run(settings, folder, resume, self.say, self.command)

    def _evaluate(self, model: Path, folder: Path, resume: bool) -> None:
        evaluate.run(model, folder, device=self.study.device)

    def _students_pairs(self) -> str:
        """The pairs that another study's students were distilled on."""
        found = sorted(self.students.glob("distil/*/config.yaml"))
        if not found:
            raise RunError(f"{self.students} is no study: it holds no distil/*/config.yaml; expected the folder of a "
                           "`freqkd-train kaist` or the like.")  # fmt: skip
        return config.read(found[0]).data.spec

    def _check_leak(self) -> None:
        """No test frame among the pairs of stage 1, whatever their names: by their looks. Once, then remembered."""
        settings = arms.distillation(self.study, "none", 0, self.pairs, None)
        test = arms.finetuning(self.study, "none", 0, self.spec, settings, Path("none"), self.out).targets
        mark = self.out / LEAK
        asked = [self.pairs, settings.data.exclude, test.spec, test.test, test.allow_leak]
        if mark.is_file() and json.loads(mark.read_text(encoding="utf-8"))["of"] == asked:
            return
        target = annotated_images.load(test.spec, test.test, annotations=test.test_annotations, policy=test.policy)
        excluded = set(Path(settings.data.exclude).read_text(encoding="utf-8").split()) if settings.data.exclude else ()
        records = [record for record in layouts.load(self.pairs) if record.id not in excluded]
        with terminal.counting("looking for shared frames") as count:
            found = leaks.between(records, target.records, False, False, count)
        leaks.refuse(found, f"the pairs of stage 1 ({self.pairs})", target.name, test.allow_leak)
        schema.write_text(mark, json.dumps({"of": asked, "allowed": test.allow_leak} | found, indent=1) + "\n")
