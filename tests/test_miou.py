"""Confusion matrices and their means, against sets of pixels, hand-made cases and the exercise of the benchmark kit."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import numpy as np
import pytest

from freqkd_analysis import statistics
from freqkd_analysis.errors import FreqkdError
from freqkd_train.metrics import intervals, miou


def labels(rng: np.random.Generator, shape: tuple[int, int], classes: int = 9) -> np.ndarray:
    return rng.integers(0, classes, shape, dtype=np.uint8)


def by_sets(truths: list[np.ndarray], predictions: list[np.ndarray], classes: int) -> np.ndarray:
    """IoU by sets of pixel places: no matrix."""
    found = []
    for k in range(classes):
        a, b = ({(i, *at) for i, image in enumerate(images) for at in zip(*np.nonzero(image == k), strict=True)}
                for images in (truths, predictions))  # fmt: skip
        found.append(len(a & b) / len(a | b) if a | b else np.nan)
    return np.array(found)


@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (16, 10), (1, 31)])
@pytest.mark.parametrize("classes", [2, 9])
def test_iou_is_that_of_sets_of_pixels(rng: np.random.Generator, shape: tuple[int, int], classes: int) -> None:
    truths, predictions = ([labels(rng, shape, classes) for _ in range(3)] for _ in range(2))
    matrices = np.stack([miou.confusion(t, p, "x", classes) for t, p in zip(truths, predictions, strict=True)])
    assert matrices.dtype == np.int64 and matrices.sum() == 3 * shape[0] * shape[1]
    wanted = by_sets(truths, predictions, classes)
    np.testing.assert_allclose(miou.iou(matrices.sum(0)), wanted, rtol=0, atol=1e-15)
    np.testing.assert_allclose(
        miou.mean_iou(matrices.sum(0), nan="skip"), np.nanmean(wanted) if (~np.isnan(wanted)).any() else np.nan
    )


def test_rows_are_the_truth() -> None:
    matrix = miou.confusion(np.full((2, 3), 1), np.full((2, 3), 2), "x")
    assert matrix[1, 2] == 6 and matrix.sum() == 6
    assert miou.recall(matrix)[1] == 0 and np.isnan(miou.recall(matrix)[2])
    assert miou.precision(matrix)[2] == 0 and np.isnan(miou.precision(matrix)[1])
    assert miou.iou(matrix)[[1, 2]].tolist() == [0, 0] and np.isnan(miou.iou(matrix)[0])


def test_labels_of_eight_bits_do_not_wrap() -> None:
    """200 classes have 40,000 cells, more than the type of the labels counts to."""
    matrix = miou.confusion(np.array([[199, 3]], np.uint8), np.array([[198, 199]], np.uint8), "x", classes=200)
    assert matrix[199, 198] == matrix[3, 199] == 1 and matrix.sum() == 2


def test_pixel_accuracy_is_the_share_of_equal_pixels(rng: np.random.Generator) -> None:
    truth, predicted = (rng.integers(0, 9, (3, 7, 13)) for _ in range(2))
    matrices = np.stack([miou.confusion(t, p, "x") for t, p in zip(truth, predicted, strict=True)])
    assert miou.scores(matrices)["all"]["pixel_accuracy"] == pytest.approx((truth == predicted).mean(), abs=1e-15)


def test_a_class_that_nobody_named_counts_as_asked() -> None:
    matrix = np.diag([10, 5, 0, 5])
    assert miou.mean_iou(matrix) == 3 / 4
    assert miou.mean_iou(matrix, background=False) == 2 / 3
    assert miou.mean_iou(matrix, nan="skip") == miou.mean_iou(matrix, nan="skip", background=False) == 1
    with pytest.raises(FreqkdError, match="no pixel of class 2; count it as 0"):
        miou.mean_iou(matrix, nan="raise", background=False)
    with pytest.raises(FreqkdError, match='got "zeros". Did you mean "zero"'):
        miou.mean_iou(matrix, nan="zeros")
    assert miou.mean_iou(np.diag([1, 1]), nan="raise") == 1
    assert np.isnan(miou.mean_iou(np.zeros((3, 3)), nan="skip")) and miou.mean_iou(np.zeros((3, 3))) == 0


def test_subsets_are_by_time_and_all_holds_every_image(rng: np.random.Generator) -> None:
    confusions = rng.integers(0, 50, (5, 9, 9))
    found = miou.scores(confusions, ["day", "night", "day", "", "night"])
    assert {name: part["frames"] for name, part in found.items()} == {"all": 5, "day": 2, "night": 2}
    for name, picked in (("all", range(5)), ("day", [0, 2]), ("night", [1, 4])):
        matrix = confusions[list(picked)].sum(0)
        assert found[name]["confusion"] == matrix.tolist()
        assert found[name]["miou_9"] == pytest.approx(float(miou.mean_iou(matrix)), abs=1e-15)
        rows = matrix / matrix.sum(1, keepdims=True)
        assert found[name]["macc_8"] == pytest.approx(np.mean([rows[k, k] for k in range(1, 9)]), abs=1e-14)
    assert set(miou.scores(confusions)) == set(miou.scores(confusions, ["day"] * 5)) - {"day"} == {"all"}


def test_what_has_no_value_is_none_or_an_error_that_names_it() -> None:
    only = np.zeros((2, 9, 9), dtype=int)
    only[:, 0, 0], only[0, 1, 0] = 7, 1
    found = miou.scores(only, ["day", "night"], nan="skip")
    assert found["night"]["classes"]["car"] == {"iou": None, "recall": None, "precision": None}
    assert found["night"]["miou_9"] == 1 and found["night"]["miou_8"] is None and found["day"]["miou_8"] == 0
    with pytest.raises(FreqkdError, match="miou of all: no pixel of person, bike, curve"):
        miou.scores(only, ["day", "night"], nan="raise")


@pytest.mark.parametrize(
    ("truth", "predicted", "told"),
    [
        (np.array([[0, 9]]), np.zeros((1, 2), int), "labels/00001D.png: the label image holds the value 9; .* 0 to 8"),
        (np.array([[0, 255]], np.uint8), np.zeros((1, 2), int), "the label image holds the value 255"),
        (np.array([[0, -1]]), np.zeros((1, 2), int), "the label image holds the value -1"),
        (np.zeros((1, 2), int), np.array([[0, 10]]), "labels/00001D.png: the prediction holds the value 10"),
        (np.zeros((1, 2)), np.zeros((1, 2), int), "the label image holds float64 values"),
        (np.zeros((2, 1), int), np.zeros((1, 2), int), r"rows and columns \(2, 1\), got \(1, 2\)"),
        (np.zeros((1, 2, 3), int), np.zeros((1, 2, 3), int), "rows and columns"),
    ],
)
def test_labels_that_are_none_are_told_with_their_file(truth: np.ndarray, predicted: np.ndarray, told: str) -> None:
    with pytest.raises(FreqkdError, match=told):
        miou.confusion(truth, predicted, "labels/00001D.png")


@pytest.mark.parametrize("confusions", [np.zeros((0, 9, 9)), np.zeros((9, 9)), np.zeros((1, 8, 8))])
def test_no_images_or_other_classes_are_an_error(confusions: np.ndarray) -> None:
    with pytest.raises(FreqkdError, match="confusion matrices of one or more images"):
        miou.scores(confusions)
    with pytest.raises(FreqkdError, match="and 2"):
        miou.scores(np.ones((1, 9, 9)), ["day", "day"])


def test_images_are_resampled_by_their_matrices(rng: np.random.Generator) -> None:
    """A draw of whole sequences has the mIoU of the images it holds, repeated as often as drawn."""
    confusions, groups = rng.integers(0, 30, (6, 9, 9)), ["a", "a", "b", "c", "c", "c"]
    figure = intervals.from_confusions(confusions, statistics.units(list("012345"), groups), miou.mean_iou)
    drawn = np.array([[1, 1, 1], [2, 0, 1], [0, 3, 0]])
    images = [[0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 3, 4, 5], [2, 2, 2]]
    np.testing.assert_allclose(figure(drawn), [miou.mean_iou(confusions[rows].sum(0)) for rows in images], rtol=1e-12)


@pytest.mark.slow  # timed: a machine that is shared would fail it
def test_full_size_images_are_counted_in_milliseconds(rng: np.random.Generator) -> None:
    truth, predicted = labels(rng, (480, 640)), labels(rng, (480, 640))
    clock = time.monotonic()
    for _ in range(10):
        miou.confusion(truth, predicted, "x")
    assert time.monotonic() - clock < 1.0  # about 5 ms an image


def exercise(folder: Path) -> tuple[np.ndarray, list[str]]:
    """Labels moved 5 px to the right; in every fifth image bikes become cars."""
    from PIL import Image

    names = (folder / "val.txt").read_text().split()
    matrices = []
    for i, name in enumerate(names):
        with Image.open(folder / "labels" / f"{name}.png") as file:
            truth = np.asarray(file)
        predicted = np.zeros_like(truth)
        predicted[:, 5:] = truth[:, :-5]
        if i % 5 == 0:
            predicted[predicted == 3] = 1
        matrices.append(miou.confusion(truth, predicted, name))
    return np.stack(matrices), ["day" if name.endswith("D") else "night" for name in names]


def test_the_exercise_of_the_benchmark_kit(benchmarks: Path) -> None:
    """Matrix to the pixel, figures to the six decimals of the kit."""
    folder = benchmarks / "mfnet"
    confusions, times = exercise(folder)
    wanted = np.loadtxt(folder / "expected_confusion.csv", delimiter=",", dtype=np.int64)
    zero, skip = (miou.scores(confusions, times, nan=nan) for nan in ("zero", "skip"))
    assert zero["all"]["confusion"] == wanted.tolist() and zero["all"]["frames"] == 100
    assert zero["day"]["frames"] + zero["night"]["frames"] == 100
    assert (np.array(zero["day"]["confusion"]) + np.array(zero["night"]["confusion"]) == wanted).all()
    figures = {f"{short}_{name}": values[long] for name, values in zero["all"]["classes"].items()
               for short, long in (("IoU", "iou"), ("recall", "recall"), ("precision", "precision"))}  # fmt: skip
    figures |= {
        "mIoU_nan_to_zero_9classes": zero["all"]["miou_9"],
        "mIoU_nanmean_with_background": skip["all"]["miou_9"],
        "mIoU_nanmean_without_background": skip["all"]["miou_8"],
        "mAcc_nan_to_zero_9classes": zero["all"]["macc_9"],
        "mAcc_nanmean_with_background": skip["all"]["macc_9"],
        "pixel_accuracy": zero["all"]["pixel_accuracy"],
    }
    with open(folder / "expected_miou.csv", newline="") as file:
        expected = {row["metric"]: float(row["value"]) for row in csv.DictReader(file)}
    assert set(figures) == set(expected)
    for name, value in expected.items():
        got = np.nan if figures[name] is None else figures[name]
        assert got == pytest.approx(value, abs=5.1e-7, nan_ok=True), name
