"""Feature maps for a detector from any timm network: `Backbone`, its necks, and how much of the network is trained.

`Anchors` and `Regions` say where things lie on these maps, in place of torchvision's: it has anchors at whole-number
strides from the top left corner of a cell (3.5 px would be 3), and reads regions at the nearest power of two of the
stride (14 px would be 16).

Necks. `simple`: the simple feature pyramid of plain vision transformers (Li et al., "Exploring Plain Vision Transformer
Backbones for Object Detection", 2022): the last tap at 4, 2, 1 and 1/2 times its grid. `fpn`: feature pyramid network
(Lin et al., 2017) on the stages of a hierarchical network. `single`: a 1x1 convolution and GroupNorm on each of five
taps, all at one stride, as the FreqKD release has it.

Strides are what they are: with patches of 14 px the simple pyramid has 3.5, 7, 14 and 28 px a cell.

Shapes: B images, C channels, H x W cells.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, roi_align

from freqkd_analysis.errors import NetworkError, nearest
from freqkd_analysis.features import Tap, find_taps, read_taps, reductions
from freqkd_train import student
from freqkd_train.config import ConfigError, Student

NECKS = ("auto", "simple", "fpn", "single")
DEPTHS = (8 / 24, 16 / 24, 20 / 24, 22 / 24, 1.0)
"""Relative depth of the release's five taps, blocks 7, 15, 19, 21, 23 of 24."""
FINEST = 4
"""Least stride of a stage that a feature pyramid network takes, px."""
GROUPS = 32
POOLED = 7
"""Cells a side that a region of interest is read into."""
CANONICAL = 14.0
"""A region of this many units' side is read from that map: 224 px at stride 16 (Lin et al., 2017)."""
FULL_RATE = 0.1
"""Factor on the learning rate of a network whose own weights are trained."""


