"""A plausible run folder without a network: tables drawn from a formula, for the tests of what comes after them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from freqkd_analysis import schema
from freqkd_analysis.bands import Bands

SHIFTS = (1, 2, 4, 8)
ALL = ["paired", "shuffled", "mean_removed", "mean_removed_shuffled", *(f"shifted:{d}" for d in SHIFTS),
       "grey", "inverted", "blur", "noise", "random", "pixels", "without_artefacts"]  # fmt: skip
MEASURES = ["cosine", "relative", "nmse", "mse", "mse_per_mode", "log_spectral", "energy_rgb", "modes"]
LEVEL = {"paired": 0.45, "mean_removed": 0.6, "shuffled": 0.8, "mean_removed_shuffled": 0.98, "random": 0.3,
         "pixels": 0.7, "grey": 0.04, "inverted": 0.4, "blur": 0.2, "noise": 0.1, "without_artefacts": 0.44} | {
    f"shifted:{d}": 0.06 * d for d in SHIFTS}  # fmt: skip


def names_of(bands: int) -> list[str]:
    return {2: ["low", "high"], 3: ["low", "mid", "high"]}.get(
        bands, ["low", *(f"b{i}" for i in range(1, bands - 1)), "high"]
    )


def fake_run(folder: Path, layers: int = 12, bands: int = 3, conditions: list[str] | None = None, pairs: int = 40,
             groups: int = 14, **manifest: Any) -> Path:  # fmt: skip
    """Write the files of a run folder. `manifest` replaces whole top-level entries of manifest.json."""
    conditions = ALL if conditions is None else conditions
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(layers * 100 + bands)
    names = names_of(bands)
    edges = np.linspace(0, 0.7072, bands + 1)
    summary = _summary(conditions, layers, names, pairs, groups, rng)
    schema.write(summary, folder / "summary.csv")
    ratio = _ratio(summary, names, conditions)
    schema.write(ratio, folder / "ratio.csv")
    spectra = _spectra([c for c in conditions if c != "pixels"], layers, min(pairs, 6), 3, names, rng)
    schema.write(spectra, folder / "spectra.parquet")
    (folder / "verdict.json").write_text(json.dumps(_verdict_json(ratio, conditions, pairs)))
    _convergence(names, conditions).to_csv(folder / "convergence.csv", index=False)
    share, precision = list(np.linspace(1, 0.2, bands)), list(np.linspace(1, 0.1, bands))
    modes = [40] * (bands - 1) + [700]
    weights = {
        "schema": 1,
        "bands": {"text": f"linear:{bands}", "names": names, "f_lo": list(edges[:-1]), "f_hi": list(edges[1:]),
                  "unit": "cycles per token"},
        "layers": [{"layer": i, "tap": f"blocks.{i}", "grid": [16, 16], "stride": 14, "modes": modes,
                    "weights": {"shared": share, "precision": precision},
                    "energy": list(np.geomspace(900, 30, bands))} for i in range(layers)],
        "rules": {"shared": "clip(1 - C, 0, 1) over the layer's largest", "precision": "1 / u over the largest"},
        "provenance": {"run": folder.name, "network": "vit", "data": "kit", "n": pairs},
    }  # fmt: skip
    (folder / "band_weights.json").write_text(json.dumps(weights))
    (folder / "manifest.json").write_text(json.dumps(_manifest(conditions, layers, bands, pairs, groups) | manifest))
    return folder


def _summary(conditions, layers, names, pairs, groups, rng) -> pd.DataFrame:
    records = []
    for condition in conditions:
        for measure in MEASURES:
            scale = {"mse": 3.0, "mse_per_mode": 0.02, "energy_rgb": 9.0, "modes": 60.0}.get(measure, 1.0)
            for layer in [*range(layers), "all"]:
                depth = 0.5 if layer == "all" else layer / max(1, layers - 1)
                for k, band in enumerate(names):
                    mean = scale * LEVEL[condition] * (0.55 + 0.25 * depth + 0.2 * k / (len(names) - 1))
                    mean *= 1 + 0.05 * rng.standard_normal()
                    half = 0.08 * mean
                    interval = (mean, mean - half, mean + half)
                    records.append((condition, str(layer), band, measure, *interval, pairs, groups))
    return pd.DataFrame(records, columns=list(schema.SUMMARY)).astype({"n": "int32", "groups": "int32"})


def _ratio(summary: pd.DataFrame, names: list[str], conditions: list[str]) -> pd.DataFrame:
    mean = summary.set_index(["condition", "layer", "band", "measure"])["mean"].to_dict()
    names_of_layers, records = list(summary["layer"].unique()), []
    for condition in conditions:
        ceiling = "mean_removed_shuffled" if condition == "mean_removed" else "shuffled"
        calibrated = ceiling in conditions and condition not in ("random", ceiling)
        for measure in MEASURES:
            for layer in names_of_layers:
                low, high = (mean[condition, layer, band, measure] for band in (names[0], names[-1]))
                row = {"condition": condition, "layer": layer, "measure": measure, "low": low, "high": high,
                       "ratio": high / low, "ratio_ci_low": high / low * 0.9, "ratio_ci_high": high / low * 1.15,
                       "difference": high - low, "p": 0.004, "p_fdr": 0.01}  # fmt: skip
                if calibrated:
                    c = [v / mean[ceiling, layer, b, measure] for v, b in ((low, names[0]), (high, names[-1]))]
                    r = c[1] / c[0]
                    row |= {"calibrated_low": c[0], "calibrated_high": c[1], "calibrated_ratio": r,
                            "calibrated_ci_low": r * 0.92, "calibrated_ci_high": r * 1.1,
                            "verdict": _verdict(r)}  # fmt: skip
                if "shifted:8" in conditions and condition in ("paired", "mean_removed") and measure == "cosine":
                    shift_high = "> 8" if high > 0.55 else f"{8 * high:.2g}"
                    row |= {"shift_low_px": f"{3 + low:.2g}", "shift_high_px": shift_high}
                records.append(row)
    return pd.DataFrame(records).reindex(columns=list(schema.RATIO))


def _verdict(ratio: float) -> str:
    return "supports" if ratio * 0.92 > 1 else "against" if ratio * 1.1 < 1 else "undetermined"


def _spectra(conditions, layers, pairs, groups, names, rng) -> pd.DataFrame:
    """Atoms of a 16x16 grid with a falling spectrum; the divergence of each condition grows with frequency."""
    atoms = Bands.parse(f"linear:{len(names)}", grid=(16, 16), stride=14).atoms()
    kept = np.flatnonzero(atoms.modes)
    f, modes = (atoms.f_lo[kept] + atoms.f_hi[kept]) / 2, atoms.modes[kept]
    shape = (len(conditions), pairs, layers, len(f))
    kind, pair, layer, place = (x.ravel() for x in np.indices(shape))
    f, modes, kept = f[place], modes[place], kept[place]
    p_rgb = 500 * modes / (1 + 30 * f**2) * rng.uniform(0.8, 1.2, len(f))
    p_ir = p_rgb * rng.uniform(0.7, 1.1, len(f))
    level = np.array([LEVEL[c] for c in conditions])[kind] * (0.5 + 0.3 * layer / layers + 0.6 * f)
    cross = (1 - level * rng.uniform(0.9, 1.1, len(f))) * np.sqrt(p_rgb * p_ir)
    names_of_pairs = np.array([f"p{i:03d}" for i in range(pairs)], dtype=object)
    names_of_groups = np.array([f"g{i % groups:02d}" for i in range(pairs)], dtype=object)
    return pd.DataFrame({
        "condition": np.array(conditions, dtype=object)[kind], "pair": names_of_pairs[pair],
        "group": names_of_groups[pair], "layer": layer,
        "tap": np.array([f"blocks.{i}" for i in range(layers)], dtype=object)[layer], "depth": (layer + 1) / layers,
        "radius": kept, "f_lo": atoms.f_lo[kept], "f_hi": atoms.f_hi[kept], "modes": modes, "p_rgb": p_rgb,
        "p_ir": p_ir, "cross": cross, "p_diff": p_rgb + p_ir - 2 * cross})  # fmt: skip


def _verdict_json(ratio: pd.DataFrame, conditions: list[str], pairs: int) -> dict[str, Any]:
    condition = "mean_removed" if "mean_removed" in conditions else "paired"
    part = ratio[(ratio["condition"] == condition) & (ratio["measure"] == "cosine")]
    ends = {"shift_low_px_ci": ["3.1", "3.6"], "shift_high_px_ci": ["3.5", "> 8"], "reason": ""}
    return {
        "measure": "cosine", "condition": condition, "verdict": str(part["verdict"].iloc[-1]), "floor": "none",
        "layers": [{"layer": int(n)} | ends for n in part["layer"] if n != "all"], "all": ends,
        "layer_ratios": {"calibrated_geometric": 1.01, "calibrated_geometric_ci": [0.93, 1.1]},
        "beside": {"shifted_at_registration": {"px": 1.3, "ratio": 1.45}},
        "statistics": {"interval": "cluster bootstrap, BCa", "draws": 2000}, "warnings": [],
    }  # fmt: skip


def _convergence(names: list[str], conditions: list[str]) -> pd.DataFrame:
    records = [
        (condition, "all", band, measure, n, groups, (0.9 if band == "low" else 1.4) / groups**0.5, 0.4, 0.5)
        for condition in conditions if condition in ("paired", "mean_removed")
        for measure in MEASURES
        for band in (names[0], names[-1])
        for n, groups in ((50, 12), (100, 22), (200, 34), (500, 41))
    ]  # fmt: skip
    columns = ["condition", "layer", "band", "measure", "n", "groups", "width", "ci_low", "ci_high"]
    return pd.DataFrame(records, columns=columns)


def _manifest(conditions, layers, bands, pairs, groups) -> dict[str, Any]:
    return {
        "schema": 1, "command": ["freqkd-analyze", "layers", "--pairs", str(pairs)], "version": "0.1.0",
        "commit": "abc1234", "started": "2026-11-25T01:00:00+00:00", "seconds": 61.5,
        "environment": {"python": "3.11.2", "torch": "2.14.0", "timm": "1.0.31", "device": "cpu", "threads": 1},
        "config": {"pairs": pairs, "data": "kit:pairs", "model": "vit_small_patch14_dinov2", "weights": "auto",
                   "layers": "all", "norm": False, "standardize": "none", "size": [448, 448], "geometry": "crop",
                   "window": "none", "bands": f"linear:{bands}", "measure": MEASURES[:6], "conditions": conditions,
                   "control_pairs": 20, "sample": "stratified", "seed": 0, "batch_size": 8, "device": "cpu",
                   "dtype": "fp32", "workers": 0, "preset": None},
        "network": {"name": "vit_small_patch14_dinov2", "weights": "pretrained", "sha256": "ab" * 32,
                    "parameters": 22_056_576, "trained": True, "note": ""},
        "data": {"spec": "kit:pairs", "n": pairs, "groups": groups, "control_n": 20,
                 "skipped": [{"id": "set00/<script>alert(1)</script>.jpg", "reason": "corrupt JPEG & truncated"}],
                 "day": 25, "night": 15, "id_sha256": "cd" * 32, "scale": 0.7, "registration_px": 1.3,
                 "registration_n": 31},
        "taps": [{"layer": i, "tap": f"blocks.{i}", "depth": (i + 1) / layers, "grid": [16, 16], "stride": 14,
                  "channels": 384} for i in range(layers)],
        "conditions": {c: {"n": pairs, "groups": groups} for c in conditions},
        "artefacts": [{"layer": layers - 1, "modality": m, "rate": 0.004, "median": 41.0, "mad": 3.2}
                      for m in ("rgb", "ir")],
    }  # fmt: skip
