"""A damaged run folder is one line that names the file and the next step, in every command that reads it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import spectra_run
from fake_run import fake_run

from freqkd_analysis import comparison, provenance, schema, summary
from freqkd_analysis.console import console_table, released_table
from freqkd_analysis.errors import RunError
from freqkd_analysis.figures import write_figures
from freqkd_analysis.methods_text import write_methods
from freqkd_analysis.report import write_report

READERS = (write_figures, write_report, write_methods, console_table, released_table)


def changed(path: Path, change: Callable[[Any], Any]) -> None:
    """Rewrite a JSON file after `change` edited its content in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def one_line(call: Callable[[Path], Any], folder: Path, *says: str) -> None:
    with pytest.raises(RunError) as caught:
        call(folder)
    line = str(caught.value)
    assert "\n" not in line and all(words in line for words in says), line


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fake_run(tmp_path / "run", layers=2, pairs=6, groups=3)


MANIFESTS = [
    (lambda m: m["taps"][1].pop("grid"), "expected taps[1].grid, got none"),
    (lambda m: m["taps"][0].update(grid=[16]), "expected taps[0].grid to hold 2 values, got 1"),
    (lambda m: m["taps"][0].update(grid=[16, 0]), "grid, stride and channels of taps[0] to be above 0"),
    (lambda m: m["taps"][0].update(stride=None), "expected taps[0].stride to be a number, got null"),
    (lambda m: m["taps"][0].update(channels=True), "expected taps[0].channels to be a whole number, got true or false"),
    (lambda m: m["taps"][0].pop("tap"), "expected taps[0].tap, got none"),
    (lambda m: m["taps"][0].update(layer="0"), "expected taps[0].layer to be a whole number, got text"),
    (lambda m: m["taps"].clear(), "expected taps, got an empty list"),
    (lambda m: m.update(data=None), "expected data to be an object, got null"),
    (lambda m: m.update(network=None), "expected network to be an object, got null"),
    (lambda m: m["config"].update(bands=3), "expected config.bands to be text, got a whole number"),
    (lambda m: m.update(schema=99), "expected schema 1, got 99"),
    (lambda m: m.pop("schema"), "expected schema 1, got None"),
]


@pytest.mark.parametrize("change, says", MANIFESTS, ids=[says for _, says in MANIFESTS])
def test_every_reader_of_a_manifest_refuses_the_same(folder: Path, change: Callable[[Any], Any], says: str) -> None:
    changed(folder / "manifest.json", change)
    readers = (*READERS, provenance.read_manifest, summary.summarize, lambda run: summary.target_folder(run, "0.25"))
    for reader in readers:
        one_line(reader, folder, str(folder / "manifest.json"), says, "run `freqkd-analyze layers` again.")


def test_comparison_reads_the_manifest_too(tmp_path: Path) -> None:
    run = spectra_run.write_run(tmp_path / "r", {"paired": (0.5, 0.5)}, pairs=6, layers=1, with_coherence=False)
    summary.summarize(run, draws=20)
    changed(run / "manifest.json", lambda m: m.update(schema=99))
    one_line(lambda r: comparison.compare(r, r), run, "manifest.json: expected schema 1, got 99")


VERDICTS = [
    (lambda v: v.update(layers={"0": 1}), "expected layers to be a list, got an object"),
    (lambda v: v.update(layers=[1]), "expected layers[0] to be an object, got a whole number"),
    (lambda v: v.update(all="supports"), "expected all to be an object, got text"),
    (lambda v: v.update(beside=[]), "expected beside to be an object, got a list"),
    (lambda v: v["beside"].update(shifted_at_registration={"ratio": 1.2}), "shifted_at_registration.px, got none"),
    (lambda v: v["layer_ratios"].update(calibrated_geometric_ci=[1]), "calibrated_geometric_ci to hold 2 values"),
    (lambda v: v.update(warnings=[None]), "expected warnings[0] to be text, got null"),
    (lambda v: v.update(measure=["cosine"]), "expected measure to be text, got a list"),
    (lambda v: v.update(schema=2), "expected schema 1, got 2"),
]
WEIGHTS = [
    (lambda w: w.update(bands=["low", "high"]), "expected bands to be an object, got a list"),
    (lambda w: w["bands"].update(f_lo=[0.0]), "expected a name, f_lo and f_hi a band, got [3, 1, 3]"),
    (lambda w: w["bands"].update(names=None), "expected bands.names to be a list, got null"),
    (lambda w: w.update(layers={"0": {}}), "expected layers to be a list, got an object"),
    (lambda w: w["layers"][0].update(weights=[1.0]), "expected layers[0].weights to be an object, got a list"),
    (lambda w: w["layers"][0]["weights"].update(shared=["x"]), "layers[0].weights.shared"),
    (lambda w: w.update(schema=2), "expected schema 1, got 2"),
]


@pytest.mark.parametrize("name, change, says", [
    *(("verdict.json", *case) for case in VERDICTS), *(("band_weights.json", *case) for case in WEIGHTS)])  # fmt: skip
