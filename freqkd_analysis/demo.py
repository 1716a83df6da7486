"""The demo network: a small plain ViT trained on this project's own synthetic visible images, shipped with its score.

It stands in where no other trained weights are at hand, so that a first run works without a network. It has learnt
to name the parts of rendered streets and nothing else: it shows the tool, not the world.

Train it again:
    python -m freqkd_analysis.demo train --out DIR --minutes 20 [--teacher tf_efficientnet_lite0.safetensors]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from freqkd_analysis.errors import NetworkError

if TYPE_CHECKING:
    import torch
    from timm.models.vision_transformer import VisionTransformer

NAME = "freqkd_demo"
WEIGHTS = Path(__file__).parent / "weights" / "demo.safetensors"
SHAPE: dict[str, Any] = {
    "patch_size": 16, "embed_dim": 160, "depth": 8, "num_heads": 5, "class_token": False, "global_pool": "avg",
    "fc_norm": False,
}  # fmt: skip
"""What fixes the network; everything else of timm's VisionTransformer may be asked for."""
CONFIG: dict[str, Any] = {
    "input_size": (3, 224, 224), "fixed_input_size": True, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic", "crop_pct": 1.0, "num_classes": 0, "pool_size": None, "first_conv": "patch_embed.proj",
    "classifier": "head", "license": "apache-2.0",
}  # fmt: skip
FINE = 4
"""Label points per patch and axis, in training and in the probe: 4 x 4 a patch."""


SIDE, BATCH = 160, 16
"""Training: pixels a side and images a step."""


def create(pretrained: bool = True, **timm_kwargs: Any) -> VisionTransformer:
    """The demo network as timm's VisionTransformer.

    Args:
        pretrained: load the shipped weights (fp16 on disk, float32 in the model); position embeddings are resampled.
        timm_kwargs: for example img_size=(512, 640), dynamic_img_size=True, num_classes=10.
    Raises: NetworkError when an argument contradicts the network's fixed shape.

    Example:
        >>> model = create(pretrained=False, img_size=(64, 96))
        >>> model.patch_embed.grid_size, len(model.blocks)
        ((4, 6), 8)
    """
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    wrong = [k for k, v in timm_kwargs.items() if k in SHAPE and v != SHAPE[k]]
    if wrong:
        raise NetworkError(
            f"{NAME} has {wrong[0]}={SHAPE[wrong[0]]}, got {timm_kwargs[wrong[0]]}. Leave {wrong[0]} out."
        )
    model = VisionTransformer(**{"img_size": 224, "num_classes": 0, **SHAPE, **timm_kwargs})
    size = model.patch_embed.img_size
    described: Any = {**CONFIG, "architecture": NAME, "input_size": (3, *size)}
    model.pretrained_cfg = model.default_cfg = described
    if pretrained:
        from safetensors.torch import load_file

        if not WEIGHTS.is_file():
            raise NetworkError(f"The weights of {NAME} are missing: expected {WEIGHTS}. Install the package again.")
        state = checkpoint_filter_fn({k: v.float() for k, v in load_file(WEIGHTS).items()}, model)
        missing = model.load_state_dict(state, strict=not model.num_classes)
        assert all(k.startswith("head.") for k in missing.missing_keys), missing
    return model


@lru_cache(maxsize=1)
def manifest() -> dict[str, Any]:
    """What made the shipped weights: command, seed, data, steps, seconds, score, twin's score, sha256, licence.

    Example:
        >>> manifest()["licence"]
        'Apache-2.0'
    """
    path = WEIGHTS.with_suffix(".json")
    if not path.is_file():
        raise NetworkError(f"The manifest of {NAME} is missing: expected {path}. Install the package again.")
    return dict(json.loads(path.read_text(encoding="utf-8")))


# --- data: rendered streets, visible images only ---


def streets(options: str) -> tuple[np.ndarray, np.ndarray]:
    """Visible images (n, H, W, 3) uint8 and masks (n, H, W) uint8 of a synthetic set."""
    from freqkd_analysis.data import scenes

    samples = (scenes.render(r) for r in scenes.records(options))
    pairs = [((s.rgb * 255 + 0.5).astype(np.uint8), s.meta["mask"]) for s in samples]
    return np.stack([p[0] for p in pairs]), np.stack([p[1] for p in pairs])


