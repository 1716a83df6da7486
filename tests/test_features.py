"""What a tap reads is what timm says it is, on networks of many families; hooks come off, later blocks never run."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from freqkd_analysis.errors import NetworkError
from freqkd_analysis.features import Capture, capture, find_taps, layer_names, outliers

FLAT = {"img_size": (32, 48)}
WIDE = {"img_size": (64, 96)}

# name, arguments of timm, input size, how its taps are read. Slimmed where the smallest variant is large.
FAMILIES = [
    ("vit_tiny_patch16_224", {**FLAT, "depth": 4}, (32, 48), "tokens"),
    ("vit_small_patch14_reg4_dinov2", {"img_size": (28, 42), "depth": 3, "embed_dim": 96}, (28, 42), "tokens"),
    ("deit_tiny_distilled_patch16_224", {**FLAT, "depth": 3}, (32, 48), "tokens"),
    ("eva02_tiny_patch14_224", {"img_size": (28, 42), "depth": 3}, (28, 42), "tokens"),
    ("beit_base_patch16_224", {**FLAT, "embed_dim": 48, "num_heads": 3, "depth": 3}, (32, 48), "tokens"),
    ("vit_small_patch16_dinov3", {**FLAT, "depth": 3}, (32, 48), "tokens"),
    ("cait_xxs24_224", {**FLAT, "depth": 4}, (32, 48), "tokens"),
    ("xcit_nano_12_p16_224", {}, (32, 48), "tokens"),
    ("mixer_s32_224", WIDE, (64, 96), "tokens"),
    ("convit_tiny", {"depth": 4, "local_up_to_layer": 2}, (224, 224), "tokens"),
    ("levit_128s", {}, (224, 224), "tokens"),
    ("swin_tiny_patch4_window7_224", {**WIDE, "embed_dim": 24}, (64, 96), "nhwc"),
    ("swinv2_tiny_window8_256", {**WIDE, "embed_dim": 24}, (64, 96), "nhwc"),
    ("mambaout_femto", {}, (64, 96), "nhwc"),
    ("hiera_tiny_224", {**WIDE, "embed_dim": 24}, (64, 96), "any"),
    ("mvitv2_tiny", {}, (64, 96), "intermediate"),
    ("twins_pcpvt_small", {}, (64, 96), "intermediate"),
    ("tiny_vit_5m_224", {}, (64, 96), "nchw"),
    ("pvt_v2_b0", {}, (64, 96), "nchw"),
    ("coatnet_nano_rw_224", {}, (224, 224), "nchw"),
    ("maxvit_rmlp_pico_rw_256", {}, (256, 256), "nchw"),
    ("edgenext_xx_small", {}, (64, 96), "nchw"),
    ("davit_tiny", {"embed_dims": (24, 48, 96, 192)}, (64, 96), "nchw"),
    ("focalnet_tiny_srf", {}, (64, 96), "nchw"),
    ("nest_tiny", {}, (224, 224), "nchw"),
    ("mobilevit_xxs", {}, (64, 96), "nchw"),
    ("resnet18", {}, (64, 96), "nchw"),
    ("regnetx_002", {}, (64, 96), "nchw"),
    ("convnext_atto", {}, (64, 96), "nchw"),
    ("convnextv2_atto", {}, (64, 96), "nchw"),
    ("efficientnet_lite0", {}, (64, 96), "nchw"),
    ("efficientnet_b0", {}, (64, 96), "nchw"),
    ("mobilenetv2_050", {}, (64, 96), "nchw"),
    ("mobilenetv3_small_050", {}, (64, 96), "nchw"),
    ("ghostnet_050", {}, (64, 96), "nchw"),
    ("densenet121", {}, (64, 96), "nchw"),
    ("vgg11", {}, (64, 96), "nchw"),
    ("fastvit_t8", {}, (64, 96), "nchw"),
    ("repvit_m0_9", {}, (64, 96), "nchw"),
    ("hgnetv2_b0", {}, (64, 96), "nchw"),
]


def network(name: str, **arguments) -> nn.Module:
    """Random weights with no zero-initialised branch left, so that every block does something."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def images(size: tuple[int, int], count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return network("vit_tiny_patch16_224", img_size=(32, 48), depth=6)


