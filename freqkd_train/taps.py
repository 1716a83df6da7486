"""Which teacher tap a student tap learns from, and how its features are brought to the teacher's shape.

A student of other width gets a learned 1x1 projector a tap, dropped on export; a grid of other size is resized with
antialiasing.

Shapes: B images, C channels, H x W tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from freqkd_analysis.errors import NetworkError
from freqkd_analysis.features import Tap, module_keys

Paired = tuple[Tap, Tap]
"""(teacher's tap, student's tap)."""


def pair(teacher: Sequence[Tap], student: Sequence[Tap]) -> list[Paired]:
    """Pair taps: in order when both have as many, otherwise by relative depth.

    By depth, every tap of the shorter side gets one of the longer side, in rising order, such that the differences of
    depth are least in sum.

    Args: taps of each network in the order of its layers.
    Returns: (teacher's, student's) tap, in order; no tap twice.
    Raises: NetworkError when the grids of a pair cannot be matched.

    Example:
        >>> def tap(n, of): return Tap(n, f"blocks.{n}", (n + 1) / of, (8, 8), 16, 64, "tokens")
        >>> [(t.layer, s.layer) for t, s in pair([tap(n, 12) for n in range(12)], [tap(n, 4) for n in range(4)])]
        [(2, 0), (5, 1), (8, 2), (11, 3)]
    """
    if len(teacher) >= len(student):
        pairs = [(teacher[i], tap) for i, tap in zip(_nearest(student, teacher), student, strict=True)]
    else:
        pairs = [(tap, student[i]) for i, tap in zip(_nearest(teacher, student), teacher, strict=True)]
    for t, s in pairs:
        _matchable(t, s)
    return pairs


def _nearest(few: Sequence[Tap], many: Sequence[Tap]) -> list[int]:
    """Rising places in `many`, one a tap of `few`, with the least sum of depth differences."""
    spare = len(many) - len(few)
    # best[j]: (cost, places) for the taps so far, the last of them at most at place i + j
    best: list[tuple[float, list[int]]] = [(0.0, [])] * (spare + 1)
    for i, tap in enumerate(few):
        following: list[tuple[float, list[int]]] = []
        for j in range(spare + 1):
            cost, places = best[j]
            taken = (cost + abs(many[i + j].depth - tap.depth), [*places, i + j])
            following.append(taken if not following or taken[0] < following[-1][0] else following[-1])
        best = following
    return best[-1][1]


def _matchable(teacher: Tap, student: Tap) -> None:
    """A grid of one token has no spatial frequency; grids of unlike shape do not show the same picture."""
    (ht, wt), (hs, ws) = teacher.grid, student.grid
    told = f"{teacher.tap} ({ht}x{wt}) and the student's {student.tap} ({hs}x{ws})"
    if min(hs, ws) < 2 <= min(ht, wt):
        raise NetworkError(f"cannot match {told}: one token has no spatial detail. Use a larger data.size or earlier "
                           "student.layers.")  # fmt: skip
    # Rounding to whole tokens moves each side by up to one.
    if not (hs - 1) / (ws + 1) <= ht / wt <= (hs + 1) / max(ws - 1, 1e-9):
        raise NetworkError(f"cannot match {told}: unlike aspect ratios. Choose other teacher.layers or student.layers.")


class Match(nn.Module):
    """Student features brought to the teacher's channels and grid.

    Args:
        pairs: from `pair`.
        project: `unlike` gives a 1x1 projector to taps of other width, `all` to every tap (FitNet), `none` to none.
        resize: whether grids are matched; losses that take any grid go without.

    Raises: NetworkError for two taps that cannot be told apart as modules.
    Called with {student's tap: (B, C, H, W)}; returns {teacher's tap: (B, C', H', W')}.
    """

    def __init__(self, pairs: Sequence[Paired], project: str = "unlike", resize: bool = True) -> None:
        super().__init__()
        self.pairs, self.resize, self.keys = list(pairs), resize, module_keys(teacher.tap for teacher, _ in pairs)
        self.projectors = nn.ModuleDict()
        for teacher, student in pairs:
            if project == "all" or (project == "unlike" and teacher.channels != student.channels):
                self.projectors[self.keys[teacher.tap]] = nn.Conv2d(student.channels, teacher.channels, 1)

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        for teacher, student in self.pairs:
            x = features[student.tap]
            if self.keys[teacher.tap] in self.projectors:
                x = self.projectors[self.keys[teacher.tap]](x)
            if self.resize and tuple(x.shape[2:]) != teacher.grid:
                x = resized(x, teacher.grid)
            out[teacher.tap] = x
        return out


def resized(x_BCHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bilinear with antialiasing, in float32: half types would round positions."""
    with torch.autocast(x_BCHW.device.type, enabled=False):
        x = x_BCHW.float() if x_BCHW.dtype in (torch.float16, torch.bfloat16) else x_BCHW
        return functional.interpolate(x, size=grid, mode="bilinear", antialias=True, align_corners=False)


def describe(pairs: Sequence[Paired]) -> list[dict[str, Any]]:
    """The pairing for a manifest or a dry run: one entry a pair."""
    return [{"teacher": t.tap, "student": s.tap, "teacher_grid": list(t.grid), "student_grid": list(s.grid),
             "teacher_channels": t.channels, "student_channels": s.channels, "teacher_depth": round(t.depth, 4),
             "student_depth": round(s.depth, 4)} for t, s in pairs]  # fmt: skip
