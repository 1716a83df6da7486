"""The methods paragraph of a paper, from the settings that a run recorded.

Every number is read from the run folder; what it does not hold is written as "not recorded", never assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from freqkd_analysis import schema
from freqkd_analysis.runfolder import CEILINGS, MISSING, Run, number, read_run
from freqkd_analysis.schema import condition_order

MEASURE_WORDS = {
    "cosine": "1 - R / sqrt(Pa Pb) (0 same, 1 unrelated, 2 opposite)",
    "relative": "Pd / (Pa + Pb) (0 same, 1 unrelated, 2 opposite)",
    "nmse": "Pd / Pa (0 same)",
    "mse": "Pd over all values of the map (0 same; grows with energy and with the number of modes)",
    "mse_per_mode": "Pd per mode and channel (0 same)",
    "log_spectral": "abs(ln(Pa / Pb)) (0 same; amplitude only)",
}
"""Each measure as a formula of the band sums Pa, Pb (energies), R (real cross spectrum), Pd (of the difference)."""

CONDITION_WORDS = {
    "paired": "RGB and IR image of a pair",
    "shuffled": "RGB image and the IR image of another group (the ceiling)",
    "mean_removed": "paired, each modality's cross-fitted mean map taken out",
    "mean_removed_shuffled": "shuffled, mean maps taken out (the ceiling of mean_removed)",
    "without_artefacts": "paired, tokens of outlying norm replaced by the mean of the others",
    "shifted": "RGB image against itself moved by that many input pixels, along x and along y",
    "mean_removed_shifted": "shifted, the RGB mean map taken out",
    "grey": "RGB image against its luminance",
    "inverted": "RGB image against the negative of its luminance",
    "blur": "RGB image against itself, blurred to the IR image's sharpness",
    "noise": "RGB image against itself with known 8-bit noise",
    "mean_removed_noise": "noise, the RGB mean map taken out",
    "random": "paired, the same network with random weights",
    "pixels": "paired, the bare grey images in the same physical bands",
}
"""What each condition compares. Conditions with an amount (`shifted:4`) are listed by their stem."""


def condition_words(name: str) -> str:
    """What a condition compares, or the bare name of an unknown one.

    Example:
        >>> condition_words("shifted:4")
        'RGB image against itself moved by that many input pixels, along x and along y'
    """
    return CONDITION_WORDS.get(name.partition(":")[0], name)


def write_methods(run: Path) -> Path:
    """Write RUN/methods.md and return its path.

    Raises: RunError when the folder or one of its tables is missing or of another schema.
    """
    path = run / "methods.md"
    paragraphs = methods_paragraphs(read_run(run))
    schema.write_text(path, "# Methods\n\n" + "\n\n".join(_markdown(p) for p in paragraphs) + "\n")
    return path


def methods_paragraphs(run: Run) -> list[str]:
    """The methods section as plain sentences, a string a paragraph, without markup."""
    return [_material(run), _network(run), _spectra(run), _controls(run), _statistics(run), _software(run)]


def _say(value: Any, unit: str = "") -> str:
    """A recorded value as words, `not recorded` for a missing one."""
    if value is None or value == "":
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_say(v) for v in value) or "none"
    return f"{value:,}{unit}" if isinstance(value, int) else f"{value}{unit}"


def _material(run: Run) -> str:
    data, config = (lambda k: run.get("data", k)), (lambda k: run.get("config", k))
    skipped = run.get("data", "skipped")
    registration = (
        f"Median misregistration, measured on {_say(data('registration_n'))} pairs by phase correlation of gradient "
        f"images, was {number(data('registration_px'))} input pixels."
        if data("registration_px") is not None
        else "Misregistration of the pairs: not measured."
    )
    return (
        f"Pairs. {_say(data('n'))} pairs of visible (RGB) and infrared (IR) images in {_say(data('groups'))} groups "
        f"(sequences) were read from {_say(data('spec') or config('data'))} (day: {_say(data('day'))}, night: "
        f"{_say(data('night'))}; sampling: {_say(config('sample'))}, seed {_say(config('seed'))}; unreadable and "
        f"skipped: {MISSING if skipped is None else len(skipped)}). Images were brought to "
        f"{_size(config('size'))} by {_say(config('geometry'))}. {registration}"
    )


def _size(size: Any) -> str:
    if isinstance(size, Sequence) and not isinstance(size, str) and len(size) == 2:
        return f"{size[0]} x {size[1]} pixels"
    return f"size {_say(size)}"


def _network(run: Run) -> str:
    net, config = (lambda k: run.get("network", k)), (lambda k: run.get("config", k))
    taps = run.get("taps", default=[])
    listed = ", ".join(f"{t.get('layer')} ({t.get('tap', MISSING)})" for t in taps) or MISSING
    grids = list(dict.fromkeys(f"{t['grid'][0]} x {t['grid'][1]}" for t in taps if t.get("grid")))
    strides = list(dict.fromkeys(f"{t['stride']}" for t in taps if t.get("stride") is not None))
    norm = {True: "was applied", False: "was not applied", None: f"({MISSING})"}[config("norm")]
    digest = net("sha256")
    return (
        f"Network. Both images of a pair passed through the same network, {_say(net('name') or config('model'))} "
        f"({_say(net('parameters'))} parameters; weights: {_say(net('weights'))}, SHA-256 "
        f"{_say(str(digest)[:12] if digest else None)}; trained: {_say(net('trained'))}), in "
        f"{_say(config('dtype'))}. Features are block outputs of the layers {listed}: grids of "
        f"{_say(grids or None)} positions, stride {_say(strides or None)} input pixels; prefix tokens were dropped. "
        f"The network's final normalisation {norm} on intermediate blocks. Standardisation: "
        f"{_say(config('standardize'))}. Window: {_say(config('window'))}."
    )


def _spectra(run: Run) -> str:
    bands = "; ".join(run.band_text(name) for name in run.bands)
    text = run.weights.get("bands", {}).get("text") or run.get("config", "bands")
    return (
        "Divergence. Each channel was transformed by an orthonormal two-dimensional DFT over positions. Energies of "
        "RGB (Pa) and IR (Pb), the real cross spectrum (R) and the energy of the difference (Pd) were summed over the "
        f"modes of a band and over channels. Bands, in cycles per token ({_say(text)}): {bands or MISSING}. The "
        f"primary measure, fixed before looking, is {run.measure}"
        f"{': ' + MEASURE_WORDS[run.measure] if run.measure in MEASURE_WORDS else ''}, read in the condition "
        f"{run.condition} ({condition_words(run.condition)}). Low and high are the first and the last band."
    )


def _controls(run: Run) -> str:
    names = list(run.get("conditions", default={})) or list(run.summary["condition"].unique())
    stems: dict[str, list[str]] = {}
    for name in sorted(names, key=condition_order):
        stem, _, amount = name.partition(":")
        stems.setdefault(stem, []).append(amount)
    parts = []
    for stem, amounts in stems.items():
        given = ", ".join(a for a in amounts if a)
        parts.append(f"{stem}{' (' + given + ' px)' if given else ''}: {condition_words(stem)}")
    ceiling = CEILINGS.get(run.condition, "shuffled")
    calibrated = (
        f"Calibrated divergence is the divergence over that of {ceiling}: 0 means no difference, 1 no better than "
        "unrelated scenes; numerator and denominator were resampled together."
        if ceiling in names
        else f"The run holds no {ceiling} condition, so nothing was calibrated."
    )
    sentences = [
        f"Conditions. {'; '.join(parts)}.",
        _mean_maps(run) if any(stem.startswith("mean_removed") for stem in stems) else "",
        f"Controls that need a further forward pass ran on {_say(run.get('data', 'control_n'))} pairs.",
        "The window was not applied to the pixels control."
        if "pixels" in stems and run.get("config", "window") not in (None, "none")
        else "",
        calibrated,
    ]
    return " ".join(s for s in sentences if s)


def _mean_maps(run: Run) -> str:
    """How the mean map that `mean_removed` takes out was made: see plan.make."""
    pairs = run.get("config", "control_pairs")
    most = f"{max(1, pairs // 2):,}" if isinstance(pairs, int) else f"half of control_pairs ({MISSING})"
    return (
        f"Mean maps were cross-fitted: the groups were dealt to two folds, and the mean map of each modality was taken "
        f"over at most {most} pairs, spread over the groups, of the other fold, so that no group enters its own mean."
    )


def _statistics(run: Run) -> str:
    groups = run.get("data", "groups")
    unit = "the pair (fewer than two groups)" if groups is not None and groups < 2 else "the group, not the frame"
    recorded = run.get("statistics", default={}) or run.verdict.get("statistics") or run.verdict
    draws, method = recorded.get("draws"), recorded.get("interval")
    return (
        f"Statistics. The unit of resampling is {unit}. Intervals are 95 % bootstrap intervals (draws: {_say(draws)}; "
        f"kind: {_say(method)}). The verdict says supports when the interval of calibrated high over calibrated "
        "low lies above 1, against when it lies below 1, else undetermined. p values of high minus low come from sign "
        "flips over groups and are adjusted over layers by Benjamini and Hochberg. Layers are not independent of "
        "each other."
    )


def _software(run: Run) -> str:
    env = lambda k: run.get("environment", k)
    return (
        f"Software. freqkd {_say(run.get('version'))} (commit {_say(run.get('commit'))}), Python "
        f"{_say(env('python'))}, torch {_say(env('torch'))}, timm {_say(env('timm'))}; device {_say(env('device'))}; "
        f"started {_say(run.get('started'))}; {number(run.get('seconds')) if run.get('seconds') else MISSING} s."
    )


def _markdown(paragraph: str) -> str:
    """Plain text as Markdown: what a file name may carry (<, *, backslash ..) stays text."""
    for mark in "\\`<>*[]|":
        paragraph = paragraph.replace(mark, f"\\{mark}")
    head, dot, rest = paragraph.partition(". ")
    return f"**{head}.** {rest}" if dot else paragraph
