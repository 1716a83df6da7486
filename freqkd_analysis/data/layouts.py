"""Data sets on disk to pair records: one function a layout, all in `LAYOUTS`; and records to pixels (`decode`).

A layout function looks at names and lists only, and returns a candidate for every pair that a folder or list
promises, in the order of the list or sorted. `scan` then tells candidates with both files from those without.

Groups are sequences where names tell them. Where they tell frame numbers only (folder, csv, MFNet, MSRS, M3FD),
a group is a block of 20 consecutive numbers: neighbours may be one scene, and a group too large only widens an
interval, while one too small makes it falsely narrow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from freqkd_analysis.data import decode as files
from freqkd_analysis.data import listing
from freqkd_analysis.data.records import PairedSample, PairRecord
from freqkd_analysis.errors import DataError, first, nearest

_GAP, _SPAN = 40, 200
"""FLIR v1 frame numbers: a run ends at a gap above 40, or after 200 numbers (the whole set has few gaps)."""

_KAIST = re.compile(r"(set\d\d)[/_](V\d{3})[/_](?:(?:visible|lwir)[/_])?(I\d{5})")
_FLIR = re.compile(r"FLIR_(video_)?(\d{5})")
_FLIR_V2 = re.compile(r"video-(.+?)-frame-(\d+)")


def folder(visible: str, infrared: str) -> list[PairRecord]:
    """Two folders whose files match by name without suffix (`a.jpg` and `a.png`, `a_RGB.jpg` and `a_IR.png`)."""
    left, right = listing.existing(visible), listing.existing(infrared)
    if left.resolve() == right.resolve():
        raise DataError(f"expected two folders, got {left} for both modalities; name the infrared one second.")
    return _match(left, right, lambda stem: (listing.block(stem), ""))


def csv(names: str) -> list[PairRecord]:
    """A list with columns rgb, ir and maybe id, group, time; paths relative to the list, further columns to meta."""
    path = Path(names)
    records = []
    for number, row in enumerate(listing.rows(path, ("rgb", "ir")), start=2):
        rgb, ir = row.pop("rgb"), row.pop("ir")
        if not rgb or not ir:
            raise DataError(f"{path}, line {number}: expected a file name in rgb and ir, got an empty one; fill it in.")
        name = row.pop("id", "") or listing.bare(Path(rgb).stem)
        group, time = row.pop("group", "") or listing.block(name), row.pop("time", "")
        records.append(PairRecord(name, group, path.parent / rgb, path.parent / ir, time, row))
    return records


def kit(root: str) -> list[PairRecord]:
    """visible/NAME, infrared/NAME and manifest.csv (name, maybe group, time; est_shift_* become numbers in meta)."""
    base = listing.existing(root)
    rows = listing.rows(base / "manifest.csv", ("name",))
    folders = [listing.existing(base / kind) for kind in ("visible", "infrared")]
    present = [(folder, listing.images(folder)) for folder in folders]
    records = []
    for row in rows:
        name, group, time = row.pop("name"), row.pop("group", ""), row.pop("time", "")
        meta = {key: listing.number(value) if key.startswith("est_shift") else value for key, value in row.items()}
        rgb, ir = (got.get(name) or got.get(listing.bare(name)) or folder / name for folder, got in present)
        records.append(PairRecord(name, group or listing.block(name), rgb, ir, time, meta))
    return records


def kaist(root: str, names: str = "") -> list[PairRecord]:
    """[images/]setXX/VXXX/{visible,lwir}/I#####; all frames, or those of a list in imageSets/. Group = video."""
    base = listing.existing(root)
    images = listing.child(base, "images") or base
    videos = sorted(path for path in images.glob("set[0-9][0-9]/V[0-9][0-9][0-9]") if path.is_dir())
    if not videos:
        raise DataError(f"no setXX/VXXX folders in {images}; expected the KAIST layout with visible/ and lwir/.")
    found = {}
    for video in videos:
        name = f"{video.parent.name}/{video.name}"
        time = "day" if int(video.parent.name[3:]) % 6 < 3 else "night"  # sets 00-02 and 06-08 are day
        for record in _match(video / "visible", video / "lwir", lambda _, g=name, t=time: (g, t)):  # type: ignore[misc]
            found[f"{name}/{record.id}"] = replace(record, id=f"{name}/{record.id}")
    if not names:
        return list(found.values())
    wanted = ["/".join(_matched(_KAIST, line, names).groups()) for line in listing.entries(names, base / "imageSets")]
    return [found.get(name) or _absent(name, images, Path(name).parent.as_posix()) for name in wanted]


