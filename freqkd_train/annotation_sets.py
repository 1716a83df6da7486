"""Where each data set keeps its annotations: one function a layout, all in `SETS`; images come from the pair layouts.

A function gets the parts of the specification after the layout's name, the split and the name of an annotation set,
and returns the records of the split that are annotated, with their marks or label images. A frame of a list without
image, or without annotation, is left out and told: an image that nobody looked at is not an image without objects.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from freqkd_analysis.data import layouts, listing
from freqkd_analysis.data.records import PairRecord
from freqkd_analysis.errors import first, nearest
from freqkd_train import annotation_files as files
from freqkd_train import kaist_annotations
from freqkd_train.annotation_files import AnnotationError, Marked

_FLIR_V2 = ("person", "bike", "car", "motor", "bus", "train", "truck", "light", "hydrant", "sign", "dog", "skateboard",
            "stroller", "scooter", "other vehicle")  # fmt: skip
_FLIR_TEST = {"person": 4107, "bicycle": 360, "car": 4124}
_HIT_UAV = {
    "train": (2029, {"Person": 8533, "Car": 5253, "Bicycle": 3630, "OtherVehicle": 102, "DontCare": 110}),
    "val": (290, {"Person": 1168, "Car": 719, "Bicycle": 554, "OtherVehicle": 12, "DontCare": 7}),
    "test": (579, {"Person": 2611, "Car": 1339, "Bicycle": 796, "OtherVehicle": 34, "DontCare": 31}),
}
_MFNET = {"all": 1569, "train": 784, "val": 392, "test": 393, "test_day": 205, "test_night": 188}
_MFNET_THINGS = {2: "person", 3: "bike", 1: "car"}
_M3FD = ("People", "Car", "Bus", "Motorcycle", "Lamp", "Truck")


@dataclass(frozen=True)
class Ids:
    """The ids of a json for images, by the name of their record, and for labels; empty where no one json tells them."""

    images: Mapping[str, int | str] = field(default_factory=dict)
    categories: Mapping[str, int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """What a layout holds for a split, before policy and cleaning."""

    annotation_set: str
    split: str
    records: list[PairRecord]
    marked: list[Marked] | None = None
    """Of each record; None where label images are asked for."""
    masks: list[Path] | None = None
    rules: Mapping[str, str] = field(default_factory=dict)
    """Label -> train, ignore, merge or drop, in the order of the classes."""
    box_source: str = "infrared"
    """The image that boxes or labels were drawn on: infrared, both, or empty where nothing tells."""
    sequences: bool = False
    """Groups are sequences that names or folders tell, not blocks of numbers."""
    edges: str = "clip"
    """What becomes of a box that lies partly outside its image, unless asked otherwise."""
    known: Mapping[str, Any] = field(default_factory=dict)
    """Published: frames, labels (boxes of each), sha256."""
    warnings: tuple[str, ...] = ()
    ids: Ids = field(default_factory=Ids)


def kaist(arguments: Sequence[str], split: str, wanted: str) -> Found:
    """KAIST: original, improved (test), sanitized (train) or paired; split: train, test, or a list of imageSets/."""
    base = listing.existing(arguments[0])
    name, source = kaist_annotations.source(base, wanted, split)
    frames, records, lost = kaist_annotations.records(base, arguments[1:], split, name)
    ids = Ids()
    if source.is_dir():
        marked = [_parsed(kaist_annotations.file(source, record.id)) for record in records]
    elif source.name.endswith(".json"):
        marked, ids = _by_name([files.coco(source)], records)
    else:
        marked = kaist_annotations.tabled(source, [record.id for record in records])
    records, read, left = _annotated(records, marked, f"{source}/setXX/VXXX/I#####.txt" if source.is_dir() else source)
    if frames == "test-all-20" and name == "original":
        # Copies of the data keep the improved boxes under the original's folder name: their content tells them.
        content = files.digest({r.id: one.marks for r, one in zip(records, read, strict=True)}, kaist_annotations.RULES)
        name = "improved" if content == kaist_annotations.IMPROVED_SHA256 else name
    # The published protocol tests bounds on boxes as they stand, some of which reach beyond the image: none is cut.
    return Found(name, frames, records, read, rules=kaist_annotations.RULES, box_source="both", sequences=True,
                 edges="keep", known=kaist_annotations.known(name, frames), warnings=(*lost, *left),
                 ids=ids)  # fmt: skip


def flir(arguments: Sequence[str], split: str, wanted: str) -> Found:
    """FLIR v1 aligned (test = align_validation) or v2 (test = the videos); boxes on the thermal image."""
    base = listing.existing(arguments[0])
    if any(base.glob("images_thermal_*")) or (base / "video_thermal_test").is_dir():
        return _flir_v2(base, split)
    missing: list[str] = []
    parts = {"validation", "val", "test"} if split in ("test", "val") else {split}
    records = _of_split(layouts.load(f"flir:{base}", missing.extend), parts, split, base)
    aligned = listing.child(base, "align") or base
    folder = listing.child(aligned, "Annotations") or aligned / "Annotations"
    ids = Ids()
    if wanted not in ("", "xml"):
        (marked, ids), looked = _by_name(map(files.coco, _jsons(aligned, wanted)), records), wanted
    else:
        named = [(folder / f"{record.ir.stem}.xml", folder / f"{record.id}.xml") for record in records]
        marked = [_parsed(next((path for path in paths if path.is_file()), None)) for paths in named]
        looked = f"{folder}/{records[0].ir.stem}.xml and the like"
    records, read, left = _annotated(records, marked, looked)
    known: dict[str, Any] = {"frames": 4129} if split == "train" else {"frames": 1013, "labels": _FLIR_TEST}
    rules = {"person": "train", "bicycle": "train", "car": "train", "dog": "ignore"}
    return Found(f"v1 aligned, {wanted or 'xml'}", split, records, read, rules=rules, known=known, ids=ids,
                 warnings=(*_lost(missing), *left))  # fmt: skip


def _flir_v2(base: Path, split: str) -> Found:
    folder = base / ("video_thermal_test" if split == "test" else f"images_thermal_{split}")
    if not (folder / "coco.json").is_file():
        raise AnnotationError(f'no boxes of FLIR v2 for the split "{split}" in {base}; looked for '
                              f"{folder.name}/coco.json (splits: train, val, test).")  # fmt: skip
    # Visible frames of the video pairs differ in size and are not registered: boxes hold for the thermal ones alone.
    boxes = files.coco(folder / "coco.json")
    records, missing = _single(boxes.images, folder, "flir")
    marked, ids = _by_name([boxes], records)
    records, read, left = _annotated(records, marked, folder / "coco.json")
    return Found("v2 coco.json", split, records, read, rules=dict.fromkeys(_FLIR_V2, "train"), sequences=True,
                 known={"frames": 3749} if split == "test" else {}, ids=ids,
                 warnings=(*_lost(missing), *left))  # fmt: skip


def mfnet(arguments: Sequence[str], split: str, wanted: str) -> Found:
    """MFNet: label images ("masks", the default), boxes around their parts ("boxes"), or a json by name or path."""
    base = listing.existing(arguments[0])
    missing: list[str] = []
    records = layouts.load(f"mfnet:{base}" + ("" if split == "all" else f":{split}"), missing.extend)
    labels = listing.child(base, "labels", "label") or base / "labels"
    found = _masked(base, records, lambda record: labels / f"{record.id}.png", split, wanted)
    return replace(found, known={"frames": _MFNET.get(split, 0)}, warnings=(*_lost(missing), *found.warnings))


def msrs(arguments: Sequence[str], split: str, wanted: str) -> Found:
    """MSRS: Segmentation_labels ("masks", the default), boxes of their parts ("boxes"), YOLO text ("yolo"), a json."""
    base = listing.existing(arguments[0])
    missing: list[str] = []
    records = _of_split(layouts.load(f"msrs:{base}", missing.extend), {split}, split, base)
    known = {"frames": {"train": 1083, "test": 361, "all": 1444}.get(split, 0)}
    if wanted == "yolo":
        names = ("labels", "detection", "detection_labels", "boxes")
        folders = {part: listing.child(base / part, *names) for part in {r.meta["split"] for r in records}}
        marked = [_yolo(folders[record.meta["split"]], record) for record in records]
        looked = " or ".join(f"{base}/{split}/{name}/#####D.txt" for name in names)
        records, read, left = _annotated(records, marked, looked)
        found = Found(wanted, split, records, read, rules=_things(), box_source="", warnings=left)
    else:
        where = lambda r: base / r.meta["split"] / "Segmentation_labels" / f"{r.id}.png"
        found = _masked(base, records, where, split, wanted)
    return replace(found, known=known, warnings=(*_lost(missing), *found.warnings))


def llvip(arguments: Sequence[str], split: str, wanted: str) -> Found:
    """LLVIP: Annotations/######.xml, one box for both images."""
    known = {"frames": {"train": 12025, "test": 3463, "all": 15488}.get(split, 0)}
    base = listing.existing(arguments[0])
    missing: list[str] = []
    records = _of_split(layouts.load(f"llvip:{base}", missing.extend), {split}, split, base)
    found = _xml_folder(base, "Annotations", records, split, {"person": "train"})
    return replace(found, sequences=True, known=known, warnings=(*_lost(missing), *found.warnings))


