"""Segmentation heads on a `Backbone`, and the step that trains one: `build`, `SegmentationStep`, `predict`.

Heads. `light`: that of the FreqKD release's MFNet evaluation: each of five taps to 256 channels, all at image size,
joined to 256 with batch norm and ReLU, then classes. The release stretches the grid of a padded input over the image,
which displaces it by up to 2 %; here the padding is cut off, and `light_stretched` is the release. `linear`: batch norm
and one linear map of the last tap. `fpn`: on the backbone's neck, after Kirillov et al., "Panoptic Feature Pyramid
Networks" (2019), one 3x3 convolution a map.

1x1 convolutions and bilinear resizing commute: one mixes channels, the other pixels, by weights whose sum is 1. So all
linear maps before a resize are taken on the grid; what follows a batch norm of pixels is not, since the resize changes
its statistics. Resizing is two matrix products, deterministic on a GPU too, and gives only the pixels that are shown.

Shapes: B images, K classes with unlabelled first, C channels, H x W px of the input, h x w cells or px asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from freqkd_analysis.errors import FreqkdError, nearest
from freqkd_train.metrics.miou import CLASSES
from freqkd_train.pyramid import GROUPS, Backbone

Size = tuple[int, int]

WIDTHS = {"light": 256, "light_stretched": 256, "linear": 0, "fpn": 128}
"""Channels inside each head."""
HEADS = tuple(WIDTHS)


class SegmentationError(FreqkdError):
    """Label images that cannot be learned, or settings of a segmenter that do not go together."""


@dataclass(frozen=True)
class Window:
    """Which pixels are wanted of maps that cover an input.

    covers: rows and columns of px that a map covers. shown: of these, from the top left, those that are wanted. size:
    rows and columns they are given in.
    """

    covers: tuple[float, float]
    shown: tuple[float, float]
    size: Size

    def place(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, h, w) cells to (B, C, *size), bilinear between the centres of cells, level beyond the outermost.

        With shown = covers it is `interpolate` without aligned corners. In float32; the type stays.
        """
        down, across = (weights(*side).to(x_BCHW.device) for side in zip(x_BCHW.shape[2:], *self.sides(), strict=True))
        with torch.autocast(x_BCHW.device.type, enabled=False):
            return (down @ (x_BCHW.float() @ across.T)).to(x_BCHW.dtype)

    def sides(self) -> tuple[tuple[float, float], tuple[float, float], Size]:
        return self.covers, self.shown, self.size


def weights(cells: int, covers: float, shown: float, out: int) -> Tensor:
    """(out, cells) float32: what each cell gives to each of `out` pixels over the first `shown` of `covers` px.

    Example:
        >>> weights(2, covers=4, shown=3, out=3).tolist()
        [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75]]
    """
    centre = (torch.arange(out, dtype=torch.float64) + 0.5) * (shown / out) * (cells / covers) - 0.5
    centre = centre.clamp(0, cells - 1)
    return (1 - (centre[:, None] - torch.arange(cells)).abs()).clamp_min(0).float()


class Light(nn.Module):
    """A 1x1 convolution a tap, joined at image size; batch norm sees all pixels, as in the release."""

    def __init__(self, channels: Sequence[int], classes: int, width: int) -> None:
        super().__init__()
        self.narrow = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.join = nn.Conv2d(width * len(channels), width, 1, bias=False)  # batch norm takes a bias off again
        self.norm = nn.BatchNorm2d(width)
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor], window: Window) -> Tensor:
        sums: dict[Any, Tensor] = {}
        shares = self.join.weight.chunk(len(maps), dim=1)
        for x, narrow, share in zip(maps, self.narrow, shares, strict=True):
            part = functional.conv2d(narrow(x), share)
            grid = tuple(part.shape[2:])
            sums[grid] = sums[grid] + part if grid in sums else part
        placed = [window.place(x) for x in sums.values()]
        joined = sum(placed[1:], placed[0])
        return self.classify(functional.relu(self.norm(joined), inplace=True))


