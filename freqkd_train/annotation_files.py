"""Annotation files to marks, one function a format: bbGt text, VOC xml, YOLO text, COCO json (HIT-UAV's and KAIST's
too), a csv table of boxes, label images.

Coordinates stay as the file has them, with no "+1" or "-1": KAIST text and VOC corners count from 1 where MATLAB wrote
them and from 0 elsewhere, no file says which, and published figures take them as they are.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from freqkd_analysis.data.decode import FORMATS, PIXEL_CAP
from freqkd_analysis.errors import FreqkdError, first

MASK_CLASSES = 9
"""Label images hold 0 (unlabeled) to 8: MFNet and what descends from it."""
REGIONS = ("dontcare", "don't care", "ignore", "ignored", "__ignore__")
"""Categories that mark regions to ignore for every class, in lower case."""
CONTENT_CAP = 2**28
"""Most bytes of one file, unpacked: a packed file may claim a thousand times its own size."""
LEAST_PIXELS = 20
"""A part of a label image smaller than this gives no box: specks of the outline."""


class AnnotationError(FreqkdError):
    """Annotations that are missing, cannot be read, or do not fit the images or one another."""


class Mark(NamedTuple):
    """One annotated object."""

    label: str
    x: float
    y: float
    w: float
    h: float
    occlusion: int = 0
    """0 none, 1 partial, 2 heavy; 0 where the file does not say."""
    ignore: bool = False
    """The file itself marks it as one to ignore (bbGt ign, VOC difficult, COCO iscrowd or ignore)."""


class Marked(NamedTuple):
    """The marks of one image and the image's size in px as the file tells it, or None."""

    marks: list[Mark]
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class CocoImage:
    """One image of a COCO file: its id and name as written, and what else the file tells."""

    id: int | str
    name: str
    marked: Marked
    group: str = ""
    time: str = ""


@dataclass(frozen=True)
class Coco:
    """A COCO file: images in the order of the file, labels in the order of their ids."""

    images: tuple[CocoImage, ...]
    labels: tuple[str, ...]
    categories: tuple[int | str, ...]
    """The id of each label, as written."""
    kaist: bool
    """Images are named as in KAIST's json, by `im_name`."""


def read_bytes(path: Path) -> bytes:
    """The content of a file, unpacked when its name ends in .gz; AnnotationError when it cannot be read."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as handle:
            content = handle.read(CONTENT_CAP + 1)
    except FileNotFoundError:
        raise AnnotationError(f"no annotation file {path}; check the path.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise AnnotationError(f"{path} cannot be read ({type(error).__name__}); fetch it again.") from None
    if len(content) > CONTENT_CAP:
        raise AnnotationError(f"{path} holds more than {CONTENT_CAP >> 20} MiB of annotations; share it out.")
    return content


def read_text(path: Path) -> str:
    """A text file's content as UTF-8. Raises AnnotationError naming the file."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise AnnotationError(f"{path} is no text in UTF-8; fetch it again.") from None


def bbgt(path: Path) -> Marked:
    """KAIST's text: "label x y w h occlusion vx vy vw vh ignore angle" a line; lines that start with % are comments.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "I00019.txt"
        >>> _ = path.write_text("% bbGt version=3\\nperson? 4 5 20 50 1 0 0 0 0 0 0\\n")
        >>> bbgt(path).marks
        [Mark(label='person?', x=4.0, y=5.0, w=20.0, h=50.0, occlusion=1, ignore=False)]
    """
    marks = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        parts = line.split()
        if not parts or parts[0].startswith("%"):
            continue
        where = f"{path}, line {number}"
        if len(parts) < 5:
            raise AnnotationError(f"{where}: expected a label and at least x y w h, got {len(parts)} fields.")
        occlusion = _occlusion(parts[5], where) if len(parts) > 5 else 0
        ignore = len(parts) > 10 and parts[10] == "1"
        marks.append(Mark(parts[0], *_numbers(parts[1:5], where), occlusion, ignore))
    return Marked(marks)


