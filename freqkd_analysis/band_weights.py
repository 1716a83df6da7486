"""Measured band weights: what the analysis tells a loss, per layer and band (band_weights.json).

Two rules: `shared` supervises a band as far as it is shared, `precision` by what infrared cannot predict of it.
A band without a mode or without an answer has the weight null.

Letters: L layers, K bands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from freqkd_analysis import calibration, schema, statistics
from freqkd_analysis.bands import Bands
from freqkd_analysis.divergence import Cube, atom_matrix
from freqkd_analysis.statistics import Array

RULES: Mapping[str, str] = {
    "shared": "clip(1 - C, 0, 1) over the layer's largest; C: calibrated cosine divergence of {condition}",
    "precision": "1 / u over the layer's largest, limited to [0.01, 1]; u = mean P_rgb (1 - coherence^2) / modes",
}


def shared_weights(calibrated: Array) -> Array:
    """clip(1 - C, 0, 1) over the layer's largest: (L, K), NaN where C is.

    Example:
        >>> shared_weights(np.array([[0.2, 0.6, 1.3], [np.nan, 0.5, 0.75]])).tolist()
        [[1.0, 0.5, 0.0], [nan, 1.0, 0.5]]
    """
    return _over_largest(np.clip(1.0 - calibrated, 0.0, 1.0))


def precision_weights(energy: Array, coherence: Array, modes: Array) -> Array:
    """1 / u over the layer's largest, in [0.01, 1]; u = Pa (1 - coh^2) / m, what infrared cannot predict: all (L, K).

    Example:
        >>> precision_weights(np.array([[8.0, 4.0]]), np.array([[0.5, 0.0]]), np.array([[4, 8]])).tolist()
        [[0.5, 1.0]]
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        # Below this the debiased estimate says "all of it"; the weight must stay a number.
        unshared = np.maximum(1.0 - coherence, 1e-6)
        precision = np.where((modes > 0) & (energy > 0), modes / (energy * unshared), np.nan)
    return np.clip(_over_largest(precision), 0.01, 1.0)


def _over_largest(weights: Array) -> Array:
    largest = np.fmax.reduce(weights, axis=-1, keepdims=True)
    return weights / np.where(largest > 0, largest, 1.0)


def band_weights(
    run: Path,
    values: Cube,
    manifest: Mapping[str, Any],
    text: str,
    floor: str = "none",
    draws: int = statistics.DRAWS,
    seed: int = 0,
) -> dict[str, Any]:
    """The content of band_weights.json for the bands `text`, from a run's divergences and its coherence.parquet.

    C is that of cosine on `mean_removed` where that can be calibrated, else on `paired`. A rule that the run holds
    no rows for is absent from `weights`; `rules` says why. `energy`: mean P_rgb per position and channel.
    """
    own, taps = str(manifest["config"]["bands"]), {int(t["layer"]): t for t in manifest["taps"]}
    known, data = list(values.values), manifest.get("data", {})
    condition = next((c for c in calibration.QUESTIONS if calibration.ceiling_of(c, known) and c in known), None)
    grids = {n: ((int(t["grid"][0]), int(t["grid"][1])), int(t["stride"])) for n, t in taps.items()}
    bands = {n: Bands.parse(text, *grids[n]) for n in values.layers}
    counted = statistics.mean_over_pairs(values.of("paired" if "paired" in known else known[0], "modes"))
    modes = np.nan_to_num(counted).astype(int)  # as measured: a DCT has other modes in a band than the Fourier grid
    energy = statistics.mean_over_pairs(values.of("paired" if "paired" in known else known[0], "energy_rgb"))
    weights, rules = {}, {}
    rules["shared"] = "not computed: no condition with unrelated scenes to calibrate against"
    if condition is not None:
        registration = data.get("registration_px")
        c = calibration.calibrated_bands(values, condition, calibration.PRIMARY, floor, registration, draws, seed)
        weights["shared"] = shared_weights(c)
        rules["shared"] = RULES["shared"].format(condition=condition) + f"; floor {floor}"
    rules["precision"] = "not computed: the run has no coherence.parquet"
    if (run / "coherence.parquet").is_file():
        coherence = _coherence(run, bands, own, values.bands)
        weights["precision"] = precision_weights(energy, coherence, modes)
        rules["precision"] = RULES["precision"]
    rules["energy"] = "mean over pairs of P_rgb / (H W C), squared feature units"
    widest = max(bands.values(), key=len)
    layers = [
        {"layer": n, "tap": str(taps[n].get("tap", "")), "grid": list(grids[n][0]), "stride": grids[n][1],
         "f_lo": calibration.rounded(bands[n].f_lo), "f_hi": calibration.rounded(bands[n].f_hi),
         "modes": modes[i].tolist(), "weights": {rule: calibration.rounded(w[i]) for rule, w in weights.items()},
         "energy": calibration.rounded(energy[i])}
        for i, n in enumerate(values.layers)
    ]  # fmt: skip
    return {
        "schema": schema.VERSION,
        "bands": {"text": text, "names": list(values.bands), "f_lo": calibration.rounded(widest.f_lo),
                  "f_hi": calibration.rounded(widest.f_hi), "unit": "cycles per token"},
        "layers": layers,
        "rules": rules,
        "provenance": {"run": run.name, "network": manifest.get("network", {}).get("name"), "data": data.get("spec"),
                       "n": data.get("n")},
    }  # fmt: skip


def _coherence(run: Path, bands: Mapping[int, Bands], own: str, names: Sequence[str]) -> Array:
    """Squared coherence per layer and band (L, K): mean over the band's modes."""
    table = schema.read(run / "coherence.parquet")
    found = np.full((len(bands), len(names)), np.nan)
    for i, (number, wanted) in enumerate(bands.items()):
        stored = Bands.parse(own, wanted.grid, wanted.stride)
        matrix, rows = atom_matrix(stored, wanted), table[table["layer"] == number]
        radius, modes = rows["radius"].to_numpy().astype(int), rows["modes"].to_numpy().astype(float)
        value = np.where(modes > 0, np.nan_to_num(rows["coherence"].to_numpy()), 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = (modes * value) @ matrix[radius] / (modes @ matrix[radius])
        found[i, [names.index(name) for name in wanted.names]] = mean
    return found
