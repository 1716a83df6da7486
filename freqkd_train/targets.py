"""Batches of infrared images with their boxes or masks, for fine-tuning and for evaluation.

As `pairs.PairSource`: a batch is a function of (seed, epoch, index). The whole image is shown (geometry `pad`), so that
no object is cut off by the input alone, and `native` brings boxes of the input back to the image's own pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freqkd_analysis.conditions import Geometry
from freqkd_train import annotations as annotated
from freqkd_train import config, pairs, transforms
from freqkd_train.pairs import Stats
from freqkd_train.transforms import View

Key = tuple[int, int]
_GEOMETRY, _LIGHT = 0, 1


@dataclass(frozen=True)
class TargetSource:
    """Images of a target, moved, changed and normalised, with boxes (labels from 1) or masks.

    modality: `ir`, or `rgb` for a reference detector. stats: mean and deviation of the network. teacher_stats: adds the
    visible image under `teacher`, for response distillation. seed: of mirror, crop and photometry.

    A batch is {"ids", "images": (B, 3, H, W), and of what the target has: "targets": list of {"boxes": (n, 4) XYXY px
    of the input, "labels": (n,), "ignored": (m, 4) regions to ignore}, "masks": (B, H, W)}.
    """

    target: annotated.Target
    data: config.Data
    geometry: Geometry
    seed: int
    stats: Stats
    conversion: str
    modality: str = "ir"
    teacher_stats: Stats | None = None

    def __len__(self) -> int:
        return len(self.target.records)

    def batch(self, keys: Sequence[Key]) -> dict[str, Any]:
        """The samples of these (epoch, index), in this order."""
        return self._stacked([(index, self._rngs(epoch, index)) for epoch, index in keys])

    def plain(self, numbers: Sequence[int]) -> dict[str, Any]:
        """These images without random change."""
        return self._stacked([(number, None) for number in numbers])

    def batches(self, size: int) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """All images in order, `size` at a time: their numbers and the batch."""
        for start in range(0, len(self), size):
            numbers = list(range(start, min(start + size, len(self))))
            yield numbers, self.plain(numbers)

    def _rngs(self, epoch: int, index: int) -> tuple[np.random.Generator, np.random.Generator]:
        a, b = (np.random.default_rng([self.seed, epoch, index, stream]) for stream in (_GEOMETRY, _LIGHT))
        return a, b

    def _stacked(self, wanted: Sequence[tuple[int, Any]]) -> dict[str, Any]:
        found = pairs.mapped(lambda item: self._sample(*item), wanted, self.data.workers)
        batch: dict[str, Any] = {"ids": [one["id"] for one in found]}
        for name in ("images", "teacher", "masks"):
            if name in found[0]:
                batch[name] = torch.stack([one[name] for one in found])
        if "target" in found[0]:
            batch["targets"] = [one["target"] for one in found]
        return batch

    def _sample(self, number: int, rngs: tuple[np.random.Generator, np.random.Generator] | None) -> dict[str, Any]:
        record = self.target.records[number]
        decoded = pairs.decoded(record, self.conversion)
        boxes, labels = self._boxes(number)
        mask = self._mask(number)
        sample = transforms.joint(decoded.rgb, decoded.ir, boxes, labels, mask)
        view = View() if rngs is None else transforms.draw(self.data, rngs[0])
        seen = transforms.apply(view, self.geometry, sample)
        rgb, ir = seen.rgb.as_subclass(Tensor), seen.ir.as_subclass(Tensor).expand(3, -1, -1)
        shown = rgb if self.modality == "rgb" else ir
        if rngs is not None:
            shown = transforms.photometric(shown, self.data.ir if self.modality == "ir" else self.data.rgb, rngs[1])
        out: dict[str, Any] = {"id": record.id, "images": self.geometry.input(shown, *self.stats)}
        if self.teacher_stats is not None:
            out["teacher"] = self.geometry.input(rgb, *self.teacher_stats)
        if seen.boxes is not None and seen.labels is not None:
            found, learned = seen.boxes.as_subclass(Tensor), seen.labels > 0
            out["target"] = {"boxes": found[learned], "labels": seen.labels[learned], "ignored": found[~learned]}
        if seen.masks is not None:
            plain = seen.masks.as_subclass(Tensor)[0].long()
            out["masks"] = self.geometry.padded(plain[None])[0] if self.geometry.kind == "pad" else plain
        return out

    def _boxes(self, number: int) -> tuple[Tensor | None, Tensor | None]:
        """Boxes XYXY with their labels, 0 for regions to ignore."""
        truth = self.target.truth
        if truth is None:
            return None, None
        rows = truth.image == number
        xywh = torch.from_numpy(truth.box[rows]).float()
        labels = torch.from_numpy(np.where(truth.ignore, -1, truth.category)[rows]).long() + 1
        return torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1), labels

    def _mask(self, number: int) -> Tensor | None:
        if self.target.masks is None:
            return None
        return torch.from_numpy(annotated.read_mask(self.target.masks[number]))[None]

    def content(self, number: int) -> tuple[int, int]:
        """Rows and columns of the input that this image fills; padding lies behind them."""
        width, height = self.size(number)
        scale = self.geometry.scale(height, width)
        return min(round(height * scale), self.geometry.content[0]), min(round(width * scale), self.geometry.content[1])

    def size(self, number: int) -> tuple[int, int]:
        """Width and height of the image itself, px."""
        if self.target.truth is not None:
            width, height = (int(side) for side in self.target.truth.sizes[number])
            return width, height
        found = annotated.read_mask(self.target.masks[number]) if self.target.masks else np.zeros((1, 1))
        return found.shape[1], found.shape[0]

    def native(self, boxes: Tensor, number: int) -> Tensor:
        """(n, 4) XYXY px of the input as px of the image itself (geometry `pad`)."""
        width, height = self.size(number)
        rows, columns = self.content(number)
        factor = boxes.new_tensor([width / columns, height / rows] * 2)
        limit = boxes.new_tensor([width, height] * 2)
        return torch.minimum((boxes * factor).clamp_min(0), limit)
