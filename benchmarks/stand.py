"""The test stand: the run's own main block on random images, with a clock around what the taps do.

Share = time inside the taps, final binning included, over the rest of the same forward. One thread and process CPU
time, so that it stays valid beside other work: an A/B of whole forwards cannot resolve 1 % on a shared machine.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from freqkd_analysis import measure, models, plan, shards
from freqkd_analysis.conditions import Geometry
from freqkd_analysis.data.records import PairRecord
from freqkd_analysis.features import find_taps
from freqkd_analysis.plan import Settings
from freqkd_analysis.spectral import real_basis

FEATURE = ("paired", "shuffled", "mean_removed")
FEATURE_TOLERANCE = 2e-6
"""Largest error of any band, as a share of the pair's largest band (float32 against float64)."""


class Case(NamedTuple):
    """One row: a timm name, rows and columns of the input, its precision and the pairs of one forward."""

    model: str
    size: tuple[int, int]
    dtype: str
    batch: int
    bar: float = 0.0
    conditions: tuple[str, ...] = ("paired",)
    layers: str = "all"


@dataclass
class Stand:
    """A bench, one block of it, ready frames, the run folder with the mean maps, and these maps in space, a layer."""

    bench: measure.Bench
    block: plan.Block
    loaded: list[measure.Loaded]
    folder: Path
    means: dict[int, np.ndarray]

    def run(self) -> shards.Shard:
        with mock.patch.object(measure, "load", lambda bench, records, shard: iter(self.loaded)):
            return measure.main_block(self.bench, self.block, self.folder, lambda step, what: None)


@dataclass
class Times:
    """Seconds of each forward: inside the taps, and the forward without them; once a block: what follows."""

    inside: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    tail: float = 0.0

    def shares(self) -> list[float]:
        binning = self.tail / sum(self.bare)
        return [inside / bare + binning for inside, bare in zip(self.inside, self.bare, strict=True)]