@pytest.fixture(scope="module")
def dinov2() -> nn.Module:
    return network("vit_small_patch14_reg4_dinov2", img_size=(28, 42), depth=3, embed_dim=96)


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return network("resnet18")


# Families -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, arguments, size, how", FAMILIES, ids=[family[0] for family in FAMILIES])
def test_taps_read_exactly_the_intermediates_of_timm(name, arguments, size, how):
    model, batch = network(name, **arguments), images(size)
    taps = find_taps(model, size)
    with torch.no_grad():
        expected = model.forward_intermediates(batch, intermediates_only=True)
    got = capture(model, batch)
    assert [tap.tap for tap in taps] == layer_names(model) and set(got) == set(layer_names(model))
    assert how == "any" or {tap.how for tap in taps} == {how}
    for i, (tap, want) in enumerate(zip(taps, expected, strict=True)):
        assert tap.layer == i and tap.depth == (i + 1) / len(taps)
        assert want.shape == (2, tap.channels, *tap.grid) and torch.equal(got[tap.tap], want), tap.tap
        assert want.std() > 0
        assert all(abs(side - n * tap.stride) < tap.stride for side, n in zip(size, tap.grid, strict=True)), tap
    assert hooks(model) == 0


def test_most_families_are_read_by_hooks():
    """Reading timm's list keeps all maps at once; it is the way out, not the rule."""
    assert len(FAMILIES) >= 20
    assert sum(family[3] in ("tokens", "nchw", "nhwc") for family in FAMILIES) >= 35


def test_prefix_tokens_are_dropped(dinov2):
    batch = images((28, 42))
    with torch.no_grad():
        tokens = dinov2._pos_embed(dinov2.patch_embed(batch))
        for block in dinov2.blocks[:2]:
            tokens = block(tokens)
    assert tokens.shape == (2, 5 + 2 * 3, 96) and dinov2.num_prefix_tokens == 5
    expected = tokens[:, 5:].reshape(2, 2, 3, 96).permute(0, 3, 1, 2)
    assert torch.equal(capture(dinov2, batch, "1")["blocks.1"], expected)
    assert {tap.prefix for tap in find_taps(dinov2, (28, 42))} == {5}


# Sub-block taps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["attn", "mlp", "norm1", "attn.proj", "mlp.fc1"])
def test_parts_of_blocks_are_read_at_every_layer(dinov2, part):
    batch, seen = images((28, 42)), []
    handles = [
        block.get_submodule(part).register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
        for block in dinov2.blocks
    ]
    with torch.no_grad():
        dinov2(batch)
    for handle in handles:
        handle.remove()
    got = capture(dinov2, batch, f"blocks.*.{part}")
    assert list(got) == [f"blocks.{i}.{part}" for i in range(3)]
    for i, name in enumerate(got):
        assert torch.equal(got[name].flatten(2).transpose(1, 2), seen[i][:, 5:])


def test_what_a_following_in_place_operation_overwrites_is_read_before(resnet):
    """bn2's output is added to and cut by ReLU in place: the tap must hold bn2 of its input, negative values too."""
    batch, inputs = images((64, 96)), []
    module = resnet.get_submodule("layer3.0.bn2")
    handle = module.register_forward_pre_hook(lambda m, args: inputs.append(args[0].clone()))
    got = capture(resnet, batch, "layer3.0.bn2")["layer3.0.bn2"]
    handle.remove()
    assert torch.equal(got, module(inputs[-1])) and (got < 0).any()


