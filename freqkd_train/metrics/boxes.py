"""Boxes of a list of images, as annotated and as detected: plain arrays, checked once, cut by image.

Boxes are x, y, w, h in pixels of the native image, (x, y) the top left corner, no "+1" anywhere. Letters: N images,
M annotated boxes, D detections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from freqkd_analysis.errors import FreqkdError, first

EVERY_CLASS = -1
"""As `Truth.category` of an ignore region: it is one for every class."""


class BoxError(FreqkdError):
    """Boxes, scores or image numbers that make no sense together."""


@dataclass(frozen=True)
class Truth:
    """What is annotated in N images: M boxes. Images without boxes stay in the list; they count for every rate.

    Example:
        >>> truth = make_truth(["a", "b"], classes=["person"], image=[1], category=[0], box=[[5, 6, 20, 50]])
        >>> len(truth.names), truth.take([1]).image.tolist()
        (2, [0])
    """

    names: tuple[str, ...]
    """Image names in the order of the list; the position is the image number."""
    groups: tuple[str, ...]
    """Video or sequence of each image: the unit of resampling."""
    times: tuple[str, ...]
    """day, night or empty."""
    sizes: np.ndarray
    """(N, 2) int: width, height in px."""
    classes: tuple[str, ...]
    image: np.ndarray
    """(M,) int64: image number of each box."""
    category: np.ndarray
    """(M,) int64: index into classes; EVERY_CLASS is allowed where `ignore` holds."""
    box: np.ndarray
    """(M, 4) float64: x, y, w, h in px."""
    ignore: np.ndarray
    """(M,) bool: an ignore region (COCO's iscrowd: overlap is intersection over detection area)."""
    occlusion: np.ndarray
    """(M,) int64: 0 none, 1 partial, 2 heavy; 0 where unknown."""
    label: tuple[str, ...]
    """The label of each box as it stood in the file."""

    def validate(self) -> Truth:
        """Itself when every array fits; BoxError says what does not."""
        n, m = len(self.names), len(self.image)
        _same("image lists", n, groups=len(self.groups), times=len(self.times), sizes=len(self.sizes))
        _same("boxes", m, category=len(self.category), box=len(self.box), ignore=len(self.ignore),
              occlusion=len(self.occlusion), label=len(self.label))  # fmt: skip
        _unique("image name", self.names)
        _unique("class", self.classes)
        _check_boxes("annotated box", self.image, self.box, n)
        wrong = (self.category >= len(self.classes)) | (self.category < np.where(self.ignore, EVERY_CLASS, 0))
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            raise BoxError(
                f"annotated box {at}: class number {self.category[at]}, but there are {len(self.classes)} classes "
                f"({first(self.classes, 5)}), numbered from 0."
            )
        return self

    def take(self, images: Sequence[int] | np.ndarray) -> Truth:
        """Only these images, in this order, numbered from 0; their boxes keep the order of the list of boxes."""
        images = _image_numbers(images, len(self.names))
        number, kept = _renumber(self.image, images, len(self.names))

        def pick(values: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(values[i] for i in images)

        return replace(
            self, names=pick(self.names), groups=pick(self.groups), times=pick(self.times), sizes=self.sizes[images],
            image=number, category=self.category[kept], box=self.box[kept], ignore=self.ignore[kept],
            occlusion=self.occlusion[kept], label=tuple(self.label[i] for i in kept),
        )  # fmt: skip


@dataclass(frozen=True)
class Detections:
    """D boxes with a score each, any order; scores need no range, only to be finite.

    Example:
        >>> found = make_detections(image=[0, 2], box=[[0, 0, 5, 9], [1, 1, 4, 8]], score=[0.9, -3.0])
        >>> found.take([2], n_images=3).score.tolist()
        [-3.0]
    """

    image: np.ndarray
    """(D,) int64: image number."""
    category: np.ndarray
    """(D,) int64: index into the classes of the truth."""
    box: np.ndarray
    """(D, 4) float64: x, y, w, h in px."""
    score: np.ndarray
    """(D,) float64: larger is surer."""

    def validate(self, n_images: int, n_classes: int) -> Detections:
        """Itself when every array fits a truth of so many images and classes; BoxError says what does not."""
        _same("detections", len(self.image), category=len(self.category), box=len(self.box), score=len(self.score))
        _check_boxes("detection", self.image, self.box, n_images)
        wrong = (self.category < 0) | (self.category >= n_classes)
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            raise BoxError(f"detection {at}: class number {self.category[at]}, expected 0 to {n_classes - 1}.")
        if not np.isfinite(self.score).all():
            at = int(np.flatnonzero(~np.isfinite(self.score))[0])
            raise BoxError(f"detection {at}: the score is {self.score[at]}; scores must be finite numbers.")
        return self

    def take(self, images: Sequence[int] | np.ndarray, n_images: int) -> Detections:
        """Only the detections in these of `n_images` images, image numbers as in `Truth.take`."""
        number, kept = _renumber(self.image, _image_numbers(images, n_images), n_images)
        return Detections(number, self.category[kept], self.box[kept], self.score[kept])

    def of(self, kept: np.ndarray) -> Detections:
        """The detections that a mask or an index array (…,) picks, image numbers unchanged."""
        return Detections(self.image[kept], self.category[kept], self.box[kept], self.score[kept])


def make_truth(
    names: Sequence[str],
    *,
    classes: Sequence[str],
    image: Sequence[int] | np.ndarray = (),
    category: Sequence[int] | np.ndarray = (),
    box: Sequence[Sequence[float]] | np.ndarray = (),
    ignore: Sequence[bool] | np.ndarray | None = None,
    occlusion: Sequence[int] | np.ndarray | None = None,
    label: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    times: Sequence[str] | None = None,
    sizes: Sequence[Sequence[int]] | np.ndarray | None = None,
) -> Truth:
    """A checked Truth from lists; what is left out is unknown: no group, no time, size 0, not ignored, occlusion 0."""
    n, m = len(names), len(image)
    numbers = np.asarray(category, dtype=np.int64).reshape(-1)
    known = label if label is not None else [classes[c] if 0 <= c < len(classes) else "" for c in numbers.tolist()]
    return Truth(
        names=tuple(map(str, names)),
        groups=tuple(groups) if groups is not None else ("",) * n,
        times=tuple(times) if times is not None else ("",) * n,
        sizes=np.asarray(sizes if sizes is not None else np.zeros((n, 2)), dtype=np.int64).reshape(-1, 2),
        classes=tuple(classes),
        image=np.asarray(image, dtype=np.int64).reshape(-1),
        category=numbers,
        box=np.asarray(box, dtype=np.float64).reshape(-1, 4),
        ignore=np.asarray(ignore if ignore is not None else np.zeros(m), dtype=bool).reshape(-1),
        occlusion=np.asarray(occlusion if occlusion is not None else np.zeros(m), dtype=np.int64).reshape(-1),
        label=tuple(known),
    ).validate()


def make_detections(
    image: Sequence[int] | np.ndarray = (),
    box: Sequence[Sequence[float]] | np.ndarray = (),
    score: Sequence[float] | np.ndarray = (),
    category: Sequence[int] | np.ndarray | None = None,
) -> Detections:
    """Detections from lists, of class 0 unless said; `Detections.validate` checks them against a truth."""
    return Detections(
        image=np.asarray(image, dtype=np.int64).reshape(-1),
        category=np.asarray(category if category is not None else np.zeros(len(image)), dtype=np.int64).reshape(-1),
        box=np.asarray(box, dtype=np.float64).reshape(-1, 4),
        score=np.asarray(score, dtype=np.float64).reshape(-1),
    )


def _check_boxes(what: str, image: np.ndarray, box: np.ndarray, n_images: int) -> None:
    wrong = (image < 0) | (image >= n_images)
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise BoxError(f"{what} {at}: image number {image[at]}, but the list has {n_images} images, numbered from 0.")
    bad = ~np.isfinite(box).all(axis=1) | (box[:, 2:] < 0).any(axis=1)
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        raise BoxError(f"{what} {at}: x, y, w, h are {box[at].tolist()}; expected finite numbers, w and h not below 0.")


def _same(what: str, n: int, **lengths: int) -> None:
    for name, length in lengths.items():
        if length != n:
            raise BoxError(f"{what}: {name} has {length} entries, expected {n}.")


def _unique(what: str, names: tuple[str, ...]) -> None:
    if len(set(names)) != len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise BoxError(f'the {what} "{twice}" occurs more than once; names must be unique.')


def _image_numbers(images: Sequence[int] | np.ndarray, n_images: int) -> np.ndarray:
    numbers = np.asarray(images, dtype=np.int64).reshape(-1)
    if len(np.unique(numbers)) != len(numbers) or ((numbers < 0) | (numbers >= n_images)).any():
        raise BoxError(f"images to take must be distinct numbers from 0 to {n_images - 1}.")
    return numbers


def _renumber(image: np.ndarray, images: np.ndarray, n_images: int) -> tuple[np.ndarray, np.ndarray]:
    """New image numbers of the kept rows, and which rows (in their order) are kept."""
    place = np.full(n_images, -1, dtype=np.int64)
    place[images] = np.arange(len(images))
    kept = np.flatnonzero(place[image] >= 0)
    return place[image[kept]], kept
