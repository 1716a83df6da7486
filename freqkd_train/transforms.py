"""One geometry for a pair: visible image, infrared image, boxes and masks move together; photometry stays apart.

Everything is wrapped as a tv_tensor, because torchvision takes the first plain tensor of a sample for its image and
leaves every other one where it was. What is random comes from a NumPy generator seeded by (seed, epoch, index), so
that threads and order decide nothing.

Frame: the whole image scaled (`Geometry.frame`). View: what the network sees of it. The images of a pair may differ
in size: they show the same scene, so coordinates are relative, and the infrared one is scaled onto the visible one's
frame. Boxes and masks are in pixels of the visible image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from freqkd_analysis.conditions import MARGIN, Geometry
from freqkd_analysis.errors import DataError
from freqkd_train import config

LEAST_AREA = 1.0
"""A box with less area, in square px of the view, is dropped."""
LEAST_SHARE = 0.1
"""A box with less of its area left in the view is dropped."""


@dataclass(frozen=True)
class Joint:
    """The parts of a pair that share a geometry; made by `joint`.

    rgb: (3, H, W), ir: (1 or 3, h, w), float32 in [0, 1]. boxes: (N, 4) float32 XYXY. labels: (N,), of the boxes.
    masks: (K, H, W) label maps; they belong to the image, not to boxes.
    """

    rgb: tv_tensors.Image
    ir: tv_tensors.Image
    boxes: tv_tensors.BoundingBoxes | None = None
    labels: Tensor | None = None
    masks: tv_tensors.Mask | None = None


def joint(rgb: Tensor, ir: Tensor, boxes: Tensor | None = None, labels: Tensor | None = None,
          masks: Tensor | None = None) -> Joint:  # fmt: skip
    """Wrap plain tensors (shapes of `Joint`), so that every part is moved.

    Raises: DataError when a shape is not as expected.

    Example:
        >>> made = joint(torch.rand(3, 8, 10), torch.rand(1, 4, 5), torch.tensor([[1.0, 2.0, 5.0, 6.0]]))
        >>> type(made.ir).__name__, made.boxes.canvas_size
        ('Image', (8, 10))
    """
    canvas = (int(rgb.shape[-2]), int(rgb.shape[-1]))
    wanted = {
        "rgb (3, H, W)": rgb.ndim == 3 and rgb.shape[0] == 3,
        "ir (1 or 3, h, w)": ir.ndim == 3 and ir.shape[0] in (1, 3),
        "boxes (N, 4)": boxes is None or (boxes.ndim == 2 and boxes.shape[1] == 4),
        "a label for each box": labels is None or (boxes is not None and len(labels) == len(boxes)),
        f"masks (K, {canvas[0]}, {canvas[1]})": masks is None or (masks.ndim == 3 and masks.shape[1:] == canvas),
    }
    for what, holds in wanted.items():
        if not holds:
            shapes = [None if part is None else tuple(part.shape) for part in (rgb, ir, boxes, labels, masks)]
            raise DataError(f"expected {what}, got shapes {shapes} for rgb, ir, boxes, labels, masks.")
    return Joint(
        tv_tensors.Image(rgb),
        tv_tensors.Image(ir),
        None if boxes is None else _boxes(boxes, canvas),
        labels,
        None if masks is None else tv_tensors.Mask(masks),
    )


def _boxes(values: Tensor, canvas: tuple[int, int]) -> tv_tensors.BoundingBoxes:
    """Not clamped on the way: what was cut off must be known at the end."""
    return tv_tensors.BoundingBoxes(values.as_subclass(Tensor).float(), format="XYXY", canvas_size=canvas,
                                    clamping_mode=None)  # fmt: skip


@dataclass(frozen=True)
class View:
    """Where the network looks; relative, so that it fits images of any size.

    flipped: mirrored left to right. zoom: sides of the frame over those of the plain frame, 1 or more. at: place of
    the view in the frame's free room, (down, right) each 0..1; None for the analysis' own centre.
    """

    flipped: bool = False
    zoom: float = 1.0
    at: tuple[float, float] | None = None


def draw(data: config.Data, rng: np.random.Generator) -> View:
    """The random view of one sample: mirror, and area share and place of a joint crop.

    The area share is that of the plain view, uniform in data.scale; the place is anywhere in the image. The same
    numbers are drawn whatever the settings, so that turning one off leaves the other as it was.

    Example:
        >>> draw(config.Data(flip=1.0), np.random.default_rng(0))
        View(flipped=True, zoom=1.0, at=None)
    """
    mirror, share, down, right = rng.random(4)
    flipped = bool(mirror < data.flip)
    low, high = data.scale
    if (low, high) == (1.0, 1.0):
        return View(flipped)
    return View(flipped, float((low + (high - low) * share) ** -0.5), (float(down), float(right)))


def apply(view: View, geometry: Geometry, sample: Joint) -> Joint:
    """The sample as the view shows it; the plain `View()` has the pixels of the analysis' `view(frame(image))`.

    Boxes come out in px of the view, clamped; those with an area below 1 px or a tenth of what it was are dropped with
    their labels. Masks are sampled at the nearest pixel. With `pad` the parts are as large as the content; zeros come
    after normalisation (`Geometry.padded`), right and bottom, so that boxes hold for the padded input too.

    Example:
        >>> sample = joint(torch.rand(3, 40, 50), torch.rand(1, 40, 50))
        >>> seen = apply(View(flipped=True), Geometry.make("crop", (16, 24), 8), sample)
        >>> tuple(seen.rgb.shape), tuple(seen.ir.shape)
        ((3, 16, 24), (1, 16, 24))
    """
    return look(view, geometry, frame(sample, geometry, view.zoom))


def frame(sample: Joint, geometry: Geometry, zoom: float = 1.0) -> Joint:
    """Every part scaled to the frame of the visible image: the part of `apply` that is the same for each plain view."""
    rgb = _scaled(sample.rgb, geometry, zoom)
    target = [int(side) for side in rgb.shape[1:]]
    masks = sample.masks
    return replace(
        sample,
        rgb=rgb,
        ir=_resized(sample.ir, target),
        boxes=None if sample.boxes is None else F.resize(sample.boxes, target),
        masks=None if masks is None else _nearest(masks, target),
    )


def _scaled(image: tv_tensors.Image, geometry: Geometry, zoom: float) -> tv_tensors.Image:
    height, width = (int(side) for side in image.shape[1:])
    if zoom == 1.0:
        planes = image.as_subclass(Tensor)
        # The memory that a decoder gave, not a copy: Geometry sees the very array that the analysis gives it.
        return tv_tensors.Image(geometry.frame(planes.permute(1, 2, 0).numpy()))
    scale = geometry.scale(height, width) * zoom
    least = [side + 2 * MARGIN for side in geometry.size]
    return _resized(image, [max(round(side * scale), low) for side, low in zip((height, width), least, strict=True)])


def _resized(image: tv_tensors.Image, target: list[int]) -> tv_tensors.Image:
    return tv_tensors.Image(F.resize(image, target, antialias=True).clamp(0, 1))


def _nearest(masks: tv_tensors.Mask, target: list[int]) -> tv_tensors.Mask:
    """torchvision's own kernel for masks takes the pixel left above the centre: half a pixel off what images do."""
    plain = masks.as_subclass(Tensor)
    return tv_tensors.Mask(F.resize_image(plain, target, interpolation=InterpolationMode.NEAREST_EXACT))


