"""Backbones for detectors: true strides, anchors and regions in pixels, and what of the network learns."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from freqkd_analysis.errors import FreqkdError, NetworkError
from freqkd_analysis.features import Tap
from freqkd_train.config import Student
from freqkd_train.pyramid import Anchors, Backbone, Regions, SimplePyramid, chosen, levels, padded_size


def vit(size: tuple[int, int] = (56, 70), patch: int = 14, depth: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=size, patch_size=patch, depth=depth, embed_dim=48,
                             num_heads=3, num_classes=0).eval()  # fmt: skip


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=0, zero_init_last=False).eval()


def made(network: nn.Module, size: tuple[int, int], **options: Any) -> Backbone:
    return Backbone(network, size, **{"channels": 32, **options})


# Maps and strides


def test_simple_pyramid_of_patch_14_has_strides_below_whole_numbers() -> None:
    backbone = made(vit(), (56, 70))
    assert backbone.strides == backbone.units == (3.5, 7.0, 14.0, 28.0)
    shapes = [tuple(x.shape) for x in backbone(torch.randn(2, 3, 56, 70)).values()]
    assert shapes == [(2, 32, 16, 20), (2, 32, 8, 10), (2, 32, 4, 5), (2, 32, 2, 3)]


def test_fpn_on_a_size_that_no_stride_divides() -> None:
    backbone = made(cnn(), (75, 101))
    assert backbone.padded == (96, 128)
    maps = backbone(torch.randn(1, 3, 75, 101))
    assert [tuple(x.shape[2:]) for x in maps.values()] == [(24, 32), (12, 16), (6, 8), (3, 4)]
    assert backbone.strides == (4.0, 8.0, 16.0, 32.0)
    for x, stride in zip(maps.values(), backbone.strides, strict=True):
        assert (x.shape[2] * stride, x.shape[3] * stride) == (96, 128)


def test_padding_lies_right_and_below() -> None:
    network, x = cnn(), torch.randn(1, 3, 75, 101)
    small, large = made(network, (75, 101)), made(network, (96, 128))
    by_hand = torch.zeros(1, 3, 96, 128)
    by_hand[:, :, :75, :101] = x
    for a, b in zip(small(x).values(), large(by_hand).values(), strict=True):
        assert torch.equal(a, b)


def test_single_stride_has_five_maps_of_one_grid() -> None:
    backbone = made(vit(depth=12), (56, 70), neck="single")
    assert [tap.layer for tap in backbone.neck_taps] == [3, 7, 9, 10, 11]
    assert backbone.strides == (14.0,) * 5
    assert backbone.units == (3.5, 7.0, 14.0, 28.0, 56.0)
    assert {tuple(x.shape) for x in backbone(torch.randn(1, 3, 56, 70)).values()} == {(1, 32, 4, 5)}


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 7, 24, 40])
def test_five_taps_by_depth_are_distinct_and_end_at_the_last(count: int) -> None:
    blocks = [Tap(n, f"blocks.{n}", (n + 1) / count, (8, 8), 16, 14, "tokens") for n in range(count)]
    layers = [tap.layer for tap in chosen(blocks, "single")]
    assert layers == sorted(set(layers)) and layers[-1] == count - 1 and len(layers) == min(5, count)
    if count == 24:
        assert layers == [7, 15, 19, 21, 23]


def test_a_token_appears_in_each_map_where_its_stride_says() -> None:
    """The centre of what one token changes, in px, by each map's stated stride."""
    tap = Tap(0, "blocks.0", 1.0, (9, 11), 14, 48, "tokens")
    torch.manual_seed(0)
    neck, base = SimplePyramid([tap], 32), torch.randn(1, 48, 1, 1).expand(1, 48, 10, 12)
    moved = base.clone()
    moved[:, :, 6, 7] += torch.randn(1, 48) * 3
    with torch.no_grad():
        changed = [(a - b).abs().sum((0, 1)) for a, b in zip(neck([moved]), neck([base]), strict=True)]
    for weight, stride in zip(changed, levels([tap], "simple")[0], strict=True):
        rows, columns = torch.where(weight > 0)
        centre = (
            float(rows.min() + rows.max() + 1) / 2 * stride,
            float(columns.min() + columns.max() + 1) / 2 * stride,
        )
        assert centre == pytest.approx((6.5 * 14, 7.5 * 14), abs=stride / 2)


def test_maps_are_float32_under_bfloat16() -> None:
    backbone = made(vit(), (56, 70))
    with torch.autocast("cpu", torch.bfloat16):
        maps = backbone(torch.randn(1, 3, 56, 70))
    assert {x.dtype for x in maps.values()} == {torch.float32}
    exact = backbone(torch.randn(1, 3, 56, 70))
    assert all(torch.isfinite(x).all() for x in [*maps.values(), *exact.values()])


