"""Is a data set whole and registered? Counts, partners, corruption, sizes, bit depth, duplicates, shift a pair.

`problems` of a report are faults of the files; the command line exits with 1 for them. `warnings` are for a person
to weigh: counts other than the published ones, look-alikes, large or unmeasurable shifts.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from freqkd_analysis.data import layouts, listing
from freqkd_analysis.data.records import PairedSample, PairRecord
from freqkd_analysis.errors import DataError, first

CONFIDENT = 6.0
"""Peak height of the phase correlation, in robust standard deviations, below which a shift is not measured."""

MAX_SHIFT = 24
"""Search range of the shift in image px; a shift at its edge may be larger still."""

_EDGES = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0)
ALIKE = 0.98
THUMB = 16
_MOST_COMPARED = 5000
"""Near duplicates are sought among at most this many pairs: the search is quadratic."""


def verify(
    spec: str,
    records: Sequence[PairRecord] | None = None,
    registration: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Decode every pair of `spec` and report what is there and what is wrong, as a dict that json can hold.

    Args:
        records: check these alone (a sample); the pairs without partner are those of the whole `spec`.
        registration: measure the shift a pair (most of the time it takes).
        progress: told (pairs done, pairs in all) after each pair.
    Returns: counts, `missing`, `unreadable`, `size_mismatch`, `ir_bits`, `duplicates`, `registration` (px of the
        image; moving the infrared image by (dx, dy), right and down, brings it onto the visible one), `warnings`,
        and `problems`, empty when all is well.
    Raises: DataError when the layout, a folder or a list cannot be read, or nothing at all is there.
    """
    found, missing = layouts.scan(spec)
    if not found and not missing and not records:
        raise DataError(f"{spec}: expected at least one pair, got 0; check the path.")
    pairs = found if records is None else list(records)
    conversion = layouts.resolve_conversion(pairs)
    seen = [_Seen(record) for record in pairs]
    for done, one in enumerate(seen, start=1):
        one.look(conversion, registration)
        if progress:
            progress(done, len(seen))
    whole = [one for one in seen if not one.unreadable]
    published = {} if listing.rendered(spec) else layouts.LAYOUTS[spec.partition(":")[0]].published
    report = {
        "schema": 1,
        "spec": spec,
        "pairs": len(pairs),
        "groups": len({record.group for record in pairs}),
        **{light: sum(record.time == light for record in pairs) for light in ("day", "night")},
        "published": {str(n): what for n, what in published.items()},
        "missing": missing,
        "unreadable": [{"id": one.record.id, "reason": one.unreadable} for one in seen if one.unreadable],
        "size_mismatch": [{"id": one.record.id, **one.sizes} for one in whole if len(set(one.sizes.values())) > 1],
        "sizes": _counted(one.sizes["visible"] for one in whole),
        "ir_bits": _counted(str(one.bits) for one in whole),
        "ir_conversion": conversion,
        "visible_is_grey": sum(one.grey for one in whole),
        "ir_false_colour": sum(one.false_colour for one in whole),
        "same_image": [one.record.id for one in whole if one.same],
        "duplicates": _duplicates(whole),
        "registration": _registration([one for one in whole if one.shift]) if registration else None,
    }
    report["warnings"] = _warnings(report, whole if records is None else None)
    report["problems"] = _problems(report)
    return report


class _Seen:
    """What one look at a pair leaves behind: small numbers, never its pixels."""

    def __init__(self, record: PairRecord) -> None:
        self.record = record
        self.unreadable = ""
        self.same = self.grey = self.false_colour = False
        self.shift: tuple[float, float, float] | None = None

    def look(self, conversion: str, registration: bool) -> None:
        try:
            pair = layouts.read(self.record, conversion)
        except DataError as error:
            self.unreadable = str(error)
            return
        visible = pair.rgb.mean(axis=2)
        self.sizes = {"visible": _size(visible), "infrared": _size(pair.ir)}
        self.bits = pair.meta.get("ir_bits", 8)
        self.grey = bool(pair.meta.get("visible_is_grey", False))
        self.false_colour = bool(pair.meta.get("ir_false_colour", False))
        self.hashes = _hashes(self.record, pair)
        self.same = visible.shape == pair.ir.shape and self.grey and bool(np.abs(visible - pair.ir).max() < 1e-3)
        self.thumbs = thumb(visible), thumb(pair.ir)
        if registration and visible.shape == pair.ir.shape:
            from freqkd_analysis import spectral

            self.shift = spectral.phase_correlation(visible, pair.ir, max_shift=MAX_SHIFT)


