"""Log-average miss rate of the KAIST benchmark: settings, light, and the two programs that people compute it with.

The miss rate (1 - recall) is read at nine rates of false positives per image (FPPI), 10^-2 ... 10^0, and averaged in
the logarithm; 0 is perfect, 1 finds nothing. Hwang et al., CVPR 2015, after Dollar et al., PAMI 2012. The authors'
MATLAB kit ("matlab", the default) and the Python script in wide use ("script") differ in small ways, each a field of
`Style`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from freqkd_analysis.errors import FreqkdError, first, nearest
from freqkd_train.metrics.boxes import Detections, Truth
from freqkd_train.metrics.matching import FALSE, REMOVED, TRUE, by_score, match, ranked

T = TypeVar("T")

BORDER = 5
"""A box that comes closer than this to the image's edge is ignored, px."""
SIZE = (640, 512)
"""Width and height of a KAIST image, px; used where the truth does not know its sizes."""
MAX_DETECTIONS = 1000
POINTS = 10.0 ** np.linspace(-2, 0, 9)
FLOOR = 1e-10
SUBSETS = ("all", "day", "night")


@dataclass(frozen=True)
class Setting:
    """Which persons count: height in px (both ends inclusive) and occlusion levels (0 none, 1 partial, 2 heavy)."""

    low: float
    high: float
    occlusion: tuple[int, ...]


SETTINGS: dict[str, Setting] = {
    "Reasonable": Setting(55, math.inf, (0, 1)),
    "Reasonable_small": Setting(50, 75, (0, 1)),
    "Reasonable_occ=heavy": Setting(50, math.inf, (2,)),
    "All": Setting(1, math.inf, (0, 1, 2)),
    "All_h20": Setting(20, math.inf, (0, 1, 2)),
    "Near": Setting(115, math.inf, (0,)),
    "Medium": Setting(45, 115, (0,)),
    "Far": Setting(1, 45, (0,)),
    "Occ=none": Setting(1, math.inf, (0,)),
    "Occ=partial": Setting(1, math.inf, (1,)),
    "Occ=heavy": Setting(1, math.inf, (2,)),
}


@dataclass(frozen=True)
class Style:
    """Where the programs differ."""

    points: np.ndarray
    """(9,) FPPI at which the miss rate is read."""
    wraps: bool = False
    """A point before the curve's first position gives the final recall (index -1) instead of 0."""
    floor: float = 0.0
    """The least miss rate at a point."""
    added: float = 0.0
    """Added to every miss rate before the logarithm."""
    skips_empty: bool = False
    """Boxes of images without any detection are not counted."""
    id_zero: bool = False
    """A detection that takes the first box of the file (annotation id 0) is a false positive."""
    permutes_twice: bool = False
    """In an image whose detections are not sorted, overlaps are those of wrong detections."""


_ROUNDED = np.round(POINTS, 4)

STYLES: dict[str, Style] = {
    "matlab": Style(POINTS, floor=FLOOR),
    "script": Style(_ROUNDED, wraps=True, skips_empty=True, id_zero=True, permutes_twice=True),
    "script-all-boxes": Style(_ROUNDED, wraps=True),
    "icafusion": Style(_ROUNDED, wraps=True, added=1e-5, skips_empty=True, id_zero=True, permutes_twice=True),
}
"""matlab: the kit's figure, every counted box in the denominator. script: as the Python script prints it.
script-all-boxes: the script without its forgotten boxes. icafusion: the script's copies that add 1e-5."""


class Curve(NamedTuple):
    """One detection curve by falling score, removed detections left out."""

    true: np.ndarray
    """(K,) true positives so far."""
    false: np.ndarray
    """(K,) false positives so far."""
    counted: int
    images: int

    @property
    def fppi(self) -> np.ndarray:
        return self.false / self.images

    @property
    def recall(self) -> np.ndarray:
        return self.true / self.counted


@dataclass(frozen=True)
class Rate:
    """One cell of the table. `miss_rate` and `recall` (at the curve's end) are in 0..1, NaN when nothing counts."""

    setting: str
    subset: str
    miss_rate: float
    recall: float
    counted: int
    images: int


def counts(truth: Truth, setting: Setting, person: int = 0) -> np.ndarray:
    """(M,) which boxes count under a setting; all others are ignore regions.

    Example:
        >>> from freqkd_train.metrics.boxes import make_truth
        >>> boxes = [[100, 100, 20, 55], [100, 100, 20, 54], [4, 100, 20, 60]]
        >>> truth = make_truth(["a"], classes=["person"], image=[0, 0, 0], category=[0, 0, 0], box=boxes)
        >>> counts(truth, SETTINGS["Reasonable"]).tolist()
        [True, False, False]
    """
    x, y, w, h = truth.box.T
    size = truth.sizes[truth.image].reshape(-1, 2)
    width, height = np.where(size > 0, size, SIZE).T
    inside = (x >= BORDER) & (y >= BORDER) & (x + w <= width - BORDER) & (y + h <= height - BORDER)
    tall = (h >= setting.low) & (h <= setting.high)
    return (
        ~truth.ignore & (truth.category == person) & tall & np.isin(truth.occlusion, setting.occlusion) & inside
    )  # fmt: skip