def m3fd(arguments: Sequence[str], split: str, wanted: str) -> Found:
    """M3FD: Annotation/#####.xml; a split is a list SPLIT.txt of names, in the root or in meta/ (none is official)."""
    base = listing.existing(arguments[0])
    missing: list[str] = []
    records = layouts.load(f"m3fd:{base}", missing.extend)
    base = listing.child(base, "M3FD_Detection") or base
    known: dict[str, Any] = {"frames": 4200} if split == "all" else {}
    if split != "all":
        folder = next((at for at in (base, base / "meta") if (at / f"{split}.txt").is_file()), None)
        if folder is None:
            raise AnnotationError(f"M3FD has no official split, and {base} holds no {split}.txt nor meta/{split}.txt; "
                                  "write one, a scene to one side (frames come from videos), or use all.")  # fmt: skip
        names = {Path(line).stem for line in listing.entries(f"{split}.txt", folder)}
        records = [record for record in records if record.id in names]
    found = _xml_folder(base, "Annotation", records, split, dict.fromkeys(_M3FD, "train"))
    return replace(found, known=known, warnings=(*_lost(missing), *found.warnings))


def hituav(arguments: Sequence[str], split: str, wanted: str) -> Found:
    """HIT-UAV: [normal_json/]annotations/SPLIT.json with SPLIT/ or images/SPLIT/; DontCare is a region to ignore."""
    base = listing.existing(arguments[0])
    base = listing.child(base, "normal_json") or base
    path, folder = base / "annotations" / f"{split}.json", base / "images" / split
    if not path.is_file():
        raise AnnotationError(f"no boxes of HIT-UAV for the split {split}; looked for {path}.")
    found = coco([str(folder if folder.is_dir() else base / split), str(path)], split, "")
    frames, labels = _HIT_UAV.get(split, (0, {}))
    rules = {**dict.fromkeys(("Person", "Car", "Bicycle", "OtherVehicle"), "train"), "DontCare": "ignore"}
    records = [replace(r, time=r.time or {"0_": "day", "1_": "night"}.get(r.id[:2], "")) for r in found.records]
    known = {"frames": frames, "labels": labels}
    return replace(found, annotation_set="json", records=records, rules=rules, box_source="infrared", known=known)


