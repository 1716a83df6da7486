"""Sampling: shares of day and night, groups in turn, seeded, blind to input order."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from freqkd_analysis.data import records
from freqkd_analysis.data.records import PairRecord, sample
from freqkd_analysis.errors import DataError


def make(**groups: tuple[str, int]) -> list[PairRecord]:
    """group=(time, pairs) to records."""
    return [
        PairRecord(f"{group}_{i:03d}", group, Path("v"), Path("i"), time)
        for group, (time, count) in groups.items()
        for i in range(count)
    ]


MIXED = make(a=("day", 50), b=("day", 10), c=("day", 2), d=("night", 30), e=("night", 4))


def test_stratified_keeps_the_shares_of_day_and_night():
    chosen = sample(MIXED, 24, seed=3)  # 62 day and 34 night of 96: 15.5 and 8.5, the tie goes to day
    assert Counter(record.time for record in chosen) == {"day": 16, "night": 8}


def test_stratified_takes_groups_in_turn():
    counts = Counter(record.group for record in sample(MIXED, 24, seed=3))
    assert counts == {"a": 7, "b": 7, "c": 2, "d": 4, "e": 4}  # c is used up after two rounds


def test_sampling_does_not_depend_on_the_order_of_records(rng):
    for how in ("stratified", "random"):
        shuffled = [MIXED[i] for i in rng.permutation(len(MIXED))]
        assert sample(MIXED, 20, how, seed=5) == sample(shuffled, 20, how, seed=5)


def test_the_seed_changes_the_choice_and_nothing_else_does():
    for how in ("stratified", "random"):
        assert sample(MIXED, 20, how, seed=1) == sample(MIXED, 20, how, seed=1)
        assert sample(MIXED, 20, how, seed=1) != sample(MIXED, 20, how, seed=2)


def test_random_is_fair_to_pairs_where_stratified_is_fair_to_groups():
    lopsided = make(big=("day", 900), small=("day", 100))
    share = {how: Counter(r.group for r in sample(lopsided, 100, how, seed=0))["big"] for how in records.SAMPLERS}
    assert share["stratified"] == 50
    assert 80 < share["random"] < 99


def test_first_keeps_the_order_of_the_list():
    backwards = MIXED[::-1]
    assert sample(backwards, 5, "first", seed=9) == backwards[:5]


def test_more_than_there_are_uses_all():
    for how in records.SAMPLERS:
        assert {r.id for r in sample(MIXED, 10_000, how)} == {r.id for r in MIXED}


@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    n=st.integers(1, 80),
    seed=st.integers(0, 99),
)
def test_stratified_has_n_distinct_pairs_and_no_group_waits_twice(counts, n, seed):
    groups = make(**{f"g{i}": ("day", count) for i, count in enumerate(counts)})
    chosen = sample(groups, n, seed=seed)
    assert len(chosen) == len({record.id for record in chosen}) == min(n, len(groups))
    taken = Counter(record.group for record in chosen)
    left_over = [taken[f"g{i}"] for i, count in enumerate(counts) if taken[f"g{i}"] < count]
    assert not left_over or max(taken.values()) - min(left_over) <= 1


def test_wrong_use_is_one_line():
    with pytest.raises(DataError, match="at least one pair, got 0"):
        sample([], 5)
    with pytest.raises(DataError, match="at least 1 pair to sample, got 0"):
        sample(MIXED, 0)
    with pytest.raises(DataError, match=r'"stratifed".*Did you mean "stratified"'):
        sample(MIXED, 5, "stratifed")


def test_the_real_pairs_are_spread_over_all_groups(kit):
    from freqkd_analysis.data import layouts

    found = layouts.load(f"kit:{kit}")
    assert (len(found), len({r.group for r in found})) == (516, 104)
    chosen = sample(found, 104, seed=0)
    night = sum(r.time == "night" for r in found) / len(found)
    assert abs(sum(r.time == "night" for r in chosen) / 104 - night) < 0.01
    for light in ("day", "night"):
        share = [r.group for r in chosen if r.time == light]
        assert len(set(share)) == min(len(share), len({r.group for r in found if r.time == light}))
