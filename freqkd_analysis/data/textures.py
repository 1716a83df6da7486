"""Texture tiles with natural statistics, made of octaves of noise (no transform): amplitude falls as 1/f."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

SIDE = 256
"""Tile side in pixels: a power of two, so that wrapping round is a bit mask."""


def octaves(rng: np.random.Generator, side: int, slope: float, first: int = 2) -> np.ndarray:
    """Periodic noise whose amplitude spectrum falls as f ** -slope: (side, side) float32, mean 0, variance 1.

    Each octave is white noise on a coarser grid, brought up by cubic spline; equal variance per octave is a
    power spectrum of 1/f^2, which is what photographs have.

    Example:
        >>> octaves(np.random.default_rng(0), 64, 1.0).shape
        (64, 64)
    """
    from scipy import ndimage

    out = np.zeros((side, side), np.float32)
    n = first
    while n <= side:
        noise = rng.standard_normal((n, n)).astype(np.float32)
        grown = ndimage.zoom(noise, side / n, order=3, mode="grid-wrap", grid_mode=True)
        out += grown / grown.std() * np.float32((n / first) ** (1.0 - slope))
        n *= 2
    out -= out.mean()
    return (out / out.std()).astype(np.float32)


@lru_cache(maxsize=1)
def tiles() -> np.ndarray:
    """The tiles all scenes share: 0 rough ground, 1 foliage, 2 masonry, 3 clouds; (4, SIDE, SIDE), variance 1."""
    rng = np.random.default_rng(20_240_611)
    rough = octaves(rng, SIDE, 0.85)
    leaves = octaves(rng, SIDE, 0.7, first=16)
    leaves = np.sign(leaves) * np.abs(leaves) ** 0.8  # clumps of leaves against dark gaps
    wall = octaves(rng, SIDE, 0.9)
    row = np.arange(SIDE)
    joints = (row % 8 == 0)[:, None] | ((row[None] + 4 * (row[:, None] // 8 % 2)) % 16 == 0)
    wall = wall - 1.1 * joints
    clouds = octaves(rng, SIDE, 1.35)
    stack = np.stack([rough, leaves, wall, clouds]).astype(np.float32)
    stack -= stack.mean((1, 2), keepdims=True)
    stack /= stack.std((1, 2), keepdims=True)
    stack.flags.writeable = False
    return stack
