"""Segmentation heads: where their pixels lie, what they leave alone, and that they learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as functional
from torch import nn

from freqkd_analysis.data import synthetic
from freqkd_analysis.errors import FreqkdError
from freqkd_train import engine
from freqkd_train.config import Training
from freqkd_train.metrics import miou
from freqkd_train.pyramid import Backbone
from freqkd_train.segmentation import HEADS, SegmentationStep, Segmenter, Window, build, predict

SIZE = (60, 80)  # rows, columns; no multiple of 14, nor of 32


def vit(size: tuple[int, int] = SIZE) -> nn.Module:
    torch.manual_seed(0)
    whole = tuple(-(-side // 14) * 14 for side in size)
    return timm.create_model("vit_tiny_patch16_224", patch_size=14, img_size=whole, depth=6, embed_dim=48, num_heads=3,
                             num_classes=0).eval()  # fmt: skip


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=0).eval()


def segmenter(
    head: str = "light", network: nn.Module | None = None, size: tuple[int, int] = SIZE, **more: Any
) -> Segmenter:
    options = {name: more.pop(name) for name in ("train", "rate", "layer_decay") if name in more}
    backbone = Backbone(network or vit(size), size, channels=32, **options)
    return build(head, backbone, **{"width": 32} | more)


def batch(size: tuple[int, int] = SIZE, masks: tuple[int, int] | None = None, images: int = 2) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    return {"ids": [f"i{n}" for n in range(images)], "images": torch.randn(images, 3, *size, generator=draw),
            "masks": torch.randint(0, 9, (images, *(masks or size)), generator=draw)}  # fmt: skip


def loss_of(step: SegmentationStep, given: dict[str, Any]) -> float:
    return step(given)["loss"].item()


@pytest.mark.parametrize(
    ("grid", "covers", "shown"),
    [((5, 7), (70, 98), (60, 90)), ((1, 1), (14, 14), (3, 14)), ((3, 2), (42, 28), (42, 28)), ((8, 6), (4, 6), (3, 5))],
)
def test_placing_is_resizing_to_the_padded_size_and_cutting(grid: Any, covers: Any, shown: Any) -> None:
    x = torch.randn(2, 3, *grid, dtype=torch.float64).float()
    placed = Window(covers, shown, shown).place(x)
    wanted = functional.interpolate(x.double(), size=covers, mode="bilinear")[..., : shown[0], : shown[1]]
    torch.testing.assert_close(placed.double(), wanted, rtol=1e-5, atol=1e-6)


def test_placing_at_another_size_reads_at_the_centres_of_pixels() -> None:
    """A ramp stays one: cell i of 10 has its centre at 14 (i + 1/2) px."""
    ramp = (14 * (torch.arange(10.0) + 0.5)).expand(1, 1, 4, 10)
    placed = Window((56, 140), (50, 126), (7, 300)).place(ramp)
    wanted = ((torch.arange(300) + 0.5) * 126 / 300).clamp(7, 133)
    torch.testing.assert_close(placed[0, 0], wanted.expand(7, 300), rtol=1e-5, atol=1e-4)


def test_the_light_head_is_that_of_the_paper_done_the_long_way() -> None:
    """Every tap to full size, concatenated, joined: the same numbers from far less memory."""
    made = segmenter("light", content=(57, 70)).train()
    images, head = batch()["images"], made.head
    features = made.backbone.read(images)
    assert len(features) == 5 and {tuple(x.shape[2:]) for x in features.values()} == {(5, 6)}
    wide = [functional.interpolate(narrow(features[tap.tap]), size=(70, 84), mode="bilinear")[..., :57, :70]
            for narrow, tap in zip(head.narrow, made.backbone.taps, strict=True)]  # fmt: skip
    joined = functional.conv2d(torch.cat(wide, 1), head.join.weight)
    mean, variance = joined.mean((0, 2, 3), keepdim=True), joined.var((0, 2, 3), unbiased=False, keepdim=True)
    wanted = functional.conv2d(((joined - mean) / (variance + 1e-5).sqrt()).relu(), head.classify.weight,
                               head.classify.bias)  # fmt: skip
    torch.testing.assert_close(made(images), wanted, rtol=1e-4, atol=1e-4)


def test_the_light_head_on_stages_of_unlike_grids() -> None:
    made = segmenter("light", resnet()).eval()
    images, head = batch()["images"], made.head
    features = made.backbone.read(images)
    assert [tap.stride for tap in made.backbone.taps] == [4, 8, 16, 32]
    wide = [functional.interpolate(narrow(features[tap.tap]), size=(64, 96), mode="bilinear")[..., :60, :80]
            for narrow, tap in zip(head.narrow, made.backbone.taps, strict=True)]  # fmt: skip
    wanted = head.classify(head.norm(head.join(torch.cat(wide, 1))).relu())
    torch.testing.assert_close(made(images), wanted, rtol=1e-4, atol=1e-4)


def test_the_stretched_head_differs_by_the_padding_alone() -> None:
    plain, stretched = (segmenter(head, content=(50, 66)).eval() for head in ("light", "light_stretched"))
    stretched.load_state_dict(plain.state_dict())
    images = batch()["images"]
    assert not torch.allclose(plain(images), stretched(images), atol=1e-3)
    # The whole grid of 70 x 84 px, padding and all, over the picture.
    plain.backbone.size = plain.backbone.padded
    wanted = plain(functional.pad(images, (0, 4, 0, 10)), content=(70, 84), size=(50, 66))
    torch.testing.assert_close(stretched(images), wanted)
    whole = {head: segmenter(head, vit((70, 84)), (70, 84)).eval() for head in ("light", "light_stretched")}
    whole["light_stretched"].load_state_dict(whole["light"].state_dict())
    images = batch((70, 84))["images"]
    assert torch.equal(whole["light"](images), whole["light_stretched"](images))  # nothing padded, nothing to stretch


def test_stretching_displaces_and_the_correction_does_not() -> None:
    """The figures of the release: a 35 x 46 grid of a 490 x 644 input over 480 x 640 px."""
    rows, columns = 14 * (torch.arange(35.0) + 0.5), 14 * (torch.arange(46.0) + 0.5)
    down, across = rows[:, None].expand(35, 46), columns.expand(35, 46)
    where = torch.stack([down, across])[None]
    mine, theirs = (Window(covers, (480, 640), (480, 640)).place(where)[0] for covers in ((490, 644), (480, 640)))
    truth = torch.stack(torch.meshgrid(torch.arange(480) + 0.5, torch.arange(640) + 0.5, indexing="ij"))
    inner = (slice(None), slice(8, 470), slice(8, 630))
    assert (mine - truth)[inner].abs().max() < 1e-3
    off = (theirs - truth)[inner].abs().amax((1, 2))
    assert off[0] == pytest.approx(10 * 470 / 480, abs=0.05) and off[1] == pytest.approx(4 * 630 / 640, abs=0.05)


def test_a_linear_head_classifies_cells_before_they_are_resized() -> None:
    made = segmenter("linear").train()
    images = batch()["images"]
    tap = made.backbone.taps[-1]
    cells = made.backbone.read(images)[tap.tap]
    wide = functional.interpolate((cells - cells.mean((0, 2, 3), keepdim=True))
                                  / (cells.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt(),
                                  size=(70, 84), mode="bilinear")[..., :60, :80]  # fmt: skip
    torch.testing.assert_close(made(images), made.head.classify(wide), rtol=1e-4, atol=1e-4)
    assert tap.layer == 5 and made.describe()["taps"] == [tap.tap]


@pytest.mark.parametrize("network", [vit, resnet])
def test_maps_of_a_pyramid_lie_upon_one_another(network: Any) -> None:
    """A head that only adds up position maps gives positions, also where a coarse map reaches beyond the grid."""
    made = segmenter("fpn", network())
    head, strides = made.head, made.backbone.strides
    head.smooth = nn.ModuleList(nn.Identity() for _ in strides)
    head.classify = nn.Identity()
    maps = made.backbone.maps(made.backbone.read(batch()["images"]))
    shapes = [tuple(x.shape[2:]) for x in maps.values()]
    where = [
        ((torch.arange(h) + 0.5) * s)[:, None].expand(h, w)[None, None]
        for (h, w), s in zip(shapes, strides, strict=True)
    ]
    placed = head(where, Window(made.backbone.padded, SIZE, SIZE))[0, 0] / len(strides)
    margin = int(strides[-1] / 2 + strides[0])  # no cell has its centre nearer to the edge
    inner = slice(margin, SIZE[0] - margin)
    wanted = (torch.arange(SIZE[0]) + 0.5)[inner]
    torch.testing.assert_close(placed[inner], wanted[:, None].expand(-1, SIZE[1]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("network", [vit, resnet])
@pytest.mark.parametrize("images", [1, 2])
def test_a_step_learns_with_a_frozen_backbone_left_alone(head: str, network: Any, images: int) -> None:
    made = segmenter(head, network())
    step, given = SegmentationStep(made).train(), batch(images=images)
    before = {name: value.clone() for name, value in made.backbone.network.state_dict().items()}
    found = step(given)
    assert torch.equal(found["loss"], sum(found["terms"].values())) and found["loss"].dtype == torch.float32
    found["loss"].backward()
    trained = {name for name, p in step.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None for p in step.parameters() if p.requires_grad)
    assert not any(name.startswith("segmenter.backbone.network") for name in trained)
    assert all(p.grad is None for p in made.backbone.network.parameters()) and step.rates() == {}
    assert not any(module.training for module in made.backbone.network.modules())
    assert all(torch.equal(before[name], value) for name, value in made.backbone.network.state_dict().items())


def test_the_loss_is_the_mean_over_all_pixels_with_the_unlabelled() -> None:
    step, given = SegmentationStep(segmenter(content=(50, 70))).train(), batch()
    given["masks"][0] = 0
    logits = step.segmenter(given["images"]).detach().double().numpy()
    shown = given["masks"][:, :50, :70].numpy()  # what lies in the padding is not learned
    chosen = np.take_along_axis(logits, shown[:, None], 1)[:, 0]
    wanted = np.mean(np.log(np.exp(logits).sum(1)) - chosen)
    assert loss_of(step, given) == pytest.approx(wanted, rel=1e-5)
    cut = given | {"masks": given["masks"][:, :50, :70]}
    assert loss_of(step, cut) == loss_of(step, given)


@pytest.mark.parametrize(("train", "network"), [("full", vit), ("lora", vit), ("last:1", resnet), ("full", resnet)])
def test_a_trained_backbone_learns_at_its_own_rate(train: str, network: Any) -> None:
    step = SegmentationStep(segmenter("light", network(), train=train)).train()
    buffers = {name: b.clone() for name, b in step.segmenter.backbone.network.named_buffers()}
    step(batch())["loss"].backward()
    names = [name for name, p in step.named_parameters() if p.requires_grad]
    assert all(p.grad is not None for p in step.parameters() if p.requires_grad)
    ((prefix, rate),) = step.rates().items()
    assert any(name.startswith(prefix) for name in names) and rate == (1.0 if train == "lora" else 0.1)
    assert all(torch.equal(buffers[name], b) for name, b in step.segmenter.backbone.network.named_buffers())


def test_layer_decay_names_parameters_of_the_step() -> None:
    step = SegmentationStep(segmenter(train="full", layer_decay=0.5))
    names = dict(step.named_parameters())
    assert step.rates() and all(name in names for name in step.rates())


@pytest.mark.parametrize("head", HEADS)
def test_predictions_are_labels_at_the_size_asked_for(head: str) -> None:
    step = SegmentationStep(segmenter(head, content=(50, 70))).train()
    images = batch(images=3)["images"]
    labels = predict(step, images, (101, 67))
    assert labels.shape == (3, 101, 67) and labels.dtype == torch.uint8 and labels.max() < 9
    assert step.training and step.segmenter.head.training and not step.segmenter.backbone.network.training
    alone = torch.cat([predict(step.segmenter, one[None], (101, 67)) for one in images])
    assert torch.equal(alone, labels)
    assert torch.equal(predict(step, images, (50, 70)), step.eval().segmenter(images).argmax(1).byte())
    if head != "light_stretched":  # which shows the whole grid, whatever the picture fills
        top = predict(step, images, (100, 70), content=(25, 70))
        assert not torch.equal(top, predict(step, images, (100, 70)))


def test_a_step_is_the_same_each_time() -> None:
    found = []
    for seed in (5, 6):  # of what else draws in this process
        step = SegmentationStep(segmenter()).train()
        torch.manual_seed(seed)
        step(batch())["loss"].backward()
        found.append([p.grad for p in step.segmenter.head.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_building_leaves_the_global_random_state() -> None:
    backbone, state = Backbone(resnet(), SIZE, channels=32), torch.get_rng_state()
    first, other = (build("light", backbone, width=8, seed=seed).head.join.weight for seed in (0, 1))
    assert torch.equal(state, torch.get_rng_state()) and not torch.equal(first, other)


def test_half_types_do_not_move_pixels() -> None:
    """Eight bits hold the weights of a ramp to 1 in 256 only; under an autocast they stay what they are."""
    ramp, window = (14 * (torch.arange(10.0) + 0.5)).expand(1, 1, 4, 10), Window((56, 140), (50, 126), (7, 300))
    wanted = window.place(ramp)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(window.place(ramp), wanted)
        half = window.place(ramp.bfloat16())
    assert half.dtype == torch.bfloat16 and torch.equal(half, window.place(ramp.bfloat16().float()).bfloat16())


@pytest.mark.parametrize("head", HEADS)
def test_logits_are_float32_under_half_types(head: str) -> None:
    made = segmenter(head).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert made(batch()["images"]).dtype == torch.float32


@pytest.mark.parametrize("head", HEADS)
def test_half_types_give_nearly_the_same_loss(head: str) -> None:
    step, given = SegmentationStep(segmenter(head)).train(), batch()
    plain = loss_of(step, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = step(given)["loss"]
    half.backward()
    assert half.dtype == torch.float32 and half.item() == pytest.approx(plain, rel=0.02)
    assert all(torch.isfinite(p.grad).all() for p in step.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda b: b["masks"].__setitem__((1, 3, 4), 9), "i1: the label image holds the value 9; .* ids 0 to 8"),
        (lambda b: b["masks"].__setitem__((0, 59, 79), -1), "i0: the label image holds the value -1"),
        (lambda b: b.update(masks=b["masks"][:, :30]), r"show 60x80 px, got torch.int64 of shape \(2, 30, 80\)"),
        (lambda b: b.update(masks=b["masks"][:1]), "expected 2 masks"),
        (lambda b: b.update(masks=b["masks"].float()), "whole labels"),
        (lambda b: b.update(images=b["images"][..., :70]), "60x80 px"),
    ],
)  # fmt: skip
def test_a_batch_that_cannot_be_learned_is_told(change: Any, told: str) -> None:
    given = batch()
    change(given)
    with pytest.raises(FreqkdError, match=told):
        SegmentationStep(segmenter("linear"))(given)


@pytest.mark.parametrize(
    ("options", "told"),
    [({"head": "lite"}, 'no head "lite". Did you mean "light"'), ({"classes": 1}, "2 to 256 classes"),
     ({"head": "fpn", "width": 48}, "multiples of 32"), ({"width": 0}, "a width of at least 1"),
     ({"content": (61, 80)}, "61x80 px, must lie within its 60x80 px")],
)  # fmt: skip
def test_settings_that_do_not_fit_are_told(options: dict[str, Any], told: str) -> None:
    with pytest.raises(FreqkdError, match=told):
        segmenter(**{"network": resnet()} | options)


def test_a_description_says_what_is_read() -> None:
    told = segmenter("light", content=(50, 70)).describe()
    assert told["head"] == "light" and told["content"] == [50, 70] and told["padded"] == [70, 84]
    assert told["taps"] == [f"blocks.{n}" for n in (1, 2, 3, 4, 5)]
    assert "neck" not in told and segmenter("fpn").describe()["neck"] == "simple"


class Scenes:
    """Eight rendered infrared scenes and their labels, in memory."""

    def __init__(self, size: tuple[int, int]) -> None:
        planned = synthetic.records(f"pairs=8,groups=8,size={size[1]}x{size[0]},night=0.5")
        seen = [synthetic.render(record) for record in planned]
        self.images = (
            torch.stack([torch.from_numpy(one.ir).float() for one in seen])[:, None].expand(-1, 3, -1, -1) * 4 - 2
        )
        self.masks = torch.stack([torch.from_numpy(one.meta["mask"]) for one in seen]).long()
        self.times = [one.meta["time"] for one in seen]

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, keys: list[tuple[int, int]]) -> dict[str, Any]:
        rows = [index for _, index in keys]
        return {"ids": [str(row) for row in rows], "images": self.images[rows], "masks": self.masks[rows]}

    def score(self, model: nn.Module) -> dict[str, Any]:
        labels = predict(model, self.images, (self.masks.shape[1], self.masks.shape[2])).numpy()
        matrices = [miou.confusion(mask, label, str(i))
                    for i, (mask, label) in enumerate(zip(self.masks.numpy(), labels, strict=True))]  # fmt: skip
        return miou.scores(np.stack(matrices), self.times, classes=synthetic.CLASSES, nan="skip")


@pytest.mark.slow
@pytest.mark.parametrize(("head", "train"), [("fpn", "full"), ("light", "full"), ("linear", "frozen")])
def test_scenes_are_learned(head: str, train: str, tmp_path: Any) -> None:
    """Training on eight scenes, through the loop that every run goes through."""
    scenes = Scenes((93, 125))
    step = SegmentationStep(segmenter(head, resnet(), (93, 125), train=train, rate=1.0))
    before = scenes.score(step)["all"]["miou_9"]
    settings = Training(epochs=60, batch=4, lr=3e-3, min_lr=1e-5, device="cpu", best="")
    engine.fit(step, scenes, settings, 0, tmp_path, say=lambda text: None)
    after = scenes.score(step)["all"]["miou_9"]
    assert after > before + (0.1 if train == "frozen" else 0.35)
