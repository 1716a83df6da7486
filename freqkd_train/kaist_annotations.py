"""KAIST's annotation sets and frame lists: where they lie, what is known of them.

Each set is by another hand: original (Hwang et al., CVPR 2015), improved test (Liu et al., BMVC 2016; the reference of
published miss rates), sanitized train (Li et al., BMVC 2018), paired (Zhang et al., ICCV 2019; a box a modality).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from freqkd_analysis.data import layouts, listing
from freqkd_analysis.data.records import PairRecord
from freqkd_analysis.errors import first, nearest
from freqkd_train import annotation_files as files
from freqkd_train.annotation_files import AnnotationError, Marked

FRAME = re.compile(r"(set\d\d)[/_](V\d{3})[/_](?:(?:visible|lwir)[/_])?(I\d{5})")
RULES = {"person": "train", "people": "ignore", "person?": "ignore", "cyclist": "ignore"}
IMPROVED_SHA256 = "e6d75ce31589d00f6ccc9ca285e33a5a8d087eef7ca12718e9ab890513d4cc64"
"""`annotation_files.digest` of the improved test boxes, whatever file they come in."""

_FOLDERS = {
    "original": ("annotations", "annotations_original", "annotations-xml"),
    "improved": ("annotations_improved", "annotations-improved", "improved"),
    "sanitized": ("annotations_sanitized", "annotations-sanitized", "sanitized"),
    "paired": ("annotations_paired", "annotations-paired"),
}
# The json has one category for all labels, so it comes last.
_FILES = ("test_annotations_improved.csv", "test_annotations_improved.csv.gz", "KAIST_annotation.json")
_LISTS = {
    "test-all-20": (range(6, 12), 20, 19), "train-all-20": (range(6), 20, 19), "train-all-02": (range(6), 2, 1),
}  # fmt: skip
"""Sets, and frame numbers: number mod the second is the third."""
_FRAMES = {"test-all-20": 2252, "test-day-20": 1455, "test-night-20": 797, "train-all-02": 25086, "train-all-20": 2500}
_IMPROVED = {"person": 3390, "people": 597, "person?": 177, "cyclist": 90}


def source(base: Path, wanted: str, split: str) -> tuple[str, Path]:
    """The name and the file or folder of an annotation set; without a name the better one that is there.

    Raises: AnnotationError for an unknown name, or with the places looked at.
    """
    for path in (Path(wanted), base / wanted) if wanted and wanted not in _FOLDERS else ():
        if path.exists():
            return path.name, path
    if wanted and wanted not in _FOLDERS:
        raise AnnotationError(f'KAIST has no annotation set "{wanted}".{nearest(wanted, _FOLDERS)} Known: '
                              f"{', '.join(_FOLDERS)}; or name a file or folder.")  # fmt: skip
    names = (wanted,) if wanted else ("improved", "original") if split.startswith("test") else ("sanitized", "original")
    tried = []
    for name in names:
        places = [base / place for place in _FOLDERS[name]]
        if name == "improved":
            places += [base / folder / file for file in _FILES for folder in ("", "annotations")]
        there = next((place for place in places if place.exists()), None)
        if there:
            return name, there
        tried += [place.relative_to(base).as_posix() for place in places]
    raise AnnotationError(f"no {' or '.join(names)} annotations in {base}; looked for {', '.join(tried)} (folders hold "
                          "setXX/VXXX/I#####.txt).")  # fmt: skip


def file(folder: Path, frame: str) -> Path | None:
    """The file of a frame such as set06/V000/I00019: text or xml, nested, flat, or (paired) of the infrared image."""
    video, _, image = frame.rpartition("/")
    stems = (frame, f"{video}/lwir/{image}", frame.replace("/", "_"))
    tries = (folder / f"{stem}{end}" for stem in stems for end in (".txt", ".xml"))
    return next((path for path in tries if path.is_file()), None)


def tabled(path: Path, frames: Sequence[str]) -> list[Marked | None]:
    """Marks of a csv of the test set. It has rows for boxes only: a frame of test-all-20 without a row is empty."""
    table = files.table(path)
    return [table.get(frame, Marked([]) if _ruled(frame, "test-all-20") else None) for frame in frames]


def records(
    base: Path, given: Sequence[str], split: str, annotation_set: str
) -> tuple[str, list[PairRecord], tuple[str, ...]]:
    """The name of the frame list of a split, its pairs, and a word about those without image.

    split: train (sets 00-05), test (06-11), all, or the name of a list. given: a list from the specification, of which
    the split's sets are taken. Without the list file the rule behind its name serves.
    """
    lists = listing.child(base, "imageSets")
    there = sorted({path.name.split(".")[0] for path in lists.glob("*.txt*")}) if lists else []
    names = {"test": ["test-all-20"], "train": ["train-all-02", "train-all-20"], "all": [""]}.get(split, [split])
    if annotation_set == "sanitized" and split == "train":
        names = [name for name in there if "sanitized" in name] + names
    name = given[0] if given else next((name for name in names if name in there), names[0])
    missing: list[str] = []
    if given or not name or name in there:
        found = layouts.load(f"kaist:{base}" + (f":{name}" if name else ""), missing.extend)
    elif name in _LISTS:
        found = [record for record in layouts.load(f"kaist:{base}", missing.extend) if _ruled(record.id, name)]
    else:
        choices = ("train", "test", "all", *there)
        raise AnnotationError(f'no split "{split}" in {base}.{nearest(split, choices)} Known: {", ".join(choices)} '
                              "(further ones are lists in imageSets).")  # fmt: skip
    sets = {"train": range(6), "test": range(6, 12)}.get(split, range(12))
    found = [record for record in found if int(record.id[3:5]) in sets]
    if not found:
        raise AnnotationError(f"no frame of the split {split} in {base}: {name or 'all frames'} holds none of sets "
                              f"{sets[0]:02d} to {sets[-1]:02d}.")  # fmt: skip
    told = (f"{len(missing)} listed images are not there and left out: {first(missing)}",) if missing else ()
    return Path(name).name or "all", found, told


def known(annotation_set: str, frames: str) -> dict[str, Any]:
    """What is published of a set on a frame list: frames, boxes of each label, digest."""
    if annotation_set == "sanitized":
        return {"frames": 7601}
    facts: dict[str, Any] = {"frames": _FRAMES[frames]} if frames in _FRAMES else {}
    if annotation_set == "improved" and frames == "test-all-20":
        facts |= {"labels": _IMPROVED, "sha256": IMPROVED_SHA256}
    return facts


def _ruled(frame: str, name: str) -> bool:
    sets, step, rest = _LISTS[name]
    return int(frame[3:5]) in sets and int(frame[-5:]) % step == rest
