"""Every layout from a tree of tiny images: which pairs, which groups, day or night, and what is refused."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from freqkd_analysis.data import layouts
from freqkd_analysis.errors import DataError


def image(path: Path, size: tuple[int, int] = (8, 6), value: int = 100, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode != "RGB" else (value, value // 2, 0)).save(path)
    return path


def pair(root: Path, visible: str, infrared: str) -> None:
    image(root / visible)
    image(root / infrared, mode="L")


def loaded(spec: str) -> dict[str, tuple[str, str]]:
    """id -> (group, time), after every pair has been decoded."""
    records = layouts.load(spec)
    for record in records:
        sample = layouts.decode(record)
        assert sample.rgb.shape == (*sample.ir.shape, 3)
        assert record.meta["layout"] == spec.split(":")[0]
    return {record.id: (record.group, record.time) for record in records}


def test_folder_matches_by_name_and_tolerates_modality_endings(tmp_path):
    pair(tmp_path, "v/street_0019.jpg", "i/street_0019.png")
    pair(tmp_path, "v/street_0020_RGB.jpg", "i/street_0020_PreviewData.jpeg")
    pair(tmp_path, "v/gate.jpg", "i/gate_ir.bmp")
    (tmp_path / "v/Thumbs.db").write_bytes(b"x")
    assert loaded(f"folder:{tmp_path}/v:{tmp_path}/i") == {
        "gate": ("gate", ""),
        "street_0019": ("street_0000", ""),
        "street_0020": ("street_0020", ""),
    }


def test_endings_are_kept_where_they_tell_images_apart(tmp_path):
    for name in ("a_rgb", "a_ir"):
        pair(tmp_path, f"v/{name}.png", f"i/{name}.png")
    assert set(loaded(f"folder:{tmp_path}/v:{tmp_path}/i")) == {"a_rgb", "a_ir"}


def test_unmatched_names_are_counted_and_the_first_three_told(tmp_path):
    pair(tmp_path, "v/a.png", "i/a.png")
    for name in "bcd":
        image(tmp_path / f"v/{name}.png")
    image(tmp_path / "i/e.png")
    spec = f"folder:{tmp_path}/v:{tmp_path}/i"
    with pytest.raises(DataError, match=r"4 of 5 pairs lack a file: b \(no infrared\), c .*, d .* and 1 more") as error:
        layouts.load(spec)
    assert "\n" not in str(error.value)
    told: list[str] = []
    assert [record.id for record in layouts.load(spec, on_missing=told.extend)] == ["a"]
    assert told == ["b (no infrared)", "c (no infrared)", "d (no infrared)", "e (no visible)"]


def test_one_folder_for_both_or_two_files_of_one_name_are_refused(tmp_path):
    image(tmp_path / "v/a.png")
    with pytest.raises(DataError, match="expected two folders"):
        layouts.load(f"folder:{tmp_path}/v:{tmp_path}/v")
    image(tmp_path / "v/a.jpg")
    image(tmp_path / "i/a.png")
    with pytest.raises(DataError, match=r"share a name: .*a\.jpg and a\.png"):
        layouts.load(f"folder:{tmp_path}/v:{tmp_path}/i")


def test_csv_keeps_its_order_its_groups_and_further_columns(tmp_path):
    for name in ("x 1", "y,2"):
        pair(tmp_path, f"v/{name}.png", f"i/{name}.png")
    listing = tmp_path / "pairs.csv"
    listing.write_text('\ufeffrgb,ir,group,time,city\n"v/y,2.png","i/y,2.png",g,night,Bonn\nv/x 1.png,i/x 1.png,,,\n')
    assert loaded(f"csv:{listing}") == {"y,2": ("g", "night"), "x 1": ("x 0", "")}
    records = layouts.load(f"csv:{listing}")
    assert [record.id for record in records] == ["y,2", "x 1"]
    assert records[0].meta["city"] == "Bonn"


@pytest.mark.parametrize(
    ("content", "told"),
    [("visible,ir\na,b\n", "expected the columns rgb, ir, got visible, ir; add rgb"), ("", "got none"),
     ("rgb,ir\n", "at least one pair, got 0"), ("rgb,ir\na.png,\n", "line 2: expected a file name"),
     ("rgb,ir,id\na.png,a.png,k\nb.png,b.png,k\n", "1 ids name more than one pair: k"),
     ("rgb,ir\na.png,b.png\n", r"1 of 1 pairs lack a file: a \(no visible and no infrared\)")],
)  # fmt: skip
def test_csv_faults_are_told(tmp_path, content, told):
    (tmp_path / "p.csv").write_text(content)
    with pytest.raises(DataError, match=told):
        layouts.load(f"csv:{tmp_path}/p.csv")


def test_csv_of_another_encoding_is_told(tmp_path):
    (tmp_path / "p.csv").write_bytes("rgb,ir\nstraße.png,b.png\n".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        layouts.load(f"csv:{tmp_path}/p.csv")


def test_kit_takes_groups_from_its_manifest_and_shifts_as_numbers(tmp_path):
    for name in ("a", "b"):
        pair(tmp_path, f"visible/{name}.jpg", f"infrared/{name}.jpg")
    (tmp_path / "manifest.csv").write_text(
        "name,group,time,est_shift_px,est_shift_dx,source\nb,g1,day,1.5,-1.5,KAIST\na,g1,night,,,\n"
    )
    assert loaded(f"kit:{tmp_path}") == {"b": ("g1", "day"), "a": ("g1", "night")}
    b, a = layouts.load(f"kit:{tmp_path}")
    assert (b.meta["est_shift_px"], b.meta["est_shift_dx"], b.meta["source"]) == (1.5, -1.5, "KAIST")
    assert a.meta["est_shift_px"] is None


def kaist_tree(root: Path) -> Path:
    for place in ("set00/V001/{}/I00019", "set03/V000/{}/I00001", "set08/V000/{}/I00019", "set11/V001/{}/I00039"):
        pair(root, f"images/{place.format('visible')}.jpg", f"images/{place.format('lwir')}.jpg")
    return root


def test_kaist_groups_are_videos_and_sets_tell_the_light(tmp_path):
    assert loaded(f"kaist:{kaist_tree(tmp_path)}") == {
        "set00/V001/I00019": ("set00/V001", "day"),
        "set03/V000/I00001": ("set03/V000", "night"),
        "set08/V000/I00019": ("set08/V000", "day"),
        "set11/V001/I00039": ("set11/V001", "night"),
    }
    assert len(layouts.load(f"kaist:{tmp_path}/images")) == 4


def test_kaist_lists_choose_and_order_frames(tmp_path):
    kaist_tree(tmp_path)
    lists = tmp_path / "imageSets"
    lists.mkdir()
    (lists / "test.txt").write_text("set11/V001/I00039\nset08/V000/visible/I00019\n")
    (lists / "train.txt.gz").write_bytes(gzip.compress(b"set00/V001/I00019\n"))
    (lists / "more.txt").write_text("set08/V000/I00019\nset08/V009/I00001\n")
    (lists / "odd.txt").write_text("frame one\n")
    assert list(loaded(f"kaist:{tmp_path}:test")) == ["set11/V001/I00039", "set08/V000/I00019"]
    assert list(loaded(f"kaist:{tmp_path}:train")) == ["set00/V001/I00019"]
    with pytest.raises(DataError, match=r"1 of 2 pairs lack a file: set08/V009/I00001"):
        layouts.load(f"kaist:{tmp_path}:more")
    with pytest.raises(DataError, match='cannot read the entry "frame one"'):
        layouts.load(f"kaist:{tmp_path}:odd")
    with pytest.raises(DataError, match=r'no list "tests".*Did you mean "test.txt"'):
        layouts.load(f"kaist:{tmp_path}:tests")


def test_kaist_names_a_frame_without_partner(tmp_path):
    kaist_tree(tmp_path)
    (tmp_path / "images/set08/V000/lwir/I00019.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 4 pairs lack a file: set08/V000/I00019 \(no infrared\)"):
        layouts.load(f"kaist:{tmp_path}")


def test_flir_aligned_follows_its_lists_and_groups_runs_of_frames(tmp_path):
    base = tmp_path / "align/JPEGImages"
    numbers = [1, 41, 82, 100, 300, 301]
    for number in numbers:
        pair(base, f"FLIR_{number:05d}_RGB.jpg", f"FLIR_{number:05d}_PreviewData.jpeg")
    pair(base, "FLIR_video_00007_RGB.jpg", "FLIR_video_00007_PreviewData.jpeg")
    names = [f"FLIR_{number:05d}_PreviewData" for number in numbers]
    (tmp_path / "align/align_train.txt").write_text("\n".join([*names[:4], "FLIR_video_00007_PreviewData"]))
    (tmp_path / "align/align_validation.txt").write_text("FLIR_00300\nFLIR_00301.jpeg\n")
    assert loaded(f"flir:{tmp_path}") == {
        "FLIR_00001": ("FLIR_00001", ""), "FLIR_00041": ("FLIR_00001", ""),  # a gap of 40 goes on
        "FLIR_00082": ("FLIR_00082", ""), "FLIR_00100": ("FLIR_00082", ""),  # a gap of 41 ends a run
        "FLIR_00300": ("FLIR_00300", ""), "FLIR_00301": ("FLIR_00300", ""), "FLIR_video_00007": ("FLIR_video", ""),
    }  # fmt: skip
    assert Counter(r.meta["split"] for r in layouts.load(f"flir:{tmp_path}")) == {"train": 5, "validation": 2}
    assert len(layouts.load(f"flir:{tmp_path}/align")) == 7


def test_flir_runs_end_after_200_numbers(tmp_path):
    for number in range(1, 500, 30):
        pair(tmp_path, f"visible/train/FLIR_{number:05d}.jpg", f"infrared/train/FLIR_{number:05d}.jpeg")
    groups = Counter(group for group, _ in loaded(f"flir:{tmp_path}").values())
    assert groups == {"FLIR_00001": 7, "FLIR_00211": 7, "FLIR_00421": 3}


def test_flir_without_its_lists_is_told(tmp_path):
    pair(tmp_path, "align/JPEGImages/FLIR_00001_RGB.jpg", "align/JPEGImages/FLIR_00001_PreviewData.jpeg")
    with pytest.raises(DataError, match=r"no align_train\.txt or align_validation\.txt"):
        layouts.load(f"flir:{tmp_path}")


@pytest.mark.parametrize(
    ("visible", "infrared"),
    [("visible/{}/FLIR_00001.jpg", "infrared/{}/FLIR_00001.jpeg"),
     ("FLIR_ADAS_1_3/{}/RGB/FLIR_00001.jpg", "FLIR_ADAS_1_3/{}/thermal_8_bit/FLIR_00001.jpeg"),
     ("{}/RGB/FLIR_00001.jpg", "{}/PreviewData/FLIR_00001.jpeg")],
)  # fmt: skip
def test_flir_releases(tmp_path, visible, infrared):
    pair(tmp_path, visible.format("train"), infrared.format("train"))
    pair(tmp_path, visible.format("val").replace("00001", "09001"), infrared.format("val").replace("00001", "09001"))
    assert set(loaded(f"flir:{tmp_path}")) == {"FLIR_00001", "FLIR_09001"}


def test_flir_v2_pairs_videos_by_the_map_and_refuses_stills(tmp_path):
    image(tmp_path / "images_thermal_train/data/video-a-frame-000001-x.jpg", mode="L")
    image(tmp_path / "images_rgb_train/data/video-b-frame-000001-y.jpg")
    with pytest.raises(DataError, match="independent samples of two cameras and no pairs"):
        layouts.load(f"flir:{tmp_path}")
    mapping = {}
    for video, frame in (("aa", 2), ("aa", 1), ("bb", 1)):
        rgb, thermal = f"video-r{video}-frame-{frame:06d}-h1.jpg", f"video-{video}-frame-{frame:06d}-h2.jpg"
        pair(tmp_path, f"video_rgb_test/data/{rgb}", f"video_thermal_test/data/{thermal}")
        mapping[rgb] = thermal
    (tmp_path / "rgb_to_thermal_vid_map.json").write_text(json.dumps(mapping))
    assert loaded(f"flir:{tmp_path}") == {
        "video-aa-frame-000001-h2": ("video-aa", ""),
        "video-aa-frame-000002-h2": ("video-aa", ""),
        "video-bb-frame-000001-h2": ("video-bb", ""),
    }
    (tmp_path / "rgb_to_thermal_vid_map.json").write_text("[1]")
    with pytest.raises(DataError, match="no map of RGB to thermal"):
        layouts.load(f"flir:{tmp_path}")


def test_mfnet_four_channels_groups_and_lists(tmp_path, rng):
    (tmp_path / "images").mkdir()
    for name in ("00001D", "00019D", "00021N", "00001D_flip"):
        Image.fromarray(rng.integers(0, 256, (6, 8, 4)).astype(np.uint8)).save(tmp_path / f"images/{name}.png")
    (tmp_path / "val.txt").write_text("00021N\n00021N_flip\n")
    assert loaded(f"mfnet:{tmp_path}") == {
        "00001D": ("00000", "day"),
        "00019D": ("00000", "day"),
        "00021N": ("00020", "night"),
    }
    assert list(loaded(f"mfnet:{tmp_path}:val")) == ["00021N"]
    pixels = np.asarray(Image.open(tmp_path / "images/00019D.png"))
    sample = layouts.decode(layouts.load(f"mfnet:{tmp_path}")[1])
    np.testing.assert_array_equal(np.rint(sample.ir * 255), pixels[..., 3])
    np.testing.assert_array_equal(np.rint(sample.rgb * 255), pixels[..., :3])


@pytest.mark.parametrize("folders", [("RGB", "Thermal"), ("rgb", "thermal")])
def test_mfnet_two_folders(tmp_path, folders):
    pair(tmp_path, f"{folders[0]}/00100D.png", f"{folders[1]}/00100D.jpg")
    assert loaded(f"mfnet:{tmp_path}") == {"00100D": ("00100", "day")}


def test_llvip_m3fd_msrs(tmp_path):
    for split, name in (("train", "010001"), ("test", "190001")):
        pair(tmp_path, f"llvip/visible/{split}/{name}.jpg", f"llvip/infrared/{split}/{name}.jpg")
    assert loaded(f"llvip:{tmp_path}/llvip") == {"010001": ("scene_01", ""), "190001": ("scene_19", "")}
    pair(tmp_path, "m3fd/M3FD_Detection/Vis/00041.png", "m3fd/M3FD_Detection/Ir/00041.png")
    pair(tmp_path, "tardal/vi/00041.png", "tardal/ir/00041.png")
    for root in ("m3fd", "tardal"):
        assert loaded(f"m3fd:{tmp_path}/{root}") == {"00041": ("00040", "")}
    pair(tmp_path, "msrs/train/vi/00001D.png", "msrs/train/ir/00001D.png")
    pair(tmp_path, "msrs/test/vi/00033N.png", "msrs/test/ir/00033N.png")
    assert loaded(f"msrs:{tmp_path}/msrs") == {"00001D": ("00000", "day"), "00033N": ("00020", "night")}


def test_two_sizes_in_one_pair_are_told_with_both(tmp_path):
    image(tmp_path / "v/a.png", size=(8, 6))
    image(tmp_path / "i/a.png", size=(5, 4), mode="L")
    record = layouts.load(f"folder:{tmp_path}/v:{tmp_path}/i")[0]
    with pytest.raises(DataError, match="pair a differs in size: visible 8x6, infrared 5x4"):
        layouts.decode(record)
    assert layouts.read(record, "unit:255").ir.shape == (4, 5)


def test_conversion_is_resolved_once_for_the_set(tmp_path):
    for name, counts in (("a", 7000), ("b", 9000)):
        image(tmp_path / f"v/{name}.png")
        (tmp_path / "i").mkdir(exist_ok=True)
        Image.fromarray(np.full((6, 8), counts, np.uint16)).save(tmp_path / f"i/{name}.tiff")
    records = layouts.load(f"folder:{tmp_path}/v:{tmp_path}/i")
    conversion = layouts.resolve_conversion(records)
    assert conversion == "range:7000:9000"
    samples = [layouts.decode(record, conversion) for record in records]
    assert [float(sample.ir.mean()) for sample in samples] == [0.0, 1.0]
    assert samples[0].meta["ir_conversion"] == "range:7000:9000"
    assert samples[0].meta["ir_bits"] == 16
    assert layouts.resolve_conversion(records, "image") == "image"
    with pytest.raises(DataError, match="LO below HI"):
        layouts.resolve_conversion(records, "range:5:5")


@pytest.mark.parametrize(
    ("spec", "told"),
    [("kiast:/x", 'Did you mean "kaist"'), ("kaist", r"expected kaist:ROOT\[:LIST\]"),
     ("folder:/a", "expected folder:VIS:IR"), ("folder:/a:/b:/c", "3 parts"), ("csv:/none.csv", "no list /none.csv"),
     ("", "no data layout named")],
)  # fmt: skip
def test_wrong_specs_are_one_line(spec, told):
    with pytest.raises(DataError, match=told) as error:
        layouts.load(spec)
    assert "\n" not in str(error.value)


def test_a_missing_folder_is_met_with_its_like_and_not_with_any_short_name(tmp_path):
    for name in ("opt", "KAIST"):
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=rf"no folder {tmp_path}/nope\. Check the path"):
        layouts.load(f"kaist:{tmp_path}/nope")
    with pytest.raises(DataError, match='Did you mean "KAIST"'):
        layouts.load(f"kaist:{tmp_path}/KAITS")


@pytest.mark.parametrize("name", sorted(set(layouts.LAYOUTS) - {"synthetic", "folder", "csv"}))
def test_missing_and_empty_folders_are_one_line(tmp_path, name):
    (tmp_path / "here").mkdir()
    for folder in ("her", "here"):
        with pytest.raises(DataError, match=str(tmp_path)) as error:
            layouts.load(f"{name}:{tmp_path}/{folder}")
        assert "\n" not in str(error.value)


def test_a_bare_path_is_met_with_the_layout_that_fits_it(tmp_path):
    with pytest.raises(DataError, match=f"folder:{tmp_path}:INFRARED"):
        layouts.load(str(tmp_path))
    (tmp_path / "manifest.csv").touch()
    with pytest.raises(DataError, match=f"kit:{tmp_path}"):
        layouts.load(str(tmp_path))


def test_descriptions_carry_the_published_counts():
    for layout in layouts.LAYOUTS.values():
        assert layout.about
        assert layout.usage
    assert "95,328" in layouts.LAYOUTS["kaist"].about
    assert 1569 in layouts.LAYOUTS["mfnet"].published


def test_synthetic_pairs_need_no_files():
    records = layouts.load("synthetic")
    sample = layouts.decode(records[0], layouts.resolve_conversion(records))
    assert sample.rgb.shape == (*sample.ir.shape, 3)
    assert len({record.id for record in records}) == len(records)


@pytest.mark.parametrize(
    ("spec", "pairs", "groups", "day", "night"),
    [("kit:{}/pairs", 516, 104, 226, 290), ("kaist:{}/benchmarks/kaist", 8, 6, 3, 5),
     ("kaist:{}/benchmarks/kaist:sample-8", 8, 6, 3, 5), ("flir:{}/benchmarks/flir", 99, 41, 0, 0),
     ("mfnet:{}/benchmarks/mfnet", 200, 66, 86, 114), ("mfnet:{}/benchmarks/mfnet:val", 100, 40, 43, 57)],
)  # fmt: skip
def test_real_sets(real_data, spec, pairs, groups, day, night):
    records = layouts.load(spec.format(real_data / "data"))
    lights = Counter(record.time for record in records)
    assert (len(records), len({r.group for r in records}), lights["day"], lights["night"]) == (
        pairs,
        groups,
        day,
        night,
    )
    for record in records[:: max(1, len(records) // 5)]:
        sample = layouts.decode(record, layouts.resolve_conversion(records))
        assert sample.rgb.shape == (*sample.ir.shape, 3)
        assert 0 <= sample.ir.min() < sample.ir.max() <= 1
        assert sample.meta["visible_is_grey"] is False


def test_a_real_list_with_few_of_its_frames_is_told(benchmarks):
    with pytest.raises(DataError, match="2244 of 2252 pairs lack a file"):
        layouts.load(f"kaist:{benchmarks}/kaist:test-all-20")