class InPlace(nn.Module):
    """Two convolutions, each cut by an in-place ReLU right after; the list of intermediates holds copies."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 5, 2, 2)
        self.feature_info = [{"module": "one"}, {"module": "two"}]

    def forward_intermediates(self, x, indices=None, stop_early=False, intermediates_only=True):
        kept = []
        for step in (self.one, self.two):
            x = step(x)
            kept.append(x.clone())
            torch.relu_(x)
        return kept if indices is None else [kept[i] for i in indices]


def test_hooks_are_safe_from_an_in_place_relu():
    torch.manual_seed(0)
    model, batch = InPlace().eval(), images((16, 16))
    got, expected = capture(model, batch), model.forward_intermediates(batch)
    assert {tap.how for tap in find_taps(model, (16, 16))} == {"nchw"}
    for map_, want in zip(got.values(), expected, strict=True):
        assert torch.equal(map_, want) and (map_ < 0).any()


def test_parts_of_windowed_blocks_are_read_or_refused():
    """Swin's MLP sees the grid; its attention sees windows stacked into the batch, which are no map of the image."""
    model = network("swin_tiny_patch4_window7_224", img_size=(64, 96), embed_dim=24, window_size=4)
    got = capture(model, images((64, 96)), "layers.*.blocks.0.mlp")
    assert [tuple(m.shape) for m in got.values()] == [(2, 24 * 2**i, 16 // 2**i, 24 // 2**i) for i in range(4)]
    for layer in (0, 1):
        with pytest.raises(NetworkError, match=f"layers.{layer}.blocks.0.attn puts out"):
            find_taps(model, (64, 96), f"layers.{layer}.blocks.0.attn")


def test_tokens_that_are_not_the_grid_are_no_prefix():
    """A stage that downsamples inside: 196 tokens at its entrance are not 147 prefix tokens and a 7 x 7 grid."""
    model = network("levit_128s")
    with pytest.raises(
        NetworkError, match="stages.1.downsample.attn_downsample.kv puts out 1 x 196 tokens an image; expected the 7x7"
    ):
        find_taps(model, (224, 224), "stages.1.downsample.attn_downsample.kv")


def test_queries_of_attention_heads_are_no_map(vit):
    """(B, heads, tokens, head width) has four axes as an image has."""
    with pytest.raises(NetworkError, match="blocks.2.attn.q_norm puts out no feature map"):
        find_taps(vit, (32, 48), "blocks.2.attn.q_norm")


def test_a_module_between_blocks_belongs_to_the_next(resnet):
    (tap,) = find_taps(resnet, (64, 96), "maxpool")
    assert (tap.layer, tap.tap, tap.grid, tap.stride) == (1, "maxpool", (16, 24), 4)


# Naming layers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layers, expected",
    [("0,5,-1", ["blocks.0", "blocks.5"]), ("-1", ["blocks.5"]), (" 3 , 1", ["blocks.1", "blocks.3"]),
     ("blocks.[24]", ["blocks.2", "blocks.4"]), ("blocks.1,blocks.3.attn", ["blocks.1", "blocks.3.attn"]),
     ("*.?", [f"blocks.{i}" for i in range(6)])],
)  # fmt: skip
def test_layers_by_number_and_by_glob(vit, layers, expected):
    assert [tap.tap for tap in find_taps(vit, (32, 48), layers)] == expected


@pytest.mark.parametrize(
    "layers, says",
    [("6", "layer 6 is out of range; the network has layers 0 to 5."), ("1,-7", "layer -7 is out of range"),
     ("block.*", 'no layer matches "block.*". Did you mean "blocks'), ("stage*", "Layers: blocks.0, blocks.1"),
     ("blocks.*.attn,blocks.*.mlp", "expected one tap a layer, got blocks.0.attn and blocks.0.mlp in layer 0"),
     ("blocks.2,blocks.2.mlp", "got blocks.2 and blocks.2.mlp in layer 2"),
     ("blocks.0.ls1.nothing", "no layer matches"), ("head", "head puts out no feature map (or never runs)")],
)  # fmt: skip
def test_wrong_layers_are_said_in_one_line(vit, layers, says):
    with pytest.raises(NetworkError) as error:
        find_taps(vit, (32, 48), layers)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert hooks(vit) == 0


def test_a_network_without_intermediates_is_refused():
    with pytest.raises(NetworkError, match="Sequential has no intermediates in timm"):
        find_taps(nn.Sequential(nn.Conv2d(3, 4, 1)), (8, 8))


# Running --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["2", "blocks.2.attn", "0,1,2"])
def test_blocks_after_the_last_wanted_never_run(vit, layers):
    taps, ran = find_taps(vit, (32, 48), layers), []
    handles = [block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(vit.blocks)]
    with Capture(vit, taps, lambda tap, maps: None).hooked() as tapped:
        tapped.run(images((32, 48)))
    for handle in handles:
        handle.remove()
    assert ran == [0, 1, 2]


def test_maps_come_in_order_and_nothing_is_kept(vit):
    order = []
    taps = find_taps(vit, (32, 48), "0,3,5")
    with Capture(vit, taps, lambda tap, maps: order.append((tap.layer, tuple(maps.shape)))).hooked() as tapped:
        tapped.run(images((32, 48), 3))
        assert hooks(vit) == 3
    assert order == [(0, (3, 6, 192)), (3, (3, 6, 192)), (5, (3, 6, 192))] and hooks(vit) == 0


def test_hooks_come_off_when_the_sink_or_the_network_fails(vit):
    taps = find_taps(vit, (32, 48), "all")

    def broken(tap, maps):
        raise KeyError("sink")

    with pytest.raises(KeyError, match="sink"), Capture(vit, taps, broken).hooked() as tapped:
        tapped.run(images((32, 48)))
    assert hooks(vit) == 0
    with pytest.raises(NetworkError, match="takes no 30x48 input"):
        find_taps(vit, (30, 48))
    assert hooks(vit) == 0


def test_another_input_size_than_probed_is_noticed(resnet):
    taps = find_taps(resnet, (64, 96), "layer2")
    with pytest.raises(NetworkError, match=r"layer2 put out \(2, 128, 8, 8\); probed as nchw on \(8, 12\)"), \
            Capture(resnet, taps, lambda tap, maps: None).hooked() as tapped:  # fmt: skip
        tapped.run(images((64, 64)))
    assert hooks(resnet) == 0


def test_norm_is_timms_final_norm(dinov2):
    batch = images((28, 42))
    with torch.no_grad():
        expected = dinov2.forward_intermediates(batch, norm=True, intermediates_only=True)
        plain = dinov2.forward_intermediates(batch, intermediates_only=True)
    for got, want, raw in zip(capture(dinov2, batch, norm=True).values(), expected, plain, strict=True):
        assert torch.equal(got, want) and not torch.allclose(got, raw, atol=0.1)


def test_norm_where_there_is_none_is_refused(resnet):
    pooled = network("vit_tiny_patch16_224", img_size=(32, 48), depth=2, global_pool="avg")
    assert isinstance(pooled.norm, nn.Identity)
    for model, size in ((resnet, (64, 96)), (pooled, (32, 48))):
        with pytest.raises(NetworkError, match="has no final norm for its intermediates; drop --norm"):
            capture(model, images(size), norm=True)


def test_numbers_do_not_depend_on_the_batch(vit):
    batch = images((32, 48), 4)
    whole = capture(vit, batch, "5")["blocks.5"]
    alone = torch.cat([capture(vit, image[None], "5")["blocks.5"] for image in batch])
    torch.testing.assert_close(whole, alone, rtol=1e-5, atol=1e-5)


# Artefact tokens ------------------------------------------------------------------------------------------------


def test_outliers_known_answer():
    """Norms 1..9 and 60: median 5 (lower of two), deviations' median 2, MAD 2.97: beyond 5 + 6 x 2.97 lies 60 alone."""
    norms = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 60])
    maps = torch.stack([norms, torch.full((10,), 7.0)])[:, :, None] * torch.tensor([0.6, 0.0, 0.8])
    mask, median, spread = outliers(maps)
    assert mask.tolist() == [[False] * 9 + [True], [False] * 10]
    torch.testing.assert_close(median, torch.tensor([5.0, 7.0]))
    torch.testing.assert_close(spread, torch.tensor([2 * 1.4826, 0.0]), atol=1e-5, rtol=1e-5)
    assert not outliers(maps, k=20.0)[0].any() and outliers(maps, k=0.5)[0][0].tolist() == [False] * 6 + [True] * 4
    assert torch.equal(outliers(maps.half())[0], mask)
