"""Whole small files of every kind that a user hands in, ways to damage them, and the readers they are handed to.

`python mutations.py FOLDER SEED FIRST COUNT` reads so many damaged files and prints a JSON line before and after each,
so that whoever started it knows which one a crash belongs to. A file is a function of (seed, number) alone.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import re
import resource
import struct
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Rng = np.random.Generator
ROOM = 512 * 2**20
"""Bytes that reading one file may add to the process."""
SECONDS = 2.0
"""Processor time that reading one file may take; not wall time, which depends on who else is computing."""


# Whole files ----------------------------------------------------------------------------------------------------


def image(kind: str, pixels: np.ndarray, **options: Any) -> bytes:
    """An image file's bytes, written by Pillow."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def deep_tiff(**options: Any) -> bytes:
    """A TIFF of three 16-bit channels, which takes another road through the reader."""
    import tifffile

    out = io.BytesIO()
    tifffile.imwrite(out, ramp(3, np.uint16), photometric="rgb", **options)
    return out.getvalue()


def ramp(channels: int = 1, kind: type = np.uint8) -> np.ndarray:
    """A ramp (24, 32) or (24, 32, channels) over the whole range of a whole-number kind."""
    top = np.iinfo(kind).max
    plane = np.linspace(0, top, 24 * 32).reshape(24, 32).astype(kind)
    return plane if channels == 1 else np.stack([np.roll(plane, 5 * c, 1) for c in range(channels)], -1)


