"""Tables of a run from its stored spectra alone: summary, ratio, convergence, band weights, verdict; two runs compared.

No network and no image is needed. The same inputs give the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from freqkd_analysis import calibration, provenance, schema, statistics
from freqkd_analysis.band_weights import band_weights
from freqkd_analysis.bands import Bands, fine_edges2
from freqkd_analysis.calibration import Answer, with_all
from freqkd_analysis.divergence import DIVERGENCES, Cube, band_table, chosen, cube, joined, stacked
from freqkd_analysis.errors import BandsError, RunError
from freqkd_analysis.statistics import Array, Interval

if TYPE_CHECKING:
    import pandas as pd

NOTE = (
    "neighbouring layers share the residual stream: agreement of layers is not independent confirmation; "
    "`all` is the arithmetic mean over layers"
)


def summarize(
    run: Path,
    bands: str | None = None,
    measures: Iterable[str] | None = None,
    draws: int = statistics.DRAWS,
    seed: int | None = None,
    floor: str = "none",
    out: Path | None = None,
) -> dict[str, Any]:
    """Write every table of `run` that follows from its spectra, and return the verdict (also verdict.json).

    Args:
        run: folder with manifest.json and spectra.parquet (coherence.parquet is used when it is there).
        bands: another band text, see Bands.parse; the run's own by default.
        measures: names of divergence.MEASURES; those of the manifest by default, else all. The primary
            measure and the energies are always computed.
        draws, seed: of bootstrap and sign-flip test; the run's own seed by default.
        floor: of the calibration: `none`, `noise`, `shifted` (the measured registration) or `shifted:PIXELS`.
        out: where to write, see `target_folder`; the run itself is written only as it was told before.
    Raises: RunError, BandsError, FreqkdError, each in one line.
    """
    manifest = provenance.read_manifest(run)
    own, seed = str(manifest["config"]["bands"]), int(manifest["config"].get("seed", 0) if seed is None else seed)
    text, taps = bands or own, manifest["taps"]
    asked = _measures(measures, manifest)
    target = out or target_folder(run, text, asked, floor)
    inside = target.resolve() == run.resolve()
    if inside and (name := _otherwise(manifest, text, asked, floor)):  # its report would contradict its tables
        raise RunError(f"tables of {name} need a folder of their own, not --out RUN: the run has others.")
    _check_bands(manifest, text, own)
    names = _with_primary(asked)
    values = stacked([cube(table) for table in _banded(run, taps, text, names, own)])
    beside = calibration.map_free(_controls(run))
    full = joined(values, cube(band_table(beside, taps, text, names, own))) if len(beside) else values
    registration = manifest.get("data", {}).get("registration_px")
    moved = calibration.floor_pixels(floor, list(values.values), registration)  # fails before anything is written
    floor = floor if moved is None else f"shifted:{moved:g}"
    answers = {
        (c, m): calibration.answer(full, c, m, floor, registration, draws, seed)
        for c in values.values
        for m in values.measures
    }
    verdict = _verdict(full, answers, manifest, floor, draws, seed)
    weights = band_weights(run, full, manifest, text, floor, draws, seed)
    if not inside:
        config = manifest["config"] | {"bands": text} | ({} if measures is None else {"measure": list(asked)})
        schema.write_text(target / "manifest.json", _json(manifest | {"config": config, "derived_from": run.name}))
    with schema.writer(target / "divergence.parquet") as write:
        for table in _banded(run, taps, text, names, own):  # again rather than held: long tables are the large ones
            write(table)
    schema.write(_summary(values, draws, seed), target / "summary.csv")
    schema.write(_ratio(values, answers), target / "ratio.csv")
    schema.write_text(target / "convergence.csv", _convergence(values, draws, seed).to_csv(index=False))
    schema.write_text(target / "band_weights.json", _json(weights))
    schema.write_text(target / "verdict.json", _json(verdict))
    return verdict


def _check_bands(manifest: Mapping[str, Any], text: str, own: str) -> None:
    """For a DCT the edges of other bands must be stored ones: its modes lie between."""
    if text == own:
        return
    for tap in manifest["taps"] if manifest["config"].get("window") == "dct" else ():
        grid, stride = (int(tap["grid"][0]), int(tap["grid"][1])), int(tap["stride"])
        wanted, stored = Bands.parse(text, grid, stride), fine_edges2(Bands.parse(own, grid, stride))
        if wanted.edges2 is None or not set(wanted.edges2) <= set(stored):
            raise BandsError(f'bands "{text}" cut stored rings of a DCT run; use edges of 1/64 cycle per token or '
                             f"run `layers` again with --bands {text}.")  # fmt: skip


def _banded(run: Path, taps: Any, text: str, names: Sequence[str], own: str) -> Iterator[pd.DataFrame]:
    """The divergence table in pieces, one a stored block of pairs."""
    for part in schema.parts(run / "spectra.parquet"):
        yield band_table(part, taps, text, names, own)


def _controls(run: Path) -> pd.DataFrame:
    """The spectra that `map_free` needs: shifts and noise, and `mean_removed` of the same pairs."""
    import pandas as pd

    path, found = run / "spectra.parquet", []
    for part in schema.parts(path):
        found.append(part[part["condition"].str.startswith("shifted:") | (part["condition"] == "noise")])
    controls = pd.concat(found, ignore_index=True)
    pairs = set(controls["pair"])
    for part in schema.parts(path) if pairs else ():
        found.append(part[(part["condition"] == "mean_removed") & part["pair"].isin(pairs)])
    return pd.concat(found, ignore_index=True)


def target_folder(
    run: Path, bands: str | None = None, measures: Iterable[str] | None = None, floor: str = "none"
) -> Path:
    """Where `summarize` writes: the run itself where nothing is told otherwise, else a folder in it.

    Its name says what is other: RUN/rebanded-<bands>, RUN/measures-<measures>, RUN/floor-<floor>, or these joined.
    """
    manifest = provenance.read_manifest(run)
    return run / _otherwise(manifest, bands or str(manifest["config"]["bands"]), _measures(measures, manifest), floor)


def _otherwise(manifest: Mapping[str, Any], bands: str, measures: Sequence[str], floor: str) -> str:
    """What is not as `layers` told the run, as the name of a folder; empty when all is."""
    found = [] if bands == str(manifest["config"]["bands"]) else [f"rebanded {bands}"]
    if _with_primary(measures) != _with_primary(_measures(None, manifest)):
        found.append(f"measures {' '.join(measures)}")
    if floor != "none":
        found.append(f"floor {floor}")
    return "-".join(map(_slug, found))


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-") or "bands"


def _measures(measures: Iterable[str] | None, manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """Those asked for, else those of the run; none named means all."""
    wanted = manifest["config"].get("measure") if measures is None else measures
    return chosen(wanted or None)


def _with_primary(measures: Iterable[str]) -> tuple[str, ...]:
    """With them what every table has: the primary measure, the energies and the modes."""
    return chosen({*measures, calibration.PRIMARY, "energy_rgb", "energy_ir", "modes"})


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _number(value: Any) -> float | None:
    return calibration.rounded(np.array([value]))[0]


def _rows(values: Cube) -> list[str]:
    return [*(str(layer) for layer in values.layers), "all"]


def _summary(values: Cube, draws: int, seed: int) -> pd.DataFrame:
    import pandas as pd

    frames = []
    for condition in values.values:
        unit = statistics.units(values.pairs[condition], values.groups[condition])
        for measure in values.measures:
            of = values.of(condition, measure)
            got = mean_interval(of, unit, draws, seed)
            counts = statistics.group_sums(of, unit.index, len(unit))[1]
            n, groups = counts.sum(axis=0), (counts > 0).sum(axis=0)
            frames.append(pd.DataFrame({
                "condition": condition, "layer": np.repeat(_rows(values), len(values.bands)),
                "band": np.tile(np.array(values.bands), len(values.layers) + 1), "measure": measure,
                "mean": got.estimate, "ci_low": got.low, "ci_high": got.high,
                "n": _with_most(n).ravel().astype(np.int32), "groups": _with_most(groups).ravel().astype(np.int32),
            }))  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def mean_interval(values: Array, unit: statistics.Units, draws: int, seed: int) -> Interval:
    """Interval of the mean of `values` (P, L, K) per layer, `all` and band: ((L + 1) K,)."""
    return statistics.interval(*mean_columns(values, unit, draws, seed), unit.effective)


def mean_columns(values: Array, unit: statistics.Units, draws: int, seed: int) -> tuple[Array, Any, Array]:
    """Group sums of `values` (P, L, K), the statistic that takes means from them, and the draws."""
    flat = values.reshape(len(values), -1)
    columns = np.concatenate(statistics.group_sums(flat, unit.index, len(unit)), axis=1)

    def means(totals: Array) -> Array:
        mean = statistics.mean(totals).reshape(*totals.shape[:-1], *values.shape[1:])
        return with_all(mean, axis=-2).reshape(*totals.shape[:-1], -1)

    return columns, means, statistics.bootstrap_weights(len(unit), draws, seed)


def _with_most(counts: Array) -> Array:
    return np.concatenate([counts, counts.max(axis=0, keepdims=True)])


def _ratio(values: Cube, answers: Mapping[tuple[str, str], Answer]) -> pd.DataFrame:
    import pandas as pd

    frames = []
    for (condition, measure), got in answers.items():
        of = got.intervals
        asked = condition in calibration.QUESTIONS and measure in DIVERGENCES
        count = len(values.layers) + 1
        frames.append(pd.DataFrame({
            "condition": condition, "layer": _rows(values), "measure": measure,
            "low": of["low"].estimate, "high": of["high"].estimate,
            "ratio": of["ratio"].estimate, "ratio_ci_low": of["ratio"].low, "ratio_ci_high": of["ratio"].high,
            "difference": of["difference"].estimate, "p": got.p, "p_fdr": got.p_fdr,
            "calibrated_low": of["c_low"].estimate, "calibrated_high": of["c_high"].estimate,
            "calibrated_ratio": of["c_ratio"].estimate,
            "calibrated_ci_low": of["c_ratio"].low, "calibrated_ci_high": of["c_ratio"].high,
            "shift_low_px": [_shift(got, "shift_low", i) for i in range(count)],
            "shift_high_px": [_shift(got, "shift_high", i) for i in range(count)],
            "verdict": [got.verdict(i) if asked else "" for i in range(count)],
        }))  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def _shift(got: Answer, name: str, row: int) -> str:
    return calibration.shift_text(float(got.intervals[name].estimate[row]), got.largest_shift)


def _convergence(values: Cube, draws: int, seed: int) -> pd.DataFrame:
    """Width of the interval of low and high band and of their ratio on 50, 100, 200, 500 and all pairs."""
    import pandas as pd

    records: list[tuple[Any, ...]] = []
    count, names = len(values.layers), _rows(values)
    for condition in [c for c in values.values if c in calibration.QUESTIONS]:
        for measure in [m for m in values.measures if m in DIVERGENCES]:
            ends = values.of(condition, measure)[:, :, [values.low, values.high]]

            def ratio(totals: Array) -> Array:
                mean = statistics.mean(totals).reshape(*totals.shape[:-1], count, 2)
                three = np.concatenate([mean, mean[..., 1:] / mean[..., :1]], axis=-1)
                return with_all(three, axis=-2).reshape(*totals.shape[:-1], -1)

            flat = ends.reshape(len(ends), -1)
            pairs, groups = values.pairs[condition], values.groups[condition]
            for n, units, got in statistics.convergence(flat, ratio, pairs, groups, draws=draws, seed=seed):
                for i, (low, high) in enumerate(zip(got.low, got.high, strict=True)):
                    band = (values.bands[values.low], values.bands[values.high], "ratio")[i % 3]
                    records.append((condition, names[i // 3], band, measure, n, units, high - low, low, high))
    return pd.DataFrame(records, columns=list(schema.CONVERGENCE))


def _ends(interval: Interval, row: int) -> list[float | None]:
    return [_number(interval.low[row]), _number(interval.high[row])]


def _entry(got: Answer, row: int) -> dict[str, Any]:
    of = got.intervals
    entry: dict[str, Any] = {"verdict": got.verdict(row), "reason": got.reasons[row]}
    for name in ("low", "high", "ratio", "difference", "c_low", "c_high", "c_ratio"):
        label = name.replace("c_", "calibrated_")
        entry[label], entry[f"{label}_ci"] = _number(of[name].estimate[row]), _ends(of[name], row)
    for name in ("shift_low", "shift_high"):
        ends = [calibration.shift_text(float(x[row]), got.largest_shift) for x in (of[name].low, of[name].high)]
        entry[f"{name}_px"], entry[f"{name}_px_ci"] = _shift(got, name, row), ends
    return entry | {
        "p": _number(got.p[row]), "p_fdr": _number(got.p_fdr[row]), "effect_size": _number(got.effect[row]),
        "mean_of_ratios": _number(got.mean_of_ratios[row]), "method": str(of["c_ratio"].method[row]),
    }  # fmt: skip


def _verdict(
    values: Cube,
    answers: Mapping[tuple[str, str], Answer],
    manifest: Mapping[str, Any],
    floor: str,
    draws: int,
    seed: int,
) -> dict[str, Any]:
    known = [c for c in calibration.QUESTIONS if c in values.values]
    if not known:
        raise RunError("spectra.parquet holds neither `paired` nor `mean_removed`; run `freqkd-analyze layers` again.")
    condition, measure = known[0], calibration.PRIMARY
    got = answers[condition, measure]
    of, last = got.intervals, len(values.layers)
    tap = {int(t["layer"]): str(t.get("tap", "")) for t in manifest["taps"]}
    registration = manifest.get("data", {}).get("registration_px")
    raw = {m: answers["paired", m].intervals for m in values.measures if m in DIVERGENCES and "paired" in known}
    return {
        "schema": schema.VERSION,
        "measure": measure,
        "condition": condition,
        "verdict": got.verdict(last),
        "floor": floor,
        "layers": [{"layer": n, "tap": tap.get(n, "")} | _entry(got, i) for i, n in enumerate(values.layers)],
        "all": _entry(got, last),
        "layer_ratios": {
            "arithmetic": _number(of["ratio"].estimate[last]), "arithmetic_ci": _ends(of["ratio"], last),
            "geometric": _number(of["geometric"].estimate[0]), "geometric_ci": _ends(of["geometric"], 0),
            "calibrated_arithmetic": _number(of["c_ratio"].estimate[last]),
            "calibrated_geometric": _number(of["c_geometric"].estimate[0]),
            "calibrated_geometric_ci": _ends(of["c_geometric"], 0),
        },
        "beside": {
            "paired": {m: {"ratio": _number(r["ratio"].estimate[last]), "ci": _ends(r["ratio"], last),
                           "geometric": _number(r["geometric"].estimate[0])} for m, r in raw.items()},
            "shifted_at_registration": _at_registration(values, measure, registration, condition),
        },
        "statistics": {"interval": "cluster bootstrap, BCa; percentile where a row's method says so",
                       "level": statistics.LEVEL, "draws": draws, "seed": seed,
                       "unit": got.unit.kind, "units": len(got.unit), "ratio": "ratio of means over pairs"},
        "warnings": _warnings(values, got, condition, manifest),
        "note": NOTE,
    }  # fmt: skip


def _at_registration(values: Cube, measure: str, registration: float | None, condition: str) -> dict[str, Any]:
    """High over low (mean over layers) that moving the visible image by the measured registration shift gives.

    Told as the primary condition is: without the mean map where that was taken out.
    """
    curve = calibration.shifts(list(values.values), "mean_removed_" if condition == "mean_removed" else "")
    if registration is None or not curve or not 0 < registration <= curve[-1][0]:
        return {"px": _number(np.nan if registration is None else registration), "ratio": None}
    ends = [values.low, values.high]
    means = [statistics.mean_over_pairs(values.of(name, measure)[:, :, ends]).ravel() for _, name in curve]
    d = calibration.divergence_at(float(registration), np.array([px for px, _ in curve]), np.stack(means))
    low, high = d.reshape(-1, 2).T
    with np.errstate(divide="ignore", invalid="ignore"):
        return {"px": _number(registration), "ratio": _number(with_all(high / low)[-1])}


def _warnings(values: Cube, got: Answer, condition: str, manifest: Mapping[str, Any]) -> list[str]:
    found = [got.unit.warning] if got.unit.warning else []
    if condition != calibration.QUESTIONS[0]:
        found.append(f"no rows of {calibration.QUESTIONS[0]}: the verdict is on {condition}, shared maps included")
    last = len(values.layers)
    without = [str(n) for n, reason in zip(values.layers, got.reasons, strict=False) if reason]
    if without:
        why = next(reason for reason in got.reasons if reason)
        found.append(f"layers {', '.join(without)} have no calibrated ratio ({why}) and are left out of `all`")
    geometric = got.intervals["c_geometric"]
    if calibration.verdict(float(geometric.low[0]), float(geometric.high[0])) != got.verdict(last):
        found.append("the geometric mean over layers gives another verdict than the arithmetic one")
    plain = [str(n) for n, m in zip(_rows(values), got.intervals["c_ratio"].method, strict=True) if m == "percentile"]
    if plain:
        found.append(f"percentile instead of BCa intervals for the calibrated ratio of layers {', '.join(plain)}")
    if manifest.get("network", {}).get("trained") is False:
        found.append("the network is not trained: the numbers describe its architecture")
    return found
