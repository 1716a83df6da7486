"""The demo network: its file is what its manifest says, it loads at any size, and it has learnt something."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from freqkd_analysis import demo
from freqkd_analysis.errors import NetworkError


def test_the_file_is_small_half_precision_and_the_one_of_the_manifest() -> None:
    from safetensors.torch import load_file

    told = demo.manifest()
    data = demo.WEIGHTS.read_bytes()
    assert len(data) == told["bytes"] <= 6 * 2**20
    assert hashlib.sha256(data).hexdigest() == told["sha256"]
    assert {v.dtype for v in load_file(demo.WEIGHTS).values()} == {torch.float16}
    assert told["licence"] == "Apache-2.0"
    for key in ("command", "seed", "data", "steps", "seconds", "score", "twin_score"):
        assert told[key] not in (None, ""), key


def test_it_is_a_plain_timm_vit_with_every_weight_finite() -> None:
    model = demo.create()
    assert type(model) is VisionTransformer
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == demo.manifest()["parameters"]
    config = model.pretrained_cfg
    assert config["mean"] == (0.485, 0.456, 0.406)
    assert config["input_size"] == (3, 224, 224)


@pytest.mark.parametrize("size", [(224, 224), (64, 80), (512, 640)])
def test_it_works_at_other_sizes_with_its_positions_resampled(size: tuple[int, int]) -> None:
    model = demo.create(img_size=size).eval()
    assert model.patch_embed.grid_size == (size[0] // 16, size[1] // 16)
    with torch.inference_mode():
        out = model.forward_features(torch.zeros(1, 3, *size))
    assert out.shape == (1, size[0] // 16 * (size[1] // 16), 160)
    flexible = demo.create(dynamic_img_size=True).eval()
    with torch.inference_mode():
        assert flexible.forward_features(torch.zeros(1, 3, *size)).shape == out.shape


def test_other_arguments_reach_timm_and_contradictions_are_told() -> None:
    assert demo.create(num_classes=3)(torch.zeros(1, 3, 224, 224)).shape == (1, 3)
    with pytest.raises(NetworkError, match=r"has depth=8, got 12\. Leave depth out\."):
        demo.create(depth=12)


def test_missing_files_are_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "WEIGHTS", tmp_path / "demo.safetensors")
    demo.manifest.cache_clear()
    try:
        with pytest.raises(NetworkError, match="weights of freqkd_demo are missing"):
            demo.create()
        with pytest.raises(NetworkError, match="manifest of freqkd_demo is missing"):
            demo.manifest()
    finally:
        demo.manifest.cache_clear()


def test_the_recorded_score_is_well_above_the_random_twin() -> None:
    told = demo.manifest()
    assert told["score"]["miou"] > told["twin_score"]["miou"] + 0.1
    # The sets of the score are not those of training: another seed, so other streets.
    seeds = [int(text.split("seed=")[1].split()[0]) for text in (told["data"], *list(told["probe"].values())[1:])]
    assert len(set(seeds)) == 3


def test_the_score_holds_when_measured_again_on_a_few_images() -> None:
    sets = ("pairs=12,groups=12,size=256x256,seed=41", "pairs=8,groups=8,size=256x256,seed=42")
    own, twin = demo.probe(demo.create(), *sets), demo.probe(demo.twin(), *sets)
    assert own["miou"] > twin["miou"] + 0.05
    assert own["miou"] > 0.4


def test_iou_against_sets() -> None:
    """The confusion table agrees with intersections and unions counted as sets of positions."""
    rng = np.random.default_rng(0)
    guess, truth = rng.integers(0, 5, 200), rng.integers(0, 4, 200)
    got = demo.iou(guess, truth, 5)
    for k, value in enumerate(got["iou"]):
        a, b = set(np.flatnonzero(guess == k)), set(np.flatnonzero(truth == k))
        assert value == (pytest.approx(len(a & b) / len(a | b), abs=1e-4) if b else None)
    assert got["iou"][4] is None


def test_training_is_a_function_of_its_seed_and_steps(tmp_path: Path) -> None:
    images, masks = demo.streets("pairs=16,groups=4,size=96x80,seed=9")
    first, again, other = (demo.fit(images, masks, 1.0, 2, seed, None)[0].state_dict() for seed in (0, 0, 1))
    assert all(bool((first[k] == again[k]).all()) for k in first)
    assert not all(bool((first[k] == other[k]).all()) for k in first)


def test_told_its_minutes_training_stops_and_can_be_repeated_by_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 2))  # seconds: one step takes two
    images, masks = demo.streets("pairs=16,groups=4,size=96x80,seed=9")
    monkeypatch.setattr(demo.time, "perf_counter", lambda: float(next(clock)))
    timed, steps = demo.fit(images, masks, 0.125, None, 0, None)
    assert steps == 5  # 0.8 * 7.5 s are spent after 4 steps, a quarter of them follows
    counted, _ = demo.fit(images, masks, 0.125, steps, 0, None)
    assert all(bool((a == b).all()) for a, b in zip(timed.parameters(), counted.parameters(), strict=True))


def test_the_command_writes_weights_and_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "PROBE_TRAIN", "pairs=3,groups=3,size=64x64,seed=41")
    monkeypatch.setattr(demo, "PROBE_TEST", "pairs=2,groups=2,size=64x64,seed=42")
    demo.main(["train", "--out", str(tmp_path / "out"), "--steps", "1", "--pairs", "16", "--seed", "3"])
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((tmp_path / "out/demo.json").read_text())
    assert told["command"].endswith("--steps 1 --seed 3 --pairs 16")
    assert hashlib.sha256((tmp_path / "out/demo.safetensors").read_bytes()).hexdigest() == told["sha256"]


def test_a_teacher_guides_when_its_weights_fit(weights: Path) -> None:
    guide = demo.Guide(weights / "tf_efficientnet_lite0.safetensors")
    tokens = torch.zeros(1, 100, 160, requires_grad=True)
    loss = guide(tokens, torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(0)))
    loss.backward()
    assert 0 < float(loss.detach()) < 2
    assert guide.project.weight.grad is not None
    with pytest.raises(NetworkError, match="does not fit tf_efficientnet_lite0"):
        demo.Guide(weights / "mobilenetv2_100.safetensors")
