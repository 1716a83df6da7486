"""Damaged files end in a value or in one line that names the file, quickly, in little memory, in a process that lives.

`mutations.py` damages and reads in a child process, so that a crash or a hang is a failure with a number. One number
again: `python tests/mutations.py FOLDER SEED NUMBER 1`.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutations
import numpy as np
import pytest

SEED = 0
PER_RUN, SLOW = 300, 5_000


def read_damaged(folder: Path, root: Path, seed: int, first: int, count: int) -> list[dict[str, Any]]:
    """What came of so many damaged files, a row each. Fails naming the file that the process died of."""
    command = [sys.executable, "-W", "ignore", str(root / "tests" / "mutations.py"), str(folder)]
    child = subprocess.run(
        [*command, str(seed), str(first), str(count)], capture_output=True, text=True, timeout=280,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    rows = [json.loads(line) for line in child.stdout.splitlines()]
    begun = [row for row in rows if "name" in row]
    done = {row["number"]: row for row in rows if "came" in row}
    assert child.returncode == 0 and len(done) == count, (
        f"the process ended with {child.returncode} at {begun[-1:] or 'its start'}: {child.stderr[-800:]}"
    )
    return [row | done[row["number"]] for row in begun]


def faults(rows: list[dict[str, Any]]) -> list[str]:
    return [f"seed {SEED}, number {r['number']}, {r['name']} {r['way']}: {wrong}" for r in rows for wrong in r["wrong"]]


def test_damaged_files_end_well(tmp_path: Path, root: Path) -> None:
    rows = read_damaged(tmp_path, root, SEED, 0, PER_RUN)
    assert faults(rows) == []
    came = Counter(one for row in rows for one in row["came"])
    # Were nothing refused, nothing would be damaged; were all refused, every file would have been stopped at the door.
    assert came["refused"] > 400 and came["read"] > 100, came


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_many_damaged_files_end_well(tmp_path: Path, root: Path, part: int) -> None:
    count = SLOW // 5
    assert faults(read_damaged(tmp_path, root, SEED, PER_RUN + part * count, count)) == []


def test_damage_is_the_same_for_the_same_number() -> None:
    for number in range(len(mutations.WHOLE)):
        assert mutations.damaged(3, number) == mutations.damaged(3, number)
    ways = {mutations.damaged(3, number)[1] for number in range(200)}
    assert ways == {"flipped", "cut", "blown", "spliced", "repeated", "renumbered", "revalued"}


@pytest.mark.parametrize("name", [name for name in mutations.WHOLE if name != "digest.json"])
def test_whole_files_are_read(tmp_path: Path, name: str) -> None:
    """By the first reader of their kind: a reader that refuses everything would pass the tests above."""
    path = mutations.put(tmp_path, name, mutations.WHOLE[name]())
    assert mutations.verdict(path, mutations.readers(name, tmp_path)[0]) == ("read", "")


@pytest.mark.parametrize("fault, says", [
    (lambda path: {}["x"], "KeyError"),
    (lambda path: bytearray(b"x") * (mutations.ROOM + 2**26), "MiB"),
    (lambda path: dawdle(), " s, at most"),
    (lambda path: refuse("no name"), "does not name the file"),
    (lambda path: refuse(f"{path}\nand more"), "not one short line"),
])  # fmt: skip
def test_the_judge_can_fail(
    tmp_path: Path, fault: Callable[[Path], Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mutations, "SECONDS", 0.1)
    assert says in mutations.verdict(tmp_path / "a.png", fault)[1]


def dawdle() -> None:
    """Use more processor time than the test below allows."""
    start = time.process_time()
    while time.process_time() < start + 0.2:
        pass


def refuse(text: str) -> None:
    from freqkd_analysis.errors import DataError

    raise DataError(text)


# Made on purpose ------------------------------------------------------------------------------------------------


def flat_png(width: int, height: int, channels: int = 3, whole: bool = True) -> bytes:
    """A PNG of zeros, packed to a thousandth of what it holds; not whole: it claims the size and holds one row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(bytes(1 + width * channels)) for _ in range(height if whole else 1))
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", body + packer.flush()) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def header_only(entry: dict[str, Any], data: bytes = b"abcd", length: int | None = None) -> bytes:
    """A .safetensors whose header says what it likes."""
    text = json.dumps({"a": entry}).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def saved(state: Any) -> bytes:
    import torch

    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue()


def repeated_value() -> bytes:
    """A state dict of one half-precision number that stands for a thousand million."""
    import torch

    return saved({"a": torch.zeros(1).half().expand(10**9)})


def repacked() -> bytes:
    """4 MB of zeros as weights, in a zip of a few kB: torch stores, a bomb packs."""
    import zipfile

    import torch

    out = io.BytesIO()
    with (zipfile.ZipFile(io.BytesIO(saved({"a": torch.zeros(2**20)}))) as plain,
          zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed):  # fmt: skip
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    return out.getvalue()


