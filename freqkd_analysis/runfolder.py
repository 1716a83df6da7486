"""A finished run folder, read once: manifest, small tables, and which rows carry the primary answer.

Reading and formatting only. What figures, report, methods paragraph and console table have in common lives here, so
that they cannot disagree on which row is the answer or how a number is written.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freqkd_analysis import schema
from freqkd_analysis.errors import RunError
from freqkd_analysis.provenance import NUMBER, read_manifest, read_object
from freqkd_analysis.schema import CONVERGENCE, PRIMARY_CONDITIONS, PRIMARY_MEASURE

if TYPE_CHECKING:
    import pandas as pd

CEILINGS = {"mean_removed": "mean_removed_shuffled", "mean_removed_shuffled": "mean_removed_shuffled"}
"""The condition that says "unrelated scenes" for another one; `shuffled` for all that are not listed.

None for `random`, `pixels` and `without_artefacts`: they are other features than those that were shuffled.
"""

_KEYS = ("condition", "layer", "band", "measure")
MISSING = "not recorded"

_ENDS = ([NUMBER, NUMBER], type(None))
_SHIFTS = {f"shift_{band}_px_ci?": ([(str, *NUMBER), (str, *NUMBER)], type(None)) for band in ("low", "high")}
_VERDICT: dict[str, Any] = {
    "measure?": (str, type(None)), "condition?": (str, type(None)), "warnings?": [str],
    "layers?": [{"layer": (int, str)} | _SHIFTS], "all?": ({"reason?": (str, type(None))} | _SHIFTS, type(None)),
    "layer_ratios?": ({"calibrated_geometric?": NUMBER, "calibrated_geometric_ci?": _ENDS}, type(None)),
    "beside?": {"shifted_at_registration?": ({"px": NUMBER, "ratio?": NUMBER}, type(None))},
    "statistics?": (dict, type(None)),
}  # fmt: skip
_WEIGHTS: dict[str, Any] = {
    "bands": {"names": [str], "f_lo": [(float, int)], "f_hi": [(float, int)]},
    "layers": [{"layer": int, "tap?": str, "modes?": [int], "weights?": {"*": ([NUMBER], type(None))}}],
}
"""What is read from verdict.json and band_weights.json, as provenance.misfit reads it."""


@dataclass(frozen=True)
class Run:
    """The parts of a run folder that are small enough to hold; `spectra.parquet` is read where it is needed."""

    folder: Path
    manifest: dict[str, Any]
    summary: pd.DataFrame
    ratio: pd.DataFrame
    convergence: pd.DataFrame | None
    weights: dict[str, Any]
    """band_weights.json, or empty."""
    verdict: dict[str, Any] = field(default_factory=dict)
    """verdict.json, or empty."""

    def get(self, *keys: str, default: Any = None) -> Any:
        """A value deep in the manifest, or `default` where any step is missing or null."""
        value: Any = self.manifest
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return default if value is None else value

    @cached_property
    def measure(self) -> str:
        """The primary measure of this run: verdict.json's, else `cosine`, else the first one that was computed."""
        known = list(self.ratio["measure"].unique()) or list(self.summary["measure"].unique())
        for name in (self.verdict.get("measure"), PRIMARY_MEASURE):
            if name in known:
                return str(name)
        return str(known[0]) if known else PRIMARY_MEASURE

    @cached_property
    def condition(self) -> str:
        """The condition that the verdict is read from: verdict.json's, else `mean_removed`, else `paired`."""
        known = set(self.ratio["condition"].unique())
        for name in (self.verdict.get("condition"), *PRIMARY_CONDITIONS):
            if name in known:
                return str(name)
        return PRIMARY_CONDITIONS[-1]

    @cached_property
    def bands(self) -> list[str]:
        """Band names from low to high."""
        names = self.weights.get("bands", {}).get("names")
        return [str(n) for n in names] if names else list(self.summary["band"].astype(str).unique())

    @cached_property
    def ends(self) -> tuple[str, str]:
        """Names of the band called low and the band called high: these names where they occur, else first and last."""
        names = self.bands
        return "low" if "low" in names else names[0], "high" if "high" in names else names[-1]

    @cached_property
    def means(self) -> dict[tuple[str, str, str, str], dict[str, Any]]:
        """Rows of summary.csv by condition, measure, layer, band."""
        keys = ("condition", "measure", "layer", "band")
        return {tuple(str(row[k]) for k in keys): row for row in self.summary.to_dict("records")}  # type: ignore[misc]

    @cached_property
    def ratios(self) -> dict[tuple[str, str, str], float]:
        """Raw high / low by condition, measure, layer."""
        table = self.ratio
        keys = zip(table["condition"], table["measure"], table["layer"].astype(str), strict=True)
        return dict(zip(keys, table["ratio"].astype(float), strict=True))

    def shift_ends(self, condition: str, layer: str, band: str) -> tuple[str, str]:
        """Ends of the interval of an equivalent shift (`low` or `high`), as text; verdict.json has them, or empty."""
        if condition == self.verdict.get("condition"):
            for entry in [*self.verdict.get("layers", []), {"layer": "all"} | (self.verdict.get("all") or {})]:
                if str(entry.get("layer")) == str(layer):
                    low, high = (str(end) for end in entry.get(f"shift_{band}_px_ci") or ("", ""))
                    # An interval that lies beyond the largest shift as a whole says nothing more than the value.
                    return ("", "") if low == high and low.startswith(">") else (low, high)
        return "", ""

    def nearest_shift(self, condition: str) -> str:
        """The `shifted:d` condition nearest to the measured registration shift; empty without either.

        For a mean-removed condition it is `mean_removed_shifted:d`, whose mean map is out too, where the run has it.
        """
        known, measured = list(self.ratio["condition"].unique()), self.get("data", "registration_px")
        prefixes = ["mean_removed_", ""] if condition.startswith("mean_removed") else [""]
        for prefix in prefixes:
            shifts = [str(c) for c in known if str(c).startswith(f"{prefix}shifted:")]
            if measured is not None and shifts:
                return min(shifts, key=lambda c: abs(float(c.partition(":")[2]) - float(measured)))
        return ""

    def band_text(self, name: str) -> str:
        """`low [0, 0.125)` where the edges are known, else the bare name; cycles per token."""
        bands = self.weights.get("bands", {})
        if name not in bands.get("names", []):
            return name
        i = bands["names"].index(name)
        return f"{name} [{bands['f_lo'][i]:.3g}, {bands['f_hi'][i]:.3g})"

    def tap(self, layer: int | str) -> str:
        """The network's own name of a layer, or an empty string."""
        for tap in self.get("taps", default=[]):
            if str(tap.get("layer")) == str(layer):
                return str(tap.get("tap", ""))
        return ""


