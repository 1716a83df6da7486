"""The house holds: imports go down, one home for the Fourier transform, short files, no call that runs foreign code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A row imports from rows above it only. docs/architecture.md says what lives where.
ROWS = """
    errors
    schema
    provenance
    runfolder
    bands  statistics  data.records  data.decode  data.world  data.textures  data.painter
    spectral  divergence  features  conditions  data.listing  data.things  data.sensors
    calibration  spectrometer  shards  plan  data.scenes
    band_weights  demo  data.writers  similarity
    summary  models  data.synthetic
    data.layouts  comparison
    data.verify  measure
    plots  methods_text  console
    figures  terminal
    report
    options  inspection  layers  commands
    cli
    __main__
"""
TRAIN_ROWS = """
    yaml_text
    config  metrics.boxes  metrics.card  metrics.miou
    checkpoint  schedule  metrics_file  downstream  annotation_files  metrics.matching
    faults  losses  baselines  transforms  kaist_annotations  metrics.kaist
    loop  taps  student  pairs  teacher_cache  annotation_sets  metrics.coco
    engine  distill  heldout  export  pyramid  ignored  annotations  metrics.intervals
    recipes  leaks  targets  detection  segmentation  result_files
    job  arms  assembly  score
    revisit  predictions  score_figures
    finetune  evaluate
    compare
    study  choose
    cli
    __main__
"""
PACKAGES = ("freqkd_analysis", "freqkd_train")


def levels(rows: str) -> dict[str, int]:
    return {name: row for row, line in enumerate(rows.split("\n")) for name in line.split()}


LEVELS = {"freqkd_analysis": levels(ROWS), "freqkd_train": levels(TRAIN_ROWS)}
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.Module, name: str, is_package: bool) -> set[str]:
    """Dotted names that a module imports, anywhere in it; `from a import b` counts as a and a.b."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[: len(name.split(".")) - node.level + is_package] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def dotted(tree: ast.Module) -> set[str]:
    """Attribute chains such as torch.fft.rfft2, with import aliases put back, and everything imported."""
    alias = {"np": "numpy", "th": "torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            alias |= {item.asname: item.name for item in node.names if item.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            alias |= {item.asname or item.name: f"{node.module}.{item.name}" for item in node.names}
    chains = set()
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name):
            chains.add(".".join([alias.get(node.id, node.id), *reversed(parts)]))
    return chains


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def wrong_imports(name: str, imported: set[str], package: str = "freqkd_analysis") -> list[str]:
    """Imports of `name` (dotted, within the package) that the house does not allow."""
    level = LEVELS[package]
    inside = {i.removeprefix(f"{package}.") for i in imported if i.startswith(f"{package}.")}
    wrong = [other for other in inside & set(level) if level[other] >= level[name] and other != name]
    if package == "freqkd_train":
        return sorted(wrong)
    return sorted(wrong + [i for i in imported if i.split(".")[0] == "freqkd_train"])


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name != "__init__.py"], ids=module)
def test_imports_go_down(path: Path) -> None:
    package, _, name = module(path).partition(".")
    assert name in LEVELS[package], f"{module(path)} has no row: add it to ROWS and to docs/architecture.md"
    assert wrong_imports(name, imports(parse(path), module(path), is_package=False), package) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_row_names_a_module(package: str) -> None:
    there = {module(path).removeprefix(f"{package}.") for path in SOURCES}
    assert sorted(set(LEVELS[package]) - there) == []


def test_package_files_import_nothing_of_ours() -> None:
    for path in SOURCES:
        if path.name == "__init__.py":
            ours = [i for i in imports(parse(path), module(path), is_package=True) if i.split(".")[0] in PACKAGES]
            assert ours == [], f"{module(path)} imports {ours}"