# Anchors and regions


def test_anchors_against_a_loop() -> None:
    anchors = Anchors((3.5, 7.0), ((14.0, 28.0), (28.0, 56.0)), (0.5, 1.0, 2.0))
    maps = [torch.zeros(2, 8, 3, 5, dtype=torch.bfloat16), torch.zeros(2, 8, 2, 3, dtype=torch.bfloat16)]
    found = anchors(ImageList(torch.zeros(2, 3, 10, 17), [(10, 17)] * 2), maps)
    wanted = []
    for (rows, columns), stride, sizes in (((3, 5), 3.5, (14, 28)), ((2, 3), 7.0, (28, 56))):
        for row in range(rows):
            for column in range(columns):
                x, y = (column + 0.5) * stride, (row + 0.5) * stride
                for ratio in (0.5, 1.0, 2.0):
                    for side in sizes:
                        w, h = side / math.sqrt(ratio), side * math.sqrt(ratio)
                        wanted.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    assert len(found) == 2 and found[0].dtype == torch.float32
    np.testing.assert_allclose(found[0].numpy(), np.array(wanted), rtol=0, atol=1e-5)
    assert anchors.num_anchors_per_location() == [6, 6]


@pytest.mark.parametrize("neck", ["simple", "single"])
def test_anchors_cover_objects_of_every_size(neck: str) -> None:
    from freqkd_train.detection import anchors_for

    backbone = made(vit((518, 644), depth=5), (518, 644), neck=neck)
    anchors = anchors_for("faster_rcnn", backbone)
    grids = [(math.ceil(518 / s), math.ceil(644 / s)) for s in backbone.strides]
    image = ImageList(torch.zeros(1, 3, 1, 1), [(518, 644)])
    every = anchors(image, [torch.zeros(1, 1, *grid) for grid in grids])[0]
    rng = np.random.default_rng(0)
    for side in np.geomspace(12, 310, 12):
        ratio = np.exp(rng.uniform(np.log(0.5), np.log(2.5), 5))
        w, h = side / np.sqrt(ratio), side * np.sqrt(ratio)
        x, y = rng.uniform(0, 644 - w), rng.uniform(0, 518 - h)
        boxes = torch.from_numpy(np.stack([x, y, x + w, y + h], 1)).float()
        # A stride of 14 misses the smallest by up to 7 px: it has no finer cell.
        least = 0.4 if neck == "simple" or side > 40 else 0.15
        assert float(box_iou(boxes, every).max(1).values.min()) > least, side


def ramp(grid: tuple[int, int], stride: float) -> Tensor:
    """(1, 2, h, w): x and y px of each cell's centre."""
    rows, columns = ((torch.arange(n) + 0.5) * stride for n in grid)
    down, right = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([right, down])[None]


def test_regions_read_the_pixels_of_their_box() -> None:
    """On a map of pixel coordinates each of the 7 x 7 bins holds the coordinates of its own centre."""
    strides = (3.5, 7.0, 14.0, 28.0)
    maps = {str(i): ramp((round(560 / s), round(700 / s)), s) for i, s in enumerate(strides)}
    boxes = torch.tensor([[101.0, 90, 130, 151], [60, 70, 133, 139], [200, 150, 330, 300], [50, 60, 500, 480.0]])
    got = Regions(strides, strides)(maps, [boxes], [(560, 700)])
    for value, (x1, y1, x2, y2) in zip(got.double().numpy(), boxes.double().numpy(), strict=True):
        middle = (np.arange(7) + 0.5) / 7
        np.testing.assert_allclose(value[0], np.broadcast_to(x1 + (x2 - x1) * middle, (7, 7)), atol=1e-3)
        np.testing.assert_allclose(value[1], np.broadcast_to((y1 + (y2 - y1) * middle)[:, None], (7, 7)), atol=1e-3)


def test_regions_choose_their_map_by_size() -> None:
    strides = (3.5, 7.0, 14.0, 28.0)
    maps = {str(i): torch.full((2, 1, 64 >> i, 64 >> i), float(i)) for i in range(4)}
    sides = [5.0, 97.9, 98.0, 195.9, 196.0, 391.9, 392.0, 900.0]
    boxes = [torch.tensor([[1.0, 1, 1 + side, 1 + side]]) for side in sides]
    got = [float(Regions(strides, strides)(maps, [torch.zeros(0, 4), box], [(224, 224)] * 2).max()) for box in boxes]
    assert got == [0, 0, 1, 1, 2, 2, 3, 3]
    mixed = Regions(strides, strides)(maps, [torch.cat(boxes[::-1] + boxes), boxes[2]], [(224, 224)] * 2)
    assert mixed.amax((1, 2, 3)).tolist() == [*got[::-1], *got, got[2]]


