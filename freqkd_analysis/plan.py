"""What a run will do, fixed before it starts: settings, folds of groups, and blocks of pairs.

A block is the unit of work, of saving and of sharing out over processes. It depends on the records and the seed
alone, never on batch size, workers, or how often the run was interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from freqkd_analysis.conditions import FEATURE_CONDITIONS, IMAGE_CONDITIONS, OTHER_CONDITIONS
from freqkd_analysis.data import records as sampling
from freqkd_analysis.data.records import PairRecord

MAIN_BLOCK, CONTROL_BLOCK = 16, 8


@dataclass(frozen=True)
class Settings:
    """Every option of `layers` that decides a number; the rest (device, workers, batch size) only decides the time."""

    pairs: int = 500
    data: str = "synthetic"
    model: str = "auto"
    weights: str = "auto"
    layers: str = "all"
    norm: bool = False
    standardize: str = "none"
    size: tuple[int, int] = (224, 224)
    geometry: str = "crop"
    window: str = "none"
    bands: str = "octave:3"
    measure: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ("paired",)
    control_pairs: int = 100
    sample: str = "stratified"
    seed: int = 0
    dtype: str = "fp32"
    max_bad: int = 10
    preset: str = ""
    cka: bool = False
    mmd: bool = False


@dataclass(frozen=True)
class Machine:
    """What decides only the time a run takes. batch_size: pairs a forward, 0 for automatic."""

    device: str = "auto"
    batch_size: int = 0
    workers: int = 2


@dataclass(frozen=True)
class Block:
    """kind: `mean` (adds up a fold's mean maps), `main` (paired, shuffled, mean-removed) or `control`.

    fold: for `mean` the fold summed; for `main` the fold whose pairs these are (their means come from the other).
    """

    kind: str
    number: int
    fold: int
    records: tuple[PairRecord, ...] = field(repr=False)

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.number:04d}"


@dataclass(frozen=True)
class Plan:
    """The work of a run: sampled pairs, pairs of the controls, blocks in order, and notes for the user."""

    settings: Settings
    records: tuple[PairRecord, ...]
    control: tuple[PairRecord, ...]
    blocks: tuple[Block, ...]
    notes: tuple[str, ...]

    def wants(self, condition: str) -> bool:
        return condition in self.settings.conditions

    def of_kind(self, kind: str) -> list[Block]:
        return [block for block in self.blocks if block.kind == kind]

    @property
    def means(self) -> bool:
        return bool(self.of_kind("mean"))

    def describe(self) -> dict[str, Any]:
        """Counts for the manifest and the dry run."""
        kinds = {kind: sum(len(b.records) for b in self.of_kind(kind)) for kind in ("mean", "main", "control")}
        return {"pairs": len(self.records), "groups": len({r.group for r in self.records}), **kinds}


def make(records: Sequence[PairRecord], settings: Settings) -> Plan:
    """Sample the pairs and lay out the blocks.

    Mean maps are cross-fitted: groups are dealt to two folds, and a pair is compared with means over pairs of the
    other fold, so that no pair or group enters its own mean.
    """
    chosen = sampling.sample(records, settings.pairs, settings.sample, settings.seed)
    notes = []
    if len(chosen) < settings.pairs:
        notes.append(f"asked for {settings.pairs} pairs, there are {len(chosen)}: using all")
    folds = _folds(chosen)
    blocks: list[Block] = []
    feature = set(FEATURE_CONDITIONS) & set(settings.conditions)
    if feature and len({r.group for r in chosen}) < 2:
        notes.append("one group: shuffled and mean-removed comparisons need pairs of other groups and are left out")
    if "mean_removed" in feature and all(folds):
        each = max(1, settings.control_pairs // 2)
        for number, fold in enumerate(folds):
            blocks.append(Block("mean", number, number, tuple(sampling.stratified(fold, each, settings.seed))))
    for fold_number, fold in enumerate(folds):
        for part in _cut(_spread(fold, settings.seed), MAIN_BLOCK):
            blocks.append(Block("main", sum(b.kind == "main" for b in blocks), fold_number, part))
    control: tuple[PairRecord, ...] = ()
    if settings.cka or settings.mmd or set(settings.conditions) & {*IMAGE_CONDITIONS, *OTHER_CONDITIONS}:
        control = tuple(sampling.stratified(chosen, settings.control_pairs, settings.seed + 1))
        for number, part in enumerate(_cut(control, CONTROL_BLOCK)):
            blocks.append(Block("control", number, 0, part))
    return Plan(settings, tuple(chosen), control, tuple(blocks), tuple(notes))


def _folds(records: Sequence[PairRecord]) -> tuple[list[PairRecord], list[PairRecord]]:
    """Whole groups dealt to two folds, largest first, to the smaller fold."""
    sizes: dict[str, int] = {}
    for record in records:
        sizes[record.group] = sizes.get(record.group, 0) + 1
    folds: tuple[list[PairRecord], list[PairRecord]] = ([], [])
    for group in sorted(sizes, key=lambda g: (-sizes[g], g)):
        smaller = min(folds, key=len)
        smaller.extend(record for record in records if record.group == group)
    return folds


def _spread(records: Sequence[PairRecord], seed: int) -> list[PairRecord]:
    """Order in which a group's pairs lie as far apart as they can, so that neighbours are of other groups."""
    rng = np.random.default_rng(seed)
    by_group: dict[str, list[PairRecord]] = {}
    for record in sorted(records, key=lambda r: r.id):
        by_group.setdefault(record.group, []).append(record)
    places = []
    for group in sorted(by_group):
        members = [by_group[group][i] for i in rng.permutation(len(by_group[group]))]
        offset = rng.random()
        places += [((i + offset) / len(members), record.id, record) for i, record in enumerate(members)]
    return [record for _, _, record in sorted(places, key=lambda place: place[:2])]


def _cut(records: Sequence[PairRecord], size: int) -> list[tuple[PairRecord, ...]]:
    """Blocks of `size`; a rest of one joins the block before it, for a chain needs two."""
    cuts = [tuple(records[i : i + size]) for i in range(0, len(records), size)]
    if len(cuts) > 1 and len(cuts[-1]) == 1:
        cuts[-2:] = [cuts[-2] + cuts[-1]]
    return cuts
