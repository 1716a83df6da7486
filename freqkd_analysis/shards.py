"""A block's results on disk, and all blocks together as spectra.parquet.

A shard is written whole or not at all; what is there after an interruption is kept. Merging goes shard by shard, so
that memory does not grow with the number of pairs.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from freqkd_analysis import schema
from freqkd_analysis.errors import DataError, RunError

if TYPE_CHECKING:
    import pandas as pd

    from freqkd_analysis.bands import Bands
    from freqkd_analysis.features import Tap

FOLDER = "shards"
FEW_SHIFTS = 5
"""Measured shifts below which no median is told."""
CONFIDENT = 6.0
"""Peak height (robust standard deviations) from which a registration shift counts as measured."""


@dataclass
class Shard:
    """energies: {(condition, layer): (P, A, 4) pa, pb, re, pd}; pairs: {condition: [(id, group)]} in the same order.

    modes: {layer: (A,)}, {"pixels", layer} for the image itself. sums: further arrays by name (means, coherence).
    skipped: pairs that could not be read, with the reason. notes: small values by name.
    """

    energies: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    pairs: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    sums: dict[str, np.ndarray] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)


def path_of(run: Path, block: str) -> Path:
    """Where the shard of a block lies in a run folder."""
    return run / FOLDER / f"{block}.npz"


def save(run: Path, block: str, shard: Shard) -> None:
    """Write a block's shard whole or not at all."""
    arrays = {f"energies/{condition}/{layer}": value for (condition, layer), value in shard.energies.items()}
    arrays |= {f"sums/{name}": value for name, value in shard.sums.items()}
    header = json.dumps({"pairs": shard.pairs, "skipped": shard.skipped, "notes": shard.notes}, sort_keys=True)
    buffer = io.BytesIO()
    arrays["header"] = np.frombuffer(header.encode(), dtype=np.uint8)
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    with schema.atomic(path_of(run, block)) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load(run: Path, block: str) -> Shard:
    """Read a block's shard. Raises RunError when it is missing or damaged."""
    path = path_of(run, block)
    try:
        with np.load(path, allow_pickle=False) as stored:
            header = json.loads(stored["header"].tobytes())
            shard = Shard(skipped=header["skipped"], notes=header["notes"])
            shard.pairs = {name: [(str(i), str(g)) for i, g in pairs] for name, pairs in header["pairs"].items()}
            for name in stored.files:
                kind, _, rest = name.partition("/")
                if kind == "energies":
                    condition, _, layer = rest.rpartition("/")
                    shard.energies[condition, int(layer)] = stored[name]
                elif kind == "sums":
                    shard.sums[rest] = stored[name]
            return shard
    except FileNotFoundError:
        raise RunError(f"{path.parent.parent} lacks shard {path.name}; finish it with `--resume`.") from None
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise RunError(f"{path} is no whole shard ({type(error).__name__}); delete it and use `--resume`.") from error


def skipped(run: Path, block: str) -> list[dict[str, str]]:
    """The pairs a finished block left out; reads the shard's header alone."""
    with np.load(path_of(run, block), allow_pickle=False) as stored:
        return list(json.loads(stored["header"].tobytes())["skipped"])


def done(run: Path, block: str) -> bool:
    """Whether this block's shard is there and whole; a broken one is removed."""
    path = path_of(run, block)
    if not path.is_file():
        return False
    try:
        load(run, block)
        return True
    except RunError:
        path.unlink()
        return False