def flir(root: str) -> list[PairRecord]:
    """FLIR ADAS: v1 aligned (align/ or visible/ + infrared/), v1 as released, or the video pairs of v2."""
    base = listing.existing(root)
    name = "rgb_to_thermal_vid_map.json"
    mapping = next(iter(sorted([*base.glob(name), *base.glob(f"*/{name}")])), None)
    if mapping:
        return _flir_video(mapping)
    if listing.child(base, "images_thermal_train") or listing.child(base, "images_rgb_train"):
        raise DataError(
            f"{base} holds stills of FLIR v2, which are independent samples of two cameras and no pairs; only its "
            "videos pair up: add video_rgb_test, video_thermal_test and rgb_to_thermal_vid_map.json."
        )
    aligned = listing.child(base, "align") or base
    if listing.child(aligned, "JPEGImages"):
        return _flir_grouped(_flir_aligned(aligned))
    if listing.child(base, "visible") and listing.child(base, "infrared"):
        return _flir_grouped(_splits(base, "visible/{}", "infrared/{}", ("train", "val", "test")))
    release = listing.child(base, "FLIR_ADAS_1_3") or base
    parts = ("train", "training", "val", "validation", "video")
    for thermal in ("thermal_8_bit", "PreviewData"):
        if any((release / part / thermal).is_dir() for part in parts):
            return _flir_grouped(_splits(release, "{}/RGB", "{}/" + thermal, parts))
    raise DataError(
        f"no FLIR layout in {base}; expected align/JPEGImages, visible/ and infrared/, train/RGB and "
        "train/thermal_8_bit, or rgb_to_thermal_vid_map.json with the videos of v2."
    )


def mfnet(root: str, names: str = "") -> list[PairRecord]:
    """images/00001D.png of four channels, or RGB/ and Thermal/, whichever holds more; D = day, N = night."""
    base = listing.existing(root)
    packed = [
        PairRecord(stem, listing.block(stem), path, path, listing.light(stem), {"packed": True})
        for stem, path in listing.images(listing.child(base, "images") or base).items()
        if path.suffix.lower() == ".png"
    ]
    rgb, thermal = listing.child(base, "RGB"), listing.child(base, "Thermal")
    split = _match(rgb, thermal, lambda stem: (listing.block(stem), listing.light(stem))) if rgb and thermal else []
    # Flipped copies are training augmentation, not further pairs.
    found = {record.id: record for record in max(packed, split, key=len) if not record.id.endswith("_flip")}
    if not found:
        raise DataError(f"no MFNet images in {base}; expected images/*.png of four channels, or RGB/ and Thermal/.")
    if not names:
        return list(found.values())
    wanted = [name for name in listing.entries(names, base) if not name.endswith("_flip")]
    return [found.get(name) or _absent(name, base, listing.block(name)) for name in wanted]


def llvip(root: str) -> list[PairRecord]:
    """visible/{train,test} and infrared/{train,test}; group = camera scene, the first two digits of a name."""
    base = listing.existing(root)
    return _splits(base, "visible/{}", "infrared/{}", ("train", "test"), lambda stem: (f"scene_{stem[:2]}", ""))


def m3fd(root: str) -> list[PairRecord]:
    """M3FD_Detection/{Vis,Ir} or {vi,ir}. No sequence is published: blocks of 20 numbers."""
    base = listing.existing(root)
    base = listing.child(base, "M3FD_Detection") or base
    visible, infrared = listing.child(base, "Vis", "vi", "visible"), listing.child(base, "Ir", "infrared")
    if not visible or not infrared:
        raise DataError(f"no M3FD layout in {base}; expected the folders Vis and Ir (or vi and ir).")
    return _match(visible, infrared, lambda stem: (listing.block(stem), ""))


