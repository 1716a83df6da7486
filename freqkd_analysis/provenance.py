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
    """The manifest of the folder `run`. RunError when there is none, it is broken, or of another schema."""
    path = Path(run) / "manifest.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"no manifest.json in {run}; expected the folder of a `freqkd-analyze layers` run.") from None
    except ValueError as error:
        raise RunError(f"{path} is not readable JSON ({error}); run `freqkd-analyze layers` again.") from error
    got = content.get("schema") if isinstance(content, dict) else None
    if got != schema.VERSION:
        raise RunError(f"{path}: expected schema {schema.VERSION}, got {got}; run `freqkd-analyze layers` again.")
    return content


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
