"""The streaming run: blocks of pairs through the network, spectra out, one shard a block.

Memory does not grow with the number of pairs: a block's sums are all that is kept, mean maps and one map of chain a
tap beside them. Each block stands alone, so that a run may stop anywhere, go on, or be shared out over processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from freqkd_analysis import conditions, shards
from freqkd_analysis.bands import Bands
from freqkd_analysis.data import layouts
from freqkd_analysis.data.records import PairRecord
from freqkd_analysis.errors import DataError, NonFiniteError
from freqkd_analysis.features import Capture, Tap, outliers
from freqkd_analysis.models import Network
from freqkd_analysis.plan import Block, Plan
from freqkd_analysis.shards import Shard
from freqkd_analysis.spectral import cross_modes, phase_correlation
from freqkd_analysis.spectrometer import References, Spectrometer, mean_removed, pixel_products, pixel_spectra, shuffled

Progress = Callable[[int, str], None]


@dataclass
class Bench:
    """All that stays fixed while blocks pass: network, taps, bands a tap, geometry, the scratch of each grid."""

    plan: Plan
    network: Network
    taps: Sequence[Tap]
    geometry: conditions.Geometry
    conversion: str = "unit"
    twin: Network | None = None
    device: str = "cpu"
    batch: int = 4
    workers: int = 2
    meters: dict[int, Spectrometer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        settings = self.plan.settings
        self.bands = {tap.layer: Bands.parse(settings.bands, tap.grid, tap.stride) for tap in self.taps}
        scratch: dict[tuple[tuple[int, int], int, int], Spectrometer] = {}
        for tap in self.taps:
            key = (tap.grid, tap.channels, tap.stride)
            how = (settings.window, settings.standardize, self.device)
            meter = Spectrometer(self.bands[tap.layer], tap.channels, *how, like=scratch.get(key))
            scratch.setdefault(key, meter)
            self.meters[tap.layer] = meter

    def modes(self) -> dict[tuple[str, int], np.ndarray]:
        """Modes in each ring, a layer; `pixels` has its own."""
        found = {("", layer): meter.modes for layer, meter in self.meters.items()}
        if self.plan.wants("pixels") and self.pixels_possible():
            size = self.geometry.size
            none = np.zeros((4, size[0] * size[1]))
            for layer, bands in self.bands.items():
                found["pixels", layer] = pixel_spectra(none, size, bands)[1]
        return found

    def pixels_possible(self) -> bool:
        return all(bands.edges2 is not None for bands in self.bands.values())

    def grey(self, view: Tensor) -> np.ndarray:
        """(H, W) luminance of a view as the network's input holds it (padding black)."""
        return self.geometry.padded(conditions.luminance(view))[0].numpy()

    def input(self, views: Sequence[Tensor], network: Network) -> Tensor:
        """Normalise views and put them on the device as one batch."""
        normal = [self.geometry.input(view, network.mean, network.std) for view in views]
        return torch.stack(normal).to(self.device)

    def forward(
        self, views: Sequence[Tensor], sink: Callable[[Tap, Tensor], None], network: Network | None = None
    ) -> None:
        """One forward of `views` in the run's precision; `sink` gets each tap's maps."""
        network = network or self.network
        half = self.plan.settings.dtype == "bf16"
        with (
            Capture(network.model, self.taps, sink, self.plan.settings.norm).hooked() as tapped,
            torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16, enabled=half),
        ):
            tapped.run(self.input(views, network))


@dataclass
class Loaded:
    """A pair ready for the network: its visible and infrared frame, (3, h, w) float32 in [0, 1]."""

    record: PairRecord
    rgb: Tensor
    ir: Tensor


def load(bench: Bench, records: Iterable[PairRecord], shard: Shard) -> Iterator[Loaded]:
    """Decode and scale pairs ahead of the network, in order; unreadable ones are noted in the shard and left out."""

    def work(record: PairRecord) -> Loaded:
        return Loaded(record, *conditions.frames(layouts.decode(record, bench.conversion), bench.geometry))

    with ThreadPoolExecutor(max(1, bench.workers)) as pool:
        queue = iter(records)
        waiting = [(record, pool.submit(work, record)) for record in islice(queue, 2 * bench.batch + bench.workers)]
        while waiting:
            record, future = waiting.pop(0)
            waiting += [(following, pool.submit(work, following)) for following in islice(queue, 1)]
            try:
                yield future.result()
            except DataError as error:
                shard.skipped.append({"id": record.id, "reason": str(error)})