def coco(arguments: Sequence[str], split: str, wanted: str) -> Found:
    """IMAGES:JSON for one modality, VISIBLE:INFRARED:JSON for pairs; {split} in a part stands for the split's name."""
    *folders, name = [part.replace("{split}", split) for part in arguments]
    read = files.coco(Path(name))
    missing: list[str] = []
    if len(folders) == 1:
        records, missing = _single(read.images, listing.existing(folders[0]), "coco")
    else:
        by_name = {record.id: record for record in layouts.load(f"folder:{folders[0]}:{folders[1]}", missing.extend)}
        stems = [listing.bare(Path(image.name).stem) for image in read.images]
        extra = {stem: (image.group, image.time) for stem, image in zip(stems, read.images, strict=True)}
        records = [_told(by_name[stem], *extra[stem]) for stem in stems if stem in by_name]
        missing += [f"{stem} (no pair)" for stem in stems if stem not in by_name]
    rules = {label: "ignore" if label.lower() in files.REGIONS else "train" for label in read.labels}
    marks, ids = _by_name([read], records)
    records, marked, left = _annotated(records, marks, name)
    told = bool(records) and all(image.group for image in read.images)
    return Found(Path(arguments[-1]).name, split, records, marked, rules=rules, box_source="", sequences=told,
                 ids=ids, warnings=(*_lost(missing), *left))  # fmt: skip


