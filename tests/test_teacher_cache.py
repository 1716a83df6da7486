"""Stored features: as computed but for half-precision rounding, both views apart, and whole shards only."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from freqkd_analysis.data.records import PairRecord
from freqkd_analysis.errors import FreqkdError, NonFiniteError
from freqkd_analysis.features import Tap
from freqkd_train import teacher_cache
from freqkd_train.teacher_cache import CacheError, TeacherCache

TAPS = [Tap(0, "stages.0", 0.5, (5, 7), 8, 3, "nchw"), Tap(1, "stages.1", 1.0, (2, 3), 16, 11, "nchw")]
IDS = [f"pair {i}" for i in range(150)]
KEY = {"weights": "abc", "size": (40, 56), "norm": False}
NAMES = [f"{view}-{number:05d}.bin" for number in range(3) for view in ("plain", "mirrored")]


def features(ids: list[str], flipped: bool, scale: float = 1.0) -> dict[str, Tensor]:
    """Known numbers of pair, view and tap; mirrored ones are no mirror image of the plain ones."""
    out = {}
    for k, tap in enumerate(TAPS):
        maps = [np.random.default_rng([int(name.split()[1]), flipped, k]).standard_normal((tap.channels, *tap.grid))
                for name in ids]  # fmt: skip
        out[tap.tap] = torch.from_numpy(scale * np.stack(maps)).float()
    return out


class Counting:
    """A teacher that knows which pairs it was asked for, and stops after so many calls."""

    def __init__(self, stop: int = 1 << 30) -> None:
        self.asked: list[tuple[str, bool]] = []
        self.stop = stop

    def __call__(self, ids: list[str], flipped: bool) -> dict[str, Tensor]:
        if self.stop == 0:
            raise KeyboardInterrupt
        self.stop -= 1
        self.asked += [(name, flipped) for name in ids]
        return features(ids, flipped)


def cache(folder: Path, key: dict[str, Any] | None = None, ids: list[str] = IDS) -> TeacherCache:
    return TeacherCache(folder, KEY if key is None else key, TAPS, ids)


@pytest.fixture
def built(tmp_path: Path) -> Path:
    cache(tmp_path / "c").build(features)
    return tmp_path / "c"


def check(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Within half-precision rounding: 2^-11 of the value, or 2^-39 of the largest of its map."""
    for tap in TAPS:
        a, b = found[tap.tap].double(), wanted[tap.tap].double()
        assert found[tap.tap].dtype == torch.float32 and a.shape == b.shape
        most = b.abs().flatten(1).max(1).values.view(-1, 1, 1, 1)
        assert ((a - b).abs() <= torch.maximum(2.0**-11 * b.abs(), 2.0**-39 * most)).all()


@pytest.mark.parametrize("scale", [1.0, 1e6, 1e-6, 1e30, 3e-30, 0.0])
def test_what_comes_back_is_what_was_computed(tmp_path: Path, scale: float) -> None:
    made = cache(tmp_path / "c", ids=IDS[:5])
    made.build(lambda ids, flipped: features(ids, flipped, scale))
    for flipped in (False, True):
        check(made.read(IDS[:5], flipped), features(IDS[:5], flipped, scale))


def test_one_huge_value_leaves_the_others(tmp_path: Path) -> None:
    """A token a million times as large as the rest, as trained ViTs have; the other pairs keep their own scale."""

    def spiked(ids: list[str], flipped: bool) -> dict[str, Tensor]:
        maps = features(ids, flipped)
        maps["stages.0"][0, 0, 0, 0] = 1e6
        return maps

    made = cache(tmp_path / "c", ids=IDS[:4])
    made.build(spiked)
    check(made.read(IDS[:4], True), spiked(IDS[:4], True))


def test_the_order_asked_for_and_both_views(built: Path, rng: np.random.Generator) -> None:
    made = cache(built)
    names = [IDS[i] for i in rng.permutation(len(IDS))[:40]]
    flipped = torch.from_numpy(rng.random(40) < 0.5)
    found = made.read(names, flipped)
    for i, name in enumerate(names):
        check({tap: maps[i : i + 1] for tap, maps in found.items()}, features([name], bool(flipped[i])))
    plain, mirrored = made.read(names, False), made.read(names, True)
    for tap in plain:
        assert not torch.equal(plain[tap].flip(3), mirrored[tap]), "the mirrored view must be the one computed"
    twice = made.read([IDS[3], IDS[3]], [True, True])
    assert torch.equal(twice["stages.1"][0], twice["stages.1"][1])
    with pytest.raises(CacheError, match='no stored features of pair pair 1500. Did you mean "pair 1'):
        made.read(["pair 1500"], False)