def check_place(run: Path, resume: bool, begun: str, finished: str) -> None:
    """Is this folder free for a new run, or with `resume` a run that was interrupted?

    Args: begun, finished: the files that an interrupted and a finished run have.
    Raises: RunError, with what the folder is.
    """
    if not run.is_dir() or not any(run.iterdir()):
        if run.exists() and not run.is_dir():
            raise RunError(f"{run} is a file; give a folder as --out.")
        if resume:
            raise RunError(f"nothing to resume in {run}; expected the folder of an interrupted run (--out).")
        return
    if resume and not (run / begun).is_file():
        why = "is finished" if (run / finished).is_file() else "is no interrupted run"
        raise RunError(f"nothing to resume in {run}: it {why}. A new run needs another --out.")
    if not resume:
        orelse = ", or --resume to finish it" if (run / begun).is_file() and not (run / finished).is_file() else ""
        raise RunError(f"{run} exists; give another --out{orelse}.")


def unfinished(parent: Path) -> Path:
    """The newest run folder below `parent` that still has shards. Raises RunError when there is none."""
    found = sorted(path.parent.parent for path in parent.glob(f"*/{FOLDER}/settings.json"))
    if not found:
        raise RunError(f"nothing to resume below {parent}/; expected an interrupted run, or name it with --out.")
    return found[-1]


def rows(shard: Shard, taps: Sequence[Tap], f_lo: Mapping[int, np.ndarray], f_hi: Mapping[int, np.ndarray],
         modes: Mapping[tuple[str, int], np.ndarray]) -> Iterator[pd.DataFrame]:  # fmt: skip
    """The shard as spectra rows, one frame a condition and layer; rings without a mode have no row."""
    import pandas as pd

    by_layer = {tap.layer: tap for tap in taps}
    for (condition, layer), values in shard.energies.items():
        tap, pairs = by_layer[layer], shard.pairs[condition]
        count = modes.get((condition, layer), modes["", layer])
        kept = np.flatnonzero(count > 0)
        tall, wide = len(pairs), len(kept)
        columns: dict[str, Any] = {
            "condition": condition,
            "pair": np.repeat([pair for pair, _ in pairs], wide),
            "group": np.repeat([group for _, group in pairs], wide),
            "layer": layer, "tap": tap.tap, "depth": tap.depth,
            "radius": np.tile(kept, tall), "f_lo": np.tile(f_lo[layer][kept], tall),
            "f_hi": np.tile(f_hi[layer][kept], tall), "modes": np.tile(count[kept], tall),
        }  # fmt: skip
        for number, name in enumerate(("p_rgb", "p_ir", "cross", "p_diff")):
            columns[name] = values[:, kept, number].ravel()
        if tall:
            yield pd.DataFrame(columns)


