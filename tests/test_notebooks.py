"""The notebooks run, from top to bottom, in an empty folder; as stored they are small, whole and without logic."""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SLOW = ("2_layer_analysis", "4_from_student_to_detector", "5_your_own_modalities")
"""Above half a minute on two busy cores."""
NEEDS = ("nbclient", "ipykernel", "ipywidgets")
LARGEST = 400_000
CALLBACK = 8
"""Lines of the longest function that a notebook may define: a widget's callback, no logic."""
PATHS = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|Users|mnt|opt|usr|var)/|[A-Z]:\\")

Notebook = dict[str, Any]


def read(path: Path) -> Notebook:
    found: Notebook = json.loads(path.read_text(encoding="utf-8"))
    return found


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def code(notebook: Notebook) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def kinds(cell: dict[str, Any]) -> list[str]:
    """What a cell shows: MIME types, or the kind of output."""
    return [
        kind for output in cell.get("outputs", []) for kind in sorted(output.get("data", {output["output_type"]: 0}))
    ]


def faults(notebook: Notebook) -> list[str]:
    """What is wrong with a stored notebook."""
    cells, found = code(notebook), []
    if notebook["metadata"].get("kernelspec", {}).get("name") != "python3":
        found.append("the kernel is not python3")
    if set(notebook["metadata"]) - {"kernelspec", "language_info"}:
        found.append("metadata beside the kernel, such as the state of widgets")
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1 or not source(tagged[0]).startswith('data = "synthetic'):
        found.append('no one cell tagged parameters that starts with data = "synthetic')
    if [cell["execution_count"] for cell in cells] != list(range(1, len(cells) + 1)):
        found.append("not run from top to bottom")
    shown = [kind for cell in cells for kind in kinds(cell)]
    if "error" in shown:
        found.append("an error is stored")
    if any(output.get("name") == "stderr" for cell in cells for output in cell["outputs"]):
        found.append("talk on stderr is stored")
    text = json.dumps(
        [{k: v for k, v in o.get("data", o).items() if k != "image/png"} for c in cells for o in c["outputs"]]
    )
    if PATHS.search(text + "".join(map(source, notebook["cells"]))):
        found.append("a path of one machine")
    if len(json.dumps(notebook)) > LARGEST:
        found.append("larger than 400 kB")
    return found + logic(cells) + unexplained(notebook)


def logic(cells: list[dict[str, Any]]) -> list[str]:
    """Classes, and functions longer than a widget's callback."""
    nodes = [node for cell in cells for node in ast.walk(ast.parse(source(cell)))]
    found = [f"class {node.name}" for node in nodes if isinstance(node, ast.ClassDef)]
    for node in nodes:
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > CALLBACK:
            found.append(f"{node.name} is longer than a callback")
    return found


def unexplained(notebook: Notebook) -> list[str]:
    """Figures that no sentence on how to read them follows."""
    cells = notebook["cells"]
    return [
        f"cell {i}: a figure without how to read it"
        for i, cell in enumerate(cells)
        if "image/png" in kinds(cell) and not source(cells[i + 1]).startswith("**How to read it.**")
    ]


def test_there_are_five() -> None:
    assert [path.stem[0] for path in NOTEBOOKS] == list("12345")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_stored_notebook_is_whole(path: Path) -> None:
    notebook = read(path)
    assert faults(notebook) == []
    assert sum("image/png" in kinds(cell) for cell in code(notebook)) >= 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_headings_and_links(path: Path) -> None:
    words = [source(cell) for cell in read(path)["cells"] if cell["cell_type"] == "markdown"]
    assert words[0].startswith(f"# {path.stem[0]}. ") and sum(text.startswith("## ") for text in words) >= 4
    for target in re.findall(r"\]\(([^)]+)\)", "\n".join(words)):
        assert (path.parent / target).is_file(), f"links to {target}"


