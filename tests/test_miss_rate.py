"""The log-average miss rate against a slow one with plain loops, and against figures published for five methods."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from freqkd_analysis.errors import FreqkdError
from freqkd_train.metrics import kaist
from freqkd_train.metrics.boxes import make_detections, make_truth
from freqkd_train.result_files import read_annotations, read_results

PUBLISHED = "kaist/published_results"


def iou(d, g, region: bool) -> float:
    w = min(d[0] + d[2], g[0] + g[2]) - max(d[0], g[0])
    h = min(d[1] + d[3], g[1] + g[3]) - max(d[1], g[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / (d[2] * d[3] if region else d[2] * d[3] + g[2] * g[3] - w * h)


def one_image(truths, found, script: bool):
    """[(score, is_true, is_removed)] of one image: the walk over boxes of the evaluation scripts, word for word."""
    truths = sorted(truths, key=lambda t: not t["counted"])
    order = sorted(range(len(found)), key=lambda i: -found[i][1])
    ranked = [found[i] for i in order][:1000]
    table = [[iou(box, t["box"], not t["counted"]) for t in truths] for box, _ in ranked]
    if script:
        table = [table[i] for i in order]
    taken, rows = set(), []
    for k, (_, score) in enumerate(ranked):
        best, holder = 0.5, None
        for g, t in enumerate(truths):
            if t["counted"] and g in taken:
                continue
            if holder is not None and truths[holder]["counted"] and not t["counted"]:
                break
            if table[k][g] < best:
                continue
            best, holder = table[k][g], g
        if holder is None:
            rows.append((score, False, False))
        elif truths[holder]["counted"]:
            taken.add(holder)
            rows.append((score, not (script and truths[holder]["id"] == 0), False))
        else:
            rows.append((score, False, True))
    return rows


def slow(truth, found, setting: str, subset: str, script: bool) -> float:
    rule = kaist.SETTINGS[setting]
    rows, counted, images = [], 0, 0
    for number in range(len(truth.names)):
        if subset != "all" and truth.times[number] != subset:
            continue
        images += 1
        truths = []
        for m in np.flatnonzero(truth.image == number):
            x, y, w, h = truth.box[m]
            good = rule.low <= h <= rule.high and truth.occlusion[m] in rule.occlusion and not truth.ignore[m]
            good = good and x >= 5 and y >= 5 and x + w <= 635 and y + h <= 507
            truths.append({"box": truth.box[m], "counted": bool(good), "id": int(m)})
        dets = [(found.box[d], found.score[d]) for d in np.flatnonzero(found.image == number)]
        if script and not dets:
            continue
        counted += sum(t["counted"] for t in truths)
        rows += one_image(truths, dets, script)
    if not counted:
        return math.nan
    rows = [row for row in sorted(rows, key=lambda row: -row[0]) if not row[2]]
    logs = []
    for point in range(9):
        limit = 10 ** (-2 + 0.25 * point)
        limit = round(limit, 4) if script else limit
        true = false = 0
        recall, before = 0.0, True
        for _, is_true, _ in rows:
            true, false = true + is_true, false + (not is_true)
            if false / images <= limit:
                recall, before = true / counted, False
        if script and before and rows:
            recall = true / counted
        missed = 1 - recall if script else max(1 - recall, 1e-10)
        logs.append(math.log(missed) if missed > 0 else -math.inf)
    return math.exp(sum(logs) / 9)


def made_up(seed: int):
    """A small list with ties, ignore regions, border boxes, empty images, unsorted lines and repeated boxes."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 9))
    m, d = int(rng.integers(0, 14)), int(rng.integers(0, 30))
    box = np.column_stack([rng.integers(0, 560, m), rng.integers(0, 360, m), rng.integers(15, 90, m),
                           rng.integers(30, 140, m)]).astype(float)  # fmt: skip
    image = np.sort(rng.integers(0, n, m))
    at = rng.integers(0, max(m, 1), d)
    near = m > 0 and rng.random() < 0.95
    moved = box[at] + rng.choice([-9.0, 0.0, 3.0, 12.0], (d, 4)) if near else rng.uniform(10, 90, (d, 4))
    score = rng.integers(0, 6, d) / 4 if rng.random() < 0.5 else rng.standard_normal(d)
    truth = make_truth(
        [f"i{k}" for k in range(n)], classes=["person"], image=image, category=np.zeros(m), box=box,
        ignore=rng.random(m) < 0.2, occlusion=rng.integers(0, 3, m), times=rng.choice(["day", "night"], n).tolist(),
    )  # fmt: skip
    where = image[at] if near else rng.integers(0, n, d)
    return truth, make_detections(where, np.maximum(moved, 1.0), score)


@pytest.mark.parametrize("style", ["matlab", "script"])
@pytest.mark.parametrize("block", range(8))
def test_random_lists_agree_with_plain_loops(style: str, block: int) -> None:
    told = 0
    for seed in range(40 * block, 40 * block + 40):
        truth, found = made_up(seed)
        for rate in kaist.miss_rates(truth, found, style=style):
            expected = slow(truth, found, rate.setting, rate.subset, style == "script")
            assert rate.miss_rate == pytest.approx(expected, abs=1e-12, nan_ok=True), (seed, rate)
            told += 0.01 < expected < 0.99
    assert told > 100  # the lists must be ones on which the rules matter


