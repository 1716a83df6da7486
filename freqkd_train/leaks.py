"""Frames that two splits share: the same file or name, the same sequence, or look-alikes in the infrared image.

A look-alike is a pair of frames whose thumbnails (16x16 block means, `data.verify`) correlate above 0.98. Among 300
training and 80 validation frames of HIT-UAV, whose authors drew frames at random from videos, every such pair lies a
few frames apart in one video; 77 against 22 frames of FLIR and 100 against 100 of MFNet reach 0.92 and 0.75, 300
rendered frames of different scenes 0.979. A set of very many frames may hold look-alikes by chance: look at the names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from freqkd_analysis.data import decode, verify
from freqkd_analysis.data.records import PairRecord
from freqkd_analysis.errors import FreqkdError
from freqkd_train import pairs
from freqkd_train.annotations import Target

Progress = Callable[[int, int], None]

_LISTED = 20
"""At most so many names of a kind stand in the card."""
_ROWS = 2048
_ONE_FAMILY = {"msrs": "mfnet"}
"""Data sets made of another's frames, with their names."""


class LeakError(FreqkdError):
    """Training and test data share frames."""


def check(train: Target, test: Target, allow: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """What `train` and `test` share, for the card; nothing shared is {"shared": 0, ...}.

    Sequences count where names or folders tell them (KAIST and FLIR videos, LLVIP scenes). Blocks of frame numbers are
    guesses that official splits cut through (MFNet, HIT-UAV), so there only look-alikes count.

    Args:
        allow: go on all the same; the findings are in the result, with `allowed` true.
        progress: told (thumbnails made, thumbnails in all).
    Returns: numbers of `same_frames`, `same_sequences`, `look_alikes`, the first few of each by name, and `allowed`.
    Raises: LeakError naming the first of each kind and how many there are; DataError for an image that cannot be read.
    """
    family = [_ONE_FAMILY.get(name, name) for name in (train.card["data_set"], test.card["data_set"])]
    alike = family[0] == family[1]
    told = alike and all(side.card["groups_are"] == "sequences" for side in (train, test))
    # File names of a generic json are often numbered from 1 in each split: they name no frame.
    found = between(train.records, test.records, alike and family[0] != "coco", told, progress)
    refuse(found, train.name, test.name, allow)
    return {**found, "allowed": bool(found["shared"])}


def refuse(found: dict[str, Any], train: str, test: str, allow: bool = False) -> None:
    """LeakError for findings of `between` that are not allowed. train, test: what to call the two sides."""
    if found["shared"] and not allow:
        raise LeakError(f"{train} and {test} share frames: {_told(found)}. Take them out of training, or go on with "
                        "--allow-leak, which is recorded.")  # fmt: skip


def between(
    train: Sequence[PairRecord],
    test: Sequence[PairRecord],
    same_names: bool,
    sequences: bool,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What two lists of records share; never an error for that.

    Args:
        same_names: an id names the same frame in both. sequences: a group names the same sequence in both.
    Returns: {"shared": findings of all kinds, "same_frames", "same_sequences", "look_alikes": {"count", "first"}}.
    """
    files = {_file(record) for record in train}
    ids = {record.id for record in train} if same_names else set()
    same = [record.id for record in test if record.id in ids or _file(record) in files]
    groups = {record.group for record in train} & {record.group for record in test} if sequences else set()
    known = set(same)
    rest = [record for record in test if record.id not in known and record.group not in groups]
    alike = _look_alikes(train, rest, progress) if rest else []
    kinds = {"same_frames": same, "same_sequences": sorted(groups), "look_alikes": [f"{a} ~ {b}" for a, b in alike]}
    counted = {kind: {"count": len(names), "first": names[:_LISTED]} for kind, names in kinds.items()}
    return {"shared": sum(map(len, kinds.values())), **counted}


def of_pairs(spec: str, records: Sequence[PairRecord], exclude: str, test: Target, allow: bool,
             progress: Progress | None = None) -> dict[str, Any]:  # fmt: skip
    """What the pairs of a distillation and a test split share, by files and looks: their names are of two worlds.

    Args: spec: layout and place of the records, for a message; exclude: a file of ids that were left out. Raises: as
        `check`.
    """
    left_out = pairs.excluded(Path(exclude), records, lambda text: None) if exclude else set()
    records = [record for record in records if record.id not in left_out]
    found = between(records, test.records, False, False, progress)
    refuse(found, f"the pairs of stage 1 ({spec})", test.name, allow)
    return {**found, "allowed": bool(found["shared"])}


def thumbnail(record: PairRecord) -> np.ndarray:
    """(256,) float32, less its mean and of unit length, of the infrared image; zeros when it is flat."""
    changed = record.ir.stat().st_mtime_ns if record.ir.is_file() else 0
    return _thumbnail(record.ir, bool(record.meta.get("packed")), changed)


@lru_cache(maxsize=100_000)
def _thumbnail(path: Path, packed: bool, _changed: int) -> np.ndarray:
    """Kept, 1 kB each: every arm and seed of a study asks for the same images."""
    if packed:
        infrared, _ = decode.read_rgbt(path)[2:]
    else:
        # Per image: the thumbnail does not see level and contrast, and no window of the data set is needed.
        infrared, _ = decode.read_ir(path, "image")
    return verify.thumb(infrared).astype(np.float32)


def _look_alikes(
    train: Sequence[PairRecord], test: Sequence[PairRecord], progress: Progress | None
) -> list[tuple[str, str]]:
    """(id in test, id in train) of each test frame that has look-alikes, with the closest; the closest pairs first.

    A frame by day is no look-alike of one by night, where both are known.
    """
    records = [*train, *test]
    with ThreadPoolExecutor(2) as pool:
        thumbs = np.zeros((len(records), verify.THUMB**2), np.float32)
        for done, thumb in enumerate(pool.map(thumbnail, records)):
            thumbs[done] = thumb
            if progress:
                progress(done + 1, len(records))
    seen, asked = thumbs[: len(train)], thumbs[len(train) :]
    lights = np.array([record.time for record in train])
    found = []
    for start in range(0, len(test) if train else 0, _ROWS):
        alike = asked[start : start + _ROWS] @ seen.T
        light = np.array([record.time for record in test[start : start + _ROWS]])[:, None]
        alike[(light != lights) & (light != "") & (lights != "")] = 0
        nearest = alike.argmax(axis=1)
        for row, column in enumerate(nearest):
            if alike[row, column] > verify.ALIKE:
                found.append((-float(alike[row, column]), test[start + row].id, train[column].id))
    return [(name, other) for _, name, other in sorted(found)]


def _file(record: PairRecord) -> str:
    return str(record.ir.resolve())


def _told(found: dict[str, Any]) -> str:
    words = {"same_frames": "frames are in both", "same_sequences": "sequences are in both",
             "look_alikes": "test frames look like training frames"}  # fmt: skip
    phrases = []
    for kind, text in words.items():
        count, names = found[kind]["count"], found[kind]["first"][:3]
        rest = f" and {count - len(names)} more" if count > len(names) else ""
        phrases += [f"{count} {text} ({', '.join(names)}{rest})"] if count else []
    return "; ".join(phrases)
