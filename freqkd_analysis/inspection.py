"""What is at hand: a network's layers, and the state of this installation."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from freqkd_analysis import models, provenance
from freqkd_analysis.bands import Bands
from freqkd_analysis.features import find_taps, layer_names, reductions


def network(name: str, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Each layer of a network with its grid, stride, channels and modes in the default bands (random weights)."""
    made = models.create(name, "random", size)
    rows = []
    for tap in find_taps(made.model, size):
        bands = Bands.parse("octave:3", tap.grid, tap.stride)
        modes = dict(zip(bands.names, bands.modes.tolist(), strict=True))
        row = {"layer": tap.layer, "tap": tap.tap, "grid": f"{tap.grid[0]}x{tap.grid[1]}", "stride": tap.stride}
        rows.append(row | {"channels": tap.channels, "prefix tokens": tap.prefix}
                    | {f"{name} modes": count for name, count in modes.items()})  # fmt: skip
    return rows


def networks(pattern: str, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Networks that `models.listing` finds; those with weights at hand with layers, grids, strides and channels."""
    rows = models.listing(pattern)
    for row in rows if not pattern else ():
        with torch.device("meta"):  # shapes alone: no memory, no arithmetic
            bare = models.architecture(row["name"])
        strides = reductions(bare)
        channels = dict.fromkeys(int(entry["num_chs"]) for entry in bare.feature_info)  # type: ignore[union-attr]
        row |= {"layers": len(layer_names(bare)), "grid": " ".join(f"{size[0] // s}x{size[1] // s}" for s in strides),
                "stride": " ".join(map(str, strides)), "channels": " ".join(map(str, channels))}  # fmt: skip
    return rows


def doctor() -> dict[str, Any]:
    """Versions, devices, weights, data and disk."""
    devices = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    data = os.environ.get("FREQKD_TEST_DATA", "")
    weights = [f"{row['name']} ({row['weights']})" for row in models.listing()]
    return {
        **provenance.environment("cuda" if devices else "cpu", torch.get_num_threads()),
        "commit": provenance.commit(),
        "devices": devices or ["cpu"],
        "weights at hand": weights,
        "default network": models.DEFAULT if models.available(models.DEFAULT) else f"{models.demo.NAME} (demo)",
        "data at hand": ["synthetic", *([f"FREQKD_TEST_DATA={data}"] if data and Path(data).is_dir() else [])],
        "free disk": f"{shutil.disk_usage('.').free / 2**30:.1f} GiB",
    }
