"""Scoring files: what is read, what is refused with file and line, the report, its comparison, its figures."""

from __future__ import annotations

import gzip
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from freqkd_analysis.errors import FreqkdError
from freqkd_train import evaluate, predictions, score, score_figures
from freqkd_train.annotation_sets import Ids
from freqkd_train.annotations import Target, load
from freqkd_train.metrics.boxes import make_detections, make_truth
from freqkd_train.metrics.card import Card, differences, require_alike
from freqkd_train.result_files import ResultError, read_annotations, read_results

PERSONS = [(0, [100, 100, 30, 80], 0, 0), (1, [200, 100, 40, 90], 1, 0), (3, [50, 200, 30, 70], 0, 0),
           (3, [300, 100, 90, 90], 0, 1)]  # fmt: skip
NAMES = [f"set{s:02d}/V00{v}/I000{k}9" for s, v, k in ((6, 0, 1), (6, 1, 3), (9, 0, 1), (11, 1, 5))]


@pytest.fixture
def kaist_json(tmp_path: Path) -> Path:
    """Four images of four videos, two by day, in the form of KAIST_annotation.json."""
    content = {
        "images": [{"id": k, "im_name": name, "height": 512, "width": 640} for k, name in enumerate(NAMES)],
        "annotations": [
            {"id": k, "image_id": i, "category_id": 1, "bbox": box, "height": box[3], "occlusion": o, "ignore": ignored}
            for k, (i, box, o, ignored) in enumerate(PERSONS)
        ],
        "categories": [{"id": 0, "name": "__ignore__"}, {"id": 1, "name": "person"}, {"id": 3, "name": "people"}],
    }
    path = tmp_path / "KAIST_annotation.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def coco_json(tmp_path: Path) -> Path:
    """Two classes and DontCare, string ids, in the form of HIT-UAV's json (annotation, filename, ids from 0)."""
    content = {
        "images": [{"id": name, "filename": f"{name}.jpg", "width": 64, "height": 48} for name in ("p", "q", "r")],
        "annotation": [
            {"id": 0, "image_id": "p", "category_id": 0, "bbox": [5, 5, 10, 20]},
            {"id": 1, "image_id": "q", "category_id": 1, "bbox": [20, 5, 20, 20]},
            {"id": 2, "image_id": "q", "category_id": 4, "bbox": [0, 30, 12, 12]},
        ],
        "categories": [{"id": 0, "name": "Person"}, {"id": 1, "name": "Car"}, {"id": 4, "name": "DontCare"}],
    }
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(content))
    return path


GOOD = "1,100,100,30,80,0.9\n2,205,100,40,90,0.8\n\n4,300,100,90,90,0.7\n3,10,10,20,50,-3.5\n"


