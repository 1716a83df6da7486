"""Regions to ignore in the training of torchvision's detectors: what lies in one is no example of background.

The published protocols forgive a detection there; a detector that was trained to find nothing there is punished twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.ops import box_area

SHARE = 0.5
"""An anchor or proposal with this share of its own area in a region is left out: the overlap of the protocols."""
_BACKGROUND, _LEFT_OUT = 0, -1
Target = dict[str, Tensor]


def spare(detector: FasterRCNN | RetinaNet | FCOS) -> nn.Module:
    """The same detector, whose targets may hold "ignored" (n, 4), XYXY in px of the input, beside boxes and labels.

    What an object claims is learned all the same. Of the rest are spared: anchors and proposals with `SHARE` of their
    area in a region (Faster R-CNN, RetinaNet), points in a region (FCOS, which asks of a point no more to learn a box).
    """
    if isinstance(detector, FasterRCNN):
        _spare_two_stages(detector)
    else:
        _spare_one_stage(detector, _held if isinstance(detector, FCOS) else inside)
    return detector


def _spare_two_stages(detector: FasterRCNN) -> None:
    rpn: Any = detector.rpn
    heads: Any = detector.roi_heads
    of_anchors, of_proposals = rpn.assign_targets_to_anchors, heads.assign_targets_to_proposals
    regions: list[Tensor] = []

    def anchors(anchors_of: list[Tensor], targets: Sequence[Target]) -> Any:
        # The region head is given boxes and labels alone: it takes the regions of the forward that the RPN is in.
        regions[:] = _regions(targets)
        labels, boxes = of_anchors(anchors_of, targets)
        return _without(labels, anchors_of, regions), boxes

    def proposals(proposals_of: list[Tensor], boxes: list[Tensor], labels: list[Tensor]) -> Any:
        matched, found = of_proposals(proposals_of, boxes, labels)
        return matched, _without(found, proposals_of, regions)

    rpn.assign_targets_to_anchors, heads.assign_targets_to_proposals = anchors, proposals


def _spare_one_stage(detector: RetinaNet | FCOS, lies_in: Callable[[Tensor, Tensor], Tensor]) -> None:
    head: Any = detector.head
    of_loss = head.compute_loss

    def loss(targets: list[Target], outputs: Target, anchors: list[Tensor], matched: list[Tensor]) -> Any:
        left_out = [(found < 0) & lies_in(boxes, regions)
                    for found, boxes, regions in zip(matched, anchors, _regions(targets), strict=True)]  # fmt: skip
        # FCOS has no state between object and background: so sure a "no" costs nothing, and has no gradient.
        logits = outputs["cls_logits"]
        sure = logits.masked_fill(torch.stack(left_out)[:, :, None], torch.finfo(logits.dtype).min)
        return of_loss(targets, {**outputs, "cls_logits": sure}, anchors, matched)

    head.compute_loss = loss


def _regions(targets: Sequence[Target]) -> list[Tensor]:
    return [target.get("ignored", target["boxes"][:0]) for target in targets]


def _without(labels: Sequence[Tensor], boxes: Sequence[Tensor], regions: Sequence[Tensor]) -> list[Tensor]:
    return [torch.where((label == _BACKGROUND) & inside(box, region), _LEFT_OUT, label)
            for label, box, region in zip(labels, boxes, regions, strict=True)]  # fmt: skip


def inside(boxes: Tensor, regions: Tensor) -> Tensor:
    """(n,) whether a region holds at least `SHARE` of a box's area.

    Example:
        >>> inside(torch.tensor([[0.0, 0, 4, 4], [0, 0, 9, 9]]), torch.tensor([[2.0, 0, 8, 8]])).tolist()
        [True, True]
        >>> inside(torch.tensor([[0.0, 0, 4, 4]]), torch.zeros(0, 4)).tolist()
        [False]
    """
    near = torch.maximum(boxes[:, None, :2], regions[None, :, :2])
    far = torch.minimum(boxes[:, None, 2:], regions[None, :, 2:])
    shared = (far - near).clamp_min(0).prod(dim=2)
    return (shared >= SHARE * box_area(boxes)[:, None].clamp_min(1e-9)).any(dim=1)


def _held(boxes: Tensor, regions: Tensor) -> Tensor:
    """(n,) whether a region holds a box's centre."""
    centres = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
    return ((centres > regions[None, :, :2]) & (centres < regions[None, :, 2:])).all(dim=2).any(dim=1)
