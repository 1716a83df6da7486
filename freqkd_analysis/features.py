"""Taps: where a network's features are read, and how, as (M, N, C) maps on a known grid.

timm knows which modules hold a network's intermediate features (`feature_info`) and returns them from
`forward_intermediates`. Each tap is probed once: if what the module puts out, laid out anew, equals the intermediate,
it is read by a hook while the forward runs (nothing is stored); otherwise the intermediates themselves are read.
Prefix tokens (class, registers) are dropped, so N = H W always holds.

Shapes: M images, T tokens with prefix, N = H W, C channels.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from freqkd_analysis.errors import NetworkError, first, nearest


@dataclass(frozen=True)
class Tap:
    """One place to read features.

    layer: timm's order from 0. tap: module name. depth: (layer + 1) / layers. stride: input px per token.
    how: `tokens`, `nchw`, `nhwc` (by hook) or `intermediate`. prefix: tokens to drop.
    """

    layer: int
    tap: str
    depth: float
    grid: tuple[int, int]
    stride: int
    channels: int
    how: str
    prefix: int = 0

    def describe(self) -> dict[str, Any]:
        return {**asdict(self), "grid": list(self.grid)}


Sink = Callable[[Tap, Tensor], None]


def module_keys(taps: Iterable[str]) -> dict[str, str]:
    """Taps as names of modules, which must hold no dot.

    Raises: NetworkError for two taps that would be one module.

    Example:
        >>> module_keys(["blocks.3", "norm"])
        {'blocks.3': 'blocks_3', 'norm': 'norm'}
    """
    keys: dict[str, str] = {}
    for tap in taps:
        name = tap.replace(".", "_")
        if twin := next((other for other, key in keys.items() if key == name and other != tap), ""):
            raise NetworkError(f'the taps "{twin}" and "{tap}" cannot be told apart without dots; choose other layers.')
        keys[tap] = name
    return keys


def layer_names(model: nn.Module) -> list[str]:
    """Module names of the intermediates, in timm's order."""
    return [str(entry["module"]) for entry in getattr(model, "feature_info", [])]


@torch.no_grad()
def find_taps(model: nn.Module, size: tuple[int, int], layers: str = "all") -> list[Tap]:
    """The taps that `layers` names, proven on one random image.

    Args:
        model: a timm network with `forward_intermediates`.
        size: input rows and columns.
        layers: `all`; numbers such as `0,5,-1`; or a glob over module names, where * stays within one dot
            (`blocks.*`, `blocks.*.attn`, `layer[34]`).
    Raises: NetworkError for a number out of range, a glob without match, two taps in one layer, or a module whose
        output has no grid.

    Example:
        >>> import timm
        >>> model = timm.create_model("resnet18").eval()
        >>> [(tap.tap, tap.grid, tap.stride) for tap in find_taps(model, (64, 64), "1,-1")]
        [('layer1', (16, 16), 4), ('layer4', (2, 2), 32)]
    """
    names = layer_names(model)
    forward = _intermediates(model)
    device = next(model.parameters()).device
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    wanted = _select(model, names, layers)
    modules = dict(model.named_modules())
    outputs: dict[str, Tensor] = {}
    order: list[str] = []

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            order.append(name)
            outputs[name] = output.clone() if isinstance(output, Tensor) else torch.empty(0)

        return hook  # fmt: skip

    present = [name for name in dict.fromkeys([*names, *wanted]) if name in modules]
    handles = [modules[name].register_forward_hook(keep(name)) for name in present]
    try:
        intermediates = forward(image, intermediates_only=True)
    except (AssertionError, RuntimeError, ValueError) as error:
        why = first(str(error).splitlines(), 1)
        raise NetworkError(f"{type(model).__name__} takes no {size[0]}x{size[1]} input ({why}); "
                           "try another --size.") from error  # fmt: skip
    finally:
        for handle in handles:
            handle.remove()
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    steps = reductions(model)
    stages = [_block_tap(i, names, size, outputs.get(name), intermediates[i], prefix, steps)
              for i, name in enumerate(names)]  # fmt: skip
    taps = [
        stages[names.index(name)]
        if name in names
        else _inner_tap(name, names, stages, order, size, outputs.get(name), prefix, steps)
        for name in wanted
    ]
    _one_a_layer(taps)
    return sorted(taps, key=lambda tap: tap.layer)


def _intermediates(model: nn.Module) -> Callable[..., Any]:
    found = getattr(model, "forward_intermediates", None)
    if not callable(found) or not layer_names(model):
        raise NetworkError(f"{type(model).__name__} has no intermediates in timm; expected one with feature_info.")
    return found


