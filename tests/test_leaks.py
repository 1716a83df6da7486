"""Frames that two splits share are found, named and counted; those that only resemble one another are not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from freqkd_analysis.data.records import PairRecord
from freqkd_train import annotations, leaks
from freqkd_train.annotations import Target


def picture(seed: int, shift: int = 0) -> np.ndarray:
    """Blobs that no other seed has."""
    from scipy.ndimage import gaussian_filter

    field = gaussian_filter(np.random.default_rng(seed).standard_normal((96, 160)), 8)[:64, shift : shift + 96]
    return np.round(255 * (field - field.min()) / np.ptp(field)).astype(np.uint8)


def target(
    root: Path, seeds: list[int], groups: list[str] | None = None, *, sequences=True, times="", **card
) -> Target:
    """A split of pictures; ids are the seeds, files are written anew."""
    root.mkdir()
    records = []
    for n, seed in enumerate(seeds):
        path = root / f"{seed}.png"
        Image.fromarray(picture(seed)).save(path)
        records.append(
            PairRecord(f"{root.name}{seed}", groups[n] if groups else f"{root.name}{seed}", path, path, times)
        )
    told = {"data_set": "flir", "groups_are": "sequences" if sequences else "blocks of numbers", **card}
    return Target(root.name, tuple(records), None, None, (), told)


def counts(found: dict) -> tuple[int, int, int]:
    return tuple(found[kind]["count"] for kind in ("same_frames", "same_sequences", "look_alikes"))  # type: ignore[return-value]


def test_splits_that_share_nothing_pass(tmp_path):
    ticks: list[tuple[int, int]] = []
    found = leaks.check(
        target(tmp_path / "a", [1, 2, 3]), target(tmp_path / "b", [4, 5]), progress=lambda *t: ticks.append(t)
    )
    assert counts(found) == (0, 0, 0) and found["shared"] == 0 and not found["allowed"]
    assert ticks == [(n, 5) for n in range(1, 6)]
    assert json.loads(json.dumps(found)) == found


def test_look_alikes_are_an_error_with_the_list_and_a_word_in_the_card(tmp_path):
    train, test = target(tmp_path / "a", [1, 2, 3, 4, 5, 6]), target(tmp_path / "b", [7, 2, 3, 4, 5])
    # Re-encoded, half as large, a bit brighter; renamed: still the same frame.
    Image.fromarray(picture(2)).resize((48, 32)).point(lambda v: v * 0.8 + 30).save(test.records[1].ir, format="JPEG")
    with pytest.raises(leaks.LeakError) as caught:
        leaks.check(train, test)
    text = str(caught.value)
    assert "4 test frames look like training frames (b" in text and "and 1 more)" in text and "--allow-leak" in text
    assert "\n" not in text and caught.value.exit_code == 2
    found = leaks.check(train, test, allow=True)
    assert found["allowed"] and sorted(found["look_alikes"]["first"]) == [f"b{n} ~ a{n}" for n in (2, 3, 4, 5)]


def test_a_step_aside_is_a_look_alike_and_another_view_is_none(tmp_path):
    train, test = target(tmp_path / "a", [1]), target(tmp_path / "b", [2, 3])
    for record, shift in zip(test.records, (1, 30), strict=True):
        Image.fromarray(picture(1, shift)).save(record.ir)
    assert leaks.check(train, test, allow=True)["look_alikes"]["first"] == ["b2 ~ a1"]


def test_sequences_count_where_names_tell_them_and_in_one_data_set(tmp_path):
    a, b = target(tmp_path / "a", [1, 2], ["v1", "v2"]), target(tmp_path / "b", [3, 4, 5], ["v2", "v3", "v2"])
    with pytest.raises(leaks.LeakError, match=r"1 sequences are in both \(v2\)"):
        leaks.check(a, b)
    generic = [replace(side, card={**side.card, "data_set": "coco"}) for side in (a, b)]
    assert counts(leaks.check(*generic, allow=True)) == (0, 1, 0), "the json itself told the sequences"
    for change in ({"groups_are": "blocks of numbers"}, {"data_set": "llvip"}):
        other = replace(b, card={**b.card, **change})
        assert leaks.check(a, other)["shared"] == 0


def test_a_look_alike_counts_whatever_sequence_it_lies_in(tmp_path):
    """A frame of a new sequence that resembles one of a sequence in both is told besides that sequence."""
    a, b = target(tmp_path / "a", [1, 2], ["v1", "v2"]), target(tmp_path / "b", [3, 1], ["v1", "v3"])
    found = leaks.check(a, b, allow=True)
    assert counts(found) == (0, 1, 1) and found["look_alikes"]["first"] == ["b1 ~ a1"]


def test_frames_of_one_name_or_one_file_are_the_same(tmp_path):
    a = target(tmp_path / "a", [1, 2], sequences=False)
    b = replace(target(tmp_path / "b", [3], sequences=False))
    moved = replace(b, records=(replace(b.records[0], id="a1"),))
    assert leaks.check(a, moved, allow=True)["same_frames"]["first"] == ["a1"]
    # MSRS is made of MFNet's frames; another data set may use the same name for another frame.
    named = lambda which: [replace(side, card={**side.card, "data_set": name})
                           for side, name in zip((a, moved), which, strict=True)]  # fmt: skip
    assert counts(leaks.check(*named(("mfnet", "msrs")), allow=True)) == (1, 0, 0)
    assert counts(leaks.check(*named(("mfnet", "flir")))) == (0, 0, 0)
    assert counts(leaks.check(*named(("coco", "coco")))) == (0, 0, 0)
    one_file = replace(b, records=(replace(b.records[0], ir=a.records[1].ir.parent / ".." / "a" / "2.png"),))
    assert counts(leaks.check(*[replace(s, card={**s.card, "data_set": n}) for s, n in ((a, "x"), (one_file, "y"))],
                              allow=True)) == (1, 0, 0)  # fmt: skip


def test_a_frame_by_day_is_no_look_alike_of_one_by_night(tmp_path):
    day, night = target(tmp_path / "a", [1], times="day"), target(tmp_path / "b", [1], times="night")
    assert leaks.check(day, night)["shared"] == 0
    unknown = replace(night, records=tuple(replace(r, time="") for r in night.records))
    assert counts(leaks.check(day, unknown, allow=True)) == (0, 0, 1)


def test_flat_deep_packed_and_empty_splits_are_fine(tmp_path):
    a, b = target(tmp_path / "a", [1, 2]), target(tmp_path / "b", [3, 4])
    for record in (a.records[0], b.records[0]):
        Image.fromarray(np.full((64, 96), 7, np.uint8)).save(record.ir)
    assert leaks.check(a, b)["shared"] == 0, "two flat images resemble nothing"
    Image.fromarray(7000 + 8 * picture(2).astype(np.uint16)).save(b.records[1].ir)
    assert leaks.check(a, b, allow=True)["look_alikes"]["first"] == ["b4 ~ a2"]
    Image.fromarray(np.dstack([*[picture(9)] * 3, picture(2)])).save(b.records[1].ir)
    packed = replace(b.records[1], meta={"packed": True})
    assert leaks.thumbnail(packed) == pytest.approx(leaks.thumbnail(a.records[1]))
    assert leaks.check(a, replace(b, records=()))["shared"] == leaks.check(replace(a, records=()), b)["shared"] == 0


def test_many_findings_are_cut_in_the_card_but_counted(tmp_path):
    seeds = list(range(30))
    names = [f"v{seed}" for seed in seeds]
    found = leaks.check(target(tmp_path / "a", seeds, names), target(tmp_path / "b", seeds, names), allow=True)
    assert found["same_sequences"]["count"] == 30 and len(found["same_sequences"]["first"]) == 20


def test_real_splits_share_what_their_authors_left(benchmarks):
    """HIT-UAV's frames were drawn at random from videos; thumbnails find the neighbours."""
    train, val = (annotations.load(f"hituav:{benchmarks}/hit_uav", split) for split in ("train", "val"))
    found = leaks.check(train, val, allow=True)
    assert counts(found) == (0, 0, 15) and found["look_alikes"]["first"][0] == "1_60_60_0_00517 ~ 1_60_60_0_00519"
    for spec in (f"flir:{benchmarks}/flir", f"mfnet:{benchmarks}/mfnet"):
        test = "val" if spec.startswith("mfnet") else "test"
        assert leaks.check(annotations.load(spec, "train"), annotations.load(spec, test))["shared"] == 0


@pytest.mark.parametrize("layout", ["kaist", "flir", "mfnet"])
def test_rendered_splits_share_nothing(tmp_path, layout):
    from freqkd_analysis.data import synthetic

    spec = synthetic.write(tmp_path / "set", layout, "pairs=24,groups=8,size=96x80,night=0.5")
    found = leaks.check(annotations.load(spec, "train"), annotations.load(spec, "test"))
    assert found["shared"] == 0