def test_size_is_known_before(built: Path) -> None:
    there = sum(path.stat().st_size for path in built.glob("*.bin"))
    assert teacher_cache.size_bytes(TAPS, len(IDS)) == there
    maps = sum(tap.channels * tap.grid[0] * tap.grid[1] for tap in TAPS)
    assert there == pytest.approx(2 * len(IDS) * maps * 2, rel=0.03)


def test_a_stopped_build_goes_on_where_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        cache(folder).build(Counting(stop=10))
    assert sorted(path.name for path in folder.iterdir()) == ["freqkd-cache.json", NAMES[1], NAMES[0]]
    with pytest.raises(CacheError, match="not finished"):
        cache(folder).read(IDS[:1], False)
    rest, steps = Counting(), []
    made = cache(folder)
    made.build(rest, lambda done, total: steps.append((done, total)))
    assert set(rest.asked) == {(name, flipped) for name in IDS[64:] for flipped in (False, True)}
    assert steps == [(64, 300), (128, 300), (192, 300), (256, 300), (278, 300), (300, 300)]
    assert len(rest.asked) == len(set(rest.asked))
    again = Counting()
    cache(folder).build(again)
    assert again.asked == []
    check(made.read(IDS, False), features(IDS, False))


@pytest.mark.parametrize("how", ["cut", "bit", "swapped", "gone", "longer"])
def test_a_damaged_shard_is_never_used(built: Path, how: str) -> None:
    path = built / NAMES[2]
    content = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "bit":
        content[1234] ^= 4
        path.write_bytes(content)
    elif how == "swapped":
        path.write_bytes((built / NAMES[0]).read_bytes())
    elif how == "longer":
        path.write_bytes(content + b"x")
    else:
        path.unlink()
    fresh = cache(built)
    check(fresh.read(IDS[:64], False), features(IDS[:64], False))
    with pytest.raises(CacheError, match="plain-00001.bin is damaged or missing; build"):
        fresh.read(IDS[60:70], False)
    rest, said = Counting(), []
    made = cache(built)
    made.build(rest, say=said.append)
    assert rest.asked == [(name, False) for name in IDS[64:128]]
    assert said == [] if how == "gone" else len(said) == 1 and "plain-00001.bin" in said[0]
    assert how not in ("cut", "longer") or f"bytes, expected {len(content)};" in said[0]
    check(made.read(IDS, False), features(IDS, False))
    check(fresh.read(IDS[60:70], False), features(IDS[60:70], False))


def test_a_shard_of_another_cache_is_not_taken(built: Path, tmp_path: Path) -> None:
    """Same size, whole in itself, but of other weights."""
    other = cache(tmp_path / "other", {**KEY, "weights": "xyz"})
    other.build(lambda ids, flipped: features(ids, flipped, 2.0))
    (built / NAMES[0]).write_bytes((tmp_path / "other" / NAMES[0]).read_bytes())
    with pytest.raises(CacheError, match="damaged"):
        cache(built).read(IDS[:1], False)


def test_another_key_is_refused(built: Path) -> None:
    rest = Counting()
    for key, ids, differs in [
        ({**KEY, "weights": "xyz"}, IDS, r"\(weights differ\)"),
        ({**KEY, "size": (56, 40), "layers": "0"}, IDS, r"\(size, layers differ\)"),
        (KEY, IDS[:-1], r"\(ids differ\)"),
    ]:
        for act in (lambda made: made.build(rest), lambda made: made.read(IDS[:1], False)):
            with pytest.raises(CacheError, match=f"features of something else {differs}"):
                act(cache(built, key, ids))
    taps = [replace(TAPS[0], grid=(7, 5)), TAPS[1]]
    with pytest.raises(CacheError, match=r"\(taps differ\)"):
        TeacherCache(built, KEY, taps, IDS).build(rest)
    assert rest.asked == []
    roots = {TeacherCache.under(built, key, TAPS, ids).folder for key in (KEY, {"a": 1}) for ids in (IDS, IDS[1:])}
    assert len(roots) == 4 and all(folder.parent == built for folder in roots)