def batches(items: Iterable[Loaded], size: int) -> Iterator[list[Loaded]]:
    """Items in lists of `size`, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def run_block(bench: Bench, block: Block, run: Path, progress: Progress) -> None:
    """Measure one block and save its shard. When memory runs out, once more with half the batch."""
    work = {"mean": mean_block, "main": main_block, "control": control_block}[block.kind]
    while True:
        try:
            shard = work(bench, block, run, progress)
            break
        except (torch.OutOfMemoryError, RuntimeError) as error:
            text = str(error).lower()
            if bench.batch == 1 or not ("memory" in text or "alloc" in text):
                raise
            bench.batch = max(1, bench.batch // 2)
            for meter in bench.meters.values():
                meter.forget()
    _check_finite(shard, bench.taps)
    shards.save(run, block.name, shard)


def mean_block(bench: Bench, block: Block, run: Path, progress: Progress) -> Shard:
    """Coefficients of the mean visible and infrared map of a fold, a tap: sums/layer (2, N, C) float32."""
    shard = Shard()
    sums = {layer: torch.zeros_like(meter.z) for layer, meter in bench.meters.items()}
    count = 0
    for batch in batches(load(bench, block.records, shard), bench.batch):
        views = [bench.geometry.view(item.rgb) for item in batch] + [bench.geometry.view(item.ir) for item in batch]

        def sink(tap: Tap, maps: Tensor, batch: list[Loaded] = batch) -> None:
            for i, maps_NC in enumerate(maps):
                found = bench.meters[tap.layer].coefficients(maps_NC)
                if not torch.isfinite(found.sum()):
                    raise _not_finite(tap.layer, tap.tap, batch[i % len(batch)].record.id, "mean maps")
                sums[tap.layer][i // len(batch)].add_(found)

        bench.forward(views, sink)
        count += len(batch)
        progress(len(batch), "mean maps")
    if count == 0:
        raise DataError(f"no pair of the mean maps can be read, first: {shard.skipped[0]['reason']} Next: data verify.")
    for layer, total in sums.items():
        shard.sums[str(layer)] = (total / count).cpu().numpy()
    shard.notes["count"] = count
    return shard


def references(bench: Bench, block: Block, run: Path) -> dict[int, References]:
    """Mean maps of the other fold (zeros when the plan has none) and an empty chain, a tap."""
    means = {}
    if bench.plan.means:
        means = shards.load(run, bench.plan.of_kind("mean")[1 - block.fold].name).sums
    out = {}
    for layer, meter in bench.meters.items():
        stack = torch.zeros(3, *meter.z.shape[1:], device=meter.z.device)
        if means:
            stack[:2] = torch.from_numpy(means[str(layer)])
        out[layer] = References(stack)
    return out


def main_block(bench: Bench, block: Block, run: Path, progress: Progress) -> Shard:
    """paired, and from the same transforms shuffled, mean_removed, mean_removed_shuffled."""
    shard = Shard()
    wants_features = bench.plan.wants("shuffled") or bench.plan.means
    kept = references(bench, block, run) if wants_features else {}
    done: list[PairRecord] = []
    for batch in batches(load(bench, block.records, shard), bench.batch):
        views = [bench.geometry.view(item.rgb) for item in batch] + [bench.geometry.view(item.ir) for item in batch]

        def sink(tap: Tap, maps: Tensor, size: int = len(batch)) -> None:
            bench.meters[tap.layer].measure_pairs(maps[:size], maps[size:], kept.get(tap.layer))

        bench.forward(views, sink)
        done += [item.record for item in batch]
        progress(len(batch), "pairs")
    pairs = [(record.id, record.group) for record in done]
    shard.pairs["paired"] = pairs
    partner = [i - 1 if i else len(pairs) - 1 for i in range(len(pairs))]
    valid = [i for i, j in enumerate(partner) if pairs[i][1] != pairs[j][1]]
    for tap in bench.taps if done else ():
        meter = bench.meters[tap.layer]
        if not wants_features:
            shard.energies["paired", tap.layer] = meter.collect()["energies"]
            continue
        link = meter.bin(meter.link(kept[tap.layer]))
        constants = meter.constants(kept[tap.layer])
        out = meter.collect()
        energies, products = out["energies"], out["products"]
        cross = products[:, :, 2].copy()
        cross[0] = link
        shard.energies["paired", tap.layer] = energies
        if bench.plan.wants("shuffled"):
            shard.energies["shuffled", tap.layer] = shuffled(energies, cross, partner)[valid]
        if bench.plan.means:
            removed = mean_removed(energies, products, constants)
            centred = cross - products[:, :, 1] - products[partner][:, :, 3] + constants[2]
            shard.energies["mean_removed", tap.layer] = removed
            shard.energies["mean_removed_shuffled", tap.layer] = shuffled(removed, centred, partner)[valid]
    shard.pairs["shuffled"] = shard.pairs["mean_removed_shuffled"] = [pairs[i] for i in valid]
    shard.pairs["mean_removed"] = pairs
    return shard


def control_block(bench: Bench, block: Block, run: Path, progress: Progress) -> Shard:
    """The image controls, the random twin, the pixels, coherence and artefact tokens, pair by pair."""
    shard = Shard()
    asked = bench.plan.settings.conditions
    kept: list[PairRecord] = []
    extras = _Extras(bench, shard)
    names: list[str] = []
    for item in load(bench, block.records, shard):
        seed = int(hashlib.sha256(f"{bench.plan.settings.seed}/{item.record.id}".encode()).hexdigest()[:8], 16)
        compared = conditions.image_comparisons(bench.geometry, item.rgb, item.ir, asked, seed)
        names = [name for name, _, _ in compared]
        pair = (bench.geometry.view(item.rgb), bench.geometry.view(item.ir))
        unique: list[Tensor] = [*pair]
        for _, a, b in compared:
            unique += [image for image in (a, b) if not any(image is old for old in unique)]
        places = [(_place(unique, a), _place(unique, b)) for _, a, b in compared]
        _in_parts(bench, unique, extras.sink(places))
        if "random" in asked and bench.twin is not None:
            bench.forward(pair, extras.twin_sink(), bench.twin)
        extras.images(*(bench.grey(view) for view in pair))
        kept.append(item.record)
        progress(1, "controls")
    extras.finish(names, [(record.id, record.group) for record in kept])
    return shard


def _place(images: Sequence[Tensor], wanted: Tensor) -> int:
    return next(i for i, image in enumerate(images) if image is wanted)


def _in_parts(bench: Bench, images: list[Tensor], sink: Callable[[Tap, Tensor], None]) -> None:
    """Forward a pair's variants together when they fit twice the batch, else in parts joined a tap."""
    most = 2 * bench.batch
    if len(images) <= most:
        bench.forward(images, sink)
        return
    parts: dict[int, list[Tensor]] = {tap.layer: [] for tap in bench.taps}
    for start in range(0, len(images), most):
        bench.forward(images[start : start + most], lambda tap, maps: parts[tap.layer].append(maps.clone()))
    for tap in bench.taps:
        sink(tap, torch.cat(parts.pop(tap.layer)))