def voc(path: Path) -> Marked:
    """VOC xml, corners or (KAIST's xml) x, y, w, h; w = xmax - xmin. Objects that are `difficult` are to ignore."""
    try:
        root = ElementTree.fromstring(read_bytes(path))
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # the latter two: encodings
        raise AnnotationError(f"{path} is no whole xml ({error}); fetch it again.") from None
    size = _size([root.findtext(f"size/{side}") for side in ("width", "height")], str(path))
    marks = []
    for number, thing in enumerate(root.iter("object"), start=1):
        where = f"{path}, object {number}"
        label, box = (thing.findtext("name") or "").strip(), thing.find("bndbox")
        if not label or box is None:
            raise AnnotationError(f"{where}: expected a name and a bndbox; got neither or one of them.")
        corners = box.find("xmin") is not None
        names = ("xmin", "ymin", "xmax", "ymax") if corners else ("x", "y", "w", "h")
        x, y, w, h = _numbers([box.findtext(name) or "" for name in names], where)
        if corners:
            w, h = w - x, h - y
        occlusion = _occlusion(thing.findtext("occlusion") or "0", where)
        marks.append(Mark(label, x, y, w, h, occlusion, (thing.findtext("difficult") or "0").strip() == "1"))
    return Marked(marks, size)


def yolo(path: Path, labels: Sequence[str], size: tuple[int, int]) -> Marked:
    """YOLO text, "class cx cy w h" as shares of `size` (width, height); classes are positions in `labels`."""
    marks, known = [], {str(number): label for number, label in enumerate(labels)}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        parts = line.split()
        if not parts:
            continue
        where = f"{path}, line {number}"
        if len(parts) < 5:
            raise AnnotationError(f"{where}: expected class cx cy w h, got {len(parts)} fields.")
        if parts[0] not in known:
            raise AnnotationError(
                f"{where}: class {one_line(parts[0])}, expected 0 to {len(labels) - 1} ({', '.join(labels)})."
            )
        cx, cy, w, h = (v * side for v, side in zip(_numbers(parts[1:5], where), size * 2, strict=True))
        marks.append(Mark(known[parts[0]], cx - w / 2, cy - h / 2, w, h))
    return Marked(marks, size)


def table(path: Path) -> dict[str, Marked]:
    """A csv with the columns frame, label, x, y, w, h, occlusion: marks by frame, of frames that have a row."""
    reader = csv.DictReader(io.StringIO(read_text(path)))
    try:
        names = reader.fieldnames or ()
    except csv.Error as error:
        raise AnnotationError(f"{path}, line 1: no row of a csv table ({error}).") from None
    absent = [name for name in ("frame", "label", *"xywh", "occlusion") if name not in names]
    if absent:
        raise AnnotationError(f"{path}: expected the columns frame, label, x, y, w, h, occlusion; {absent[0]} lacks.")
    found: dict[str, Marked] = {}
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            box = _numbers([row[name] or "" for name in "xywh"], where)
            mark = Mark(row["label"], *box, _occlusion(row["occlusion"] or "", where))
            found.setdefault(row["frame"], Marked([])).marks.append(mark)
    except csv.Error as error:
        raise AnnotationError(f"{path}, line {reader.line_num}: no row of a csv table ({error}).") from None
    return found


def coco(path: Path) -> Coco:
    """A COCO json, plain or packed; HIT-UAV's (list `annotation`, image key `filename`) and KAIST's (`im_name`) too.

    Raises: AnnotationError for other content, an annotation of an unknown image or category, or two images of one id.
    """
    text = read_text(path)
    try:
        content = json.loads(text)
        images, categories = content["images"], content["categories"]
        rows = list(content["annotations"] if "annotations" in content else content["annotation"])
        categories = sorted(categories, key=lambda row: row["id"])
        labels = {str(row["id"]): str(row["name"]) for row in categories}
        keys = ("file_name", "filename", "im_name")
        named = [(str(row["id"]), str(next(row[key] for key in keys if key in row)), row) for row in images]
    except (ValueError, KeyError, TypeError, StopIteration, AttributeError, RecursionError) as error:
        raise AnnotationError(
            f"{path} is no COCO json ({type(error).__name__}: {one_line(error)}); expected images, annotations and "
            "categories, with ids and file names."
        ) from None
    marks: dict[str, list[Mark]] = {number: [] for number, _, _ in named}
    if len(marks) != len(named):
        raise AnnotationError(f"{path}: {len(named) - len(marks)} image ids occur more than once; make them unique.")
    for number, row in enumerate(rows):
        _add(marks, labels, row, f"{path}, annotation {number}")
    found = [_coco_image(name, row, marks[number], f"{path}, image {one_line(name)}") for number, name, row in named]
    ids = {str(row["id"]): row["id"] for row in categories}
    kaist = bool(named) and "im_name" in named[0][2]
    return Coco(tuple(found), tuple(labels.values()), tuple(ids.values()), kaist)


