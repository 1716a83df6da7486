"""The training loop. It knows only that a module's call on a batch returns a dict with a loss.

`fit` trains, `trial` measures a few steps without leaving a trace, `replay` runs a step that was not finite again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from freqkd_analysis import terminal
from freqkd_analysis.errors import FreqkdError, RunError, nearest
from freqkd_train import checkpoint, metrics_file, schedule
from freqkd_train.config import Training
from freqkd_train.faults import replay
from freqkd_train.loop import Loop, Result, Source, accelerator_for

__all__ = ["Outcome", "fit", "order", "replay", "trial"]

order = schedule.order
Evaluate = Callable[[], Mapping[str, float]]

MAY_CHANGE = ("accumulate", "device", "checkpoint_every", "keep", "track", "cache_gb")
"""Settings that a resumed run may have otherwise: none of them changes a number."""
MACHINE = ("data.workers", *(f"training.{key}" for key in MAY_CHANGE))
"""The same as dotted keys of a whole run's settings."""


@dataclass
class Outcome:
    """What a run came to.

    steps, epochs: done in all, whole epochs. last: numbers of the last step and of the last evaluation. best:
    {"metric", "value", "step"} of `checkpoints/best.pt`, or None. seconds: of this call alone. resumed_at: the step
    it went on from, 0 for a fresh run.
    """

    steps: int
    epochs: int
    last: dict[str, float] = field(default_factory=dict)
    best: dict[str, Any] | None = None
    seconds: float = 0.0
    resumed_at: int = 0


def fit(
    module: nn.Module,
    source: Source,
    settings: Training,
    seed: int,
    folder: Path,
    *,
    evaluate: Evaluate | None = None,
    resume: bool = False,
    say: Callable[[str], None] = print,
    expected: frozenset[str] = frozenset(),
    fingerprint: Mapping[str, str] | None = None,
    shares_every: int = 50,
) -> Outcome:
    """Train `module` in place; metrics and checkpoints go to `folder`.

    At the end the module holds the last step's parameters, or their moving average where settings.ema asks for one.

    Args:
        module: `module(batch)` returns {"loss": scalar, "terms": {name: scalar}}; `module.shares(batch)`, where there
            is one, {name: share}. Everything trained must be reached through its forward.
        source: `len(source)` samples an epoch; `source.batch([(epoch, index), ...])` a dict with `ids` and tensors.
        seed: of order and dropout.
        evaluate: called in evaluation mode at each epoch's end, in every process; {"val/loss": value, ...}.
        resume: go on from the newest whole checkpoint in `folder`; from the start when there is none.
        expected: names of terms that the first step must have.
        fingerprint: what must be the same when a run is resumed, beside the settings themselves.
        shares_every: logged in step 1 and every so many steps.
    Raises: FreqkdError for fewer samples than a batch, a term that is missing, a metric `settings.best` that there is
        not, a checkpoint of another run, no memory for one pair, no room on the disk; RunError when `folder` holds a
        run and `resume` is false; NonFiniteError naming step, term and pairs; KeyboardInterrupt after SIGINT or
        SIGTERM, with a checkpoint of the last whole step.

    Example:
        >>> import tempfile
        >>> class Halves(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.w = nn.Parameter(torch.ones(3))
        ...     def forward(self, batch):
        ...         loss = (batch["x"] * self.w - batch["x"] / 2).square().mean()
        ...         return {"loss": loss, "terms": {"only": loss}}
        >>> class Noise:
        ...     def __len__(self):
        ...         return 8
        ...     def batch(self, keys):
        ...         return {"ids": [str(i) for _, i in keys], "x": torch.tensor([[1.0, 2, 3]]).expand(len(keys), 3)}
        >>> settings = Training(epochs=20, batch=4, lr=0.05, device="cpu")
        >>> module = Halves()
        >>> fit(module, Noise(), settings, seed=0, folder=Path(tempfile.mkdtemp()), say=lambda text: None).steps
        40
        >>> bool((module.w - 0.5).abs().max() < 0.1)
        True
    """
    metrics_file.check_trackers(settings.track)
    per_epoch = schedule.steps_per_epoch(len(source), settings.batch) if settings.epochs else 1
    if not resume and checkpoint.steps(folder):
        raise RunError(f"{folder} holds checkpoints of a run; go on with --resume, or name another folder.")
    clock = time.monotonic()
    accelerator = accelerator_for(settings, folder)
    loop = Loop(module, source, settings, seed, settings.epochs * per_epoch, accelerator=accelerator, say=say,
                folder=folder, expected=expected)  # fmt: skip
    told = {f"training.{k}": str(v) for k, v in settings.model_dump().items() if k not in MAY_CHANGE}
    told |= {"seed": str(seed), "pairs": str(len(source))} | dict(fingerprint or {})
    run = _Run(loop, folder, per_epoch, evaluate, told, say, shares_every)
    try:
        with _stoppable() as stop:
            begun = run.begin(resume)
            run.go(stop)
        outcome = run.outcome(begun, time.monotonic() - clock)
        loop.close(keep_average=True)
        return outcome
    except BaseException:
        loop.close()
        raise
    finally:
        run.close()


