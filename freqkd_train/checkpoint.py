"""Checkpoints: written whole or not at all, proven by a digest, the last few kept, the newest whole one used.

FOLDER/checkpoints/step-00000123.pt beside step-00000123.json with its size and sha256. The digest is written first, so
that the rename of the .pt is the one moment at which a checkpoint comes into being. Tensors and plain values only: it
is read with weights_only.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from freqkd_analysis import schema
from freqkd_analysis.errors import FreqkdError, RunError, first

State = dict[str, Any]
Say = Callable[[str], None]
BEST = "best.pt"
VERSION = 1


class CheckpointError(FreqkdError):
    """A checkpoint that cannot be written, or that belongs to another run."""


def folder_of(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / "checkpoints"


class _Digest:
    """A file to write to that digests what passes; keeps the first error, which torch would hide behind its own."""

    def __init__(self, handle: BinaryIO) -> None:
        self.handle, self.sha256, self.size = handle, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            count = self.handle.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self.sha256.update(data)
        self.size += len(data)
        return count

    def flush(self) -> None:
        self.handle.flush()


def save(path: Path, state: State) -> None:
    """Write a checkpoint: temporary file, fsync, digest, rename. What was there before lives until the last moment.

    Raises: CheckpointError when the disk does not take it.
    """
    digest: _Digest | None = None
    try:
        with schema.atomic(path) as temporary:
            with temporary.open("wb") as handle:
                digest = _Digest(handle)
                torch.save(state, digest)  # type: ignore[arg-type]  # all it asks for is write
            note = {"sha256": digest.sha256.hexdigest(), "size": digest.size}
            schema.write_text(path.with_suffix(".json"), json.dumps(note) + "\n")
        _settle(path.parent)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else digest.error if digest else None
        if cause is None:
            raise
        raise CheckpointError(
            f"{path} could not be written ({cause.strerror or cause}); the checkpoint before it is whole: make room "
            "and go on with --resume."
        ) from None


def _settle(folder: Path) -> None:
    """The rename itself on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_step(run: Path, step: int, state: State, keep: int) -> Path:
    """Write the checkpoint of a step and remove all but the newest `keep`."""
    path = folder_of(run) / f"step-{step:08d}.pt"
    save(path, state)
    _prune(run, keep)
    return path


def _prune(run: Path, keep: int) -> None:
    for old in steps(run)[:-keep]:
        _remove(old)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.with_suffix(".json").unlink(missing_ok=True)


def steps(run: Path) -> list[Path]:
    """Checkpoints of steps, oldest first, whole or not."""
    return sorted(folder_of(run).glob("step-*.pt"))


def load(path: Path) -> State:
    """Read a checkpoint, on the CPU.

    Raises: CheckpointError saying what is wrong when it is missing, cut, damaged or of another version.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {path}; expected one that a run has written")
    try:
        note = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        size, wanted = int(note["size"]), str(note["sha256"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise CheckpointError(f"{path.name} has no readable digest beside it") from None
    there = path.stat().st_size
    if there != size:
        raise CheckpointError(f"{path.name} is cut: {there} of {size} bytes")
    with path.open("rb") as handle:
        if hashlib.file_digest(handle, "sha256").hexdigest() != wanted:
            raise CheckpointError(f"{path.name} is damaged: its bytes are not those written")
    try:
        state: State = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whole, but not what `save` writes
        raise CheckpointError(f"{path.name} is no checkpoint ({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path.name} is no checkpoint (it holds a {type(state).__name__})")
    if state.get("version") != VERSION:
        raise CheckpointError(f"{path.name} has version {state.get('version')}, expected {VERSION}")
    return state


def newest_valid(run: Path, say: Say = print) -> tuple[Path, State] | None:
    """The newest whole checkpoint of a run; each one passed over is said. None when there is none at all.

    Raises: RunError when there are checkpoints and all are broken.
    """
    faults = []
    for path in reversed(steps(run)):
        try:
            state = load(path)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        if faults:
            say(f"{'; '.join(faults)}; using {path.name} instead")
        return path, state
    if faults:
        raise RunError(f"no whole checkpoint in {folder_of(run)}: {first(faults, 1)}; start again in another folder.")
    return None


def sweep(run: Path, used: Path | None, keep: int) -> None:
    """Make a folder ready to go on from the checkpoint `used` (None: from the start).

    Removes what interrupted saves have left, newer checkpoints (`newest_valid` found them broken; among the last `keep`
    they would take the place of whole ones), and those that an interrupted run came not to remove.
    """
    for path in folder_of(run).glob(".*.tmp"):
        path.unlink(missing_ok=True)
    for path in {note.with_suffix(".pt") for note in folder_of(run).glob("step-*.json")} | set(steps(run)):
        if not path.is_file() or used is None or path > used:
            _remove(path)
    _prune(run, keep)


def check_fingerprint(stored: Mapping[str, str], given: Mapping[str, str]) -> None:
    """Raises CheckpointError naming the first key whose value is another one than when the run began.

    Example:
        >>> check_fingerprint({"seed": "1"}, {"seed": "2"})
        Traceback (most recent call last):
        ...
        freqkd_train.checkpoint.CheckpointError: seed was 1 when this run began and is 2 now; resume with the same, or \
start in another folder.
    """
    for key in (*stored, *given):
        before, now = stored.get(key, "not set"), given.get(key, "not set")
        if before != now:
            raise CheckpointError(f"{key} was {before} when this run began and is {now} now; resume with the same, or "
                                  "start in another folder.")  # fmt: skip


def module_state(module: nn.Module) -> dict[str, Tensor]:
    """Trained parameters and persistent buffers: what training changes. Frozen weights come from their own file."""
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: value.detach() for name, value in module.state_dict().items() if name not in frozen}


@torch.no_grad()
def restore(module: nn.Module, state: State, averaged: bool = False) -> None:
    """Bring the trained parameters and buffers of a checkpoint (`load`) into a module, in place.

    averaged: the moving average of the parameters instead, where the run kept one.
    Raises: CheckpointError when they are not those of this module.
    """
    held = dict(state["module"])
    if averaged and state["ema"]:
        held |= state["ema"]
    wanted = module_state(module)
    for name in (*wanted, *held):
        there = [tuple(values[name].shape) if name in values else None for values in (held, wanted)]
        if there[0] != there[1]:
            raise CheckpointError(f"the checkpoint does not fit this student: {name} has shape {there[0]} there and "
                                  f"{there[1]} here.")  # fmt: skip
    for name, value in wanted.items():
        value.copy_(held[name])


def is_better(metric: str, new: float, old: float | None) -> bool:
    """Whether a value is better: lower for names with `loss` or `divergence`, higher otherwise. The first one counts;
    NaN never does.

    Example:
        >>> is_better("val/loss", 0.5, 0.6), is_better("val/similarity", 0.5, 0.6), is_better("val/loss", 0.5, None)
        (True, False, True)
    """
    if new != new:
        return False
    if old is None:
        return True
    return new < old if any(word in metric.lower() for word in ("loss", "divergence")) else new > old