def _select(model: nn.Module, names: list[str], layers: str) -> list[str]:
    if layers == "all":
        return names
    if all(re.fullmatch(r"\s*-?[0-9]+\s*", part) for part in layers.split(",")):
        numbers = [int(part) for part in layers.split(",")]
        wrong = [n for n in numbers if not -len(names) <= n < len(names)]
        if wrong:
            raise NetworkError(f"layer {wrong[0]} is out of range; the network has layers 0 to {len(names) - 1}. "
                               f"Asked for: {layers}.")  # fmt: skip
        return list(dict.fromkeys(names[n] for n in numbers))
    every = [name for name, _ in model.named_modules() if name]
    found = [name for name in every if any(_glob(name, part.strip()) for part in layers.split(","))]
    if not found:
        raise NetworkError(f'no layer matches "{layers}".{nearest(layers, every)} Layers: {first(names, 4)}.')
    return found


def _glob(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _block_tap(layer: int, names: list[str], size: tuple[int, int], output: Tensor | None, expected: Tensor,
               prefix: int, steps: Sequence[int]) -> Tap:  # fmt: skip
    channels, grid = expected.shape[1], (int(expected.shape[2]), int(expected.shape[3]))
    reading = ("intermediate", 0)
    target = expected.flatten(2).transpose(1, 2)
    if output is not None:
        for how, drop in (("tokens", prefix), ("tokens", 0), ("nchw", 0), ("nhwc", 0)):
            maps = _as_maps(output, how, drop, grid)
            if maps is not None and maps.shape == target.shape and torch.equal(maps, target):
                reading = (how, drop)
                break
    return Tap(layer, names[layer], (layer + 1) / len(names), grid, _stride(size, grid, steps), channels, *reading)


def _inner_tap(name: str, names: list[str], stages: list[Tap], order: list[str], size: tuple[int, int],
               output: Tensor | None, prefix: int, steps: Sequence[int]) -> Tap:  # fmt: skip
    """A module inside or between blocks: it belongs to the block around it, else to the next one."""
    layer = next((i for i, block in enumerate(names) if name.startswith(block + ".")), None)
    if layer is None:
        later = order[order.index(name) :] if name in order else []
        layer = next((names.index(other) for other in later if other in names), len(names) - 1)
    stage = stages[layer]
    if output is None or output.ndim not in (3, 4) or not output.is_floating_point():
        raise NetworkError(f"{name} puts out no feature map (or never runs); expected (B, tokens, C) or (B, C, H, W).")
    if output.ndim == 3:
        drop = output.shape[1] - stage.grid[0] * stage.grid[1]
        # One image went in: a larger batch holds windows, other numbers of tokens another grid.
        if len(output) != 1 or drop not in (0, prefix):
            raise NetworkError(f"{name} puts out {len(output)} x {output.shape[1]} tokens an image; expected the "
                               f"{stage.grid[0]}x{stage.grid[1]} grid of {stage.tap}, with or without "
                               f"{prefix} prefix tokens.")  # fmt: skip
        return Tap(layer, name, stage.depth, stage.grid, stage.stride, output.shape[2], "tokens", drop)
    if len(output) == 1 and tuple(output.shape[1:3]) == stage.grid and output.shape[3] not in stage.grid:
        return Tap(layer, name, stage.depth, stage.grid, stage.stride, output.shape[3], "nhwc")
    grid = (int(output.shape[2]), int(output.shape[3]))
    if len(output) != 1 or not _covers(size, grid):
        raise NetworkError(f"{name} puts out no feature map of the image: {_shape(output)} from one "
                           f"{size[0]}x{size[1]} input; expected (B, C, H, W).")  # fmt: skip
    return Tap(layer, name, stage.depth, grid, _stride(size, grid, steps), output.shape[1], "nchw")


def _covers(size: tuple[int, int], grid: tuple[int, int]) -> bool:
    """Whether one stride, rounded up or down, explains both sides: heads x tokens x width is no image."""
    return any(all(n in (side // step, -(-side // step)) for side, n in zip(size, grid, strict=True))
               for step in range(1, min(size) + 1))  # fmt: skip


def _shape(x: Tensor) -> str:
    return "x".join(map(str, x.shape))


def _stride(size: tuple[int, int], grid: tuple[int, int], reductions: Sequence[int]) -> int:
    """Input px per token: the network's own reduction that explains the grid, else the plain quotient."""
    for step in reductions:
        if all(n in (side // step, -(-side // step)) for side, n in zip(size, grid, strict=True)):
            return step
    return max(1, round((size[0] / grid[0] + size[1] / grid[1]) / 2))


def reductions(model: nn.Module) -> list[int]:
    """Input px per token that the network states for its intermediates, each once."""
    stated = [entry.get("reduction") for entry in getattr(model, "feature_info", [])]
    return list(dict.fromkeys(int(step) for step in stated if step))


def _one_a_layer(taps: list[Tap]) -> None:
    seen: dict[int, str] = {}
    for tap in taps:
        if tap.layer in seen:
            raise NetworkError(f"expected one tap a layer, got {seen[tap.layer]} and {tap.tap} in layer {tap.layer}; "
                               "choose one kind a run.")  # fmt: skip
        seen[tap.layer] = tap.tap


def _as_maps(output: Tensor, how: str, prefix: int, grid: tuple[int, int]) -> Tensor | None:
    """(M, N, C) view of a module's output, or None when it is not laid out `how`."""
    if how == "tokens" and output.ndim == 3 and output.shape[1] - prefix == grid[0] * grid[1]:
        return output[:, prefix:]
    if how == "nchw" and output.ndim == 4 and tuple(output.shape[2:]) == grid:
        return output.flatten(2).transpose(1, 2)
    if how == "nhwc" and output.ndim == 4 and tuple(output.shape[1:3]) == grid:
        return output.flatten(1, 2)
    return None


class Capture:
    """Runs a network and hands each tap's maps to `sink` as they appear; hooks live only inside `with`.

    Args:
        model, taps: from `find_taps` at the input size used.
        sink: called with the tap and its (M, N, C) maps. The maps may be views of memory that the network goes on to
            overwrite: use them at once or copy.
        norm: apply the network's final norm to token taps first (DINOv2's own habit; timm's intermediates do not).
    """

    def __init__(self, model: nn.Module, taps: Sequence[Tap], sink: Sink, norm: bool = False) -> None:
        self.model, self.taps, self.sink, self.norm = model, list(taps), sink, None
        if norm:
            self.norm = getattr(model, "norm", None)
            none = not isinstance(self.norm, nn.Module) or isinstance(self.norm, nn.Identity)
            if none or any(tap.how != "tokens" for tap in taps):
                raise NetworkError(f"{type(model).__name__} has no final norm for its intermediates; drop --norm.")
        self.last = max(tap.layer for tap in taps)

    @contextmanager
    def hooked(self) -> Iterator[Capture]:
        modules = dict(self.model.named_modules())
        handles = [modules[tap.tap].register_forward_hook(self._hook(tap))
                   for tap in self.taps if tap.how != "intermediate"]  # fmt: skip
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, tap: Tap) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            maps = _as_maps(output, tap.how, tap.prefix, tap.grid)
            if maps is None:
                raise NetworkError(f"{tap.tap} put out {tuple(output.shape)}; probed as {tap.how} on {tap.grid}. "
                                   "Was the input of another size?")  # fmt: skip
            self.sink(tap, maps if self.norm is None else self.norm(maps))

        return hook  # fmt: skip

    @torch.no_grad()
    def run(self, images: Tensor) -> None:
        """One forward of (M, 3, H, W) normalised images without gradients, stopped after the last layer wanted."""
        self.forward(images)

    def forward(self, images: Tensor) -> None:
        """As `run`, in the caller's gradient mode."""
        inner = [tap for tap in self.taps if tap.how == "intermediate"]
        indices = sorted({tap.layer for tap in inner} | {self.last})
        results = _intermediates(self.model)(images, indices=indices, stop_early=True, intermediates_only=True)
        for tap in inner:
            self.sink(tap, results[indices.index(tap.layer)].flatten(2).transpose(1, 2))


def capture(model: nn.Module, images: Tensor, layers: str = "all", norm: bool = False) -> dict[str, Tensor]:
    """Features of each tap as (M, C, H, W) copies: for exploring, where `Capture` streams.

    Example:
        >>> import timm
        >>> model = timm.create_model("resnet18").eval()
        >>> capture(model, torch.zeros(2, 3, 64, 64), "layer3")["layer3"].shape
        torch.Size([2, 256, 4, 4])
    """
    with torch.no_grad():
        return read_taps(model, find_taps(model, (int(images.shape[2]), int(images.shape[3])), layers), images, norm)


def read_taps(model: nn.Module, taps: Sequence[Tap], images: Tensor, norm: bool = False) -> dict[str, Tensor]:
    """Features of each tap as (M, C, H, W) copies, with gradients where the caller's mode has them.

    Args: model, taps: from `find_taps` at this input size. images: (M, 3, H, W), normalised.
    """
    kept: dict[str, Tensor] = {}

    def keep(tap: Tap, maps: Tensor) -> None:
        # A copy: what follows in the network may work in place.
        kept[tap.tap] = maps.transpose(1, 2).unflatten(2, tap.grid).clone()

    with Capture(model, taps, keep, norm).hooked() as tapped:
        tapped.forward(images)
    return kept


def outliers(maps: Tensor, k: float = 6.0) -> tuple[Tensor, Tensor, Tensor]:
    """Artefact tokens: norms beyond median + k MAD (1.4826-scaled) within each image.

    Returns: (M, N) mask, (M,) median norm, (M,) scaled MAD.
    """
    norms = maps.float().norm(dim=2)
    median = norms.median(dim=1, keepdim=True).values
    spread = 1.4826 * (norms - median).abs().median(dim=1, keepdim=True).values
    return norms > median + k * spread, median[:, 0], spread[:, 0]
