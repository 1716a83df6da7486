"""Two sensors look at one painted map: a visible camera (light) and a thermal one (heat).

Arrays are (H, W) or (H, W, 3) float32 at image resolution, margin for misregistration included.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from freqkd_analysis.data.painter import SCALE, Canvas
from freqkd_analysis.data.textures import SIDE, tiles
from freqkd_analysis.data.world import World, seen


@dataclass(frozen=True)
class View:
    """What both sensors share: materials averaged per pixel, and the point of space behind each pixel."""

    albedo: np.ndarray
    radiance: np.ndarray
    glow: np.ndarray | None
    texture: np.ndarray
    gain: np.ndarray
    gain_ir: np.ndarray
    kind: np.ndarray
    ground: np.ndarray
    sky: np.ndarray
    x: np.ndarray
    z: np.ndarray
    flat: np.ndarray
    """Distance of the bare ground in each row, (H, 1): nearer things stand before it."""
    rise: np.ndarray
    """Height of each row above the horizon as a share of the image's height, (H, 1), 0 below it."""
    horizon: float
    pad: int
    time: float
    shade: np.ndarray
    """Share of the sun that each ground pixel lacks, (H, W)."""


def colour(red: float, green: float, blue: float) -> np.ndarray:
    """A colour as float32, so that it keeps the images it meets in float32."""
    return np.array((red, green, blue), np.float32)