class Linear(nn.Module):
    """Batch norm of the tokens and a 1x1 convolution."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm, self.classify = nn.BatchNorm2d(channels), nn.Conv2d(channels, classes, 1)

    def forward(self, maps: Sequence[Tensor], window: Window) -> Tensor:
        return window.place(self.classify(self.norm(maps[-1])).float())


class Fpn(nn.Module):
    """A 3x3 convolution, GroupNorm and ReLU a map, summed on the finest grid."""

    def __init__(self, strides: Sequence[float], channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.smooth = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.GroupNorm(GROUPS, width), nn.ReLU())
            for _ in strides
        )
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor], window: Window) -> Tensor:
        finest = self._covered(maps[0], 0)
        grid = (int(maps[0].shape[2]), int(maps[0].shape[3]))
        # A coarse map may reach beyond the finest one, whose side need not be a multiple of its own.
        parts = [Window(self._covered(x, i), finest, grid).place(smooth(x))
                 for i, (x, smooth) in enumerate(zip(maps, self.smooth, strict=True))]  # fmt: skip
        logits = self.classify(torch.stack(parts).sum(0))
        return Window(finest, window.shown, window.size).place(logits.float())

    def _covered(self, x: Tensor, level: int) -> tuple[float, float]:
        return x.shape[2] * self.strides[level], x.shape[3] * self.strides[level]


class Segmenter(nn.Module):
    """A backbone and a head; made by `build`. Logits are float32, the network and head as the autocast has them."""

    def __init__(self, kind: str, backbone: Backbone, head: nn.Module, content: Size, settings: dict[str, Any]) -> None:
        super().__init__()
        self.kind, self.backbone, self.head, self.content, self.settings = kind, backbone, head, content, settings

    def forward(self, images: Tensor, size: Size | None = None, content: Size | None = None) -> Tensor:
        """(B, K, *size) logits of the part of the input that holds the image.

        Args: images: (B, 3, H, W), normalised. content: rows and columns of that part; default: the segmenter's.
            size: rows and columns of the output; default: those of content.
        """
        shown = _checked(content or self.content, self.backbone.size)
        covers = shown if self.kind == "light_stretched" else self.backbone.padded
        window = Window(covers, shown, size or shown)
        features = self.backbone.read(images)
        if self.training or torch.is_grad_enabled():
            return self._logits(features, window)
        # Full-size maps of one image at a time: in evaluation no head looks at another.
        parts = [{tap: x[i : i + 1] for tap, x in features.items()} for i in range(len(images))]
        return torch.cat([self._logits(one, window) for one in parts])

    def _logits(self, features: dict[str, Tensor], window: Window) -> Tensor:
        if self.kind == "fpn":
            maps = list(self.backbone.maps(features).values())
        else:
            maps = [features[tap.tap] for tap in self.backbone.taps]
        return self.head(maps, window).float()

    def describe(self) -> dict[str, Any]:
        """For a manifest and a protocol card."""
        told = self.backbone.describe() | {"taps": [tap.tap for tap in self.taps]}
        if self.kind != "fpn":
            told = {name: value for name, value in told.items() if name not in ("neck", "strides", "channels")}
        return {"head": self.kind, "content": list(self.content), **self.settings, **told}

    @property
    def taps(self) -> list[Any]:
        """Those that the head reads."""
        chosen = {"fpn": self.backbone.neck_taps, "linear": self.backbone.taps[-1:]}
        return chosen.get(self.kind, self.backbone.taps)


def build(
    head: str, backbone: Backbone, classes: int = len(CLASSES), *, content: Size | None = None,
    width: int | None = None, seed: int = 0,
) -> Segmenter:  # fmt: skip
    """A segmenter on a backbone, whose neck is dropped where the head does not read it.

    Args:
        head: light, light_stretched, linear or fpn. light reads five taps of a plain network at the relative depths of
            the release, or the stages of a hierarchical one from 4 px on; linear the last of these.
        classes: with unlabelled, which is learned like any other.
        content: rows and columns of the images that hold the picture, where these are padded, right and bottom, before
            they come here; default: all. What the backbone itself pads is known.
        width: channels inside the head; default: `WIDTHS`; of fpn a multiple of 32.
        seed: of the head's first weights.
    Raises: SegmentationError for an unknown head or settings out of range.

    Example:
        >>> import timm
        >>> network = timm.create_model("resnet10t", num_classes=0).eval()
        >>> segmenter = build("linear", Backbone(network, (60, 80), channels=32), classes=9).eval()
        >>> labels = predict(segmenter, torch.zeros(2, 3, 60, 80), size=(480, 640))
        >>> tuple(labels.shape), labels.dtype
        ((2, 480, 640), torch.uint8)
    """
    if head not in HEADS:
        raise SegmentationError(f'no head "{head}".{nearest(head, HEADS)} Expected one of {", ".join(HEADS)}.')
    width = WIDTHS[head] if width is None else width
    if not 2 <= classes <= 256 or (head != "linear" and width < 1) or (head == "fpn" and width % GROUPS):
        raise SegmentationError(f"expected 2 to 256 classes and a width of at least 1 (fpn: in multiples of {GROUPS}), "
                                f"got {classes} and {width}.")  # fmt: skip
    shown = _checked(content or backbone.size, backbone.size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if head == "fpn":
            made: nn.Module = Fpn(backbone.strides, backbone.out_channels, classes, width)
        elif head == "linear":
            made = Linear(backbone.taps[-1].channels, classes)
        else:
            made = Light([tap.channels for tap in backbone.taps], classes, width)
    if head != "fpn":
        # Parameters that no loss reaches would be trained by weight decay alone, and stop DDP.
        backbone.neck = nn.Identity()
    return Segmenter(head, backbone, made, shown, {"classes": classes, "width": width})


def _checked(content: Size, size: Size) -> Size:
    if not all(1 <= part <= whole for part, whole in zip(content, size, strict=True)):
        raise SegmentationError(f"the image's share of the input, {content[0]}x{content[1]} px, must lie within its "
                                f"{size[0]}x{size[1]} px.")  # fmt: skip
    return content


class SegmentationStep(nn.Module):
    """`step(batch)` is {"loss", "terms"}: the mean cross-entropy of all pixels, unlabelled ones like any other.

    Args: segmenter: from `build`.
    """

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.segmenter = segmenter

    def rates(self) -> dict[str, float]:
        """Factor on the learning rate by prefix of a parameter's name in this step; the longest prefix holds, 1 without
        one."""
        return {f"segmenter.backbone.{prefix}": factor for prefix, factor in self.segmenter.backbone.rates().items()}

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Args: batch: {"ids", "images": (B, 3, H, W) normalised, "masks": (B, h, w) int64}. Masks of the input's size
        are cut to the image's share, so that padding is not learned; others show the image at their own size.
        Raises: SegmentationError naming the image of a label that is no class, or for masks of another shape."""
        images, masks = batch["images"], batch["masks"].to(batch["images"].device)
        masks = self._shown(masks, len(images))
        _check_labels(batch["ids"], masks, self.segmenter.settings["classes"])
        logits = self.segmenter(images, (int(masks.shape[1]), int(masks.shape[2])))
        # One row a pixel: the loss of maps adds up in no fixed order on a GPU.
        loss = functional.cross_entropy(logits.permute(0, 2, 3, 1).flatten(0, 2), masks.flatten())
        return {"loss": loss, "terms": {"cross_entropy": loss}}

    def _shown(self, masks: Tensor, images: int) -> Tensor:
        content, size = self.segmenter.content, self.segmenter.backbone.size
        if masks.ndim == 3 and tuple(masks.shape[1:]) == tuple(size):
            masks = masks[:, : content[0], : content[1]]
        unlike = masks.ndim != 3 or len(masks) != images or masks.is_floating_point()
        # Rounding to whole pixels moves each side by up to one.
        if unlike or abs(masks.shape[1] * content[1] - masks.shape[2] * content[0]) > sum(content):
            raise SegmentationError(f"expected {images} masks of whole labels that show {content[0]}x{content[1]} px, "
                                    f"got {masks.dtype} of shape {tuple(masks.shape)}.")  # fmt: skip
        return masks.long()


def _check_labels(ids: Sequence[str], masks: Tensor, classes: int) -> None:
    """On a GPU a label out of range ends the process."""
    wrong = (masks < 0) | (masks >= classes)
    if bool(wrong.any()):
        image = int(wrong.flatten(1).any(1).nonzero()[0])
        value = int(masks[image][wrong[image]][0])
        raise SegmentationError(f"{ids[image]}: the label image holds the value {value}; expected class ids 0 to "
                                f"{classes - 1}.")  # fmt: skip


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, size: Size, content: Size | None = None) -> Tensor:
    """(B, *size) uint8: the likeliest class of each pixel. Evaluation mode for the time of the call.

    Args:
        model: a segmenter or its step. images: (B, 3, H, W), normalised, on the model's device.
        size: rows and columns of the label images to compare with; logits are read at the centres of their pixels.
        content: rows and columns of the input that these images fill; default: as the segmenter was made.
    """
    segmenter = getattr(model, "segmenter", model)
    modes = [(module, module.training) for module in segmenter.modules()]
    segmenter.eval()
    try:
        return segmenter(images, size, content).argmax(1).to(torch.uint8)
    finally:
        for module, training in modes:
            module.training = training
