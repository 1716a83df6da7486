"""What a reader may rely on everywhere: one home of the transform, visible before infrared, words on public names."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import re
import tokenize
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from freqkd_analysis import conditions, divergence, layers, schema
from freqkd_analysis.bands import Bands
from freqkd_analysis.data.records import PairedSample, PairRecord
from freqkd_analysis.plan import Machine, Settings
from freqkd_analysis.spectral import CrossSpectrum, band_energies, cross_spectrum, phase_correlation, split_bands
from freqkd_analysis.spectrometer import Spectrometer

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for package in ("freqkd_analysis", "freqkd_train") for path in (ROOT / package).rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in SOURCES]

# Transforms by name, whatever the library; fftfreq, the order of modes, is none.
TRANSFORM = re.compile(r"\b(?!r?fftfreq\b|fftshift\b)(i?[rh]?fft[2n]?|i?d[cs]t[n]?|i?stft|czt|fftpack|fftconvolve|"
                       r"pywt|rfft\w*|power_spectrum|periodogram|welch)\b")  # fmt: skip


def code_of(text: str) -> str:
    """The source without comments and strings."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    skipped = (
        tokenize.COMMENT,
        tokenize.STRING,
        *(getattr(tokenize, n) for n in ("FSTRING_MIDDLE",) if hasattr(tokenize, n)),
    )
    return " ".join(token.string for token in tokens if token.type not in skipped)


def transforms(text: str) -> list[str]:
    named = TRANSFORM.findall(re.sub(r"\bfft \. r?fftfreq\b", "", code_of(text)))
    return sorted(set(named))


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_only_spectral_names_a_transform(path):
    found = transforms(path.read_text(encoding="utf-8"))
    assert ("fft2" in found) if path.name == "spectral.py" else (found == []), found


@pytest.mark.parametrize(
    "line",
    ["x = torch.fft.rfft2(y)", "from scipy.fft import dctn", "import scipy.fft as sf", "np.fft.fft(x)",
     "from scipy.signal import stft", "getattr(torch, 'x').fft", "from scipy import fftpack", "signal.welch(x)"],
)  # fmt: skip
def test_the_transform_check_can_fail(line):
    assert transforms(line)
    assert not transforms('f = np.fft.fftfreq(8)  # not torch.fft.fft2\n"""scipy.fft"""\nfftfreq(3)\nwindow == "dct"')


# Words ----------------------------------------------------------------------------------------------------------

# Public names of other hands that still want their line; this list may only get shorter.
WANTING = {
    "freqkd_analysis/data/decode.py": {"rgb_from_pixels", "ir_from_pixels"},
    "freqkd_analysis/data/listing.py": {"number", "light"},
    "freqkd_analysis/schema.py": {"write_text"},
}


def undocumented(tree: ast.Module) -> set[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    return {node.name for node in public if not ast.get_docstring(node)}


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_public_names_have_docstrings(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "a module says what it is for"
    assert undocumented(tree) - WANTING.get(str(path.relative_to(ROOT)), set()) == set()


def test_the_docstring_check_can_fail():
    assert undocumented(ast.parse('def f():\n    pass\ndef _g(): pass\nclass H:\n    """h"""')) == {"f"}


@pytest.mark.parametrize("function", [Bands.parse, band_energies, cross_spectrum, split_bands, phase_correlation])
def test_stable_functions_show_an_example(function):
    text = inspect.getdoc(function) or ""
    assert "Example:" in text and ">>> " in text


# Which is which -------------------------------------------------------------------------------------------------


def test_visible_comes_before_infrared_in_every_signature():
    def first_two(function):
        return [name.split("_")[0] for name in inspect.signature(function).parameters if name != "self"][:2]

    assert CrossSpectrum._fields == ("pa", "pb", "re", "pd")
    assert first_two(cross_spectrum) == first_two(Spectrometer.measure) == ["x", "y"]
    assert first_two(phase_correlation) == ["a", "b"] and first_two(PairedSample) == ["rgb", "ir"]
    fields = list(PairRecord.__dataclass_fields__)
    assert fields.index("rgb") < fields.index("ir")
    columns = list(schema.SPECTRA)
    assert columns.index("p_rgb") + 1 == columns.index("p_ir")


def test_nmse_divides_by_the_visible_energy():
    """The error of the infrared map against its teacher's energy: Pd / Pa."""
    nmse = divergence.MEASURES["nmse"]
    one = np.ones(1)
    assert nmse(4 * one, one, one, 3 * one, one, one, one) == pytest.approx(0.75)


def no_progress(total: int):
    return contextlib.nullcontext(lambda step, what: None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same six pairs twice; the second time the infrared images alone are blurred."""
    root, rng = tmp_path_factory.mktemp("which"), np.random.default_rng(0)
    lists: dict[str, list[str]] = {"sharp": [], "blurred": []}
    for number in range(6):
        visible, infrared = (rng.integers(0, 256, (90, 110, c)).astype(np.uint8) for c in (3, 1))
        Image.fromarray(visible).save(root / f"{number}v.png")
        for name in lists:
            image = infrared[..., 0] if name == "sharp" else scipy.ndimage.gaussian_filter(infrared[..., 0], 1.5)
            Image.fromarray(image).save(root / f"{number}{name}.png")
            lists[name].append(f"{number}v.png,{number}{name}.png,p{number},g{number % 3},day")
    tables = {}
    for name, lines in lists.items():
        (root / f"{name}.csv").write_text("\n".join(["rgb,ir,id,group,time", *lines]) + "\n")
        made = Settings(pairs=6, data=f"csv:{root / name}.csv", model="vit_tiny_patch16_224", weights="random",
                        size=(64, 80), layers="0", control_pairs=4,
                        conditions=conditions.parse("shuffled,grey,noise,pixels"))  # fmt: skip
        layers.run(made, Machine("cpu", 4, 1), root / name, False, lambda text: None, no_progress, ["test"])
        tables[name] = schema.read(root / name / "spectra.parquet")
    return tables


def test_blurring_the_infrared_images_moves_p_ir_alone(runs):
    sharp, blurred = runs["sharp"], runs["blurred"]
    keys = ["condition", "pair", "layer", "radius"]
    both = sharp.merge(blurred, on=keys, suffixes=("", "_blurred"), validate="one_to_one")
    assert len(both) == len(sharp) == len(blurred)
    for condition, rows in both.groupby("condition", observed=True):
        np.testing.assert_allclose(rows["p_rgb"], rows["p_rgb_blurred"], rtol=1e-5, err_msg=str(condition))
        moved = not np.allclose(rows["p_ir"], rows["p_ir_blurred"], rtol=1e-3)
        assert moved == (condition in ("paired", "shuffled", "pixels")), condition
    pixels = both[both["condition"].eq("pixels") & both["f_lo"].ge(0.25)]
    assert pixels["p_ir_blurred"].sum() < 0.95 * pixels["p_ir"].sum()


def test_controls_compare_the_visible_image_with_itself_changed(runs):
    """Their `p_rgb` is the pair's own, ring by ring."""
    table = runs["sharp"]
    keys = ["pair", "layer", "radius"]
    pair = table[table["condition"].eq("paired")].set_index(keys)["p_rgb"]
    for condition in ("grey", "noise"):
        rows = table[table["condition"].eq(condition)].set_index(keys)["p_rgb"]
        np.testing.assert_allclose(rows, pair.loc[rows.index], rtol=1e-4)
