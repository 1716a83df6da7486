"""The layouts that the renderer does not write, as small trees: names, splits, what is left out and told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from freqkd_analysis.errors import FreqkdError
from freqkd_train.annotations import AnnotationError, load

BBGT = "% bbGt version=3\n"
XML = "<annotation><size><width>64</width><height>48</height></size>{}</annotation>"
OBJECT = "<object><name>{}</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>11</xmax><ymax>22</ymax></bndbox></object>"


def image(path: Path, pixels: int | np.ndarray = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    plane = np.full((48, 64), pixels, np.uint8) if isinstance(pixels, int) else pixels
    Image.fromarray(plane).save(path)
    return path


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def xml(path: Path, *labels: str) -> Path:
    return text(path, XML.format("".join(OBJECT.format(label) for label in labels)))


def coco(path: Path, boxes: dict[str, list[str]], images="images", name="file_name", listed="annotations") -> Path:
    """Boxes (image -> labels) as json, ids from 0."""
    labels = sorted({label for found in boxes.values() for label in found})
    rows = [{"image_id": n, "category_id": labels.index(label), "bbox": [1, 2, 10, 20]}
            for n, found in enumerate(boxes.values()) for label in found]  # fmt: skip
    content = {images: [{"id": n, name: file} for n, file in enumerate(boxes)], listed: rows,
               "categories": [{"id": n, "name": label} for n, label in enumerate(labels)]}  # fmt: skip
    return text(path, json.dumps(content))


def refused(message: str, *call: str, **options: str) -> None:
    with pytest.raises(FreqkdError) as caught:
        load(*call, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 2


# --- KAIST ---


@pytest.fixture
def kaist(tmp_path) -> Path:
    """Eleven frames of two videos; lists of some."""
    for frame in (1, 2, 3, 19, 39):
        for kind in ("visible", "lwir"):
            image(tmp_path / f"images/set00/V000/{kind}/I{frame:05d}.jpg")
            image(tmp_path / f"images/set09/V001/{kind}/I{frame:05d}.jpg")
    return tmp_path


def test_kaist_without_lists_goes_by_their_rules(kaist):
    for video in ("set00/V000", "set09/V001"):
        for frame in (1, 2, 3, 19, 39):
            text(kaist / f"annotations/{video}/I{frame:05d}.txt", f"{BBGT}person {frame} 6 20 50 0 0 0 0 0 0 0\n")
    train, test = load(f"kaist:{kaist}", "train"), load(f"kaist:{kaist}", "test")
    assert train.card["split"] == "train-all-02" and [r.id[-2:] for r in train.records] == ["01", "03", "19", "39"]
    assert test.card["split"] == "test-all-20" and list(test.truth.names) == [f"set09/V001/I000{n}" for n in (19, 39)]
    assert test.truth.times == ("night",) * 2 and test.truth.groups == ("set09/V001",) * 2
    assert test.truth.box[:, 0].tolist() == [19, 39] and test.card["annotation_set"] == "original"
    assert len(load(f"kaist:{kaist}", "all").records) == 10


def test_kaist_sets_are_found_by_name_and_in_every_form(kaist):
    text(kaist / "annotations_sanitized/set00_V000_I00001.txt", f"{BBGT}person 1 6 20 50 0\n")
    xml(kaist / "annotations_sanitized/set00/V000/I00019.xml", "people")
    text(kaist / "annotations_paired/set00/V000/visible/I00003.txt", f"{BBGT}person 9 9 9 9 0\n")
    text(kaist / "annotations_paired/set00/V000/lwir/I00003.txt", f"{BBGT}person 3 6 20 50 0\n")
    clean = load(f"kaist:{kaist}", "train")
    assert clean.card["annotation_set"] == "sanitized" and [r.id[-2:] for r in clean.records] == ["01", "19"]
    assert clean.truth.ignore.tolist() == [False, True]
    assert "2 images without annotation are left out: set00/V000/I00003" in clean.card["warnings"][0]
    assert "2 frames, published 7601" in clean.card["warnings"]
    assert load(f"kaist:{kaist}", "train", annotations="paired").truth.box.tolist() == [[3, 6, 20, 50]]
    refused("no improved or original annotations in", f"kaist:{kaist}", "test")
    refused("test_annotations_improved.csv", f"kaist:{kaist}", "test")


def test_kaist_improved_table_knows_empty_frames_and_no_others(kaist):
    text(kaist / "test_annotations_improved.csv",
         "frame,label,x,y,w,h,occlusion\nset09/V001/I00019,person,640,6,9,50,1\n")  # fmt: skip
    text(kaist / "imageSets/odd.txt", "set09/V001/I00019\nset09/V001/I00039\nset09/V001/I00001\nset00/V000/I00001\n")
    found = load(f"kaist:{kaist}:odd", "test")
    assert list(found.truth.names) == ["set09/V001/I00019", "set09/V001/I00039"] and found.card["split"] == "odd"
    assert found.card["frames_without_boxes"] == 2 and found.card["outside"]["wholly"] == 1
    assert "1 images without annotation are left out: set09/V001/I00001" in found.card["warnings"]
    text(kaist / "imageSets/early.txt", "set00/V000/I00001\n")
    refused("early holds none of sets 06 to 11", f"kaist:{kaist}:early", "test")


def test_a_list_that_is_whole_is_compared_with_the_published_boxes(kaist, monkeypatch):
    from freqkd_train import kaist_annotations

    monkeypatch.setattr(kaist_annotations, "_FRAMES", {"test-all-20": 2})
    for frame in (19, 39):
        text(kaist / f"annotations_improved/set09/V001/I{frame:05d}.txt", f"{BBGT}person 5 6 20 50 0\n")
    card = load(f"kaist:{kaist}", "test").card
    assert card["warnings"][0].startswith("boxes differ from the published counts: person 2 (published 3390)")
    assert card["warnings"][1].startswith("the boxes are not those of the improved set: sha256 ")


def test_the_improved_boxes_are_known_by_their_content_in_a_folder_of_another_name(kaist, monkeypatch):
    from freqkd_train import kaist_annotations

    for frame in (19, 39):
        text(kaist / f"annotations/set09/V001/I{frame:05d}.txt", f"{BBGT}person 5 6 20 50 0\n")
    card = load(f"kaist:{kaist}", "test").card
    assert card["annotation_set"] == "original"
    monkeypatch.setattr(kaist_annotations, "IMPROVED_SHA256", card["annotation_sha256"])
    assert load(f"kaist:{kaist}", "test").card["annotation_set"] == "improved"


# --- FLIR ---


def test_flir_v2_takes_test_from_the_videos_and_train_from_the_stills(tmp_path):
    name = "data/video-{}-frame-000{}-abc.jpg"
    for part, video in (("images_thermal_train", "x1"), ("video_thermal_test", "y2")):
        frames = {name.format(video, n): ["car", "other vehicle"] if n == 1 else [] for n in (1, 2)}
        coco(tmp_path / part / "coco.json", frames)
        for frame in frames:
            image(tmp_path / part / frame)
    train, test = load(f"flir:{tmp_path}", "train"), load(f"flir:{tmp_path}", "test")
    assert train.classes == test.classes and len(train.classes) == 15 and train.classes[2] == "car"
    assert train.truth.groups == ("video-x1",) * 2 and test.truth.groups == ("video-y2",) * 2
    assert [train.classes[c] for c in train.truth.category] == ["car", "other vehicle"]
    assert train.records[0].rgb == train.records[0].ir and train.card["groups_are"] == "sequences"
    refused("looked for images_thermal_val/coco.json", f"flir:{tmp_path}", "val")


def test_flir_aligned_ignores_dogs_and_leaves_out_frames_without_xml(tmp_path):
    align = tmp_path / "align"
    for n in (1, 2):
        image(align / f"JPEGImages/FLIR_0000{n}_RGB.jpg")
        image(align / f"JPEGImages/FLIR_0000{n}_PreviewData.jpeg")
    text(align / "align_validation.txt", "FLIR_00001_PreviewData\nFLIR_00002_PreviewData\n")
    refused("none of the 2 images is annotated; looked for", f"flir:{tmp_path}", "test")
    xml(align / "Annotations/FLIR_00001_PreviewData.xml", "dog", "car", "lorry")
    found = load(f"flir:{tmp_path}", "test")
    assert found.truth.label == ("dog", "car", "lorry") and found.truth.ignore.tolist() == [True, False, True]
    assert found.card["warnings"][0] == "1 images without annotation are left out: FLIR_00002"
    assert "labels without a rule are ignored: lorry" in found.card["warnings"]
    dropped = load(f"flir:{tmp_path}", "test", policy="dog=drop,car=merge:person").truth
    assert dropped.label == ("car", "lorry") and dropped.classes == ("person", "bicycle")
    refused('no annotation set "nothing"', f"flir:{tmp_path}", "test", annotations="nothing")


# --- MSRS, LLVIP, M3FD ---


def test_msrs_has_masks_boxes_of_masks_and_yolo_text(tmp_path):
    labels = np.zeros((48, 64), np.uint8)
    labels[8:20, 10:16] = 2
    for split, name in (("train", "00001D"), ("train", "00022N"), ("test", "00100N")):
        for folder in ("vi", "ir"):
            image(tmp_path / split / folder / f"{name}.png")
        image(tmp_path / split / "Segmentation_labels" / f"{name}.png", labels)
    text(tmp_path / "train/labels/00001D.txt", "0 0.5 0.5 0.25 0.5\n1 0.5 0.5 0.1 0.1\n2 0.25 0.25 0.1 0.1")
    text(tmp_path / "train/labels/00022N.txt", "")
    spec = f"msrs:{tmp_path}"
    masks = load(spec, "train")
    assert masks.card["pixels"]["person"] == 2 * 72 and masks.classes[2] == "person" and masks.card["light"] == {
        "day": 1, "night": 1}  # fmt: skip
    boxes = load(spec, "test", annotations="boxes").truth
    assert boxes.box.tolist() == [[10, 8, 6, 12]] and boxes.label == ("person",)
    yolo = load(spec, "train", annotations="yolo")
    assert yolo.classes == ("person", "bike", "car") and yolo.truth.box[0].tolist() == [24, 12, 16, 24]
    assert yolo.truth.category.tolist() == [0, 1, 2] and yolo.card["frames_without_boxes"] == 1
    assert len(load(spec, "all").records) == 3
    refused("detection_labels/#####D.txt", spec, "test", annotations="yolo")
    refused('no split "tset"', spec, "tset")


def test_llvip_has_one_xml_for_both_images(tmp_path):
    for split, name in (("train", "010001"), ("test", "190001")):
        for folder in ("visible", "infrared"):
            image(tmp_path / folder / split / f"{name}.jpg")
        xml(tmp_path / f"Annotations/{name}.xml", "person", "person")
    test = load(f"llvip:{tmp_path}", "test")
    assert test.truth.groups == ("scene_19",) and test.classes == ("person",) and test.card["duplicates"] == 1
    assert test.card["warnings"] == ["1 frames, published 3463"] and test.card["box_source"] == "both"


def test_m3fd_has_no_official_split(tmp_path):
    base = tmp_path / "M3FD_Detection"
    for n in range(3):
        for folder in ("Vis", "Ir"):
            image(base / folder / f"0000{n}.png")
        xml(base / f"Annotation/0000{n}.xml", "People", "Lamp")
    assert load(f"m3fd:{tmp_path}", "all").card["boxes_of_class"]["Lamp"] == 3
    refused("M3FD has no official split", f"m3fd:{tmp_path}", "test")
    text(base / "meta/test.txt", "00002.png\n00000.png\n")
    assert list(load(f"m3fd:{tmp_path}", "test").truth.names) == ["00000", "00002"]


# --- HIT-UAV, json ---


def test_hit_uav_json_is_not_plain_coco(tmp_path):
    base = tmp_path / "normal_json"
    frames = {"0_100_30_0_03309.jpg": ["Person", "DontCare"], "1_60_90_0_00040.jpg": []}
    coco(base / "annotations/test.json", frames, name="filename", listed="annotation")
    for frame in frames:
        image(base / "test" / frame)
    test = load(f"hituav:{tmp_path}", "test")
    assert test.classes == ("Person", "Car", "Bicycle", "OtherVehicle") and test.truth.times == ("day", "night")
    assert test.truth.category.tolist() == [-1, 0] or test.truth.category.tolist() == [0, -1]
    assert sorted(zip(test.truth.label, test.truth.ignore.tolist(), strict=True)) == [
        ("DontCare", True),
        ("Person", False),
    ]
    refused("looked for", f"hituav:{tmp_path}", "val")


def test_json_of_pairs_matches_names_without_modality_and_ending(tmp_path):
    for name in ("a", "b", "c"):
        image(tmp_path / f"vis/{name}_RGB.png")
        image(tmp_path / f"ir/{name}_IR.jpg")
    coco(tmp_path / "train.json", {"b_IR.jpeg": ["car"], "a.png": [], "z.png": ["car"]})
    pairs = load(f"coco:{tmp_path}/vis:{tmp_path}/ir:{tmp_path}/{{split}}.json", "train")
    assert [r.id for r in pairs.records] == ["b", "a"] and pairs.truth.image.tolist() == [0]
    assert pairs.records[0].ir.name == "b_IR.jpg" and "1 listed images are not there" in pairs.card["warnings"][0]
    assert pairs.card["annotation_set"] == "{split}.json"
    alone = load(f"coco:{tmp_path}/ir:{tmp_path}/train.json", "train")
    assert [r.rgb for r in alone.records] == [r.ir for r in alone.records] == [r.ir for r in pairs.records]
    (tmp_path / "none").mkdir()
    refused("none of the 3 images of the json lies in", f"coco:{tmp_path}/none:{tmp_path}/train.json", "train")


def test_images_that_cannot_be_read_are_named(tmp_path):
    coco(tmp_path / "train.json", {"a.png": ["car"]})
    text(tmp_path / "a.png", "no image")
    with pytest.raises(AnnotationError, match=r"a\.png cannot be read as an image"):
        load(f"coco:{tmp_path}:{tmp_path}/train.json", "train")
