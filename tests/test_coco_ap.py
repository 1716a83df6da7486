"""Average precision against pycocotools on random lists, and against figures made elsewhere for real files."""

from __future__ import annotations

import contextlib
import csv
import io
from pathlib import Path

import numpy as np
import pytest

from freqkd_train.metrics import coco, intervals, kaist
from freqkd_train.metrics.boxes import EVERY_CLASS, make_detections, make_truth
from freqkd_train.result_files import read_annotations, read_results

STATS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100")
CASES = 500


def reference(truth, found) -> tuple[dict, np.ndarray]:
    """pycocotools: its first nine figures (-1 as None), and its precision array for the figures by class."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def rows(image, category, box, **more):
        return [
            {"id": k + 1, "image_id": int(i) + 1, "category_id": int(c) + 1, "bbox": b.tolist(),
             "area": float(b[2] * b[3]), "iscrowd": 0} | {name: values[k] for name, values in more.items()}
            for k, (i, c, b) in enumerate(zip(image, category, box, strict=True))
        ]  # fmt: skip

    with contextlib.redirect_stdout(io.StringIO()):
        pair = []
        for annotations in (
            rows(truth.image, truth.category, truth.box, iscrowd=truth.ignore.astype(int).tolist()),
            rows(found.image, found.category, found.box, score=found.score.tolist()),
        ):
            one = COCO()
            one.dataset = {"images": [{"id": k + 1} for k in range(len(truth.names))], "annotations": annotations,
                           "categories": [{"id": k + 1, "name": c} for k, c in enumerate(truth.classes)]}  # fmt: skip
            one.createIndex()
            pair.append(one)
        run = COCOeval(*pair, "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    figures = dict(zip(STATS, run.stats, strict=False))
    return {name: None if value == -1 else float(value) for name, value in figures.items()}, run.eval["precision"]


def made_up(seed: int):
    """Boxes of all sizes in few images, ties, regions, doubled and wrong-class detections; some lists are empty."""
    rng = np.random.default_rng(seed)
    n, kinds = int(rng.integers(1, 4)), int(rng.integers(1, 3))
    m = int(rng.integers(1, 9)) * int(rng.random() > 0.05)
    d = int(rng.integers(1, 22)) * int(rng.random() > 0.05)
    box = np.column_stack([rng.integers(0, 200, (m, 2)), rng.choice([9, 20, 32, 40, 96, 150], (m, 2))]).astype(float)
    image, category = rng.integers(0, n, m), rng.integers(0, kinds, m)
    at = rng.integers(0, max(m, 1), d)
    if m:
        moved = np.maximum(box[at] + rng.choice([-4.0, 0.0, 0.0, 1.0, 5.0], (d, 4)), 1.0)
        where, kind = image[at], np.where(rng.random(d) < 0.8, category[at], rng.integers(0, kinds, d))
    else:
        moved, where, kind = rng.uniform(5, 90, (d, 4)), rng.integers(0, n, d), rng.integers(0, kinds, d)
    score = rng.integers(0, 8, d) / 8 if rng.random() < 0.5 else rng.standard_normal(d)
    truth = make_truth([str(k) for k in range(n)], classes=[f"c{k}" for k in range(kinds)], image=image,
                       category=category, box=box, ignore=rng.random(m) < 0.2)  # fmt: skip
    return truth, make_detections(where, moved, score, kind)


@pytest.mark.parametrize("block", range(5))
def test_random_lists_agree_with_pycocotools(block: int) -> None:
    size, empty, told = CASES // 5, 0, 0
    for seed in range(size * block, size * (block + 1)):
        truth, found = made_up(seed)
        expected, precision = reference(truth, found)
        got = coco.average_precision(truth, found)
        for name in STATS:
            assert got[name] == pytest.approx(expected[name], abs=1e-9), (seed, name)
        for k, kind in enumerate(truth.classes):
            for name, part in (("ap", slice(None)), ("ap50", 0), ("ap75", 5)):
                values = precision[part, :, k, 0, 2]
                mean = float(values.mean()) if (values > -1).all() else None
                assert got["classes"][kind][name] == pytest.approx(mean, abs=1e-9), (seed, kind, name)
        assert coco.ap50(truth, found) == pytest.approx(expected["ap50"], abs=1e-9)
        empty += not len(found.score) or not len(truth.image)
        told += expected["ap"] is not None and 0.05 < expected["ap"] < 0.95
    assert empty >= 2 and told > size // 3


def test_our_own_ap50_is_the_evaluators() -> None:
    for seed in range(150):
        truth, found = made_up(seed)
        own = intervals.average_precision_50(truth, found, ~truth.ignore, intervals.units(truth))
        (value,) = own(np.ones((1, len(intervals.units(truth)))))
        expected = coco.ap50(truth, found)
        assert value == pytest.approx(np.nan if expected is None else expected, abs=1e-12, nan_ok=True), seed


def test_nothing_found_is_zero_and_nothing_there_is_none() -> None:
    truth = make_truth(["a"], classes=["x", "y"], image=[0], category=[0], box=[[0, 0, 20, 20]])
    got = coco.average_precision(truth, make_detections())
    assert (got["ap"], got["ap50"], got["ap_small"], got["ap_large"]) == (0.0, 0.0, 0.0, None)
    assert got["classes"]["x"] == {"ap": 0.0, "ap50": 0.0, "ap75": 0.0, "counted": 1}
    assert got["classes"]["y"] == {"ap": None, "ap50": None, "ap75": None, "counted": 0}
    nothing = coco.average_precision(make_truth(["a"], classes=["x"]), make_detections([0], [[0, 0, 9, 9]], [0.5]))
    assert all(nothing[name] is None for name in STATS)
    assert coco.average_precision(make_truth([], classes=["x"]), make_detections())["ap"] is None


def test_a_region_of_every_class_takes_detections_of_each() -> None:
    box = [[0, 0, 20, 20], [100, 0, 20, 20], [200, 0, 50, 50]]
    truth = make_truth(["a"], classes=["x", "y"], image=[0, 0, 0], category=[0, 1, EVERY_CLASS], box=box,
                       ignore=[False, False, True])  # fmt: skip
    found = make_detections([0] * 4, [*box, [210, 10, 9, 9]], [0.1, 0.2, 0.9, 0.8], [0, 1, 0, 1])
    got = coco.average_precision(truth, found)
    assert got["ap50"] == pytest.approx(1.0) and got["classes"]["y"]["ap50"] == pytest.approx(1.0)
    assert coco.ap50(coco.keep(truth, ~truth.ignore), found) == pytest.approx(0.5)


def test_precision_and_recall_average_to_ap50() -> None:
    truth, found = made_up(3)
    recall, precision = coco.precision_recall(truth, found, ~truth.ignore)
    assert recall[[0, -1]].tolist() == [0.0, 1.0]
    assert precision.mean() == pytest.approx(coco.ap50(truth, found))


def subset(read, found, name: str):
    images = [k for k, time in enumerate(read.truth.times) if name in ("all", time)]
    return read.truth.take(images), found.take(images, len(read.truth.names))


def test_published_results_under_both_ignore_rules(benchmarks: Path) -> None:
    folder = benchmarks / "kaist/published_results"
    read = read_annotations(folder / "KAIST_annotation.json")
    with (folder / "expected_ap.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    files = {}
    for row in rows:
        (path,) = folder.glob(f"{row['file']}*")
        if path not in files:
            files[path] = read_results(path, read)
        truth, found = subset(read, files[path], row["subset"])
        rule = "reasonable" if row["gt_rule"] == "reasonable" else "all_boxes"
        truth, counted = coco.readings(truth)[rule]
        got = coco.average_precision(truth, found, counted)
        assert int(counted.sum()) == int(row["n_gt"])
        for key, column in (("ap", "ap_coco"), ("ap50", "ap50_coco"), ("ar100", "ar100_coco")):
            assert abs(100 * got[key] - float(row[column])) <= 0.000051, (row["file"], rule, row["subset"], key)


READINGS = {
    "reasonable": "reasonable_rest_ignored", "reasonable_rest_dropped": "reasonable_rest_dropped",
    "all_boxes": "all_persons_others_ignored", "all_boxes_rest_dropped": "all_persons_others_dropped",
    "all_labels_merged": "all_labels_merged",
}  # fmt: skip


def test_published_results_under_five_readings(benchmarks: Path) -> None:
    folder = benchmarks / "kaist/published_results"
    read = read_annotations(folder / "KAIST_annotation.json")
    with (folder / "ap50_readings.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    for row in rows:
        (path,) = folder.glob(f"{row['method']}_result.txt*")
        found = read_results(path, read)
        for rule, (truth, counted) in coco.readings(read.truth).items():
            unit = intervals.units(truth)
            (value,) = intervals.average_precision_50(truth, found, counted, unit)(np.ones((1, len(unit))))
            assert abs(100 * value - float(row[f"ap50_{READINGS[rule]}"])) <= 0.00501, (row["method"], rule)
            assert int(counted.sum()) == int(row[f"n_gt_{READINGS[rule]}"])


@pytest.mark.parametrize(
    ("folder", "name"),
    [("hit_uav/annotations", "val"), ("hit_uav/annotations", "train"), ("flir/align/annotations_coco", "val")],
)
def test_fixtures_with_twelve_figures(benchmarks: Path, folder: str, name: str) -> None:
    read = read_annotations(benchmarks / folder / f"{name}.json")
    found = read_results(benchmarks / folder / f"fixture_detections_{name}.json", read)
    got = coco.average_precision(read.truth, found)
    flat = {key.upper().replace("_", ""): value for key, value in got.items() if key != "classes"}
    flat |= {f"AP{c}".upper(): row["ap"] for c, row in got["classes"].items()}
    flat |= {f"AP50{c}".upper(): row["ap50"] for c, row in got["classes"].items()}
    with (benchmarks / folder / f"fixture_detections_{name}_expected.csv").open() as handle:
        rows = [row for row in csv.DictReader(handle) if not row["metric"].startswith(("VOC", "AR_"))]
    assert len(rows) >= 12
    for row in rows:
        assert abs(flat[row["metric"].upper().replace("_", "")] - float(row["value"])) <= 5.1e-7, row


def test_reasonable_rule_and_miss_rate_count_the_same_boxes() -> None:
    truth = make_truth(["a"], classes=["person"], image=[0, 0], category=[0, 0],
                       box=[[100, 100, 30, 80], [300, 100, 20, 40]])  # fmt: skip
    counted = coco.readings(truth)["reasonable"][1]
    assert counted.tolist() == kaist.counts(truth, kaist.SETTINGS["Reasonable"]).tolist() == [True, False]