def msrs(root: str) -> list[PairRecord]:
    """{train,test}/{vi,ir} with MFNet names: D = day, N = night; blocks of 20 numbers."""
    return _splits(
        listing.existing(root),
        "{}/vi",
        "{}/ir",
        ("train", "test"),
        lambda stem: (listing.block(stem), listing.light(stem)),
    )


def synthetic(*options: str) -> list[PairRecord]:
    """Rendered scenes, no files; the options are those of `freqkd_analysis.data.synthetic.records`."""
    from freqkd_analysis.data import synthetic as scenes

    return list(scenes.records(":".join(options)))


@dataclass(frozen=True)
class Layout:
    """A layout function with its usage, one line about it, and the numbers of pairs published for it."""

    read: Callable[..., list[PairRecord]]
    usage: str
    about: str
    published: Mapping[int, str] = field(default_factory=dict)


LAYOUTS: dict[str, Layout] = {
    "folder": Layout(folder, "folder:VIS:IR", "two folders, matched by file name"),
    "csv": Layout(csv, "csv:FILE", "a list with columns rgb, ir and maybe id, group, time"),
    "kit": Layout(kit, "kit:ROOT", "visible/, infrared/ and manifest.csv with name, group, time"),
    "kaist": Layout(
        kaist, "kaist:ROOT[:LIST]", "KAIST multispectral pedestrian: 95,328 pairs, test-all-20 2,252",
        {95328: "all", 50187: "train-all-01", 45141: "test-all-01", 25086: "train-all-02", 8892: "AR-CNN trainval",
         7601: "sanitized train", 2500: "train-all-20", 2252: "test-all-20"},
    ),
    "flir": Layout(
        flir, "flir:ROOT", "FLIR ADAS: v1 aligned 4,129 + 1,013 pairs, v1 as released 13,815, v2 videos 3,749",
        {5142: "v1 aligned", 4129: "aligned train", 1013: "aligned test", 13815: "v1 with RGB", 3749: "v2 videos"},
    ),
    "mfnet": Layout(
        mfnet, "mfnet:ROOT[:LIST]", "MFNet: 1,569 pairs (820 day, 749 night); train 784, val 392, test 393",
        {1569: "all", 784: "train", 392: "val", 393: "test", 205: "test_day", 188: "test_night"},
    ),
    "llvip": Layout(
        llvip, "llvip:ROOT", "LLVIP: 15,488 pairs (12,025 train, 3,463 test), 26 scenes",
        {15488: "all", 12025: "train", 3463: "test"},
    ),
    "m3fd": Layout(m3fd, "m3fd:ROOT", "M3FD: 4,200 pairs, no official split", {4200: "detection", 300: "fusion"}),
    "msrs": Layout(
        msrs, "msrs:ROOT", "MSRS: 1,444 pairs of MFNet (715 day, 729 night); train 1,083, test 361",
        {1444: "all", 1083: "train", 361: "test"},
    ),
    "synthetic": Layout(synthetic, "synthetic[:OPTIONS]", "rendered scenes, no files needed"),
}  # fmt: skip


def load(spec: str, on_missing: Callable[[list[str]], None] | None = None) -> list[PairRecord]:
    """The pairs of `spec`, such as `kit:/data/pairs`, in the order of its list (sorted where it has none).

    Args:
        on_missing: told the ids without a partner, which are then left out; without it they are an error.
    Raises: DataError for an unknown layout, a missing folder or list, names without partner, or no pair at all.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> for name in ("vis/a.png", "ir/a.png"):
        ...     (root / name).parent.mkdir()
        ...     (root / name).touch()
        >>> [record.id for record in load(f"folder:{root}/vis:{root}/ir")]
        ['a']
    """
    records, missing = scan(spec)
    if missing and (on_missing is None or not records):
        raise DataError(
            f"{spec}: {len(missing)} of {len(missing) + len(records)} pairs lack a file: {first(missing)}. "
            + ("Add the files, or take the names out." if records else "A pair is two files of one name.")
        )
    if on_missing and missing:
        on_missing(missing)
    if not records:
        raise DataError(f"{spec}: expected at least one pair, got 0; expected {LAYOUTS[_name(spec)].usage}.")
    return records


