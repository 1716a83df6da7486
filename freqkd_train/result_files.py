"""Anybody's annotations and detections as files: KAIST and COCO json, lists of detections. Every error names the line.

Image numbers of the text form `image,x,y,w,h,score` count from 1 in the order of the KAIST list; for other annotations
the first column is the image's id or name as it stands in the annotation file. Json entries carry either always.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from freqkd_analysis.errors import FreqkdError, first, nearest
from freqkd_train import annotation_files, annotation_sets, kaist_annotations
from freqkd_train import annotations as annotated
from freqkd_train.annotation_files import one_line
from freqkd_train.metrics.boxes import EVERY_CLASS, BoxError, Detections, Truth, make_detections, make_truth

COLUMNS = "image,x,y,w,h,score"
_KAIST_NAME = re.compile(r"(set(\d\d))[/_](V\d{3})[/_](?:(?:visible|lwir)[/_])?(I\d{5})")
_VIDEO_NAME = re.compile(r"(video-[^-/]+)-frame-\d+")


class ResultError(FreqkdError):
    """An annotation or detection file that cannot be read; the text names file and line."""


@dataclass(frozen=True)
class Annotations:
    """A truth and what is needed to read detections for it."""

    truth: Truth
    ids: Mapping[str, int]
    """Image id, as text -> image number."""
    categories: Mapping[str, int]
    """Category id, as text -> index into the classes."""
    kaist: bool
    """Whether it is the KAIST json, whose detection lists count images from 1."""
    name: str
    sha256: str
    """`annotation_files.digest`, the same as in an evaluation on these annotations."""
    policy: str
    """What becomes of each label; and how many boxes stand as they are in the file that an evaluation would change."""


def read_annotations(path: Path) -> Annotations:
    """KAIST json, a folder of KAIST's bbGt text files, or COCO json, with plain truths for scoring detections.

    KAIST: `person` counts, every other label is an ignore region. COCO: `iscrowd` and `ignore` mark ignore regions, a
    category such as DontCare is one for every class.

    Raises: FreqkdError naming the entry that cannot be read.
    """
    if path.is_dir():
        return _bbgt_folder(path)
    if not path.is_file():
        raise ResultError(f"no annotations {path}; expected a KAIST or COCO json, or a folder of bbGt text files.")
    coco = annotation_files.coco(path)
    names = [image.name for image in coco.images]
    classes: tuple[str, ...]
    if coco.kaist:
        classes, place = ("person",), {name: 0 if name == "person" else EVERY_CLASS for name in coco.labels}
    else:
        classes = tuple(name for name in coco.labels if name.lower() not in annotation_files.REGIONS)
        place = {name: classes.index(name) if name in classes else EVERY_CLASS for name in coco.labels}
    marked = [image.marked for image in coco.images]
    truth = _truth(
        path, names, classes, place, marked,
        [image.group or _group(image.name) for image in coco.images],
        [image.time.lower() if image.time.lower() in ("day", "night") else _time(image.name) for image in coco.images],
    )  # fmt: skip
    ids = {str(image.id): number for number, image in enumerate(coco.images)}
    categories = {str(key): place[name] for key, name in zip(coco.categories, coco.labels, strict=True)}
    rules = kaist_annotations.RULES if coco.kaist else {
        name: "train" if name in classes else "ignore" for name in coco.labels}  # fmt: skip
    return Annotations(truth, ids, categories, coco.kaist, path.name, *_told(truth, marked, rules))


def _bbgt_folder(folder: Path) -> Annotations:
    """setXX/VXXX/IXXXXX.txt or setXX_VXXX_IXXXXX.txt; images in the order of their names, as in KAIST's lists."""
    found = {}
    for path in folder.rglob("*.txt"):
        if match := _KAIST_NAME.search(path.relative_to(folder).as_posix()):
            found["/".join(match[part] for part in (1, 3, 4))] = path
    if not found:
        raise ResultError(f"{folder}: no setXX/VXXX/IXXXXX.txt or setXX_VXXX_IXXXXX.txt; expected KAIST's bbGt files.")
    names = sorted(found)
    marked = [annotation_files.bbgt(found[name]) for name in names]
    others = {mark.label for one in marked for mark in one.marks} - {"person"}
    place = {"person": 0, **dict.fromkeys(others, EVERY_CLASS)}
    truth = _truth(folder, names, ("person",), place, marked, [_group(n) for n in names], [_time(n) for n in names])
    ids = {str(number): number for number in range(len(names))}
    return Annotations(truth, ids, {"1": 0}, True, folder.name, *_told(truth, marked, kaist_annotations.RULES))