def test_regions_of_one_stride_are_the_mean_over_depths() -> None:
    strides, units = (14.0,) * 3, (3.5, 7.0, 14.0)
    maps = {str(i): torch.randn(1, 4, 10, 12) for i in range(3)}
    boxes = torch.tensor([[20.0, 20, 60, 90], [10, 10, 130, 120]])
    got = Regions(strides, units)(maps, [boxes], [(140, 168)])
    one = [Regions((14.0,), (14.0,))({"0": x}, [boxes], [(140, 168)]) for x in maps.values()]
    torch.testing.assert_close(got, sum(one) / 3)


# What learns


def learning(backbone: Backbone, size: tuple[int, int]) -> set[str]:
    """Names of parameters that a loss on all maps and taps reaches."""
    backbone.train()
    features = backbone.read(torch.randn(2, 3, *size))
    loss = sum(x.square().mean() for x in [*backbone.maps(features).values(), *features.values()])
    loss.backward()
    return {name for name, p in backbone.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}


def test_frozen_trains_the_neck_alone() -> None:
    network = cnn()
    backbone = made(network, (64, 64))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    assert {name.split(".")[0] for name in learning(backbone, (64, 64))} == {"neck"}
    assert not backbone.trained and backbone.rates() == {} and not network.training
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_full_trains_all_that_a_tap_reaches_and_no_batch_statistics() -> None:
    network = cnn()
    backbone = made(network, (64, 64), train="full")
    before = {k: v.clone() for k, v in network.named_buffers()}
    reached = learning(backbone, (64, 64))
    assert {f"network.{name}" for name, p in network.named_parameters() if p.requires_grad} <= reached
    assert all(torch.equal(v, before[k]) for k, v in network.named_buffers())
    assert backbone.rates() == {"network.": 0.1}


def test_layers_behind_the_last_tap_are_frozen() -> None:
    network = vit()
    made(network, (56, 70), train="full")
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["norm.weight", "norm.bias"]


def test_lora_trains_adapters_at_the_full_rate() -> None:
    backbone = made(vit(), (56, 70), train="auto", lora=Student(rank=2))
    assert backbone.way == "lora" and backbone.rates() == {"network.": 1.0}
    trained = {name for name, p in backbone.network.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    assert {name for name in learning(backbone, (56, 70)) if ".lora_B" in name}


def test_last_blocks() -> None:
    backbone = made(vit(), (56, 70), train="last:2")
    assert {name.split(".")[2] for name in learning(backbone, (56, 70)) if name.startswith("network")} == {"4", "5"}


@pytest.mark.parametrize("train", ["full", "lora"])
def test_layer_decay_falls_from_the_last_block(train: str) -> None:
    backbone = made(vit(), (56, 70), train=train, layer_decay=0.5)
    rates = backbone.rates()
    names = {f"network.{name}" for name, p in backbone.network.named_parameters() if p.requires_grad}
    assert set(rates) == names
    for name, rate in rates.items():
        block = int(name.split(".")[2]) if ".blocks." in name else -1
        assert rate == pytest.approx(0.5 ** (5 - block)), name


def test_the_seed_fixes_the_neck_and_leaves_the_global_generator() -> None:
    state = torch.get_rng_state()
    a, b, c = (made(cnn(), (64, 64), seed=seed).neck.state_dict() for seed in (3, 3, 4))
    torch.manual_seed(0)
    network = cnn()
    torch.set_rng_state(state)
    made(network, (64, 64))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)


# Wrong use


def test_wrong_settings_are_told_in_a_line() -> None:
    wrong: list[tuple[Any, str]] = [
        (lambda: made(cnn(), (64, 64), neck="fnp"), 'no neck "fnp". Did you mean "fpn"?'),
        (lambda: made(cnn(), (64, 64), neck="single"), "the neck single needs taps of one stride"),
        (lambda: made(vit(), (56, 70), neck="fpn"), "the neck fpn needs stages of several strides"),
        (lambda: made(cnn(), (64, 64), channels=40), "multiples of 32"),
        (lambda: made(cnn(), (64, 64), train="full", layer_decay=0.0), "layer_decay above 0"),
        (lambda: made(cnn(), (64, 64), train="lora"), "no linear layer"),
        (lambda: made(vit(), (56, 90)), "takes no 56x98 input"),
    ]
    for call, text in wrong:
        with pytest.raises(FreqkdError, match=text.replace("?", r"\?")) as told:
            call()
        assert "\n" not in str(told.value)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(NetworkError, match=r"made for images of 64x64 px, got a batch of shape \(1, 3, 64, 96\)"):
        made(cnn(), (64, 64))(torch.zeros(1, 3, 64, 96))


def test_padded_size_of_patches() -> None:
    assert padded_size(vit(), (57, 70)) == (70, 70)
