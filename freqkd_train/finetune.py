"""A detector or a segmenter on a backbone, fine-tuned on annotated images, from settings to a run folder.

Training images are split by whole groups into train and validation; the test split is read for its classes and for
shared sequences alone, never for a choice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from freqkd_analysis import layers, models, provenance, schema
from freqkd_analysis.conditions import Geometry
from freqkd_analysis.data import layouts
from freqkd_analysis.errors import RunError
from freqkd_analysis.features import reductions
from freqkd_analysis.models import Network
from freqkd_train import annotations as annotated
from freqkd_train import config, detection, downstream, engine, leaks, pairs, schedule, segmentation
from freqkd_train.config import ConfigError
from freqkd_train.downstream import Downstream
from freqkd_train.pyramid import Backbone
from freqkd_train.targets import TargetSource

Say = Callable[[str], None]
WEIGHTS = "model.safetensors"


@dataclass
class Built:
    """A model made ready: network, step to train, and how its images are made."""

    settings: Downstream
    network: Network
    step: nn.Module
    geometry: Geometry
    device: str
    classes: tuple[str, ...]


def build(settings: Downstream, classes: Sequence[str], device: str) -> Built:
    """Backbone and head for these classes. Raises FreqkdError for names or sizes that do not fit."""
    size, seed = settings.data.size, settings.seed
    step_px = max(reductions(models.architecture(settings.model)), default=1)
    geometry = Geometry.make(settings.data.geometry, size, step_px)
    network = models.create(settings.model, settings.weights, geometry.size, seed)
    head = settings.head
    backbone = Backbone(network.model, geometry.size, neck=head.neck, train=head.train, rate=head.rate,
                        layer_decay=head.layer_decay, channels=head.channels, seed=seed)  # fmt: skip
    if settings.task == "segment":
        made = segmentation.build(head.kind, backbone, len(classes), content=geometry.content, seed=seed)
        step: nn.Module = segmentation.SegmentationStep(made)
    else:
        detector = detection.build(head.kind, backbone, len(classes), hidden=head.hidden, regions=head.regions,
                                   seed=seed)  # fmt: skip
        teacher = None
        if settings.teacher:
            teacher = loaded(Path(settings.teacher), device).step.detector
        step = detection.DetectionStep(detector, head.consistency, teacher)  # type: ignore[arg-type]
    return Built(settings, network, step.to(device), geometry, device, tuple(classes))


def loaded(run: Path, device: str) -> Built:
    """The model of a finished run. Raises RunError for a folder that is none."""
    path = run / "manifest.json"
    if not path.is_file() or not (run / WEIGHTS).is_file():
        raise RunError(f"{run} is no finished fine-tuning; expected a folder with manifest.json and {WEIGHTS}.")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if "classes" not in manifest:
        raise RunError(f"{run} is a run of another task; expected one of fine-tuning.")
    from safetensors.torch import load_file

    settings = config.parsed(Downstream, manifest["config"], path).model_copy(
        update={"weights": "random", "teacher": ""}
    )
    built = build(settings, manifest["classes"], device)
    built.step.load_state_dict(load_file(run / WEIGHTS))
    return built


def source(built: Built, target: annotated.Target, modality: str, with_rgb: bool = False) -> TargetSource:
    """Batches of a target as this model sees them."""
    stats = (built.network.mean, built.network.std)
    conversion = layouts.resolve_conversion(target.records)
    return TargetSource(target, built.settings.data, built.geometry, built.settings.seed, stats, conversion, modality,
                        stats if with_rgb else None)  # fmt: skip


def targets(settings: Downstream, say: Say) -> tuple[annotated.Target, annotated.Target | None, dict[str, Any]]:
    """Training and validation images, and what the check against the test split found.

    Raises: AnnotationError, DataError, or a leak of frames or sequences into the test split.
    """
    wanted = settings.targets
    every = annotated.load(wanted.spec, wanted.train, annotations=wanted.train_annotations, policy=wanted.policy)
    test = annotated.load(wanted.spec, wanted.test, annotations=wanted.test_annotations, policy=wanted.policy)
    annotated.same_classes(every, test)
    leak = leaks.check(every, test, wanted.allow_leak)
    for warning in every.card.get("warnings", []):
        say(f"{every.name}: {warning}")
    if not settings.data.holdout and not settings.data.limit:
        return every, None, leak
    place = {record.id: number for number, record in enumerate(every.records)}
    train, held = pairs.split(every.records, settings.data, settings.seed, say)
    cut = [every.take([place[record.id] for record in part]) for part in (train, held) if part]
    return cut[0], cut[1] if len(cut) > 1 else None, leak


def run(settings: Downstream, out: Path, resume: bool, say: Say, command: Sequence[str]) -> dict[str, Any]:
    """Fine-tune and write the run folder; returns its manifest."""
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    device = layers.device_of(settings.training.device)
    train, held, leak = targets(settings, say)
    built = build(settings, train.classes, device)
    response = bool(settings.teacher)
    if not resume and out.exists() and any(out.iterdir()):
        raise RunError(f"{out} exists; give another folder, or --resume to finish it.")
    if resume and (out / "config.yaml").is_file():
        unlike = downstream.read(out / "config.yaml")
        if unlike.model_dump(exclude={"training"}) != settings.model_dump(exclude={"training"}):
            raise ConfigError(f"{out} was started with other settings; give the same, or another folder.")
    config.write(out / "config.yaml", settings)
    ours = source(built, train, settings.modality, response)
    theirs = source(built, held, settings.modality, response) if held else None
    done = engine.fit(built.step, ours, settings.training, settings.seed, out,
                      evaluate=_validator(built, theirs) if theirs else None, resume=resume, say=say,
                      fingerprint={"weights": built.network.sha256 or built.network.source})  # fmt: skip
    from safetensors.torch import save_file

    state = {name: value.detach().cpu().contiguous() for name, value in built.step.state_dict().items()}
    with schema.atomic(out / WEIGHTS) as temporary:
        save_file(state, temporary)
    manifest = {"started": started, "command": list(command), "commit": provenance.commit(),
                "seconds": round(time.monotonic() - clock, 1), "config": settings.model_dump(mode="json"),
                "classes": list(train.classes), "network": built.network.describe(), "train": train.card,
                "validation": held.card if held else None, "leak": leak, "steps": done.steps, "metrics": done.last,
                "environment": provenance.environment(device, torch.get_num_threads())}  # fmt: skip
    schema.write_text(out / "manifest.json", json.dumps(provenance.plain(manifest), indent=1) + "\n")
    return manifest


def _validator(built: Built, held: TargetSource) -> Callable[[], dict[str, float]]:
    size = max(1, built.settings.training.batch // built.settings.training.accumulate)

    def evaluate() -> dict[str, float]:
        total, count = 0.0, 0
        built.step.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(built.settings.seed)  # regions are sampled at random
            for numbers, batch in held.batches(size):
                total += len(numbers) * float(built.step(schedule.on_device(batch, built.device))["loss"])
                count += len(numbers)
        built.step.train()
        return {"val/loss": total / count}

    return evaluate
