"""Pairs for training: which are held out, and batches as a pure function of keys and seed.

The teacher sees one modality with its own statistics, the student the other with its own. A batch depends on its keys
(epoch, index) and the seed alone: not on order, threads, cache or earlier batches.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freqkd_analysis.conditions import Geometry, luminance
from freqkd_analysis.data import layouts
from freqkd_analysis.data.decode import UNIT
from freqkd_analysis.data.records import PairRecord, sample
from freqkd_analysis.errors import DataError, first
from freqkd_train import config, transforms
from freqkd_train.transforms import Joint, View

Key = tuple[int, int]
Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Stats = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation, one value a channel."""

CACHE_BYTES = 1 << 30
_GEOMETRY, _RGB, _IR = range(3)
"""Streams of random numbers of one sample: a setting of one leaves the others as they were."""


def split(
    records: Sequence[PairRecord], data: config.Data, seed: int, say: Callable[[str], None] = print
) -> tuple[list[PairRecord], list[PairRecord]]:
    """Training and held-out pairs, each sorted by id; no group is in both.

    `data.limit` pairs are taken first, spread over groups. Then groups in seeded order are held out as long as they
    fit into `data.holdout` of the pairs, and the smallest other one if that does not reach it: the share is reached,
    by as little excess as that allows, unless a single group is left to train on. Ids of `data.exclude` are never in
    training. The result does not depend on the order of `records`.

    Args: say: told what the exclude file did.
    Raises: DataError when a side would be empty, or the exclude file cannot be read.

    Example:
        >>> records = [PairRecord(f"{g}{i}", g, Path("v"), Path("i")) for g in "abcd" for i in range(5)]
        >>> train, held = split(records, config.Data(holdout=0.25), seed=0)
        >>> len(train), len(held), {record.group for record in train} & {record.group for record in held}
        (15, 5, set())
    """
    left_out = excluded(Path(data.exclude), records, say) if data.exclude else set()
    chosen = sample(records, data.limit or max(1, len(records)), "stratified", seed)
    away = _held_groups(chosen, data.holdout, seed) if data.holdout else set()
    train = [record for record in chosen if record.group not in away and record.id not in left_out]
    if not train:
        raise DataError(f"no pair is left to train on: all of the {len(chosen)} pairs are held out or named in "
                        f"{data.exclude}; take ids out of that file.")  # fmt: skip
    return train, [record for record in chosen if record.group in away]


def _held_groups(records: Sequence[PairRecord], share: float, seed: int) -> set[str]:
    sizes: dict[str, int] = {}
    for record in records:
        sizes[record.group] = sizes.get(record.group, 0) + 1
    if len(sizes) < 2:
        raise DataError(f"holding out whole groups needs at least 2 groups, got {len(sizes)} with {len(records)} "
                        "pairs; give the pairs groups, or set data.holdout 0.")  # fmt: skip
    names = sorted(sizes)
    order = [names[i] for i in np.random.default_rng([seed, len(names)]).permutation(len(names))]
    held: set[str] = set()
    count, wanted = 0, share * len(records)
    for name in order:
        if count + sizes[name] <= wanted and len(held) < len(names) - 1:
            held.add(name)
            count += sizes[name]
    if count < wanted and len(held) < len(names) - 1:
        held.add(min((name for name in order if name not in held), key=sizes.__getitem__))
    return held


