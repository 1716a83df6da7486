"""COCO average precision by faster-coco-eval: AP, AP50, AP75, by class and by size; AP50 under five readings of KAIST.

Lin et al., ECCV 2014: ten overlaps 0.50 ... 0.95, precision read at 101 recalls, at most 100 detections an image and
class. All values in 0..1, larger is better; None where no box counts (pycocotools' -1), 0 where nothing is detected.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from freqkd_train.metrics import kaist
from freqkd_train.metrics.boxes import EVERY_CLASS, Detections, Truth
from freqkd_train.metrics.matching import by_score

MAX_DETECTIONS = 100
OVERLAPS = tuple(np.linspace(0.5, 0.95, 10))
SIZES = ("all", "small", "medium", "large")
"""Area of a box as evaluated, in native pixels: to 32^2, to 96^2, above."""
LIMITS = (1, 10, MAX_DETECTIONS)


def average_precision(truth: Truth, detections: Detections, counted: np.ndarray | None = None) -> dict[str, Any]:
    """The COCO figures.

    Args:
        counted: (M,) boxes that count; the rest are ignore regions. Default: those not marked `ignore`.
    Returns: ap, ap50, ap75, ap_small, ap_medium, ap_large, ar1, ar10, ar100 and `classes`: name -> ap, ap50, ap75 and
        `counted`, the number of boxes.

    Example:
        >>> from freqkd_train.metrics.boxes import make_detections, make_truth
        >>> truth = make_truth(["a"], classes=["person", "car"], image=[0], category=[0], box=[[0, 0, 9, 9]])
        >>> found = make_detections(image=[0], box=[[0, 0, 9, 9]], score=[0.5])
        >>> got, nothing = average_precision(truth, found), average_precision(truth, make_detections())
        >>> round(got["ap"], 12), got["ap_large"], got["classes"]["car"]["ap"], nothing["ap"]
        (1.0, None, None, 0.0)
    """
    counted = ~truth.ignore if counted is None else counted
    precision, recall = _evaluate(truth, detections, counted, OVERLAPS)
    at_50, at_75 = 0, 5
    result: dict[str, Any] = {
        "ap": _mean(precision[..., 0, -1]),
        "ap50": _mean(precision[at_50, ..., 0, -1]),
        "ap75": _mean(precision[at_75, ..., 0, -1]),
    }
    result |= {f"ap_{name}": _mean(precision[..., number, -1]) for number, name in enumerate(SIZES) if number}
    result |= {f"ar{limit}": _mean(recall[..., 0, number]) for number, limit in enumerate(LIMITS)}
    result["classes"] = {
        name: {
            "ap": _mean(precision[:, :, k, 0, -1]),
            "ap50": _mean(precision[at_50, :, k, 0, -1]),
            "ap75": _mean(precision[at_75, :, k, 0, -1]),
            "counted": int((counted & (truth.category == k)).sum()),
        }
        for k, name in enumerate(truth.classes)
    }
    return result


def ap50(truth: Truth, detections: Detections, counted: np.ndarray | None = None) -> float | None:
    """AP at overlap 0.5 alone, which is quicker; arguments as in `average_precision`."""
    counted = ~truth.ignore if counted is None else counted
    precision, _ = _evaluate(truth, detections, counted, OVERLAPS[:1], all_sizes=False)
    return _mean(precision[..., 0, -1])


def precision_recall(truth: Truth, detections: Detections, counted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """101 recalls and the precision at each, overlap 0.5, mean over classes; its mean is AP50. NaN without truth."""
    precision, _ = _evaluate(truth, detections, counted, OVERLAPS[:1], all_sizes=False)
    by_class = precision[0, :, :, 0, -1]
    known = by_class[:, (by_class > -1).all(axis=0)]
    recall = np.linspace(0.0, 1.0, len(precision[0]))
    return recall, known.mean(axis=1) if known.size else np.full(len(recall), np.nan)


def readings(truth: Truth, person: int = 0) -> dict[str, tuple[Truth, np.ndarray]]:
    """What "AP50 on KAIST" may mean: name -> (truth, counted boxes). Up to 20 points lie between them.

    reasonable: boxes of the Reasonable setting count, the rest are ignore regions. all_boxes: every person counts,
    other labels are ignore regions. The same two with the rest dropped, which makes finding it a mistake, and all
    labels merged into one class.
    """
    reasonable = kaist.counts(truth, kaist.SETTINGS["Reasonable"], person)
    people = ~truth.ignore & (truth.category == person)
    everything = np.ones(len(people), dtype=bool)
    one = replace(truth, category=np.full_like(truth.category, person), ignore=~people)
    return {
        "reasonable": (one, reasonable),
        "all_boxes": (one, people),
        "reasonable_rest_dropped": (keep(one, reasonable), everything[reasonable]),
        "all_boxes_rest_dropped": (keep(one, people), everything[people]),
        "all_labels_merged": (one, everything),
    }


def keep(truth: Truth, kept: np.ndarray) -> Truth:
    """The truth with some of its boxes (a mask) and all of its images."""
    return replace(
        truth, image=truth.image[kept], category=truth.category[kept], box=truth.box[kept], ignore=truth.ignore[kept],
        occlusion=truth.occlusion[kept], label=tuple(truth.label[i] for i in np.flatnonzero(kept)),
    )  # fmt: skip


def rows_by_class(truth: Truth, counted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Box number, class and whether it counts, a region of every class once for each class."""
    every = truth.category == EVERY_CLASS
    plain = np.flatnonzero(~every)
    regions = np.repeat(np.flatnonzero(every), len(truth.classes))
    classes = np.tile(np.arange(len(truth.classes)), int(every.sum()))
    numbers = np.concatenate([plain, regions])
    return numbers, np.concatenate([truth.category[plain], classes]), counted[numbers]


