"""How each thing is painted: every function takes a canvas, the thing, its place (x, z) as seen, weather and time.

Temperatures follow the weather: sunlit and dark surfaces warm, glass and paint mirror the cold sky, engines, tyres
and skin stand out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from freqkd_analysis.data.painter import Canvas, Material, facade
from freqkd_analysis.data.textures import tiles
from freqkd_analysis.data.world import Thing, Weather


def paint_building(c: Canvas, t: Thing, x: float, z: float, w: Weather, time: float) -> None:
    """A wall along the street and the gable that faces the camera."""
    own, side = t.own, np.sign(x)
    near, far = max(z, 2.0), z + own["length"]
    albedo = own["albedo"]
    mean = sum(albedo) / 3
    anchor = c.camera.project(x, 0, near)
    glass = Material((0.05, 0.06, 0.08), w.air + 3, 0.72, texture=0, gain=0.5, gain_ir=0.6)
    lit = replace(glass, glow=(1.1, 0.8, 0.45), celsius=w.air + 4.5)
    pane = c.add(glass, anchor)
    panes = (pane, c.add(lit, anchor) if w.night else pane)
    for nx, nz, ends in ((-side, 0.0, (x, near, x, far)), (0.0, -1.0, (x, near, x + side * own["depth"], near))):
        shade = w.shade(nx, nz)
        facing = max(0.0, (shade - 0.55) / 0.65)
        wall = Material(scaled(albedo, shade), w.heat(mean, facing), 0.93, texture=2, gain=0.22, gain_ir=0.35)
        if nx or z > 2.5:
            facade(c, ends, own["height"], c.add(wall, anchor), panes, own["seed"])


def scaled(colour: tuple[float, float, float], by: float) -> tuple[float, float, float]:
    """A colour times a number."""
    return colour[0] * by, colour[1] * by, colour[2] * by


def trapezoid(c: Canvas, top: tuple[float, float, float], bottom: tuple[float, float, float], number: int) -> None:
    """Fill a four-sided shape with level ends, each given as (centre u, v, half width)."""
    (u0, v0, h0), (u1, v1, h1) = top, bottom
    c.poly([(u0 - h0, v0), (u0 + h0, v0), (u1 + h1, v1), (u1 - h1, v1)], number)


def paint_tree(c: Canvas, t: Thing, x: float, z: float, w: Weather, time: float) -> None:
    """A trunk and a crown of three ragged blobs."""
    own, h = t.own, t.own["height"]
    u, v = c.camera.project(x, 0, z)
    px = c.camera.focal / z
    bark = Material((0.07, 0.055, 0.04), w.heat(0.3, 0.3), gain=0.3, gain_ir=0.5)
    c.rect(u - 0.13 * px, v - 0.6 * h * px, u + 0.13 * px, v, c.add(bark, (u, v)))
    green = scaled(own["albedo"], w.shade(0, -1))
    leaf = Material(green, w.air + 0.5 + 2.5 * w.sun, 0.97, texture=1, gain=0.75, gain_ir=1.6)
    light = replace(leaf, albedo=scaled(leaf.albedo, 1.5), celsius=leaf.celsius + 1.2 * w.sun)
    ids = (c.add(leaf, (u, v)), c.add(light, (u - 17, v)))
    r = own["wide"] * h * 0.75
    for k, (bx, by, size) in enumerate(own["blobs"]):
        ragged(c, u + bx * r * px, v - (0.66 + 0.25 * by) * h * px, size * r * px, own["offset"] + 31 * k, ids[k % 2])


def ragged(c: Canvas, u: float, v: float, radius: float, offset: int, number: int) -> None:
    """A disc whose rim is broken by the foliage tile."""
    view = c.window(u - 1.25 * radius, v - 1.25 * radius, u + 1.25 * radius, v + 1.25 * radius)
    if view is None:
        return
    ids, us, vs = view
    r2 = ((us - u) ** 2 + (vs - v) ** 2) / np.float32(radius * radius)
    tile = tiles()[1]
    step = np.float32(np.clip(80.0 / max(radius, 1.0), 0.4, 4.0))
    rows = ((vs[:, 0] - v) * step + offset).astype(np.intp) & (len(tile) - 1)
    cols = ((us - u) * step + offset).astype(np.intp) & (len(tile) - 1)
    ids[r2 < 0.85 + 0.28 * tile[rows[:, None], cols]] = number


def paint_lamp(c: Canvas, t: Thing, x: float, z: float, w: Weather, time: float) -> None:
    """A pole with an arm and a head; at night the head is hot and bright."""
    u, v = c.camera.project(x, 0, z)
    px, h = c.camera.focal / z, t.own["height"]
    pole = c.add(Material((0.16, 0.17, 0.18), w.heat(0.2, 0.5), 0.8, gain=0.05), (u, v))
    half = max(0.07 * px, 0.8)
    c.rect(u - half, v - h * px, u + half, v, pole)
    end = u + t.own["arm"] * px
    c.rect(min(u, end), v - h * px, max(u, end), v - h * px + 2 * half, pole)
    glow = (3.0, 2.4, 1.4) if w.night else (0.0, 0.0, 0.0)
    head = c.add(Material((0.3, 0.3, 0.3), w.air + (12.0 if w.night else 5.0), glow=glow), (u, v))
    c.ellipse(end, v - h * px + 2 * half, max(0.35 * px, 1.0), max(0.14 * px, 0.8), head)


def paint_car(c: Canvas, t: Thing, x: float, z: float, w: Weather, time: float) -> None:
    """A car as two boxes with glass, lights and tyres; the side that faces the road's middle is seen too."""
    own, cam = t.own, c.camera
    px, back = cam.focal / z, cam.focal / (z + own["length"])
    u, v = cam.project(x, 0, z)
    ub, vb = cam.project(x, 0, z + own["length"])
    half, high, s = own["wide"], own["high"], (1.0 if x < 0 else -1.0)
    warm = own["warm"]
    body = Material(scaled(own["albedo"], w.shade(0, -1)), w.heat(0.5, 0.5) + 0.25 * warm, 0.78, gain=0.12, gain_ir=0.7)
    flank = replace(body, albedo=scaled(own["albedo"], w.shade(s, 0)), celsius=w.heat(0.5, 0.4))
    glass = Material((0.03, 0.035, 0.04), w.air + 2 + 0.2 * warm, 0.8, gain=0.4, gain_ir=0.8)
    a_body, a_flank, a_glass = c.add(body, (u, v)), c.add(flank, (u, v)), c.add(glass, (u, v))
    tyre = c.add(Material((0.02, 0.02, 0.02), w.air + 2 + 1.1 * warm, gain=0.1), (u, v))
    dark = c.add(Material((0.012, 0.012, 0.014), w.air + 1 + 0.9 * warm, gain=0.1), (u, v))
    # flank: body, then cabin, seen between the near and the far end
    near, far = u + s * half * px, ub + s * half * back
    c.poly([(near, v - 0.25 * px), (near, v - 0.95 * px), (far, vb - 0.95 * back), (far, vb - 0.25 * back)], a_flank)
    roof = [(near - s * 0.1 * px, v - high * px), (far, vb - high * back)]
    c.poly([(near, v - 0.95 * px), *roof, (far, vb - 0.95 * back)], a_glass)
    if px > 12:
        for k in (0.2, 0.8):
            zz = z + k * own["length"]
            wu, wv = cam.project(x + s * half, 0.31, zz)
            slant = max(abs(near - far) * 0.075, 1.0)
            c.ellipse(wu, wv, slant, 0.31 * cam.focal / zz, tyre)
    # end: cabin with glass, body, bumper, tyres, lights
    top, mid = 0.74 * half * px, 0.92 * half * px
    trapezoid(c, (u, v - high * px, top), (u, v - 0.9 * px, mid), a_body)
    if px > 8:
        rim = 0.1 * px
        trapezoid(c, (u, v - high * px + rim, top - rim), (u, v - 0.95 * px, mid - rim), a_glass)
    c.rect(u - half * px, v - 0.95 * px, u + half * px, v - 0.28 * px, a_body)
    c.rect(u - 0.9 * half * px, v - 0.42 * px, u + 0.9 * half * px, v - 0.2 * px, dark)
    for k in (-1, 1):
        c.rect(u + k * 0.72 * half * px - 0.11 * px, v - 0.3 * px, u + k * 0.72 * half * px + 0.11 * px, v, tyre)
    paint_car_lights(c, own, (u, v, px, half), w)


