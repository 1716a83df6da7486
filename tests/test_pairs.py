"""Splits by group, and batches that depend on their keys alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from freqkd_analysis.conditions import Geometry
from freqkd_analysis.data import layouts
from freqkd_analysis.data.records import PairRecord
from freqkd_analysis.errors import DataError
from freqkd_train import config, pairs, transforms
from freqkd_train.pairs import PairSource
from freqkd_train.transforms import View

TEACHER = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
STUDENT = ((0.3, 0.4, 0.5), (0.1, 0.2, 0.3))
CROP = Geometry.make("crop", (32, 48), 16)
PAD = Geometry.make("pad", (40, 50), 16)
STRONG = config.Photometry(brightness=0.2, contrast=0.3, noise=0.05)
EVERYTHING = {"scale": (0.4, 1.0), "rgb": STRONG, "ir": STRONG}


def listed(sizes: dict[str, int]) -> list[PairRecord]:
    return [PairRecord(f"{g}{i:03d}", g, Path("v"), Path("i")) for g, n in sizes.items() for i in range(n)]


@pytest.fixture(scope="module")
def records() -> list[PairRecord]:
    return layouts.load("synthetic:pairs=9,groups=3,size=96x80")


def source(records: list[PairRecord], how: Geometry = CROP, seed: int = 3, room: int = 1 << 24,
           **settings: Any) -> PairSource:  # fmt: skip
    data = config.Data(geometry=how.kind, **settings)
    return PairSource(records, data, how, seed, TEACHER, STUDENT, cache_bytes=room)


def raw(batch: Tensor, stats: Any) -> Tensor:
    """Normalisation taken back, in float64."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in stats)
    return batch.double() * std + mean


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a["ids"] == b["ids"] and all(torch.equal(a[k], b[k]) for k in ("teacher", "student", "flipped"))


# Splits


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(4))
def test_whole_groups_are_held_out_until_the_share_is_reached(share: float, seed: int) -> None:
    sizes = {"a": 7, "b": 1, "c": 12, "d": 5, "e": 5, "f": 30, "g": 2, "h": 9}
    records = listed(sizes)
    train, held = pairs.split(records, config.Data(holdout=share), seed)
    groups = [{record.group for record in side} for side in (train, held)]
    assert groups[0] and groups[1] and not groups[0] & groups[1]
    assert sorted(record.id for record in train + held) == sorted(record.id for record in records)
    assert len(held) >= share * len(records) or len(groups[0]) == 1
    # Without the largest of the held groups the share would not be reached.
    assert len(held) - max(sizes[group] for group in groups[1]) < share * len(records)


def test_the_split_knows_seed_but_not_order(rng: np.random.Generator) -> None:
    records = listed(dict.fromkeys("abcdefghij", 4))
    shuffled = [records[i] for i in rng.permutation(len(records))]
    data = config.Data(holdout=0.3, limit=25)
    assert pairs.split(records, data, 1) == pairs.split(shuffled, data, 1)
    held = {frozenset(record.group for record in pairs.split(records, config.Data(), seed)[1]) for seed in range(8)}
    assert len(held) > 4


def test_limit_spreads_over_groups_and_no_holdout_is_allowed() -> None:
    records = listed({"a": 50, "b": 50, "c": 50})
    train, held = pairs.split(records, config.Data(limit=9, holdout=0.3), 0)
    assert (len(train), len(held)) == (6, 3)
    assert pairs.split(listed({"a": 4}), config.Data(holdout=0.0), 0)[1] == []


@pytest.mark.parametrize("records, says", [(listed({"a": 4}), "at least 2 groups, got 1 with 4"), ([], "got 0")])
def test_a_single_group_cannot_be_split(records: list[PairRecord], says: str) -> None:
    with pytest.raises(DataError, match=says):
        pairs.split(records, config.Data(), 0)