def _told(truth: Truth, marked: Sequence[annotation_files.Marked], rules: Mapping[str, str]) -> tuple[str, str]:
    """Digest and policy, for a card, in the words of an evaluation. Boxes stay as they are: so do published figures."""
    keys = [annotation_sets.key(name) for name in truth.names]
    names = keys if len(set(keys)) == len(keys) else truth.names
    content = annotation_files.digest({n: one.marks for n, one in zip(names, marked, strict=True)}, rules)
    sizes = np.where(truth.sizes > 0, truth.sizes, np.iinfo(np.int64).max)
    edges = "keep" if rules is kaist_annotations.RULES else "clip"
    box, stay, _ = annotated.cleaned(truth.image, list(truth.label), truth.box, sizes, edges)
    changed = int((~stay | (box != truth.box).any(axis=1)).sum())
    policy = annotation_files.policy(rules)
    return content, policy + (f"; {changed} boxes that are empty, twice or beyond their image stay" if changed else "")


def _truth(
    path: Path, names: Sequence[str], classes: tuple[str, ...], place: Mapping[str, int],
    marked: Sequence[annotation_files.Marked], groups: Sequence[str], times: Sequence[str],
) -> Truth:  # fmt: skip
    marks = [(number, mark) for number, one in enumerate(marked) for mark in one.marks]
    try:
        return make_truth(
            names, classes=classes, groups=groups, times=times, sizes=[one.size or (0, 0) for one in marked],
            image=[number for number, _ in marks], category=[place[mark.label] for _, mark in marks],
            box=[(mark.x, mark.y, mark.w, mark.h) for _, mark in marks],
            ignore=[mark.ignore or place[mark.label] == EVERY_CLASS for _, mark in marks],
            occlusion=[mark.occlusion for _, mark in marks], label=[mark.label for _, mark in marks],
        )  # fmt: skip
    except BoxError as error:
        raise ResultError(f"{path}: {error}") from error


def read_results(path: Path, annotations: Annotations) -> Detections:
    """Detections from `image,x,y,w,h,score` lines (.txt, .csv, also .gz) or a json list of COCO results.

    Raises: ResultError with file and line (json: entry, counted from 0) for a wrong number of columns, an image or
        category that the annotations do not have, or a number that is not finite.
    """
    if path.name.removesuffix(".gz").endswith(".json"):
        return _from_json(path, annotations)
    return _from_text(path, annotations)


def _from_text(path: Path, annotations: Annotations) -> Detections:
    if len(annotations.truth.classes) != 1:
        raise ResultError(
            f"{path}: text lists hold no class, but the annotations have {len(annotations.truth.classes)} "
            f"({first(annotations.truth.classes)}); give a json list of COCO results."
        )
    lines = _lines(path)
    numbered = [(number, line.replace("\t", ",").strip()) for number, line in enumerate(lines, 1) if line.strip()]
    wide = next(((number, line) for number, line in numbered if line.count(",") != 5), None)
    if wide:
        raise ResultError(
            f"{path} line {wide[0]}: expected 6 columns ({COLUMNS}), got {wide[1].count(',') + 1}: {wide[1][:60]!r}."
        )
    cells = ",".join(line for _, line in numbered).split(",") if numbered else []
    known = _known(annotations)
    image = [
        _image_of(f"{path} line {line}", cell, known, annotations)
        for (line, _), cell in zip(numbered, cells[::6], strict=True)
    ]
    rows = np.zeros((len(numbered), 5))
    for column in range(5):
        try:
            rows[:, column] = np.asarray(cells[column + 1 :: 6], dtype=float)
        except ValueError:
            _raise_at_number(path, numbered)
    _require_finite(rows, lambda k: f"{path} line {numbered[k][0]}")
    return make_detections(image, rows[:, :4], rows[:, 4])


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ResultError(f"no file {path}; expected detections, {COLUMNS} a line or a json list.")
    return annotation_files.read_text(path).splitlines()


def _known(annotations: Annotations) -> dict[str, int]:
    """Image number by id, or by name where that is no id."""
    return {name: number for number, name in enumerate(annotations.truth.names)} | dict(annotations.ids)