def scan(spec: str) -> tuple[list[PairRecord], list[str]]:
    """The pairs of `spec` with both files, and a phrase for each that lacks one: "a (no infrared)"."""
    name = _name(spec)
    arguments = [part for part in spec.split(":")[1:] if part]
    usage = LAYOUTS[name].usage
    least, most = usage.split("[")[0].count(":"), usage.count(":")
    if len(arguments) < least or (len(arguments) > most and name != "synthetic"):
        what = f"{len(arguments)} part{'s' * (len(arguments) != 1)} after {name}:"
        raise DataError(f'expected {usage}, got "{spec}" ({what}).')
    found = LAYOUTS[name].read(*arguments)
    found = [replace(record, meta={**record.meta, "layout": name}) for record in found]
    seen: set[str] = set()
    twice = sorted({record.id for record in found if record.id in seen or seen.add(record.id)})  # type: ignore[func-returns-value]
    if twice:
        raise DataError(f"{spec}: {len(twice)} ids name more than one pair: {first(twice)}. Make them unique.")
    if name == "synthetic":
        return found, []
    lacks = {record.id: _lacks(record) for record in found}
    missing = [f"{record.id} ({lacks[record.id]})" for record in found if lacks[record.id]]
    return [record for record in found if not lacks[record.id]], missing


def resolve_conversion(records: Iterable[PairRecord], conversion: str = "dataset") -> str:
    """`conversion` for all of `records`, with `dataset` turned into numbers once; pass all records of the set."""
    if conversion != "dataset":
        if conversion not in ("image", files.UNIT):
            files.parse_range(conversion)
        return conversion
    deep = [record for record in records if record.meta.get("layout") != "synthetic" and not record.meta.get("packed")]
    paths = [record.ir for record in deep]
    return files.dataset_range(paths) if paths else files.UNIT


def decode(record: PairRecord, conversion: str = files.UNIT) -> PairedSample:
    """The pixels of one pair; `conversion` as `resolve_conversion` gave it.

    Raises: DataError naming the file that cannot be read, or both sizes when they differ.
    """
    sample = read(record, conversion)
    (height, width), (ir_height, ir_width) = sample.rgb.shape[:2], sample.ir.shape
    if (height, width) != (ir_height, ir_width):
        raise DataError(
            f"pair {record.id} differs in size: visible {width}x{height}, infrared {ir_width}x{ir_height}; "
            "expected registered images of one size."
        )
    return sample


def read(record: PairRecord, conversion: str) -> PairedSample:
    """As `decode`, without the check that both sizes agree."""
    if record.meta.get("layout") == "synthetic":
        from freqkd_analysis.data import synthetic as scenes

        return scenes.render(record)
    if record.meta.get("packed"):
        rgb, grey, ir, info = files.read_rgbt(record.rgb)
    else:
        rgb, grey = files.read_rgb(record.rgb)
        ir, info = files.read_ir(record.ir, conversion)
    told = {"visible_is_grey": grey, "ir_conversion": info["conversion"], "ir_bits": info["bits"]}
    meta = {**record.meta, **told, "ir_false_colour": info["false_colour"], "time": record.time}
    return PairedSample(rgb, ir, record.id, record.group, meta)


def _name(spec: str) -> str:
    name = spec.partition(":")[0]
    if name not in LAYOUTS:
        hint = listing.hint(spec) or nearest(name, LAYOUTS)
        raise DataError(f'no data layout named "{name}".{hint} Known: {", ".join(LAYOUTS)}.')
    return name


def _lacks(record: PairRecord) -> str:
    absent = [name for name, path in (("visible", record.rgb), ("infrared", record.ir)) if not path.is_file()]
    return f"no {' and no '.join(absent)}" if absent else ""


