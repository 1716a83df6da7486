"""Where a run's numbers come from: versions, commit, environment, hashes, and the manifest that holds them.

Nothing here prints, measures time or decides a setting: those come in as arguments and are written down.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from freqkd_analysis import __version__, schema
from freqkd_analysis.errors import RunError

LIBRARIES = ("torch", "torchvision", "timm", "numpy", "scipy", "pandas", "pyarrow", "pillow")
"""The libraries whose version can change a number."""

SECTIONS = ("config", "network", "data", "taps", "conditions", "artefacts")
"""The parts of a manifest that the run itself fills in, in order."""

NUMBER = (float, int, type(None))
MANIFEST: dict[str, Any] = {
    "config": {"bands": str, "measure?": ([str], str, type(None))},
    "data": {"registration_px?": NUMBER, "groups?": NUMBER, "skipped?": ([{"id": str, "reason": str}], type(None)),
             "notes?": ([str], type(None))},
    "taps": [{"layer": int, "tap": str, "grid": [int, int], "stride": (float, int), "channels": int}],
    "command?": list, "seconds?": NUMBER, "environment?": dict, "network?": dict, "conditions?": dict,
    "artefacts?": [{"layer": int, "modality": str, "rate": NUMBER, "median": NUMBER, "mad": NUMBER}],
}  # fmt: skip
"""What tables, figures and report take from a manifest, as `misfit` reads it."""

_WORDS = {dict: "an object", list: "a list", str: "text", int: "a whole number", float: "a number",
          bool: "true or false", type(None): "null"}  # fmt: skip


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal, read in pieces. Raises OSError when it cannot be read.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "empty"
        >>> path.touch()
        >>> sha256_file(path)[:8]
        'e3b0c442'
    """
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_lines(lines: Iterable[str]) -> str:
    """SHA-256 of strings in their order, each ended by a newline: the identity of a list of pairs.

    Example:
        >>> sha256_lines(["a", "b"]) == sha256_lines(["b", "a"])
        False
    """
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8") + b"\n")
    return digest.hexdigest()