def _image_of(where: str, cell: str, known: Mapping[str, int], annotations: Annotations) -> int:
    """Image number of a first column; `known` holds every id and name. KAIST's numbers are ids counted from 1."""
    text = cell.strip()
    if not (annotations.kaist and _is_number(text)):
        if text not in known:
            raise ResultError(
                f'{where}: image "{one_line(text)}" is not in {annotations.name}, which has {len(annotations.ids)} '
                f"images (ids such as {first(annotations.ids, 2)}).{nearest(one_line(text), known)}"
            )
        return known[text]
    value = float(text)
    number = annotations.ids.get(str(int(value) - 1)) if value.is_integer() else None
    if number is None:
        raise ResultError(
            f"{where}: image {one_line(text)}, expected a whole number from 1 to {len(annotations.ids)} "
            f"(the image's id in {annotations.name} plus 1)."
        )
    return number


def _raise_at_number(path: Path, numbered: list[tuple[int, str]]) -> None:
    for number, line in numbered:
        wrong = [cell for cell in line.split(",")[1:] if not _is_number(cell)]
        if wrong:
            raise ResultError(f"{path} line {number}: {one_line(repr(wrong[0]))} is no number; expected {COLUMNS}.")


def _from_json(path: Path, annotations: Annotations) -> Detections:
    if not path.is_file():
        raise ResultError(f"no file {path}; expected detections, {COLUMNS} a line or a json list.")
    content = _json(path)
    entries = content.get("annotations") if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise ResultError(f"{path}: expected a json list of objects with image_id, category_id, bbox and score.")
    known = _known(annotations)
    image, category, rows = [], [], np.zeros((len(entries), 5))
    for k, entry in enumerate(entries):
        try:
            key, kind = str(entry["image_id"]), str(entry["category_id"])
            rows[k] = (*entry["bbox"], entry["score"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ResultError(
                f"{path} entry {k}: expected image_id, category_id, bbox [x, y, w, h] and score, got {one_line(entry)}."
            ) from error
        if key not in known:
            raise ResultError(f'{path} entry {k}: image_id "{one_line(key)}" is not in {annotations.name}.')
        if annotations.categories.get(kind, EVERY_CLASS) == EVERY_CLASS:
            raise ResultError(
                f'{path} entry {k}: category_id "{one_line(kind)}" is no class of {annotations.name}; known: '
                f"{first([c for c, number in annotations.categories.items() if number != EVERY_CLASS], 8)}."
            )
        image.append(known[key])
        category.append(annotations.categories[kind])
    _require_finite(rows, lambda k: f"{path} entry {k}")
    return make_detections(image, rows[:, :4], rows[:, 4], category)


def _require_finite(rows: np.ndarray, where: Callable[[int], str]) -> None:
    """`rows` (D, 5): x, y, w, h, score."""
    wrong = ~np.isfinite(rows).all(axis=1)
    if wrong.any():
        k = int(np.flatnonzero(wrong)[0])
        what = "score" if not math.isfinite(rows[k, 4]) else "box"
        raise ResultError(f"{where(k)}: the {what} is not finite: {rows[k].tolist()}.")
    wrong = (rows[:, 2:4] < 0).any(axis=1)
    if wrong.any():
        k = int(np.flatnonzero(wrong)[0])
        raise ResultError(f"{where(k)}: width {rows[k, 2]:g} and height {rows[k, 3]:g} must not be below 0 (x,y,w,h).")


def _group(name: str) -> str:
    """The video that a name tells of: KAIST's set and video, FLIR's video; empty for others."""
    if found := _KAIST_NAME.search(name):
        return f"{found[1]}/{found[3]}"
    found = _VIDEO_NAME.search(name)
    return found[1] if found else ""


def _time(name: str) -> str:
    found = _KAIST_NAME.search(name)
    return ("day" if int(found[2]) % 6 < 3 else "night") if found else ""  # sets 00-02 and 06-08 are day


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _json(path: Path) -> Any:
    try:
        return json.loads(annotation_files.read_text(path))
    except json.JSONDecodeError as error:
        raise ResultError(f"{path} line {error.lineno}: no json ({error.msg}).") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists thousands deep
        raise ResultError(f"{path}: no json that can be read ({type(error).__name__}).") from error
