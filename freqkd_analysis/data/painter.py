"""A small painter: world shapes in metres become a map of material numbers, at twice the image's resolution.

Each visible part (a wall, a sleeve, a tyre) is one material: its albedo, temperature, emissivity and so on stand
in one row of a table, and only the row's number is painted. The two sensors then look up different columns of the
same map, which is what makes the pair share its geometry exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

SCALE = 2
"""Painted pixels per image pixel and axis: averaging 2 x 2 smooths edges and lets things move by half pixels."""

CLASSES = ("ground", "road", "sky", "building", "tree", "car", "person", "cyclist", "lamp")
"""Class of each mask value, in order: mask == 5 is a car."""


@dataclass(frozen=True)
class Camera:
    """A pinhole camera above the road; X right, Y up, Z forward, in metres; u, v in painted pixels.

    Example:
        >>> Camera(focal=500.0, cx=320.0, horizon=240.0, height=1.5).project(1.0, 0.0, 10.0)
        (370.0, 315.0)
    """

    focal: float
    cx: float
    horizon: float
    height: float

    def project(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Painted pixel (u, v) of a point with z > 0."""
        return self.cx + self.focal * x / z, self.horizon + self.focal * (self.height - y) / z


@dataclass(frozen=True)
class Material:
    """What the two sensors see of one part.

    albedo: linear reflectance (r, g, b), shading of its face included. celsius: temperature in degrees Celsius
    (differences are what counts). emissivity 0..1. glow: emitted light (r, g, b). texture: which tile; gain: its
    strength in albedo (relative) and in degrees.
    """

    albedo: tuple[float, float, float]
    celsius: float
    emissivity: float = 0.95
    glow: tuple[float, float, float] = (0.0, 0.0, 0.0)
    texture: int = 0
    gain: float = 0.15
    gain_ir: float = 0.3


