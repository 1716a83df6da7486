"""Each fault, planted in an otherwise good tree, is found and named; a good tree has no problems."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from freqkd_analysis import spectral
from freqkd_analysis.data import layouts, verify
from freqkd_analysis.errors import DataError

SIZE = 96, 128


def texture(seed: int) -> np.ndarray:
    """Blobs of several sizes, in 0..255: enough edges for a registration, another scene for each seed."""
    rng = np.random.default_rng(seed)
    height, width = SIZE[0] + 40, SIZE[1] + 40
    y, x = np.mgrid[:height, :width]
    field = np.zeros((height, width))
    for _ in range(60):
        cy, cx, r = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(3, 14)
        field += rng.uniform(-1, 1) * ((y - cy) ** 2 + (x - cx) ** 2 < r * r)
    field -= field.min()
    return (field / field.max() * 255).astype(np.uint8)


def window(scene: np.ndarray, dx: int = 0, dy: int = 0) -> np.ndarray:
    """A view that shows the scene `dx` to the right and `dy` down of where `window(scene)` shows it."""
    return scene[20 - dy : 20 - dy + SIZE[0], 20 - dx : 20 - dx + SIZE[1]]


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def tree(tmp_path) -> Path:
    """Four pairs: colour visible, inverted infrared, registered."""
    for i, name in enumerate(("a", "b", "c", "d")):
        view = window(texture(i))
        save(tmp_path / f"v/{name}.png", np.stack([view, view // 2, view // 3], axis=2))
        save(tmp_path / f"i/{name}.png", 255 - view)
    return tmp_path


def report_of(tree: Path, **options) -> dict:
    report = verify.verify(f"folder:{tree}/v:{tree}/i", **options)
    assert report == json.loads(json.dumps(report))
    assert all("\n" not in line for line in (*report["problems"], *report["warnings"]))
    return report


def test_a_good_set_has_no_problems(tree):
    ticks: list[tuple[int, int]] = []
    report = report_of(tree, progress=lambda done, total: ticks.append((done, total)))
    assert report["problems"] == report["warnings"] == []
    assert (report["pairs"], report["groups"], report["sizes"]) == (4, 4, {"128x96": 4})
    assert (report["ir_bits"], report["ir_conversion"]) == ({"8": 4}, "unit:255")
    assert ticks == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert "no problems found" in verify.text(report)


def test_shifts_are_measured_with_the_kit_s_sign(tree):
    """Infrared that lies 3 px left and 2 px below must be moved by (+3, -2); inverted contrast must not matter."""
    for i, name in enumerate(("a", "b", "c", "d")):
        save(tree / f"i/{name}.png", 255 - window(texture(i), dx=-3, dy=2))
    shifts = report_of(tree)["registration"]
    assert shifts["measured"] == 4
    for row in shifts["pairs"]:
        assert (row["dx"], row["dy"]) == (pytest.approx(3, abs=0.5), pytest.approx(-2, abs=0.5))
    assert shifts["median_px"] == pytest.approx(np.hypot(3, 2), abs=0.5)
    assert sum(bar["pairs"] for bar in shifts["histogram"]) == 4


def fake_shifts(monkeypatch, values: dict[str, tuple[float, float, float]]) -> None:
    queue = iter([values[name] for name in sorted(values)])
    monkeypatch.setattr(spectral, "phase_correlation", lambda a, b, max_shift: next(queue))


def test_low_confidence_is_not_measured_and_left_out_of_the_medians(tree, monkeypatch):
    fake_shifts(monkeypatch, {"a": (3.0, 4.0, 6.0), "b": (20.0, 0.0, 5.99), "c": (0.0, 1.0, 9.0), "d": (0.0, 0.2, 8.0)})
    report = report_of(tree)
    shifts = report["registration"]
    assert (shifts["measured"], shifts["not_measured"]) == (3, 1)
    assert (shifts["median_px"], shifts["max_px"]) == (1.0, 5.0)
    assert shifts["pairs"][1]["px"] is None
    assert shifts["pairs"][1]["note"] == "not measured"
    bars = {bar["low"]: bar["pairs"] for bar in shifts["histogram"]}
    assert (bars[0.0], bars[1.0], bars[4.0], sum(bars.values())) == (1, 1, 1, 3)
    assert "3 measured, 1 not measured; median 1.00" in verify.text(report)


def test_unmeasurable_and_large_shifts_warn_but_are_no_problem(tree, monkeypatch):
    fake_shifts(monkeypatch, {"a": (30.0, 0.0, 9.0), "b": (0.0, 0.0, 1.0), "c": (0.0, 0.0, 1.0), "d": (0.0, 0.0, 1.0)})
    report = report_of(tree)
    assert report["problems"] == []
    assert "1 pairs are shifted by more than 8 px: a" in report["warnings"]
    assert any("shift of 3 pairs could not be measured" in line for line in report["warnings"])
    assert sum(bar["pairs"] for bar in report["registration"]["histogram"]) == 1  # 30 px is counted in the last bar


def test_nothing_measured_has_no_medians(tree, monkeypatch):
    fake_shifts(monkeypatch, dict.fromkeys("abcd", (0.0, 0.0, 1.0)))
    report = report_of(tree)
    assert "median_px" not in report["registration"]
    assert "0 measured, 4 not measured" in verify.text(report)


def test_registration_can_be_left_out(tree, monkeypatch):
    monkeypatch.setattr(spectral, "phase_correlation", None)
    report = report_of(tree, registration=False)
    assert report["registration"] is None
    assert "shift" not in verify.text(report)


def test_missing_partners_are_a_problem(tree):
    (tree / "i/b.png").unlink()
    report = report_of(tree)
    assert report["missing"] == ["b (no infrared)"]
    assert report["problems"] == ["1 pairs lack a file: b (no infrared)"]
    assert report["pairs"] == 3


def test_folders_without_one_common_name_are_a_problem_and_no_crash(tree):
    for path in (tree / "i").iterdir():
        path.rename(path.with_stem(f"other{path.stem}"))
    report = report_of(tree)
    assert report["pairs"] == 0 and len(report["missing"]) == 8
    assert "problem: 8 pairs lack a file" in verify.text(report)
    with pytest.raises(DataError, match="8 of 8 pairs lack a file: .* A pair is two files of one name"):
        layouts.load(f"folder:{tree}/v:{tree}/i")


def test_corrupt_and_truncated_files_are_listed_with_the_reason(tree):
    whole = (tree / "v/a.png").read_bytes()
    (tree / "v/a.png").write_bytes(whole[: len(whole) // 2])
    (tree / "i/c.png").write_bytes(b"no image")
    report = report_of(tree)
    assert [row["id"] for row in report["unreadable"]] == ["a", "c"]
    assert "v/a.png" in report["unreadable"][0]["reason"]
    assert report["problems"] == ["2 pairs cannot be read: a, c"]
    assert report["registration"]["measured"] == 2


def test_sizes_that_differ_are_a_problem(tree):
    save(tree / "i/d.png", np.zeros((10, 12), np.uint8))
    report = report_of(tree)
    assert report["size_mismatch"] == [{"id": "d", "visible": "128x96", "infrared": "12x10"}]
    assert report["problems"] == ["1 pairs differ in size: d (128x96 and 12x10)"]


def test_mixed_bit_depths_are_a_problem(tree):
    save(tree / "i/a.png", window(texture(0)).astype(np.uint16) * 200)
    report = report_of(tree)
    assert report["ir_bits"] == {"8": 3, "16": 1}
    assert report["problems"] == ["infrared images of several bit depths: 8 (3), 16 (1)"]


def test_copies_of_a_pair_are_a_problem(tree):
    for kind in "vi":
        shutil.copy(tree / kind / "a.png", tree / kind / "e.png")
    report = report_of(tree)
    assert report["duplicates"]["exact"] == [["a", "e"]]
    assert report["problems"] == ["1 sets of pairs are the same files: a = e"]
    assert report["duplicates"]["one_file"] == []


def test_one_file_in_two_pairs_is_a_warning(tree):
    shutil.copy(tree / "i/a.png", tree / "i/b.png")
    report = report_of(tree)
    assert report["duplicates"]["one_file"] == [{"modality": "infrared", "ids": ["a", "b"]}]
    assert report["problems"] == []
    assert "1 files serve several pairs: a = b (infrared)" in report["warnings"]


def test_look_alikes_in_different_groups_are_a_warning(tree):
    """The same scene with other noise: no equal bytes, but no independent group either."""
    view = np.clip(window(texture(0)).astype(int) + np.random.default_rng(1).integers(-9, 9, SIZE), 0, 255)
    save(tree / "v/e.png", np.stack([view, view // 2, view // 3], axis=2).astype(np.uint8))
    save(tree / "i/e.png", (255 - view).astype(np.uint8))
    report = report_of(tree)
    assert report["duplicates"]["near_across_groups"] == [["a", "e"]]
    assert report["warnings"] == ["1 look-alikes in different groups: a ~ e"]
    assert report["problems"] == []


def test_look_alikes_inside_a_group_are_only_counted(tree):
    view = window(texture(0))
    for name, brighter in (("s1", 0), ("s2", 1)):
        save(tree / f"v/{name}.png", np.stack([view // 2 + brighter, view // 2, view // 3], axis=2))
        save(tree / f"i/{name}.png", 250 - view // 2 + brighter)
    report = report_of(tree)
    assert report["duplicates"]["near_within_groups"] == 1


def test_one_image_as_both_modalities_is_a_problem(tree):
    save(tree / "v/a.png", window(texture(0)))
    save(tree / "i/a.png", window(texture(0)))
    assert report_of(tree)["problems"] == ["1 pairs hold one image as both modalities: a"]


def test_published_counts_warn_and_never_fail(tmp_path):
    for number in (1, 2):
        for kind in ("visible", "lwir"):
            path = tmp_path / f"images/set00/V000/{kind}/I{number:05d}.jpg"
            save(path, window(texture(number)))
    report = verify.verify(f"kaist:{tmp_path}", registration=False)
    assert any(line.startswith("2 pairs, none of the published counts: 95328 (all)") for line in report["warnings"])
    chosen = layouts.load(f"kaist:{tmp_path}")[:1]
    part = verify.verify(f"kaist:{tmp_path}", chosen, registration=False)
    assert part["pairs"] == 1
    assert not any("published" in line for line in part["warnings"])  # a sample is not the set


def test_an_empty_set_is_an_error_and_not_a_clean_report(tmp_path):
    for kind in "vi":
        (tmp_path / kind).mkdir()
    with pytest.raises(DataError, match="at least one pair, got 0"):
        verify.verify(f"folder:{tmp_path}/v:{tmp_path}/i")


def test_packed_pairs_are_compared_by_their_pixels(tmp_path, rng):
    (tmp_path / "images").mkdir()
    pixels = rng.integers(0, 256, (48, 64, 4)).astype(np.uint8)
    for name in ("00001D", "00100D", "00200D"):
        Image.fromarray(pixels).save(tmp_path / f"images/{name}.png")
        pixels = pixels if name == "00001D" else np.dstack([pixels[::-1, :, :3], pixels[..., 3]])
    report = verify.verify(f"mfnet:{tmp_path}", registration=False)
    assert report["duplicates"]["one_file"] == [{"modality": "infrared", "ids": ["00001D", "00200D"]}]
    assert report["duplicates"]["exact"] == [["00001D", "00100D"]]
    assert report["same_image"] == []


def test_thumbnails_are_block_means(rng):
    plane = rng.random((32, 48))
    expected = plane.reshape(16, 2, 16, 3).mean(axis=(1, 3))
    expected -= expected.mean()
    got = verify.thumb(plane).reshape(16, 16)
    np.testing.assert_allclose(got, expected / np.linalg.norm(expected), atol=1e-12)
    assert verify.thumb(np.ones((5, 7))).any() == np.False_


def test_real_pairs_agree_with_their_manifest(kit):
    """Every eighth pair: no problem, and where both are confident the shift is the manifest's within a pixel."""
    records = layouts.load(f"kit:{kit}")[::8]
    report = verify.verify(f"kit:{kit}", records)
    assert report["problems"] == []
    rows = {row["id"]: row for row in report["registration"]["pairs"]}
    apart = [
        np.hypot(rows[r.id]["dx"] - r.meta["est_shift_dx"], rows[r.id]["dy"] - r.meta["est_shift_dy"])
        for r in records
        if rows[r.id]["px"] is not None and r.meta["est_shift_conf"] >= verify.CONFIDENT
    ]
    assert len(apart) >= 25
    assert np.median(apart) < 1


@pytest.mark.parametrize("name", ["kaist", "flir", "mfnet:val"])
def test_real_samples_have_no_problems(benchmarks, name):
    layout, _, listing = name.partition(":")
    spec = f"{layout}:{benchmarks}/{layout}" + (f":{listing}" if listing else "")
    assert verify.verify(spec, registration=False)["problems"] == []