def look(view: View, geometry: Geometry, framed: Joint) -> Joint:
    """The view of a framed sample: cut, mirror, and boxes tidied up."""
    boxes, labels, masks = framed.boxes, framed.labels, framed.masks
    rgb = _cut(framed.rgb, view, geometry, framed.rgb.shape[1:])
    ir = _cut(framed.ir, view, geometry, framed.ir.shape[1:])
    if masks is not None:
        masks = _cut(masks, view, geometry, framed.rgb.shape[1:])
    if boxes is not None:
        boxes = _cut(boxes, view, geometry, framed.rgb.shape[1:])
        boxes, labels = _tidied(boxes, labels)
    return Joint(rgb, ir, boxes, labels, masks)


def _cut(part: Any, view: View, geometry: Geometry, size: Sequence[int]) -> Any:
    """torchvision's functions know by the type of the part how it moves."""
    if geometry.kind == "crop":
        room = [side - seen for side, seen in zip(size, geometry.size, strict=True)]
        top, left = (free // 2 for free in room)
        if view.at is not None:
            top, left = (round(at * free) for at, free in zip(view.at, room, strict=True))
        part = F.crop(part, top, left, *geometry.size)
    return F.horizontal_flip(part) if view.flipped else part


def _tidied(boxes: tv_tensors.BoundingBoxes, labels: Tensor | None) -> tuple[tv_tensors.BoundingBoxes, Tensor | None]:
    canvas = (int(boxes.canvas_size[0]), int(boxes.canvas_size[1]))
    whole = boxes.as_subclass(Tensor)
    left = whole.clone()
    left[:, 0::2].clamp_(0, canvas[1])
    left[:, 1::2].clamp_(0, canvas[0])
    before, after = _areas(whole), _areas(left)
    keep = (after >= LEAST_AREA) & (after >= LEAST_SHARE * before)
    return _boxes(left[keep], canvas), None if labels is None else labels[keep]


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]).clamp_min(0) * (boxes[:, 3] - boxes[:, 1]).clamp_min(0)


def photometric(image: Tensor, settings: config.Photometry, rng: np.random.Generator) -> Tensor:
    """Contrast around the image's own mean, then brightness, then noise of fixed deviation; clamped to [0, 1].

    image: (C, H, W) in [0, 1]. The amounts are uniform up to those of `settings`; the noise is Gaussian, independent
    from pixel to pixel and channel to channel. A pure function of image, settings and the generator's state.

    Example:
        >>> image = torch.full((1, 2, 2), 0.5)
        >>> photometric(image, config.Photometry(), np.random.default_rng(0)) is image
        True
    """
    if settings == config.Photometry():
        return image
    contrast, brightness = rng.uniform(-1, 1, 2)
    mean = image.mean(dtype=torch.float64).to(image.dtype)
    out = (image - mean) * (1 + settings.contrast * contrast) + mean + settings.brightness * brightness
    if settings.noise:
        out = out + settings.noise * torch.from_numpy(rng.standard_normal(tuple(image.shape), dtype=np.float32))
    return out.clamp(0, 1)
