"""Regions to ignore: no head of any detector learns that they are background."""

from __future__ import annotations

import pytest
import torch

from freqkd_train import detection, ignored
from freqkd_train.pyramid import Backbone


def made(kind):
    import timm

    network = timm.create_model("resnet10t", num_classes=0).eval()
    detector = detection.build(kind, Backbone(network, (64, 64), channels=32), 2, hidden=16, regions=64)
    return detection.DetectionStep(detector, 0.0)


@pytest.fixture
def step():
    return made("faster_rcnn")


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


def pulled(step, targets):
    """(B, N) whether the classification loss pulls at each anchor's logits, and the anchors (N, 4)."""
    seen = {}

    def keep(head, inputs, output):
        output["cls_logits"].retain_grad()
        seen["logits"] = output["cls_logits"]

    heads = step.detector.heads
    handles = [
        heads.head.register_forward_hook(keep),
        heads.anchor_generator.register_forward_hook(lambda m, i, output: seen.update(anchors=output[0])),
    ]
    torch.manual_seed(0)
    ids, images = [str(i) for i in range(len(targets))], torch.randn(len(targets), 3, 64, 64)
    loss = step({"ids": ids, "images": images, "targets": targets})["terms"]["classification"]
    loss.backward()
    for handle in handles:
        handle.remove()
    assert torch.isfinite(loss)
    return (seen["logits"].grad != 0).any(dim=2), seen["anchors"]


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_a_one_stage_detector_learns_nothing_of_an_object_in_a_region(kind):
    step = made(kind)
    box = {"boxes": torch.tensor([[4.0, 4, 20, 20]]), "labels": torch.tensor([1])}
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    region = torch.tensor([[32.0, 0, 64, 40]])
    before, anchors = pulled(step, [box, nothing])
    after, _ = pulled(step, [box | {"ignored": region}, nothing])
    if kind == "fcos":
        x, y = (anchors[:, :2] + anchors[:, 2:]).T / 2
        within = (x > 32) & (y < 40)
    else:
        near, far = anchors[:, :2].maximum(region[:, :2]), anchors[:, 2:].minimum(region[:, 2:])
        within = (far - near).clamp_min(0).prod(1) >= 0.5 * (anchors[:, 2:] - anchors[:, :2]).prod(1)
    assert before[:, within].all() and within.any() and not within.all()
    assert not after[0, within].any()
    assert torch.equal(after[0, ~within], before[0, ~within]) and after[1].all(), "the rest learns as before"
    # An object of its own is learned, though the whole image be a region.
    everything, _ = pulled(step, [box | {"ignored": torch.tensor([[0.0, 0, 64, 64]])}, nothing])
    assert 0 < everything[0].sum() < len(within) / 4


def test_a_region_of_another_image_spares_nothing_here(step):
    boxes = torch.tensor([[0.0, 0, 8, 8]])
    labels = ignored._without([torch.zeros(1)] * 2, [boxes] * 2, [boxes, boxes[:0]])
    assert [label.tolist() for label in labels] == [[-1.0], [0.0]]


@pytest.mark.parametrize("x, expected", [(0.0, True), (3.9, True), (4.0, True), (4.1, False), (8.0, False)])
def test_half_of_the_box_s_own_area_is_the_edge(x, expected):
    box, region = torch.tensor([[x, 0.0, x + 8, 8]]), torch.tensor([[-50.0, -50, 8, 50]])
    assert ignored.inside(box, region).tolist() == [expected]
