"""The notebooks as pages, with the output that is kept in them: copied into `docs/notebooks` when a build begins."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


def setup(app: Sphinx) -> dict[str, Any]:
    """Pages must be there before Sphinx lists the sources."""
    app.connect("builder-inited", lambda app: copy(Path(app.srcdir) / "notebooks"))
    return {"parallel_read_safe": True}


def copy(folder: Path) -> None:
    """One page a notebook. A page of a notebook that is gone goes; one that has not changed is not touched."""
    folder.mkdir(exist_ok=True)
    sources = {path.name: path for path in NOTEBOOKS.glob("*.ipynb")}
    for path in folder.glob("*.ipynb"):
        if path.name not in sources:
            path.unlink()
    for name, source in sources.items():
        page = folder / name
        if not page.exists() or page.read_bytes() != source.read_bytes():
            shutil.copyfile(source, page)