def excluded(path: Path, records: Sequence[PairRecord], say: Callable[[str], None]) -> set[str]:
    """The ids in a `data.exclude` file; `say` is told what it does. Raises DataError when it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.exclude {path} cannot be read ({type(error).__name__}); expected a text file of pair "
                        "ids, one a line.") from None  # fmt: skip
    ids = {line.strip() for line in lines} - {""}
    unknown = sorted(ids - {record.id for record in records})
    say(f"{path}: {len(ids) - len(unknown)} pairs kept out of training")
    if unknown:
        say(f"{path}: {len(unknown)} of {len(ids)} ids name no pair of this data: {first(unknown)}")
    return ids


def partners(records: Sequence[PairRecord], seed: int) -> list[int]:
    """For each pair the index of one of another group, by seed.

    Pairs are laid out group by group, in seeded order, and turned by the length of the longest group: each pair is
    somebody's partner once, unless one group holds more than half of them (then the others take turns for it).
    Raises: DataError for fewer than two groups.

    Example:
        >>> records = [PairRecord(f"{g}{i}", g, Path("v"), Path("i")) for g in "abc" for i in range(2)]
        >>> sorted(partners(records, seed=0))
        [0, 1, 2, 3, 4, 5]
    """
    members: dict[str, list[int]] = {}
    for i, record in sorted(enumerate(records), key=lambda item: item[1].id):
        members.setdefault(record.group, []).append(i)
    if len(members) < 2:
        raise DataError(f"data.pairing shuffled takes the visible image of another group, but the {len(records)} "
                        f"pairs are in {len(members)} group; use data.pairing paired.")  # fmt: skip
    rng = np.random.default_rng([seed, len(records)])
    names = sorted(members)
    blocks = [[members[names[g]][k] for k in rng.permutation(len(members[names[g]]))]
              for g in rng.permutation(len(names))]  # fmt: skip
    order = [i for block in blocks for i in block]
    n, longest = len(order), max(map(len, blocks))
    found, start = [0] * n, 0
    for block in blocks:
        for j, i in enumerate(block):
            turn = j % (n - longest) if len(block) == longest else j
            found[i] = order[(start + longest + turn) % n]
        start += len(block)
    return found


class PairSource:
    """Batches of pairs, decoded, moved, changed and normalised.

    Args:
        records: the pairs; an index counts in them. geometry: as `Geometry.make` gave it.
        teacher_stats, student_stats: mean and standard deviation a channel of each network.
        conversion: of the infrared images, as `layouts.resolve_conversion` gave it for the whole set.
        cache_bytes: room for decoded images, least recently used out first; 0 for none.
    Raises: DataError for shuffled pairing within a single group.

    A batch is {"ids": list, "teacher": (B, 3, H, W), "student": (B, 3, H, W), "flipped": (B,) bool}, float32,
    normalised; `pad` adds zeros after that.

    Example:
        >>> records = layouts.load("synthetic:pairs=4,groups=2,size=64x48")
        >>> same = ((0.5,) * 3, (0.25,) * 3)
        >>> source = PairSource(records, config.Data(), Geometry.make("crop", (32, 32), 16), 0, same, same)
        >>> batch = source.batch([(0, 3), (1, 3)])
        >>> len(source), batch["ids"], tuple(batch["student"].shape)
        (4, ['g001_00001', 'g001_00001'], (2, 3, 32, 32))
    """

    def __init__(
        self, records: Sequence[PairRecord], data: config.Data, geometry: Geometry, seed: int, teacher_stats: Stats,
        student_stats: Stats, conversion: str = UNIT, cache_bytes: int = CACHE_BYTES,
    ) -> None:  # fmt: skip
        self.records, self.data, self.geometry, self.seed = list(records), data, geometry, seed
        self.conversion = conversion
        self._teacher, self._student = teacher_stats, student_stats
        self._partners = partners(self.records, seed) if data.pairing == "shuffled" else None
        self._kept = _Kept(cache_bytes)

    def __len__(self) -> int:
        return len(self.records)

    def batch(self, keys: Sequence[Key]) -> dict[str, Any]:
        """The samples of these (epoch, index), in this order. Raises DataError naming a pair that cannot be read."""
        return self._stacked(self._drawn, keys)

    def plain(self, records: Sequence[PairRecord], flipped: bool = False) -> dict[str, Any]:
        """These pairs (of the source or not) as the analysis sees them: true partners, no random change.

        flipped: mirror them all, as a drawn mirror does.
        """
        return self._stacked(lambda record: self._sample(record, record, View(flipped)), records)

    def evaluation_batches(self, records: Sequence[PairRecord], size: int) -> Iterator[dict[str, Any]]:
        """`plain` in batches of `size`, the last one shorter."""
        for start in range(0, len(records), size):
            yield self.plain(records[start : start + size])

    def _stacked(self, work: Callable[[Any], dict[str, Any]], items: Sequence[Any]) -> dict[str, Any]:
        found = mapped(work, items, self.data.workers)
        return {
            "ids": [one["id"] for one in found],
            "teacher": torch.stack([one["teacher"] for one in found]),
            "student": torch.stack([one["student"] for one in found]),
            "flipped": torch.tensor([one["flipped"] for one in found], dtype=torch.bool),
        }

    def _drawn(self, key: Key) -> dict[str, Any]:
        epoch, index = key
        moves, visible_rng, infrared_rng = (np.random.default_rng([self.seed, epoch, index, stream])
                                            for stream in (_GEOMETRY, _RGB, _IR))  # fmt: skip
        record = self.records[index]
        visible = record if self._partners is None else self.records[self._partners[index]]
        view = transforms.draw(self.data, moves)
        return self._sample(visible, record, view, lambda rgb, ir: (
            transforms.photometric(rgb, self.data.rgb, visible_rng),
            transforms.photometric(ir, self.data.ir, infrared_rng)))  # fmt: skip

    def _sample(
        self, visible: PairRecord, record: PairRecord, view: View, change: Change | None = None
    ) -> dict[str, Any]:
        """One sample; in a shuffled pair each image lies in the frame of its own scene."""
        framed = self._framed(record, view)
        if visible is not record:
            framed = Joint(self._framed(visible, view).rgb, framed.ir)
        seen = transforms.look(view, self.geometry, framed)
        rgb, ir = (part.as_subclass(Tensor) for part in (seen.rgb, seen.ir))
        # An infrared image for the teacher stays as it is: what is changed at random is the student's, and a cache of
        # the teacher's features holds the unchanged image too.
        unchanged = ir
        if change is not None:
            rgb, ir = change(rgb, ir)
        shown = {"rgb": rgb, "grey": luminance(rgb), "ir": unchanged.expand(3, -1, -1)}[self.data.teacher_input]
        return {
            "id": record.id,
            "teacher": self.geometry.input(shown, *self._teacher),
            "student": self.geometry.input(ir.expand(3, -1, -1), *self._student),
            "flipped": view.flipped,
        }

    def _framed(self, record: PairRecord, view: View) -> Joint:
        """A pair scaled to the view's frame. Without random crops all frames of a pair are one, and that one is kept;
        with them the decoded pair is."""
        moving = self.data.scale != (1.0, 1.0)
        kept = self._kept.get(record.id)
        if kept is None:
            kept = decoded(record, self.conversion)
            kept = kept if moving else transforms.frame(kept, self.geometry)
            self._kept.put(record.id, kept)
        return transforms.frame(kept, self.geometry, view.zoom) if moving else kept


def mapped(work: Callable[[Any], Any], items: Sequence[Any], workers: int) -> list[Any]:
    """`work` of each item in order, by so many threads; 0 for none."""
    if not workers:
        return [work(item) for item in items]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, items))


def decoded(record: PairRecord, conversion: str) -> Joint:
    """Both images of a pair. Raises DataError naming a pair that cannot be read."""
    try:
        found = layouts.decode(record, conversion)
    except DataError as error:
        text = str(error)
        raise DataError(text if record.id in text else f"pair {record.id}: {text}") from None
    return transforms.joint(torch.from_numpy(found.rgb).permute(2, 0, 1), torch.from_numpy(found.ir)[None])


class _Kept:
    """Pairs by id up to a number of bytes, least recently used out first; safe between threads."""

    def __init__(self, room: int) -> None:
        self.room, self.used, self._lock = room, 0, Lock()
        self._pairs: OrderedDict[str, Joint] = OrderedDict()

    def get(self, name: str) -> Joint | None:
        with self._lock:
            if name in self._pairs:
                self._pairs.move_to_end(name)
            return self._pairs.get(name)

    def put(self, name: str, pair: Joint) -> None:
        with self._lock:
            if name in self._pairs or _bytes(pair) > self.room:
                return
            self._pairs[name] = pair
            self.used += _bytes(pair)
            while self.used > self.room:
                self.used -= _bytes(self._pairs.popitem(last=False)[1])


def _bytes(pair: Joint) -> int:
    return sum(part.numel() * part.element_size() for part in (pair.rgb, pair.ir))
