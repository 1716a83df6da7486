"""A network, samples and settings small enough to train in milliseconds; as a script, what the tests of resuming run.

`python tiny_training.py kills FOLDER SEED COUNT` kills runs in the middle, resumes them, and prints how they compare
with one that was left alone; `slow FOLDER SECONDS` is a run with so long steps; `full FOLDER BYTES` one on a disk that
fills up; `together FOLDER`, under torchrun, one process of several.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from freqkd_train import checkpoint, engine, metrics_file, schedule
from freqkd_train.config import Training

SETTINGS = Training(epochs=3, batch=4, accumulate=2, lr=0.01, warmup=3, clip=0.5, ema=0.9, device="cpu",
                    checkpoint_every=3, weight_decay=0.1)  # fmt: skip
PAIRS = 22
STEPS = 15


class Samples:
    """x (B, 3) and y (B, 2): functions of (epoch, index) alone. seen: the keys asked for."""

    def __init__(self, pairs: int = PAIRS, before: Callable[[list[Any]], None] = lambda keys: None) -> None:
        self.pairs, self.before, self.seen = pairs, before, []

    def __len__(self) -> int:
        return self.pairs

    def batch(self, keys: list[tuple[int, int]]) -> dict[str, Any]:
        self.before(keys)
        self.seen.append(list(keys))
        x = torch.from_numpy(np.stack([np.random.default_rng(key).standard_normal(3) for key in keys])).float()
        return {"ids": [f"pair-{i}" for _, i in keys], "x": x, "y": torch.stack([x.sum(1), x[:, 0] * x[:, 1]], 1)}


class Student(nn.Module):
    """Two layers with a frozen one between; dropout and batch statistics, so that random state and buffers matter."""

    def __init__(self, dropout: float = 0.2, norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.frozen, self.last = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.frozen.requires_grad_(False)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        hidden = self.dropout(torch.relu(self.frozen(self.norm(self.first(batch["x"])))))
        squares = (self.last(hidden) - batch["y"]).square().mean(0)
        return {"loss": squares.sum(), "terms": {"0/low": squares[0], "0/high": squares[1]}}

    def shares(self, batch: dict[str, Any]) -> dict[str, float]:
        terms = self(batch)["terms"]
        return {name: float(value.detach() / sum(terms.values()).detach()) for name, value in terms.items()}


def validation(module: nn.Module) -> Callable[[], dict[str, float]]:
    held = Samples().batch([(99, i) for i in range(8)])

    def evaluate() -> dict[str, float]:
        with torch.no_grad():
            return {"val/loss": float(module(held)["loss"])}

    return evaluate


def quiet(text: str) -> None:
    pass


def train(folder: Path, settings: Training = SETTINGS, source: Any = None, **arguments: Any) -> Student:
    module = arguments.pop("module", None) or Student()
    given = {"evaluate": validation(module), "say": quiet, "shares_every": 4} | arguments
    engine.fit(module, source or Samples(), settings, 7, folder, **given)
    return module


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and _bits(a) == _bits(b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def _bits(x: Tensor) -> bytes:
    return x.detach().numpy().tobytes()


def unlike(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs: parts of the last checkpoint, of the best, and the metrics file."""
    found = []
    for name in (f"step-{STEPS:08d}.pt", checkpoint.BEST):
        a, b = (checkpoint.load(checkpoint.folder_of(run) / name) for run in (one, other))
        found += [f"{name} {key}" for key in {**a, **b} if key not in a or key not in b or not same(a[key], b[key])]
    a, b = ((run / metrics_file.METRICS).read_bytes() for run in (one, other))
    names = [sorted(p.name for p in checkpoint.folder_of(run).iterdir()) for run in (one, other)]
    return found + ([] if a == b else ["metrics"]) + ([] if names[0] == names[1] else [f"files {names}"])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_count(owner: Any, name: str, count: int, half: bool = False) -> None:
    """Kill this process when `owner.name` is called for the count-th time; with `half` after half of its data."""
    original, calls = getattr(owner, name), 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            if half:
                original(arguments[0], arguments[1][: len(arguments[1]) // 2])
                arguments[0].flush() if hasattr(arguments[0], "flush") else None
            die()
        return original(*arguments, **options)

    setattr(owner, name, counted)


def cut_line(count: int) -> None:
    """Kill this process with half a line of metrics written."""
    original, calls = metrics_file.Lines.write, 0

    def write(self: metrics_file.Lines, row: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            self.handle.write(b'{"step": 1')
            self.handle.flush()
            die()
        original(self, row)

    metrics_file.Lines.write = write


KILLS: dict[str, Callable[[int], None]] = {
    "sample": lambda n: at_count(Samples, "batch", n + 1),  # the first is the validation's
    "forward": lambda n: at_count(Student, "forward", n),
    "optimiser": lambda n: at_count(torch.optim.AdamW, "step", n),
    "inside a save": lambda n: at_count(checkpoint._Digest, "write", 7 * n, half=True),
    "before the rename": lambda n: at_count(os, "replace", n),
    "after the rename": lambda n: at_count(checkpoint, "_settle", n),
    "inside a line": cut_line,
}  # at_count on a class or module: this process ends with it


def child(work: Callable[[], Any]) -> int:
    """Run in a fork; its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def kills(folder: Path, seed: int, count: int) -> list[dict[str, Any]]:
    """Runs killed up to three times at drawn places, then resumed to the end, each against one left alone."""
    import accelerate.state  # noqa: F401 (once, not in each fork)
    import torch._dynamo  # noqa: F401 (any optimiser brings it in)

    whole = folder / "whole"
    assert child(lambda: train(whole)) == 0
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        run, killed = folder / str(i), []  # each way to die comes first in turn
        names = [list(KILLS)[i % len(KILLS)], *rng.choice(list(KILLS), 2)]
        for name in names:
            n = int(rng.integers(1, 12))

            def broken(run: Path = run, name: str = name, n: int = n) -> None:
                KILLS[name](n)
                train(run, resume=True)

            status = child(broken)
            if status == signal.SIGKILL:
                killed.append(f"{name} {n}")
            elif status != 0:
                killed.append(f"failed {name} {n}")
        finished = child(lambda run=run: train(run, resume=True)) == 0
        rows.append({"killed": killed, "unlike": unlike(whole, run) if finished else ["did not finish"]})
    return rows


def attempt(work: Callable[[], Any]) -> str:
    """What it raised, or nothing."""
    try:
        work()
    except (ValueError, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def together(folder: Path) -> dict[str, Any]:
    """What a process of several sees: a run of unlike shares, then runs that must stop in all of them."""
    rank = int(os.environ["RANK"])
    settings = SETTINGS.model_copy(update={"ema": 0.0, "batch": 5})
    told: dict[str, Any] = {}

    def go(name: str, source: Samples | None = None, module: Student | None = None, **arguments: Any) -> Student:
        made = module or Student(dropout=0, norm=False)
        told[name] = attempt(lambda: train(folder / name, settings, source, module=made, **arguments))
        return made

    module = Student(dropout=0, norm=False)
    told["trial"] = engine.trial(module, Samples(), settings, 7)["trained"]  # it must not stand in the run's way
    torch.save(go("whole", module=module, expected=frozenset({"0/low"})).state_dict(), folder / f"weights-{rank}.pt")
    go("missing", expected=frozenset({"0/low", "0/hihg"}))
    poisoned = Samples()
    poison(poisoned, schedule.keys(7, 2, PAIRS, 5)[4][1])  # step 3, in the last process
    before = go("poisoned", poisoned)
    told["replayed"] = engine.replay(folder / "poisoned" / "nonfinite-step-3", before)["bad"]
    unused = Student(dropout=0, norm=False)
    unused.extra = nn.Linear(2, 2)
    go("unused", module=unused)
    calls: list[Any] = []

    def ask(keys: list[Any]) -> None:
        calls.append(keys)
        if rank == 1 and len(calls) == 2 + 1:  # of the validation, and of three steps
            os.kill(os.getpid(), signal.SIGTERM)

    go("stopped", Samples(before=ask))
    told["steps"] = len(calls)
    asked = told["stopped"]
    torch.save(go("stopped", resume=True).state_dict(), folder / f"resumed-{rank}.pt")
    return told | {"stopped": asked, "resumed": told["stopped"]}


def fill_up(folder: Path, limit: int) -> None:
    """From the second epoch on no file may grow beyond `limit` bytes."""

    def shrink(keys: list[Any]) -> None:
        if keys[0][0] == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    train(folder, source=Samples(before=shrink))


def main(what: str, folder: Path, *rest: str) -> None:
    if what == "kills":
        print(json.dumps(kills(folder, *map(int, rest))))
    elif what == "slow":
        train(folder, source=Samples(before=lambda keys: time.sleep(float(rest[0]))), say=print)
    elif what == "together":
        atexit.register(tell_threads, folder)  # before that of the loop, so that it is called after it
        told = together(folder)
        (folder / f"told-{os.environ['RANK']}.json").write_text(json.dumps(told))
    elif what == "full":
        fill_up(folder, int(rest[0]))


def tell_threads(folder: Path) -> None:
    """The names of this process' threads, as the kernel knows them."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    (folder / f"threads-{os.environ['RANK']}.json").write_text(json.dumps(names))


def poison(source: Samples, index: int) -> None:
    """NaN in one sample."""
    clean = source.batch

    def batch(keys: list[tuple[int, int]]) -> dict[str, Any]:
        made = clean(keys)
        for i, (_, n) in enumerate(keys):
            if n == index:
                made["x"][i] = float("nan")
        return made

    source.batch = batch


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
    except ValueError as error:  # as the command line does
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