def miss_rates(
    truth: Truth,
    detections: Detections,
    settings: Iterable[str] = SETTINGS,
    style: str = "matlab",
    person: int = 0,
) -> list[Rate]:
    """The table: every setting over all images and, where known, over those of day and of night.

    Args:
        detections: any order; only those of class `person` are looked at.
        settings: names of SETTINGS.
        style: a name of STYLES.
    Raises: FreqkdError for an unknown setting or style.

    Example:
        >>> from freqkd_train.metrics.boxes import make_detections, make_truth
        >>> truth = make_truth(["a"], classes=["person"], image=[0], category=[0], box=[[100, 100, 30, 80]])
        >>> rate = miss_rates(truth, make_detections(), ["Reasonable"])[0]
        >>> rate.subset, rate.miss_rate, rate.counted
        ('all', 1.0, 1)
    """
    how = _named(STYLES, style, "style of the miss rate")
    names = list(settings)
    table = curves(truth, detections, names, style, person)
    rows = []
    for (name, subset), curve in table.items():
        end = float(curve.recall[-1]) if len(curve.true) and curve.counted else (0.0 if curve.counted else math.nan)
        rows.append(Rate(name, subset, log_average(curve, how), end, curve.counted, curve.images))
    return rows


def curves(
    truth: Truth, detections: Detections, settings: Iterable[str], style: str = "matlab", person: int = 0
) -> dict[tuple[str, str], Curve]:
    """The curve of every (setting, subset), settings outermost; arguments as in `miss_rates`."""
    how = _named(STYLES, style, "style of the miss rate")
    names = list(settings)
    counted = np.stack([counts(truth, _named(SETTINGS, name, "setting"), person) for name in names])
    detections = detections.of(detections.category == person)
    order = ranked(detections.image, detections.score, MAX_DETECTIONS)
    boxes = _shuffled(detections, order) if how.permutes_twice else detections.box[order]
    image = detections.image[order]
    state, held = match(truth.image, truth.box, counted, image, boxes)
    if how.id_zero:
        state = np.where(held == 0, FALSE, state)
    sort = by_score(detections.score[order])
    image, state = image[sort], state[:, sort]
    found = np.zeros(len(truth.names), dtype=bool)
    found[image] = True
    result = {}
    for name, row, boxes_counted in zip(names, state, counted, strict=True):
        for subset, within in subsets(truth).items():
            kept = row[within[image] & (row != REMOVED)]
            denominator = boxes_counted & within[truth.image] & (found[truth.image] | (not how.skips_empty))
            result[name, subset] = Curve(
                np.cumsum(kept == TRUE), np.cumsum(kept == FALSE), int(denominator.sum()), int(within.sum())
            )
    return result


def log_average(curve: Curve, style: Style) -> float:
    """The log-average miss rate of a curve, 0..1; NaN when nothing counts."""
    if not curve.counted or not curve.images:
        return math.nan
    at = np.searchsorted(curve.fppi, style.points, side="right") - 1
    if len(curve.true):
        recall = np.where((at < 0) & (not style.wraps), 0.0, curve.recall[at])
    else:
        recall = np.zeros(len(style.points))
    missed = np.maximum(1.0 - recall, style.floor) + style.added
    with np.errstate(divide="ignore"):  # the script's miss rate of 0
        return float(np.exp(np.mean(np.log(missed))))


def subsets(truth: Truth) -> dict[str, np.ndarray]:
    """(N,) masks: all images, and those of day and of night where any are known.

    Example:
        >>> from freqkd_train.metrics.boxes import make_truth
        >>> list(subsets(make_truth(["a", "b"], classes=["person"], times=["day", ""])))
        ['all', 'day']
    """
    times = np.asarray(truth.times, dtype=object)
    masks = {"all": np.ones(len(times), dtype=bool)}
    return masks | {name: times == name for name in SUBSETS[1:] if (times == name).any()}


def _shuffled(detections: Detections, order: np.ndarray) -> np.ndarray:
    """The boxes that the script takes for the k-th detection of an image: row order[k] of the sorted rows.

    Beyond MAX_DETECTIONS unsorted detections the script fails; such images keep their right boxes here.
    """
    image = detections.image[order]
    by_image = np.argsort(detections.image, kind="stable")
    place = np.empty(len(by_image), dtype=np.int64)
    starts = np.searchsorted(detections.image[by_image], detections.image[by_image], side="left")
    place[by_image] = np.arange(len(by_image)) - starts
    first_row = np.searchsorted(image, image, side="left")
    n_rows = np.searchsorted(image, image, side="right") - first_row
    row = np.where(place[order] < n_rows, first_row + place[order], np.arange(len(order)))
    crowded = np.isin(image, image[place[order] >= n_rows])
    return detections.box[order][np.where(crowded, np.arange(len(order)), row)]


def _named(known: Mapping[str, T], name: str, what: str) -> T:
    if name not in known:
        raise FreqkdError(f'no {what} "{name}"; known: {first(known, 12)}.{nearest(name, known)}')
    return known[name]
