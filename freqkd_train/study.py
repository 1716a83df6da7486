"""The stages of a downstream study in their order: analyse -> distil -> finetune -> evaluate -> compare.

Each stage of each arm and seed is a run folder under --out; one that is there with the same settings is used again,
whatever interrupted the study. Students may come from another study instead, so that several data sets share them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freqkd_analysis import layers, provenance, schema, terminal
from freqkd_analysis.data import layouts, listing
from freqkd_analysis.errors import FreqkdError, RunError, first, nearest
from freqkd_train import annotations as annotated_images
from freqkd_train import arms, assembly, compare, config, engine, evaluate, export, finetune, job, leaks
from freqkd_train.arms import ARMS, Study
from freqkd_train.config import Config
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
        with terminal.counting("rendering", "pairs") as count:
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
    listing.write_pairs(path, target.records)
    return f"csv:{path}"


@dataclass(frozen=True)
class Kind:
    """A kind of stage: the file that says it can go on, empty where it cannot, and the one that ends it."""

    begun: str
    ended: str


ANALYSE = Kind(*layers.PLACE)
DISTIL = Kind(*config.PLACE)
FINETUNE = Kind(*config.PLACE)
EVALUATE = Kind("", evaluate.METRICS)


def stage(kind: Kind, folder: Path, settings: dict[str, Any], inputs: dict[str, str],
          work: Callable[[Path, bool], object], say: Say) -> None:  # fmt: skip
    """Do one stage unless its folder holds it whole, of the same settings and inputs; one that was interrupted goes on.

    Args: settings: what was asked for, flat. inputs: digests of the files it is made from; where these changed, it is
        done again.
    Raises: RunError where other settings were asked for: nothing that took hours is thrown away unasked.
    """
    mark = folder.parent / f".{folder.name}.json"
    settings = {key: value for key, value in settings.items() if key not in engine.MACHINE}
    asked = provenance.plain({"settings": settings, "inputs": inputs})
    name = f"{folder.parent.name}/{folder.name}"
    stored = _stored(mark, {"settings": dict, "inputs": dict}) if folder.exists() else {}
    if stored:
        for key in sorted({*stored["settings"], *asked["settings"]}):
            was, now = stored["settings"].get(key), asked["settings"].get(key)
            if was != now:
                raise RunError(f"{folder} was made with {key} = {was}, now {now}; give the same, another --out, or "
                               f"--from {folder.parent.name} to do it again.")  # fmt: skip
    same = stored.get("inputs") == asked["inputs"]
    if same and (folder / kind.ended).is_file():
        say(f"{name}: there already")
        return
    goes_on = same and bool(kind.begun) and (folder / kind.begun).is_file()
    if folder.exists() and not goes_on:
        shutil.rmtree(folder)
    say(name)
    schema.write_text(mark, json.dumps(asked, indent=1) + "\n")
    work(folder, goes_on)


def _stored(path: Path, shape: dict[str, Any]) -> dict[str, Any]:
    """What a mark says; one that is not there, or was cut, says nothing."""
    try:
        return provenance.read_object(path, shape, "")
    except RunError:
        return {}


def run(study: Study, out: Path, say: Say, command: Sequence[str], start: str = "") -> pd.DataFrame:
    """Every stage of every arm and seed; returns the comparison.

    Args: start: do this stage and those after it again. Raises: FreqkdError of the stage that cannot go on.
    """
    if start and start not in STAGES:
        raise FreqkdError(f'expected --from {"|".join(STAGES)}, got "{start}".{nearest(start, STAGES)}')
    arms.check(study)
    layers.device_of(study.device)
    _check_place(out)
    going = Going(study, out.resolve(), say, command)
    if start:
        going.forget(STAGES[STAGES.index(start) :])
    evaluated = [going.arm(method, seed) for seed in study.seeds for method in going.order()]
    table = compare.compare(evaluated)
    compare.write(table, out / "compare")
    return table


def _check_place(out: Path) -> None:
    """A study goes on in its own folder; it must not grow into the folder of something else.

    Raises: RunError for a folder that is neither empty nor a study.
    """
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; give a folder as --out.")
    there = {path.name for path in out.iterdir()} if out.is_dir() else set()
    # What a study writes first; the rest follows from it.
    if there and (not there & {LEAK, "data", "train_pairs.csv", *STAGES} or "manifest.json" in there):
        raise RunError(f"{out} exists and is no study; give another --out.")


class Going:
    """A study under way: its data, and one arm at a time. Folders are absolute: they stand in settings."""

    def __init__(self, study: Study, out: Path, say: Say, command: Sequence[str]) -> None:
        self.study, self.out, self.say, self.command = study, out, say, command
        self.spec = annotated(study, out, say)
        self.students = Path(study.students).resolve() if study.students else out
        self.pairs, self.exclude = self._pairs()
        self._check_leak()

    def forget(self, stages: Sequence[str]) -> None:
        """Remove what these stages left of the arms and seeds asked for: they are done again, also after a stop."""
        for seed in self.study.seeds:
            for method in self.order():
                for name in stages:
                    of = ARMS[method].student if name == "distil" else method
                    shutil.rmtree(self.out / name / f"{of}-{seed}", ignore_errors=True)
        if "analyse" in stages:
            shutil.rmtree(self.out / "analyse", ignore_errors=True)

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
        inputs = {"weights": provenance.sha256_file(weights)}
        if tuned.teacher:
            inputs["teacher"] = provenance.sha256_file(Path(tuned.teacher) / assembly.WEIGHTS)
        stage(FINETUNE, second, config.flat(tuned), inputs, partial(self._finetune, tuned), self.say)
        model = {"model": provenance.sha256_file(second / assembly.WEIGHTS)}
        stage(EVALUATE, third, {}, model, partial(self._evaluate, second), self.say)
        return third

    def _student(self, name: str, seed: int) -> Path:
        if self.study.students:
            return self._taken(name, seed)
        folder = self.students / "distil" / f"{name}-{seed}"
        weights_from = self._analysed() if arms.needs_analysis(name) else None
        settings = arms.distillation(self.study, name, seed, self.pairs, weights_from)
        inputs = {"weights": provenance.sha256_file(weights_from / "band_weights.json")} if weights_from else {}
        stage(DISTIL, folder, config.flat(settings), inputs, partial(self._distil, settings), self.say)
        return folder

    def _taken(self, name: str, seed: int) -> Path:
        """A finished distillation of the study that the students come from. Raises RunError where there is none."""
        folder = self.students / "distil" / f"{name}-{seed}"
        if not (folder / export.STUDENT).is_file():
            there = sorted(path.parent.name for path in self.students.glob(f"distil/*/{export.STUDENT}"))
            raise RunError(f"no student {folder.name} in {self.students}/distil, which holds "
                           f"{first(there) or 'none'}; distil it there first.")  # fmt: skip
        return folder

    def _tuned(self, name: str) -> Path:
        """The backbone of a finished detector of the study that the students come from, as plain weights."""
        run_ = self.students / "finetune" / name
        if not self.study.students or not (run_ / assembly.WEIGHTS).is_file():
            raise RunError(f"an arm _stage2 takes the backbone of the finished detector {name} of another study; "
                           f"{run_} holds none. Give --students STUDY, such as runs/kaist.")  # fmt: skip
        path = self.out / "backbones" / f"{name}.safetensors"
        mark, made = path.with_name(f".{name}.json"), {"model": provenance.sha256_file(run_ / assembly.WEIGHTS)}
        if not path.is_file() or _stored(mark, {"model": str}) != made:
            assembly.save_backbone(run_, path)
            schema.write_text(mark, json.dumps(made) + "\n")
        return path

    def _analysed(self) -> Path:
        """The analysis of the training pairs with the teacher, for measured weights."""
        from freqkd_analysis import plan

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

        stage(ANALYSE, folder, asdict(settings), {}, work, self.say)
        return folder

    def _distil(self, settings: Config, folder: Path, resume: bool) -> None:
        job.run(settings, folder, resume, self.say, self.command)

    def _finetune(self, settings: Downstream, folder: Path, resume: bool) -> None:
        finetune.run(settings, folder, resume, self.say, self.command)

    def _evaluate(self, model: Path, folder: Path, resume: bool) -> None:
        evaluate.run(model, folder, device=self.study.device)

    def _pairs(self) -> tuple[str, str]:
        """Pairs of stage 1 and the file of ids left out: of this study, or of the one whose students are taken."""
        if not self.study.students:
            pairs = training_pairs(self.study, self.spec, self.out)
            return pairs, arms.distillation(self.study, "none", 0, pairs, None).data.exclude
        if not any(self.students.glob("distil/*/config.yaml")):
            raise RunError(f"{self.students} is no study: it holds no distil/*/config.yaml; expected the folder of a "
                           "`freqkd-train kaist` or the like.")  # fmt: skip
        names = dict.fromkeys(ARMS[method].student for method in self.order())
        folders = [self._taken(name, seed) for seed in self.study.seeds for name in names]
        data = {folder.name: config.read(folder / "config.yaml").data for folder in folders}
        (name, of), *others = ((name, (found.spec, found.exclude)) for name, found in data.items())
        for other, found in others:
            if found != of:
                words = [f"{pairs} without {exclude or 'nothing'}" for pairs, exclude in (of, found)]
                raise RunError(f"{self.students}/distil holds students of unlike pairs: {name} of {words[0]}, {other} "
                               f"of {words[1]}. Take those of one set.")  # fmt: skip
        return of

    def _check_leak(self) -> None:
        """No test frame among the pairs of stage 1. Once, then remembered by the names on both sides."""
        made = arms.distillation(self.study, "none", 0, self.pairs, None)
        test = arms.finetuning(self.study, "none", 0, self.spec, made, Path("none"), self.out).targets
        target = annotated_images.of_split(test, "test")
        sides = (layouts.load(self.pairs), target.records)
        names = [provenance.sha256_lines(record.id for record in side) for side in sides]
        asked = {"pairs": [self.pairs, self.exclude, names[0]], "test": [target.name, names[1]],
                 "allow": test.allow_leak}  # fmt: skip
        mark = self.out / LEAK
        if _stored(mark, {"of": dict}).get("of") == asked:
            return
        with terminal.counting("looking for shared frames", "frames") as count:
            found = leaks.of_pairs(self.pairs, sides[0], self.exclude, target, test.allow_leak, count)
        schema.write_text(mark, json.dumps({"of": asked} | found, indent=1) + "\n")