@pytest.mark.parametrize("name, says", [("version", "version 99"), ("what", "no teacher cache"), (None, "damaged")])
def test_another_version_or_a_broken_marker_is_refused(built: Path, name: str | None, says: str) -> None:
    marker = built / teacher_cache.MARKER
    told = json.loads(marker.read_text())
    marker.write_text(json.dumps({**told, name: 99}) if name else "{")
    for act in (lambda made: made.build(features), lambda made: made.read(IDS[:1], False)):
        with pytest.raises(CacheError, match=says):
            act(cache(built))


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"version": 1, "digest": "other", "shards": {}}'])
def test_a_broken_index_counts_as_unfinished(built: Path, content: str) -> None:
    (built / teacher_cache.INDEX).write_text(content)
    with pytest.raises(CacheError, match="is not finished, or its index.json is damaged"):
        cache(built).read(IDS[:1], False)
    again = Counting()
    cache(built).build(again)
    assert again.asked == []
    check(cache(built).read(IDS[:1], False), features(IDS[:1], False))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    def run(ids: list[str], flipped: bool) -> dict[str, Tensor]:
        maps = features(ids, flipped)
        if IDS[70] in ids:
            maps["stages.1"][ids.index(IDS[70]), 4, 1, 1] = value
        return maps

    with pytest.raises(NonFiniteError, match=r"stages.1 are not finite for pair pair 70;"):
        cache(tmp_path / "c").build(run)
    assert not (tmp_path / "c" / teacher_cache.INDEX).exists()


def test_purge_removes_ours_and_nothing_else(tmp_path: Path) -> None:
    for name in ("a", "b"):
        cache(tmp_path / name, {"weights": name}).build(features)
    (tmp_path / "b" / teacher_cache.INDEX).unlink()
    (tmp_path / "b" / ".plain-00009.bin.77.tmp").write_bytes(b"left by a stopped write")
    (tmp_path / "b" / "notes.txt").write_text("mine")
    for folder, file, content in [
        ("c", "plain-00000.bin", "x"), ("d", teacher_cache.MARKER, "{}"), ("e", teacher_cache.MARKER, "{"),
    ]:  # fmt: skip
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text(content)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    rows = teacher_cache.listing(tmp_path)
    assert [(Path(row["folder"]).name, row["pairs"], row["finished"], row["weights"]) for row in rows] == [
        ("a", 150, True, "a"), ("b", 150, False, "b"),
    ]  # fmt: skip
    size = sum(path.stat().st_size for name in "ab" for path in (tmp_path / name).iterdir()) - len("mine")
    assert sum(row["gb"] for row in rows) * 1e9 == pytest.approx(size)
    assert teacher_cache.purge(tmp_path) == size
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["b/notes.txt", "c/plain-00000.bin", f"d/{teacher_cache.MARKER}", f"e/{teacher_cache.MARKER}"]
    assert not (tmp_path / "a").exists() and teacher_cache.purge(tmp_path) == 0


def test_a_folder_with_other_files_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(CacheError, match="holds other files"):
        cache(tmp_path).build(features)


def test_a_full_disk_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = teacher_cache.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CacheError, match="0.00 GB are free; make room"):
        cache(tmp_path / "c").build(features)
    monkeypatch.undo()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CacheError, match="could not be written .No space left on device.; make room"):
        cache(tmp_path / "d").build(features)
    assert issubclass(CacheError, FreqkdError)


def test_data_digest_knows_the_files(tmp_path: Path) -> None:
    rgb, ir = tmp_path / "v.png", tmp_path / "i.png"
    rgb.write_bytes(b"12")
    ir.write_bytes(b"34")
    record = PairRecord("a", "g", rgb, ir)
    first = teacher_cache.data_digest([record])
    assert first == teacher_cache.data_digest([record])
    os.utime(ir, ns=(1, 1))
    touched = teacher_cache.data_digest([record])
    rgb.write_bytes(b"123")
    found = {first, touched, teacher_cache.data_digest([record]), teacher_cache.data_digest([replace(record, id="b")])}
    assert len(found) == 4
    drawn = [PairRecord("a", "g", Path("no/v"), Path("no/i"), meta={"seed": seed}) for seed in (0, 1)]
    assert len({teacher_cache.data_digest([one]) for one in drawn}) == 2


def test_reading_maps_the_file(built: Path) -> None:
    """Not a whole shard in memory for one pair."""
    made = cache(built)
    made.read(IDS[:1], False)
    assert list(made._open) == [NAMES[0]] and isinstance(made._open[NAMES[0]], np.memmap)
