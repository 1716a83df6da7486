"""Which detection finds which annotated box: the greedy rule of COCO and of the Caltech kit, for many rules at once.

Per image detections come by descending score. Each takes the counted box that it overlaps most (at least `threshold`,
equal overlap: the later box) among those not taken yet: a true positive. Without one it is removed when it lies in an
ignore region by at least `threshold` of its own area, which stays free for others; else it is a false positive.

S rules differ in which boxes count (the rest are ignore regions). Overlaps are computed once; the boxes are then
handed out in rounds, the r-th detection of every image at once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

THRESHOLD = 0.5
TRUE, FALSE, REMOVED = 1, 0, -1


class Matched(NamedTuple):
    """What became of D detections under S rules."""

    state: np.ndarray
    """(S, D) int8: TRUE, FALSE or REMOVED."""
    held: np.ndarray
    """(S, D) int64: the counted box that a detection took, -1 for none."""


def ranked(key: np.ndarray, score: np.ndarray, limit: int) -> np.ndarray:
    """Indices of detections by key (image, or image and class), then by descending score, at most `limit` a key.

    Ties keep the order of the list.

    Example:
        >>> ranked(np.array([1, 0, 1, 1]), np.array([0.2, 0.1, 0.9, 0.2]), limit=2).tolist()
        [1, 2, 0]
    """
    order = np.lexsort((-score, key))  # lexsort is stable
    return order[_place_in_run(key[order]) < limit]


def by_score(score: np.ndarray) -> np.ndarray:
    """Positions by descending score, ties in the order given."""
    return np.argsort(-score, kind="stable")


def match(
    truth_key: np.ndarray,
    truth_box: np.ndarray,
    counted: np.ndarray,
    key: np.ndarray,
    box: np.ndarray,
    threshold: float = THRESHOLD,
) -> Matched:
    """Match detections that are in the order of `ranked`.

    Args:
        truth_key, truth_box: (M,) and (M, 4) x, y, w, h.
        counted: (S, M) bool, which boxes count under each rule; the others are ignore regions.
        key, box: (D,) ascending and (D, 4), each key's detections by descending score.

    Example:
        >>> truth = np.array([[0.0, 0.0, 10.0, 10.0], [50.0, 0.0, 10.0, 10.0]])
        >>> found = np.array([[0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 10.0, 10.0], [52.0, 0.0, 5.0, 5.0]])
        >>> same = np.zeros(3, dtype=int)
        >>> match(same[:2], truth, np.array([[True, False]]), same, found).state.tolist()
        [[1, 0, -1]]
    """
    detection, truth, overlap, share = _overlaps(truth_key, truth_box, key, box)
    threshold = min(threshold, 1 - 1e-10)
    state = np.full((len(counted), len(box)), FALSE, dtype=np.int8)
    inside = share >= threshold
    if inside.any():
        held_by, starts = _runs(detection[inside])
        removed = np.logical_or.reduceat(~counted[:, truth[inside]], starts, axis=1)
        state[:, held_by] = np.where(removed, REMOVED, FALSE)
    close = overlap >= threshold
    held = _hand_out(detection[close], truth[close], overlap[close], counted, key)
    state[held >= 0] = TRUE
    return Matched(state, held)


def _hand_out(
    detection: np.ndarray, truth: np.ndarray, overlap: np.ndarray, counted: np.ndarray, key: np.ndarray
) -> np.ndarray:
    """(S, D) the counted box each detection takes; the three inputs are the pairs that overlap enough."""
    held = np.full((len(counted), len(key)), -1, dtype=np.int64)
    if not len(detection):
        return held
    holders, _ = _runs(detection)
    turn = np.zeros(len(key), dtype=np.int64)
    turn[holders] = _place_in_run(key[holders])
    # By round, then detection, then overlap; lexsort is stable, so of equal overlaps the later box comes last.
    order = np.lexsort((overlap, detection, turn[detection]))
    detection, truth = detection[order], truth[order]
    _, rounds = _runs(turn[detection])
    free = counted.copy()
    for low, high in zip(rounds, [*rounds[1:], len(detection)], strict=True):
        _, starts = _runs(detection[low:high])
        places = np.where(free[:, truth[low:high]], np.arange(low, high), -1)
        best = np.maximum.reduceat(places, starts, axis=1)
        rule, column = np.nonzero(best >= 0)
        place = best[rule, column]
        held[rule, detection[place]] = truth[place]
        free[rule, truth[place]] = False
    return held


def _overlaps(
    truth_key: np.ndarray, truth_box: np.ndarray, key: np.ndarray, box: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of one key that touch: detection, truth, intersection over union, intersection over detection area."""
    by_key = np.argsort(truth_key, kind="stable")
    ordered = truth_key[by_key]
    start = np.searchsorted(ordered, key, side="left")
    count = np.searchsorted(ordered, key, side="right") - start
    detection = np.repeat(np.arange(len(key)), count)
    truth = by_key[np.arange(len(detection)) - np.repeat(np.cumsum(count) - count - start, count)]
    low = np.maximum(box[detection, :2], truth_box[truth, :2])
    high = np.minimum(box[detection, :2] + box[detection, 2:], truth_box[truth, :2] + truth_box[truth, 2:])
    sides = high - low
    touching = (sides > 0).all(axis=1)
    detection, truth, sides = detection[touching], truth[touching], sides[touching]
    common = sides[:, 0] * sides[:, 1]
    area = box[detection, 2] * box[detection, 3]
    union = area + truth_box[truth, 2] * truth_box[truth, 3] - common
    return detection, truth, common / union, common / area


def _runs(ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values and first positions of the runs of equal neighbours."""
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(ordered) else np.zeros(0, dtype=int)
    return ordered[starts], starts


def _place_in_run(ordered: np.ndarray) -> np.ndarray:
    """Position of each entry within its run of equal neighbours."""
    _, starts = _runs(ordered)
    lengths = np.diff(np.r_[starts, len(ordered)])
    return np.arange(len(ordered)) - np.repeat(starts, lengths)
