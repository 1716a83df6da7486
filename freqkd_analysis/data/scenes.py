"""Synthetic visible-infrared pairs: one painted scene seen by two sensors, a function of seed, group and frame.

The visible camera sees albedo, texture and light; the infrared one sees temperature and emissivity, blurred by
conduction and optics, with detector noise, fixed pattern and automatic gain. A misregistration is made on request.
Nothing here needs torch or a file: `records` plans a set, `render` makes one pair of it.

Example:
    >>> plan = records("pairs=4,groups=2,size=64x48")
    >>> plan[0].id, plan[-1].group
    ('g000_00000', 'g001')
    >>> render(plan[0]).rgb.shape
    (48, 64, 3)
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from freqkd_analysis.data import sensors
from freqkd_analysis.data.painter import CLASSES, SCALE, Camera, Canvas, Material
from freqkd_analysis.data.records import PairedSample, PairRecord
from freqkd_analysis.data.things import PAINT
from freqkd_analysis.data.world import Thing, World, build, seen
from freqkd_analysis.errors import DataError, nearest

__all__ = ["CLASSES", "DEFAULTS", "parse_options", "records", "render", "scene"]

DEFAULTS: dict[str, str] = {
    "pairs": "500", "groups": "50", "size": "320x256", "shift": "0:0", "night": "0.4", "seed": "0",
}  # fmt: skip
"""Every option of a synthetic set: number of pairs, of sequences, width x height in pixels, displacement of the
infrared content as right:down in pixels, share of night sequences, seed."""

Found = tuple[str, int, int, int, tuple[float, float, float, float]]
"""A car, person or cyclist: label, first material and one past the last, pixels painted, box u0, v0, u1, v1."""

STEP = 0.4
"""Seconds between two frames of a sequence."""


def parse_options(options: str = "") -> dict[str, Any]:
    """The options of a synthetic set as numbers, defaults filled in.

    Raises: DataError naming the option, what was expected and the nearest known one.

    Example:
        >>> parse_options("pairs=20,shift=2:0.5")["shift"], parse_options("pairs=20")["groups"]
        ((2.0, 0.5), 10)
    """
    given: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in options.split(","))):
        key, equals, value = part.partition("=")
        if key not in DEFAULTS or not equals:
            raise DataError(
                f'Unknown synthetic option "{part}".{nearest(key, DEFAULTS)} Expected NAME=VALUE with a name out of: '
                f"{', '.join(DEFAULTS)}."
            )
        given[key] = value
    text = {**DEFAULTS, **given}
    try:
        width, height = (int(n) for n in text["size"].split("x"))
        right, down = (float(n) for n in text["shift"].split(":"))
        out: dict[str, Any] = {k: int(text[k]) for k in ("pairs", "groups", "seed")}
        out |= {"size": (width, height), "shift": (right, down), "night": float(text["night"])}
    except ValueError:
        raise DataError(
            f'Cannot read the synthetic options "{options}". Expected for example: '
            + ",".join(f"{k}={v}" for k, v in DEFAULTS.items())
        ) from None
    if "groups" not in given:
        out["groups"] = min(out["groups"], max(1, out["pairs"] // 2))
    limits = {
        "pairs": out["pairs"] >= 1, "groups": 1 <= out["groups"] <= out["pairs"], "seed": out["seed"] >= 0,
        "size": min(width, height) >= 32 and max(width, height) <= 4096, "night": 0 <= out["night"] <= 1,
        "shift": max(abs(right), abs(down)) <= 64,
    }  # fmt: skip
    wrong = [k for k, fine in limits.items() if not fine]
    if wrong:
        raise DataError(
            f"Synthetic option {wrong[0]}={text[wrong[0]]} is out of range. Expected pairs >= groups >= 1, sides 32 to "
            "4096 px, shift within 64 px, night 0 to 1, seed >= 0."
        )
    return out


def records(options: str = "") -> list[PairRecord]:
    """Plan a set of synthetic pairs, sequence by sequence; nothing is rendered.

    options: for example "pairs=500,groups=50,size=320x256,shift=2:0,night=0.4,seed=0" (these are the defaults, but
    for the shift); groups differ in length by at most one frame, and round(night * groups) of them are at night.
    Raises: DataError for an unknown or unreadable option.
    """
    o = parse_options(options)
    order = np.random.default_rng([o["seed"], 77]).permutation(o["groups"])
    dark = set(order[: round(o["night"] * o["groups"])].tolist())
    out = []
    for group in range(o["groups"]):
        night = group in dark
        for frame in range(o["pairs"] // o["groups"] + (group < o["pairs"] % o["groups"])):
            name = f"g{group:03d}_{frame:05d}"
            meta = {"source": "synthetic", "seed": o["seed"], "group": group, "frame": frame, "size": o["size"],
                    "shift": o["shift"], "night": night}  # fmt: skip
            rgb, ir = Path(f"synthetic/{name}.visible"), Path(f"synthetic/{name}.infrared")
            out.append(PairRecord(name, f"g{group:03d}", rgb, ir, "night" if night else "day", meta))
    return out


def render(record: PairRecord) -> PairedSample:
    """Render a pair that `records` planned; the same record always gives the same bytes."""
    m = record.meta
    if m.get("source") != "synthetic":
        raise DataError(f"Pair {record.id} is not a synthetic one: no scene to render. Decode its files instead.")
    return scene(m["seed"], m["group"], m["frame"], size=m["size"], shift=m["shift"], night=m["night"])


def scene(
    seed: int,
    group: int,
    frame: int,
    *,
    size: tuple[int, int] = (320, 256),
    shift: tuple[float, float] = (0.0, 0.0),
    night: bool = False,
) -> PairedSample:
    """Render one frame of one sequence.

    size: (width, height) in pixels. shift: (right, down) in pixels by which the infrared content is displaced: what
    is at (x, y) in the visible image is at (x + right, y + down) in the infrared one.
    Returns: a PairedSample, both images on 256 levels in [0, 1]. meta holds `boxes` (N, 4) float32 x, y, w, h in
    visible pixels, `boxes_ir` (the same, displaced), `visible_boxes` (what is not covered), `labels` (car, person,
    cyclist), `occlusion` (0 none, 1 partial, 2 heavy), `mask` (H, W) uint8 of CLASSES in the visible frame, `shift`,
    `time`.

    Example:
        >>> s = scene(0, 0, 0, size=(64, 48), shift=(2.0, 0.0), night=True)
        >>> s.ir.shape, s.meta["mask"].dtype.name, s.meta["shift"]
        ((48, 64), 'uint8', (2.0, 0.0))
    """
    width, height = size
    world = world_of(seed, group, night)
    margin = 4 * int(np.ceil((max(abs(shift[0]), abs(shift[1])) + 2) / 4)) if any(shift) else 0
    rng = np.random.default_rng([seed, group, frame, 1])
    time = STEP * frame
    tilt = float(np.sin(0.9 * time + group)) * 0.004 * height
    camera = Camera(
        focal=0.85 * width * SCALE,
        cx=width / 2 * SCALE,
        horizon=(world.horizon * height + tilt) * SCALE,
        height=1.5,
    )
    canvas = Canvas(
        camera, np.zeros(((height + 2 * margin) * SCALE, (width + 2 * margin) * SCALE), np.int16), margin * SCALE
    )
    paint_ground(canvas, world, time)
    found = paint_things(canvas, world, time)
    view = sensors.look(canvas, world, time)
    inner = slice(margin, margin + height), slice(margin, margin + width)
    rgb = sensors.visible(view, world, inner)
    ir = sensors.infrared(view, world, shift, inner, seed, rng)
    return PairedSample(
        sensors.noisy_rgb(rgb, world.weather.night, rng), ir, f"g{group:03d}_{frame:05d}", f"g{group:03d}",
        {
            "source": "synthetic", "time": "night" if night else "day", "shift": (float(shift[0]), float(shift[1])),
            "mask": view.kind[inner].astype(np.uint8), "visible_is_grey": False,
            "ir_conversion": "synthetic gain control",
            **annotate(canvas, found, size, shift),
        },
    )  # fmt: skip


@lru_cache(maxsize=64)
def world_of(seed: int, group: int, night: bool) -> World:
    """The scene that all frames of a sequence share."""
    return build(np.random.default_rng([seed, group]), night)


def paint_ground(canvas: Canvas, world: World, time: float) -> None:
    """Sky, skyline, verge, pavement, kerb, road and its markings: materials 0 to 7."""
    w, cam, ids = world.weather, canvas.camera, canvas.ids
    canvas.depth, canvas.kind = 400.0, 2
    canvas.add(Material((1.0, 1.0, 1.0), w.sky, 1.0, texture=3, gain=0.0, gain_ir=0.0))
    canvas.kind = 4
    canvas.add(Material((0.07, 0.1, 0.05), w.air, texture=1, gain=0.5, gain_ir=0.6))
    sun = 0.45 + 0.75 * w.sun * float(np.sin(w.elevation))
    verge = (0.25, 0.24, 0.22) if world.paved else (0.09, 0.15, 0.05)
    looks = [  # albedo, warmth in the sun, class
        (verge, 0.5 if world.paved else 0.25, 0), ((0.34, 0.33, 0.31), 0.6, 0), ((0.45, 0.44, 0.42), 0.5, 0),
        ((0.13, 0.13, 0.135), 0.9, 1), ((0.62, 0.62, 0.58), 0.75, 1),
    ]  # fmt: skip
    for albedo, facing, kind in looks:
        canvas.kind = kind
        light = (albedo[0] * sun, albedo[1] * sun, albedo[2] * sun)
        canvas.add(Material(light, w.heat(albedo[1], facing) + 1.0, 0.95, gain=0.2, gain_ir=0.55))
    rows, columns = (np.arange(n) - canvas.pad for n in ids.shape)
    width, height = ids.shape[1] - 2 * canvas.pad, ids.shape[0] - 2 * canvas.pad
    top = int(np.clip(round(cam.horizon) + canvas.pad, 0, ids.shape[0]))
    ridge = (world.skyline[(columns * 512 // width) % 512] * 0.09 + 0.012) * height
    band = slice(max(0, top - int(0.11 * height)), top)
    ids[band][rows[band, None] >= round(cam.horizon) - ridge] = 1
    x, z = ground_plane(cam, rows[top:], columns, world)
    side, along = np.abs(x), z + world.speed * time
    low = ids[top:]
    low[:] = 2
    low[side < world.road + world.walk] = 3
    low[side < world.road + 0.18] = 4
    low[side < world.road] = 5
    thick = 0.06 + z / (2.2 * cam.focal)  # never thinner than a painted pixel
    dashed = (along % 9.0) < 4.0
    low[(side < thick) & dashed] = 6
    low[np.abs(side - (world.road - 2.1)) < thick] = 6
    crossing = (np.abs((along + 31.0) % 73.0 - 1.5) < 1.5) & (side < world.road - 0.4) & (x % 1.0 < 0.5)
    low[crossing] = 6


def ground_plane(cam: Camera, rows: np.ndarray, columns: np.ndarray, world: World) -> tuple[np.ndarray, np.ndarray]:
    """Metres across the road (h, w) and ahead (h, 1) of ground pixels, painted resolution."""
    z = (cam.focal * cam.height / np.maximum(rows + 0.5 - cam.horizon, 0.25)).astype(np.float32)[:, None]
    x = (columns.astype(np.float32) + np.float32(0.5 - cam.cx)) * (z / np.float32(cam.focal))
    return x + (np.float32(world.lane) - np.float32(world.curve) * z * z), z


def paint_things(canvas: Canvas, world: World, time: float) -> list[Found]:
    """Paint everything from far to near; returns, per car, person or cyclist, (label, first material, one past the
    last, pixels painted, box u0, v0, u1, v1 in painted pixels)."""
    placed = []
    for thing in world.things:
        x, z = seen(thing, world, time)
        length = thing.own.get("length", 0.0) if thing.what == "building" else 0.0
        if (3.0 if not length else 2.5 - length) < z < 150.0 and abs(x) < 0.75 * max(z + length, 4.0) + 9.0:
            placed.append((z + length, x, z, thing))
    placed.sort(key=lambda p: -p[0])
    found = []
    for _, x, z, thing in placed:
        paint, canvas.kind = PAINT[thing.what]
        canvas.depth, first = max(z, 2.0), len(canvas.materials)
        paint(canvas, thing, x, z, world.weather, time)
        if canvas.kind >= 5 and thing.what != "lamp":
            box = extent(canvas.camera, thing, x, z)
            view = canvas.window(*box)
            painted = 0 if view is None else int(np.count_nonzero(view[0] >= first))
            if painted:
                found.append((thing.what, first, len(canvas.materials), painted, box))
    return found


def extent(cam: Camera, thing: Thing, x: float, z: float) -> tuple[float, float, float, float]:
    """The box (u0, v0, u1, v1) that a car, person or cyclist fills, in painted pixels."""
    u, v = cam.project(x, 0, z)
    px = cam.focal / z
    if thing.what == "car":
        far = z + thing.own["length"]
        half = thing.own["wide"]
        ends = [u - half * px, u + half * px]
        ends.append(cam.project(x + (half if x < 0 else -half), 0, far)[0])
        return min(ends), v - thing.own["high"] * px, max(ends), v
    tall = thing.own["height"] * 1.0 + (0.32 if thing.what == "cyclist" else 0.0)
    return u - 0.34 * px, v - tall * px, u + 0.34 * px, v


def annotate(canvas: Canvas, found: list[Found], size: tuple[int, int], shift: tuple[float, float]) -> dict[str, Any]:
    """Boxes in image pixels with their visible part; what is covered by more than nine tenths is left out."""
    labels, boxes, seen, occlusion = [], [], [], []
    limit = np.array([size[0], size[1], size[0], size[1]], np.float64)
    for label, first, last, painted, box in found:
        view = canvas.window(*box)
        assert view is not None
        mask = (view[0] >= first) & (view[0] < last)
        share = np.count_nonzero(mask) / painted
        full = np.clip(np.array(box) / SCALE, 0, limit)
        if share < 0.1 or full[3] - full[1] < 5 or full[2] - full[0] < 2:
            continue
        rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        u0, v0 = view[1][0] - 0.5, view[2][0, 0] - 0.5
        part = np.array([u0 + cols[0], v0 + rows[0], u0 + cols[-1] + 1, v0 + rows[-1] + 1]) / SCALE
        part = np.clip(part, full[[0, 1, 0, 1]], full[[2, 3, 2, 3]])
        labels.append(label)
        boxes.append(full)
        seen.append(part)
        occlusion.append(0 if share > 0.9 else 1 if share > 0.5 else 2)
    corners = [np.array(b, np.float32).reshape(-1, 4) for b in (boxes, seen)]
    xywh = [np.concatenate([b[:, :2], b[:, 2:] - b[:, :2]], 1) for b in corners]
    moved = xywh[0] + np.array([shift[0], shift[1], 0, 0], np.float32)
    return {"boxes": xywh[0], "visible_boxes": xywh[1], "boxes_ir": moved, "labels": tuple(labels),
            "occlusion": np.array(occlusion, np.int64)}  # fmt: skip