def spoil(notebook: Notebook, what: str) -> None:
    first, shown = code(notebook)[0], next(cell for cell in code(notebook) if "image/png" in kinds(cell))
    if what == "kernel":
        notebook["metadata"]["kernelspec"]["name"] = "other"
    elif what == "widgets":
        notebook["metadata"]["widgets"] = {}
    elif what == "parameters":
        first["metadata"] = {}
    elif what == "order":
        first["execution_count"] = 7
    elif what == "error":
        first["outputs"] = [{"output_type": "error", "ename": "E", "evalue": "", "traceback": []}]
    elif what == "stderr":
        first["outputs"] = [{"output_type": "stream", "name": "stderr", "text": ["step 3"]}]
    elif what == "path":
        first["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["/home/somebody/runs"]}]
    elif what == "size":
        shown["outputs"][0]["data"]["image/png"] = "A" * LARGEST
    elif what == "logic":
        first["source"] = [*first["source"], "\ndef f(x):", *["\n    x += 1"] * CALLBACK]
    elif what == "reading":
        notebook["cells"][notebook["cells"].index(shown) + 1]["source"] = ["Pretty."]


@pytest.mark.parametrize("what, says", [
    ("kernel", "not python3"), ("widgets", "widgets"), ("parameters", "parameters"), ("order", "top to bottom"),
    ("error", "error is stored"), ("stderr", "stderr"), ("path", "one machine"), ("size", "400 kB"),
    ("logic", "longer than a callback"), ("reading", "how to read it"),
])  # fmt: skip
def test_each_check_can_fail(what: str, says: str) -> None:
    notebook = copy.deepcopy(read(NOTEBOOKS[0]))
    spoil(notebook, what)
    found = faults(notebook)
    assert len(found) == 1 and says in found[0]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """tools/notebooks.py; the tests that run a notebook are skipped by name where its extra is not installed."""
    for name in NEEDS:
        pytest.importorskip(name, reason=f"notebooks: {name} is not installed")
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "tools" / "notebooks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(tool: ModuleType, path: Path, folder: Path, data: str = "") -> Any:
    """Execute a copy in `folder`; with `data`, another specification in the parameter cell."""
    from nbclient.exceptions import CellTimeoutError

    for seconds in (120, 400):
        notebook = tool.nbformat.read(path, 4)
        parameters = re.sub(r'^data = ".*?"', f'data = "{data}"', tool.parameter_cell(notebook).source) if data else ""
        try:
            return tool.execute(notebook, folder, parameters, seconds)
        except CellTimeoutError:
            # On a crowded machine a kernel's message can be lost, and its client then waits in vain: once more.
            if seconds == 400:
                raise
    return None


@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in SLOW else []) for path in NOTEBOOKS
])  # fmt: skip
def test_it_runs_and_shows_what_is_stored(path: Path, tool: ModuleType, tmp_path: Path) -> None:
    done = run(tool, path, tmp_path)
    assert tool.errors(done) == []
    moving = "widgets.interact(" in "".join(cell.source for cell in done.cells)
    assert moving == any("image/png" in output.get("data", {}) for output in tool.inside_widgets(done))
    assert [kinds(cell) for cell in code(tool.cleaned(done))] == [kinds(cell) for cell in code(read(path))]


@pytest.mark.timeout(600)
def test_the_first_takes_real_pairs(tool: ModuleType, kit: Path, tmp_path: Path) -> None:
    done = run(tool, NOTEBOOKS[0], tmp_path, f"kit:{kit}")
    assert tool.errors(done) == []
    pictures = [[output["data"]["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
                for cell in code(tool.cleaned(done))]  # fmt: skip
    stored = [[output["data"]["image/png"] for output in cell["outputs"] if "image/png" in output.get("data", {})]
              for cell in code(read(NOTEBOOKS[0]))]  # fmt: skip
    assert [len(cell) for cell in pictures] == [len(cell) for cell in stored]
    assert pictures[2] != stored[2]  # other images


def test_the_parameter_cell_is_what_is_run(tool: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no folder nowhere"):
        run(tool, NOTEBOOKS[0], tmp_path, "folder:nowhere:nowhere2")


def test_an_error_inside_a_widget_is_found(tool: ModuleType) -> None:
    """What a callback raises lands in the widget, not in the cell."""
    raised = {"output_type": "error", "ename": "BandsError", "evalue": "no", "traceback": []}
    state = {"a": {"state": {"value": 3}}, "b": {"state": {"outputs": [raised]}}}
    notebook = tool.nbformat.v4.new_notebook(metadata={"widgets": {tool.WIDGETS: {"state": state}}})
    assert tool.errors(notebook) == ["BandsError: no"]
    assert tool.errors(tool.cleaned(notebook)) == []


def test_cleaning_leaves_no_random_names(tool: ModuleType) -> None:
    table = {"text/html": '<table id="T_0a1b2"><td id="T_0a1b2_row0">', "text/plain": "<Styler at 0x7f00aa>"}
    output = tool.nbformat.v4.new_output("execute_result", table)
    notebook = tool.nbformat.v4.new_notebook(cells=[tool.nbformat.v4.new_code_cell("x", outputs=[output])])
    (shown,) = tool.cleaned(notebook).cells[0].outputs
    assert shown.data == {"text/html": '<table id="T_0"><td id="T_0_row0">', "text/plain": "<Styler>"}