def read_run(folder: Path) -> Run:
    """Read the manifest and the small tables of a run folder.

    Args:
        folder: the `--out` folder of a finished `layers` run, after its tables were computed.
    Returns: a `Run`; convergence, band weights and verdict may be absent (None or empty).
    Raises: RunError when the folder, its manifest, summary.csv or ratio.csv is missing or unreadable.

    Example:
        >>> read_run(Path("none"))
        Traceback (most recent call last):
        ...
        freqkd_analysis.errors.RunError: no run folder none; expected the --out folder of `freqkd-analyze layers`.
    """
    if not folder.is_dir():
        raise RunError(f"no run folder {folder}; expected the --out folder of `freqkd-analyze layers`.")
    manifest = read_manifest(folder)
    summary, ratio = (_keyed(schema.read(folder / name), folder / name) for name in ("summary.csv", "ratio.csv"))
    return Run(
        folder=folder,
        manifest=manifest,
        summary=summary,
        ratio=ratio,
        convergence=_convergence(folder / "convergence.csv"),
        weights=_weights(folder / "band_weights.json"),
        verdict=_derived(folder / "verdict.json", _VERDICT),
    )


def rows(table: pd.DataFrame, **values: str) -> pd.DataFrame:
    """The rows whose columns equal `values`, layers in order (0, 1, .., `all` last), index reset.

    Example:
        >>> import pandas as pd
        >>> t = pd.DataFrame({"layer": ["all", "10", "9"], "measure": "mse", "mean": [2.0, 1.0, 0.0]})
        >>> list(rows(t, measure="mse")["layer"])
        ['9', '10', 'all']
    """
    keep = table
    for column, value in values.items():
        keep = keep[keep[column].astype(str) == value]
    order = keep["layer"].map(layer_order)
    return keep.assign(_order=order).sort_values("_order", kind="stable").drop(columns="_order").reset_index(drop=True)