def test_the_order_of_lines_changes_nothing() -> None:
    truth, found = made_up(7)
    found = found.of(np.unique(found.score, return_index=True)[1])
    moved = found.of(np.random.default_rng(0).permutation(len(found.score)))
    assert kaist.miss_rates(truth, found) == pytest.approx(kaist.miss_rates(truth, moved), nan_ok=True)


def person(n: int = 1, **more):
    box = [[100 + 50 * i, 100, 30, 80] for i in range(n)]
    return make_truth(["a"], classes=["person"], image=[0] * n, category=[0] * n, box=box, **more)


def test_nothing_found_nothing_there_and_no_images() -> None:
    (rate,) = kaist.miss_rates(person(), make_detections(), ["Reasonable"])
    assert (rate.miss_rate, rate.recall, rate.counted) == (1.0, 0.0, 1)
    for truth in (make_truth(["a"], classes=["person"]), make_truth([], classes=["person"])):
        (rate,) = kaist.miss_rates(truth, make_detections(), ["Reasonable"])
        assert math.isnan(rate.miss_rate) and rate.counted == 0


def test_all_found_is_the_floor_in_matlab_and_zero_in_the_script() -> None:
    truth = person(2)
    found = make_detections([0, 0], truth.box, [0.5, 0.4])
    rates = {style: kaist.miss_rates(truth, found, ["Reasonable"], style)[0].miss_rate for style in kaist.STYLES}
    assert rates["matlab"] == pytest.approx(1e-10)
    # The script loses the box of id 0; without that, and where 1e-5 is added, see the others.
    assert rates["script"] == pytest.approx(0.5)
    assert rates["script-all-boxes"] == 0.0


def test_other_classes_are_no_persons() -> None:
    truth = make_truth(["a"], classes=["person", "car"], image=[0, 0], category=[0, 1],
                       box=[[100, 100, 30, 80], [300, 100, 90, 80]])  # fmt: skip
    found = make_detections([0, 0, 0], [*truth.box, [100, 100, 30, 80]], [0.5, 0.6, 0.9], [0, 0, 1])
    (curve,) = kaist.curves(truth, found, ["Reasonable"]).values()
    assert curve.counted == 1 and curve.true.tolist() == [1] and curve.false.tolist() == [0]


def test_at_most_a_thousand_detections_an_image() -> None:
    truth = person()
    box = np.tile([[400.0, 300.0, 10.0, 10.0]], (1000, 1))
    found = make_detections([0] * 1001, [*box, truth.box[0]], np.linspace(1, 0, 1001))
    (curve,) = kaist.curves(truth, found, ["Reasonable"]).values()
    assert curve.false[-1] == 1000 and curve.true[-1] == 0


def test_the_border_follows_the_size_of_the_image() -> None:
    truth = person(sizes=[(133, 512)])
    assert not kaist.counts(truth, kaist.SETTINGS["Reasonable"]).any()
    assert kaist.counts(person(sizes=[(135, 512)]), kaist.SETTINGS["Reasonable"]).all()


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(FreqkdError, match='no setting "Reasonble".*Did you mean "Reasonable"'):
        kaist.miss_rates(person(), make_detections(), ["Reasonble"])
    with pytest.raises(FreqkdError, match='no style of the miss rate "matlap"'):
        kaist.miss_rates(person(), make_detections(), style="matlap")


COLUMNS = {
    "mr_script": ("script", "miss_rate"), "mr_all_gt": ("script-all-boxes", "miss_rate"),
    "mr_matlab_style": ("matlab", "miss_rate"), "mr_published": ("matlab", "miss_rate"),
    "recall_script": ("script", "recall"), "n_gt_script": ("script", "counted"), "n_gt_all": ("matlab", "counted"),
    "n_images": ("matlab", "images"),
}  # fmt: skip


def test_published_results_every_file_and_column(benchmarks: Path) -> None:
    folder = benchmarks / PUBLISHED
    read = read_annotations(folder / "KAIST_annotation.json")
    with (folder / "expected.csv").open() as handle:
        expected = list(csv.DictReader(handle))
    tables: dict[tuple[str, str], dict] = {}
    for row in expected:
        name = row["file"] if (folder / row["file"]).is_file() else f"{row['file']}.gz"
        for column, (style, field) in COLUMNS.items():
            if not row[column]:
                continue
            if (name, style) not in tables:
                rates = kaist.miss_rates(read.truth, read_results(folder / name, read), style=style)
                tables[name, style] = {(rate.setting, rate.subset): rate for rate in rates}
            got = getattr(tables[name, style][row["setting"], row["subset"]], field)
            exact = field in ("counted", "images")
            # Figures come with 4 decimals, those printed in papers with 2.
            error = 0 if exact else 0.00501 if column == "mr_published" else 0.000051
            assert abs(got * (1 if exact else 100) - float(row[column])) <= error, (row["file"], column, row["setting"])
    assert len(tables) >= 15


def test_the_copies_that_add_to_the_miss_rate(benchmarks: Path) -> None:
    folder = benchmarks / PUBLISHED
    read = read_annotations(folder / "KAIST_annotation.json")
    rates = kaist.miss_rates(
        read.truth, read_results(folder / "MLPD_result.txt", read), ["Reasonable", "Near"], "icafusion"
    )
    assert [round(100 * rate.miss_rate, 4) for rate in rates if rate.subset == "all"] == [7.5768, 0.0435]
