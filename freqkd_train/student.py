"""The trained network: the weights it starts from, what of it is trained, and plain timm weights out.

Training changes a copy in place (LoRA by peft, or the parameters themselves); `merged` brings start and trained state
together at a chosen scale and returns timm's own keys, so that nothing of the training is needed to load a student.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from freqkd_analysis import models, schema
from freqkd_analysis.errors import NetworkError, first
from freqkd_analysis.features import layer_names
from freqkd_analysis.models import Network
from freqkd_train.config import ConfigError, Student

State = dict[str, Tensor]


def start(name: str, weights: str, size: tuple[int, int], seed: int = 0) -> Network:
    """The student before training.

    Args:
        name: timm name. weights: as `models.create`, or `mix:SHARE:FILE` for SHARE * pretrained + (1 - SHARE) *
            FILE (all floating tensors, batch statistics too).
        size: input rows and columns. seed: of random weights.
    Raises: NetworkError for weights that are not at hand or do not fit; ConfigError for a mix that cannot be read.

    Example:
        >>> start("resnet18", "random", (64, 64)).source
        'random (seed 0)'
    """
    if not weights.startswith("mix:"):
        return models.create(name, weights, size, seed)
    _, share, path = [*weights.split(":", 2), "", ""][:3]
    try:
        a = float(share)
    except ValueError:
        a = -1.0
    if not 0 <= a <= 1 or not path:
        raise ConfigError(f'expected student.weights mix:SHARE:FILE with SHARE from 0 to 1, got "{weights}".')
    pretrained, other = (models.create(name, source, size, seed) for source in ("auto", path))
    mixed = interpolated(other.model.state_dict(), pretrained.model.state_dict(), a)
    pretrained.model.load_state_dict(mixed)
    return replace(pretrained, source=f"{a} * {pretrained.source} + {1 - a} * {other.source}",
                   sha256=f"{pretrained.sha256} {other.sha256}".strip())  # fmt: skip


def interpolated(a: Mapping[str, Tensor], b: Mapping[str, Tensor], share: float) -> State:
    """a + share * (b - a) for floating tensors, b's otherwise; exactly a at 0 and b at 1.

    Example:
        >>> interpolated({"w": torch.tensor([0.0])}, {"w": torch.tensor([2.0])}, 0.5)["w"].tolist()
        [1.0]
    """
    return {name: torch.lerp(a[name], other, share) if other.is_floating_point() else other.clone()
            for name, other in b.items()}  # fmt: skip


def way(model: nn.Module, settings: Student) -> str:
    """What `adapt: auto` means for this network; other ways as they are.

    Example:
        >>> import timm
        >>> way(timm.create_model("resnet18"), Student())
        'full'
    """
    if settings.adapt != "auto":
        return settings.adapt
    return "lora" if not _missing(model, settings.targets) else "full"


def _missing(model: nn.Module, targets: Sequence[str]) -> list[str]:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]


def adapt(model: nn.Module, settings: Student, seed: int = 0) -> None:
    """Make `model` trainable in the chosen way, in place.

    `lora`: adapters of peft on the target layers, all else frozen (A Kaiming-uniform, B zero: no change at first);
    `full`: everything; `last:K`: the last K blocks or stages; `head`: nothing of the network.
    Raises: ConfigError for targets that the network lacks or more blocks than it has.
    """
    chosen = way(model, settings)
    model.requires_grad_(chosen == "full")
    if chosen.startswith("last:"):
        names, count = layer_names(model), int(chosen[5:])
        if count > len(names):
            raise ConfigError(f"student.adapt {chosen}: the network has {len(names)} blocks; expected last:K with "
                              f"K at most {len(names)}.")  # fmt: skip
        modules = dict(model.named_modules())
        for name in names[-count:]:
            if name not in modules:
                raise ConfigError(f"student.adapt {chosen}: {type(model).__name__} has no module {name}; use full.")
            modules[name].requires_grad_(True)
    elif chosen == "lora":
        _inject(model, settings, seed)


def _inject(model: nn.Module, settings: Student, seed: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    missing = _missing(model, settings.targets)
    if missing:
        raise ConfigError(f"{type(model).__name__} has no linear layer {first(missing)} for LoRA; set student.targets "
                          "or use student.adapt full.")  # fmt: skip
    # One module may do nothing but name its targets, so peft gets whole names: no other layer matches by accident.
    targets = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)
               and any(f".{name}".endswith(f".{target}") for target in settings.targets)]  # fmt: skip
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout,  # type: ignore[arg-type]
                        target_modules=targets, init_lora_weights=True)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)


def freeze_unused(module: nn.Module, loss: Tensor) -> None:
    """Freeze what a loss does not reach (layers behind the last tap): no share of weight decay, no hole under DDP."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for parameter, gradient in zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True):
        if gradient is None:
            parameter.requires_grad_(False)


def has_lora(model: nn.Module) -> bool:
    """Whether `adapt` gave this network LoRA adapters."""
    return hasattr(model, "peft_config")


def merged(model: nn.Module, origin: Mapping[str, Tensor], scale: float) -> State:
    """The student's plain state: origin + scale * (trained - origin), under timm's own keys; `model` is not changed.

    For LoRA this is W + scale * alpha / rank * B A. Batch statistics count as weights, as in the FreqKD release.

    Args: model: trained. origin: state before training. scale: 0 (origin) to 1 (trained).
    Raises: NetworkError when a merged tensor is not finite.
    """
    trained = plain(model)
    state = interpolated({k: origin[k].to(v.device) for k, v in trained.items()}, trained, scale)
    broken = [name for name, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if broken:
        raise NetworkError(f"the trained student is not finite in {first(broken)}; use an earlier checkpoint or a "
                           "lower training.lr.")  # fmt: skip
    return {name: value.cpu() for name, value in state.items()}


def plain(model: nn.Module) -> State:
    """The whole trained state under timm's own keys, adapters folded in; `model` is not changed."""
    return _merged_lora(model) if has_lora(model) else {k: v.detach() for k, v in model.state_dict().items()}


def _merged_lora(model: nn.Module) -> State:
    """State with the adapters folded in at full scale, by peft's own merge, without changing the model."""
    from peft.tuners.lora import LoraLayer

    state: State = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, value in model.state_dict().items():
        if ".lora_" in name:
            continue
        plain, layer = name.replace(".base_layer.", "."), layers.get(name.rpartition(".base_layer.")[0])
        if layer is not None and name.endswith(".base_layer.weight"):
            value = value + layer.get_delta_weight("default")  # type: ignore[attr-defined]
        state[plain] = value.detach()
    return state


def write(state: Mapping[str, Tensor], path: Path) -> None:
    """A state as a safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    with schema.atomic(path) as temporary:
        save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, temporary)


def save_adapter(model: nn.Module, folder: Path) -> None:
    """The LoRA adapters in peft's format, at full scale: `PeftModel.from_pretrained(timm_model, folder)` loads them."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    config = model.peft_config["default"].to_dict()  # type: ignore[union-attr, index]
    told = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    schema.write_text(folder / "adapter_config.json", json.dumps(told, indent=1, default=_word))
    state = {f"base_model.model.{name}": value for name, value in get_peft_model_state_dict(model).items()}
    write(state, folder / "adapter_model.safetensors")


def _word(value: Any) -> Any:
    return getattr(value, "value", str(value))
