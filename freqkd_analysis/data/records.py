"""Pairs before and after decoding: `PairRecord` names the files, `PairedSample` holds the pixels.

`group` is the sequence or clip a pair belongs to: the unit that statistics resample. Sampling never looks
at pixels; it is a function of the records, the number asked for and the seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class PairRecord:
    """One visible-infrared pair on disk (or to be rendered), not yet decoded."""

    id: str
    group: str
    rgb: Path
    ir: Path
    time: str = ""
    """`day`, `night` or empty when the layout does not say."""
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PairedSample:
    """One decoded pair.

    rgb: (H, W, 3) float32 in [0, 1]; a grey visible image is repeated and flagged in meta["visible_is_grey"].
    ir: (H, W) float32 in [0, 1], after the conversion that meta["ir_conversion"] names.
    """

    rgb: np.ndarray
    ir: np.ndarray
    id: str
    group: str
    meta: Mapping[str, Any] = field(default_factory=dict)
