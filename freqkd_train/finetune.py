"""A detector or a segmenter on a backbone, fine-tuned on annotated images, from settings to a run folder.

Training images are split by whole groups into train and validation, which chooses the epoch that is kept. The test
split is read for its classes and for shared frames alone, unless `select: test` asks for the choice that the FreqKD
release made.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from freqkd_analysis import layers, provenance, schema
from freqkd_analysis.data.records import PairRecord
from freqkd_train import annotations as annotated
from freqkd_train import assembly, checkpoint, config, engine, leaks, pairs, predictions, schedule
from freqkd_train.annotations import Target
from freqkd_train.assembly import Built
from freqkd_train.config import ConfigError
from freqkd_train.downstream import Downstream
from freqkd_train.metrics import coco, miou

Say = Callable[[str], None]
FIGURES = {"detect": "ap50", "segment": "miou_8"}
"""What an epoch is chosen by, a task."""


def targets(settings: Downstream, say: Say) -> tuple[Target, Target | None, Target, dict[str, Any]]:
    """Training, validation and test images, and what the check for shared frames found.

    Raises: AnnotationError, DataError, or a leak of frames or sequences into the test split.
    """
    wanted = settings.targets
    every, test = annotated.of_split(wanted, "train"), annotated.of_split(wanted, "test")
    annotated.same_classes(every, test)
    if settings.modality == "rgb" or settings.teacher:
        _check_visible([*every.records, *test.records], wanted.spec)
    leak = leaks.check(every, test, wanted.allow_leak)
    for warning in every.card.get("warnings", []):
        say(f"{every.name}: {warning}")
    if not settings.data.holdout and not settings.data.limit:
        return every, None, test, leak
    place = {record.id: number for number, record in enumerate(every.records)}
    train, held = pairs.split(every.records, settings.data, settings.seed, say)
    cut = [every.take([place[record.id] for record in part]) for part in (train, held) if part]
    return cut[0], cut[1] if len(cut) > 1 else None, test, leak


def _check_visible(records: Sequence[PairRecord], spec: str) -> None:
    """ConfigError where the visible image would be the infrared one under another name."""
    if any(record.rgb == record.ir and not record.meta.get("packed") for record in records):
        raise ConfigError(f"{spec} has infrared images alone; the arms rgb and response need pairs.")


def run(settings: Downstream, out: Path, resume: bool, say: Say, command: Sequence[str]) -> dict[str, Any]:
    """Fine-tune and write the run folder; returns its manifest."""
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    device = layers.device_of(settings.training.device)
    train, held, test, leak = targets(settings, say)
    built = assembly.build(settings, train.classes, device)
    config.claim(out, settings, resume, engine.MACHINE)
    ours = assembly.source(built, train, settings.modality, bool(settings.teacher))
    judged, chosen_by = _chosen_by(settings, held, test)
    done = engine.fit(built.step, ours, settings.training.model_copy(update={"best": chosen_by}), settings.seed, out,
                      evaluate=_validator(built, held, judged, chosen_by), resume=resume, say=say,
                      fingerprint={"weights": built.network.sha256 or built.network.source})  # fmt: skip
    if done.best:
        checkpoint.restore(built.step, checkpoint.load(checkpoint.folder_of(out) / checkpoint.BEST), averaged=True)
    assembly.save(built, out)
    manifest = {"started": started, "command": list(command), "commit": provenance.commit(),
                "seconds": round(time.monotonic() - clock, 1), "config": settings.model_dump(mode="json"),
                "classes": list(train.classes), "network": built.network.describe(), "train": train.card,
                "validation": held.card if held else None, "leak": leak, "steps": done.steps, "chosen": done.best,
                "metrics": done.last,
                "environment": provenance.environment(device, torch.get_num_threads())}  # fmt: skip
    schema.write_text(out / "manifest.json", json.dumps(provenance.plain(manifest), indent=1) + "\n")
    return manifest


def _chosen_by(settings: Downstream, held: Target | None, test: Target) -> tuple[Target | None, str]:
    """The images that choose the epoch, and the name of the figure; neither where the last epoch is kept."""
    judged = {"validation": held, "test": test, "last": None}[settings.select]
    return judged, f"{'test' if settings.select == 'test' else 'val'}/{FIGURES[settings.task]}" if judged else ""


def _validator(built: Built, held: Target | None, judged: Target | None, name: str) -> engine.Evaluate | None:
    """What is measured at an epoch's end: the loss on held-out images, and the figure that chooses."""
    if held is None and judged is None:
        return None
    size = max(1, built.settings.training.batch // built.settings.training.accumulate)

    def evaluate() -> dict[str, float]:
        found = {"val/loss": _loss(built, held, size)} if held else {}
        return found | ({name: _figure(built, judged, size)} if judged else {})

    return evaluate


def _loss(built: Built, held: Target, size: int) -> float:
    total, count = 0.0, 0
    source = assembly.source(built, held, built.settings.modality, bool(built.settings.teacher))
    built.step.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(built.settings.seed)  # regions are sampled at random
        for numbers, batch in source.batches(size):
            total += len(numbers) * float(built.step(schedule.on_device(batch, built.device))["loss"])
            count += len(numbers)
    built.step.train()
    return total / count


def _figure(built: Built, judged: Target, size: int) -> float:
    """AP50 or mIoU of 8 classes, 0 to 1; NaN, which never is the best, where no box is there to be found."""
    with torch.no_grad():
        if built.settings.task == "segment":
            return float(miou.mean_iou(predictions.confusions(built, judged, size).sum(0), background=False))
        assert judged.truth is not None
        found = coco.ap50(judged.truth, predictions.boxes(built, judged, size))
    return float("nan") if found is None else found
