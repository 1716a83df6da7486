"""Weighing a draw against really repeating its images; pairing, few groups, speed."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from freqkd_analysis import statistics
from freqkd_train.metrics import coco, intervals, kaist
from freqkd_train.metrics.boxes import make_detections, make_truth


def made_up(seed: int, n: int = 12, groups: int = 4, kinds: int = 2, per_image: int = 6):
    """A list of persons and cars with ignore regions; detections near them and elsewhere, with ties."""
    rng = np.random.default_rng(seed)
    m, d = 3 * n, per_image * n
    box = np.column_stack([rng.integers(5, 500, m), rng.integers(5, 300, m), rng.integers(20, 60, m),
                           rng.integers(40, 120, m)]).astype(float)  # fmt: skip
    image, category = np.sort(rng.integers(0, n, m)), rng.integers(0, kinds, m)
    at = rng.integers(0, m, d)
    moved = box[at] + rng.choice([-40.0, 0.0, 2.0, 5.0], (d, 4))
    moved[:, 2:] = np.maximum(moved[:, 2:], 1)
    truth = make_truth(
        [f"i{k}" for k in range(n)], classes=[f"c{k}" for k in range(kinds)], image=image, category=category, box=box,
        ignore=rng.random(m) < 0.15, groups=[f"v{k % groups}" for k in range(n)],
        times=["day" if k % groups < 2 else "night" for k in range(n)],
    )  # fmt: skip
    kind = np.where(rng.random(d) < 0.8, category[at], rng.integers(0, kinds, d))
    # Ties between images alone: of copies of an image, ties within it would come in another order than weights give.
    score = np.arange(d) if kinds == 1 else np.array([(image[at][:k] == image[at][k]).sum() for k in range(d)]) * 7 % 31
    return truth, make_detections(image[at], moved, score / 31, kind)


def repeated(truth, found, weights):
    """The list in which every image stands as often as its group is drawn, copies beside one another."""
    times = weights[intervals.units(truth).index].astype(int)
    images = np.repeat(np.arange(len(times)), times)
    names, boxes, rows = [], [], []
    for place, number in enumerate(images):
        names.append(f"{truth.names[number]} {place}")
        boxes += [(place, m) for m in np.flatnonzero(truth.image == number)]
        rows += [(place, d) for d in np.flatnonzero(found.image == number)]
    at, m = (np.array([pair[k] for pair in boxes], dtype=int) for k in (0, 1))
    image, d = (np.array([pair[k] for pair in rows], dtype=int) for k in (0, 1))
    bigger = make_truth(names, classes=truth.classes, image=at, category=truth.category[m], box=truth.box[m],
                        ignore=truth.ignore[m], occlusion=truth.occlusion[m])  # fmt: skip
    return bigger, replace(found.of(d), image=image)


@pytest.mark.parametrize("seed", range(6))
def test_a_weighed_draw_is_the_list_with_images_repeated(seed: int) -> None:
    truth, found = made_up(seed)
    unit = intervals.units(truth)
    weights = np.vstack([statistics.bootstrap_weights(4, draws=9, seed=seed), np.ones(4), 1 - np.eye(4), np.zeros(4)])
    ap50 = intervals.average_precision_50(truth, found, ~truth.ignore, unit)(weights)
    rate = intervals.miss_rate(truth, found, unit)(weights)
    for k, row in enumerate(weights):
        bigger, more = repeated(truth, found, row)
        expected = coco.ap50(bigger, more)
        assert ap50[k] == pytest.approx(np.nan if expected is None else expected, abs=1e-12, nan_ok=True)
        expected = kaist.miss_rates(bigger, more, ["Reasonable"])[0].miss_rate
        assert rate[k] == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_pieces_do_not_change_a_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, found = made_up(1)
    unit = intervals.units(truth)
    weights = statistics.bootstrap_weights(4, draws=50)
    figures = (
        intervals.average_precision_50(truth, found, ~truth.ignore, unit),
        intervals.miss_rate(truth, found, unit),
    )
    whole = [figure(weights) for figure in figures]
    monkeypatch.setattr(intervals, "CHUNK", 1)
    for figure, expected in zip(figures, whole, strict=True):
        assert np.array_equal(figure(weights), expected)


def test_whole_counts_at_a_share_follow_the_division_not_the_product() -> None:
    totals = np.arange(1.0, 301.0)
    least = intervals._least_whole(totals[:, None], intervals.RECALLS)
    points = np.concatenate([kaist.POINTS, intervals.RECALLS])
    most = intervals._largest_whole(totals[:, None], points)
    for row, total in enumerate(totals):
        shares = np.arange(0, total + 1) / total
        assert least[row].tolist() == np.searchsorted(shares, intervals.RECALLS, side="left").tolist(), total
        assert most[row].tolist() == (np.searchsorted(shares, points, side="right") - 1).tolist(), total


def test_a_class_that_a_draw_does_not_hold_is_left_out_of_its_mean() -> None:
    box = [[10.0, 10, 20, 60], [10, 10, 20, 60]]
    truth = make_truth(["a", "b"], classes=["x", "y"], image=[0, 1], category=[0, 1], box=box)
    found = make_detections([0], box[:1], [0.5], [0])
    figure = intervals.average_precision_50(truth, found, ~truth.ignore, intervals.units(truth))
    assert figure(np.array([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])).tolist() == pytest.approx([1.0, 0.0, 0.5])


def test_nothing_found_weighs_to_zero_and_one() -> None:
    truth, _ = made_up(0)
    unit = intervals.units(truth)
    rows = statistics.bootstrap_weights(4, draws=5)
    assert intervals.average_precision_50(truth, make_detections(), ~truth.ignore, unit)(rows).tolist() == [0.0] * 5
    assert intervals.miss_rate(truth, make_detections(), unit)(rows).tolist() == [1.0] * 5


def test_a_run_and_itself_differ_by_nothing_and_a_worse_one_clearly() -> None:
    truth, found = made_up(2, n=60, groups=20)
    rng = np.random.default_rng(0)
    worse = found.of(np.sort(rng.permutation(len(found.score))[: len(found.score) // 3]))
    unit = intervals.units(truth)
    figures = {
        "ap50": [intervals.average_precision_50(truth, run, ~truth.ignore, unit) for run in (found, found, worse)]
    }
    got = intervals.paired(figures, unit, draws=400)
    assert got["warning"] == "" and got["groups"] == 20 and got["unit"] == "group"
    same, drop, again = got["figures"]["ap50"]["differences"]
    assert (same["value"], same["low"], same["high"], same["clear"]) == (0.0, 0.0, 0.0, False)
    assert drop["runs"] == [0, 2] and drop["high"] < 0 and drop["clear"] and again == drop | {"runs": [1, 2]}
    runs = got["figures"]["ap50"]["runs"]
    assert drop["value"] == pytest.approx(runs[2]["value"] - runs[0]["value"])
    assert runs[0]["low"] < runs[0]["value"] < runs[0]["high"]
    # Pairing: the difference is known better than the two runs apart.
    assert drop["high"] - drop["low"] < sum(run["high"] - run["low"] for run in (runs[0], runs[2]))
    assert intervals.paired(figures, unit, draws=400) == got


@pytest.mark.parametrize(("groups", "words"), [(4, "only 4 groups"), (1, "one group"), (2, "only 2 groups")])
def test_few_groups_are_said(groups: int, words: str) -> None:
    truth, found = made_up(3, groups=groups)
    unit = intervals.units(truth)
    got = intervals.paired({"mr": [intervals.miss_rate(truth, found, unit)]}, unit, draws=50)
    assert words in got["warning"]
    if groups == 2:
        (row,) = got["figures"]["mr"]["runs"]
        assert (row["low"], row["high"], row["method"]) == (None, None, "none")


def test_confusion_matrices_weigh_as_sums() -> None:
    rng = np.random.default_rng(0)
    confusions = rng.integers(0, 50, (9, 3, 3))
    unit = statistics.units([str(k) for k in range(9)], [f"v{k % 3}" for k in range(9)])

    def mean_iou(matrix: np.ndarray) -> np.ndarray:
        right = np.diagonal(matrix, axis1=-2, axis2=-1)
        return (right / (matrix.sum(-1) + matrix.sum(-2) - right)).mean(axis=-1)

    weights = statistics.bootstrap_weights(3, draws=6)
    got = intervals.from_confusions(confusions, unit, mean_iou)(weights)
    for value, row in zip(got, weights, strict=True):
        assert value == pytest.approx(float(mean_iou((confusions * row[unit.index][:, None, None]).sum(0))))


@pytest.mark.slow  # timed: a machine that is shared would fail it
@pytest.mark.parametrize("groups", [16, 60])
def test_two_thousand_draws_of_three_runs_take_seconds(groups: int) -> None:
    truth, found = made_up(0, n=2252, groups=groups, kinds=1)
    unit = intervals.units(truth)
    started = time.process_time()
    runs = [found, found.of(np.arange(0, len(found.score), 2)), found.of(np.arange(1, len(found.score), 2))]
    figures = {"ap50": [intervals.average_precision_50(truth, run, ~truth.ignore, unit) for run in runs],
               "mr": [intervals.miss_rate(truth, run, unit) for run in runs]}  # fmt: skip
    intervals.paired(figures, unit, draws=2000)
    assert time.process_time() - started < 5.0