def _match(visible: Path, infrared: Path, place: Callable[[str], tuple[str, str]], **meta: Any) -> list[PairRecord]:
    """A candidate for each name in either folder; `place` gives its group and lighting."""
    left, right = listing.images(visible), listing.images(infrared)
    names = sorted(left.keys() | right.keys())
    pairs = {name: (left.get(name, visible / name), right.get(name, infrared / name)) for name in names}
    return [PairRecord(name, place(name)[0], *pair, place(name)[1], meta) for name, pair in pairs.items()]


def _splits(
    base: Path, visible: str, infrared: str, splits: Iterable[str],
    place: Callable[[str], tuple[str, str]] = lambda stem: (stem, ""),
) -> list[PairRecord]:  # fmt: skip
    folders = {split: (base / visible.format(split), base / infrared.format(split)) for split in splits}
    present = {split: pair for split, pair in folders.items() if pair[0].is_dir() or pair[1].is_dir()}
    if not present:
        expected = " and ".join(path.relative_to(base).as_posix() for path in next(iter(folders.values())))
        raise DataError(f"no image folders in {base}; expected {expected} (splits: {', '.join(folders)}).")
    return [record for split, pair in present.items() for record in _match(*pair, place, split=split)]


def _flir_aligned(base: Path) -> list[PairRecord]:
    """Pairs of the lists, FLIR_xxxxx_RGB beside FLIR_xxxxx_PreviewData in JPEGImages."""
    images = base / "JPEGImages"
    present = {path.stem: path for path in images.iterdir()}
    splits = [split for split in ("train", "validation") if (base / f"align_{split}.txt").is_file()]
    if not splits:
        raise DataError(f"no align_train.txt or align_validation.txt in {base}; expected the lists of this release.")
    records = []
    for split in splits:
        for line in listing.entries(f"align_{split}.txt", base):
            name = _matched(_FLIR, line, f"align_{split}.txt").group()
            rgb, ir = (present.get(f"{name}_{part}", images / f"{name}_{part}") for part in ("RGB", "PreviewData"))
            records.append(PairRecord(name, name, rgb, ir, "", {"split": split}))
    return records


def _flir_grouped(records: list[PairRecord]) -> list[PairRecord]:
    numbers = {record.id: match for record in records if (match := _FLIR.match(record.id))}
    groups, start, previous = {}, -_SPAN, -_SPAN
    for number in sorted({int(match[2]) for match in numbers.values() if not match[1]}):
        if number - previous > _GAP or number - start >= _SPAN:
            start = number
        groups[number], previous = f"FLIR_{start:05d}", number

    def group(record: PairRecord) -> str:
        match = numbers.get(record.id)
        if not match:
            return listing.block(record.id)
        return "FLIR_video" if match[1] else groups[int(match[2])]

    return [replace(record, group=group(record)) for record in records]


def _flir_video(mapping: Path) -> list[PairRecord]:
    try:
        pairs = json.loads(mapping.read_text(encoding="utf-8"))
        names = sorted((Path(thermal).name, Path(rgb).name) for rgb, thermal in pairs.items())
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{mapping} is no map of RGB to thermal names ({type(error).__name__}); fetch it.") from error
    folders = [mapping.parent / f"video_{kind}_test" for kind in ("rgb", "thermal")]
    rgb_folder, thermal_folder = (listing.child(listing.existing(path), "data") or path for path in folders)
    records = []
    for thermal, rgb in names:
        video = _FLIR_V2.match(thermal)
        group = f"video-{video[1]}" if video else listing.block(Path(thermal).stem)
        records.append(PairRecord(Path(thermal).stem, group, rgb_folder / rgb, thermal_folder / thermal))
    return records


def _matched(pattern: re.Pattern[str], line: str, names: str) -> re.Match[str]:
    match = pattern.search(line)
    if not match:
        raise DataError(f'{names}: cannot read the entry "{line[:60]}"; expected a frame name of this data set.')
    return match


def _absent(name: str, folder: Path, group: str) -> PairRecord:
    return PairRecord(name, group, folder / name, folder / name)