@pytest.mark.parametrize("path", SOURCES, ids=module)
def test_only_spectral_names_a_transform(path: Path) -> None:
    tree = parse(path)
    named = dotted(tree) | imports(tree, module(path), path.name == "__init__.py")
    homes = ("torch.fft", "numpy.fft", "scipy.fft", "scipy.fftpack", "torch.stft")
    # Frequencies of modes are integers over a length, no transform: bands may ask NumPy for their order.
    harmless = ("numpy.fft.fftfreq", "numpy.fft.rfftfreq")
    transforms = [n for n in named if n.startswith(homes) and n not in (*harmless, "numpy.fft")]
    if module(path) == "freqkd_analysis.spectral":
        assert transforms, "the transform has left its home"
    else:
        assert transforms == []


@pytest.mark.parametrize("path", SOURCES, ids=module)
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def foreign_code(tree: ast.Module) -> list[str]:
    """Calls and imports that may run code out of a file or from the network."""
    found = [
        n for n in dotted(tree) if n.startswith(("torch.hub", "yaml.load", "yaml.unsafe_load", "pickle.", "dill."))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            given = {k.arg: k.value for k in node.keywords}
            safe = given.get("weights_only")
            if "weights_only" in given and not (isinstance(safe, ast.Constant) and safe.value is True):
                found.append("weights_only other than True")
            if "trust_remote_code" in given:
                found.append("trust_remote_code")
            called = ast.unparse(node.func)
            if called == "torch.load" and "weights_only" not in given:
                found.append("torch.load without weights_only=True")
            if called in ("eval", "exec"):
                found.append(called)
    return sorted(found)


@pytest.mark.parametrize("path", SOURCES, ids=module)
def test_nothing_runs_foreign_code(path: Path) -> None:
    assert foreign_code(parse(path)) == []


@pytest.mark.parametrize(
    "code, expected",
    [
        ("import freqkd_train.cli", ["freqkd_train.cli"]),
        ("from freqkd_analysis import cli", ["cli"]),
        ("from freqkd_analysis.data.layouts import kit", ["data.layouts"]),
        ("def f():\n    from . import plots", ["plots"]),
        ("from .data import verify", ["data.verify"]),
        ("from freqkd_analysis import errors, schema, __version__", []),
        ("import numpy as np", []),
    ],
)
def test_the_import_check_can_fail(code: str, expected: list[str]) -> None:
    assert wrong_imports("bands", imports(ast.parse(code), "freqkd_analysis.bands", is_package=False)) == expected


def test_the_import_check_knows_the_second_package() -> None:
    found = imports(ast.parse("from freqkd_train import cli, config"), "freqkd_train.losses", is_package=False)
    assert wrong_imports("losses", found, "freqkd_train") == ["cli"]


@pytest.mark.parametrize(
    "code",
    [
        "import torch\nx = torch.fft.rfft2",
        "import torch.fft as F",
        "from torch import fft",
        "from scipy.fft import dctn",
        "import numpy as np\nnp.fft.fft2(x)",
    ],
)
def test_the_transform_check_can_fail(code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "freqkd_analysis" / "plots.py"
    path.parent.mkdir()
    path.write_text(code)
    monkeypatch.setattr("test_architecture.ROOT", tmp_path)
    with pytest.raises(AssertionError):
        test_only_spectral_names_a_transform(path)


@pytest.mark.parametrize(
    "code, says",
    [
        ("import torch\ntorch.load(p)", "torch.load without weights_only=True"),
        ("import torch\ntorch.load(p, weights_only=False)", "weights_only other than True"),
        ("import torch\ntorch.load(p, weights_only=flag)", "weights_only other than True"),
        ("import yaml\nyaml.load(f)", "yaml.load"),
        ("import torch as t\nt.hub.load(a, b)", "torch.hub.load"),
        ("f(trust_remote_code=True)", "trust_remote_code"),
        ("from pickle import loads\nloads(x)", "pickle.loads"),
    ],
)
def test_the_foreign_code_check_can_fail(code: str, says: str) -> None:
    assert says in foreign_code(ast.parse(code))
    assert foreign_code(ast.parse("import torch, yaml\ntorch.load(p, weights_only=True)\nyaml.safe_load(f)")) == []