def paint_car_lights(c: Canvas, own: dict[str, Any], at: tuple[float, float, float, float], w: Weather) -> None:
    """Head or tail lights, the plate and the warm grille."""
    u, v, px, half = at
    on = w.night and own["moving"]
    white, red = (2.5, 2.4, 2.1), (1.1, 0.06, 0.04)
    glow = (white if own["front"] else red) if on else (0.0, 0.0, 0.0)
    lamp = Material((0.6, 0.6, 0.58) if own["front"] else (0.32, 0.03, 0.03), w.air + 4 + 0.5 * own["warm"], glow=glow)
    number = c.add(lamp, (u, v))
    for k in (-1, 1):
        at_u = u + k * 0.75 * half * px
        c.rect(at_u - 0.16 * px, v - 0.8 * px, at_u + 0.16 * px, v - 0.64 * px, number)
    if px > 14:
        plate = c.add(Material((0.6, 0.6, 0.55), w.air + 2 + 0.3 * own["warm"], gain=0.3), (u, v))
        c.rect(u - 0.25 * px, v - 0.58 * px, u + 0.25 * px, v - 0.46 * px, plate)
        if own["front"]:
            grille = c.add(Material((0.03, 0.03, 0.03), w.air + 4 + 1.3 * own["warm"]), (u, v))
            c.rect(u - 0.4 * px, v - 0.78 * px, u + 0.4 * px, v - 0.62 * px, grille)