def text(report: dict[str, Any]) -> str:
    """The report for a console: counts, then the histogram of shifts, then warnings and problems."""
    lines = [
        f"{report['spec']}: {report['pairs']} pairs in {report['groups']} groups"
        + (f" ({report['day']} day, {report['night']} night)" if report["day"] or report["night"] else ""),
        f"sizes: {_listed(report['sizes'])}; infrared bits: {_listed(report['ir_bits'])},"
        f" read as {report['ir_conversion']}; grey visible images: {report['visible_is_grey']}",
    ]
    if shifts := report["registration"]:
        lines.append(f"registration shift: {shifts['measured']} measured, {shifts['not_measured']} not measured")
        if shifts["measured"]:
            lines[-1] += (
                f"; median {shifts['median_px']:.2f}, 90 % {shifts['p90_px']:.2f}, largest {shifts['max_px']:.2f} px"
                f" (median dx {shifts['median_dx']:+.2f}, dy {shifts['median_dy']:+.2f})"
            )
            lines.append(histogram(shifts["histogram"]))
    lines += [f"warning: {line}" for line in report["warnings"]]
    lines += [f"problem: {line}" for line in report["problems"]] or ["no problems found"]
    return "\n".join(lines)


def histogram(bars: Sequence[dict[str, Any]], width: int = 40) -> str:
    """One line of text a bar: range in px, a bar that is `width` characters for the fullest, number of pairs.

    Example:
        >>> print(histogram([{"low": 0.0, "high": 0.5, "pairs": 4}, {"low": 0.5, "high": 1.0, "pairs": 1}], width=8))
        0   to 0.5 px  ########  4
        0.5 to 1   px  ##        1
    """
    most = max(bar["pairs"] for bar in bars)
    lines = []
    for bar in bars:
        length = -(-bar["pairs"] * width // most) if most else 0
        lines.append(f"{bar['low']:<3g} to {bar['high']:<3g} px  {'#' * length:<{width}}  {bar['pairs']}")
    return "\n".join(lines)


def _registration(seen: Sequence[_Seen]) -> dict[str, Any]:
    rows = [(one.record.id, *one.shift) for one in seen if one.shift]
    good = np.array([(dx, dy) for _, dx, dy, confidence in rows if confidence >= CONFIDENT]).reshape(-1, 2)
    lengths = np.hypot(good[:, 0], good[:, 1])
    report: dict[str, Any] = {"measured": len(good), "not_measured": len(rows) - len(good), "max_shift": MAX_SHIFT}
    if len(good):
        counts, _ = np.histogram(lengths, bins=(*_EDGES[:-1], np.inf))
        report |= {
            "median_px": float(np.median(lengths)),
            "p90_px": float(np.percentile(lengths, 90)),
            "max_px": float(lengths.max()),
            "median_dx": float(np.median(good[:, 0])),
            "median_dy": float(np.median(good[:, 1])),
            "histogram": [
                {"low": low, "high": high, "pairs": int(n)}
                for low, high, n in zip(_EDGES[:-1], _EDGES[1:], counts, strict=True)
            ],
        }
    report["pairs"] = [_shift_row(*row) for row in rows]
    return report


def _shift_row(name: str, dx: float, dy: float, confidence: float) -> dict[str, Any]:
    if confidence < CONFIDENT:
        return {"id": name, "px": None, "dx": None, "dy": None, "confidence": float(confidence), "note": "not measured"}
    return {
        "id": name,
        "px": float(np.hypot(dx, dy)),
        "dx": float(dx),
        "dy": float(dy),
        "confidence": float(confidence),
    }


def _duplicates(seen: Sequence[_Seen]) -> dict[str, Any]:
    """Pairs of the same bytes in both files, in one, and look-alikes (thumbnails of both modalities) across groups."""
    exact = _sharing((one.hashes, one.record.id) for one in seen)
    doubled = {name for names in exact for name in names[1:]}
    rest = [one for one in seen if one.record.id not in doubled]
    one_file = [
        {"modality": modality, "ids": names}
        for place, modality in enumerate(("visible", "infrared"))
        for names in _sharing((one.hashes[place], one.record.id) for one in rest)
    ]
    return {"exact": exact, "one_file": one_file, **_near(rest)}


def _sharing(keyed: Any) -> list[list[str]]:
    names: dict[Any, list[str]] = {}
    for key, name in keyed:
        names.setdefault(key, []).append(name)
    return [found for found in names.values() if len(found) > 1]


def _near(seen: Sequence[_Seen]) -> dict[str, Any]:
    if not 0 < len(seen) <= _MOST_COMPARED:
        return {"near_across_groups": [], "near_within_groups": None if seen else 0}
    groups = np.array([one.record.group for one in seen])
    alike = np.ones((len(seen), len(seen)), dtype=bool)
    for place in range(2):
        thumbs = np.array([one.thumbs[place] for one in seen], dtype=np.float32).reshape(len(seen), -1)
        alike &= thumbs @ thumbs.T > ALIKE
    left, right = np.nonzero(np.triu(alike, 1))
    across = groups[left] != groups[right]
    named = [[seen[i].record.id, seen[j].record.id] for i, j in zip(left[across], right[across], strict=True)]
    return {"near_across_groups": named, "near_within_groups": int((~across).sum())}


def _problems(report: dict[str, Any]) -> list[str]:
    copies = [" = ".join(names) for names in report["duplicates"]["exact"]]
    found = {
        "pairs lack a file": report["missing"],
        "pairs cannot be read": [one["id"] for one in report["unreadable"]],
        "pairs differ in size": [
            f"{one['id']} ({one['visible']} and {one['infrared']})" for one in report["size_mismatch"]
        ],
        "pairs hold one image as both modalities": report["same_image"],
        "sets of pairs are the same files": copies,
    }
    problems = [f"{len(names)} {what}: {first(names)}" for what, names in found.items() if names]
    if len(report["ir_bits"]) > 1:
        problems.append(f"infrared images of several bit depths: {_listed(report['ir_bits'])}")
    return problems


def _warnings(report: dict[str, Any], whole: Sequence[_Seen] | None) -> list[str]:
    warnings = []
    published = report["published"]
    if whole is not None and published and str(report["pairs"]) not in published:
        known = ", ".join(f"{n} ({what})" for n, what in published.items())
        warnings.append(f"{report['pairs']} pairs, none of the published counts: {known}")
    copies = report["duplicates"]
    shared = [f"{' = '.join(one['ids'])} ({one['modality']})" for one in copies["one_file"]]
    if shared:
        warnings.append(f"{len(shared)} files serve several pairs: {first(shared)}")
    if near := copies["near_across_groups"]:
        warnings.append(f"{len(near)} look-alikes in different groups: {first(' ~ '.join(pair) for pair in near)}")
    if copies["near_within_groups"] is None:
        warnings.append(f"look-alikes were not sought: more than {_MOST_COMPARED} pairs")
    if report["ir_false_colour"]:
        warnings.append(f"{report['ir_false_colour']} infrared images are in false colour; their brightness was taken")
    shifts = report["registration"]
    if shifts and shifts["not_measured"] > shifts["measured"]:
        warnings.append(f"the shift of {shifts['not_measured']} pairs could not be measured: are they the same scene?")
    far = [one["id"] for one in (shifts or {}).get("pairs", ()) if (one["px"] or 0) > 8]
    if far:
        warnings.append(f"{len(far)} pairs are shifted by more than 8 px: {first(far)}")
    return warnings


def _hashes(record: PairRecord, pair: PairedSample) -> tuple[str, str]:
    """Digests of the files' bytes; of the pixels where one file holds both or none is there."""
    if record.rgb != record.ir and record.rgb.is_file():
        return _digest(record.rgb.read_bytes()), _digest(record.ir.read_bytes())
    return _digest(pair.rgb.tobytes()), _digest(pair.ir.tobytes())


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def thumb(plane: np.ndarray) -> np.ndarray:
    """Block means on a 16x16 grid, less their mean, of unit length (zeros for a flat image)."""
    rows, columns = (np.linspace(0, n, THUMB, endpoint=False).astype(int) for n in plane.shape)
    sums = np.add.reduceat(np.add.reduceat(plane.astype(np.float64), rows, axis=0), columns, axis=1)
    area = np.outer(np.diff([*rows, plane.shape[0]]), np.diff([*columns, plane.shape[1]]))
    small = sums / np.maximum(area, 1)
    small -= small.mean()
    length = np.linalg.norm(small)
    return (small / length if length > 1e-9 else np.zeros_like(small)).ravel()


def _size(plane: np.ndarray) -> str:
    return f"{plane.shape[1]}x{plane.shape[0]}"


def _counted(values: Any) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _listed(counts: dict[str, int]) -> str:
    return first((f"{name} ({n})" for name, n in counts.items()), 4) or "none"
