"""The student starts, is trained, merged and saved as it says; taps are paired and matched; adapters are peft's own."""

from __future__ import annotations

import copy
import itertools

import pytest
import timm
import torch

from freqkd_analysis.errors import NetworkError
from freqkd_analysis.features import Tap, capture, find_taps, read_taps
from freqkd_train import student as students
from freqkd_train import taps
from freqkd_train.config import ConfigError, Student

VIT = "vit_tiny_patch16_224"


def vit():
    torch.manual_seed(0)
    return timm.create_model(VIT, num_classes=0, img_size=64, depth=3).eval()


def trained(model, settings, scale=0.02):
    """A student whose training is random noise on whatever may change."""
    students.adapt(model, settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def test_lora_changes_nothing_at_first_and_trains_only_adapters(images):
    model = vit()
    before = model.forward_features(images)
    students.adapt(model, Student(adapt="lora", rank=4, alpha=8))
    torch.testing.assert_close(model.forward_features(images), before, rtol=0, atol=0)
    named = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(named) == 3 * 3 * 2 and all(".lora_" in name for name in named)


@pytest.mark.parametrize("scale", [0.0, 0.25, 0.5, 1.0])
def test_lora_is_merged_at_its_scale(images, scale):
    """Against W + scale * alpha / rank * B A written out from the adapters' own tensors, in float64."""
    model = vit()
    origin = copy.deepcopy(model.state_dict())
    trained(model, Student(adapt="lora", rank=4, alpha=8))
    state = students.merged(model, origin, scale)
    assert set(state) == set(origin)
    tensors = dict(model.named_parameters())
    for name, value in state.items():
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A.default.weight" in tensors:
            a, b = (tensors[f"{stem}.lora_{x}.default.weight"].detach().double() for x in "AB")
            expected = origin[name].double() + scale * (8 / 4) * b @ a
            assert (value.double() - expected).abs().max() < 1e-6
            assert (scale == 0) == torch.equal(value, origin[name])
        else:
            assert torch.equal(value, origin[name])


def test_a_whole_merge_is_the_trained_network(images):
    model = vit()
    origin = copy.deepcopy(model.state_dict())
    trained(model, Student(adapt="lora", rank=4, alpha=8))
    plain = vit()
    plain.load_state_dict(students.merged(model, origin, 1.0))
    wanted, got = model.forward_features(images), plain.forward_features(images)
    assert (got - wanted).abs().max() / wanted.abs().max() < 1e-5
    assert (wanted - vit().forward_features(images)).abs().max() > 0.1  # the adapters do something


def test_merging_leaves_the_model_alone(images):
    model = vit()
    origin = copy.deepcopy(model.state_dict())
    trained(model, Student(adapt="lora", rank=4))
    before = copy.deepcopy(model.state_dict())
    students.merged(model, origin, 0.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_full_training_is_merged_with_its_statistics():
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=0)
    origin = copy.deepcopy(model.state_dict())
    trained(model, Student(adapt="full"))
    model.train()(torch.randn(4, 3, 32, 32))
    now = model.state_dict()
    half = students.merged(model, origin, 0.5)
    for name in origin:
        if origin[name].is_floating_point():
            torch.testing.assert_close(half[name], (origin[name] + now[name]) / 2)
    assert int(half["bn1.num_batches_tracked"]) == 1
    assert not torch.equal(half["bn1.running_mean"], origin["bn1.running_mean"])


def test_a_student_that_is_not_finite_is_not_exported():
    model = vit()
    origin = copy.deepcopy(model.state_dict())
    students.adapt(model, Student(adapt="full"))
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[0, 0] = float("nan")
    with pytest.raises(NetworkError, match=r"not finite in blocks\.1\.mlp\.fc1\.weight"):
        students.merged(model, origin, 0.5)


def test_adapters_load_in_peft(tmp_path, images):
    from peft import PeftModel

    model = trained(vit(), Student(adapt="lora", rank=4, alpha=8))
    students.save_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(vit(), tmp_path).eval()
    wanted = model.forward_features(images)
    torch.testing.assert_close(loaded.base_model.model.forward_features(images), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapt, blocks", [("last:1", {"2"}), ("last:2", {"1", "2"}), ("last:3", {"0", "1", "2"})])
def test_the_last_blocks_are_trained(adapt, blocks):
    model = vit()
    students.adapt(model, Student(adapt=adapt))
    named = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[1] for name in named} == blocks and all(name.startswith("blocks.") for name in named)


@pytest.mark.parametrize("settings, says", [
    (Student(adapt="last:4"), "the network has 3 blocks"),
    (Student(adapt="lora", targets=("qkv", "fc9")), "no linear layer fc9"),
])  # fmt: skip
def test_ways_that_the_network_has_not(settings, says):
    with pytest.raises(ConfigError, match=says):
        students.adapt(vit(), settings)


def test_the_automatic_way():
    assert students.way(vit(), Student()) == "lora"
    assert students.way(timm.create_model("mobilenetv2_100"), Student()) == "full"
    assert students.way(timm.create_model("mobilenetv2_100"), Student(adapt="last:2")) == "last:2"


def test_a_mixed_start(tmp_path):
    """a * pretrained + (1 - a) * file, checked on the packaged demo network against a hand-made mean."""
    from safetensors.torch import save_file

    from freqkd_analysis import models

    own = models.create("freqkd_demo", size=(64, 64)).model.state_dict()
    other = {name: value + 1 for name, value in own.items()}
    save_file(other, tmp_path / "other.safetensors")
    mixed = students.start("freqkd_demo", f"mix:0.25:{tmp_path}/other.safetensors", (64, 64))
    for name, value in mixed.model.state_dict().items():
        torch.testing.assert_close(value, own[name] + 0.75)
    assert mixed.source.startswith("0.25 * demo + 0.75 * other")


@pytest.mark.parametrize("text", ["mix:2:a.safetensors", "mix:half:a", "mix:0.5", "mix:"])
def test_a_mix_that_cannot_be_read(text):
    with pytest.raises(ConfigError, match=r"expected student\.weights mix:SHARE:FILE"):
        students.start("resnet18", text, (64, 64))


def test_what_the_loss_does_not_reach_is_frozen(images):
    model = vit()
    students.adapt(model, Student(adapt="full"))
    found = find_taps(model, (64, 64), "0,1")
    students.freeze_unused(model, read_taps(model, found, images)["blocks.1"].square().mean())
    frozen = {
        name.split(".")[0] + "." + name.split(".")[1] for name, p in model.named_parameters() if not p.requires_grad
    }
    assert frozen == {"blocks.2", "norm.weight", "norm.bias"}


@pytest.mark.parametrize(
    "name, size", [(VIT, (64, 96)), ("resnet18", (64, 96)), ("swin_tiny_patch4_window7_224", (224, 224))]
)
def test_taps_are_read_as_the_analysis_reads_them_and_with_gradients(name, size):
    sized = {} if name == "resnet18" else {"img_size": size}
    model = timm.create_model(name, num_classes=0, **sized).eval()
    x = torch.randn(1, 3, *size)
    found = find_taps(model, size)
    got, wanted = read_taps(model, found, x), capture(model, x)
    assert list(got) == [tap.tap for tap in found]
    for tap in wanted:
        torch.testing.assert_close(got[tap], wanted[tap])
    sum(value.square().mean() for value in got.values()).backward()
    assert all(p.grad is not None for p in model.get_submodule(found[0].tap).parameters())


def made(n, of, grid=(8, 8), channels=64, name="blocks"):
    return Tap(n, f"{name}.{n}", (n + 1) / of, grid, 16, channels, "tokens")


@pytest.mark.parametrize("few, many", [(1, 1), (1, 5), (3, 7), (4, 12), (5, 12), (6, 8)])
def test_pairs_by_depth_are_the_best_of_all(few, many):
    """Against every rising choice: the least sum of depth differences."""
    short, long = ([made(n, of) for n in range(of)] for of in (few, many))
    pairs = taps.pair(long, short)

    def cost(places):
        return sum(abs(long[j].depth - short[i].depth) for i, j in enumerate(places))

    best = min(itertools.combinations(range(many), few), key=cost)
    assert [s.layer for _, s in pairs] == list(range(few))
    assert cost([t.layer for t, _ in pairs]) == pytest.approx(cost(best), abs=1e-12)
    assert [(s.layer, t.layer) for s, t in taps.pair(short, long)] == [(s.layer, t.layer) for t, s in pairs]


def test_as_many_taps_are_paired_in_order():
    pairs = taps.pair([made(n, 24) for n in (7, 15, 21, 23)], [made(n, 4) for n in range(4)])
    assert [(t.layer, s.layer) for t, s in pairs] == [(7, 0), (15, 1), (21, 2), (23, 3)]


@pytest.mark.parametrize("teacher, student, says", [
    ((8, 8), (1, 1), "one token has no spatial detail"), ((8, 8), (1, 8), "one token has no spatial detail"),
    ((8, 16), (16, 8), "unlike aspect ratios"), ((32, 8), (8, 8), "unlike aspect ratios"),
])  # fmt: skip
def test_grids_that_cannot_be_matched(teacher, student, says):
    with pytest.raises(NetworkError, match=says):
        taps.pair([made(0, 1, teacher)], [made(0, 1, student)])


@pytest.mark.parametrize(
    "teacher, student", [((16, 16), (7, 7)), ((37, 46), (16, 20)), ((14, 14), (56, 56)), ((5, 7), (3, 4))]
)
def test_grids_that_can(teacher, student):
    taps.pair([made(0, 1, teacher)], [made(0, 1, student)])


def test_matching_brings_the_teachers_shape_and_projectors_only_where_needed():
    pairs = [
        (made(0, 2, (6, 8), 32), made(0, 2, (12, 16), 32, "layer")),
        (made(1, 2, (6, 8), 32), made(1, 2, (3, 4), 48, "layer")),
    ]
    match = taps.Match(pairs)
    assert list(match.projectors) == ["blocks_1"] and len(taps.Match(pairs, "all").projectors) == 2
    features = {"layer.0": torch.randn(2, 32, 12, 16), "layer.1": torch.randn(2, 48, 3, 4)}
    out = match(features)
    assert {tap: tuple(value.shape) for tap, value in out.items()} == {
        "blocks.0": (2, 32, 6, 8),
        "blocks.1": (2, 32, 6, 8),
    }
    plain = taps.Match(pairs, "none", resize=False)(features)
    assert plain["blocks.0"] is features["layer.0"] and plain["blocks.1"].shape[1] == 48


def test_resizing_does_not_alias():
    """A grating above the new grid's Nyquist vanishes; without antialiasing it would become a coarse one."""
    x = torch.cos(torch.arange(32) * torch.pi * 0.9).expand(1, 1, 32, 32)
    assert taps.resized(x, (8, 8)).abs().max() < 0.1
    assert taps.resized(x.to(torch.bfloat16), (8, 8)).dtype == torch.float32