def smooth(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random (..., H, W) with a red spectrum, the kind that images and feature maps have."""
    walk = np.cumsum(np.cumsum(rng.standard_normal(shape), -1), -2)
    return (walk - walk.mean((-2, -1), keepdims=True)) / walk.std((-2, -1), keepdims=True)


def networks() -> Callable[[Case], models.Network]:
    """A maker that keeps the last network: rows come sorted by network."""
    kept: dict[tuple[Any, ...], models.Network] = {}

    def make(case: Case) -> models.Network:
        key = (case.model, case.size)
        if key not in kept:
            kept.clear()
            kept[key] = models.create(case.model, "random", case.size)
        return kept[key]

    return make


@contextmanager
def stand(case: Case, network: models.Network, pairs: int, device: str = "cpu") -> Iterator[Stand]:
    """Everything `measure.main_block` needs for `pairs` pairs of random images, in a folder that goes away."""
    rng = np.random.default_rng(0)
    records = [PairRecord(f"{i:03d}", f"g{i}", Path("none"), Path("none")) for i in range(2 * pairs)]
    settings = Settings(pairs=2 * pairs, model=case.model, weights="random", size=case.size, conditions=case.conditions,
                        dtype=case.dtype, sample="first", layers=case.layers)  # fmt: skip
    made = plan.make(records, settings)
    block = plan.Block("main", 0, 0, made.of_kind("main")[0].records[:pairs])
    network.model.to(device)
    taps = find_taps(network.model, case.size, case.layers)
    bench = measure.Bench(made, network, taps, Geometry.make("crop", case.size, 1), device=device, batch=case.batch)
    loaded = []
    for record in block.records:
        seen = torch.from_numpy(smooth(rng, 3, *case.size)).float().mul(0.2).add(0.5)
        loaded.append(measure.Loaded(record, seen, (0.7 * seen.mean(0) + 0.3 * seen[0]).expand(3, -1, -1)))
    means: dict[int, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        if made.means:
            means = {tap.layer: 0.1 * smooth(rng, 2, tap.channels, *tap.grid) for tap in taps}
            kept = {str(layer): _coefficients(maps) for layer, maps in means.items()}
            for part in made.of_kind("mean"):
                shards.save(Path(folder), part.name, shards.Shard(sums=kept))
        yield Stand(bench, block, loaded, Path(folder), means)


def _coefficients(maps_2CHW: np.ndarray) -> np.ndarray:
    rows, columns = (real_basis(n) for n in maps_2CHW.shape[2:])
    return (rows @ maps_2CHW @ columns.T).reshape(*maps_2CHW.shape[:2], -1).transpose(0, 2, 1).astype(np.float32)


@contextmanager
def watched(
    bench: measure.Bench, clock: Callable[[], float], around: Callable[..., None] | None = None
) -> Iterator[Times]:
    """Times every forward of `bench`; `around(sink, tap, maps)` may stand in for the plain call of the sink."""
    times, last, real, real_input = Times(), 0.0, bench.forward, bench.input

    def forward(views: list[Tensor], sink: Callable[..., None], network: models.Network | None = None) -> None:
        nonlocal last
        inside = before = 0.0

        def timed(tap: Any, maps: Tensor) -> None:
            nonlocal inside
            start = clock()
            if around is None:
                sink(tap, maps)
            else:
                around(sink, tap, maps)
            inside += clock() - start

        def images(*arguments: Any) -> Tensor:  # making the batch belongs neither to the forward nor to the taps
            nonlocal before
            start = clock()
            out = real_input(*arguments)
            before += clock() - start
            return out

        start = clock()
        with mock.patch.object(bench, "input", images):
            real(views, timed, network)
        last = clock()
        times.inside.append(inside)
        times.bare.append(last - start - inside - before)

    with mock.patch.object(bench, "forward", forward):
        yield times
        times.tail = clock() - last


def share(made: Stand, rounds: int, clock: Callable[[], float] = time.process_time,
          around: Callable[..., None] | None = None) -> tuple[list[float], Times]:  # fmt: skip
    """Shares of every forward of `rounds` blocks, and the times of the last block."""
    shares: list[float] = []
    for _ in range(rounds):
        with watched(made.bench, clock, around) as times:
            made.run()
        shares += times.shares()
    return shares, times


def agreement(made: Stand, every: bool = False) -> float:
    """Warm-up and check in one block: the worst band of the first pairs against complex float64 transforms.

    Returns: largest error as a share of the pair's largest band energy, over all conditions that the block makes.
    """
    taps = made.bench.taps
    wanted = {tap.layer for tap in (taps if every else (taps[0], taps[-1]))}
    kept: dict[int, list[np.ndarray]] = {layer: [] for layer in wanted}
    count = min(2, len(made.loaded))

    def around(sink: Callable[..., None], tap: Any, maps: Tensor) -> None:
        half = len(maps) // 2
        if tap.layer in wanted and len(kept[tap.layer]) < count:
            for i in range(min(half, count)):
                both = torch.stack([maps[i], maps[half + i]]).double().cpu().numpy()
                kept[tap.layer].append(both.transpose(0, 2, 1).reshape(2, -1, *tap.grid))
        sink(tap, maps)

    with watched(made.bench, time.process_time, around):
        shard = made.run()
    return max(_worst(made, shard, layer, kept[layer][:count]) for layer in wanted)


def _worst(made: Stand, shard: shards.Shard, layer: int, pairs: list[np.ndarray]) -> float:
    bands = made.bench.bands[layer]
    mean = made.means.get(layer, np.zeros((2, 1, 1, 1)))
    expected = {("paired", i): reference(x, y, bands.index, len(bands)) for i, (x, y) in enumerate(pairs)}
    for i, (x, y) in enumerate(pairs):
        expected["mean_removed", i] = reference(x - mean[0], y - mean[1], bands.index, len(bands))
    if len(pairs) > 1:  # the chain: pair 1 meets the infrared map of pair 0
        expected["shuffled", 1] = reference(pairs[1][0], pairs[0][1], bands.index, len(bands))
        expected["mean_removed_shuffled", 1] = reference(
            pairs[1][0] - mean[0], pairs[0][1] - mean[1], bands.index, len(bands)
        )
    worst = 0.0
    for (condition, i), sums in expected.items():
        if (condition, layer) in shard.energies:
            got = bands.atoms().to_bands.T @ shard.energies[condition, layer][i]
            worst = max(worst, float(np.abs(got - sums).max() / np.abs(sums).max()))
    return worst


def reference(x_CHW: np.ndarray, y_CHW: np.ndarray, index: np.ndarray, count: int) -> np.ndarray:
    """(K, 4) pa, pb, re, pd by complex transforms and one mask a band, in float64."""
    fx, fy, fd = (np.fft.fft2(z, norm="ortho") for z in (x_CHW, y_CHW, x_CHW - y_CHW))
    rows = []
    for k in range(count):
        m = index == k
        a, b, d = fx[:, m], fy[:, m], fd[:, m]
        rows.append([(abs(a) ** 2).sum(), (abs(b) ** 2).sum(), (a * b.conj()).real.sum(), (abs(d) ** 2).sum()])
    return np.array(rows)


def scratch_bytes(bench: measure.Bench) -> int:
    """Bytes of the tensors that the meters hold between forwards, each storage once."""
    found: dict[int, int] = {}
    for meter in bench.meters.values():
        for value in vars(meter).values():
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def allocator_peak(work: Callable[[], Any]) -> int:
    """Highest sum of live bytes that `work` allocates through PyTorch, from the profiler's memory events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    live = peak = 0
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def extra_memory(made: Stand) -> tuple[int, int]:
    """(extra allocator peak of a block with taps over one without, scratch) in bytes."""
    made.run()  # lazily made tables are not the taps' doing twice
    bare = allocator_peak(lambda: _without(made))
    return allocator_peak(made.run) - bare, scratch_bytes(made.bench)


def _without(made: Stand) -> None:
    real = made.bench.forward
    geometry = made.bench.geometry
    for batch in measure.batches(iter(made.loaded), made.bench.batch):
        views = [geometry.view(item.rgb) for item in batch] + [geometry.view(item.ir) for item in batch]
        real(views, lambda tap, maps: None)


def summary(shares: list[float]) -> tuple[float, float, float]:
    """Median, least and greatest overhead (1 + share)."""
    return 1 + statistics.median(shares), 1 + min(shares), 1 + max(shares)


def device_seconds(made: Stand, rounds: int) -> tuple[list[float], list[float]]:
    """Device seconds of a block without and with taps, in turn, between two events; the block's binning included."""

    def once(work: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    bare, full = [], []
    for _ in range(rounds + 1):  # the first round warms up
        bare.append(once(lambda: _without(made)))
        full.append(once(made.run))
    return bare[1:], full[1:]