class Backbone(nn.Module):
    """A timm network and a neck: (B, 3, H, W) normalised images to an ordered dict of (B, C, h, w) float32 maps.

    Args:
        network: of timm, made for `padded_size(network, size)`; changed in place by `train`.
        size: rows and columns of the images. Those that are no multiple of the network's coarsest stride are padded
            with zeros, right and bottom, so that cells and pixels keep their relation.
        neck: `simple`, `fpn`, `single`, or `auto`: fpn where the taps differ in stride, else simple.
        train: `frozen`, or a way of `student.adapt`: `lora`, `full`, `last:K`. Batch statistics never move: a
            detector's batches are too small for them.
        rate: factor on the learning rate; without a value 0.1 for the network's own weights, 1 for LoRA and with a
            layer_decay. layer_decay: further factor a block, from the last to the first.
        lora: rank, alpha, dropout and targets of LoRA. channels: C, a multiple of 32. seed: of the neck and of LoRA.

    Attributes: out_channels; strides and units, px, one a map: a map's unit is the stride its objects are sized for,
        the same but for `single`, whose maps share a stride; taps: all that are read in a forward.
    Raises: NetworkError for a network that does not take the size or fit the neck; ConfigError for other settings.

    Example:
        >>> import timm
        >>> network = timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), depth=2).eval()
        >>> backbone = Backbone(network, (32, 48), channels=32)
        >>> {name: (tuple(x.shape[2:])) for name, x in backbone(torch.zeros(1, 3, 32, 48)).items()}
        {'0': (8, 12), '1': (4, 6), '2': (2, 3), '3': (1, 2)}
        >>> backbone.strides
        (4.0, 8.0, 16.0, 32.0)
    """

    def __init__(
        self,
        network: nn.Module,
        size: tuple[int, int],
        *,
        neck: str = "auto",
        train: str = "frozen",
        rate: float | None = None,
        layer_decay: float = 1.0,
        lora: Student | None = None,
        channels: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check(neck, channels, layer_decay)
        self.network, self.size, self.out_channels = network, size, channels
        self.padded = padded_size(network, size)
        every = find_taps(network, self.padded)
        plain = len({tap.stride for tap in every}) == 1
        self.neck_name = ("simple" if plain else "fpn") if neck == "auto" else neck
        self.neck_taps = chosen(every, self.neck_name)
        watched = chosen(every, "single" if plain else "fpn")
        self.taps = sorted({tap.layer: tap for tap in [*self.neck_taps, *watched]}.values(), key=lambda tap: tap.layer)
        self.strides, self.units = levels(self.neck_taps, self.neck_name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.neck = _NECKS[self.neck_name](self.neck_taps, channels)
        self.way = self._adapt(train, lora or Student(), seed)
        self.rate = (1.0 if self.way == "lora" or layer_decay < 1 else FULL_RATE) if rate is None else rate
        self.layer_decay = layer_decay

    def _adapt(self, train: str, lora: Student, seed: int) -> str:
        if train == "frozen":
            self.network.requires_grad_(False).eval()
            return train
        settings = Student.model_validate({**lora.model_dump(), "adapt": train})
        way = student.way(self.network, settings)
        student.adapt(self.network, settings, seed)
        if any(p.requires_grad for p in self.network.parameters()):
            # What lies behind the last tap gets no gradient: no share of weight decay, no hole under DDP.
            device = next(self.network.parameters()).device
            probe = read_taps(self.network, self.taps, torch.zeros(1, 3, *self.padded, device=device))
            student.freeze_unused(self.network, torch.stack([x.sum() for x in probe.values()]).sum())
        return way

    @property
    def trained(self) -> bool:
        """Whether anything of the network itself learns."""
        return any(p.requires_grad for p in self.network.parameters())

    def train(self, mode: bool = True) -> Backbone:
        """Batch statistics stay as they are; of a frozen network everything does (dropout, dropped paths)."""
        super().train(mode)
        for module in self.network.modules():
            if not self.trained or isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = False
        return self

    def read(self, images: Tensor) -> dict[str, Tensor]:
        """(B, C, H, W) features of every tap, with gradients where something of the network is trained."""
        if images.ndim != 4 or tuple(images.shape[2:]) != tuple(self.size):
            raise NetworkError(f"this detector was made for images of {self.size[0]}x{self.size[1]} px, got a batch of "
                               f"shape {tuple(images.shape)}.")  # fmt: skip
        rows, columns = (new - old for new, old in zip(self.padded, self.size, strict=True))
        return read_taps(self.network, self.taps, functional.pad(images, (0, columns, 0, rows)))

    def maps(self, features: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
        """What the neck makes of `read`, in float32: boxes need more than the eight bits of bfloat16."""
        made = self.neck([features[tap.tap] for tap in self.neck_taps])
        return OrderedDict((str(i), x.float()) for i, x in enumerate(made))

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return self.maps(self.read(images))

    def rates(self) -> dict[str, float]:
        """Learning-rate factors of the network's parameters by name prefix; the longest prefix holds.

        Without a layer_decay one entry, "network."; with it one a trained parameter, rate for the last block.
        """
        if not self.trained:
            return {}
        if self.layer_decay == 1:
            return {"network.": self.rate}
        place = _layers(self.network)
        names = [name for name, p in self.network.named_parameters() if p.requires_grad]
        top = max(place[name] for name in names)
        return {f"network.{name}": self.rate * self.layer_decay ** (top - place[name]) for name in names}

    def describe(self) -> dict[str, object]:
        """For a manifest."""
        return {"neck": self.neck_name, "taps": [tap.tap for tap in self.neck_taps], "strides": list(self.strides),
                "channels": self.out_channels, "train": self.way, "rate": self.rate, "layer_decay": self.layer_decay,
                "size": list(self.size), "padded": list(self.padded)}  # fmt: skip


def _check(neck: str, channels: int, layer_decay: float) -> None:
    if neck not in NECKS:
        raise ConfigError(f'no neck "{neck}".{nearest(neck, NECKS)} Expected one of {", ".join(NECKS)}.')
    if channels < GROUPS or channels % GROUPS:
        raise ConfigError(f"expected channels in multiples of {GROUPS} (GroupNorm), got {channels}.")
    if not 0 < layer_decay <= 1:
        raise ConfigError(f"expected a layer_decay above 0 and at most 1, got {layer_decay}.")


def padded_size(network: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    """`size` (rows, columns) up to multiples of the network's coarsest stride: what the network itself must take.

    Example:
        >>> import timm
        >>> padded_size(timm.create_model("resnet18"), (64, 70))
        (64, 96)
    """
    step = max(reductions(network), default=1)
    return math.ceil(size[0] / step) * step, math.ceil(size[1] / step) * step


def chosen(every: Sequence[Tap], neck: str) -> list[Tap]:
    """The taps of a neck out of all blocks or stages, in order.

    simple: the last; fpn: the last of each stride from 4 px on; single: the five of the release by relative depth, or
    all there are.
    Raises: NetworkError when the network's strides do not fit.

    Example:
        >>> blocks = [Tap(n, f"blocks.{n}", (n + 1) / 12, (8, 8), 16, 14, "tokens") for n in range(12)]
        >>> [tap.layer for tap in chosen(blocks, "single")]
        [3, 7, 9, 10, 11]
    """
    strides = sorted({tap.stride for tap in every})
    if neck == "fpn":
        last = {tap.stride: tap for tap in every if tap.stride >= FINEST}
        if len(last) < 2:
            raise NetworkError(f"the neck fpn needs stages of several strides, the network has {strides}; use simple.")
        return sorted(last.values(), key=lambda tap: tap.layer)
    if neck == "simple":
        return [every[-1]]
    if len(strides) > 1:
        raise NetworkError(f"the neck single needs taps of one stride, the network has {strides}; use fpn.")
    places = [max(round(depth * len(every)) - 1, 0) for depth in DEPTHS]
    for i in range(len(places) - 2, -1, -1):
        places[i] = min(places[i], places[i + 1] - 1)
    return [every[i] for i in places if i >= 0]


def levels(neck_taps: Sequence[Tap], neck: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """True stride and unit of each map, px.

    Maps of one stride (`single`) share objects among them by depth, as a pyramid does: units double from a quarter of
    the stride on.
    """
    if neck == "simple":
        stride = neck_taps[0].stride
        return (own := (stride / 4, stride / 2, float(stride), 2.0 * stride)), own
    strides = tuple(float(tap.stride) for tap in neck_taps)
    return strides, strides if neck == "fpn" else tuple(s / 4 * 2**i for i, s in enumerate(strides))


class SimplePyramid(nn.Module):
    """One tap at 4, 2, 1 and 1/2 times its grid; the coarsest map covers an odd grid to its end."""

    def __init__(self, neck_taps: Sequence[Tap], channels: int) -> None:
        super().__init__()
        from timm.layers import LayerNorm2d

        c = neck_taps[0].channels
        half, quarter = max(c // 2, 1), max(c // 4, 1)
        four = nn.Sequential(nn.ConvTranspose2d(c, half, 2, 2), LayerNorm2d(half), nn.GELU(),
                             nn.ConvTranspose2d(half, quarter, 2, 2))  # fmt: skip
        scaled = [(four, quarter), (nn.ConvTranspose2d(c, half, 2, 2), half), (nn.Identity(), c),
                  (nn.MaxPool2d(2, 2, ceil_mode=True), c)]  # fmt: skip
        self.maps = nn.ModuleList(
            nn.Sequential(scale, nn.Conv2d(width, channels, 1, bias=False), LayerNorm2d(channels),
                          nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels))
            for scale, width in scaled
        )  # fmt: skip

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [make(features[0]) for make in self.maps]


class Pyramid(nn.Module):
    """torchvision's feature pyramid network on stages of falling resolution."""

    def __init__(self, neck_taps: Sequence[Tap], channels: int) -> None:
        super().__init__()
        self.fpn = FeaturePyramidNetwork([tap.channels for tap in neck_taps], channels)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        return list(self.fpn(OrderedDict((str(i), x) for i, x in enumerate(features))).values())


class SingleStride(nn.Module):
    """1x1 convolution and GroupNorm on each tap."""

    def __init__(self, neck_taps: Sequence[Tap], channels: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(
            nn.Sequential(nn.Conv2d(tap.channels, channels, 1, bias=False), nn.GroupNorm(GROUPS, channels))
            for tap in neck_taps
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [make(x) for make, x in zip(self.maps, features, strict=True)]


_NECKS = {"simple": SimplePyramid, "fpn": Pyramid, "single": SingleStride}


class Anchors(AnchorGenerator):
    """Anchors centred in their cells at true strides, float32, not rounded."""

    def __init__(self, strides: Sequence[float], sizes: Sequence[Sequence[float]], ratios: Sequence[float]) -> None:
        self.strides = tuple(strides)
        super().__init__(tuple(map(tuple, sizes)), (tuple(ratios),) * len(sizes))

    def generate_anchors(self, scales: Any, aspect_ratios: Any, dtype: Any = torch.float32,
                         device: Any = None) -> Tensor:  # fmt: skip
        sides = torch.tensor(scales, dtype=dtype, device=device)
        root = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        widths, heights = (sides / root[:, None]).flatten(), (sides * root[:, None]).flatten()
        return torch.stack([-widths, -heights, widths, heights], dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        found = []
        for x, stride, cell in zip(feature_maps, self.strides, self.cell_anchors, strict=True):
            rows, columns = ((torch.arange(n, device=device) + 0.5) * stride for n in x.shape[2:])
            down, right = torch.meshgrid(rows, columns, indexing="ij")
            centres = torch.stack([right, down, right, down], dim=2).reshape(-1, 1, 4)
            found.append((centres + cell).reshape(-1, 4))
        return [torch.cat(found)] * len(image_list.image_sizes)


class Regions(MultiScaleRoIAlign):
    """Regions of interest, aligned, at true strides: each from the map of its size, or the mean over maps that all
    have one stride, which differ in depth alone."""

    def __init__(self, strides: Sequence[float], units: Sequence[float]) -> None:
        super().__init__([str(i) for i in range(len(strides))], POOLED, 2)
        self.strides, self.limits = tuple(strides), [CANONICAL * unit for unit in units[1:]]

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        maps = [x[name] for name in self.featmap_names]
        number = torch.cat([box.new_full((len(box), 1), i) for i, box in enumerate(boxes)])
        regions = torch.cat([number, torch.cat(boxes)], dim=1)
        read = partial(roi_align, output_size=POOLED, sampling_ratio=self.sampling_ratio, aligned=True)
        if len(set(self.strides)) == 1:
            return torch.stack([read(m, regions, spatial_scale=1 / self.strides[0]) for m in maps]).mean(0)
        sides = ((regions[:, 3] - regions[:, 1]) * (regions[:, 4] - regions[:, 2])).clamp_min(0).sqrt()
        level = torch.bucketize(sides, sides.new_tensor(self.limits), right=True)
        chosen = [torch.where(level == i)[0] for i in range(len(maps))]
        # Also where none is chosen: every map stays part of the graph, as DDP wants it.
        parts = [read(m, regions[rows], spatial_scale=1 / stride)
                 for m, rows, stride in zip(maps, chosen, self.strides, strict=True)]  # fmt: skip
        return torch.cat(parts)[torch.argsort(torch.cat(chosen))]


def _layers(network: nn.Module) -> dict[str, int]:
    """Layer number of each parameter, by timm's own grouping of its networks."""
    from timm.models import group_parameters

    matcher = getattr(network, "group_matcher", None)
    if matcher is None:
        raise ConfigError(f"layer_decay needs a network of timm that groups its layers; {type(network).__name__} does "
                          "not. Set it to 1.")  # fmt: skip
    return dict(group_parameters(network, matcher(coarse=False), reverse=True))