def lines(folder: Path, text: str, name: str = "found.txt") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_kaist_files_give_the_named_keys_and_the_card(kaist_json: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out.json"
    got = score.score(kaist_json, [lines(tmp_path, GOOD)], out=out)
    assert json.loads(out.read_text()) == got and [p.name for p in out.parent.iterdir()] == ["out.json"]
    # By day both are found with nothing false; by night the one box is missed.
    assert got["mr_day"] == pytest.approx(1e-8) and got["mr_night"] == 100.0
    assert got["mr_all"] == pytest.approx(100 * np.exp(np.log(1 / 3)))
    assert got["settings"]["Reasonable"]["all"] == {
        "miss_rate": got["mr_all"], "recall": pytest.approx(200 / 3), "counted": 3, "images": 4,
    }  # fmt: skip
    assert got["ap50"] == pytest.approx(100 * 67 / 101) and got["units"] == "percent"
    # Boxes of ignored labels dropped, the detection on one is false; merged, it is right.
    readings = {name: row["counted"] for name, row in got["ap50_readings"].items()}
    assert readings["all_labels_merged"] == 4 and readings["reasonable"] == 3
    card = Card.read(got["card"])
    assert card.frames == 4 and card.data_set == "KAIST" and card.classes == ("person",)
    assert len(card.annotation_sha256) == 64 and "matlab" in card.metric and "Reasonable" in card.ignore_rule


def kaist_target(kaist_json: Path, root: Path) -> Target:
    """The same boxes as an evaluation reads them, under the name of an annotation set."""
    for name in NAMES:
        video, frame = name.rsplit("/", 1)
        for modality in ("lwir", "visible"):
            path = root / "images" / video / modality / f"{frame}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (640, 512)).save(path)
    shutil.copy(kaist_json, root)
    return load(f"kaist:{root}", "test", annotations="improved")


def test_an_evaluation_on_the_same_annotations_has_a_card_alike(kaist_json: Path, tmp_path: Path) -> None:
    target = kaist_target(kaist_json, tmp_path / "KAIST")
    evaluated, scored = evaluate.card_of(target, "kaist"), score.card_of(read_annotations(kaist_json))
    assert evaluated.annotation_sha256 == scored.annotation_sha256 and evaluated.annotation_set == "improved"
    assert differences(evaluated, scored) == {} and require_alike([evaluated, scored], ["one", "other"]) == ""
    content = json.loads(kaist_json.read_text())
    content["annotations"][0]["bbox"][2] += 1
    other = score.card_of(read_annotations(lines(tmp_path, json.dumps(content), "moved.json")))
    assert {"annotation_sha256", "annotation_set"} <= set(differences(evaluated, other))
    # The very same file, but an evaluation drops a box that is there twice.
    content["annotations"] += [content["annotations"][0] | {"id": 9}]
    twice = lines(tmp_path, json.dumps(content), "twice.json")
    told = score.card_of(read_annotations(twice)).policy
    assert told.endswith("cyclist=ignore; 1 boxes that are empty, twice or beyond their image stay")


def test_predictions_of_boxes_without_a_json_go_by_the_images_names(kaist_json: Path, tmp_path: Path) -> None:
    read = read_annotations(kaist_json)
    target = kaist_target(kaist_json, tmp_path / "KAIST")
    found = make_detections([3, 1], [[1, 2, 3, 4], [5, 6, 7, 8]], [0.5, 0.25])
    predictions.write(tmp_path, target, found)
    told = json.loads((tmp_path / "predictions.json").read_text())
    assert told[0] == {"image_id": 3, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}
    predictions.write(tmp_path, replace(target, ids=Ids()), found)
    told = json.loads((tmp_path / "predictions.json").read_text())
    assert told[0] == {"image_id": NAMES[3], "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}
    for again in (
        read_results(tmp_path / "predictions.json", read),
        predictions.read(tmp_path, replace(target, ids=Ids())),
    ):
        assert again.image.tolist() == [3, 1] and again.box.tolist() == found.box.tolist()


def test_text_tells_the_same_figures(kaist_json: Path, tmp_path: Path) -> None:
    got = score.score(kaist_json, [lines(tmp_path, GOOD)])
    text = score.text(got)
    assert f"{got['mr_all']:.2f}" in text and "100.00" in text and "Occ=heavy" in text and "all_labels_merged" in text
    assert got["card"]["annotation_sha256"][:12] in text


def test_json_counts_from_the_ids_and_text_from_one(kaist_json: Path, tmp_path: Path) -> None:
    entries = []
    for line in GOOD.split():
        number, x, y, w, h, value = map(float, line.split(","))
        entries.append({"image_id": int(number) - 1, "category_id": 1, "bbox": [x, y, w, h], "score": value})
    read = read_annotations(kaist_json)
    one = read_results(lines(tmp_path, GOOD), read)
    for name, content in (("list.json", entries), ("object.json", {"annotations": entries})):
        other = read_results(lines(tmp_path, json.dumps(content), name), read)
        assert all(np.array_equal(getattr(one, f), getattr(other, f)) for f in ("image", "category", "box", "score"))
    packed = tmp_path / "found.txt.gz"
    packed.write_bytes(gzip.compress(GOOD.encode()))
    assert np.array_equal(read_results(packed, read).box, one.box)
    ids = {str(10 * k): k for k in range(4)}
    assert read_results(lines(tmp_path, "31,1,2,3,4,0.5", "ids.txt"), replace(read, ids=ids)).image.tolist() == [3]
    by_name = lines(tmp_path, f"{NAMES[2]},1,2,3,4,0.5\r\n", "names.csv")
    assert read_results(by_name, read).image.tolist() == [2]


def test_annotations_tell_video_time_and_regions(kaist_json: Path, coco_json: Path) -> None:
    truth = read_annotations(kaist_json).truth
    assert truth.groups == ("set06/V000", "set06/V001", "set09/V000", "set11/V001")
    assert truth.times == ("day", "day", "night", "night") and truth.ignore.tolist() == [False, False, False, True]
    read = read_annotations(coco_json)
    assert read.truth.classes == ("Person", "Car") and read.truth.ignore.tolist() == [False, False, True]
    assert read.truth.category.tolist() == [0, 1, -1] and not read.kaist


def test_a_folder_of_bbgt_files_is_the_same_truth(kaist_json: Path, tmp_path: Path) -> None:
    folder = tmp_path / "annotations"
    for k, name in enumerate(NAMES):
        path = folder / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [f"{'people' if ignored else 'person'} {' '.join(map(str, box))} {o} 0 0 0 0 0 0"
                for i, box, o, ignored in PERSONS if i == k]  # fmt: skip
        path.write_text("\n".join(["% bbGt version=3", *rows]))
    one, other = read_annotations(kaist_json).truth, read_annotations(folder).truth
    assert other.names == one.names and np.array_equal(other.box, one.box)
    assert np.array_equal(other.ignore, one.ignore) and np.array_equal(other.occlusion, one.occlusion)
    found = lines(tmp_path, GOOD)
    assert score.score(folder, [found])["mr_all"] == score.score(kaist_json, [found])["mr_all"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1,1,2,3,4,0.5\n1,1,2,3,4\n", "line 2: expected 6 columns .image,x,y,w,h,score., got 5"),
        ("\n1,1,2,3,4,0.5,7\n", "line 2: expected 6 columns .*, got 7"),
        ("1 1 2 3 4 0.5\n", "line 1: expected 6 columns .*, got 1"),
        ("1,1,2,3,4,0.5\n5,1,2,3,4,0.5\n", "line 2: image 5, expected a whole number from 1 to 4"),
        ("0,1,2,3,4,0.5\n", "line 1: image 0, expected a whole number from 1 to 4"),
        ("1.5,1,2,3,4,0.5\n", "line 1: image 1.5, expected a whole number"),
        ("nan,1,2,3,4,0.5\n", "line 1: image nan, expected a whole number"),
        ("set06/V000/I00018,1,2,3,4,0.5\n", 'line 1: image "set06/V000/I00018" is not in .*Did you mean'),
        ("1,1,2,3,4,0.5\n\n2,1,2,3,4,nan\n", "line 3: the score is not finite"),
        ("1,1,2,inf,4,0.5\n", "line 1: the box is not finite"),
        ("1,1,2,-3,4,0.5\n", "line 1: width -3 and height 4 must not be below 0"),
        ("1,1,2,3,four,0.5\n", "line 1: 'four' is no number"),
    ],
)
def test_bad_lines_are_named(kaist_json: Path, tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ResultError, match=f"found.txt {words}") as caught:
        read_results(lines(tmp_path, text), read_annotations(kaist_json))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"image_id": 9, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}]', 'entry 0: image_id "9" is not in'),
        (
            '[{"image_id": 0, "category_id": 7, "bbox": [1, 2, 3, 4], "score": 1}]',
            'entry 0: category_id "7" is no class',
        ),
        (
            '[{"image_id": 0, "category_id": 1, "bbox": [1, 2, 3], "score": 1}]',
            "entry 0: expected image_id, category_id",
        ),
        ('[{"image_id": 0, "category_id": 1, "bbox": [1, 2, 3, 4]}]', "entry 0: expected image_id"),
        ('[{"image_id": 0, "category_id": 1, "bbox": [1, 2, 3, 4], "score": NaN}]', "entry 0: the score is not finite"),
        ("[5]", "entry 0: expected image_id"),
        ("{}", "expected a json list"),
        ("[1,\n2", "line 2: no json"),
    ],
)
def test_bad_entries_are_named(kaist_json: Path, tmp_path: Path, content: str, words: str) -> None:
    with pytest.raises(ResultError, match=words):
        read_results(lines(tmp_path, content, "found.json"), read_annotations(kaist_json))


