"""Containers of boxes: what they refuse, how they are cut; the ranking of detections; the protocol card."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from freqkd_train.metrics.boxes import EVERY_CLASS, BoxError, make_detections, make_truth
from freqkd_train.metrics.card import Card, CardError, differences, require_alike
from freqkd_train.metrics.matching import FALSE, REMOVED, TRUE, by_score, match, ranked

CARD = Card("kaist", "improved", "ab12", "test", 2252, "Reasonable", ("person",), thresholds=(0.5,), metric="mr")


def truth_of_three():
    return make_truth(
        ["a", "b", "c"], classes=["person", "car"], groups=["v0", "v0", "v1"], times=["day", "night", ""],
        image=[2, 0, 2], category=[1, 0, EVERY_CLASS], box=[[1, 2, 3, 4], [5, 6, 7, 8], [0, 0, 9, 9]],
        ignore=[False, False, True], occlusion=[0, 2, 0], label=["car", "person", "DontCare"], sizes=[(8, 9)] * 3,
    )  # fmt: skip


def test_take_renumbers_in_the_order_asked_for() -> None:
    part = truth_of_three().take([2, 0])
    assert part.names == ("c", "a") and part.groups == ("v1", "v0") and part.times == ("", "day")
    assert part.image.tolist() == [0, 1, 0]
    assert part.label == ("car", "person", "DontCare") and part.occlusion.tolist() == [0, 2, 0]
    found = make_detections([2, 1, 0, 2], np.arange(16).reshape(4, 4), [4, 3, 2, 1]).take([2, 0], 3)
    assert found.image.tolist() == [0, 1, 0] and found.score.tolist() == [4, 2, 1]


def test_images_without_boxes_and_no_images_at_all_are_fine() -> None:
    assert make_truth([], classes=["x"]).take([]).names == ()
    empty = truth_of_three().take([1])
    assert len(empty.image) == 0 and empty.names == ("b",)
    make_detections().validate(0, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image": np.array([0, 1, 3])}, "annotated box 2: image number 3, but the list has 3 images"),
        ({"category": np.array([0, 2, 0])}, "annotated box 1: class number 2, but there are 2 classes"),
        ({"category": np.array([EVERY_CLASS, 0, 0])}, "annotated box 0: class number -1"),
        ({"box": np.full((3, 4), np.nan)}, "annotated box 0: x, y, w, h are"),
        ({"box": np.full((3, 4), -1.0)}, "w and h not below 0"),
        ({"box": np.zeros((2, 4))}, "box has 2 entries, expected 3"),
        ({"names": ("a", "b", "a")}, '"a" occurs more than once'),
        ({"groups": ("v",)}, "groups has 1 entries, expected 3"),
        ({"label": ()}, "label has 0 entries"),
    ],
)
def test_a_truth_that_does_not_fit_is_refused(change, words: str) -> None:
    with pytest.raises(BoxError, match=words):
        replace(truth_of_three(), **change).validate()


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (make_detections([3], [[0, 0, 1, 1]], [0.5]), "detection 0: image number 3"),
        (make_detections([0], [[0, 0, 1, 1]], [np.nan]), "the score is nan"),
        (make_detections([0], [[0, 0, 1, 1]], [0.5], [2]), "class number 2, expected 0 to 1"),
        (make_detections([0], [[0, 0, -1, 1]], [0.5]), "w and h not below 0"),
        (make_detections([0, 1], [[0, 0, 1, 1]], [0.5]), "box has 1 entries, expected 2"),
    ],
)
def test_detections_that_do_not_fit_are_refused(found, words: str) -> None:
    with pytest.raises(BoxError, match=words):
        found.validate(3, 2)


@pytest.mark.parametrize("images", [[0, 0], [3], [-1]])
def test_taking_images_twice_or_from_outside_is_refused(images) -> None:
    with pytest.raises(BoxError, match="distinct numbers from 0 to 2"):
        truth_of_three().take(images)


def test_ranking_is_by_key_then_score_ties_in_order_and_cut() -> None:
    key, score = np.array([5, 2, 5, 2, 5]), np.array([0.5, 0.1, 0.5, 0.9, 0.7])
    assert ranked(key, score, 10).tolist() == [3, 1, 4, 0, 2]
    assert ranked(key, score, 2).tolist() == [3, 1, 4, 0]
    assert by_score(np.array([0.0, -1.0, 0.0, 2.0])).tolist() == [3, 0, 2, 1]
    assert ranked(np.zeros(0, int), np.zeros(0), 5).tolist() == []


def found_in(truth, counted, boxes):
    same = np.zeros(len(truth), dtype=int)
    rows = match(
        same, np.array(truth, float), np.array([counted]), np.zeros(len(boxes), dtype=int), np.array(boxes, float)
    )
    return rows.state[0].tolist(), rows.held[0].tolist()


def test_of_equal_overlaps_the_later_box_is_taken() -> None:
    two = [[0, 0, 10, 10], [0, 0, 10, 10]]
    assert found_in(two, [True, True], two[:1]) == ([TRUE], [1])
    assert found_in(two, [True, True], two + two[:1]) == ([TRUE, TRUE, FALSE], [1, 0, -1])


def test_a_counted_box_goes_before_an_ignore_region_and_regions_take_many() -> None:
    truth = [[0, 0, 10, 10], [0, 0, 10, 10]]
    assert found_in(truth, [True, False], [[0, 0, 10, 9], [0, 0, 5, 5], [1, 0, 10, 10]]) == (
        [TRUE, REMOVED, REMOVED],
        [0, -1, -1],
    )


def test_half_overlap_is_enough_and_less_is_not() -> None:
    assert found_in([[0, 0, 10, 10]], [True], [[0, 0, 10, 5]])[0] == [TRUE]
    assert found_in([[0, 0, 10, 10]], [True], [[0, 0, 10, 4.999]])[0] == [FALSE]
    assert found_in([[0, 0, 5, 10]], [False], [[0, 0, 10, 10]])[0] == [REMOVED]
    assert found_in([[0, 0, 4.999, 10]], [False], [[0, 0, 10, 10]])[0] == [FALSE]


def test_boxes_without_area_match_nothing() -> None:
    assert found_in([[0, 0, 0, 10], [3, 3, 0, 0]], [True, False], [[0, 0, 0, 10], [3, 3, 0, 0]])[0] == [FALSE, FALSE]


def test_cards_compare_and_refuse() -> None:
    other = replace(CARD, ignore_rule="all boxes", frames=2257)
    assert differences(CARD, CARD) == {}
    assert differences(CARD, other) == {"frames": (2252, 2257), "ignore_rule": ("Reasonable", "all boxes")}
    assert require_alike([CARD, CARD], ["a", "b"]) == ""
    with pytest.raises(CardError, match="frames: 2252 in a, 2257 in b; ignore_rule.*--force"):
        require_alike([CARD, other], ["a", "b"])
    assert require_alike([CARD, other], ["a", "b"], force=True).splitlines()[0] == "frames: 2252 in a, 2257 in b"


def test_a_card_survives_its_file_form_and_a_broken_one_is_named() -> None:
    assert Card.read(CARD.as_dict()) == CARD
    content = CARD.as_dict()
    content.pop("policy")
    with pytest.raises(CardError, match="out.json holds no whole protocol card .missing: policy"):
        Card.read(content, "out.json")
    with pytest.raises(CardError, match="no whole protocol card"):
        Card.read([], "out.json")  # type: ignore[arg-type]
