"""Synthetic scenes as files in the layouts of public data sets, with their annotations and lists.

One function a layout, all in `WRITERS`; each takes the folder to fill and the planned pairs, sequence by sequence,
and writes one pair at a time, so that memory does not grow with the set.
"""

from __future__ import annotations

import csv
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from freqkd_analysis.data import listing, scenes
from freqkd_analysis.data.records import PairedSample, PairRecord
from freqkd_analysis.errors import DataError, nearest

Progress = Callable[[int, int], None]
Frames = Iterator[tuple[int, int, PairedSample]]
"""Sequence number, frame number in it, rendered pair."""

SIZES = {"kaist": "640x512", "flir": "640x512", "mfnet": "640x480", "folder": "320x256"}
"""Size of each layout's images unless the options say otherwise."""

MFNET_IDS = np.array([0, 0, 0, 0, 0, 1, 2, 3, 0], np.uint8)
"""MFNet's label of each scene class: car 1, person 2, bike 3."""


def write(out: Path, layout: str, options: str = "", progress: Progress | None = None) -> str:
    """Write a synthetic set into a new or empty folder, in the layout of a public data set.

    Args:
        out: folder to fill; it appears, or is filled where it is there and empty, when the set is whole.
        layout: kaist, flir (v1 aligned), mfnet or folder (visible/ and infrared/, with a manifest for `kit:`).
        options: as for `records`; the size defaults to the layout's own.
        progress: told (pairs written, pairs in all) after each pair.
    Returns: the data specification that reads it, such as "kaist:OUT".
    Raises: DataError for an unknown layout or option, and when `out` is not empty.

    Example:
        >>> root = Path(tempfile.mkdtemp())
        >>> spec = write(root / "set", "folder", "pairs=2,groups=1,size=64x48")
        >>> sorted(p.name for p in (root / "set" / "infrared").iterdir())
        ['g000_00000.png', 'g000_00001.png']
    """
    if layout not in WRITERS:
        raise DataError(f'No layout "{layout}" to write.{nearest(layout, WRITERS)} Known: {", ".join(WRITERS)}.')
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is not empty; nothing was written. Name a new folder, or empty this one.")
    if "size=" not in options:
        options = ",".join(filter(None, (options, f"size={SIZES[layout]}")))
    planned = scenes.records(options)
    place = out.resolve()  # `.` is its own parent
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
        part.chmod(0o755)
    except OSError as error:
        raise DataError(f"Cannot write {out}: {error.strerror}. Name a folder that can be written.") from None
    try:
        WRITERS[layout](part, planned, progress)
        lines(part / listing.RENDERED, [f"Rendered scenes in the layout of {layout}, not the data set: {options}."])
        if out.exists():  # kept, not replaced: somebody may stand in it
            for path in part.iterdir():
                path.rename(out / path.name)
        else:
            part.rename(out)
    except OSError as error:
        raise DataError(
            f"Cannot write {out}: {error.strerror}. Nothing was kept; free some space and repeat."
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return f"folder:{out / 'visible'}:{out / 'infrared'}" if layout == "folder" else f"{layout}:{out}"


def frames(planned: list[PairRecord], progress: Progress | None) -> Frames:
    """Render the planned pairs one by one."""
    for done, record in enumerate(planned, 1):
        yield record.meta["group"], record.meta["frame"], scenes.render(record)
        if progress:
            progress(done, len(planned))


def bytes_of(image: np.ndarray) -> np.ndarray:
    """256 levels as uint8."""
    return np.round(image * 255).astype(np.uint8)


def save(path: Path, image: np.ndarray) -> None:
    """One 8-bit image; JPEG at quality 95, PNG lossless."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    how: dict[str, Any] = {"compress_level": 3} if path.suffix == ".png" else {"quality": 95}
    Image.fromarray(image).save(path, **how)


def lines(path: Path, texts: list[str]) -> None:
    """A text file of one entry a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{t}\n" for t in texts), encoding="utf-8")


def write_folder(out: Path, planned: list[PairRecord], progress: Progress | None) -> None:
    """visible/NAME.png and infrared/NAME.png; manifest.csv (name, group, time, known shift) makes it a kit as well."""
    rows = []
    for _, _, s in frames(planned, progress):
        save(out / "visible" / f"{s.id}.png", bytes_of(s.rgb))
        save(out / "infrared" / f"{s.id}.png", bytes_of(s.ir))
        rows.append([s.id, s.group, s.meta["time"], *s.meta["shift"]])
    with open(out / "manifest.csv", "w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(["name", "group", "time", "shift_right_px", "shift_down_px"])
        table.writerows(rows)


def write_kaist(out: Path, planned: list[PairRecord], progress: Progress | None) -> None:
    """images/setXX/VXXX/{visible,lwir}/I#####.jpg, bbGt text files, and train-all-20 and test-all-20.

    Sequences go in turn to the training and test sets of their light. Frames carry the numbers 19, 39, ..., which
    are the ones those two lists sample.
    """
    names: dict[int, str] = {}
    used: dict[int, int] = {}
    listed: dict[str, list[str]] = {"train": [], "test": []}
    turns = {"day": (0, 6, 1, 7, 2, 8), "night": (3, 9, 4, 10, 5, 11)}
    seen = {"day": 0, "night": 0}
    for group, frame, s in frames(planned, progress):
        if group not in names:
            time = s.meta["time"]
            number = turns[time][seen[time] % 6]
            seen[time] += 1
            names[group] = f"set{number:02d}/V{used.get(number, 0):03d}"
            used[number] = used.get(number, 0) + 1
        video, image = names[group], f"I{20 * frame + 19:05d}"
        save(out / "images" / video / "visible" / f"{image}.jpg", bytes_of(s.rgb))
        save(out / "images" / video / "lwir" / f"{image}.jpg", bytes_of(s.ir))
        lines(out / "annotations" / video / f"{image}.txt", ["% bbGt version=3", *kaist_boxes(s)])
        listed["train" if int(video[3:5]) < 6 else "test"].append(f"{video}/{image}")
    for split, entries in listed.items():
        lines(out / "imageSets" / f"{split}-all-20.txt", sorted(entries))


def kaist_boxes(s: PairedSample) -> list[str]:
    """People and cyclists as bbGt objects: 1-based x and y, visible part where something covers them."""
    texts = []
    columns = zip(s.meta["labels"], s.meta["boxes"], s.meta["visible_boxes"], s.meta["occlusion"], strict=True)
    for label, box, part, occlusion in columns:
        if label in ("person", "cyclist"):
            x, y, w, h = (round(float(v)) for v in box)
            seen = [round(float(v)) for v in part] if occlusion else [-1, -1, 0, 0]
            numbers = [x + 1, y + 1, w, h, int(occlusion), seen[0] + 1, seen[1] + 1, *seen[2:], 0, 0]
            texts.append(" ".join([label, *map(str, numbers)]))
    return texts


def write_flir(out: Path, planned: list[PairRecord], progress: Progress | None) -> None:
    """align/: JPEGImages, Annotations (boxes on the thermal image), align_train.txt, align_validation.txt.

    Numbers leave a gap between sequences, so that they can be told apart; the last fifth of them is validation.
    """
    base = out / "align"
    longest = max(r.meta["frame"] for r in planned) + 1
    groups = planned[-1].meta["group"] + 1
    if groups * (longest + 60) > 99_999:
        raise DataError(f"{groups} sequences of {longest} frames do not fit FLIR's five-digit numbers. Ask for fewer.")
    listed: dict[str, list[str]] = {"train": [], "validation": []}
    for group, frame, s in frames(planned, progress):
        name = f"FLIR_{group * (longest + 60) + frame + 1:05d}"
        save(base / "JPEGImages" / f"{name}_RGB.jpg", bytes_of(s.rgb))
        save(base / "JPEGImages" / f"{name}_PreviewData.jpeg", bytes_of(s.ir))
        path = base / "Annotations" / f"{name}_PreviewData.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        flir_boxes(f"{name}_PreviewData.jpeg", s).write(path, encoding="utf-8")
        listed["validation" if group >= groups - groups // 5 else "train"].append(f"{name}_PreviewData")
    for split, entries in listed.items():
        lines(base / f"align_{split}.txt", entries)


def flir_boxes(name: str, s: PairedSample) -> ElementTree.ElementTree[ElementTree.Element]:
    """A frame's boxes as VOC XML on the thermal image; a cyclist is a person and a bicycle, as FLIR draws them."""
    height, width = s.ir.shape
    root = ElementTree.Element("annotation")
    add = ElementTree.SubElement
    add(root, "filename").text = name
    size = add(root, "size")
    for tag, value in (("width", width), ("height", height), ("depth", 1)):
        add(size, tag).text = str(value)
    found = []
    for label, (x, y, w, h) in zip(s.meta["labels"], s.meta["boxes_ir"].tolist(), strict=True):
        if label == "cyclist":
            found += [("person", (x, y, x + w, y + 0.85 * h)), ("bicycle", (x, y + 0.5 * h, x + w, y + h))]
        else:
            found.append((label, (x, y, x + w, y + h)))
    limits = (width - 1, height - 1) * 2
    for label, corners in found:
        x0, y0, x1, y1 = (round(min(max(v, 0), most)) for v, most in zip(corners, limits, strict=True))
        if x1 <= x0 or y1 <= y0:
            continue
        thing = add(root, "object")
        for tag, text in (("name", label), ("pose", "Unspecified"), ("truncated", "0"), ("difficult", "0")):
            add(thing, tag).text = text
        box = add(thing, "bndbox")
        for tag, value in (("xmin", x0), ("ymin", y0), ("xmax", x1), ("ymax", y1)):
            add(box, tag).text = str(value)
    return ElementTree.ElementTree(root)


def write_mfnet(out: Path, planned: list[PairRecord], progress: Progress | None) -> None:
    """images/#####D.png of four channels (R, G, B, thermal), labels/ of MFNet's ids, and its five lists.

    Each sequence starts a block of 20 numbers. Half of the sequences of each light are train, then val and test.
    """
    longest = max(r.meta["frame"] for r in planned) + 1
    stride = 20 * -(-longest // 20)
    groups = planned[-1].meta["group"] + 1
    if (groups + 1) * stride > 99_999:
        raise DataError(f"{groups} sequences of {longest} frames do not fit MFNet's five-digit numbers. Ask for fewer.")
    turn: dict[int, int] = {}
    seen = {"day": 0, "night": 0}
    listed: dict[str, list[str]] = {k: [] for k in ("train", "val", "test", "test_day", "test_night")}
    for group, frame, s in frames(planned, progress):
        time = s.meta["time"]
        if group not in turn:
            turn[group] = seen[time]
            seen[time] += 1
        name = f"{(group + 1) * stride + frame:05d}{'N' if time == 'night' else 'D'}"
        four = np.concatenate([bytes_of(s.rgb), bytes_of(s.ir)[..., None]], axis=2)
        save(out / "images" / f"{name}.png", four)
        save(out / "labels" / f"{name}.png", MFNET_IDS[s.meta["mask"]])
        split = ("train", "val", "train", "test")[turn[group] % 4]
        listed[split].append(name)
        if split == "test":
            listed[f"test_{time}"].append(name)
    for split, entries in listed.items():
        lines(out / f"{split}.txt", entries)


WRITERS: dict[str, Callable[[Path, list[PairRecord], Progress | None], None]] = {
    "kaist": write_kaist,
    "flir": write_flir,
    "mfnet": write_mfnet,
    "folder": write_folder,
}
"""What can be written."""