def paint_person(c: Canvas, t: Thing, x: float, z: float, w: Weather, time: float, lift: float = 0.0) -> None:
    """Head, trunk, arms and walking legs."""
    own = t.own
    u, v = c.camera.project(x, lift, z)
    px = own["height"] / 1.75 * c.camera.focal / z
    shade = w.shade(0, -1)
    cloth = w.air + own["cloth"] * (33 - w.air)
    shirt = c.add(Material(scaled(own["shirt"], shade), cloth + 1.5, 0.96, gain=0.25, gain_ir=0.8), (u, v))
    legs = c.add(Material(scaled(own["trousers"], shade), cloth - 1.0, 0.96, gain=0.25, gain_ir=0.6), (u, v))
    skin = c.add(Material(scaled(own["skin"], shade), w.air + 0.86 * (34 - w.air), 0.98, gain=0.05), (u, v))
    hair = c.add(Material((0.03, 0.025, 0.02), w.air + 0.6 * (33 - w.air), gain=0.2), (u, v))
    swing = 0.16 * np.sin(own["phase"] + 5.5 * time) * (1.0 if t.vx or abs(t.vz) > 0.3 else 0.2)
    for k in (-1, 1):
        foot = u + (k * 0.09 + k * swing) * px
        hip = u + k * 0.08 * px
        trapezoid(c, (hip, v - 0.86 * px, 0.085 * px), (foot, v, 0.06 * px), legs)
        hand = u + k * (0.27 - 0.5 * swing) * px
        trapezoid(c, (u + k * 0.22 * px, v - 1.4 * px, 0.05 * px), (hand, v - 0.8 * px, 0.05 * px), shirt)
    trapezoid(c, (u, v - 1.43 * px, 0.2 * px), (u, v - 0.8 * px, 0.165 * px), shirt)
    c.ellipse(u, v - 1.6 * px, max(0.1 * px, 0.7), max(0.145 * px, 0.9), skin)
    if px > 14:
        c.ellipse(u, v - 1.69 * px, 0.1 * px, 0.07 * px, hair)


def paint_cyclist(c: Canvas, t: Thing, x: float, z: float, w: Weather, time: float) -> None:
    """A rider on a bicycle, seen along the road: two wheels nearly in line, frame, handlebar."""
    u, v = c.camera.project(x, 0, z)
    px = c.camera.focal / z
    metal = c.add(Material((0.12, 0.12, 0.13), w.heat(0.3, 0.4), 0.85, gain=0.1), (u, v))
    tyre = c.add(Material((0.025, 0.025, 0.025), w.air + 3.5, gain=0.1), (u, v))
    c.ellipse(u + 0.12 * px, v - 0.38 * px, max(0.2 * px, 0.8), 0.34 * px, tyre, hole=0.7)
    paint_person(c, replace(t, vx=1.0), x, z, w, 1.6 * time, lift=0.32)
    c.ellipse(u, v - 0.34 * px, max(0.1 * px, 0.8), 0.34 * px, tyre, hole=0.45)
    c.rect(u - 0.04 * px, v - 1.0 * px, u + 0.04 * px, v - 0.5 * px, metal)
    c.rect(u - 0.3 * px, v - 1.04 * px, u + 0.3 * px, v - 0.98 * px, metal)


PAINT: dict[str, tuple[Callable[..., None], int]] = {
    "building": (paint_building, 3), "tree": (paint_tree, 4), "car": (paint_car, 5), "person": (paint_person, 6),
    "cyclist": (paint_cyclist, 7), "lamp": (paint_lamp, 8),
}  # fmt: skip
"""How each thing is painted and its class number."""
