"""A step that went wrong: is it memory, which term and pairs are to blame, and a bundle from which it runs again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from freqkd_analysis.errors import FreqkdError, NonFiniteError, first
from freqkd_analysis.layers import device_of
from freqkd_train import checkpoint, schedule
from freqkd_train.config import Training

_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory", "alloc_failed")


def out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out: of CUDA, its libraries, or the allocator of the CPU.

    Example:
        >>> out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."))
        True
        >>> out_of_memory(RuntimeError("unsupported memory format option Preserve"))
        False
    """
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error).lower() for word in _MEMORY)


def blame(values: Mapping[str, Sequence[float]], ids: Sequence[Sequence[str]],
          trained: Mapping[str, nn.Parameter]) -> tuple[list[str], str]:  # fmt: skip
    """The pairs and the thing that is not finite: a term of the loss, the loss, else a gradient; ([], "") for none.

    Args: values: by name (`terms/NAME`, `loss`) one a part. ids: of each part. trained: parameters with gradients.

    Example:
        >>> blame({"loss": [1.0, float("nan")], "terms/3/high": [1.0, float("nan")]}, [["a"], ["b"]], {})
        (['b'], 'term 3/high is nan')
    """
    for name in sorted(values, key=lambda name: name == "loss"):
        for value, part in zip(values[name], ids, strict=True):
            if not math.isfinite(value):
                return list(part), f"term {name.removeprefix('terms/')} is {value}"
    for name, parameter in trained.items():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return [name for part in ids for name in part], f"the gradient of {name} is not finite"
    return [], ""


def values_of(out: Mapping[str, Any]) -> dict[str, Tensor]:
    """The numbers of a module's answer: `loss`, and `terms/NAME` each; float64, without gradients."""
    values = {"loss": out["loss"], **{f"terms/{name}": value for name, value in out["terms"].items()}}
    return {name: value.detach().double() for name, value in values.items()}


def error(step: int, ids: Sequence[str], what: str, bundle: Path | None) -> NonFiniteError:
    """What a step that is not finite tells: the step, what was not finite, the pairs, and how to run it again."""
    again = f" To run it again: freqkd-train replay {bundle}" if bundle else ""
    return NonFiniteError(f"step {step}: {what} for the pairs {first(ids, 8)}; nothing was changed by this step. Lower "
                          f"training.lr, or look at these pairs.{again}")  # fmt: skip


def write(folder: Path, state: dict[str, Any], rank: int, world: int) -> Path:
    """FOLDER/nonfinite-step-N/rank-R.pt: batch, trained weights, step, seed, settings. Returns the bundle's folder."""
    bundle = folder / f"nonfinite-step-{state['step']}"
    more = {"version": checkpoint.VERSION, "world": world, "rank": rank, "rng": torch.get_rng_state()}
    batch = {k: v.as_subclass(Tensor).cpu().clone() if isinstance(v, Tensor) else v for k, v in state["batch"].items()}
    checkpoint.save(bundle / f"rank-{rank}.pt", state | more | {"batch": batch})
    return bundle


def read(bundle: Path) -> list[dict[str, Any]]:
    """The files of a bundle, one a process that took part.

    Raises: FreqkdError when there is none or it is damaged.
    """
    paths = sorted(bundle.glob("rank-*.pt"), key=lambda path: int(path.stem.split("-")[1]))
    if not paths:
        raise FreqkdError(f"no bundle in {bundle}; expected a folder such as RUN/nonfinite-step-12.")
    return [checkpoint.load(path) for path in paths]


def replay(bundle: Path, module: nn.Module) -> dict[str, Any]:
    """Run the step of a bundle again, forward and backward; nothing is optimised.

    Args: bundle: RUN/nonfinite-step-N. module: as it was trained; its trained parameters become those of the step.
    Returns: `step`, `loss` and `terms` (means over the batch), `grad_norm`, and `bad`: {what is not finite: ids}.
    Raises: FreqkdError when there is no bundle, or it does not fit the module.
    """
    files = read(bundle)
    settings = Training.model_validate(files[0]["settings"])
    device = torch.device(device_of("cpu" if settings.device == "cpu" else "auto"))
    module.to(device).train()
    module.zero_grad(set_to_none=True)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    totals: dict[str, float] = {}
    bad: dict[str, list[str]] = {}
    for held in files:
        checkpoint.restore(module, held | {"ema": {}})
        schedule.seed_step(held["seed"], held["step"] - 1, held["rank"])
        for piece in schedule.parts_of(held["batch"], held["parts"]):
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                out = module(schedule.on_device(piece, device))
            share = len(piece["ids"]) / settings.batch
            (out["loss"] * share).backward()
            values = {name: float(value) for name, value in values_of(out).items()}
            totals = {name: totals.get(name, 0.0) + share * value for name, value in values.items()}
            ids, what = blame({name: [value] for name, value in values.items()}, [piece["ids"]], trained)
            bad |= {what: ids} if what else {}
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained.values() if p.grad is not None])
    terms = {name.removeprefix("terms/"): value for name, value in totals.items() if name != "loss"}
    return {"step": files[0]["step"], "loss": totals["loss"], "terms": terms, "grad_norm": float(norm), "bad": bad}