def coco(names: tuple[str, ...], key: str, kaist: bool = False) -> dict[str, Any]:
    """A COCO tree of two boxes an image."""
    images = [{"id": k, key: name, "width": 640, "height": 512} for k, name in enumerate(names)]
    boxes = [{"id": 2 * k + j, "image_id": k, "category_id": 1 + (j and not kaist), "bbox": [10.5, 20, 30 + j, 60],
              "iscrowd": 0, "ignore": j, "occlusion": 1} for k in range(len(names)) for j in (0, 1)]  # fmt: skip
    return {"images": images, "annotations": boxes,
            "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "car"}]}  # fmt: skip


COCO = coco(("a.png", "b.png"), "file_name")
KAIST = coco(("set06/V000/I00019", "set07/V000/I00039"), "im_name", kaist=True)
RESULTS = [{"image_id": 0, "category_id": 1, "bbox": [1, 2, 3.5, 4], "score": 0.5},
           {"image_id": 1, "category_id": 2, "bbox": [5, 6, 7, 8], "score": 1e-3}]  # fmt: skip
VOC = """<?xml version="1.0" encoding="UTF-8"?>
<annotation><size><width>640</width><height>512</height><depth>3</depth></size>
<object><name>person</name><difficult>0</difficult><occlusion>1</occlusion>
<bndbox><xmin>10</xmin><ymin>20</ymin><xmax>30.5</xmax><ymax>80</ymax></bndbox></object>
<object><name>car</name><bndbox><x>1</x><y>2</y><w>30</w><h>40</h></bndbox></object></annotation>
"""


def tensors(suffix: str) -> bytes:
    """Weights of two layers, one of half precision."""
    import torch
    from safetensors.torch import save

    state = {"first.weight": torch.linspace(-1, 1, 12).reshape(3, 4), "last.bias": torch.ones(3).half(),
             "steps": torch.tensor(7)}  # fmt: skip
    if suffix == ".safetensors":
        return bytes(save(state))
    out = io.BytesIO()
    torch.save({"version": 1, "step": 3, "module": state, "ema": {}} if suffix == ".pt" else state, out)
    return out.getvalue()


def settings(name: str) -> bytes:
    """The settings of a run as YAML."""
    from freqkd_train import config, downstream

    return config.text({"config": config.Config, "downstream": downstream.Downstream}[name]()).encode()


WHOLE: dict[str, Callable[[], bytes]] = {
    "grey.png": lambda: image("PNG", ramp()),
    "colour.png": lambda: image("PNG", ramp(3)),
    "four.png": lambda: image("PNG", ramp(4)),
    "counts.png": lambda: image("PNG", ramp(kind=np.uint16)),
    "mask.png": lambda: image("PNG", ramp() // 30),
    "counts.tif": lambda: image("TIFF", ramp(kind=np.uint16)),
    "packed.tif": lambda: image("TIFF", ramp(3), compression="tiff_lzw"),
    "deep.tif": deep_tiff,
    "deep_tiled.tif": lambda: deep_tiff(tile=(16, 16), compression="zlib"),
    "colour.jpg": lambda: image("JPEG", ramp(3)),
    "grey.jpg": lambda: image("JPEG", ramp(), progressive=True),
    "colour.bmp": lambda: image("BMP", ramp(3)),
    "coco.json": lambda: json.dumps(COCO).encode(),
    "coco.json.gz": lambda: gzip.compress(json.dumps(COCO).encode(), mtime=0),
    "kaist.json": lambda: json.dumps(KAIST).encode(),
    "results.json": lambda: json.dumps(RESULTS).encode(),
    "results.txt": lambda: b"1,10,20,30.5,60,0.9\n2,1,2,3,4,0.25\n",
    "bbgt.txt": lambda: b"% bbGt version=3\nperson 4 5 20 50 1 0 0 0 0 0 0\npeople 1 2 3 4 0 0 0 0 0 1 0\n",
    "yolo.txt": lambda: b"0 0.5 0.5 0.25 0.125\n1 0.1 0.2 0.1 0.1\n",
    "table.csv": lambda: b"frame,label,x,y,w,h,occlusion\na,person,1,2,3,4,0\nb,car,5,6,7,8,2\n",
    "voc.xml": lambda: VOC.encode(),
    "weights.safetensors": lambda: tensors(".safetensors"),
    "weights.pth": lambda: tensors(".pth"),
    "step-00000003.pt": lambda: tensors(".pt"),
    "digest.json": lambda: b"",  # stands for a whole checkpoint whose note of size and digest is damaged
    "config.yaml": lambda: settings("config"),
    "downstream.yaml": lambda: settings("downstream"),
}  # fmt: skip
"""File name -> the bytes of a whole file; the name decides which readers it meets."""


# Damage ---------------------------------------------------------------------------------------------------------

BAD_NUMBERS = (b"-1", b"0", b"1e400", b"NaN", b"-Infinity", b"1" * 400, b"9" * 5000, b"\xc2\xb2", b"2147483648", b'""',
               b"18446744073709551615", b"null", b"[]", b"{}", b"1e308", b"99999999")  # fmt: skip
BAD_VALUES = (None, [], {}, "", "a\nb", -1, 0, 10**30, 10**400, 1.5, True, float("nan"), float("inf"), [[]], {"id": 1})
BAD_BYTES = (b"\xff", b"\x00", b"\x7f\xff", b"\xff\xff\xff\xff", b"\x00\x00\x00\x7f", b"\x7f\xff\xff\xff",
             b"\xff" * 8, b"\x00\x00\xe8\x03\x00\x00\x00\x00")  # fmt: skip


def flipped(content: bytes, rng: Rng) -> bytes:
    """One to eight bits turned over."""
    out = bytearray(content)
    for place in rng.integers(0, 8 * len(out), rng.integers(1, 9)):
        out[place // 8] ^= 1 << (place % 8)
    return bytes(out)


def cut(content: bytes, rng: Rng) -> bytes:
    """The beginning alone, often of length 0 or only a little short."""
    return content[: rng.choice([0, rng.integers(0, len(content)), len(content) - 1 - rng.integers(0, 8)])]


def blown(content: bytes, rng: Rng) -> bytes:
    """A field near the beginning, where headers are, or near the end (TIFF, zip) made very large or none."""
    out, put = bytearray(content), BAD_BYTES[rng.integers(len(BAD_BYTES))]
    place = int(rng.integers(0, min(len(out), 160)))
    place = place if rng.random() < 0.7 else max(0, len(out) - len(put) - place)
    out[place : place + len(put)] = put
    return bytes(out)


def spliced(content: bytes, rng: Rng) -> bytes:
    """The beginning of one file with the end of another."""
    other = WHOLE[list(WHOLE)[rng.integers(len(WHOLE) - 3)]]() or b"{}"
    return content[: rng.integers(0, len(content))] + other[rng.integers(0, len(other)) :]


def repeated(content: bytes, rng: Rng) -> bytes:
    """A piece of the file many times over."""
    start, length, times = rng.integers(0, len(content)), rng.integers(1, 40), rng.integers(2, 2000)
    return content[:start] + content[start : start + length] * int(times) + content[start:]


def renumbered(content: bytes, rng: Rng) -> bytes:
    """One number of a text replaced by one that is strange."""
    found = list(re.finditer(rb"\d+(\.\d+)?", content))
    if not found:
        return flipped(content, rng)
    one = found[rng.integers(len(found))]
    return content[: one.start()] + BAD_NUMBERS[rng.integers(len(BAD_NUMBERS))] + content[one.end() :]


def revalued(content: bytes, rng: Rng) -> bytes:
    """One value of a JSON tree replaced or removed, whatever its place."""
    tree = json.loads(content)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(tree)
    node, key = places[rng.integers(len(places))]
    if rng.random() < 0.2:
        del node[key]
    else:
        node[key] = BAD_VALUES[rng.integers(len(BAD_VALUES))]
    return json.dumps(tree).encode()


DAMAGES = (flipped, cut, blown, spliced, repeated)


def resealed(content: bytes) -> bytes:
    """A PNG with the checksums of its chunks made right again: damage that the checksums would have caught."""
    out, place = bytearray(content), 8
    while place + 12 <= len(out):
        length = struct.unpack_from(">I", out, place)[0]
        if place + 12 + length > len(out):
            break
        struct.pack_into(">I", out, place + 8 + length, zlib.crc32(out[place + 4 : place + 8 + length]))
        place += 12 + length
    return bytes(out)


def damaged(seed: int, number: int) -> tuple[str, str, bytes]:
    """The name of a file, what was done to it, and its content. The kinds take turns."""
    rng = np.random.default_rng([seed, number])
    name = list(WHOLE)[number % len(WHOLE)]
    if name == "digest.json":
        whole = tensors(".pt")
        content = json.dumps({"sha256": hashlib.sha256(whole).hexdigest(), "size": len(whole)}).encode()
    else:
        content = WHOLE[name]()
    packed = name.endswith(".gz") and rng.random() < 0.7
    content = gzip.decompress(content) if packed else content
    ways: list[Callable[[bytes, Rng], bytes]] = list(DAMAGES)
    if packed or name.endswith((".json", ".txt", ".csv", ".xml", ".yaml")):
        ways += [renumbered] * 3
    if packed or name.endswith(".json"):
        ways += [revalued] * 3
    way = ways[rng.integers(len(ways))]
    content = way(content, rng)
    if name.endswith(".png") and rng.random() < 0.7:
        content = resealed(content)
    return name, way.__name__, gzip.compress(content, mtime=0) if packed else content


# Readers --------------------------------------------------------------------------------------------------------


def put(folder: Path, name: str, content: bytes) -> Path:
    """Write a damaged file where its readers expect it; a checkpoint gets a digest that says it is whole."""
    path = folder / name
    if name == "digest.json":
        path = folder / "step-00000009.pt"
        path.write_bytes(tensors(".pt"))
        path.with_suffix(".json").write_bytes(content)
        return path
    path.write_bytes(content)
    if path.suffix == ".pt":
        note = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        path.with_suffix(".json").write_text(json.dumps(note))
    return path


def readers(name: str, folder: Path) -> list[Callable[[Path], Any]]:
    """Everything that a file of this name may be handed to."""
    from freqkd_analysis import models
    from freqkd_analysis.data import decode
    from freqkd_train import annotation_files, checkpoint, config, downstream, result_files

    def known(tree: dict[str, Any]) -> result_files.Annotations:
        (folder / "known.json").write_text(json.dumps(tree))
        return result_files.read_annotations(folder / "known.json")

    if name.endswith((".png", ".tif", ".jpg", ".bmp")):
        return [decode.read_rgb, lambda p: decode.read_ir(p, "image"), lambda p: decode.read_ir(p, "range:0:65535"),
                decode.read_rgbt, lambda p: decode.dataset_range([p]), annotation_files.read_mask,
                annotation_files.image_size]  # fmt: skip
    if name.startswith("results"):
        tree = COCO if name.endswith(".json") else KAIST
        return [lambda p: result_files.read_results(p, known(tree))]
    if name.endswith((".json", ".json.gz")) and name != "digest.json":
        return [annotation_files.coco, result_files.read_annotations]
    by_name: dict[str, Callable[[Path], Any]] = {
        "bbgt.txt": annotation_files.bbgt, "voc.xml": annotation_files.voc, "table.csv": annotation_files.table,
        "yolo.txt": lambda p: annotation_files.yolo(p, ("person", "car"), (640, 512)),
        "config.yaml": config.read, "downstream.yaml": downstream.read,
        "step-00000003.pt": checkpoint.load, "digest.json": checkpoint.load,
        "weights.safetensors": models.read_weights, "weights.pth": models.read_weights,
    }  # fmt: skip
    return [by_name[name]]


def memory(what: str) -> int:
    """Bytes that this process holds now (`VmRSS`) or held at most since `forget_peak` (`VmHWM`)."""
    told = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert told, "the kernel tells no memory of processes"
    return int(told[1]) * 1024


def forget_peak() -> None:
    """Let the peak of memory count from here. A container may forbid it: then it counts from the start."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def verdict(path: Path, read: Callable[[Path], Any]) -> tuple[str, str]:
    """Hand a file to a reader: what came (`read` or `refused`), and what was wrong with that, or nothing."""
    from freqkd_analysis.errors import FreqkdError

    forget_peak()
    before, start, came, wrong = memory("VmRSS"), time.process_time(), "read", []
    try:
        read(path)
    except FreqkdError as error:
        came, line = "refused", str(error)
        if path.name not in line:
            wrong.append(f"the message does not name the file: {line[:200]}")
        if len(line.splitlines()) > 1 or len(line) > 1000:
            wrong.append(f"the message is not one short line: {line[:200]!r} ({len(line)} characters)")
    except BaseException as error:
        came = "fell"
        wrong.append(f"{type(error).__name__}: {str(error)[:200]}")
    if (took := time.process_time() - start) > SECONDS:
        wrong.append(f"took {took:.1f} s, at most {SECONDS} allowed")
    if (more := memory("VmHWM") - before) > ROOM:
        wrong.append(f"took {more / 2**20:.0f} MiB, at most {ROOM / 2**20:.0f} allowed")
    return came, "; ".join(wrong)


def main(folder: Path, seed: int, first: int, count: int) -> None:
    """Read `count` damaged files, talking as it goes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name in WHOLE:  # libraries are loaded before anything is measured
        path = put(folder, name, WHOLE[name]() or b"{}")
        for read in readers(name, folder):
            verdict(path, read)
    for number in range(first, first + count):
        name, way, content = damaged(seed, number)
        print(json.dumps({"number": number, "name": name, "way": way}), flush=True)
        path = put(folder, name, content)
        came, wrong = [], []
        for place, read in enumerate(readers(name, folder)):
            one, fault = verdict(path, read)
            came.append(one)
            wrong += [f"reader {place}: {fault}"] if fault else []
        print(json.dumps({"number": number, "came": came, "wrong": wrong}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
