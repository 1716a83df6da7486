"""Regions to ignore: neither the proposals nor the region head learn that they are background."""

from __future__ import annotations

import pytest
import torch

from freqkd_train import detection, ignored
from freqkd_train.pyramid import Backbone


@pytest.fixture
def step():
    import timm

    network = timm.create_model("resnet10t", num_classes=0).eval()
    detector = detection.build("faster_rcnn", Backbone(network, (64, 64), channels=32), 2, hidden=16, regions=64)
    return detection.DetectionStep(detector, 0.0)


def watched(step, target):
    """The labels that the samplers of both heads were given."""
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, head in (("rpn", step.detector.heads.rpn), ("head", step.detector.heads.roi_heads)):

            def told(labels, sampler=head.fg_bg_sampler, name=name):
                seen[name] = [label.clone() for label in labels]
                return sampler(labels)

            patch.setattr(head, "fg_bg_sampler", told)
        torch.manual_seed(0)
        step({"ids": ["a"], "images": torch.randn(1, 3, 64, 64), "targets": [target]})
    return seen


def test_what_lies_in_a_region_is_no_example(step):
    box = {"boxes": torch.tensor([[4.0, 4, 20, 20]]), "labels": torch.tensor([1])}
    without = watched(step, box)
    region = torch.tensor([[32.0, 0, 64, 64]])
    within = watched(step, box | {"ignored": region})
    for name in ("rpn", "head"):
        before, after = without[name][0], within[name][0]
        assert before.shape == after.shape
        changed = before != after
        assert changed.any() and (before[changed] == 0).all() and (after[changed] == -1).all()
    # The box itself is learned, though the whole image be a region.
    everything = watched(step, box | {"ignored": torch.tensor([[0.0, 0, 64, 64]])})
    assert (everything["head"][0] == 1).any() and not (everything["head"][0] == 0).any()


def test_a_region_of_another_image_spares_nothing_here(step):
    boxes = torch.tensor([[0.0, 0, 8, 8]])
    labels = ignored._without([torch.zeros(1)] * 2, [boxes] * 2, [boxes, boxes[:0]])
    assert [label.tolist() for label in labels] == [[-1.0], [0.0]]


@pytest.mark.parametrize("x, expected", [(0.0, True), (3.9, True), (4.0, True), (4.1, False), (8.0, False)])
def test_half_of_the_box_s_own_area_is_the_edge(x, expected):
    box, region = torch.tensor([[x, 0.0, x + 8, 8]]), torch.tensor([[-50.0, -50, 8, 50]])
    assert ignored.inside(box, region).tolist() == [expected]