def commit(folder: Path | None = None) -> str | None:
    """The git commit of the checkout that holds this package (or of `folder`), `+changes` when files differ.

    None when the package lies in no checkout of its own, or git is not installed.
    """
    folder = folder or Path(__file__).resolve().parent.parent
    # Only a checkout's own top counts: an installed copy may lie below somebody else's repository.
    if not (folder / ".git").exists():
        return None
    head = _git(folder, "rev-parse", "HEAD")
    if not head:
        return None
    return head + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def versions(names: Iterable[str] = LIBRARIES) -> dict[str, str | None]:
    """Installed version of each library by its distribution name; None when it is not installed. Imports nothing.

    Example:
        >>> versions(["no-such-library"])
        {'no-such-library': None}
    """
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def environment(device: str | None = None, threads: int | None = None, **more: Any) -> dict[str, Any]:
    """What a number may depend on outside the settings: Python, libraries, machine, device, threads.

    device: as the run names it, such as `cpu` or `cuda:0`. threads: of the tensor library. `more` is added as it is.
    Says nothing of user, host name or paths.
    """
    return {
        "python": platform.python_version(),
        **versions(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "device": device,
        "threads": threads,
        **more,
    }


def manifest(
    sections: Mapping[str, Any],
    *,
    environment: Mapping[str, Any],
    started: str,
    seconds: float,
    command: Iterable[str] | None = None,
) -> dict[str, Any]:
    """A run's manifest: who and what made it, then the parts named in SECTIONS (those not given are left out).

    started: ISO 8601 time. seconds: wall time of the run. command: the words typed, `sys.argv` when not given.

    Example:
        >>> made = manifest({"config": {"pairs": 8}}, environment={}, started="2026-01-01T00:00:00+00:00", seconds=1.5)
        >>> made["schema"], made["config"], made["seconds"]
        (1, {'pairs': 8}, 1.5)
    """
    unknown = sorted(set(sections) - set(SECTIONS))
    assert not unknown, f"not parts of a manifest: {unknown}"
    return {
        "schema": schema.VERSION,
        "command": list(sys.argv if command is None else command),
        "version": __version__,
        "commit": commit(),
        "started": started,
        "seconds": round(seconds, 3),
        "environment": dict(environment),
        **{name: sections[name] for name in SECTIONS if name in sections},
    }


def write_manifest(run: Path, content: Mapping[str, Any]) -> Path:
    """Write `manifest.json` into the folder `run`, whole or not at all; returns its path.

    Paths become text, arrays and NumPy numbers lists and numbers, NaN and infinity null (JSON has neither).
    Raises TypeError for anything that has no plain form, OSError when the disk refuses.
    """
    path = Path(run) / "manifest.json"
    schema.write_text(path, json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def read_manifest(run: Path) -> dict[str, Any]:
    """The manifest of the folder `run`, checked for all that tables need; the one place that reads it.

    Raises: RunError when there is none, it is broken, of another schema, or not of the shape MANIFEST.
    """
    path, again = Path(run) / "manifest.json", "run `freqkd-analyze layers` again."
    if not path.is_file():
        raise RunError(f"no manifest.json in {run}; expected the folder of a finished `freqkd-analyze layers` run.")
    content = read_object(path, MANIFEST, again, versioned=True)
    if not content["taps"]:
        raise RunError(f"{path}: expected taps, got an empty list; {again}")
    for i, tap in enumerate(content["taps"]):
        if min(*tap["grid"], tap["stride"], tap["channels"]) <= 0:
            raise RunError(f"{path}: expected grid, stride and channels of taps[{i}] to be above 0; {again}")
    return content


def read_object(path: Path, shape: dict[str, Any], again: str, versioned: bool = False) -> dict[str, Any]:
    """The JSON object in a file of a run folder, of this schema version and of `shape` (see `misfit`).

    Args:
        again: what to do about a file that does not fit, the end of the error's line.
        versioned: the file must say its schema; else it may be silent on it.
    Raises: RunError, one line that names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} is not readable JSON ({error}); {again}") from error
    if not isinstance(content, dict):
        raise RunError(f"{path}: expected an object, got {_WORDS[type(content)]}; {again}")
    got = content.get("schema", None if versioned else schema.VERSION)
    if got != schema.VERSION:
        raise RunError(f"{path}: expected schema {schema.VERSION}, got {got}; {again}")
    if wrong := misfit(content, shape):
        raise RunError(f"{path}: {wrong}; {again}")
    return content


def misfit(value: Any, shape: Any, name: str = "") -> str:
    """Where a value read from JSON first departs from `shape`, in words; empty where it fits.

    shape: a type; a tuple of shapes, one of which must fit; `[shape]`, a list of any length; `[shape, shape]`, a list
    of that length; `{key: shape}`, an object with these keys and maybe others. `key?` may be absent, `*` is any key.

    Example:
        >>> misfit({"taps": [{"grid": [16]}]}, {"taps": [{"grid": [int, int]}], "notes?": list})
        'expected taps[0].grid to hold 2 values, got 1'
        >>> misfit({"taps": []}, {"taps": [{"grid": [int, int]}], "notes?": list})
        ''
    """
    if isinstance(shape, tuple):
        found = [misfit(value, one, name) for one in shape]
        return "" if "" in found else found[0]
    kind: Any = shape if isinstance(shape, type) else type(shape)
    if type(value) is not kind:  # exactly: true is no number
        return f"expected {name or 'the whole'} to be {_WORDS[kind]}, got {_WORDS[type(value)]}"
    if isinstance(shape, list):
        if len(shape) > 1 and len(value) != len(shape):
            return f"expected {name} to hold {len(shape)} values, got {len(value)}"
        inner = shape * len(value) if len(shape) == 1 else shape
        parts = [(item, one, f"{name}[{i}]") for i, (item, one) in enumerate(zip(value, inner, strict=True))]
    elif isinstance(shape, dict):
        stem = f"{name}." if name else ""
        keys = [(key, shape["*"]) for key in value] if "*" in shape else list(shape.items())
        lacking = [key for key, _ in keys if not key.endswith("?") and key not in value]
        if lacking:
            return f"expected {stem}{lacking[0]}, got none"
        kept = [(key if "*" in shape else key.removesuffix("?"), one) for key, one in keys]
        parts = [(value[key], one, stem + key) for key, one in kept if key in value]
    else:
        return ""
    return next((wrong for part in parts if (wrong := misfit(*part))), "")


def plain(value: Any) -> Any:
    """`value` in the types that JSON has.

    Example:
        >>> import numpy as np
        >>> plain({"grid": np.array([2, 3]), "data": Path("pairs"), "mean": float("nan")})
        {'grid': [2, 3], 'data': 'pairs', 'mean': None}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # arrays, tensors and their scalars, without importing either library
        return plain(value.tolist())
    raise TypeError(f"a manifest holds plain values, got {type(value).__name__}")


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
