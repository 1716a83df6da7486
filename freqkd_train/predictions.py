"""What a fine-tuned model says of annotated images: boxes, or one confusion matrix an image."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from freqkd_analysis import schema, terminal
from freqkd_analysis.errors import RunError
from freqkd_train import annotations as annotated
from freqkd_train import assembly, detection, segmentation
from freqkd_train.annotations import Target
from freqkd_train.metrics import miou
from freqkd_train.metrics.boxes import Detections
from freqkd_train.result_files import Annotations, ResultError, read_results

PREDICTIONS, CONFUSIONS = "predictions.json", "confusions.npy"
AGAIN = "evaluate again."


def boxes(built: assembly.Built, target: Target, size: int, modality: str = "") -> Detections:
    """Detections on every image of the target, in its own pixels. size: images at once."""
    source = assembly.source(built, target, modality or built.settings.modality)
    parts: list[Detections] = []
    with terminal.counting("predicting") as count:
        for numbers, batch in source.batches(size):
            found = detection.predict(built.step, batch["images"].to(built.device))
            parts.append(detection.to_detections(found, numbers, source.native))
            count(numbers[-1] + 1, len(source))
    stacks = [np.concatenate([getattr(part, name) for part in parts]) for name in ("image", "category", "box", "score")]
    return Detections(*stacks)


def confusions(built: assembly.Built, target: Target, size: int) -> np.ndarray:
    """(N, K, K) confusion matrices, rows the truth, at the label images' own size. size: images at once."""
    source = assembly.source(built, target, built.settings.modality)
    matrices = []
    assert target.masks is not None
    with terminal.counting("predicting") as count:
        for numbers, batch in source.batches(size):
            images = batch["images"].to(built.device)
            for place, number in enumerate(numbers):
                truth = annotated.read_mask(target.masks[number])
                guess = segmentation.predict(built.step, images[place : place + 1], truth.shape, source.content(number))
                matrices.append(miou.confusion(truth, guess[0].cpu().numpy(), target.records[number].id))
            count(numbers[-1] + 1, len(source))
    return np.stack(matrices)


def write(folder: Path, target: Target, found: Detections) -> None:
    """predictions.json, a COCO result list: image_id, category_id, bbox x, y, w, h in px of the image, score.

    Ids are those of the annotations where these are one json; else an image's name, and classes counted from 1.
    """
    images = [target.ids.images.get(record.id, record.id) for record in target.records]
    kinds = _categories(target)
    rows = [{"image_id": images[image], "category_id": kinds[category], "bbox": box, "score": score}
            for image, category, box, score in zip(found.image.tolist(), found.category.tolist(),
                                                   found.box.round(3).tolist(), found.score.round(6).tolist(),
                                                   strict=True)]  # fmt: skip
    schema.write_text(folder / PREDICTIONS, json.dumps(rows) + "\n")


def read(folder: Path, target: Target) -> Detections:
    """predictions.json again. Raises RunError when there is none, or it is damaged or of other images."""
    path = folder / PREDICTIONS
    if not path.is_file():
        raise RunError(f"no {PREDICTIONS} in {folder}; expected the folder of an evaluation.")
    assert target.truth is not None
    images = {str(target.ids.images.get(record.id, record.id)): n for n, record in enumerate(target.records)}
    kinds = {str(kind): number for number, kind in enumerate(_categories(target))}
    known = Annotations(target.truth, images, kinds, False, target.name, str(target.card["annotation_sha256"]),
                        str(target.card["policy"]))  # fmt: skip
    try:
        return read_results(path, known)
    except ResultError as error:
        raise RunError(f"{str(error).rstrip('.')}; {AGAIN}") from None


def _categories(target: Target) -> list[int | str]:
    return [target.ids.categories.get(name, number) for number, name in enumerate(target.classes, start=1)]


def write_confusions(folder: Path, matrices: np.ndarray) -> None:
    """confusions.npy, whole or not at all."""
    with schema.atomic(folder / CONFUSIONS) as temporary, temporary.open("wb") as handle:
        np.save(handle, matrices)


def read_confusions(folder: Path, target: Target) -> np.ndarray:
    """(N, K, K) of confusions.npy again. Raises RunError when it is not there, damaged, or of other images."""
    path = folder / CONFUSIONS
    try:
        found = np.asarray(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise RunError(f"{path} cannot be read ({type(error).__name__}); {AGAIN}") from None
    n, k = len(target.records), len(target.classes)
    if found.shape != (n, k, k):
        raise RunError(f"{path} is of other images than {target.name}: expected {n} matrices {k}x{k}, got "
                       f"{found.shape}.")  # fmt: skip
    return found
