"""Targets: the readers on synthetic trees against the renderer's own boxes and masks, policies, cleaning, the card."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from freqkd_analysis.data import listing, synthetic, verify, writers
from freqkd_analysis.errors import DataError, FreqkdError
from freqkd_train import annotation_files, annotations, kaist_annotations
from freqkd_train.annotations import AnnotationError, load
from freqkd_train.metrics.boxes import EVERY_CLASS

OPTIONS = "pairs=24,groups=8,size=160x128,night=0.5,shift=3:0"


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> dict[str, str]:
    """Synthetic scenes in three layouts: layout -> specification."""
    base = tmp_path_factory.mktemp("trees")
    return {layout: synthetic.write(base / layout, layout, OPTIONS) for layout in ("kaist", "flir", "mfnet")}


@pytest.fixture(scope="module")
def rendered() -> list:
    return [synthetic.render(record) for record in synthetic.records(OPTIONS)]


def coco_tree(root: Path, boxes: list[dict], categories: tuple[str, ...] = ("person", "car"), sizes=((64, 48),)) -> str:
    for number, size in enumerate(sizes):
        Image.new("L", size).save(root / f"f{number}.png")
    content = {
        "images": [{"id": n, "file_name": f"f{n}.png", "width": w, "height": h} for n, (w, h) in enumerate(sizes)],
        "categories": [{"id": n, "name": name} for n, name in enumerate(categories, 1)],
        "annotations": [{"image_id": 0, "category_id": 1, **box} for box in boxes],
    }
    (root / "train.json").write_text(json.dumps(content))
    return f"coco:{root}:{root}/train.json"


# --- the readers on synthetic trees ---


def test_a_rendered_set_says_so_and_is_not_held_against_published_counts(tmp_path):
    spec = synthetic.write(tmp_path / "k", "kaist", "pairs=6,groups=3,size=64x48")
    cards = [load(spec, split).card for split in ("train", "test")]
    assert all(card["warnings"] == [] for card in cards)
    assert verify.verify(spec, registration=False)["published"] == {}
    (tmp_path / "k" / listing.RENDERED).unlink()
    assert load(spec, "test").card["warnings"] == [f"{cards[1]['frames']} frames, published 2252"]
    assert verify.verify(spec, registration=False)["published"]


def test_kaist_boxes_are_the_renderer_s(trees, rendered):
    """Every person and cyclist, 1-based and whole px, with label and occlusion; nothing else, and no frame twice."""
    sides = [load(trees["kaist"], split) for split in ("train", "test")]
    want: dict[tuple, list] = {}
    for s in rendered:
        rows = [(label, *(round(float(v)) + (k < 2) for k, v in enumerate(box)), int(occlusion))
                for label, box, occlusion in zip(s.meta["labels"], s.meta["boxes"], s.meta["occlusion"], strict=True)
                if label in ("person", "cyclist")]  # fmt: skip
        want.setdefault((s.meta["time"], tuple(sorted(rows))), []).append(s.id)
    got: dict[tuple, int] = {}
    for side in sides:
        truth = side.truth
        assert truth.classes == ("person",) and (truth.sizes == (160, 128)).all()
        for n, record in enumerate(side.records):
            rows = np.flatnonzero(truth.image == n)
            found = [(truth.label[i], *truth.box[i].astype(int).tolist(), int(truth.occlusion[i])) for i in rows]
            got[record.time, tuple(sorted(found))] = got.get((record.time, tuple(sorted(found))), 0) + 1
            assert truth.ignore[rows].tolist() == [truth.label[i] != "person" for i in rows]
    assert got == {key: len(names) for key, names in want.items()}
    assert sum(len(key[1]) for key in want) > 40
    assert {r.group for r in sides[0].records}.isdisjoint(r.group for r in sides[1].records)


def test_flir_boxes_are_the_renderer_s_on_the_thermal_image(trees, rendered):
    sides = [load(trees["flir"], split) for split in ("train", "test")]
    records = [r for side in sides for r in side.records]
    assert [len(side.records) for side in sides] == [21, 3]
    by_order = dict(zip([r.id for r in sorted(records, key=lambda r: r.id)], rendered, strict=True))
    total = 0
    for side in sides:
        for n, record in enumerate(side.records):
            rows = np.flatnonzero(side.truth.image == n)
            got = sorted((side.classes[side.truth.category[i]], *side.truth.box[i].tolist()) for i in rows)
            assert got == _flir_truth(by_order[record.id])
            total += len(got)
    assert total > 60 and not any(side.truth.ignore.any() for side in sides)


def _flir_truth(s) -> list:
    rows = set()
    for label, (x, y, w, h) in zip(s.meta["labels"], s.meta["boxes_ir"].tolist(), strict=True):
        pieces = [(label, x, y, x + w, y + h)]
        if label == "cyclist":
            pieces = [("person", x, y, x + w, y + 0.85 * h), ("bicycle", x, y + 0.5 * h, x + w, y + h)]
        for name, *corners in pieces:
            x0, y0, x1, y1 = (
                float(round(min(max(v, 0), most))) for v, most in zip(corners, (159, 127) * 2, strict=True)
            )
            if x1 > x0 and y1 > y0:
                rows.add((name, x0, y0, x1 - x0, y1 - y0))
    return sorted(rows)


def test_mfnet_masks_and_boxes_of_masks_are_the_renderer_s(trees, rendered):
    by_time = {(s.meta["time"], writers.MFNET_IDS[s.meta["mask"]].tobytes()) for s in rendered}
    seen, pixels = 0, np.zeros(9, int)
    for split in ("train", "val", "test"):
        side, boxed = load(trees["mfnet"], split), load(trees["mfnet"], split, annotations="boxes")
        assert side.truth is None and boxed.masks is None
        for n, (record, path) in enumerate(zip(side.records, side.masks, strict=True)):
            mask = annotations.read_mask(path)
            assert (record.time, mask.tobytes()) in by_time
            pixels += np.bincount(mask.ravel(), minlength=9)
            rows = np.flatnonzero(boxed.truth.image == n)
            for i in rows:
                x, y, w, h = boxed.truth.box[i].astype(int)
                part = mask[y : y + h, x : x + w] == {"person": 2, "bike": 3, "car": 1}[boxed.truth.label[i]]
                assert part.any(0)[[0, -1]].all() and part.any(1)[[0, -1]].all()
        seen += len(side.records)
        assert side.card["pixels"]["person"] == sum((annotations.read_mask(p) == 2).sum() for p in side.masks)
    assert seen == len(rendered) and pixels[1] > 0 and pixels[2] > 0


def test_a_mask_value_above_8_names_file_and_value(trees, tmp_path):
    spec = synthetic.write(tmp_path / "set", "mfnet", "pairs=4,groups=4,size=64x48,night=0")
    target = load(spec, "train")
    Image.fromarray(np.full((48, 64), 9, np.uint8)).save(target.masks[0])
    with pytest.raises(AnnotationError, match=r"\.png holds the label 9; expected 0 to 8") as caught:
        load(spec, "train")
    assert target.masks[0].name in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 2
    target.masks[0].unlink()
    assert "1 images without label image are left out" in load(spec, "train").card["warnings"][0]


# --- policy ---


def test_policies_of_kaist(trees):
    plain = load(trees["kaist"], "train")
    cyclists = [label == "cyclist" for label in plain.truth.label]
    assert any(cyclists) and plain.truth.ignore.tolist() == cyclists and set(plain.truth.category) == {0}
    merged = load(trees["kaist"], "train", policy="cyclist=merge").truth
    assert not merged.ignore.any() and set(merged.category) == {0} and merged.label == plain.truth.label
    dropped = load(trees["kaist"], "train", policy="Cyclist=drop")
    assert "cyclist" not in dropped.truth.label and dropped.card["dropped_by_policy"] == sum(cyclists)
    trained = load(trees["kaist"], "train", policy="cyclist=train,people=merge:cyclist")
    assert trained.classes == ("person", "cyclist") and trained.truth.category.tolist() == [int(c) for c in cyclists]
    assert trained.card["policy"] == "person=train,people=merge:cyclist,person?=ignore,cyclist=train"


@pytest.mark.parametrize(
    "policy, message",
    [
        ("cyclst=merge", 'no label "cyclst" in this set. Did you mean "cyclist"?'),
        ("cyclist=mrege", 'Did you mean "merge"?'),
        ("cyclist", "expected LABEL=ACTION"),
        ("cyclist=merge:persn", 'no class "persn". Did you mean "person"?'),
        ("person=ignore", "leaves no class to train on"),
        ("cyclist=drop:person", "expected LABEL=ACTION"),
    ],
)
def test_wrong_policies_are_told_in_one_line(trees, policy, message):
    with pytest.raises(AnnotationError) as caught:
        load(trees["kaist"], "train", policy=policy)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_with_several_classes_a_region_is_for_every_class(tmp_path):
    boxes = [{"bbox": [1, 1, 5, 5]}, {"bbox": [9, 9, 5, 5], "category_id": 3},
             {"bbox": [20, 9, 5, 5], "category_id": 2, "iscrowd": 1}]  # fmt: skip
    truth = load(coco_tree(tmp_path, boxes, ("person", "car", "DontCare")), "train").truth
    assert truth.classes == ("person", "car")
    assert truth.category.tolist() == [0, EVERY_CLASS, 1] and truth.ignore.tolist() == [False, True, True]


# --- cleaning ---


def test_bad_boxes_are_counted_and_handled_as_said(tmp_path):
    boxes = [{"bbox": b} for b in ([1, 1, 5, 5], [1, 1, 5, 5], [3, 3, 0, 4], [3, 3, 4, -1], [3, 3, 0, 4],
                                   [-2, 40, 6, 20], [60, 30, 6, 5], [64, 0, 5, 5], [-9, 3, 9, 9])]  # fmt: skip
    boxes.append({"bbox": [1, 1, 5, 5], "category_id": 2})  # another label: no duplicate
    spec = coco_tree(tmp_path, boxes)
    clip = load(spec, "train")
    assert clip.truth.box.tolist() == [[1, 1, 5, 5], [0, 40, 4, 8], [60, 30, 4, 5], [1, 1, 5, 5]]
    told = {key: clip.card[key] for key in ("boxes_read", "zero_size", "duplicates", "outside", "boxes")}
    outside = {"rule": "clip", "partly": 2, "wholly": 2}
    assert told == {"boxes_read": 10, "zero_size": 3, "duplicates": 1, "outside": outside, "boxes": 4}
    assert load(spec, "train", edges="keep").truth.box[1].tolist() == [-2, 40, 6, 20]
    assert load(spec, "train", edges="drop").truth.box.tolist() == [[1, 1, 5, 5], [1, 1, 5, 5]]
    with pytest.raises(AnnotationError, match='Did you mean "clip"'):
        load(spec, "train", edges="clp")


def test_images_without_boxes_stay_and_sizes_are_the_image_s(tmp_path):
    spec = coco_tree(tmp_path, [{"bbox": [1, 1, 5, 5]}], sizes=((64, 48), (31, 17), (8, 8)))
    Image.new("L", (32, 24)).save(tmp_path / "f0.png")
    target = load(spec, "train")
    assert target.truth.sizes.tolist() == [[32, 24], [31, 17], [8, 8]]
    assert target.card["frames"] == 3 and target.card["frames_without_boxes"] == 2
    assert target.card["warnings"] == ["1 images are not of the size the annotations tell: f0 (64x48, image 32x24)"]
    empty = load(coco_tree(tmp_path, []), "train")
    assert empty.truth.box.shape == (0, 4) and empty.card["boxes"] == 0


# --- card, hash, subsets, classes ---


def test_the_card_is_json_and_the_hash_can_be_insisted_on(trees):
    target = load(trees["kaist"], "test")
    assert json.loads(json.dumps(target.card)) == target.card
    sha256 = target.card["annotation_sha256"]
    assert load(trees["kaist"], "test", annotations=f"original@{sha256[:12].upper()}").card == target.card
    with pytest.raises(AnnotationError, match="expected sha256 0123, got"):
        load(trees["kaist"], "test", annotations="original@0123")
    path = kaist_annotations.file(Path(trees["kaist"][6:]) / "annotations", target.records[0].id)
    text = path.read_text()
    path.write_text(text + "person 9 9 9 20 0 0 0 0 0 0 0\n")
    try:
        assert load(trees["kaist"], "test").card["annotation_sha256"] != sha256
    finally:
        path.write_text(text)


def test_a_subset_keeps_pictures_and_boxes_together(trees):
    whole = load(trees["flir"], "train")
    part = whole.take([5, 2])
    assert [r.id for r in part.records] == list(part.truth.names) == [whole.records[5].id, whole.records[2].id]
    assert part.truth.box[part.truth.image == 1].tolist() == whole.truth.box[whole.truth.image == 2].tolist()
    assert part.card["frames"] == 2 and part.card["subset"]["of"] == 21 and part.card["boxes"] == len(part.truth.image)
    assert part.card["subset"] != whole.take([2, 5]).card["subset"] and whole.card["frames"] == 21
    masks = load(trees["mfnet"], "train")
    assert masks.take([3]).masks == (masks.masks[3],)


def test_classes_that_do_not_match_are_named(tmp_path, trees):
    flir, kaist = load(trees["flir"], "train"), load(trees["kaist"], "test")
    annotations.same_classes(flir, load(trees["flir"], "test"))
    with pytest.raises(AnnotationError, match="flir-v1-aligned-xml-train alone has bicycle, car"):
        annotations.same_classes(flir, kaist)
    one, other = (load(coco_tree(tmp_path, [], names), "train") for names in (("a", "b"), ("b", "a")))
    with pytest.raises(AnnotationError, match="the order differs"):
        annotations.same_classes(one, other)


@pytest.mark.parametrize(
    "spec, split, error",
    [
        ("kasit:/data", "test", 'no annotated layout named "kasit". Did you mean "kaist"?'),
        ("synthetic:pairs=4", "test", "freqkd-analyze data synth"),
        ("kaist", "test", "expected kaist:ROOT[:LIST]"),
        ("coco:a", "train", "expected coco:IMAGES[:INFRARED]:JSON"),
        ("coco:a:b:c:d", "train", "expected coco:IMAGES[:INFRARED]:JSON"),
        ("kaist:/nowhere/at/all", "test", "no folder /nowhere/at/all"),
    ],
)
def test_wrong_specifications_are_told_in_one_line(spec, split, error):
    with pytest.raises(FreqkdError) as caught:
        load(spec, split)
    assert error in str(caught.value) and "\n" not in str(caught.value)


def test_a_wrong_split_and_set_name_what_there_is(trees):
    with pytest.raises(AnnotationError, match='no split "tset".*Did you mean "test"'):
        load(trees["kaist"], "tset")
    with pytest.raises(AnnotationError, match='no annotation set "improvd". Did you mean "improved"'):
        load(trees["kaist"], "test", annotations="improvd")
    with pytest.raises(AnnotationError, match="no sanitized annotations in .*looked for annotations_sanitized"):
        load(trees["kaist"], "train", annotations="sanitized")
    with pytest.raises(AnnotationError, match='no split "tain".*Known: train, validation, all'):
        load(trees["flir"], "tain")
    with pytest.raises(DataError, match='no list "trian"'):
        load(trees["mfnet"], "trian")


# --- the real kit ---


def test_the_improved_test_set_is_the_published_one_in_both_forms(benchmarks):
    root = benchmarks / "kaist"
    frames = (root / "imageSets" / "test-all-20.txt").read_text().split()
    rows = kaist_annotations.tabled(root / "test_annotations_improved.csv.gz", frames)
    labels = [mark.label for one in rows for mark in one.marks]
    assert (len(frames), len(labels)) == (2252, 4254)
    assert {label: labels.count(label) for label in set(labels)} == kaist_annotations._IMPROVED
    occlusion = [mark.occlusion for one in rows for mark in one.marks if mark.label == "person"]
    assert np.bincount(occlusion).tolist() == [2677, 480, 233]
    json_form = annotation_files.coco(root / "published_results" / "KAIST_annotation.json").images
    assert [image.name for image in json_form] == frames
    forms = ({f: one.marks for f, one in zip(frames, rows, strict=True)}, {i.name: i.marked.marks for i in json_form})
    for marks in forms:
        assert annotation_files.digest(marks, kaist_annotations.RULES) == kaist_annotations.IMPROVED_SHA256


@pytest.mark.parametrize(
    "spec, split, which, frames, boxes, regions",
    [
        ("kaist:{}/kaist", "test", "", 8, {"person": 51}, 6),
        ("kaist:{}/kaist", "test", "original", 8, {"person": 51}, 6),
        ("flir:{}/flir", "train", "annotations_coco", 77, None, 12),
        ("flir:{}/flir", "test", "", 22, {"person": 72, "bicycle": 6, "car": 73}, 0),
        ("flir:{}/flir", "test", "annotations_coco", 22, {"person": 72, "bicycle": 6, "car": 73}, 4),
        ("mfnet:{}/mfnet", "val", "boxes", 100, {"person": 219, "bike": 31, "car": 71}, 0),
        ("mfnet:{}/mfnet", "train", "boxes_rgbt", 100, {"person": 254, "bike": 37, "car": 144}, 0),
        ("hituav:{}/hit_uav", "val", "", 80, {"Person": 291, "Car": 228, "Bicycle": 114, "OtherVehicle": 4}, 0),
        ("hituav:{}/hit_uav", "train", "", 300, None, 60),
        ("coco:{0}/flir/images/{{split}}:{0}/flir/annotations/{{split}}.json", "val", "", 22,
         {"person": 85, "bicycle": 6, "car": 78}, 0),
        ("coco:{0}/mfnet/rgb:{0}/mfnet/thermal:{0}/mfnet/annotations/boxes_rgbt_val.json", "val", "", 100,
         {"person": 241, "bike": 28, "car": 85}, 0),
    ],
)  # fmt: skip
def test_the_kit_s_counts(benchmarks, spec, split, which, frames, boxes, regions):
    card = load(spec.format(benchmarks), split, annotations=which).card
    assert (card["frames"], card["ignore_regions"]) == (frames, regions)
    assert boxes is None or card["boxes_of_class"] == boxes


def test_the_kit_s_boxes_of_masks_are_those_of_its_json(benchmarks):
    """The json was made apart from this code."""
    ours, theirs = (load(f"mfnet:{benchmarks}/mfnet", "val", annotations=a) for a in ("boxes", "boxes_from_masks"))
    rows = [sorted((int(n), int(c), *b) for n, c, b in zip(t.image, t.category, t.box.tolist(), strict=True))
            for t in (ours.truth, theirs.truth)]  # fmt: skip
    assert rows[0] == rows[1] and len(rows[0]) == 321
