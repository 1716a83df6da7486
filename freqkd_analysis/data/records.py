"""Pairs before and after decoding: `PairRecord` names the files, `PairedSample` holds the pixels.

`group` is the sequence or clip a pair belongs to: the unit that statistics resample. Sampling never looks
at pixels; it is a function of the records, the number asked for and the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from freqkd_analysis.errors import DataError, nearest


@dataclass(frozen=True)
class PairRecord:
    """One visible-infrared pair on disk (or to be rendered), not yet decoded."""

    id: str
    group: str
    rgb: Path
    ir: Path
    time: str = ""
    """`day`, `night` or empty when the layout does not say."""
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PairedSample:
    """One decoded pair.

    rgb: (H, W, 3) float32 in [0, 1]; a grey visible image is repeated and flagged in meta["visible_is_grey"].
    ir: (H, W) float32 in [0, 1], after the conversion that meta["ir_conversion"] names.
    """

    rgb: np.ndarray
    ir: np.ndarray
    id: str
    group: str
    meta: Mapping[str, Any] = field(default_factory=dict)


def stratified(records: Sequence[PairRecord], n: int, seed: int) -> list[PairRecord]:
    """`n` records with the day/night shares of `records`, spread evenly over groups.

    Each lighting gets its share of `n` (largest remainder); inside it the groups take turns, one pair each,
    in seeded order, until the share is full. The result does not depend on the order of `records`.
    """
    rng = np.random.default_rng(seed)
    by_time = _grouped(sorted(records, key=_by_id), lambda record: record.time)
    chosen: list[PairRecord] = []
    for time, share in _shares({time: len(members) for time, members in by_time.items()}, n).items():
        groups = list(_grouped(by_time[time], lambda record: record.group).values())
        queues = [[members[i] for i in rng.permutation(len(members))] for members in groups]
        turns = [queues[i] for i in rng.permutation(len(queues))]
        rounds = [queue[depth] for depth in range(max(map(len, turns))) for queue in turns if depth < len(queue)]
        chosen += rounds[:share]
    return sorted(chosen, key=_by_id)


def random(records: Sequence[PairRecord], n: int, seed: int) -> list[PairRecord]:
    """`n` records drawn without replacement, every pair alike; independent of the order of `records`."""
    ordered = sorted(records, key=_by_id)
    picks = np.random.default_rng(seed).permutation(len(ordered))[:n]
    return [ordered[i] for i in sorted(picks)]


def first(records: Sequence[PairRecord], n: int, seed: int) -> list[PairRecord]:
    """The first `n` records in the order of the data set's list; the seed is not used."""
    return list(records[:n])


SAMPLERS: dict[str, Callable[[Sequence[PairRecord], int, int], list[PairRecord]]] = {
    "stratified": stratified,
    "random": random,
    "first": first,
}


def sample(records: Sequence[PairRecord], n: int, how: str = "stratified", seed: int = 0) -> list[PairRecord]:
    """`n` of `records`; all of them when fewer than `n` are there (the caller says so).

    Raises: DataError for no records at all, `n` below 1, or an unknown `how`.

    Example:
        >>> records = [PairRecord(f"{g}{i}", g, Path("v"), Path("i")) for g in "ab" for i in range(9)]
        >>> sorted(record.group for record in sample(records, 4, seed=1))
        ['a', 'a', 'b', 'b']
    """
    if not records:
        raise DataError("expected at least one pair, got 0; check the path with `freqkd-analyze data verify`.")
    if n < 1:
        raise DataError(f"expected at least 1 pair to sample, got {n}; set --pairs to 1 or more.")
    if how not in SAMPLERS:
        raise DataError(f'no sampling named "{how}".{nearest(how, SAMPLERS)} Known: {", ".join(SAMPLERS)}.')
    return SAMPLERS[how](records, n, seed)


def _by_id(record: PairRecord) -> str:
    return record.id


def _grouped(records: Iterable[PairRecord], key: Callable[[PairRecord], str]) -> dict[str, list[PairRecord]]:
    found: dict[str, list[PairRecord]] = {}
    for record in records:
        found.setdefault(key(record), []).append(record)
    return dict(sorted(found.items()))


def _shares(counts: Mapping[str, int], n: int) -> dict[str, int]:
    """Split `n` in proportion to `counts` by largest remainder, so that the shares add up to min(n, total)."""
    total = sum(counts.values())
    n = min(n, total)
    shares = {key: n * count // total for key, count in counts.items()}
    rest = sorted(counts, key=lambda key: (-(n * counts[key] % total), key))
    for key in rest[: n - sum(shares.values())]:
        shares[key] += 1
    return shares
