"""A page of its own for each public module, written into `docs/api` when a build begins."""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import freqkd_analysis
import freqkd_train

PACKAGES = (freqkd_analysis, freqkd_train)
COMMAND_LINES = ("__main__", "cli", "commands")
"""Their functions are commands, which have pages of their own."""


def setup(app: Sphinx) -> dict[str, Any]:
    """Pages must be there before Sphinx lists the sources."""
    app.connect("builder-inited", lambda app: write(Path(app.srcdir) / "api"))
    return {"parallel_read_safe": True}


def modules() -> list[str]:
    """Dotted names of the public modules, in order; packages that hold nothing themselves are left out."""
    found = [info for package in PACKAGES for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    names = [info.name for info in found if not info.ispkg]
    return sorted(name for name in names if name.rsplit(".", 1)[1] not in COMMAND_LINES and "._" not in name)


def write(folder: Path) -> None:
    """One page a module. A page of a module that is gone goes; one that has not changed is not touched."""
    folder.mkdir(exist_ok=True)
    names = modules()
    for path in folder.glob("*.rst"):
        if path.stem not in names:
            path.unlink()
    for name in names:
        text = f"{name}\n{'=' * len(name)}\n\n.. automodule:: {name}\n"
        path = folder / f"{name}.rst"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