def pooled(table: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Look up a table (n, c) per painted pixel and average over each image pixel: (H, W, c)."""
    full = np.take(table, ids, axis=0)
    out = full[::2, ::2] + full[1::2, ::2]
    out += full[::2, 1::2]
    out += full[1::2, 1::2]
    return out * np.float32(0.25)


def look(canvas: Canvas, world: World, time: float) -> View:
    """Turn the painted map into per-pixel properties."""
    w, cam = world.weather, canvas.camera
    mats = canvas.materials
    front = np.array([(*m.albedo, m.emissivity * m.celsius + (1 - m.emissivity) * w.sky) for m in mats], np.float32)
    place = np.array(canvas.places, np.float32)
    per = np.array([(m.gain, m.gain_ir, m.texture) for m in mats], np.float32)
    main = pooled(front, canvas.ids)
    glow = pooled(np.array([m.glow for m in mats], np.float32), canvas.ids) if w.night else None
    ids = canvas.ids[SCALE - 1 :: SCALE, ::SCALE]
    pad = canvas.pad // SCALE
    rows = np.arange(-pad, ids.shape[0] - pad, dtype=np.float32)[:, None] + np.float32(0.5)
    cols = np.arange(-pad, ids.shape[1] - pad, dtype=np.float32) + np.float32(0.5)
    focal, horizon = np.float32(cam.focal / SCALE), np.float32(cam.horizon / SCALE)
    ground = (ids >= 2) & (ids < 7)
    flat = np.where(rows > horizon, focal * np.float32(cam.height) / np.maximum(rows - horizon, 0.15), np.float32(400))
    z = np.where(ground, flat, place[:, 0][ids])
    x = (cols - np.float32(cam.cx / SCALE)) * (z / focal)
    # An object carries its texture along: coordinates count from its own foot and scale with its distance.
    scale = np.clip(place[:, 0] / np.float32(14.0), 0.35, 1.6).astype(np.float32)
    anchors = place[:, 3:5] / SCALE
    tv = ((rows - anchors[:, 1][ids]) * scale[ids]).astype(np.int32)
    tu = ((cols - anchors[:, 0][ids]) * scale[ids]).astype(np.int32)
    stack = tiles()
    texture = stack[per[:, 2].astype(np.int8)[ids], tv & (SIDE - 1), tu & (SIDE - 1)]
    low = int(np.clip(np.ceil(horizon) + pad, 0, ids.shape[0] - 1))
    rise = np.clip((horizon - rows) / np.float32(ids.shape[0] - 2 * pad), 0, 1)
    rough = ground_texture(x[low:], flat[low:] + np.float32(world.speed * time), flat[low:])
    np.copyto(texture[low:], rough, where=ground[low:])
    view = View(
        main[..., :3], main[..., 3], glow, texture, per[:, 0][ids], per[:, 1][ids], place[:, 1].astype(np.uint8)[ids],
        ground, ids == 0, x, z, flat, rise, float(horizon), pad, time,
        np.zeros(ids.shape, np.float32),
    )  # fmt: skip
    return replace(view, shade=shadows(view, world)) if w.sun > 0.3 else view


def ground_texture(x: np.ndarray, along: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Rough ground in perspective: three scales of one tile, each fading where a pixel no longer resolves it.

    x: (h, w) metres across; along: (h, 1) metres along the road; z: (h, 1) distance. Returns (h, w), variance <= 1.
    """
    tile = tiles()[0]
    out = np.zeros(x.shape, np.float32)
    for per_metre, reach, weight in ((48.0, 7.0, 0.6), (7.0, 30.0, 0.6), (0.9, 150.0, 0.7)):
        v = (along * np.float32(per_metre)).astype(np.int32) & (SIDE - 1)
        u = (x * np.float32(per_metre)).astype(np.int32) & (SIDE - 1)
        out += tile[v, u] * (np.float32(weight) / (1 + (z / np.float32(reach)) ** 2))
    return out


def visible(view: View, world: World, inner: tuple[slice, slice]) -> np.ndarray:
    """Linear light at the camera, exposed for the inner frame and cut to it: (H, W, 3), mostly in [0, 1]."""
    from scipy import ndimage

    w = world.weather
    shape = view.texture.shape
    surface = view.albedo * (1 + view.gain * np.clip(view.texture, -2.2, 2.2) * np.float32(0.9))[..., None]
    if w.night:
        light = night_light(view, world)
        assert view.glow is not None
        out = surface * light
        out[view.sky] = colour(0.006, 0.006, 0.009)
        out, glow = out[inner], view.glow[inner]
        halo = ndimage.gaussian_filter(glow[::4, ::4].max(2), 2.5).repeat(4, 0).repeat(4, 1)
        halo = ndimage.uniform_filter(halo, 5)[: out.shape[0], : out.shape[1]]
        out += glow + halo[..., None] * colour(0.5, 0.42, 0.3)
        return out * np.float32(min(0.9 / max(float(np.percentile(out[::3, ::3], 97.5)), 0.06), 4.0))
    tone = colour(1.06, 1.0, 0.9) * np.float32(w.sun) + colour(0.95, 1.0, 1.08) * np.float32(1 - w.sun)
    out = surface * tone
    out *= (1 - np.float32(0.55 * w.sun) * view.shade)[..., None]
    air = colour(0.62, 0.7, 0.8) if w.sun > 0.5 else colour(0.66, 0.68, 0.7)
    haze = -np.expm1(-view.z / np.float32(260.0 if w.sun > 0.5 else 170.0))
    out += haze[..., None] * (air - out)
    zenith = colour(0.28, 0.45, 0.75) if w.sun > 0.5 else colour(0.6, 0.63, 0.68)
    cover = np.clip(0.5 + 0.45 * clouds(shape, view), 0, 1)[..., None] * np.float32(0.75)
    sky = air + np.minimum(1.8 * view.rise, 1)[..., None] * (zenith - air)
    sky = sky + cover * (np.float32(0.92) - sky)
    np.copyto(out, sky.astype(np.float32), where=view.sky[..., None])
    out = out[inner]
    return out * np.float32(0.36 / max(float(out[::4, ::4].mean()), 0.1))


def clouds(shape: tuple[int, ...], view: View) -> np.ndarray:
    """The cloud tile over the sky, drifting slowly: (H, W)."""
    rows = ((np.arange(shape[0]) - view.pad) * 1.4 + 200 - view.horizon).astype(np.int32) & (SIDE - 1)
    cols = ((np.arange(shape[1]) - view.pad) * 0.6 + 2 * view.time + 256).astype(np.int32) & (SIDE - 1)
    return tiles()[3][rows[:, None], cols]


def shadows(view: View, world: World) -> np.ndarray:
    """Share of the sun kept from each ground pixel by the things that stand on it, 0 to 1, soft: (H, W)."""
    from scipy import ndimage

    w = world.weather
    shade: np.ndarray = np.zeros(view.texture.shape, np.float32)
    low = int(np.clip(view.horizon + view.pad + 2, 0, len(shade) - 1))
    x, z = view.x[low:], view.flat[low:]
    reach = float(1 / np.tan(w.elevation))
    dx, dz = -float(np.sin(w.azimuth)) * reach, -float(np.cos(w.azimuth)) * reach
    for thing in world.things:
        if thing.what in ("building", "lamp"):
            continue
        tx, tz = seen(thing, world, view.time)
        if not 0 < tz < 60:
            continue
        tall = {"tree": 0.75, "car": 0.6}.get(thing.what, 0.5) * thing.own.get("height", 1.5)
        half = {"tree": 0.45 * tall, "car": 1.4}.get(thing.what, 0.35)
        away = {"tree": 1.0, "car": 0.3}.get(thing.what, 0.5)
        cx, cz = tx + away * dx * tall, tz + away * dz * tall + (2.0 if thing.what == "car" else 0.0)
        long = half + (0.0 if thing.what == "tree" else 0.5 * tall * reach)
        rows = np.flatnonzero(np.abs(z[:, 0] - cz) < long)
        if len(rows):
            cut = slice(rows[0], rows[-1] + 1)
            d2 = ((x[cut] - np.float32(cx)) / np.float32(half + 0.3 * abs(dx))) ** 2
            d2 += ((z[cut] - np.float32(cz)) / np.float32(long)) ** 2
            part = shade[low:][cut]
            np.maximum(part, d2 < 1, out=part)
    shade *= view.ground
    return ndimage.uniform_filter(shade, 3)


def night_light(view: View, world: World) -> np.ndarray:
    """Street lamps' pools and the own headlights on every surface: (H, W, 3)."""
    x, z = view.x, view.z
    own = np.float32(1.3) / (1 + (z / np.float32(11)) ** 2) * np.exp(-((x / (np.float32(0.33) * z + 1)) ** 2))
    pool = np.full(x.shape, np.float32(0.035))
    for t in world.things:
        tx, tz = seen(t, world, view.time)
        if t.what == "lamp" and tz < 95:
            tx += t.own["arm"]
            d2 = (x - np.float32(tx)) ** 2 + (z - np.float32(tz)) ** 2
            pool += np.float32(28) / (d2 + 36)
    return own[..., None] * colour(0.9, 0.95, 1.0) + pool[..., None] * colour(1.0, 0.78, 0.48)


def noisy_rgb(rgb: np.ndarray, night: bool, rng: np.random.Generator) -> np.ndarray:
    """Square-root gamma, noise of even strength (photon noise under that gamma) and 256 levels, float32 in [0, 1]."""
    out = np.sqrt(np.clip(rgb, 0, 1.15))
    out += rng.standard_normal(out.shape, np.float32) * np.float32(0.028 if night else 0.008)
    return np.round(np.clip(out, 0, 1) * 255).astype(np.float32) / np.float32(255)


def infrared(
    view: View,
    world: World,
    shift: tuple[float, float],
    inner: tuple[slice, slice],
    seed: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """The thermal image on 256 levels in [0, 1]: heat, conduction, optics, displacement, detector, gain control."""
    from scipy import ndimage

    w = world.weather
    heat = view.radiance + view.gain_ir * np.clip(view.texture, -2.5, 2.5)
    if w.sun > 0.3:
        heat -= np.float32(2.5 * w.sun) * ndimage.uniform_filter(view.shade, 5)
    cold = w.sky + (w.air - w.sky) * (0.55 * np.exp(-6 * view.rise)) + 2.2 * clouds(heat.shape, view)
    np.copyto(heat, cold.astype(np.float32), where=view.sky)
    heat = ndimage.gaussian_filter(heat, 0.9 * max(1.0, (heat.shape[0] - 2 * view.pad) / 256), truncate=3)
    heat = displaced(heat, shift, inner) if any(shift) else heat[inner]
    heat = heat + rng.standard_normal(heat.shape, np.float32) * np.float32(0.1) + fixed_pattern(seed, *heat.shape)
    return gain_control(heat)


def gain_control(heat: np.ndarray) -> np.ndarray:
    """Degrees to 256 levels in [0, 1], as thermal cameras do it: half a straight stretch, half equal populations.

    The cold sky would otherwise take most of the levels and leave the street flat.
    """
    low, high = (float(p) for p in np.percentile(heat[::3, ::3], (0.7, 99.8)))
    high = max(high, low + 7.0)
    count, edges = np.histogram(heat[::2, ::2], bins=96, range=(low, high))
    count = np.minimum(count, count.sum() // 24) + 1  # the plateau: no bin may claim more than its share
    equal = np.concatenate([[0.0], np.cumsum(count) / count.sum()])
    curve = 0.5 * equal + 0.5 * np.linspace(0.0, 1.0, len(edges))
    return np.round(np.interp(heat, edges, curve) * 255).astype(np.float32) / np.float32(255)


def displaced(heat: np.ndarray, shift: tuple[float, float], inner: tuple[slice, slice]) -> np.ndarray:
    """Cut the inner frame out of a larger one, its content moved right and down by a fraction of a pixel's precision.

    Four-point cubic (Keys) weights per axis; no wrap and no fill, because the margin holds what moves in.
    """
    out = heat
    for axis, move in ((1, shift[0]), (0, shift[1])):
        whole = int(np.floor(-move))
        t = -move - whole
        weights = (
            ((-0.5 * t + 1.0) * t - 0.5) * t, (1.5 * t - 2.5) * t * t + 1.0,
            ((-1.5 * t + 2.0) * t + 0.5) * t, (0.5 * t - 0.5) * t * t,
        )  # fmt: skip
        a, b = inner[axis].start, inner[axis].stop
        parts = []
        for k, weight in enumerate(weights):
            if weight:
                cut = [slice(None), slice(None)]
                cut[axis] = slice(a + whole + k - 1, b + whole + k - 1)
                parts.append(out[tuple(cut)] * np.float32(weight))
        out = sum(parts[1:], parts[0])
    return out


@lru_cache(maxsize=4)
def fixed_pattern(seed: int, height: int, width: int) -> np.ndarray:
    """The detector's own pattern, the same in every frame of a seed: column stripes and pixel offsets, degrees."""
    rng = np.random.default_rng([seed, 99, height, width])
    pattern = 0.05 * rng.standard_normal((1, width)) + 0.04 * rng.standard_normal((height, width))
    return pattern.astype(np.float32)