class _Extras:
    """What a control block gathers a tap while its pairs pass."""

    def __init__(self, bench: Bench, shard: Shard) -> None:
        self.bench, self.shard = bench, shard
        layers = [tap.layer for tap in bench.taps]
        self.compared: dict[int, list[np.ndarray]] = {layer: [] for layer in layers}
        self.single: dict[tuple[str, int], list[np.ndarray]] = {}
        self.tokens: dict[tuple[int, str], list[list[float]]] = {}
        self.described: dict[int, list[np.ndarray]] = {}
        self.shifts: list[tuple[float, float, float]] = []

    def sink(self, places: list[tuple[int, int]]) -> Callable[[Tap, Tensor], None]:
        """For a forward of a pair's images, the visible one first, the infrared one second, then the controls'.

        places: the two images of each comparison.
        """

        def sink(tap: Tap, maps: Tensor) -> None:
            meter = self.bench.meters[tap.layer]
            for a, b in places:
                meter.measure(maps[a], maps[b])
            if places:
                self.compared[tap.layer].append(meter.collect()["energies"])
            self._coherence(tap, maps[0], maps[1])
            if self.bench.plan.settings.cka or self.bench.plan.settings.mmd:
                amplitudes = [meter.band_amplitudes(maps_NC) for maps_NC in maps[:2]]
                self.described.setdefault(tap.layer, []).append(np.stack(amplitudes))
            if self.bench.plan.wants("without_artefacts"):
                self._artefacts(tap, maps[:2])

        return sink

    def twin_sink(self) -> Callable[[Tap, Tensor], None]:
        def sink(tap: Tap, maps: Tensor) -> None:
            self._measured("random", tap, maps[0], maps[1])

        return sink

    def _measured(self, condition: str, tap: Tap, x_NC: Tensor, y_NC: Tensor) -> None:
        meter = self.bench.meters[tap.layer]
        meter.measure(x_NC, y_NC)
        self.single.setdefault((condition, tap.layer), []).append(meter.collect()["energies"])

    def images(self, visible: np.ndarray, infrared: np.ndarray) -> None:
        """What the grey images say by themselves: registration shift, and spectra at each tap's frequencies."""
        self.shifts.append(phase_correlation(visible, infrared))
        if not (self.bench.plan.wants("pixels") and self.bench.pixels_possible()):
            return
        squares = pixel_products(visible, infrared)
        for tap in self.bench.taps:
            values = pixel_spectra(squares, visible.shape, self.bench.bands[tap.layer])[0]
            self.single.setdefault(("pixels", tap.layer), []).append(values[None])

    def _coherence(self, tap: Tap, x_NC: Tensor, y_NC: Tensor) -> None:
        """Sums over pairs, per mode: complex cross spectrum and both energies, channels pooled."""
        if self.bench.plan.settings.window == "dct":
            return  # coherence is defined on Fourier modes
        meter = self.bench.meters[tap.layer]
        x, y = (meter.prepared(maps).T.reshape(1, -1, *tap.grid) for maps in (x_NC, y_NC))
        sums = torch.stack([part[0].to(torch.complex128) for part in cross_modes(x, y)]).cpu().numpy()
        name = f"coherence/{tap.layer}"
        self.shard.sums[name] = self.shard.sums.get(name, 0) + sums

    def _artefacts(self, tap: Tap, maps_2NC: Tensor) -> None:
        """Rates of high-norm tokens, and the pair measured with them replaced by the mean of the others."""
        mask, median, spread = outliers(maps_2NC)
        for i, modality in enumerate(("rgb", "ir")):
            row = [float(mask[i].float().mean()), float(median[i]), float(spread[i])]
            self.tokens.setdefault((tap.layer, modality), []).append(row)
        either = mask.any(0)
        clean = maps_2NC.float().clone()
        if bool(either.any()) and not bool(either.all()):
            clean[:, either] = clean[:, ~either].mean(1, keepdim=True)
        self._measured("without_artefacts", tap, clean[0], clean[1])

    def finish(self, names: list[str], pairs: list[tuple[str, str]]) -> None:
        """Move what was gathered into the shard; the two directions of a shift become one row by averaging energies."""
        for layer, found in self.compared.items():
            if not found:
                continue
            values = np.stack(found)  # (P, comparisons, A, 4)
            for name in dict.fromkeys(names):
                columns = [i for i, other in enumerate(names) if other == name]
                self.shard.energies[name, layer] = values[:, columns].mean(1)
                self.shard.pairs[name] = pairs
        for (condition, layer), singles in self.single.items():
            self.shard.energies[condition, layer] = np.concatenate(singles)
            self.shard.pairs[condition] = pairs
        for (layer, modality), token_rows in self.tokens.items():
            self.shard.sums[f"tokens/{layer}/{modality}"] = np.array(token_rows)
        for layer, described in self.described.items():
            self.shard.sums[f"descriptors/{layer}"] = np.stack(described)
        self.shard.notes["groups"] = [group for _, group in pairs]
        self.shard.sums["shift"] = np.array(self.shifts)
        self.shard.notes["count"] = len(pairs)


def _check_finite(shard: Shard, taps: Sequence[Tap]) -> None:
    names = {tap.layer: tap.tap for tap in taps}
    for (condition, layer), values in shard.energies.items():
        bad = ~np.isfinite(values).all((1, 2))
        if bad.any():
            pair = shard.pairs[condition][int(np.argmax(bad))][0]
            raise _not_finite(layer, names[layer], pair, condition)


def _not_finite(layer: int, tap: str, pair: str, condition: str) -> NonFiniteError:
    return NonFiniteError(
        f"features of layer {layer} ({tap}) are not finite for pair {pair} ({condition}); "
        "expected finite numbers. Try --dtype fp32 or other weights."
    )