def test_wrong_files_and_names_are_one_line(kaist_json: Path, coco_json: Path, tmp_path: Path) -> None:
    found = lines(tmp_path, GOOD)
    (tmp_path / "empty").mkdir()
    for words, call in {
        "no annotations .*nowhere.json; expected": lambda: score.score(tmp_path / "nowhere.json", [found]),
        "no file .*nowhere.txt; expected detections": lambda: score.score(kaist_json, [tmp_path / "nowhere.txt"]),
        "no COCO json": lambda: score.score(found, [found]),
        "no setXX/VXXX/IXXXXX.txt": lambda: score.score(tmp_path / "empty", [found]),
        "no detections to score": lambda: score.score(kaist_json, []),
        'no protocol "koco".*Did you mean "coco"': lambda: score.score(kaist_json, [found], "koco"),
        "text lists hold no class, but the annotations have 2": lambda: score.score(coco_json, [found]),
    }.items():
        with pytest.raises(FreqkdError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["found.txt", "found.json"])
def test_empty_detections_are_ap_0_and_miss_rate_100(kaist_json: Path, tmp_path: Path, name: str) -> None:
    empty = lines(tmp_path, "[]" if name.endswith("json") else "\n", name)
    got = score.score(kaist_json, [empty])
    assert (got["ap"], got["ap50"], got["ap50_all_boxes"]) == (0.0, 0.0, 0.0)
    assert (got["mr_all"], got["mr_day"], got["mr_night"]) == (100.0, 100.0, 100.0)
    assert got["settings"]["Near"]["all"]["miss_rate"] is None  # no box so tall
    again = lines(tmp_path, "", "also.txt")
    assert score.score(kaist_json, [empty, again])["comparison"]["figures"]["ap50"]["differences"][0]["value"] == 0.0