def _add(marks: dict[str, list[Mark]], labels: Mapping[str, str], row: Any, where: str) -> None:
    try:
        image, category, box = str(row["image_id"]), str(row["category_id"]), row["bbox"]
    except (KeyError, TypeError):
        raise AnnotationError(f"{where}: expected image_id, category_id and bbox.") from None
    if image not in marks:
        raise AnnotationError(f"{where}: image_id {one_line(image)} is none of the {len(marks)} images of the file.")
    if category not in labels:
        known = first((one_line(f"{key} {name}") for key, name in labels.items()), 6)
        raise AnnotationError(
            f"{where}: category_id {one_line(category)} is none of the categories of the file ({known})."
        )
    if not isinstance(box, list) or len(box) != 4:
        raise AnnotationError(f"{where}: expected bbox [x, y, w, h], got {one_line(box)} (5 are a turned box).")
    ignore = bool(row.get("iscrowd", 0)) or bool(row.get("ignore", 0))
    occlusion = _occlusion(str(row.get("occlusion") or 0), where)
    marks[image].append(Mark(labels[category], *_numbers(box, where), occlusion, ignore))


def _coco_image(name: str, row: Mapping[str, Any], marks: list[Mark], where: str) -> CocoImage:
    size = _size([row.get("width"), row.get("height")], where)
    group = next((str(row[key]) for key in ("group", "video_id", "video") if row.get(key) is not None), "")
    time = str(row.get("day_night") or row.get("time") or "")
    return CocoImage(row["id"], name, Marked(marks, size), group, time)


def policy(rules: Mapping[str, str]) -> str:
    """What becomes of each label, as a card tells it.

    Example:
        >>> policy({"person": "train", "people": "ignore"})
        'person=train,people=ignore'
    """
    return ",".join(f"{label}={action}" for label, action in rules.items())


def digest(marks: Mapping[str, Iterable[Mark]], rules: Mapping[str, str]) -> str:
    """sha256 of boxes by image name, whatever form of file they come in: names and boxes sorted, two decimals.

    rules: the set's own, label -> train or other. A label counts by name if it is trained, else as one to ignore:
    KAIST's json tells no more of people and cyclists than that.

    Example:
        >>> one, other = Mark("person", 1, 2, 3, 4), Mark("people", 5, 6, 7, 8)
        >>> lost, rules = Mark("person", 5, 6, 7, 8, ignore=True), {"person": "train", "people": "ignore"}
        >>> digest({"a": [one, other], "b": []}, rules) == digest({"b": [], "a": [lost, one]}, rules)
        True
    """
    trained = {label.lower() for label, action in rules.items() if action == "train"}
    made = hashlib.sha256()
    for name in sorted(marks):
        rows = []
        for mark in marks[name]:
            counted = mark.label.lower() in trained and not mark.ignore
            kind = mark.label.lower() if counted else "-"
            rows.append(" ".join([kind, *(f"{value:.2f}" for value in mark[1:5]), str(mark.occlusion)]))
        made.update("\n".join([name, *sorted(rows), ""]).encode())
    return made.hexdigest()