def test_excluded_ids_are_not_trained_on_and_unknown_ones_told(tmp_path: Path) -> None:
    records = listed({"a": 4, "b": 4, "c": 4})
    everything = pairs.split(records, config.Data(holdout=0.3), 0)
    names = [everything[0][1].id, everything[0][2].id, everything[1][0].id]
    path = tmp_path / "exclude.txt"
    path.write_text("\n".join([*names, "", "  nobody ", "a"]), encoding="utf-8")
    said: list[str] = []
    train, held = pairs.split(records, config.Data(holdout=0.3, exclude=str(path)), 0, said.append)
    assert [r.id for r in train] == [r.id for r in everything[0] if r.id not in names]
    assert held == everything[1], "excluded pairs may be held out"
    assert "3 pairs kept out" in said[0] and "2 of 5 ids name no pair" in said[1] and "a, nobody" in said[1]
    path.write_text("\n".join(record.id for record in records), encoding="utf-8")
    with pytest.raises(DataError, match="no pair is left to train on"):
        pairs.split(records, config.Data(exclude=str(path)), 0, said.append)
    with pytest.raises(DataError, match=r"data.exclude .*nothing.txt cannot be read"):
        pairs.split(records, config.Data(exclude=str(tmp_path / "nothing.txt")), 0)


# Partners of another group


