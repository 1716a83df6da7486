"""A fine-tuned model on a test split: predictions and metrics as files, the protocol's card inside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from freqkd_analysis import layers, provenance, schema, terminal
from freqkd_analysis.errors import RunError
from freqkd_train import annotations as annotated
from freqkd_train import detection, finetune, score, segmentation
from freqkd_train.annotations import Target
from freqkd_train.metrics import miou
from freqkd_train.metrics.boxes import Detections, make_detections

Say = Callable[[str], None]
PREDICTIONS, METRICS, CONFUSIONS = "predictions.json", "metrics.json", "confusions.npy"


def run(folder: Path, out: Path, *, spec: str = "", split: str = "", annotation_set: str = "", protocol: str = "",
        device: str = "auto", batch: int = 0) -> dict[str, Any]:  # fmt: skip
    """Evaluate the model of `folder` on its own test split, or on another.

    Returns: the content of metrics.json: figures in percent, method, seed, and the card.
    Raises: RunError for a folder of another kind; AnnotationError for the data; FreqkdError when classes do not match.
    """
    built = finetune.loaded(folder, layers.device_of(device))
    wanted = built.settings.targets
    target = annotated.load(spec or wanted.spec, split or wanted.test,
                              annotations=annotation_set or wanted.test_annotations, policy=wanted.policy)  # fmt: skip
    if tuple(target.classes) != built.classes:
        raise RunError(f"the model of {folder} knows {', '.join(built.classes)}; {target.name} has "
                       f"{', '.join(target.classes)}.")  # fmt: skip
    size = batch or max(1, built.settings.training.batch)
    head = {"run": str(folder), "method": built.settings.method, "seed": built.settings.seed,
            "task": built.settings.task, "target": {"spec": spec or wanted.spec, "split": split or wanted.test,
            "annotations": annotation_set or wanted.test_annotations, "policy": wanted.policy}}  # fmt: skip
    found = _segmented(built, target, size, out) if built.settings.task == "segment" else _detected(
        built, target, size, out, protocol or default_protocol(target))  # fmt: skip
    content = provenance.plain(head | found)
    schema.write_text(out / METRICS, json.dumps(content, indent=1) + "\n")
    return content


def default_protocol(target: Target) -> str:
    """`kaist` for KAIST's test annotations, else `coco`."""
    return "kaist" if target.name.startswith("kaist") else "coco"


def card_of(target: Target, protocol: str) -> Any:
    """The protocol's card of a target with boxes."""
    card = target.card
    assert target.truth is not None
    return score.make_card(target.truth, protocol, data_set=str(card["data_set"]),
                           annotation_set=str(card["annotation_set"]),
                           annotation_sha256=str(card["annotation_sha256"]), split=str(card["split"]),
                           policy=json.dumps(card["policy"], sort_keys=True),
                           box_source=str(card.get("box_source", "")))  # fmt: skip


def _detected(built: finetune.Built, target: Target, size: int, out: Path, protocol: str) -> dict[str, Any]:
    source = finetune.source(built, target, built.settings.modality)
    parts: list[Detections] = []
    with terminal.counting("images") as count:
        for numbers, batch in source.batches(size):
            found = detection.predict(built.step, batch["images"].to(built.device))
            parts.append(detection.to_detections(found, numbers, source.native))
            count(numbers[-1] + 1, len(source))
    detections = joined(parts)
    rows = {"names": [record.id for record in target.records], "image": detections.image.tolist(),
            "category": detections.category.tolist(), "box": detections.box.round(3).tolist(),
            "score": detections.score.round(6).tolist()}  # fmt: skip
    schema.write_text(out / PREDICTIONS, json.dumps(rows) + "\n")
    assert target.truth is not None
    run_ = score.Run(f"{built.settings.method}-{built.settings.seed}", read_predictions(out, target))
    return {"protocol": protocol} | score.report(target.truth, run_, card_of(target, protocol), protocol)


def joined(parts: list[Detections]) -> Detections:
    """Detections of several batches as one."""
    stacks = [np.concatenate([getattr(part, name) for part in parts]) for name in ("image", "category", "box", "score")]
    return Detections(*stacks)


def read_predictions(folder: Path, target: Target) -> Detections:
    """predictions.json again. Raises RunError when it is of other images."""
    path = folder / PREDICTIONS
    if not path.is_file():
        raise RunError(f"no {PREDICTIONS} in {folder}; expected the folder of an evaluation.")
    rows = json.loads(path.read_text(encoding="utf-8"))
    if rows["names"] != [record.id for record in target.records]:
        raise RunError(f"{path} is of other images than {target.name}.")
    return make_detections(image=rows["image"], category=rows["category"], box=rows["box"], score=rows["score"])


def _segmented(built: finetune.Built, target: Target, size: int, out: Path) -> dict[str, Any]:
    source = finetune.source(built, target, built.settings.modality)
    matrices = []
    assert target.masks is not None
    with terminal.counting("images") as count:
        for numbers, batch in source.batches(size):
            images = batch["images"].to(built.device)
            for place, number in enumerate(numbers):
                truth = annotated.read_mask(target.masks[number])
                guess = segmentation.predict(built.step, images[place : place + 1], truth.shape, source.content(number))
                matrices.append(miou.confusion(truth, guess[0].cpu().numpy(), target.records[number].id))
            count(numbers[-1] + 1, len(source))
    confusions = np.stack(matrices)
    with schema.atomic(out / CONFUSIONS) as temporary, temporary.open("wb") as handle:
        np.save(handle, confusions)
    card = {key: target.card[key] for key in ("data_set", "annotation_set", "annotation_sha256", "split", "frames",
                                              "classes")}  # fmt: skip
    figures = miou.scores(confusions, [record.time for record in target.records], classes=target.classes)
    return {"protocol": "miou", "units": "fraction", "card": card | {"metric": "mIoU from one confusion matrix"},
            "figures": figures}  # fmt: skip
