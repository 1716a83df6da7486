"""From the command line's words to `Settings` and `Machine`: parsing and checks across options, nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import fields, replace
from typing import Any

from freqkd_analysis import conditions
from freqkd_analysis.data.records import SAMPLERS
from freqkd_analysis.divergence import chosen
from freqkd_analysis.errors import FreqkdError, nearest
from freqkd_analysis.plan import Machine, Settings
from freqkd_analysis.spectral import STANDARDIZATIONS, WINDOWS

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "model": "vit_large_patch14_reg4_dinov2.lvd142m", "layers": "7,15,19,21,23", "size": (512, 640),
        "geometry": "pad", "standardize": "released", "bands": "paper", "sample": "first",
        "measure": ("mse", "nmse", "cosine"),
    },
}  # fmt: skip
"""`paper`: the analysis of the FreqKD release (arXiv 2606.11572): its network, blocks, padding, order and bands."""

_CHOICES = {
    "standardize": STANDARDIZATIONS,
    "window": WINDOWS,
    "geometry": ("crop", "pad"),
    "dtype": ("fp32", "bf16"),
    "sample": tuple(SAMPLERS),
}


def settings(values: Mapping[str, Any], given: Set[str] = frozenset()) -> Settings:
    """Settings from option values; a preset fills every option not in `given`.

    Example:
        >>> settings({"size": "64x96", "conditions": "grey"}).size
        (64, 96)
    """
    known = {field.name for field in fields(Settings)}
    parsed = {name: value for name, value in values.items() if name in known}
    for name, parse in (("size", size), ("measure", measures), ("conditions", conditions.parse)):
        if name in parsed:
            parsed[name] = parse(parsed[name])
    made = Settings(**parsed)
    if made.preset:
        if made.preset not in PRESETS:
            raise FreqkdError(
                f'expected --preset {"|".join(PRESETS)}, got "{made.preset}".{nearest(made.preset, PRESETS)}'
            )
        preset = PRESETS[made.preset]
        made = replace(made, **{name: value for name, value in preset.items() if name not in given})
    for name, allowed in _CHOICES.items():
        if getattr(made, name) not in allowed:
            got = getattr(made, name)
            raise FreqkdError(f'expected --{name} {"|".join(allowed)}, got "{got}".{nearest(got, allowed)}')
    return made


def machine(values: Mapping[str, Any]) -> Machine:
    """What decides only the time: device, batch size (0 for auto), workers."""
    batch = str(values["batch_size"])
    if batch != "auto" and (not (batch.isascii() and batch.isdigit()) or int(batch) < 1):
        raise FreqkdError(f'expected --batch-size auto or a number of pairs from 1, got "{batch}".')
    return Machine(str(values["device"]), 0 if batch == "auto" else int(batch), int(values["workers"]))


def size(text: str) -> tuple[int, int]:
    """`N` or `ROWSxCOLUMNS` in px."""
    parts = text.lower().split("x")
    whole = all(part.isascii() and part.isdigit() and 0 < int(part) <= 4096 for part in parts)
    if len(parts) not in (1, 2) or not whole:
        raise FreqkdError(f'expected --size N or ROWSxCOLUMNS, 1 to 4096 px, got "{text}".')
    return int(parts[0]), int(parts[-1])


def measures(text: str) -> tuple[str, ...]:
    """`all` (empty) or names of measures; checked."""
    if text == "all":
        return ()
    names = tuple(part.strip() for part in text.split(","))
    chosen(names)
    return names