@pytest.mark.parametrize(
    "sizes", [{"a": 1, "b": 1}, {"a": 3, "b": 1, "c": 2}, {"a": 5, "b": 5}, {"a": 20, "b": 3, "c": 4}, {"a": 9, "b": 1}]
)
def test_partners_come_from_another_group(sizes: dict[str, int]) -> None:
    records = listed(sizes)
    for seed in range(20):
        found = pairs.partners(records, seed)
        assert all(records[i].group != records[j].group for i, j in enumerate(found))
        times = Counter(found)
        if 2 * max(sizes.values()) <= len(records):
            assert sorted(found) == list(range(len(records)))
        else:
            rest = len(records) - max(sizes.values())
            assert max(times.values()) <= -(-max(sizes.values()) // rest) + 1
        assert found == pairs.partners(records, seed)
    back = records[::-1]
    ids = {records[i].id: records[j].id for i, j in enumerate(pairs.partners(records, 5))}
    assert ids == {back[i].id: back[j].id for i, j in enumerate(pairs.partners(back, 5))}


def test_shuffled_pairs_show_another_groups_scene(records: list[PairRecord]) -> None:
    paired, shuffled = source(records, flip=0.0), source(records, flip=0.0, pairing="shuffled")
    keys = [(0, i) for i in range(len(records))]
    true, false = paired.batch(keys), shuffled.batch(keys)
    assert true["ids"] == false["ids"] and torch.equal(true["student"], false["student"])
    for i, image in enumerate(false["teacher"]):
        owner = [j for j, other in enumerate(true["teacher"]) if torch.equal(image, other)]
        assert len(owner) == 1 and records[owner[0]].group != records[i].group
    assert same(shuffled.plain(records), paired.plain(records)), "evaluation keeps the true pairs"
    with pytest.raises(DataError, match="in 1 group"):
        source(records[:3], pairing="shuffled")


# Batches


@pytest.mark.parametrize("settings", [{}, EVERYTHING, {**EVERYTHING, "pairing": "shuffled", "teacher_input": "grey"}])
def test_a_batch_depends_on_its_keys_alone(records: list[PairRecord], settings: dict[str, Any]) -> None:
    keys = [(0, 4), (2, 1), (0, 0), (2, 1), (1, 8)]
    whole = source(records, **settings).batch(keys)
    threads = source(records, workers=4, **settings).batch(keys)
    uncached = source(records, room=0, **settings)
    tight = source(records, room=300_000, **settings)
    tight.batch([(5, i) for i in range(9)])
    singles = [uncached.batch([key]) for key in reversed(keys)][::-1]
    assert same(whole, threads) and same(whole, tight.batch(keys))
    for i, one in enumerate(singles):
        assert whole["ids"][i : i + 1] == one["ids"]
        assert all(torch.equal(whole[k][i], one[k][0]) for k in ("teacher", "student", "flipped"))
    assert whole["teacher"].dtype == torch.float32 and whole["flipped"].dtype == torch.bool
    assert not same(whole, source(records, seed=4, **settings).batch(keys))


def test_epochs_differ_and_mirrors_are_joint(records: list[PairRecord]) -> None:
    made = source(records)
    keys = [(epoch, i) for epoch in range(4) for i in range(9)]
    batch = made.batch(keys)
    plain, mirrored = made.plain(records), made.plain(records, flipped=True)
    assert 8 < int(batch["flipped"].sum()) < 28
    for n, (_, i) in enumerate(keys):
        wanted = mirrored if batch["flipped"][n] else plain
        assert torch.equal(batch["teacher"][n], wanted["teacher"][i])
        assert torch.equal(batch["student"][n], wanted["student"][i])
    assert torch.equal(plain["teacher"].flip(3), mirrored["teacher"]) and mirrored["flipped"].all()
    flips = batch["flipped"].view(4, 9)
    assert any(not torch.equal(flips[0], later) for later in flips[1:])


@pytest.mark.parametrize("geometry", [CROP, PAD], ids=["crop", "pad"])
def test_each_modality_has_its_own_statistics(records: list[PairRecord], geometry: Geometry) -> None:
    """Against the analysis' frames, normalised here in float64; zeros where there is padding."""
    made = source(records, geometry)
    batch = made.plain(records[:3])
    assert tuple(batch["teacher"].shape) == (3, 3, *geometry.size)
    for i, record in enumerate(records[:3]):
        pair = layouts.decode(record)
        for name, image, stats in (("teacher", pair.rgb, TEACHER), ("student", pair.ir, STUDENT)):
            view = geometry.view(geometry.frame(image))
            height, width = view.shape[1:]
            assert (raw(batch[name][i], stats)[:, :height, :width] - view).abs().max() < 1e-6
            assert not batch[name][i, :, height:].any() and not batch[name][i, :, :, width:].any()
    assert geometry.kind == "crop" or batch["teacher"].shape[2] > height


def test_what_the_teacher_sees(records: list[PairRecord]) -> None:
    settings = {"flip": 0.0, "ir": STRONG}
    keys = [(0, i) for i in range(4)]
    rgb, grey, ir = (source(records, teacher_input=name, **settings).batch(keys) for name in ("rgb", "grey", "ir"))
    assert torch.equal(rgb["student"], grey["student"]) and torch.equal(rgb["student"], ir["student"])
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).view(3, 1, 1)
    luminance = (raw(rgb["teacher"], TEACHER) * weights).sum(1, keepdim=True)
    assert (raw(grey["teacher"], TEACHER) - luminance).abs().max() < 1e-6
    clean = source(records, flip=0.0).batch(keys)
    assert (raw(ir["teacher"], TEACHER) - raw(clean["student"], STUDENT)).abs().max() < 1e-6
    assert not torch.equal(rgb["student"], clean["student"]), "the photometric change is the student's"


def test_photometry_is_drawn_apart(records: list[PairRecord]) -> None:
    keys = [(1, i) for i in range(9)]
    changes: list[dict[str, Any]] = [{}, {"rgb": STRONG}, {"rgb": STRONG, "ir": STRONG}]
    neither, visible, both = (source(records, scale=(0.5, 1.0), **more).batch(keys) for more in changes)
    assert torch.equal(neither["flipped"], both["flipped"])
    assert torch.equal(neither["student"], visible["student"]) and torch.equal(visible["teacher"], both["teacher"])
    assert not torch.equal(neither["teacher"], visible["teacher"])
    light = config.Photometry(brightness=0.2)
    moved = source(records, scale=(0.5, 1.0), rgb=light, ir=light).batch(keys)
    shifts = [(raw(moved[k], s) - raw(neither[k], s)).median(-1)[0].median(-1)[0].median(-1)[0]
              for k, s in (("teacher", TEACHER), ("student", STUDENT))]  # fmt: skip
    assert (shifts[0] - shifts[1]).abs().max() > 0.05