SETS: dict[str, tuple[Callable[[Sequence[str], str, str], Found], str]] = {
    "kaist": (kaist, "kaist:ROOT[:LIST]"),
    "flir": (flir, "flir:ROOT"),
    "mfnet": (mfnet, "mfnet:ROOT"),
    "llvip": (llvip, "llvip:ROOT"),
    "m3fd": (m3fd, "m3fd:ROOT"),
    "msrs": (msrs, "msrs:ROOT"),
    "hituav": (hituav, "hituav:ROOT"),
    "coco": (coco, "coco:IMAGES[:INFRARED]:JSON"),
}
"""Layout -> its function and how its specification is written."""


def _masked(
    base: Path, records: list[PairRecord], where: Callable[[PairRecord], Path], split: str, wanted: str
) -> Found:
    """Label images as they are, boxes around their parts, or the boxes of a json for the same frames."""
    if wanted not in ("", "masks", "boxes"):
        marks, ids = _by_name(map(files.coco, _jsons(base, wanted)), records)
        records, read, left = _annotated(records, marks, wanted)
        return Found(wanted, split, records, read, rules=_things(), box_source="", warnings=left, ids=ids)
    there = [record for record in records if where(record).is_file()]
    if not there:
        raise AnnotationError(
            f"no label images for {len(records)} frames; looked for {where(records[0])} and the like."
        )
    masks = [where(record) for record in there]
    lost = [record.id for record in records if not where(record).is_file()]
    left = (f"{len(lost)} images without label image are left out: {first(lost)}",) if lost else ()
    if wanted != "boxes":
        return Found("masks", split, there, masks=masks, box_source="both", warnings=left)
    marked = [files.mask_marks(files.read_mask(path), _MFNET_THINGS) for path in masks]
    return Found("boxes of masks", split, there, marked, rules=_things(), box_source="both", warnings=left)


def _things() -> dict[str, str]:
    return dict.fromkeys(_MFNET_THINGS.values(), "train")


def _xml_folder(base: Path, name: str, records: list[PairRecord], split: str, rules: Mapping[str, str]) -> Found:
    folder = listing.child(base, name) or base / name
    paths = [folder / f"{record.id}.xml" for record in records]
    looked = f"{folder}/{records[0].id if records else '*'}.xml and the like"
    records, marked, left = _annotated(records, [_parsed(p if p.is_file() else None) for p in paths], looked)
    return Found("xml", split, records, marked, rules=rules, box_source="both", warnings=left)


def _parsed(path: Path | None) -> Marked | None:
    if path is None:
        return None
    return files.voc(path) if path.suffix == ".xml" else files.bbgt(path)


def _yolo(folder: Path | None, record: PairRecord) -> Marked | None:
    path = folder / f"{record.id}.txt" if folder else None
    if path is None or not path.is_file():
        return None
    return files.yolo(path, tuple(_MFNET_THINGS.values()), files.image_size(record.ir))


