"""A run folder whose answer is known: coherence prescribed per condition and band, written as a run would write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from freqkd_analysis import schema
from freqkd_analysis.bands import Bands

CHANNELS = 24


def spectra(
    coherence: dict[str, tuple[float, float]],
    pairs: int = 40,
    layers: int = 3,
    groups: int = 12,
    text: str = "octave:3",
    grid: tuple[int, int] = (16, 16),
    seed: int = 0,
    spread: float = 0.02,
    few: int = 20,
) -> pd.DataFrame:
    """Rows of spectra.parquet. coherence: condition -> g (below 1/8, above); rows of `shifted:d` follow from d."""
    atoms = Bands.parse(text, grid, 14).atoms()
    count, where = len(atoms), np.maximum(atoms.f_lo, 1 / 64)
    of_pair, wobble = np.arange(pairs) % groups, np.random.default_rng(seed).normal(0, spread, (groups, 1))
    frames = []
    for k, (condition, (low, high)) in enumerate(coherence.items()):
        rng = np.random.default_rng([seed, k])
        n = min(few, pairs) if condition.partition(":")[0] in ("shifted", "grey", "noise", "random") else pairs
        for layer in range(layers):
            g = np.where(atoms.f_lo < 1 / 8, low, high) + wobble[of_pair[:n]] + rng.normal(0, spread, (n, 1))
            if condition.startswith("shifted"):
                d = float(condition.partition(":")[2])
                g = np.cos(np.minimum(2 * np.pi * where * d / 14, np.pi / 2)) + 0 * g
            pa = atoms.modes * CHANNELS / where * rng.lognormal(0, 0.1, (n, count))
            pb = pa * rng.lognormal(0, 0.1, (n, count))
            re = np.clip(g, -1, 1) * np.sqrt(pa * pb)
            rows = {
                "condition": condition, "pair": np.repeat([f"p{i:03d}" for i in range(n)], count),
                "group": np.repeat([f"g{i:02d}" for i in of_pair[:n]], count), "layer": np.int32(layer),
                "tap": f"blocks.{layer}", "depth": np.float32((layer + 1) / layers),
                "radius": np.tile(np.arange(count, dtype=np.int32), n), "f_lo": np.tile(atoms.f_lo, n),
                "f_hi": np.tile(atoms.f_hi, n), "modes": np.tile(atoms.modes.astype(np.int32), n),
                "p_rgb": pa.ravel(), "p_ir": pb.ravel(), "cross": re.ravel(), "p_diff": (pa + pb - 2 * re).ravel(),
            }  # fmt: skip
            frames.append(pd.DataFrame(rows))
    return pd.concat(frames, ignore_index=True)[list(schema.SPECTRA)]


def taps(layers: int = 3, grid: tuple[int, int] = (16, 16)) -> list[dict[str, Any]]:
    return [
        {"layer": n, "tap": f"blocks.{n}", "depth": (n + 1) / layers, "grid": list(grid), "stride": 14,
         "channels": CHANNELS}
        for n in range(layers)
    ]  # fmt: skip


def coherence_table(layers: int, text: str, grid: tuple[int, int]) -> pd.DataFrame:
    atoms = Bands.parse(text, grid, 14).atoms()
    value = np.where(atoms.f_lo < 1 / 8, 0.75, 0.0)
    return pd.concat(
        [
            pd.DataFrame({
                "layer": np.int32(n), "tap": f"blocks.{n}", "radius": np.arange(len(atoms), dtype=np.int32),
                "f_lo": atoms.f_lo, "f_hi": atoms.f_hi, "modes": atoms.modes.astype(np.int32), "coherence": value,
                "phase": 0.1, "n": np.int32(40),
            })
            for n in range(layers)
        ],
        ignore_index=True,
    )  # fmt: skip


def write_run(
    folder: Path,
    coherence: dict[str, tuple[float, float]],
    with_coherence: bool = True,
    registration_px: float | None = 1.7,
    **options: Any,
) -> Path:
    """A run folder as `layers` leaves it before any table is computed."""
    table = spectra(coherence, **options)
    layers, grid = options.get("layers", 3), options.get("grid", (16, 16))
    text = options.get("text", "octave:3")
    schema.write(table, folder / "spectra.parquet")
    if with_coherence:
        schema.write(coherence_table(layers, text, grid), folder / "coherence.parquet")
    manifest = {
        "schema": 1,
        "config": {"bands": text, "measure": None},
        "network": {"name": "vit", "trained": True},
        "data": {"spec": "known", "n": options.get("pairs", 40), "registration_px": registration_px},
        "taps": taps(layers, grid),
    }
    schema.write_text(folder / "manifest.json", json.dumps(manifest))
    return folder


KNOWN = {
    "paired": (0.8, 0.4),
    "shuffled": (0.2, 0.1),
    "mean_removed": (0.7, 0.35),
    "mean_removed_shuffled": (0.0, 0.0),
    "shifted:1": (0, 0),
    "shifted:2": (0, 0),
    "shifted:4": (0, 0),
    "shifted:8": (0, 0),
    "grey": (0.95, 0.9),
    "noise": (0.98, 0.9),
    "random": (0.8, 0.6),
}
"""Calibrated by hand: mean_removed C = (0.3, 0.65); paired C = (0.25, 0.6667)."""
