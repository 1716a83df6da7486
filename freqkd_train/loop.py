"""One optimiser step of any module whose call returns a dict with a loss, on any number of processes.

accelerate places the module, casts, and wraps it for DDP; the rest is here. A step's gradient is the mean over the
batch of all processes, in however many parts each of them takes its share. It is drawn from (seed, step, process)
alone: dropout of a resumed run is that of an uninterrupted one.
"""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from freqkd_analysis.errors import FreqkdError, first, nearest
from freqkd_analysis.layers import device_of
from freqkd_train import checkpoint, faults, schedule
from freqkd_train.config import Training

if TYPE_CHECKING:
    from accelerate import Accelerator

Batch = dict[str, Any]


class Source(Protocol):
    """Samples of an epoch: `batch(keys)` is a pure function of (epoch, index) keys."""

    def __len__(self) -> int: ...

    def batch(self, keys: list[schedule.Key]) -> Batch: ...


@dataclass(frozen=True)
class Result:
    """What one step found, over all processes: mean loss and terms, length of the gradient before clipping."""

    loss: float
    terms: dict[str, float]
    norm: float
    rate: float
    stop: bool
    """A process was asked to stop."""


def accelerator_for(settings: Training, folder: Path | None = None) -> Accelerator:
    """accelerate on the device and at the precision of the settings, with their trackers."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if torch.distributed.is_available():
        # Its functions have the group of that moment as a default: imported later, as DDP does, they would hold the
        # group to the end of the interpreter, and the group its threads.
        from torch.distributed.nn import functional  # noqa: F401

    name = device_of(settings.device)
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)
    # Its state is one a process and refuses another precision; a second run in this process may want one.
    AcceleratorState._reset_state(True)
    made = Accelerator(cpu=name == "cpu", mixed_precision="no" if settings.precision == "fp32" else settings.precision,
                       log_with=list(settings.track) or None, project_dir=folder)  # fmt: skip
    atexit.unregister(_leave)
    atexit.register(_leave)
    return made


def _leave() -> None:
    """The threads of a group of processes may not outlive the interpreter; a later run here uses the same group.

    No process waits for another: one that ends by an error would wait for those that wait for its gradients.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Loop:
    """Module, optimiser and their state; `step(n)` moves them.

    Args:
        module: `module(batch)` returns {"loss": scalar, "terms": {name: scalar}}. source: the samples.
        settings, seed: of the run. steps: of the whole run, for the learning rate.
        say: told when memory runs out. folder: for the bundle of a step that is not finite; none without.
        expected: terms that the first step must have.
    """

    def __init__(self, module: nn.Module, source: Source, settings: Training, seed: int, steps: int, *,
                 accelerator: Accelerator, say: Callable[[str], None], folder: Path | None = None,
                 expected: frozenset[str] = frozenset()) -> None:  # fmt: skip
        self.module, self.source, self.settings, self.seed, self.steps = module, source, settings, seed, steps
        self.accelerator, self.say, self.folder, self.expected = accelerator, say, folder, expected
        self.world, self.rank = accelerator.num_processes, accelerator.process_index
        if settings.batch < self.world:
            raise FreqkdError(f"training.batch {settings.batch} is less than one pair a process; expected at least "
                              f"{self.world}.")  # fmt: skip
        self.optimiser = schedule.adamw(module.to(accelerator.device), settings)
        # Within another module, since accelerate changes and marks what it prepares, for good.
        self.model = accelerator.prepare_model(nn.Sequential(module))
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.moving = _statistics(module)
        self.before: list[Tensor] = []
        self.parts, self.done, self.checked = settings.accumulate, 0, False
        self.ema = {name: p.detach().clone() for name, p in self.trained.items()} if settings.ema else {}

    def step(self, shares: bool = False, stop: Callable[[], bool] = lambda: False) -> tuple[Result, dict[str, float]]:
        """The next step; with `shares` also what `module.shares` says of its first part, in the main process.

        Raises: NonFiniteError before anything moved; FreqkdError when a part of one pair does not fit the memory.
        """
        keys = schedule.keys(self.seed, self.done, len(self.source), self.settings.batch)
        batch = self.source.batch(schedule.share(keys, self.rank, self.world))
        self.before = [buffer.clone() for buffer in self.moving]
        while True:
            found = self._attempt(batch, shares, stop)
            if found is not None:
                break
            self._halve(len(batch["ids"]))
            self._statistics_back()
        self._move(found[0])
        return found

    def _attempt(self, batch: Batch, shares: bool, stop: Callable[[], bool]) -> tuple[Result, dict[str, float]] | None:
        """Forward and backward of the step; None when memory ran out, with nothing left that holds any of it."""
        try:
            told = self._shares(batch) if shares else {}
            return self._gradients(batch, stop), told
        except RuntimeError as error:
            if not faults.out_of_memory(error):
                raise
            return None

    def _shares(self, batch: Batch) -> dict[str, float]:
        if not self.accelerator.is_main_process:
            return {}
        part = schedule.on_device(next(schedule.parts_of(batch, self.parts)), self.accelerator.device)
        schedule.seed_step(self.seed, self.done, self.rank)
        self.module.train()
        with self.accelerator.autocast():
            found = self.module.shares(part)  # type: ignore[operator]
        self._statistics_back()
        return {name: float(value) for name, value in found.items()}

    def _gradients(self, batch: Batch, stop: Callable[[], bool]) -> Result:
        schedule.seed_step(self.seed, self.done, self.rank)
        self.model.train()
        self.optimiser.zero_grad(set_to_none=True)
        pieces = list(schedule.parts_of(batch, self.parts))
        found: list[dict[str, Tensor]] = []
        for i, piece in enumerate(pieces):
            share = len(piece["ids"]) / self.settings.batch
            with contextlib.nullcontext() if i == len(pieces) - 1 else self.accelerator.no_sync(self.model):
                out = self.model(schedule.on_device(piece, self.accelerator.device))
                # DDP takes the mean over processes, the share is of the batch of all of them.
                self.accelerator.backward(out["loss"] * (share * self.world))
            found.append(faults.values_of(out))
            del out
        self._check_first(found)
        return self._result(batch, pieces, found, stop)

    def _result(self, batch: Batch, pieces: list[Batch], found: list[dict[str, Tensor]],
                stop: Callable[[], bool]) -> Result:  # fmt: skip
        """One transfer from the device for all numbers of the step, one reduction over processes."""
        names = list(dict.fromkeys(name for values in found for name in values))
        zero = torch.zeros((), device=self.accelerator.device, dtype=torch.float64)
        values = torch.stack([torch.stack([v.get(n, zero) for n in names]) for v in found])
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.trained.values() if p.grad is not None]).double()
        weights = values.new_tensor([len(piece["ids"]) / self.settings.batch for piece in pieces])
        means = (values * weights[:, None]).sum(0)
        asked = values.new_tensor([float(stop())])
        if self.world > 1:
            means, asked = self.accelerator.reduce(torch.cat([means, asked]), "sum").split([len(names), 1])
        numbers = torch.cat([means, norm[None], asked]).tolist()
        if not np.isfinite(numbers).all():
            table = {name: values[:, i].tolist() for i, name in enumerate(names)}
            self._stop_not_finite(batch, pieces, table)
        told = dict(zip(names, numbers, strict=False))
        terms = {name.removeprefix("terms/"): value for name, value in told.items() if name != "loss"}
        rate = schedule.rate(self.done, self.steps, self.settings)
        return Result(told["loss"], terms, numbers[-2], rate, numbers[-1] > 0)

    def _move(self, result: Result) -> None:
        """Clip, optimise, average: from here on the step counts."""
        if self.settings.clip:
            gradients = [p for p in self.trained.values() if p.grad is not None]
            torch.nn.utils.clip_grads_with_norm_(gradients, self.settings.clip, torch.tensor(result.norm))
        schedule.set_rate(self.optimiser, result.rate)
        try:
            self.optimiser.step()
        except RuntimeError as error:
            if not faults.out_of_memory(error):
                raise
            raise self._no_room("for the optimiser's state") from None
        self.done += 1
        if self.ema:
            # The rule of TensorFlow's moving average: young averages forget faster, so that the start does not linger.
            decay = min(self.settings.ema, (1 + self.done) / (10 + self.done))
            torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.trained.values()], 1 - decay)

    def _halve(self, images: int) -> None:
        """Twice as many parts a step; what the failed attempt held is free by now."""
        self.optimiser.zero_grad(set_to_none=True)
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        size = -(-images // self.parts)
        if self.world > 1:
            # The other processes already wait for this one's gradients, so that the step cannot be taken again.
            raise FreqkdError(f"out of memory in process {self.rank} at {size} pairs a part; set training.accumulate "
                              f"{2 * self.parts}, or a smaller training.batch or data.size.")  # fmt: skip
        if size == 1:
            raise self._no_room("for a single pair")
        self.parts = min(2 * self.parts, images)
        self.say(f"out of memory at {size} pairs a part: from here on {-(-images // self.parts)} a part, "
                 f"{self.parts} parts a step")  # fmt: skip

    def _statistics_back(self) -> None:
        """Running statistics as they were before this step's forwards."""
        for buffer, value in zip(self.moving, self.before, strict=True):
            buffer.copy_(value)

    def _no_room(self, what: str) -> FreqkdError:
        return FreqkdError(f"out of memory {what} on {self.accelerator.device}; set a smaller data.size (or "
                           "student.adapt lora, training.precision bf16).")  # fmt: skip

    def _check_first(self, found: list[dict[str, Tensor]]) -> None:
        """Once a process: every expected term is there, and under DDP every trained parameter is reached."""
        if self.checked:
            return
        self.checked = True
        seen = {name.removeprefix("terms/") for values in found for name in values if name != "loss"}
        missing = sorted(self.expected - seen)
        if missing:
            raise FreqkdError(f"step {self.done + 1}: the loss has no term {first(missing)}, which the settings ask "
                              f"for.{nearest(missing[0], seen)}")  # fmt: skip
        unreached = [name for name, p in self.trained.items() if p.grad is None]
        if unreached and self.world > 1:
            raise FreqkdError(f"the loss does not reach {first(unreached)}; freeze what no tap needs before training "
                              "on several processes.")  # fmt: skip

    def _stop_not_finite(self, batch: Batch, pieces: list[Batch], table: Mapping[str, list[float]]) -> None:
        ids, what = faults.blame(table, [piece["ids"] for piece in pieces], self.trained)
        if not what:
            ids, what = batch["ids"], "the length of the gradient is not finite"
        if self.world > 1:
            from accelerate.utils import gather_object

            others = gather_object([(ids, what)])
            ids, what = next((other for other in others if other[1].startswith("term")), others[0])
        self._statistics_back()
        bundle = None
        if self.folder is not None:
            state = {"module": checkpoint.module_state(self.module), "settings": self.settings.model_dump(mode="json"),
                     "step": self.done + 1, "seed": self.seed, "parts": self.parts, "batch": batch}  # fmt: skip
            bundle = faults.write(self.folder, state, self.rank, self.world)
            self.accelerator.wait_for_everyone()  # who reads the bundle finds all parts of it
        raise faults.error(self.done + 1, ids, what, bundle)

    def state(self) -> checkpoint.State:
        """All that a run goes on from, but for what `fit` adds."""
        return {
            "version": checkpoint.VERSION, "step": self.done, "parts": self.parts,
            "module": checkpoint.module_state(self.module), "optimiser": self.optimiser.state_dict(), "ema": self.ema,
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state_all() if self.accelerator.device.type == "cuda" else [],
        }  # fmt: skip

    def load(self, state: checkpoint.State) -> None:
        """Go on from a checkpoint's state."""
        checkpoint.restore(self.module, state)
        self.optimiser.load_state_dict(state["optimiser"])
        for name, value in state["ema"].items():
            self.ema[name].copy_(value)
        self.done, self.parts = int(state["step"]), max(int(state["parts"]), self.settings.accumulate)
        torch.set_rng_state(state["rng"])
        if state["rng_cuda"] and len(state["rng_cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["rng_cuda"])

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Evaluation mode, the run's precision, and where there is a moving average, that for the parameters."""
        own = {name: self.trained[name].detach().clone() for name in self.ema}
        try:
            self._put(self.ema)
            self.module.eval()
            with self.accelerator.autocast():
                yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.trained[name].copy_(value)

    def close(self, keep_average: bool = False) -> None:
        """Give the module back without gradients; with its moving average when asked."""
        self.optimiser.zero_grad(set_to_none=True)
        if keep_average:
            self._put(self.ema)


def _statistics(module: nn.Module) -> list[Tensor]:
    """Running statistics that a forward in training mode moves: put back when a step is taken again."""
    names = ("running_mean", "running_var", "num_batches_tracked")
    return [buffer for name, buffer in module.named_buffers() if name.rsplit(".", 1)[-1] in names]
