"""Mean intersection over union of label images, by the one confusion matrix of the MFNet benchmark.

All pixels of a list go into one matrix and no label is ignored (Ha et al., IROS 2017, as RTFNet's script counts). IoU =
TP / (TP + FP + FN); recall ("Acc") = TP / truth; values 0..1, larger is better. A class without any pixel has no value:
the published figures take it as 0 (`nan="zero"`), which pulls down the mean of a subset that lacks a class.

Letters: N images, K classes with unlabelled first. Matrices: rows are the truth, columns what was predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from freqkd_analysis.errors import FreqkdError, first, nearest

CLASSES = ("unlabeled", "car", "person", "bike", "curve", "car_stop", "guardrail", "color_cone", "bump")
"""Of MFNet and MSRS, by their id in the label images."""
NAN = ("zero", "skip", "raise")
"""What a class without a value means to a mean: it counts as 0, is left out, or is an error."""
SUBSETS = ("all", "day", "night")


class LabelError(FreqkdError):
    """Label images that do not hold what they should, or a mean that has no value."""


def confusion(truth: np.ndarray, predicted: np.ndarray, name: str, classes: int = len(CLASSES)) -> np.ndarray:
    """(K, K) int64 pixel counts of one image.

    Args:
        truth, predicted: (h, w) integer labels, 0 to K - 1. name: of the label file, for messages.
    Raises: LabelError naming the file for a label out of range or shapes that differ.

    Example:
        >>> confusion(np.array([[0, 1, 1]]), np.array([[0, 1, 0]]), "00001D.png", classes=2).tolist()
        [[1, 0], [1, 1]]
    """
    if truth.ndim != 2 or truth.shape != predicted.shape:
        raise LabelError(f"{name}: expected a prediction of the label image's rows and columns {truth.shape}, got "
                         f"{predicted.shape}.")  # fmt: skip
    for what, labels in (("the label image", truth), ("the prediction", predicted)):
        check_labels(labels, f"{name}: {what}", classes)
    cells = truth.astype(np.int64).ravel() * classes + predicted.ravel().astype(np.int64)
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def check_labels(labels: np.ndarray, what: str, classes: int = len(CLASSES)) -> None:
    """Raises: LabelError, beginning with `what`, unless all labels are whole numbers of 0 to K - 1.

    Example:
        >>> check_labels(np.array([[0, 9]]), "labels/00001D.png")
        Traceback (most recent call last):
        ...
        freqkd_train.metrics.miou.LabelError: labels/00001D.png holds the value 9; expected class ids 0 to 8.
    """
    if labels.dtype.kind not in "iu":
        raise LabelError(f"{what} holds {labels.dtype.name} values; expected whole class ids 0 to {classes - 1}.")
    if labels.size and (labels.max() >= classes or labels.min() < 0):
        wrong = labels.max() if labels.max() >= classes else labels.min()
        raise LabelError(f"{what} holds the value {wrong}; expected class ids 0 to {classes - 1}.")


def iou(matrices: np.ndarray) -> np.ndarray:
    """(..., K) IoU of (..., K, K) matrices; NaN for a class with neither truth nor prediction."""
    right = _right(matrices)
    return _ratio(right, matrices.sum(-1) + matrices.sum(-2) - right)


def recall(matrices: np.ndarray) -> np.ndarray:
    """(..., K) share of each class's pixels that were found; NaN for a class without any."""
    return _ratio(_right(matrices), matrices.sum(-1))


def precision(matrices: np.ndarray) -> np.ndarray:
    """(..., K) share of the pixels given to each class that are its own; NaN for a class never predicted."""
    return _ratio(_right(matrices), matrices.sum(-2))