def test_coco_protocol_by_class_with_regions(coco_json: Path, tmp_path: Path) -> None:
    entries = [("p", 0, [5, 5, 10, 20], 0.5), ("q", 0, [1, 31, 8, 8], 0.9), ("r", 1, [0, 0, 5, 5], 0.2)]
    rows = [{"image_id": i, "category_id": c, "bbox": b, "score": s} for i, c, b, s in entries]
    got = score.score(coco_json, [lines(tmp_path, json.dumps(rows), "found.json")])
    assert got["ap50"] == pytest.approx(50.0) and got["ap50_ignored_dropped"] == pytest.approx(25.0)
    assert got["classes"]["Person"]["ap50"] == pytest.approx(100.0) and got["classes"]["Car"]["ap50"] == 0.0
    assert "mr_all" not in got and "Car" in score.text(got)


def test_several_results_are_compared_under_their_names(kaist_json: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    paths = [lines(tmp_path, GOOD), lines(tmp_path / "b", GOOD), lines(tmp_path, GOOD.replace("0.9", "0.1"), "c.txt")]
    got = score.score(kaist_json, paths, draws=50)
    assert [row["name"] for row in got["results"]] == [str(paths[0]), str(paths[1]), "c"]
    comparison = got["comparison"]
    assert set(comparison["figures"]) == {"mr_all", "mr_day", "mr_night", "ap50", "ap50_all_boxes"}
    assert [row["runs"] for row in comparison["figures"]["mr_all"]["differences"]] == [[0, 1], [0, 2], [1, 2]]
    assert comparison["figures"]["mr_all"]["runs"][0]["value"] == pytest.approx(got["results"][0]["mr_all"])
    assert comparison["figures"]["ap50"]["runs"][2]["value"] == pytest.approx(got["results"][2]["ap50"])
    assert any(warning.startswith("night: only 2 groups") for warning in comparison["warnings"])
    assert "differences, later minus earlier" in score.text(got) and "only 4 groups" in score.text(got)
    require_alike([Card.read(row["card"]) for row in got["results"]], ["a", "b", "c"])


def test_figures_and_the_contact_sheet(kaist_json: Path, tmp_path: Path) -> None:
    read = read_annotations(kaist_json)
    found = read_results(lines(tmp_path, GOOD), read)
    nothing = read_results(lines(tmp_path, "", "none.txt"), read)
    runs = [score.Run("some", found), score.Run("nothing", nothing)]
    paths = score_figures.write_figures(read.truth, runs, "kaist", tmp_path / "figures")
    assert [p.name for p in paths if p.suffix == ".csv"] == ["miss_rate.csv", "precision_recall.csv"]
    assert "nothing, 100.00 %" in (tmp_path / "figures/miss_rate.csv").read_text()
    assert "some, 33.33 %" in (tmp_path / "figures/miss_rate.svg").read_text()
    assert "some, AP50 66.34" in (tmp_path / "figures/precision_recall.svg").read_text()
    shades = np.linspace(0, 1, 640 * 512).reshape(512, 640)
    sheet = score_figures.contact_sheet(read.truth, found, lambda _: shades, tmp_path / "sheet.png", n=16)
    with Image.open(sheet) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
        assert image.width == 4 * 324 + 4
    names = ("FOUND_COLOUR", "WRONG_COLOUR", "MISSED_COLOUR", "IGNORED_COLOUR")
    wanted = [tuple(bytes.fromhex(getattr(score_figures, name)[1:])) for name in names]
    assert set(wanted) <= colours
    with pytest.raises(FreqkdError, match="asked for 0 of 4"):
        score_figures.contact_sheet(read.truth, found, lambda _: shades, tmp_path / "no.png", n=0)


@pytest.mark.slow  # timed: a machine that is shared would fail it
def test_2252_images_take_under_a_second(benchmarks: Path) -> None:
    folder = benchmarks / "kaist/published_results"
    read = read_annotations(folder / "KAIST_annotation.json")
    found = read_results(folder / "MBNet_result.txt", read)
    card = score.card_of(read)
    score.report(read.truth, score.Run("first", found.of(np.arange(9))), card, "kaist")  # imports are not counted
    started = time.process_time()
    got = score.report(read.truth, score.Run("MBNet", found), card, "kaist")
    assert time.process_time() - started < 1.0
    assert [round(got[f"mr_{part}"], 2) for part in ("all", "day", "night")] == [8.13, 8.28, 7.86]
    assert round(got["ap50"], 2) == 94.46 and round(got["ap50_all_boxes"], 2) == 82.75


def test_the_kaist_protocol_is_about_persons_wherever_they_stand_among_the_classes() -> None:
    box = [[100, 100, 30, 80], [300, 100, 40, 90]]
    truth = make_truth(["a"], classes=["cyclist", "person"], image=[0, 0], category=[1, 0], box=box)
    found = make_detections([0, 0, 0], [box[0], box[1], [10, 10, 40, 90]], [0.5, 0.9, 0.8], [1, 1, 0])
    card = score.make_card(
        truth, "kaist", data_set="made up", annotation_set="", annotation_sha256="", split="", policy=""
    )
    runs = [score.Run("one", found), score.Run("two", found)]
    got = score.compared(truth, runs, card, "kaist", draws=20)
    # A person found where a cyclist is annotated lies in an ignore region; cyclists found are no matter.
    for row in got["results"]:
        assert row["mr_all"] == pytest.approx(1e-8) and row["ap50"] == pytest.approx(100)
        assert row["ap50_readings"]["all_boxes_rest_dropped"]["ap50"] == pytest.approx(50)
    assert got["comparison"]["figures"]["ap50_all_boxes"]["runs"][0]["value"] == pytest.approx(100)
    with pytest.raises(FreqkdError, match="about persons, but the classes are car, bus"):
        score.person_of(make_truth(["a"], classes=["car", "bus"]))