def beside(run: Run, condition: str, layer: str) -> dict[str, Any]:
    """What must stand beside a verdict or an `mse`: other measures' high / low, energy and modes of both bands.

    Returns: `mse`, `mse_per_mode`, `cosine` (ratios of this condition and layer), `shifted` (ratio of cosine of the
        shift nearest to the measured registration) and its name `shift` (empty when not measured), `energy_low`,
        `energy_high` (RGB), `modes_low`, `modes_high`. None where the run does not hold it.
    """
    found: dict[str, Any] = {m: run.ratios.get((condition, m, layer)) for m in ("mse", "mse_per_mode", "cosine")}
    found["shift"] = run.nearest_shift(condition)
    found["shifted"] = run.ratios.get((found["shift"], "cosine", layer))
    for word, measure in (("energy", "energy_rgb"), ("modes", "modes")):
        for end, band in zip(("low", "high"), run.ends, strict=True):
            found[f"{word}_{end}"] = run.means.get((condition, measure, layer, band), {}).get("mean")
    return found


def layer_order(layer: Any) -> float:
    """Sort key of a layer: its number; `all` comes last."""
    text = str(layer)
    return math.inf if text == "all" else float(text)


def number(value: Any, digits: int = 3) -> str:
    """A number with `digits` significant digits, an en dash for nothing.

    Example:
        >>> number(2.4178), number(float("nan")), number(1234567.0), number(0.00001234)
        ('2.42', '–', '1.23e+06', '1.23e-05')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    value = float(value)
    return f"{value:#.{digits}g}".rstrip(".") if 1e-3 <= abs(value) < 1e4 else f"{value:.{digits}g}"


def interval(low: Any, high: Any, digits: int = 3) -> str:
    """`[low, high]`, or an empty string when either end is missing.

    Example:
        >>> interval(1.2, 3.4), interval(None, 3.4)
        ('[1.20, 3.40]', '')
    """
    ends = number(low, digits), number(high, digits)
    return "" if "–" in ends else f"[{ends[0]}, {ends[1]}]"


def measured(value: Any, low: Any, high: Any) -> str:
    """A number with its interval, or without one where there is none.

    Example:
        >>> measured(2.4, 2.1, 2.7), measured(2.4, None, None)
        ('2.40 [2.10, 2.70]', '2.40')
    """
    return f"{number(value)} {interval(low, high)}".strip()


def text(value: Any) -> str:
    """A cell of a text column: an empty string for a missing one."""
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)


def _again(path: Path) -> str:
    return f"make it again: freqkd-analyze summarize {shlex.quote(str(path.parent))}"


def _derived(path: Path, shape: dict[str, Any]) -> dict[str, Any]:
    return read_object(path, shape, _again(path)) if path.is_file() else {}


def _weights(path: Path) -> dict[str, Any]:
    weights = _derived(path, _WEIGHTS)
    bands = weights.get("bands", {})
    counts = [len(bands.get(key, [])) for key in ("names", "f_lo", "f_hi")]
    if len(set(counts)) > 1 or (weights and not counts[0]):
        raise RunError(f"{path}: expected a name, f_lo and f_hi a band, got {counts} of them; {_again(path)}")
    return weights


def _convergence(path: Path) -> pd.DataFrame | None:
    import pandas as pd

    if not path.is_file():
        return None
    columns = {c: "str" if c in _KEYS else "float64" for c in CONVERGENCE}
    try:
        table = pd.read_csv(path, dtype=columns)
    except (OSError, ValueError) as error:  # empty, not UTF-8, no table, or text where numbers belong
        raise RunError(f"{path} cannot be read as a table ({type(error).__name__}); {_again(path)}") from error
    schema.check(table, columns, path.name)
    return _keyed(table, path)


def _keyed(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The table, after its key columns were found filled and its layers to be numbers or `all`."""
    if table.empty and path.name != "convergence.csv":  # one sample size may leave no row there
        raise RunError(f"{path} has no rows; {_again(path)}")
    for column in [c for c in _KEYS if c in table]:
        fits = table[column].str.fullmatch(r"\d+|all" if column == "layer" else r".+").fillna(False).astype(bool)
        if not fits.all():
            expected = "a number or `all`" if column == "layer" else "text"
            raise RunError(f'{path}: expected {expected} in column {column}, got "{table[column][~fits].iloc[0]}"; '
                           f"{_again(path)}")  # fmt: skip
    return table