def _evaluate(
    truth: Truth, detections: Detections, counted: np.ndarray, overlaps: tuple[float, ...], all_sizes: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """precision (overlaps, recalls, classes, sizes, limits), recall (overlaps, classes, sizes, limits); -1 unknown."""
    from faster_coco_eval import COCO, COCOeval_faster  # type: ignore[import-untyped]

    images = [{"id": number} for number in range(len(truth.names))]
    categories = [{"id": number, "name": name} for number, name in enumerate(truth.classes)]
    numbers, classes, counts_here = rows_by_class(truth, counted)
    annotated = _annotations(truth.image[numbers], classes, truth.box[numbers])
    for annotation, counts_as_box in zip(annotated, counts_here.tolist(), strict=True):
        annotation["iscrowd"] = 0 if counts_as_box else 1
    # In order of score, so that ties do not depend on what the evaluator's own sort does with them.
    ordered = detections.of(by_score(detections.score))
    found = _annotations(ordered.image, ordered.category, ordered.box)
    for annotation, score in zip(found, ordered.score.tolist(), strict=True):
        annotation["score"] = score
    loaded = [COCO({"images": images, "categories": categories, "annotations": rows}) for rows in (annotated, found)]
    run = COCOeval_faster(*loaded, iouType="bbox", print_function=_silent)
    run.params.iouThrs = np.asarray(overlaps)
    run.params.maxDets = list(LIMITS if all_sizes else LIMITS[-1:])
    if not all_sizes:
        run.params.areaRng, run.params.areaRngLbl = run.params.areaRng[:1], run.params.areaRngLbl[:1]
    run.evaluate()
    run.accumulate()
    return np.asarray(run.eval["precision"]), np.asarray(run.eval["recall"])


def _annotations(image: np.ndarray, category: np.ndarray, box: np.ndarray) -> list[dict[str, Any]]:
    columns = zip(image.tolist(), category.tolist(), box.tolist(), (box[:, 2] * box[:, 3]).tolist(), strict=True)
    return [
        {"id": number, "image_id": i, "category_id": c, "bbox": b, "area": a, "iscrowd": 0}
        for number, (i, c, b, a) in enumerate(columns, 1)
    ]


def _mean(values: np.ndarray) -> float | None:
    known = values[values > -1]
    return float(known.mean()) if known.size else None


def _silent(*_: object) -> None:
    """The evaluator's messages are not ours to print."""