def test_json_of_another_shape(folder: Path, name: str, change: Callable[[Any], Any], says: str) -> None:
    changed(folder / name, change)
    for reader in READERS:
        one_line(reader, folder, str(folder / name), says, f"make it again: freqkd-analyze summarize {folder}")


def test_json_cut_short_or_of_other_bytes(folder: Path) -> None:
    for content in (b"", b"{", b"\xff\xfe", b"[" * 100_000):
        (folder / "verdict.json").write_bytes(content)
        one_line(write_report, folder, "verdict.json is not readable JSON", "freqkd-analyze summarize")
    (folder / "verdict.json").write_bytes(b"[]")
    one_line(write_report, folder, "verdict.json: expected an object, got a list", "freqkd-analyze summarize")


@pytest.mark.parametrize("name", ["summary.csv", "ratio.csv"])
@pytest.mark.parametrize("layer", ["zero", "-1", "1.0", None])
def test_a_layer_that_is_no_number(folder: Path, name: str, layer: str | None) -> None:
    table = schema.read(folder / name)
    table.loc[table["layer"] == "1", "layer"] = layer
    schema.write(table, folder / name)
    for reader in READERS:
        got = "nan" if layer is None else layer
        one_line(reader, folder, f'{folder / name}: expected a number or `all` in column layer, got "{got}"', "again")


def test_tables_without_rows_or_keys(folder: Path) -> None:
    table = schema.read(folder / "ratio.csv")
    schema.write(table.iloc[:0], folder / "ratio.csv")
    one_line(write_report, folder, "ratio.csv has no rows", "freqkd-analyze summarize")
    table.loc[0, "condition"] = None
    schema.write(table, folder / "ratio.csv")
    one_line(write_report, folder, "ratio.csv: expected text in column condition", "freqkd-analyze summarize")


@pytest.mark.parametrize("content, says", [
    (b"", "cannot be read as a table (EmptyDataError)"),
    (b"condition,layer\n\xff\xfe,1\n", "cannot be read as a table (UnicodeDecodeError)"),
    (b'a,b\n1,2\n1,2,3,"\n', "cannot be read as a table (ParserError)"),
    (b"condition,layer\n", "expected the columns of schema"),
    (b"condition,layer,band,measure,n,groups,width,ci_low,ci_high\npaired,zero,low,cosine,5,5,1,1,1\n", "column layer"),
    (b"condition,layer,band,measure,n,groups,width,ci_low,ci_high\npaired,all,low,cosine,5,5,wide,1,1\n", "ValueError"),
])  # fmt: skip
def test_a_convergence_table_that_is_none(folder: Path, content: bytes, says: str) -> None:
    (folder / "convergence.csv").write_bytes(content)
    for reader in READERS:
        one_line(reader, folder, "convergence.csv", says, "again")


def test_what_summarize_wrote_is_never_called_damaged(tmp_path: Path) -> None:
    for conditions in ({"paired": (0.5, 0.5)}, spectra_run.KNOWN):
        run = tmp_path / str(len(conditions))
        spectra_run.write_run(run, conditions, pairs=8, layers=1, registration_px=None)
        summary.summarize(run, draws=20)
        for reader in READERS:
            reader(run)


@pytest.mark.parametrize("name", ["spectra.parquet", "divergence.parquet"])
def test_a_flipped_bit_is_never_another_number(tmp_path: Path, name: str) -> None:
    """Whichever bit of the columns it is, and however the table is read: the table or a refusal."""
    run = spectra_run.write_run(tmp_path / "r", {"paired": (0.5, 0.5)}, pairs=6, layers=1, with_coherence=False)
    summary.summarize(run, draws=20)
    path, rng, came = run / name, np.random.default_rng(0), []
    content, good = path.read_bytes(), schema.read(path)
    end = len(content) - 8 - int.from_bytes(content[-8:-4], "little")  # the columns come before the footer
    for place in rng.integers(4, end, 40):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        for read in (schema.read, lambda p: pd.concat(list(schema.parts(p)), ignore_index=True)):
            try:
                assert read(path).equals(good)
                came.append("same")
            except RunError as error:
                assert name in str(error)
                came.append("refused")
        with contextlib.suppress(Exception):
            came.append("same" if pd.read_parquet(path).equals(good) else "another without checksums")
    assert came.count("refused") > 60 and came.count("another without checksums") > 5, came


@pytest.mark.parametrize("name", ["summary.csv", "verdict.json", "divergence.parquet"])
def test_a_folder_where_a_table_belongs_is_named_by_its_own_name(tmp_path: Path, name: str, capsys: Any) -> None:
    from freqkd_analysis import cli

    run = spectra_run.write_run(tmp_path / "r", {"paired": (0.5, 0.5)}, pairs=6, layers=1, with_coherence=False)
    (run / name).mkdir()
    with pytest.raises(SystemExit) as caught:
        cli.main(["summarize", str(run)])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"Error: Is a directory ({run / name}). ")
    assert not list(run.glob(".*.tmp"))