class _Run:
    """A loop with its files: what is logged, saved, evaluated, and when."""

    def __init__(self, loop: Loop, folder: Path, per_epoch: int, evaluate: Evaluate | None, fingerprint: dict[str, str],
                 say: Callable[[str], None], shares_every: int) -> None:  # fmt: skip
        self.loop, self.folder, self.per_epoch, self.evaluate = loop, folder, per_epoch, evaluate
        self.fingerprint, self.shares_every = fingerprint, shares_every
        self.main = loop.accelerator.is_main_process
        self.say = say if self.main else lambda text: None
        self.best: dict[str, Any] | None = None
        self.last: dict[str, float] = {}
        self.lines: list[metrics_file.Lines] = []

    def begin(self, resume: bool) -> int:
        """Open the files, at the newest whole checkpoint where the run is resumed; returns its step."""
        found = checkpoint.newest_valid(self.folder, self.say) if resume else None
        length = 0
        if found is not None:
            state = found[1]
            checkpoint.check_fingerprint(state["fingerprint"], self.fingerprint)
            self.loop.load(state)
            self.best, self.last, length = state["best"], state["last"], int(state["metrics_bytes"])
            self.say(f"resumed at step {self.loop.done} of {self.loop.steps}")
        elif resume:
            self.say(f"no checkpoint in {self.folder}: starting from step 1")
        if self.main:
            checkpoint.sweep(self.folder, found[0] if found else None, self.loop.settings.keep)
            metrics, timings = self.folder / metrics_file.METRICS, self.folder / metrics_file.TIMINGS
            self.lines = [metrics_file.Lines(metrics, length), metrics_file.Lines(timings, None if resume else 0)]
        if self.loop.settings.track:
            self.loop.accelerator.init_trackers("freqkd", config=dict(self.fingerprint))
        return self.loop.done

    def go(self, stop: Callable[[], bool]) -> None:
        """All steps that are left."""
        loop, settings = self.loop, self.loop.settings
        clock = metrics_file.Clock()
        if loop.done and loop.done % self.per_epoch == 0:
            self.epoch_end()  # whether its evaluation was done before is not known; done again it says the same
        left = (loop.steps - loop.done) * settings.batch
        with terminal.progress(left) if self.main else contextlib.nullcontext() as progress:
            while loop.done < loop.steps:
                result, shares = loop.step(self._wants_shares(), stop)
                self.log(result, shares)
                speed = clock.tick(settings.batch)
                if progress:
                    self.times(speed, progress, result)
                ended = loop.done % self.per_epoch == 0
                if ended or result.stop or (settings.checkpoint_every and loop.done % settings.checkpoint_every == 0):
                    self.save()  # before the evaluation, which may take long
                if ended and not result.stop:
                    self.epoch_end()
                if result.stop:
                    self.stopped()
        if stop():  # during the last evaluation
            self.stopped()

    def stopped(self) -> NoReturn:
        """Say where, and end."""
        self.say(f"stopped after step {self.loop.done} of {self.loop.steps}; what is learned is kept")
        raise KeyboardInterrupt

    def _wants_shares(self) -> bool:
        step = self.loop.done + 1
        return hasattr(self.loop.module, "shares") and (step == 1 or step % self.shares_every == 0)

    def log(self, result: Result, shares: dict[str, float]) -> None:
        """A line of metrics.jsonl, every log_every steps, and with shares always."""
        step = self.loop.done
        self.last = {"loss": result.loss, "grad_norm": result.norm, "lr": result.rate}
        if not (step % self.loop.settings.log_every == 0 or step in (1, self.loop.steps) or shares):
            return
        row: dict[str, Any] = {"step": step, "epoch": (step - 1) // self.per_epoch, "loss": result.loss,
                               "terms": result.terms, "lr": result.rate, "grad_norm": result.norm}  # fmt: skip
        self.write(row | ({"shares": shares} if shares else {}))

    def write(self, row: dict[str, Any]) -> None:
        if self.main:
            self.lines[0].write(row)
        if self.loop.settings.track:
            values = {name: value for name, value in metrics_file.flat(row).items() if name != "step"}
            self.loop.accelerator.log(values, step=row["step"])

    def times(self, speed: float, progress: Callable[[int, str], None], result: Result) -> None:
        """What the machine does: to the terminal, and to timings.jsonl where the metrics have a line."""
        used, step = metrics_file.memory(self.loop.accelerator.device), self.loop.done
        what = f"step {step}/{self.loop.steps}, loss {result.loss:.4g}, {used / 1e9:.1f} GB"
        progress(self.loop.settings.batch, what)
        if step % self.loop.settings.log_every == 0:
            self.lines[1].write({"step": step, "images_per_s": speed, "memory": used, "parts": self.loop.parts})

    def epoch_end(self) -> None:
        """Evaluate, log, and keep the best by the named metric, if one is named."""
        if self.evaluate is None:
            return
        with self.loop.evaluation():
            found = {name: float(value) for name, value in self.evaluate().items()}
        step = self.loop.done
        self.write({"step": step, "epoch": step // self.per_epoch - 1, **found})
        self.last |= found
        name = self.loop.settings.best
        if not name:
            return
        if name not in found:
            raise FreqkdError(f'training.best "{name}" is no metric of the evaluation.{nearest(name, found)} There are '
                              f"{', '.join(found) or 'none'}.")  # fmt: skip
        if checkpoint.is_better(name, found[name], self.best["value"] if self.best else None):
            self.best = {"metric": name, "value": found[name], "step": step}
            if self.main:
                checkpoint.save(checkpoint.folder_of(self.folder) / checkpoint.BEST, self.state())

    def state(self) -> checkpoint.State:
        more = {"best": self.best, "last": self.last, "fingerprint": self.fingerprint}
        return self.loop.state() | more | {"metrics_bytes": self.lines[0].length()}

    def save(self) -> None:
        if self.main:
            checkpoint.save_step(self.folder, self.loop.done, self.state(), self.loop.settings.keep)

    def outcome(self, begun: int, seconds: float) -> Outcome:
        done = self.loop.done
        return Outcome(done, done // self.per_epoch, dict(self.last), self.best, seconds, begun)

    def close(self) -> None:
        for lines in self.lines:
            lines.close()
        for tracker in self.loop.accelerator.trackers:
            tracker.finish()


@contextlib.contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM came; a second one ends the process at once. Outside the main thread: never."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        asked = True
        # Not print: a handler may run inside one. Without a word, a step of seconds looks like a key not heard.
        os.write(2, b"stopping after this step; a second time ends at once, without saving\n")

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def trial(module: nn.Module, source: Source, settings: Training, seed: int, steps: int = 3) -> dict[str, Any]:
    """Take a few steps and take them back: what a run would cost. Writes nothing; weights and random state stay.

    Returns: `seconds` a step (median, without the first), `images_per_s`, `memory` (peak bytes), `trained`
    (parameters), `checkpoint_bytes` (of one), `steps_per_epoch`, `seconds_per_epoch` and `parts` a step.
    Raises: as `fit`.
    """
    per_epoch = schedule.steps_per_epoch(len(source), settings.batch)
    accelerator = accelerator_for(settings.model_copy(update={"track": ()}))
    loop = Loop(module, source, settings, seed, max(settings.epochs, 1) * per_epoch, accelerator=accelerator,
                say=lambda text: None)  # fmt: skip
    before = {name: value.clone() for name, value in checkpoint.module_state(module).items()}
    training, times = {part: part.training for part in module.modules()}, []
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    try:
        with torch.random.fork_rng([accelerator.device] if accelerator.device.type == "cuda" else []):
            for _ in range(steps):
                clock = time.monotonic()
                loop.step()  # its numbers come from the device, so that the clock waits for it
                times.append(time.monotonic() - clock)
        size = sum(value.nbytes for value in _tensors(loop.state()))
    finally:
        loop.close()
        checkpoint.restore(module, {"module": before})
        for part, mode in training.items():
            part.training = mode
    seconds = statistics.median(times[1:] or times)
    return {
        "seconds": seconds, "images_per_s": settings.batch / seconds, "memory": metrics_file.memory(accelerator.device),
        "trained": sum(p.numel() for p in loop.trained.values()), "checkpoint_bytes": size,
        "steps_per_epoch": per_epoch, "seconds_per_epoch": seconds * per_epoch, "parts": loop.parts,
    }  # fmt: skip


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)