def test_evaluation_batches_cover_everything_once(records: list[PairRecord]) -> None:
    made = source(records[:2], **EVERYTHING)
    batches = list(made.evaluation_batches(records, 4))
    assert [len(batch["ids"]) for batch in batches] == [4, 4, 1]
    assert [name for batch in batches for name in batch["ids"]] == [record.id for record in records]
    whole = source(records).plain(records)
    assert torch.equal(torch.cat([batch["student"] for batch in batches]), whole["student"])
    assert not any(batch["flipped"].any() for batch in batches)


def test_the_cache_stays_in_its_room(records: list[PairRecord], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    decode = layouts.decode
    monkeypatch.setattr(layouts, "decode", lambda record, how: (calls.append(record.id), decode(record, how))[1])
    one = source(records, flip=0.0)
    one.batch([(0, 0), (1, 0)])
    size = one._kept.used
    assert calls == [records[0].id] and size == 4 * 4 * 53 * 64, "four planes of the frame"
    two = source(records, flip=0.0, room=2 * size)
    calls.clear()
    two.batch([(0, 0), (0, 1), (0, 0), (0, 2), (0, 0), (0, 1)])
    assert [records.index(next(r for r in records if r.id == name)) for name in calls] == [0, 1, 2, 1]
    assert two._kept.used == 2 * size


def test_an_unreadable_pair_is_named(tmp_path: Path) -> None:
    for side, size in (("vis", (60, 50)), ("ir", (60, 50))):
        (tmp_path / side).mkdir()
        for name in ("good", "other"):
            Image.new("RGB" if side == "vis" else "L", size, 99).save(tmp_path / side / f"{name}.png")
    found = layouts.load(f"folder:{tmp_path}/vis:{tmp_path}/ir")
    (tmp_path / "ir" / "other.png").write_bytes(b"no image")
    renamed = [replace(found[0], id="first"), replace(found[1], id="second")]
    for workers in (0, 2):
        made = source(renamed, workers=workers)
        assert made.batch([(0, 0)])["ids"] == ["first"]
        with pytest.raises(DataError, match="pair second.*other.png"):
            made.batch([(0, 0), (0, 1)])


def test_a_random_crop_is_cut_from_the_decoded_image(records: list[PairRecord]) -> None:
    """Not from the scaled frame, which would be enlarged and lack its high frequencies."""
    made = source(records, flip=0.0, scale=(0.5, 0.5))
    batch = made.batch([(0, 1)])
    pair = layouts.decode(records[1])
    view = transforms.draw(made.data, np.random.default_rng([3, 0, 1, 0]))
    sample = transforms.joint(torch.from_numpy(pair.rgb).permute(2, 0, 1), torch.from_numpy(pair.ir)[None])
    seen = transforms.apply(view, CROP, sample)
    assert view == View(False, pytest.approx(2**0.5), view.at)
    assert (raw(batch["teacher"][0], TEACHER) - seen.rgb).abs().max() < 1e-6


def test_real_pairs_as_the_analysis_sees_them(kit: Path) -> None:
    found = layouts.load(f"kit:{kit}")
    geometry = Geometry.make("crop", (224, 224), 16)
    conversion = layouts.resolve_conversion(found)
    batch = PairSource(found, config.Data(workers=2), geometry, 0, TEACHER, STUDENT, conversion).plain(found[::90])
    for record, teacher, student in zip(found[::90], batch["teacher"], batch["student"], strict=True):
        pair = layouts.decode(record, conversion)
        assert (raw(teacher, TEACHER) - geometry.view(geometry.frame(pair.rgb))).abs().max() < 1e-6
        assert (raw(student, STUDENT) - geometry.view(geometry.frame(pair.ir))).abs().max() < 1e-6
