"""What is fixed before the first step: the order of the samples, the learning rate of each step, the groups of AdamW.

All are functions of the settings, the seed and a number; nothing here moves, so that a resumed run has nothing to skip.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn, optim

from freqkd_analysis.errors import FreqkdError
from freqkd_train.config import Training

Key = tuple[int, int]
"""(epoch, index): one view of one sample."""


def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of n samples in an epoch (from 0): a permutation of 0 .. n-1, int64.

    Example:
        >>> sorted(order(seed=3, epoch=1, n=5).tolist())
        [0, 1, 2, 3, 4]
        >>> bool((order(3, 1, 50) == order(3, 1, 50)).all()), bool((order(3, 1, 50) == order(3, 2, 50)).all())
        (True, False)
    """
    return np.random.default_rng([seed, epoch]).permutation(n)


def steps_per_epoch(n: int, batch: int) -> int:
    """Whole batches in n samples; the rest of an epoch is left out (each epoch another rest).

    Raises: FreqkdError when n samples make no batch.

    Example:
        >>> steps_per_epoch(70, 32)
        2
    """
    if n < batch:
        raise FreqkdError(f"{n} pairs are fewer than a batch of {batch}; set training.batch to at most {n}.")
    return n // batch


def keys(seed: int, step: int, n: int, batch: int) -> list[Key]:
    """The samples of a step (from 0): the next `batch` of its epoch's order.

    Example:
        >>> first, second = keys(0, 0, 5, 2), keys(0, 1, 5, 2)
        >>> [epoch for epoch, _ in first + second + keys(0, 2, 5, 2)]
        [0, 0, 0, 0, 1, 1]
        >>> len({index for _, index in first + second})
        4
    """
    epoch, place = divmod(step, steps_per_epoch(n, batch))
    return [(epoch, int(index)) for index in order(seed, epoch, n)[place * batch : (place + 1) * batch]]


def share(items: list[Any], rank: int, world: int) -> list[Any]:
    """The contiguous part of a process (from 0) of `world`; parts differ by one item at most.

    Example:
        >>> share([0, 1, 2, 3, 4], 0, 2), share([0, 1, 2, 3, 4], 1, 2)
        ([0, 1, 2], [3, 4])
    """
    least, more = divmod(len(items), world)
    start = rank * least + min(rank, more)
    return items[start : start + least + (rank < more)]


def parts_of(batch: dict[str, Any], parts: int) -> Iterator[dict[str, Any]]:
    """A batch in at most `parts` contiguous pieces, sizes one apart at most; what is no list or tensor of its length
    goes along whole.

    Example:
        >>> [piece["ids"] for piece in parts_of({"ids": ["a", "b", "c"], "size": (8, 8)}, 2)]
        [['a', 'b'], ['c']]
    """
    n = len(batch["ids"])
    for rank in range(min(parts, n)):
        place = share(list(range(n)), rank, min(parts, n))
        cut = slice(place[0], place[-1] + 1)
        yield {k: v[cut] if isinstance(v, (list, Tensor)) and len(v) == n else v for k, v in batch.items()}


def on_device(batch: Any, device: torch.device | str) -> Any:
    """A batch with its tensors on the device, those in lists and mappings inside it as well.

    Example:
        >>> on_device({"ids": ["a"], "targets": [{"boxes": torch.zeros(0, 4)}]}, "cpu")["ids"]
        ['a']
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: on_device(part, device) for name, part in batch.items()}
    return [on_device(part, device) for part in batch] if isinstance(batch, list) else batch


def seed_step(seed: int, step: int, rank: int) -> None:
    """torch's generators for a step (from 0) of a process: what dropout draws is a function of these three numbers."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))


def rate(step: int, steps: int, settings: Training) -> float:
    """The learning rate of a step (from 0) of `steps`: linear warm-up, then half a cosine.

    From lr * warmup_start at step 0 to lr at the end of the warm-up, and from there to min_lr at `steps` (one behind
    the last). A warm-up below 1 is a share of `steps`, rounded; it never takes more than all of them.

    Example:
        >>> settings = Training(lr=1.0, warmup=4, warmup_start=0.0, min_lr=0.0)
        >>> [round(rate(step, 12, settings), 3) for step in (0, 2, 4, 8, 12)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    warm = min(round(settings.warmup if settings.warmup >= 1 else settings.warmup * steps), steps)
    if step < warm:
        return settings.lr * (settings.warmup_start + (1 - settings.warmup_start) * step / warm)
    if warm == steps:
        return settings.lr
    least = min(settings.min_lr, settings.lr)
    return least + 0.5 * (settings.lr - least) * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def adamw(module: nn.Module, settings: Training) -> optim.AdamW:
    """AdamW over the trained parameters. Vectors (biases, norms, scales) get no weight decay.

    With layer_decay < 1 the parameters of `module.student` get lr * layer_decay ** (blocks above), by timm's own
    grouping of its networks; all others (projectors) the full rate. A module with `rates()`, {prefix of a parameter's
    name: factor}, gets those instead, the longest prefix. Each group holds its factor as `lr_scale`.

    Raises: FreqkdError when nothing is trained, or layer_decay has no network with layers.

    Example:
        >>> [group["weight_decay"] for group in adamw(nn.Linear(2, 2), Training()).param_groups]
        [0.0001, 0.0]
    """
    groups: list[dict[str, Any]] = []
    grouped: set[int] = set()
    if settings.layer_decay < 1:
        student: Any = getattr(module, "student", None)
        if not hasattr(student, "group_matcher"):
            raise FreqkdError("training.layer_decay needs a student of timm that groups its layers; set it to 1.")
        from timm.optim import param_groups_layer_decay

        found = param_groups_layer_decay(student, settings.weight_decay, layer_decay=settings.layer_decay)
        groups = [{key: group[key] for key in ("params", "lr_scale", "weight_decay")} for group in found]
        grouped = {id(parameter) for group in groups for parameter in group["params"]}
    given: Any = getattr(module, "rates", None)
    rates: Mapping[str, float] = given() if given else {}
    kinds: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in module.named_parameters():
        if p.requires_grad and id(p) not in grouped:
            kinds.setdefault((_factor(name, rates), settings.weight_decay if p.ndim > 1 else 0.0), []).append(p)
    for (factor, decay), chosen in kinds.items():
        groups.append({"params": chosen, "lr_scale": factor, "weight_decay": decay})
    if not groups:
        raise FreqkdError("nothing to train: all parameters are frozen; choose another student.adapt or the loss none.")
    return optim.AdamW(groups, lr=settings.lr, foreach=True)


def _factor(name: str, rates: Mapping[str, float]) -> float:
    """The factor of the longest prefix of dotted `name`; 1 without one."""
    known = [prefix for prefix in rates if name == prefix or name.startswith(prefix.rstrip(".") + ".")]
    return rates[max(known, key=len)] if known else 1.0


def set_rate(optimiser: optim.Optimizer, value: float) -> None:
    """The rate of the next step, times each group's own factor."""
    for group in optimiser.param_groups:
        group["lr"] = value * group["lr_scale"]