def _right(matrices: np.ndarray) -> np.ndarray:
    return np.diagonal(matrices, axis1=-2, axis2=-1)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def mean_over_classes(values: np.ndarray, *, background: bool = True, nan: str = "zero") -> np.ndarray:
    """(...) mean of (..., K) values of classes.

    Args:
        background: with class 0, the unlabelled pixels (9 classes in MFNet), or without (8).
        nan: as `NAN`. With `skip` the mean of nothing is NaN.
    Raises: LabelError for another `nan`, and with `raise` when a class has no value.

    Example:
        >>> values = np.array([1.0, 0.5, np.nan])
        >>> [float(mean_over_classes(values, nan=nan, background=b)) for nan in ("zero", "skip") for b in (True, False)]
        [0.5, 0.25, 0.75, 0.5]
    """
    if nan not in NAN:
        raise LabelError(f'expected nan to be one of {", ".join(NAN)}, got "{nan}".{nearest(nan, NAN)}')
    values = values if background else values[..., 1:]
    known = ~np.isnan(values)
    if nan == "raise" and not known.all():
        lacking = np.flatnonzero(~known.reshape(-1, known.shape[-1]).all(0)) + (not background)
        raise LabelError(f"no pixel of class {first(map(str, lacking), 9)}; count it as 0 (zero) or leave it out "
                         "(skip).")  # fmt: skip
    total = np.where(known, values, 0.0).sum(-1)
    return _ratio(total, known.sum(-1) if nan == "skip" else np.full(total.shape, values.shape[-1]))


def mean_iou(matrices: np.ndarray, *, background: bool = True, nan: str = "zero") -> np.ndarray:
    """(...) mIoU of (..., K, K) matrices, weighed ones too: a statistic for `intervals.from_confusions`.

    Example:
        >>> float(mean_iou(np.array([[8, 0], [1, 1]])))
        0.6944444444444444
    """
    return mean_over_classes(iou(matrices), background=background, nan=nan)


def scores(confusions: np.ndarray, times: Sequence[str] = (), *, classes: Sequence[str] = CLASSES,
           nan: str = "zero") -> dict[str, Any]:  # fmt: skip
    """Every figure, over all images and over those of the day and of the night.

    Args:
        confusions: (N, K, K), one matrix an image. times: day, night or empty for each; without any, all are unknown.
    Returns: {"all", and "day" and "night" where there are such images}; of each, for MFNet's nine classes, miou_9 and
        macc_9 (with unlabelled), miou_8 and macc_8, pixel_accuracy, `classes` (name -> iou, recall, precision, None
        without a value), confusion (rows are the truth), frames, nan.
    Raises: LabelError for no images, numbers that do not fit, and with `nan="raise"` a class without a value.

    Example:
        >>> found = scores(np.array([[[6, 1], [1, 2]], [[9, 1], [0, 0]]]), ["day", "night"], classes=["none", "car"])
        >>> {name: round(part["miou_2"], 3) for name, part in found.items()}
        {'all': 0.617, 'day': 0.625, 'night': 0.45}
    """
    n, k = len(confusions), len(classes)
    if confusions.shape != (n, k, k) or n == 0 or len(times) not in (0, n):
        raise LabelError(f"expected (N, {k}, {k}) confusion matrices of one or more images and N times, got "
                         f"{confusions.shape} and {len(times)}.")  # fmt: skip
    picked = {name: [i for i, time in enumerate(times) if time == name] for name in SUBSETS[1:]}
    out = {"all": _figures(confusions.sum(0), n, classes, nan, "all")}
    for name, images in picked.items():
        if images:
            out[name] = _figures(confusions[images].sum(0), len(images), classes, nan, name)
    return out


def _figures(matrix: np.ndarray, frames: int, classes: Sequence[str], nan: str, subset: str) -> dict[str, Any]:
    k = len(classes)
    per = {"iou": iou(matrix), "recall": recall(matrix), "precision": precision(matrix)}
    figures: dict[str, Any] = {}
    for name, values in (("miou", per["iou"]), ("macc", per["recall"])):
        if nan == "raise" and np.isnan(values).any():
            lacking = [label for label, value in zip(classes, values, strict=True) if np.isnan(value)]
            raise LabelError(f"{name} of {subset}: no pixel of {first(lacking, 9)} in {frames} images; count a class "
                             "without pixels as 0 (zero) or leave it out (skip).")  # fmt: skip
        for background in (True, False):
            mean = mean_over_classes(values, background=background, nan=nan)
            figures[f"{name}_{k if background else k - 1}"] = _number(mean)
    figures["pixel_accuracy"] = _number(_ratio(np.trace(matrix), matrix.sum()))
    figures["classes"] = {label: {name: _number(values[i]) for name, values in per.items()}
                          for i, label in enumerate(classes)}  # fmt: skip
    return figures | {"confusion": matrix.astype(int).tolist(), "frames": frames, "nan": nan}


def _number(value: np.ndarray) -> float | None:
    return float(value) if np.isfinite(value) else None
