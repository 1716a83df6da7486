"""The comparisons: which two images of a pair are held against each other, and the geometry both share.

`paired` is the question; the others say what else makes a divergence. `shuffled` and the two mean-removed ones are
formed from features (see `spectrometer`), `random` by a second network, `pixels` by none; the rest are images made
from the visible one here. Both images always go through one geometry.

Shapes: frames are (3, h, w) float32 in [0, 1]; views are (3, H, W), the network's input before normalisation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from freqkd_analysis.errors import FreqkdError, first, nearest

if TYPE_CHECKING:
    from freqkd_analysis.data.records import PairedSample

SHIFTS = (1, 2, 4, 8)
MARGIN = max(SHIFTS)
NOISE_LEVELS = 2.0
"""Standard deviation of the `noise` control in 8-bit grey levels."""

FEATURE_CONDITIONS = ("shuffled", "mean_removed")
IMAGE_CONDITIONS = (*(f"shifted:{d}" for d in SHIFTS), "grey", "inverted", "blur", "noise")
OTHER_CONDITIONS = ("random", "pixels", "without_artefacts")
CONDITIONS = ("paired", *FEATURE_CONDITIONS, *IMAGE_CONDITIONS, *OTHER_CONDITIONS)

_LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601


def parse(text: str) -> tuple[str, ...]:
    """`all`, `none` or a comma-separated list; `paired` is always in.

    Example:
        >>> parse("grey,shuffled")
        ('paired', 'shuffled', 'grey')
    """
    if text == "all":
        return CONDITIONS
    asked = [] if text == "none" else [part.strip() for part in text.split(",")]
    for name in asked:
        if name not in CONDITIONS:
            raise FreqkdError(f'no condition "{name}"; expected all, none or some of {first(CONDITIONS, 20)}.'
                              f"{nearest(name, CONDITIONS)}")  # fmt: skip
    return tuple(name for name in CONDITIONS if name == "paired" or name in asked)


@dataclass(frozen=True)
class Geometry:
    """How a pair becomes network input. `crop`: both images scaled to cover the view and a margin of 8 px, centre
    cropped; shifts then use real pixels of the margin. `pad`: both fitted into `content`, zeros right and bottom
    after normalisation (the FreqKD release).

    size: rows and columns of the network input. content: rows and columns of the image inside it (`pad`).
    """

    kind: str
    size: tuple[int, int]
    content: tuple[int, int]

    @staticmethod
    def make(kind: str, size: tuple[int, int], stride: int) -> Geometry:
        """The nearest geometry of a stride: crop rounds the size down to a multiple of it, pad up."""
        if kind not in ("crop", "pad"):
            raise FreqkdError(f'expected --geometry crop or pad, got "{kind}".{nearest(kind, ("crop", "pad"))}')
        if min(size) < stride:
            raise FreqkdError(f"expected --size of at least the network's stride {stride}, got {size[0]}x{size[1]}.")
        step = [side // stride * stride if kind == "crop" else -(-side // stride) * stride for side in size]
        return Geometry(kind, (step[0], step[1]), (step[0], step[1]) if kind == "crop" else size)

    def scale(self, height: int, width: int) -> float:
        """Network px per image px of an image of this size."""
        margin = 2 * MARGIN if self.kind == "crop" else 0
        ratios = [(side + margin) / old for side, old in zip(self.content, (height, width), strict=True)]
        return max(ratios) if self.kind == "crop" else min(ratios)

    def frame(self, image: np.ndarray) -> Tensor:
        """(H, W) or (H, W, 3) image to a scaled (3, h, w) frame, antialiased."""
        pixels = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))
        planes = pixels.expand(3, -1, -1) if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        height, width = planes.shape[1:]
        scale = self.scale(height, width)
        floor = [side + 2 * MARGIN for side in self.content] if self.kind == "crop" else [1, 1]
        target = [max(round(side * scale), low) for side, low in zip((height, width), floor, strict=True)]
        if self.kind == "pad":
            target = [min(side, most) for side, most in zip(target, self.content, strict=True)]
        if target == [height, width]:
            return planes.contiguous()
        scaled = functional.interpolate(planes[None], size=target, mode="bilinear", antialias=True, align_corners=False)
        return scaled[0].clamp(0, 1)

    def view(self, frame: Tensor, dx: int = 0, dy: int = 0) -> Tensor:
        """The (3, H, W) input seen through the frame, moved by (dx, dy) px (crop), without wrap or fill."""
        if self.kind == "pad":
            return frame
        height, width = self.size
        top, left = (frame.shape[1] - height) // 2 + dy, (frame.shape[2] - width) // 2 + dx
        return frame[:, top : top + height, left : left + width]

    def input(self, view: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """The network's (3, H, W) input of a view in [0, 1]: a network's statistics taken out, then padded (`pad`)."""
        normalised = (view - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
        return self.padded(normalised) if self.kind == "pad" else normalised

    def padded(self, normalised: Tensor) -> Tensor:
        """(3, h, w) after normalisation to (3, H, W), zeros right and bottom."""
        height, width = normalised.shape[1:]
        return functional.pad(normalised, (0, self.size[1] - width, 0, self.size[0] - height))

    def padded_tokens(self, stride: int) -> int:
        """Tokens that hold padding, for an image that fills `content`."""
        rows, columns = (side // stride for side in self.size)
        whole = (self.content[0] // stride) * (self.content[1] // stride)
        return rows * columns - whole


def shifted(geometry: Geometry, rgb: Tensor, d: int) -> list[tuple[Tensor, Tensor]]:
    """The frame against itself moved by d px, along x and along y."""
    if geometry.kind == "crop":
        base = geometry.view(rgb)
        return [(base, geometry.view(rgb, dx=d)), (base, geometry.view(rgb, dy=d))]
    return [(rgb[:, :, :-d], rgb[:, :, d:]), (rgb[:, :-d], rgb[:, d:])]


def luminance(image: Tensor) -> Tensor:
    """(3, H, W) grey version of a (3, H, W) image."""
    weights = torch.tensor(_LUMINANCE, dtype=image.dtype)
    return torch.einsum("c,chw->hw", weights, image).expand(3, -1, -1)


def sharpness(image: Tensor) -> float:
    """Mean squared gradient over variance of the grey image: falls with blur, blind to gain and offset; 0 if flat."""
    grey = luminance(image)[0]
    variance = grey.var(unbiased=False)
    gradient = grey.diff(dim=0).square().mean() + grey.diff(dim=1).square().mean()
    return float(gradient / variance) if float(variance) > 1e-10 else 0.0


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian blur of (3, H, W), mirrored at the border; sigma in px."""
    if sigma <= 0:
        return image
    reach = min(max(1, round(3 * sigma)), min(image.shape[1:]) - 1)
    t = torch.arange(-reach, reach + 1, dtype=image.dtype)
    kernel = torch.exp(-0.5 * (t / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = functional.pad(image[None], (reach, reach, reach, reach), mode="reflect")
    across = functional.conv2d(padded, kernel, groups=3)
    return functional.conv2d(across, kernel.transpose(2, 3), groups=3)[0]


def matching_blur(rgb: Tensor, ir: Tensor, most: float = 8.0) -> float:
    """The sigma (px) at which the blurred visible image is as sharp as the infrared one; 0 if it is no sharper."""
    target = sharpness(ir)
    if sharpness(rgb) <= target:
        return 0.0
    low, high = 0.0, most
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if sharpness(gaussian_blur(rgb, middle)) > target else (low, middle)
    return (low + high) / 2


def _noise(rgb: Tensor, seed: int) -> Tensor:
    """Gaussian noise of NOISE_LEVELS grey levels, back on the 8-bit grid."""
    draw = torch.randn(rgb.shape, generator=torch.Generator().manual_seed(seed)) * NOISE_LEVELS
    return ((rgb * 255 + draw).round() / 255).clamp(0, 1)


_VARIANTS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "grey": lambda rgb, ir, seed: luminance(rgb),
    "inverted": lambda rgb, ir, seed: 1 - luminance(rgb),
    "blur": lambda rgb, ir, seed: gaussian_blur(rgb, matching_blur(rgb, ir)),
    "noise": lambda rgb, ir, seed: _noise(rgb, seed),
}


def image_comparisons(
    geometry: Geometry, rgb: Tensor, ir: Tensor, conditions: tuple[str, ...], seed: int
) -> list[tuple[str, Tensor, Tensor]]:
    """The image conditions among `conditions` as (name, image a, image b); shifts come twice, along x and y.

    Args: rgb, ir: frames of one pair. seed: of this pair, for the noise.
    """
    base, other = geometry.view(rgb), geometry.view(ir)
    out: list[tuple[str, Tensor, Tensor]] = []
    for name in conditions:
        if name.startswith("shifted:"):
            out += [(name, a, b) for a, b in shifted(geometry, rgb, int(name.split(":")[1]))]
        elif name in _VARIANTS:
            out.append((name, base, _VARIANTS[name](base, other, seed)))
    return out


def images_made(conditions: tuple[str, ...]) -> int:
    """How many images beside the pair itself a control pair sends through the network (crop geometry)."""
    return sum(2 if name.startswith("shifted:") else 1 for name in conditions if name in IMAGE_CONDITIONS)


def frames(sample: PairedSample, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """The visible and the infrared frame of a decoded pair."""
    return geometry.frame(sample.rgb), geometry.frame(sample.ir)