@dataclass
class Canvas:
    """The map being painted and the table behind it."""

    camera: Camera
    ids: np.ndarray
    pad: int = 0
    """Painted pixels outside the image on every side. Coordinates count from the image's corner, so that the pad
    changes nothing inside it, not even by rounding."""
    materials: list[Material] = field(default_factory=list)
    places: list[tuple[float, int, int, float, float]] = field(default_factory=list)
    """Per material: depth in metres, class, instance (-1 none), texture anchor u and v."""
    depth: float = 100.0
    kind: int = 0
    instance: int = -1

    def add(self, material: Material, anchor: tuple[float, float] = (0.0, 0.0)) -> int:
        """Number of a new material at the canvas's current depth, class and instance."""
        self.materials.append(material)
        self.places.append((self.depth, self.kind, self.instance, *anchor))
        return len(self.materials) - 1

    def rect(self, u0: float, v0: float, u1: float, v1: float, number: int) -> None:
        """Fill an upright rectangle."""
        height, width = self.ids.shape
        a, b = max(round(v0) + self.pad, 0), min(round(v1) + self.pad, height)
        c, d = max(round(u0) + self.pad, 0), min(round(u1) + self.pad, width)
        if a < b and c < d:
            self.ids[a:b, c:d] = number

    def window(self, u0: float, v0: float, u1: float, v1: float) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """The part of the map inside a box, with its pixel centres as a row and a column; None when outside."""
        height, width = self.ids.shape
        a, b = max(int(v0 // 1) + self.pad, 0), min(int(v1 // 1) + self.pad + 1, height)
        c, d = max(int(u0 // 1) + self.pad, 0), min(int(u1 // 1) + self.pad + 1, width)
        if a >= b or c >= d:
            return None
        us = np.arange(c - self.pad, d - self.pad, dtype=np.float32) + np.float32(0.5)
        vs = (np.arange(a - self.pad, b - self.pad, dtype=np.float32) + np.float32(0.5))[:, None]
        return self.ids[a:b, c:d], us, vs

    def poly(self, points: Sequence[tuple[float, float]], number: int) -> None:
        """Fill a convex polygon."""
        us = [p[0] for p in points]
        vs = [p[1] for p in points]
        view = self.window(min(us), min(vs), max(us), max(vs))
        if view is not None:
            view[0][inside(points, view[1], view[2])] = number

    def ellipse(self, u: float, v: float, ru: float, rv: float, number: int, hole: float = 0.0) -> None:
        """Fill an ellipse; with `hole` a ring from that fraction of the radius outwards."""
        view = self.window(u - ru, v - rv, u + ru, v + rv)
        if view is None:
            return
        ids, us, vs = view
        r2 = ((us - u) / ru) ** 2 + ((vs - v) / rv) ** 2
        mask = r2 < 1.0
        if hole:
            mask &= r2 > hole * hole
        ids[mask] = number


def inside(points: Sequence[tuple[float, float]], us: np.ndarray, vs: np.ndarray) -> np.ndarray:
    """Which pixel centres lie in a convex polygon, whatever its sense of rotation.

    us: (w,), vs: (h, 1); returns (h, w) bool.

    Example:
        >>> inside([(0, 0), (2, 0), (0, 2)], np.array([0.5, 1.8]), np.array([[0.5]]))
        array([[ True, False]])
    """
    n = len(points)
    area = sum(points[i - 1][0] * points[i][1] - points[i][0] * points[i - 1][1] for i in range(n))
    sign = np.float32(1.0 if area >= 0 else -1.0)
    mask = None
    for i in range(n):
        (ua, va), (ub, vb) = points[i - 1], points[i]
        side = (np.float32(vb - va) * sign) * us - ((np.float32(ub - ua) * sign) * vs)
        part = side <= np.float32((vb - va) * ua - (ub - ua) * va) * sign
        mask = part if mask is None else mask & part
    assert mask is not None
    return mask


def facade(
    canvas: Canvas, ends: tuple[float, float, float, float], height: float, wall: int, panes: tuple[int, int], seed: int
) -> None:
    """Paint one vertical wall from (x0, z0) to (x1, z1) with its rows of windows.

    ends: x0, z0, x1, z1 in metres. panes: materials of a dark and of a lit window (the same number twice by day).
    """
    camera = canvas.camera
    x0, z0, x1, z1 = ends
    corners = [camera.project(x, y, z) for x, y, z in ((x0, 0, z0), (x0, height, z0), (x1, height, z1), (x1, 0, z1))]
    us_, vs_ = [p[0] for p in corners], [p[1] for p in corners]
    view = canvas.window(min(us_), min(vs_), max(us_), max(vs_))
    if view is None:
        return
    ids, us, vs = view
    mask = inside(corners, us, vs)
    ids[mask] = wall
    if abs(corners[1][1] - corners[0][1]) < 24:  # too far away for windows to be seen
        return
    # Along the wall: the ray through column u meets the line (x0, z0)-(x1, z1) at a fraction t and depth z.
    slope = (us - camera.cx) / camera.focal
    with np.errstate(divide="ignore", invalid="ignore"):
        t = (x0 - slope * z0) / (slope * (z1 - z0) - (x1 - x0))
    t = np.clip(np.nan_to_num(t, nan=0.0, posinf=0.0, neginf=0.0), 0.0, 1.0)
    along = t * np.float32(np.hypot(x1 - x0, z1 - z0) / 2.6)
    z = np.float32(z0) + t * np.float32(z1 - z0)
    column = along.astype(np.int16)
    across = np.abs(along - column - np.float32(0.5)) < 0.27
    storey = (np.float32(camera.height) - (vs - np.float32(camera.horizon)) * (z / np.float32(camera.focal))) / 3.1
    floor = storey.astype(np.int16)
    pane = mask & across & (np.abs(storey - floor - np.float32(0.55)) < 0.26) & (storey < height / 3.1 - 0.3)
    ids[pane] = panes[0]
    if panes[1] != panes[0]:
        lit = pane & ((column * 7 + floor * 13 + seed) % 5 == 0)
        ids[lit] = panes[1]