def merge(run: Path, blocks: Sequence[str], taps: Sequence[Tap], f_lo: Mapping[int, np.ndarray],
          f_hi: Mapping[int, np.ndarray], modes: Mapping[tuple[str, int], np.ndarray]) -> None:  # fmt: skip
    """Write spectra.parquet from the shards, one row group each, in the order of the plan."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = schema.arrow(schema.SPECTRA)
    with (
        schema.atomic(run / "spectra.parquet") as temporary,
        pq.ParquetWriter(
            temporary,
            columns,
            **schema.STORED,
            use_dictionary=["condition", "pair", "group", "tap", "layer", "radius"],
        ) as writer,
    ):
        for block in blocks:
            frames = list(rows(load(run, block), taps, f_lo, f_hi, modes))
            if frames:
                table = pd.concat(frames, ignore_index=True)
                schema.check(table, schema.SPECTRA, "spectra.parquet")
                writer.write_table(pa.Table.from_pandas(table, preserve_index=False).cast(columns))


def gather(run: Path, blocks: Sequence[str]) -> dict[str, Any]:
    """Small things of all shards for the manifest: skipped pairs, counts a condition, artefact tokens."""
    skipped: dict[str, str] = {}
    members: dict[str, list[tuple[str, str]]] = {}
    tokens: dict[str, list[np.ndarray]] = {}
    moved: list[np.ndarray] = []
    for block in blocks:
        shard = load(run, block)
        skipped |= {skip["id"]: skip["reason"] for skip in shard.skipped}
        present = {condition for condition, _ in shard.energies}
        for condition in present:
            members.setdefault(condition, []).extend(shard.pairs[condition])
        for name, values in shard.sums.items():
            if name.startswith("tokens/"):
                tokens.setdefault(name, []).append(values)
            elif name == "shift":
                moved.append(values.reshape(-1, 3))
    shifts = np.concatenate([np.zeros((0, 3)), *moved])
    distance = np.hypot(shifts[:, 0], shifts[:, 1])[shifts[:, 2] >= CONFIDENT]
    registration = {"registration_n": len(distance),
                    "registration_px": float(np.median(distance)) if len(distance) >= FEW_SHIFTS else None}  # fmt: skip
    artefacts = []
    for name in sorted(tokens, key=lambda n: (int(n.split("/")[1]), n)):
        rate, median, spread = np.concatenate(tokens[name]).mean(0)
        _, layer, modality = name.split("/")
        artefacts.append({"layer": int(layer), "modality": modality, "rate": rate, "median": median, "mad": spread})
    counts = {name: {"n": len(pairs), "groups": len({group for _, group in pairs})}
              for name, pairs in sorted(members.items())}  # fmt: skip
    return {"skipped": [{"id": i, "reason": skipped[i]} for i in sorted(skipped)], "conditions": counts,
            "artefacts": artefacts, "registration": registration}  # fmt: skip


def descriptors(run: Path, blocks: Sequence[str], taps: Sequence[Tap]) -> tuple[dict[int, np.ndarray], list[str]]:
    """Band amplitudes of the control pairs a layer, (n, 2, K, C), and the pairs' groups."""
    loaded = [shard for block in blocks if (shard := load(run, block)).notes["count"]]
    groups = [group for shard in loaded for group in shard.notes["groups"]]
    return {tap.layer: np.concatenate([s.sums[f"descriptors/{tap.layer}"] for s in loaded]) for tap in taps}, groups


def coherence(run: Path, blocks: Sequence[str], taps: Sequence[Tap], bands: Mapping[int, Bands]) -> pd.DataFrame:
    """coherence.parquet: squared coherence over the control pairs, debiased, a ring.

    coh^2 = |Z|^2 / (sum Pa sum Pb) per mode with Z the cross spectrum summed over images and channels;
    (n coh^2 - 1) / (n - 1), at least 0, then the mean over the ring's modes. phase: mean |angle of Z|.
    """
    import pandas as pd

    sums: dict[int, np.ndarray] = {}
    n = 0
    for shard in (load(run, block) for block in blocks):
        if not shard.notes["count"]:
            continue  # no pair of this block could be read
        n += int(shard.notes["count"])
        for tap in taps:
            sums[tap.layer] = sums.get(tap.layer, 0) + shard.sums[f"coherence/{tap.layer}"]
    if n == 0:
        raise DataError("no control pair can be read; see them with `freqkd-analyze data verify`.")
    frames = []
    for tap in taps:
        atoms = bands[tap.layer].atoms()
        z, pa, pb = sums[tap.layer]
        power = (pa * pb).real
        squared = np.divide(np.abs(z) ** 2, power, out=np.zeros_like(power), where=power > 0)
        debiased = np.maximum((n * squared - 1) / max(n - 1, 1), 0)
        index, kept = atoms.index.ravel(), np.flatnonzero(atoms.modes > 0)
        means = [np.bincount(index, values.ravel(), len(atoms))[kept] / atoms.modes[kept]
                 for values in (debiased, np.abs(np.angle(z)))]  # fmt: skip
        frames.append(pd.DataFrame({
            "layer": tap.layer, "tap": tap.tap, "radius": kept, "f_lo": atoms.f_lo[kept], "f_hi": atoms.f_hi[kept],
            "modes": atoms.modes[kept], "coherence": means[0], "phase": means[1], "n": n,
        }))  # fmt: skip
    return pd.concat(frames, ignore_index=True)