def _jsons(base: Path, wanted: str) -> list[Path]:
    """The json files that an annotation set names: a file, a folder of them, or NAME_*.json in annotations/."""
    for at in (Path(wanted), base / wanted):
        if at.is_file():
            return [at]
        if at.is_dir():
            return [path for path in sorted(at.glob("*.json*")) if not path.name.startswith("fixture")]
    found = sorted((base / "annotations").glob(f"{wanted}_*.json*")) if re.fullmatch(r"[\w.-]+", wanted) else []
    if not found:
        raise AnnotationError(f'no annotation set "{wanted}" in {base}; looked for the file or folder {wanted}, and '
                              f"for annotations/{wanted}_*.json.")  # fmt: skip
    return found


def _by_name(boxes: Iterable[files.Coco], records: Sequence[PairRecord]) -> tuple[list[Marked | None], Ids]:
    """The marks of each record in json files that name images, whatever folder, ending or modality the name has."""
    boxes = list(boxes)
    found = {key(image.name): image for one in boxes for image in one.images}
    images = [found.get(key(record.id)) for record in records]
    ids = Ids()
    if len(boxes) == 1:
        ids = Ids({record.id: image.id for record, image in zip(records, images, strict=True) if image},
                  dict(zip(boxes[0].labels, boxes[0].categories, strict=True)))  # fmt: skip
    return [image.marked if image else None for image in images], ids


def key(name: str) -> str:
    """What names an image whatever its folder, ending and modality.

    Example:
        >>> key("set06/V000/lwir/I00019.jpg"), key("images/street_ir.png")
        ('set06/V000/I00019', 'street')
    """
    frame = kaist_annotations.FRAME.search(name)
    return "/".join(frame.groups()) if frame else listing.bare(Path(name).stem if "." in name else Path(name).name)


def _single(images: Sequence[files.CocoImage], folder: Path, layout: str) -> tuple[list[PairRecord], list[str]]:
    """Records of one modality for the images of a json, and the names without file."""
    present = {**listing.images(folder / "data"), **listing.images(folder)}
    records, missing = [], []
    for image in images:
        stem = listing.bare(Path(image.name).stem)
        path = present.get(stem) or present.get(Path(image.name).stem)
        if path is None:
            missing.append(f"{image.name} (no image)")
            continue
        video = re.match(r"(video-.+?)-frame-\d+", stem)
        group = video[1] if video else listing.block(stem)
        records.append(_told(PairRecord(stem, group, path, path, "", {"layout": layout}), image.group, image.time))
    if not records:
        raise AnnotationError(
            f"none of the {len(images)} images of the json lies in {folder}; looked for {first(missing)}."
        )
    return records, missing


def _told(record: PairRecord, group: str, time: str) -> PairRecord:
    return replace(record, group=group or record.group, time=time if time in ("day", "night") else record.time)


def _of_split(records: list[PairRecord], parts: set[str], split: str, base: Path) -> list[PairRecord]:
    kept = [record for record in records if split == "all" or record.meta.get("split") in parts]
    if not kept:
        known = sorted({str(record.meta.get("split")) for record in records})
        raise AnnotationError(f'no split "{split}" in {base}.{nearest(split, known)} Known: {", ".join(known)}, all.')
    return kept


def _annotated(
    records: list[PairRecord], marked: Sequence[Marked | None], looked: str | Path
) -> tuple[list[PairRecord], list[Marked], tuple[str, ...]]:
    """Records with marks (no marks is fine), the marks, and a word about records that have no annotation at all."""
    kept = [(record, one) for record, one in zip(records, marked, strict=True) if one is not None]
    if not kept:
        raise AnnotationError(f"none of the {len(records)} images is annotated; looked for {looked}.")
    lost = [record.id for record, one in zip(records, marked, strict=True) if one is None]
    told = (f"{len(lost)} images without annotation are left out: {first(lost)}",) if lost else ()
    return [record for record, _ in kept], [one for _, one in kept], told


def _lost(missing: Sequence[str]) -> tuple[str, ...]:
    return (f"{len(missing)} listed images are not there and left out: {first(missing)}",) if missing else ()