def read_mask(path: Path) -> np.ndarray:
    """A label image, (H, W) uint8 of 0..8; palette images give their indices, grey colour images one channel.

    Raises: AnnotationError naming the file when it is no image or colours stand for labels, with the value when one
        is none of 0 to 8.
    """
    from PIL import Image

    if not path.is_file():
        raise AnnotationError(f"no label image {path}; check the path.")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > PIXEL_CAP:
                raise ValueError(f"{image.width}x{image.height} pixels")
            labels = np.asarray(image)
    except Exception as error:
        raise AnnotationError(f"{path} cannot be read as a label image ({type(error).__name__}); replace it.") from None
    if labels.ndim == 3:
        if (labels[..., :3] != labels[..., :1]).any():
            raise AnnotationError(f"{path} is in colour; expected one label 0 to {MASK_CLASSES - 1} a pixel.")
        labels = labels[..., 0]
    # Negative values and fractions would become other labels in 8 bits.
    strange = labels[~np.isin(labels, np.arange(MASK_CLASSES))]
    if strange.size:
        raise AnnotationError(
            f"{path} holds the label {strange.max()}; expected 0 to {MASK_CLASSES - 1} (MFNet). Is it a picture, or a "
            "mask of another set?"
        )
    return labels.astype(np.uint8)


def mask_marks(labels: np.ndarray, names: Mapping[int, str]) -> Marked:
    """Boxes around the connected parts (8 neighbours) of a label image (H, W), for the labels in `names`.

    Touching objects of a class share a box; parts below 20 px give none.

    Example:
        >>> labels = np.zeros((12, 16), np.uint8)
        >>> labels[2:8, 3:9] = 2
        >>> mask_marks(labels, {2: "person"}).marks
        [Mark(label='person', x=3.0, y=2.0, w=6.0, h=6.0, occlusion=0, ignore=False)]
    """
    from scipy import ndimage

    marks = []
    whole = dict(enumerate(ndimage.find_objects(labels), start=1))
    for value, name in names.items():
        if whole.get(value) is None:
            continue
        top, left = (side.start for side in whole[value])
        parts, _ = ndimage.label(labels[whole[value]] == value, np.ones((3, 3)))
        areas = np.bincount(parts.ravel())
        for part, (rows, columns) in enumerate(ndimage.find_objects(parts), start=1):
            if areas[part] >= LEAST_PIXELS:
                x, y, w, h = columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start
                marks.append(Mark(name, float(left + x), float(top + y), float(w), float(h)))
    return Marked(marks, (labels.shape[1], labels.shape[0]))


def image_size(path: Path) -> tuple[int, int]:
    """Width and height in px, from the header alone; AnnotationError naming the file."""
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except Exception as error:
        raise AnnotationError(f"{path} cannot be read as an image ({type(error).__name__}); replace it.") from None


def _numbers(parts: Sequence[Any], where: str) -> tuple[float, float, float, float]:
    try:
        x, y, w, h = (float(part) for part in parts)
    except (TypeError, ValueError, OverflowError):
        raise AnnotationError(f"{where}: expected four numbers, got {one_line(list(parts))}.") from None
    if not all(map(math.isfinite, (x, y, w, h))):
        raise AnnotationError(f"{where}: the box {x:g}, {y:g}, {w:g}, {h:g} is not finite.")
    return x, y, w, h


def _size(sides: Sequence[Any], where: str) -> tuple[int, int] | None:
    """Width and height as a file tells them; None where it tells none or 0."""
    try:
        width, height = (int(float(side or 0)) for side in sides)
        if max(abs(width), abs(height)) >= 2**31:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise AnnotationError(f"{where}: expected a width and height in px, got {one_line(list(sides))}.") from None
    return (width, height) if width and height else None


def _occlusion(text: str, where: str) -> int:
    if text.strip() not in ("0", "1", "2"):
        raise AnnotationError(f"{where}: occlusion {one_line(text)}, expected 0 (none), 1 (partial) or 2 (heavy).")
    return int(text)


def one_line(value: Any) -> str:
    """A value out of somebody's file as a short piece of a one-line message.

    Example:
        >>> one_line("two\\nlines")
        'two lines'
    """
    return " ".join(str(value).split())[:60]