def entities() -> bytes:
    """An xml whose one name would be 10**9 characters long."""
    names = b"".join(b'<!ENTITY e%d "%s">' % (k + 1, b"&e%d;" % k * 10) for k in range(8))
    return b'<!DOCTYPE a [<!ENTITY e0 "xxxxxxxxxx">' + names + b"]><a><object><name>&e8;</name></object></a>"


DEEP = b"[" * 100_000
LONG = "9" * 5_000


def changed_coco(**changes: Any) -> bytes:
    return json.dumps(mutations.COCO | changes).encode()


REFUSED: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a picture of 81 million pixels": ("grey.png", lambda: flat_png(9_000, 9_000)),
    "a size that is only claimed": ("grey.png", lambda: flat_png(9_999, 9_999, whole=False)),
    "a size beyond all memory": ("grey.png", lambda: flat_png(60_000, 60_000, whole=False)),
    "json of lists in lists": ("coco.json", lambda: DEEP),
    "results of lists in lists": ("results.json", lambda: DEEP),
    "results with a number without end": ("results.json", lambda: b"[" + LONG.encode() + b"]"),
    "a box beyond float64": ("results.json", lambda: json.dumps(mutations.RESULTS).replace("3.5", "1" * 400).encode()),
    "a side beyond 64 bits": ("coco.json", lambda: json.dumps(mutations.COCO).replace("640", "1e308").encode()),
    "packed blanks": ("coco.json.gz", lambda: gzip.compress(bytes(400 * 2**20), 1)),
    "a category of two lines": ("coco.json", lambda: changed_coco(categories=[{"id": 1, "name": "a\nb"}])),
    "an image id of thousands of letters": (
        "coco.json", lambda: changed_coco(annotations=[{"image_id": LONG, "category_id": 1, "bbox": [1, 2, 3, 4]}])),
    "an image of thousands of letters": ("results.txt", lambda: b"x" * 300_000 + b",1,2,3,4,5\n"),
    "a class in superscript": ("yolo.txt", lambda: "² 0.5 0.5 0.1 0.1".encode()),
    "a class without end": ("yolo.txt", lambda: f"{LONG} 0.5 0.5 0.1 0.1".encode()),
    "xml of no encoding": ("voc.xml", lambda: b'<?xml version="1.0" encoding="foo"?><a/>'),
    "xml of an encoding of many bytes": ("voc.xml", lambda: b'<?xml version="1.0" encoding="utf-7"?><a/>'),
    "xml that multiplies": ("voc.xml", entities),
    "xml of boxes in boxes": ("voc.xml", lambda: b"<a>" * 200_000),
    "a cell without end": ("table.csv", lambda: b"frame,label,x,y,w,h,occlusion\n" + b"a" * 200_000 + b",p,1,2,3,4,0"),
    "a heading without end": ("table.csv", lambda: b"a" * 200_000),
    "a checkpoint that is a list": ("step-00000003.pt", lambda: saved([1, 2])),
    "a digest of infinite size": ("digest.json", lambda: b'{"sha256": "a", "size": Infinity}'),
    "a digest of lists in lists": ("digest.json", lambda: DEEP),
    "one number a thousand million times": ("weights.pth", repeated_value),
    "weights that are packed": ("weights.pth", repacked),
    "a header without end": ("weights.safetensors", lambda: header_only({}, length=2**62)),
    "a shape beyond the file": (
        "weights.safetensors", lambda: header_only({"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]})),
    "numbers of 4 bits": (
        "weights.safetensors", lambda: header_only({"dtype": "F4", "shape": [8], "data_offsets": [0, 4]})),
    "settings of lists in lists": ("config.yaml", lambda: DEEP),
    "a day that is in no calendar": ("config.yaml", lambda: b"seed: 2024-99-99"),
    "a number of no digits": ("config.yaml", lambda: b"seed: 0x_"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_files_made_to_hurt_are_refused(tmp_path: Path, case: str) -> None:
    name, make = REFUSED[case]
    path = mutations.put(tmp_path, name, make())
    came = [mutations.verdict(path, read) for read in mutations.readers(name, tmp_path)]
    # The last reader of an image looks at its header alone, which is whole.
    assert {one for one in came if one[1]} == set() and {one for one, _ in came[:6]} == {"refused"}, came


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_the_largest_permitted_picture_fits(tmp_path: Path, kind: type) -> None:
    """What lies below the cap on pixels is read within the same memory: the cap is no number of its own."""
    from freqkd_analysis.data import decode

    side = int(decode.PIXEL_CAP**0.5)
    path = tmp_path / ("large.png" if kind is np.uint8 else "large.tif")
    if kind is np.uint8:
        path.write_bytes(flat_png(side, side))
    else:
        import tifffile

        tifffile.imwrite(path, np.zeros((side, side, 3), kind), photometric="rgb", compression="zlib")
    for read in (decode.read_rgb, lambda p: decode.read_ir(p, "image")):
        came, wrong = mutations.verdict(path, read)
        assert came == "read" and "MiB" not in wrong, wrong
