"""What stands in a scene and how it moves: weather, road, buildings, trees, lamps, cars, people, cyclists.

Everything is drawn from one generator per scene, so that a scene is a function of its seed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

LENGTH = 220.0
"""Metres after which the world repeats: a long sequence never runs out of road."""


@dataclass(frozen=True)
class Weather:
    """Light and heat of one scene. Temperatures in degrees Celsius, `sun` 0..1, elevation in radians."""

    night: bool
    air: float
    sky: float
    sun: float
    azimuth: float
    elevation: float

    def shade(self, nx: float, nz: float) -> float:
        """Light on a vertical face with normal (nx, nz): the sky's part plus the sun's."""
        toward = np.cos(self.elevation) * (nx * np.sin(self.azimuth) + nz * np.cos(self.azimuth))
        return float(0.55 + 0.65 * self.sun * max(0.0, toward))

    def heat(self, albedo: float, facing: float = 0.7) -> float:
        """Temperature of a passive surface: air, plus what the sun leaves in a dark one, plus stored heat at night."""
        return self.air + (2.5 if self.night else 1.0) + 16.0 * self.sun * facing * (1.0 - albedo)


@dataclass(frozen=True)
class Thing:
    """One object: what it is, where it starts (x, z in metres), how it moves (m/s) and its own numbers."""

    what: str
    x: float
    z: float
    vx: float = 0.0
    vz: float = 0.0
    own: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class World:
    """A scene before it is seen: weather, road, things."""

    weather: Weather
    road: float
    walk: float
    curve: float
    speed: float
    lane: float
    horizon: float
    paved: bool
    things: tuple[Thing, ...]
    skyline: np.ndarray


def weather(rng: np.random.Generator, night: bool) -> Weather:
    """Draw the weather of a scene."""
    clear = rng.random() < 0.65
    air = float(rng.uniform(4, 18) if night else rng.uniform(10, 28))
    return Weather(
        night=night,
        air=air,
        sky=air - float(rng.uniform(22, 38) if clear else rng.uniform(6, 14)),
        sun=0.0 if night else float(rng.uniform(0.7, 1.0) if clear else rng.uniform(0.0, 0.25)),
        azimuth=float(rng.uniform(-np.pi, np.pi)),
        elevation=float(rng.uniform(0.35, 1.0)),
    )


def build(rng: np.random.Generator, night: bool) -> World:
    """Draw a whole scene: a street between buildings and trees, with traffic and people."""
    road, walk = float(rng.uniform(3.6, 6.5)), float(rng.uniform(1.8, 4.0))
    town, green = float(rng.uniform(0.2, 1.0)), float(rng.uniform(0.1, 1.0))
    things: list[Thing] = []
    for side in (-1.0, 1.0):
        things += buildings(rng, side, road + walk, town)
        for z in np.arange(float(rng.uniform(0, 8)), LENGTH, float(rng.uniform(7, 16))):
            if rng.random() < green:
                x = side * (road + walk * rng.uniform(0.6, 1.6))
                things.append(Thing("tree", float(x), float(z + rng.uniform(-2, 2)), own=tree_numbers(rng)))
        for z in np.arange(float(rng.uniform(0, 25)), LENGTH, 27.0):
            things.append(Thing("lamp", side * (road + 0.5), float(z), own={"height": 6.5, "arm": -side * 1.6}))
        parked = rng.random() < 0.6
        for z in np.arange(float(rng.uniform(4, 12)), LENGTH, 6.5):
            if parked and rng.random() < 0.6:
                things.append(Thing("car", side * (road - 1.0), float(z), own=car_numbers(rng, moving=False)))
    speed = float(rng.choice([0.0, rng.uniform(3, 11)], p=[0.25, 0.75]))
    lane = road * 0.42
    for _ in range(rng.integers(3, 9)):
        ahead = rng.random() < 0.5
        vz = speed + rng.uniform(-1.5, 2.5) if ahead else -rng.uniform(4, 11)
        own = car_numbers(rng, moving=True, front=not ahead)
        things.append(Thing("car", lane if ahead else -lane, spread(rng, 9), vz=float(vz), own=own))
    for _ in range(rng.integers(6, 26)):
        things.append(walker(rng, road, walk))
    for _ in range(rng.integers(1, 6)):
        side = float(rng.choice([-1.0, 1.0]))
        vz = float(side * rng.uniform(2.5, 5.5))
        things.append(Thing("cyclist", side * road * 0.75, spread(rng, 7), vz=vz, own=person_numbers(rng)))
    ridge = np.cumsum(rng.normal(0, 1, 512))
    ridge -= np.linspace(ridge[0], ridge[-1], 512)
    return World(
        weather(rng, night), road, walk, float(rng.normal(0, 7e-4)), speed, lane * float(rng.uniform(0.6, 1.2)),
        float(rng.uniform(0.40, 0.54)), bool(rng.random() < 0.5), tuple(things), np.abs(ridge) / np.abs(ridge).max(),
    )  # fmt: skip


def spread(rng: np.random.Generator, nearest: float) -> float:
    """A distance whose logarithm is uniform: as many things near as far, as a driver meets them."""
    return float(nearest * np.exp(rng.uniform(0, np.log(LENGTH * 0.6 / nearest))))


def walker(rng: np.random.Generator, road: float, walk: float) -> Thing:
    """A pedestrian on a pavement, or one that crosses."""
    if rng.random() < 0.25:
        side = float(rng.choice([-1.0, 1.0]))
        x = side * rng.uniform(0, road)
        pace = float(rng.uniform(0.4, 1.4))
        return Thing("person", float(x), spread(rng, 6), vx=-side * pace, own=person_numbers(rng))
    x = float(rng.choice([-1.0, 1.0]) * (road + walk * rng.uniform(0.1, 0.9)))
    return Thing("person", x, spread(rng, 6), vz=float(rng.uniform(-1.5, 1.5)), own=person_numbers(rng))


def buildings(rng: np.random.Generator, side: float, edge: float, town: float) -> list[Thing]:
    """One side of the street: houses of changing length, height and colour, with gaps."""
    out, z = [], float(rng.uniform(-6, 6))
    setback = float(rng.uniform(0.5, 7))
    while z < LENGTH - 12:
        length = float(rng.uniform(8, 28))
        if rng.random() < town:
            own = {
                "length": length, "depth": float(rng.uniform(8, 20)), "height": float(rng.uniform(4, 9 + 16 * town)),
                "albedo": tint(rng, rng.uniform(0.12, 0.6), 0.18), "seed": int(rng.integers(1000)),
            }  # fmt: skip
            out.append(Thing("building", side * (edge + setback + rng.uniform(0, 2)), z, own=own))
        z += length + float(rng.uniform(0, 9))
    return out


def tint(rng: np.random.Generator, level: float, spread_: float) -> tuple[float, float, float]:
    """A colour of a given mean reflectance, warm or cold by chance."""
    warm = rng.normal(0, spread_)
    r, g, b = (float(np.clip(level * (1 + k), 0.02, 0.9)) for k in (warm, 0.15 * rng.normal() * spread_, -warm))
    return r, g, b


def tree_numbers(rng: np.random.Generator) -> dict[str, Any]:
    """Size, shape and colour of a tree."""
    blobs = [tuple(map(float, rng.uniform((-0.5, -0.35, 0.5), (0.5, 0.5, 0.8)))) for _ in range(3)]
    green = float(rng.uniform(0.08, 0.2))
    colour = (green * float(rng.uniform(0.5, 1.1)), green, green * float(rng.uniform(0.25, 0.5)))
    return {"height": float(rng.uniform(4, 10)), "wide": float(rng.uniform(0.3, 0.5)), "blobs": blobs, "albedo": colour,
            "offset": int(rng.integers(256))}  # fmt: skip


def car_numbers(rng: np.random.Generator, *, moving: bool, front: bool | None = None) -> dict[str, Any]:
    """Paint, size and heat of a car."""
    paint = rng.choice([0.04, 0.1, 0.25, 0.5, 0.75])
    return {
        "albedo": tint(rng, float(paint), float(rng.choice([0.05, 0.7], p=[0.7, 0.3]))), "moving": moving,
        "front": bool(rng.random() < 0.4) if front is None else front, "wide": float(rng.uniform(0.82, 0.95)),
        "high": float(rng.uniform(1.4, 1.85)), "length": float(rng.uniform(3.8, 4.8)),
        "warm": float(rng.uniform(6, 16)) if moving else float(rng.choice([0.0, rng.uniform(2, 9)])),
    }  # fmt: skip


def person_numbers(rng: np.random.Generator) -> dict[str, Any]:
    """Height, clothes and gait of a person."""
    skin = float(rng.uniform(0.15, 0.5))
    return {
        "height": float(rng.uniform(1.5, 1.9)), "shirt": tint(rng, rng.uniform(0.05, 0.6), 0.5),
        "trousers": tint(rng, rng.uniform(0.03, 0.25), 0.3), "skin": (skin, skin * 0.72, skin * 0.58),
        "phase": float(rng.uniform(0, 6.28)), "cloth": float(rng.uniform(0.25, 0.5)),
    }  # fmt: skip


def seen(thing: Thing, world: World, time: float) -> tuple[float, float]:
    """Where a thing stands `time` seconds into the sequence, in metres right of and ahead of the camera.

    Ahead wraps round from LENGTH - 25 to -25, behind the camera; the road's bend displaces what is far.
    """
    z = (thing.z + (thing.vz - world.speed) * time + 25.0) % LENGTH - 25.0
    return thing.x + thing.vx * time - world.lane + world.curve * max(z, 0.0) ** 2, z
