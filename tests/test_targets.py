"""Annotated images as a network sees them: boxes and masks stay with their pixels, and come back to them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from freqkd_analysis.conditions import Geometry
from freqkd_train import annotations, config
from freqkd_train.targets import TargetSource

PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def painted(root: Path, sizes: list[tuple[int, int]], boxes: list[list[list[int]]]) -> str:
    """A COCO set of black images (width, height) with each box painted white; its specification."""
    images, marks = [], []
    for number, ((width, height), of_image) in enumerate(zip(sizes, boxes, strict=True)):
        pixels = np.zeros((height, width), np.uint8)
        for x, y, w, h in of_image:
            pixels[y : y + h, x : x + w] = 255
            marks.append({"id": len(marks), "image_id": number, "category_id": 1, "bbox": [x, y, w, h]})
        Image.fromarray(pixels).save(root / f"i{number}.png")
        images.append({"id": number, "file_name": f"i{number}.png", "width": width, "height": height})
    made = {"images": images, "annotations": marks, "categories": [{"id": 1, "name": "thing"}]}
    (root / "all.json").write_text(json.dumps(made))
    return f"coco:{root}:{root}/all.json"


def source(spec: str, size: tuple[int, int], flip: float = 0.0, **more) -> TargetSource:
    data = config.Data(size=size, geometry="pad", flip=flip)
    target = annotations.load(spec, "all", **more.pop("load", {}))
    return TargetSource(target, data, Geometry.make("pad", size, 4), 3, PLAIN, "image", **more)


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("size", [(48, 64), (40, 72), (33, 29)])
def test_boxes_lie_on_their_pixels(tmp_path, size, flip):
    """The mean inside each box is bright, that of a frame around it dark, whatever the size and mirror."""
    spec = painted(tmp_path, [(128, 96), (90, 96)], [[[16, 24, 40, 32]], [[8, 8, 24, 48], [56, 40, 24, 40]]])
    made = source(spec, size, flip)
    batch = made.batch([(0, 0), (0, 1)])
    for image, target in zip(batch["images"], batch["targets"], strict=True):
        light = image[0] / image.max()
        assert target["labels"].tolist() == [1] * len(target["boxes"])
        inside = torch.zeros_like(light, dtype=torch.bool)
        for x1, y1, x2, y2 in target["boxes"].round().long().tolist():
            assert light[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1].min() > 0.6
            inside[max(y1 - 2, 0) : y2 + 2, max(x1 - 2, 0) : x2 + 2] = True
        assert light[~inside].abs().max() < 0.2


def test_boxes_come_back_to_the_image_s_own_pixels(tmp_path):
    spec = painted(tmp_path, [(128, 96), (90, 96)], [[[16, 24, 40, 32]], [[8, 8, 24, 48]]])
    made = source(spec, (48, 64))
    for number, _ in enumerate(made.target.records):
        shown = made.plain([number])["targets"][0]["boxes"]
        x, y, w, h = made.target.truth.box[number]
        assert made.native(shown, number)[0].tolist() == pytest.approx([x, y, x + w, y + h], abs=1.0)
    width, height = made.size(1)
    rows, columns = made.content(1)
    corner = made.native(torch.tensor([[-5.0, -5.0, columns + 5.0, rows + 5.0]]), 1)
    assert corner.tolist() == [[0.0, 0.0, width, height]]


def test_batches_are_functions_of_seed_epoch_and_index(tmp_path):
    spec = painted(tmp_path, [(64, 48)] * 6, [[[4, 4, 20, 16]]] * 6)
    made = source(spec, (48, 64), flip=0.5)
    one, again = made.batch([(1, 2), (1, 4)]), made.batch([(1, 4), (1, 2)])
    assert one["images"][0].equal(again["images"][1]) and one["images"][1].equal(again["images"][0])
    mirrored = [made.batch([(epoch, 0)])["targets"][0]["boxes"][0, 0].item() > 10 for epoch in range(16)]
    assert 0 < sum(mirrored) < 16
    assert [numbers for numbers, _ in made.batches(4)] == [[0, 1, 2, 3], [4, 5]]


def test_an_image_without_boxes_has_an_empty_target(tmp_path):
    spec = painted(tmp_path, [(64, 48)] * 2, [[[4, 4, 20, 16]], []])
    target = source(spec, (48, 64)).plain([1])["targets"][0]
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_regions_to_ignore_are_no_boxes_to_learn_and_move_with_them(tmp_path, flip):
    spec = painted(tmp_path, [(64, 48)], [[[4, 4, 20, 16], [30, 20, 20, 16]]])
    content = json.loads((tmp_path / "all.json").read_text())
    content["annotations"][1]["iscrowd"] = 1
    (tmp_path / "all.json").write_text(json.dumps(content))
    target = source(spec, (48, 64), flip).batch([(0, 0)])["targets"][0]
    expected = ([[4, 4, 24, 20]], [[30, 20, 50, 36]])
    if flip:
        expected = tuple([[64 - x2, y1, 64 - x1, y2]] for ((x1, y1, x2, y2),) in expected)
    assert target["labels"].tolist() == [1]
    assert target["boxes"].tolist() == expected[0] and target["ignored"].tolist() == expected[1]


def mfnet(root: Path) -> str:
    """One four-channel pair: visible dark left and bright right, infrared the other way round; label 2 on the right."""
    for name in ("images", "labels"):
        (root / name).mkdir()
    pixels = np.zeros((48, 64, 4), np.uint8)
    pixels[:, 32:, :3], pixels[:, :32, 3] = 240, 240
    labels = np.zeros((48, 64), np.uint8)
    labels[:, 32:] = 2
    Image.fromarray(pixels, "RGBA").save(root / "images" / "00001D.png")
    Image.fromarray(labels).save(root / "labels" / "00001D.png")
    (root / "train.txt").write_text("00001D\n")
    return f"mfnet:{root}"


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_masks_move_with_both_modalities(tmp_path, flip):
    target = annotations.load(mfnet(tmp_path), "train")
    for modality, bright_on_label in (("ir", False), ("rgb", True)):
        data = config.Data(size=(48, 64), geometry="pad", flip=flip)
        made = TargetSource(target, data, Geometry.make("pad", (48, 64), 4), 0, PLAIN, "image", modality, PLAIN)
        batch = made.batch([(0, 0)])
        labelled = batch["masks"][0] == 2
        assert labelled.sum() == 48 * 32 and bool(labelled[0, 0]) == bool(flip)
        inside, outside = (batch["images"][0, 0][where].mean() for where in (labelled, ~labelled))
        assert bool(inside > outside) == bright_on_label
        # The teacher's image is the visible one, in the same view, whatever the student sees.
        assert batch["teacher"][0, 0][labelled].mean() > batch["teacher"][0, 0][~labelled].mean()
