"""Run the notebooks and store them with what they show.

    python tools/notebooks.py                     # all
    python tools/notebooks.py notebooks/1_*.ipynb

Each runs in an empty folder of its own, so that nothing depends on what lies about. What differs from run to run or
from machine to machine is not stored: times, versions, talk on stderr, the state of widgets, random names in tables.
Needs the extra `notebooks`.
"""

from __future__ import annotations

import base64
import io
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
SECONDS = 600
WIDGETS = "application/vnd.jupyter.widget-state+json"


def execute(notebook: Any, folder: Path, parameters: str = "", seconds: int = SECONDS) -> Any:
    """Run a notebook in `folder`, with the source of its parameter cell replaced where `parameters` is given.

    seconds: the longest that a cell may take.

    Raises: nbclient's CellExecutionError when a cell fails.
    """
    if parameters:
        parameter_cell(notebook).source = parameters
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])])}
    environment.pop("MPLBACKEND", None)  # the kernel shows figures by a backend of its own
    where = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=seconds, resources=where, coalesce_streams=True)
    return client.execute(env=environment)


def parameter_cell(notebook: Any) -> Any:
    """The one cell tagged `parameters`."""
    (found,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    return found


def errors(notebook: Any) -> list[str]:
    """Error outputs, those that a widget's callback raised into the widget included."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    outputs += inside_widgets(notebook)
    return [f"{output['ename']}: {output['evalue']}" for output in outputs if output["output_type"] == "error"]


def inside_widgets(notebook: Any) -> list[Any]:
    """What callbacks showed or raised: it lands in the state of a widget, not in a cell."""
    state = notebook.metadata.get("widgets", {}).get(WIDGETS, {}).get("state", {})
    return [output for widget in state.values() for output in widget["state"].get("outputs", [])]


def cleaned(notebook: Any) -> Any:
    """The notebook as it is stored: the same bytes for the same pictures and numbers."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    for number, cell in enumerate(notebook.cells):
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _stays(output)]
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
            if "text/html" in output.get("data", {}):  # a styled table has a random name, and its object an address
                output.data["text/html"] = re.sub(r"\bT_[0-9a-f]{5}", f"T_{number}", output.data["text/html"])
                output.data["text/plain"] = re.sub(r" at 0x[0-9a-f]+", "", output.data["text/plain"])
    return notebook


def smaller(picture: str) -> str:
    """A PNG in base64 with 256 colours at the most: a third of the bytes, and no difference to see."""
    content = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    image.quantize(256).save(content, "png", optimize=True)
    return base64.b64encode(content.getvalue()).decode()


def _stays(output: Any) -> bool:
    talk = output.output_type == "stream" and output.name == "stderr"
    return not talk and "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


def main(names: list[str]) -> int:
    """Run and store the notebooks of these paths, or all; 1 when one fails."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums then do not depend on the number of cores
    for path in map(Path, names) if names else sorted(FOLDER.glob("*.ipynb")):
        print(path.name, file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            done = execute(nbformat.read(path, 4), Path(folder))
        if failed := errors(done):
            print(failed[0], file=sys.stderr)
            return 1
        nbformat.write(cleaned(done), path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
