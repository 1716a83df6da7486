"""Regions to ignore in the training of torchvision's Faster R-CNN: what lies in one is no example of background.

The published protocols forgive a detection there; a detector that was trained to find nothing there is punished twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.ops import box_area

SHARE = 0.5
"""An anchor or proposal with this share of its own area in a region is left out: the overlap of the protocols."""
_BACKGROUND, _LEFT_OUT = 0, -1


def spare(detector: FasterRCNN) -> FasterRCNN:
    """The same detector, whose targets may hold "ignored" (n, 4), XYXY in px of the input, beside boxes and labels."""
    rpn: Any = detector.rpn
    heads: Any = detector.roi_heads
    of_anchors, of_proposals = rpn.assign_targets_to_anchors, heads.assign_targets_to_proposals
    regions: list[Tensor] = []

    def anchors(anchors_of: list[Tensor], targets: Sequence[dict[str, Tensor]]) -> Any:
        # The region head is given boxes and labels alone: it takes the regions of the forward that the RPN is in.
        regions[:] = [target.get("ignored", target["boxes"][:0]) for target in targets]
        labels, boxes = of_anchors(anchors_of, targets)
        return _without(labels, anchors_of, regions), boxes

    def proposals(proposals_of: list[Tensor], boxes: list[Tensor], labels: list[Tensor]) -> Any:
        matched, found = of_proposals(proposals_of, boxes, labels)
        return matched, _without(found, proposals_of, regions)

    rpn.assign_targets_to_anchors, heads.assign_targets_to_proposals = anchors, proposals
    return detector


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
