"""What a run writes while it goes: metrics.jsonl with reproducible numbers, timings.jsonl with the machine's.

metrics.jsonl holds no times, so that a resumed run ends with the bytes of an uninterrupted one: on resume it is cut to
the length its checkpoint recorded.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from freqkd_analysis.errors import FreqkdError, nearest

METRICS, TIMINGS = "metrics.jsonl", "timings.jsonl"
TRACKERS = ("tensorboard", "wandb", "mlflow")


def check_trackers(names: Sequence[str]) -> None:
    """Raises FreqkdError for a tracker that is unknown (with the nearest) or not installed.

    Example:
        >>> check_trackers(["tensorbord"])
        Traceback (most recent call last):
        ...
        freqkd_analysis.errors.FreqkdError: no tracker "tensorbord". Did you mean "tensorboard"? Known: tensorboard, \
wandb, mlflow.
    """
    for name in names:
        if name not in TRACKERS:
            raise FreqkdError(f'no tracker "{name}".{nearest(name, TRACKERS)} Known: {", ".join(TRACKERS)}.')
        if importlib.util.find_spec(name) is None:
            raise FreqkdError(f"training.track {name} is not installed: pip install {name}")


def flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a row by slashed names, as trackers want them.

    Example:
        >>> flat({"loss": 1.0, "terms": {"3/high": 0.5}, "step": 2})
        {'loss': 1.0, 'terms/3/high': 0.5, 'step': 2}
    """
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}/")
        elif value is not None:
            found[f"{prefix}{name}"] = value
    return found


def _finite(value: Any) -> Any:
    """JSON has no NaN: null stands for a number that is none."""
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Lines:
    """A file of one JSON object a line, written through at each line.

    Args: path. keep: bytes of it that stay, all else is cut off; without a value all stay.
    Raises: FreqkdError when the file is shorter than that.
    """

    def __init__(self, path: Path, keep: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if keep is not None:
            there = path.stat().st_size if path.is_file() else 0
            if there < keep:
                raise FreqkdError(f"{path} has {there} bytes, {keep} when its checkpoint was written; put it back, or "
                                  "start in another folder.")  # fmt: skip
            if there:
                os.truncate(path, keep)
        self.handle: IO[bytes] = path.open("ab")

    def write(self, row: Mapping[str, Any]) -> None:
        self.handle.write(json.dumps(_finite(row), allow_nan=False).encode() + b"\n")
        self.handle.flush()

    def length(self) -> int:
        """Bytes so far, all on disk: a checkpoint must not know of lines that a power cut can take."""
        os.fsync(self.handle.fileno())
        return self.handle.tell()

    def close(self) -> None:
        self.handle.close()


class Clock:
    """Images a second since the start, without the first step (allocation, compilation) once there is another."""

    def __init__(self) -> None:
        self.start, self.images, self.first = time.monotonic(), 0, 0

    def tick(self, images: int) -> float:
        """Count a step's images; images/s so far."""
        now = time.monotonic()
        if not self.first:
            self.first, self.images = images, 0
            passed, self.start = now - self.start, now
            return images / max(passed, 1e-9)
        self.images += images
        return self.images / max(now - self.start, 1e-9)


def memory(device: torch.device) -> int:
    """Bytes at the peak so far: of the CUDA device, otherwise of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