def batch(
    images: np.ndarray, masks: np.ndarray, side: int, rng: np.random.Generator | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images as the network takes them (B, 3, side, side) and labels at FINE points a patch.

    With a generator: random crop of 35 to 100 % of the height, flip, brightness, contrast, colour lost in one of six.
    Without: the centred square.
    """
    import torch
    from torch.nn import functional

    height, width = masks.shape[1:]
    points = side // SHAPE["patch_size"] * FINE
    xs, ys = [], []
    for image, mask in zip(images, masks, strict=True):
        part = height if rng is None else int(height * rng.uniform(0.35, 1.0))
        top = (height - part) // 2 if rng is None else int(rng.integers(0, height - part + 1))
        left = (width - part) // 2 if rng is None else int(rng.integers(0, width - part + 1))
        cut = (slice(top, top + part), slice(left, left + part))
        x = torch.from_numpy(np.ascontiguousarray(image[cut])).permute(2, 0, 1)[None].float() / 255
        x = functional.interpolate(x, (side, side), mode="bilinear", antialias=True, align_corners=False)[0]
        at = ((np.arange(points) + 0.5) * part / points).astype(int)
        y = torch.from_numpy(mask[cut][at[:, None], at].astype(np.int64))
        if rng is not None:
            x, y = jitter(x, y, rng)
        xs.append(x)
        ys.append(y)
    x = torch.stack(xs)
    mean, std = (torch.tensor(CONFIG[k])[:, None, None] for k in ("mean", "std"))
    return (x - mean) / std, torch.stack(ys)


def jitter(x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Flip, grey, contrast and brightness by chance."""
    if rng.random() < 0.5:
        x, y = x.flip(-1), y.flip(-1)
    if rng.random() < 1 / 6:
        x = x.mean(0, keepdim=True).expand(3, -1, -1)
    gain, offset = float(rng.uniform(0.6, 1.4)), float(rng.uniform(-0.12, 0.12))
    return ((x - 0.5) * gain + 0.5 + offset).clamp(0, 1), y


# --- score: what a linear map reads from frozen features ---


def dense_features(model: VisionTransformer, x: torch.Tensor) -> torch.Tensor:
    """Final tokens of a batch at FINE points a patch, bilinear between tokens: (B * points, C), float32."""
    import torch
    from torch.nn import functional

    with torch.inference_mode():
        tokens = model.forward_features(x)
    side = x.shape[-1] // SHAPE["patch_size"]
    grid = tokens.transpose(1, 2).reshape(len(x), -1, side, side)
    fine = functional.interpolate(grid, scale_factor=FINE, mode="bilinear", align_corners=False)
    return fine.permute(0, 2, 3, 1).flatten(0, 2)


def probe(model: VisionTransformer, train: str, test: str, side: int = 224) -> dict[str, Any]:
    """Held-out mean IoU of a linear probe on frozen features: softmax regression, full batch, fixed steps.

    train, test: options of two synthetic sets (their seeds must differ). Range 0 to 1, more is better; classes that
    the test set does not hold are left out of the mean.
    """
    import torch

    model = model.eval()
    sets = []
    for options in (train, test):
        images, masks = streets(options)
        parts = [batch(images[i : i + 16], masks[i : i + 16], side, None) for i in range(0, len(images), 16)]
        sets.append(
            (torch.cat([dense_features(model, x) for x, _ in parts]), torch.cat([y.flatten() for _, y in parts]))
        )
    (x, y), (x_test, y_test) = sets
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std
    classes = 9
    weight = torch.zeros(x.shape[1] + 1, classes, requires_grad=True)
    steps = torch.optim.LBFGS([weight], max_iter=60, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        steps.zero_grad()
        value = torch.nn.functional.cross_entropy(x @ weight[:-1] + weight[-1], y) + 1e-4 * weight.square().sum()
        value.backward()
        return value

    steps.step(loss)
    guess = (x_test @ weight[:-1] + weight[-1]).argmax(1)
    return iou(guess.numpy(), y_test.numpy(), classes)


def iou(guess: np.ndarray, truth: np.ndarray, classes: int) -> dict[str, Any]:
    """Mean IoU and IoU per class of two label arrays; a class without truth is None and out of the mean.

    Example:
        >>> iou(np.array([0, 1, 1, 1]), np.array([0, 0, 1, 1]), 3)
        {'miou': 0.5833, 'iou': [0.5, 0.6667, None]}
    """
    table = np.bincount(classes * truth + guess, minlength=classes * classes).reshape(classes, classes)
    hit, truths, guesses = np.diag(table), table.sum(1), table.sum(0)
    per = [float(h / (t + g - h)) if t else None for h, t, g in zip(hit, truths, guesses, strict=True)]
    held = [p for p in per if p is not None]
    return {"miou": round(sum(held) / len(held), 4), "iou": [None if p is None else round(p, 4) for p in per]}


def twin(seed: int = 0) -> VisionTransformer:
    """The same network with random weights: what the architecture alone gives."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create(pretrained=False).eval()


# --- training ---


def train(
    out: Path, *, minutes: float, steps: int | None, seed: int, teacher: Path | None, pairs: int
) -> dict[str, Any]:
    """Train from scratch and write demo.safetensors and demo.json into `out`; returns the manifest.

    Seed, steps and thread count fix the result; without `steps`, `minutes` decides how many there are.
    """
    import torch
    from safetensors.torch import save_file
    from timm.models.vision_transformer import checkpoint_filter_fn

    options = f"pairs={pairs},groups={pairs // 4},seed={1000 + seed}"
    images, masks = streets(options)
    started = time.perf_counter()
    model, done = fit(images, masks, minutes, steps, seed, teacher)
    seconds = time.perf_counter() - started
    out.mkdir(parents=True, exist_ok=True)
    final = create(pretrained=False)
    final.load_state_dict(checkpoint_filter_fn(model.state_dict(), final))
    save_file({k: v.half().contiguous() for k, v in final.state_dict().items()}, out / "demo.safetensors")
    command = f"python -m freqkd_analysis.demo train --out DIR --steps {done} --seed {seed} --pairs {pairs}"
    return write_manifest(out, {
        "command": command + (f" --teacher {teacher.name}" if teacher else ""), "seed": seed, "steps": done,
        "seconds": round(seconds, 1), "batch": BATCH, "side": SIDE, "threads": torch.get_num_threads(),
        "torch": torch.__version__, "data": f"synthetic:{options} (visible images and masks only)",
        "teacher": teacher.name if teacher else None,
    })  # fmt: skip


def fit(
    images: np.ndarray, masks: np.ndarray, minutes: float, steps: int | None, seed: int, teacher: Path | None
) -> tuple[VisionTransformer, int]:
    """The training loop; returns the network at SIDE pixels and the number of steps.

    The loss is cross-entropy of the mask at FINE points a patch and, with a teacher, 1 - cosine between projected
    tokens and its features. The rate is constant for four fifths of the steps and then falls to zero: so a run that
    is told its minutes and one that is told the steps the first one made are the same run.
    """
    import torch
    from torch.nn import functional

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = create(pretrained=False, img_size=SIDE).train()
    head = torch.nn.Linear(SHAPE["embed_dim"], 9 * FINE * FINE)
    guide = Guide(teacher) if teacher else None
    share = np.bincount(masks[:, ::4, ::4].ravel(), minlength=9) / masks[:, ::4, ::4].size
    weight = torch.tensor((share + 1e-3) ** -0.4, dtype=torch.float32)
    parameters = [*model.parameters(), *head.parameters(), *(guide.project.parameters() if guide else ())]
    optimiser = torch.optim.AdamW(parameters, weight_decay=0.05, betas=(0.9, 0.98))
    total, step, started = steps, 0, time.perf_counter()
    while total is None or step < total:
        spent = time.perf_counter() - started
        if total is None and step % 4 == 0 and spent > 0.8 * 60 * minutes:
            total = max(5, step + step // 4)
        cooling = 1.0 if total is None else (total - step) / (total - total * 4 // 5)
        for group in optimiser.param_groups:
            group["lr"] = 8e-4 * min((step + 1) / 60, 1.0, cooling)
        chosen = rng.choice(len(images), BATCH, replace=False)
        x, y = batch(images[chosen], masks[chosen], SIDE, rng)
        tokens = model.forward_features(x)
        loss = functional.cross_entropy(spread(head(tokens)), y, weight=weight / weight.mean())
        loss = loss + guide(tokens, x) if guide else loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        step += 1
        if step % 50 == 0 or step == total:
            print(f"step {step}/{total or '?'} loss {loss.item():.4f} {spent:.0f} s", file=sys.stderr, flush=True)
    return model, step


def spread(logits: torch.Tensor) -> torch.Tensor:
    """Per-token logits of FINE x FINE points (B, N, 9 * FINE^2) as a map (B, 9, side, side)."""
    from torch.nn import functional

    side = round(logits.shape[1] ** 0.5)
    return functional.pixel_shuffle(logits.transpose(1, 2).reshape(len(logits), -1, side, side), FINE)


class Guide:
    """A frozen convolutional teacher whose stride-16 features the tokens are asked to predict."""

    def __init__(self, path: Path) -> None:
        import timm
        import torch
        from safetensors.torch import load_file

        self.net: Any = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(3,))
        state = {k: v.float() for k, v in load_file(path).items()}
        unfit = [k for k, v in self.net.state_dict().items() if k not in state or state[k].shape != v.shape]
        if unfit:
            raise NetworkError(
                f"{path.name} does not fit tf_efficientnet_lite0: {unfit[0]} is missing or of other shape."
            )
        self.net.load_state_dict(state, strict=False)  # it holds the last stages too, which are not built here
        self.net.eval().requires_grad_(False)
        self.project = torch.nn.Linear(SHAPE["embed_dim"], 112)  # channels of its stride-16 stage
        self.mean, self.std = torch.tensor(CONFIG["mean"]).view(3, 1, 1), torch.tensor(CONFIG["std"]).view(3, 1, 1)

    def __call__(self, tokens: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        import torch
        from torch.nn import functional

        with torch.no_grad():
            (wanted,) = self.net((x * self.std + self.mean) * 2 - 1)  # this teacher takes -1 to 1
            wanted = wanted.flatten(2).transpose(1, 2)
            wanted = (wanted - wanted.mean((0, 1))) / (wanted.std((0, 1)) + 1e-3)
        return (1 - functional.cosine_similarity(self.project(tokens), wanted, dim=-1)).mean()


PROBE_TRAIN, PROBE_TEST = "pairs=80,groups=80,seed=31", "pairs=60,groups=60,seed=32"
"""Sets of the recorded score: seeds and sequences that training never sees."""


def write_manifest(out: Path, how: dict[str, Any]) -> dict[str, Any]:
    """Score the weights in `out` beside a random twin and write demo.json."""
    from safetensors.torch import load_file

    path = out / "demo.safetensors"
    model = create(pretrained=False)
    model.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    text = {
        "schema": 1, "name": NAME, "licence": "Apache-2.0", **how,
        "architecture": {"class": "timm VisionTransformer", "img_size": 224, **SHAPE},
        "parameters": sum(p.numel() for p in model.parameters()), "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "probe": {"what": "mean IoU of 9 classes, linear probe on frozen final tokens at 224 x 224, held-out sequences",
                  "train": PROBE_TRAIN, "test": PROBE_TEST},
        "score": probe(model, PROBE_TRAIN, PROBE_TEST), "twin_score": probe(twin(), PROBE_TRAIN, PROBE_TEST),
    }  # fmt: skip
    (out / "demo.json").write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    return text


def main(arguments: list[str] | None = None) -> None:
    """The training command; its manifest goes to standard output."""
    parser = argparse.ArgumentParser(prog="python -m freqkd_analysis.demo", description=__doc__.split("\n")[0])
    command = parser.add_subparsers(required=True).add_parser("train", help="train the demo network from scratch")
    command.add_argument("--out", type=Path, required=True, help="folder for demo.safetensors and demo.json")
    command.add_argument("--minutes", type=float, default=20.0, help="wall time of the training itself")
    command.add_argument("--steps", type=int, default=None, help="exact number of steps instead of minutes")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--pairs", type=int, default=1600, help="rendered scenes to train on")
    command.add_argument("--teacher", type=Path, default=None, help="tf_efficientnet_lite0 weights in timm's names")
    print(json.dumps(train(**vars(parser.parse_args(arguments)))))


if __name__ == "__main__":
    main()
