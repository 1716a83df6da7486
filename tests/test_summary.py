"""Every table of a run from its spectra: whole, right, the same bytes again; runs compared; bad folders refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import spectra_run
from spectra_run import KNOWN

from freqkd_analysis import comparison, runfolder, schema, summary
from freqkd_analysis.calibration import calibrated_bands
from freqkd_analysis.divergence import MEASURES, cube
from freqkd_analysis.errors import BandsError, FreqkdError, RunError

WRITTEN = (
    "divergence.parquet", "summary.csv", "ratio.csv", "convergence.csv", "band_weights.json", "verdict.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = spectra_run.write_run(tmp_path_factory.mktemp("runs") / "known", KNOWN, spread=0.01)
    summary.summarize(folder)
    return folder


@pytest.fixture(scope="module")
def ratio(run) -> pd.DataFrame:
    return schema.read(run / "ratio.csv")


def cell(table: pd.DataFrame, column: str, **where: str):
    rows = table[np.logical_and.reduce([table[k] == v for k, v in where.items()])]
    assert len(rows) == 1
    return rows[column].iloc[0]


def test_every_table_is_written_and_readable(run):
    assert {p.name for p in run.iterdir()} == {"manifest.json", "spectra.parquet", "coherence.parquet", *WRITTEN}
    for name in ("divergence.parquet", "summary.csv", "ratio.csv"):
        assert len(schema.read(run / name))
    whole = runfolder.read_run(run)
    assert (whole.condition, whole.measure, whole.bands) == ("mean_removed", "cosine", ["low", "mid", "high"])
    assert whole.convergence is not None and len(whole.convergence)


def test_the_verdict_is_the_table(run, ratio):
    verdict = json.loads((run / "verdict.json").read_text())
    assert verdict["verdict"] == verdict["all"]["verdict"] == "supports"
    assert verdict["all"]["calibrated_ratio"] == pytest.approx(0.65 / 0.3, abs=0.1)
    for entry in [*verdict["layers"], verdict["all"] | {"layer": "all"}]:
        at = {"condition": "mean_removed", "measure": "cosine", "layer": str(entry["layer"])}
        assert entry["calibrated_ratio"] == pytest.approx(cell(ratio, "calibrated_ratio", **at), rel=1e-7)
        assert entry["ratio_ci"][0] == pytest.approx(cell(ratio, "ratio_ci_low", **at), rel=1e-7)
        assert entry["verdict"] == cell(ratio, "verdict", **at)
    beside = verdict["beside"]
    assert set(beside["paired"]) == {"cosine", "relative", "nmse", "mse", "mse_per_mode", "log_spectral"}
    assert beside["shifted_at_registration"]["px"] == 1.7 and beside["shifted_at_registration"]["ratio"] > 5
    assert verdict["layer_ratios"]["geometric"] <= verdict["layer_ratios"]["arithmetic"]
    assert verdict["statistics"] | {"draws": 2000, "seed": 0, "unit": "group", "units": 12} == verdict["statistics"]
    assert verdict["floor"] == "none" and verdict["warnings"] == []


def test_summary_means_are_plain_means(run):
    table, means = schema.read(run / "divergence.parquet"), schema.read(run / "summary.csv")
    for condition, measure, band in (("paired", "cosine", "high"), ("grey", "mse", "low"), ("noise", "modes", "mid")):
        rows = table[(table["condition"] == condition) & (table["measure"] == measure) & (table["band"] == band)]
        by_layer = rows.groupby("layer")["value"].mean()
        at = {"condition": condition, "measure": measure, "band": band}
        for layer, mean in [*by_layer.items(), ("all", by_layer.mean())]:
            assert cell(means, "mean", layer=str(layer), **at) == pytest.approx(mean, rel=1e-12)
            assert cell(means, "n", layer=str(layer), **at) == rows["pair"].nunique()
            assert cell(means, "groups", layer=str(layer), **at) == rows["group"].nunique()
    inside = means.dropna(subset=["ci_low"])
    assert (inside["ci_low"] <= inside["mean"] + 1e-12).all() and (inside["mean"] <= inside["ci_high"] + 1e-12).all()


def test_only_the_question_gets_a_verdict(ratio):
    judged = ratio[ratio["verdict"].fillna("") != ""]
    assert set(judged["condition"]) == {"paired", "mean_removed"}
    assert "energy_rgb" not in set(judged["measure"])
    assert set(ratio["condition"]) == set(KNOWN) and set(ratio["layer"]) == {"0", "1", "2", "all"}


def test_mse_is_never_shown_alone(tmp_path):
    folder = spectra_run.write_run(tmp_path / "run", KNOWN, pairs=12, layers=1)
    summary.summarize(folder, measures=["mse"], draws=50)
    for name in ("summary.csv", "ratio.csv", "divergence.parquet"):
        shown = set(schema.read(summary.target_folder(folder, measures=["mse"]) / name)["measure"])
        assert shown >= {"mse", "mse_per_mode", "cosine", "energy_rgb", "energy_ir", "modes"}
        assert "nmse" not in shown


def test_one_measure_brings_the_primary_and_the_energies(tmp_path):
    folder = spectra_run.write_run(tmp_path / "run", {"paired": (0.5, 0.5)}, pairs=12, layers=1)
    summary.summarize(folder, measures=["nmse"], draws=50)
    shown = set(schema.read(folder / "measures-nmse" / "ratio.csv")["measure"])
    assert shown == {"cosine", "nmse", "energy_rgb", "energy_ir", "modes"}


def test_band_weights_by_hand(run):
    weights = json.loads((run / "band_weights.json").read_text())
    assert weights["bands"]["names"] == ["low", "mid", "high"] and weights["bands"]["unit"] == "cycles per token"
    assert [entry["layer"] for entry in weights["layers"]] == [0, 1, 2]
    table = schema.read(run / "divergence.parquet")
    energy = table[(table["condition"] == "paired") & (table["measure"] == "energy_rgb") & (table["layer"] == 0)]
    energy = energy.groupby("band")["value"].mean()[["low", "mid", "high"]].to_numpy()
    first = weights["layers"][0]
    np.testing.assert_allclose(first["energy"], energy, rtol=1e-7)
    np.testing.assert_allclose(first["weights"]["shared"], [1, 0.5, 0.5], atol=0.03)
    assert sum(first["modes"]) == 256 and first["grid"] == [16, 16] and first["stride"] == 14
    precision = np.array(first["modes"]) / (energy * [0.25, 1, 1])  # coherence^2 0.75 below 1/8, 0 above
    np.testing.assert_allclose(first["weights"]["precision"], np.clip(precision / precision.max(), 0.01, 1), rtol=1e-6)
    assert weights["provenance"] == {"run": "known", "network": "vit", "data": "known", "n": 40}
    assert "mean_removed" in weights["rules"]["shared"]


def test_rules_without_their_rows_are_absent_and_say_why(tmp_path):
    folder = spectra_run.write_run(tmp_path / "r", {"paired": (0.5, 0.5)}, with_coherence=False, pairs=12, layers=1)
    verdict = summary.summarize(folder, draws=50)
    weights = json.loads((folder / "band_weights.json").read_text())
    assert weights["layers"][0]["weights"] == {}
    assert weights["rules"]["precision"] == "not computed: the run has no coherence.parquet"
    assert weights["rules"]["shared"].startswith("not computed: no condition with unrelated scenes")
    assert verdict["verdict"] == "undetermined" and verdict["condition"] == "paired"
    assert any("no rows of mean_removed" in text for text in verdict["warnings"])
    assert any("no rows of unrelated scenes" in text for text in verdict["warnings"])


def test_an_empty_band_has_null_for_a_weight(tmp_path):
    text = "0.02,0.05,0.3"  # nothing between 0.02 and 0.05 on 16 x 16
    folder = spectra_run.write_run(tmp_path / "run", KNOWN, pairs=24, layers=1, text=text)
    summary.summarize(folder, draws=100)
    entry = json.loads((folder / "band_weights.json").read_text())["layers"][0]
    assert entry["modes"][1] == 0
    assert entry["weights"]["shared"][1] is None and entry["weights"]["precision"][1] is None
    assert entry["energy"][1] is None and None not in entry["energy"][2:]
    row = schema.read(folder / "summary.csv").query("band == 'b1' and measure == 'cosine'")
    assert row["mean"].isna().all() and (row["n"] == 0).all()


def test_the_same_inputs_give_the_same_bytes(run, tmp_path):
    again = spectra_run.write_run(tmp_path / "known", KNOWN, spread=0.01)
    shuffled = schema.read(again / "spectra.parquet").sample(frac=1, random_state=1)
    schema.write(shuffled, again / "spectra.parquet")  # workers may write rows in any order
    summary.summarize(again)
    for name in WRITTEN:
        assert (run / name).read_bytes() == (again / name).read_bytes(), name


def test_another_seed_moves_intervals_only(run, tmp_path):
    summary.summarize(run, seed=1, out=tmp_path / "seed1")
    a, b = (schema.read(folder / "summary.csv") for folder in (run, tmp_path / "seed1"))
    pd.testing.assert_series_equal(a["mean"], b["mean"])
    assert not a["ci_low"].equals(b["ci_low"])


def test_other_bands_go_beside_the_run(run):
    before = {name: (run / name).read_bytes() for name in WRITTEN}
    verdict = summary.summarize(run, bands="0.25")
    folder = run / "rebanded-0.25"
    assert verdict["verdict"] == "supports"
    assert {name: (run / name).read_bytes() for name in WRITTEN} == before
    assert set(schema.read(folder / "divergence.parquet")["band"]) == {"low", "high"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["config"]["bands"], manifest["derived_from"]) == ("0.25", "known")
    assert runfolder.read_run(folder).bands == ["low", "high"]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"floor": "noise"}, "floor-noise"),
        ({"floor": "shifted:1.5"}, "floor-shifted-1.5"),
        ({"measures": ["nmse", "cosine"]}, "measures-cosine-nmse"),
        ({"bands": "0.25", "floor": "noise"}, "rebanded-0.25-floor-noise"),
    ],
)
def test_what_is_told_otherwise_goes_beside_the_run(run, options, name):
    """Its report and manifest say what its tables say, whatever else is asked of its spectra."""
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    verdict = summary.summarize(run, draws=100, **options)
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    assert summary.target_folder(run, **options) == run / name
    assert json.loads((run / name / "verdict.json").read_text()) == verdict
    told = json.loads((run / name / "manifest.json").read_text())
    assert told["derived_from"] == "known"
    assert set(told["config"].get("measure") or ()) == set(options.get("measures", ()))


def test_all_measures_of_a_run_that_has_all_are_its_own(run):
    assert summary.target_folder(run, measures=list(MEASURES)) == run


def test_the_floor_is_recorded_with_its_pixels(run, tmp_path):
    verdict = summary.summarize(run, floor="shifted", draws=100, out=tmp_path / "floor")
    assert verdict["floor"] == "shifted:1.7"
    rules = json.loads((tmp_path / "floor" / "band_weights.json").read_text())["rules"]
    assert rules["shared"].endswith("floor shifted:1.7")


def test_bands_the_run_cannot_give_write_nothing(run, tmp_path):
    with pytest.raises(BandsError, match=r"cut through|lies inside"):
        summary.summarize(run, bands="paper", out=tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "options, error, says",
    [
        ({"measures": ["cosin"]}, FreqkdError, 'Did you mean "cosine"'),
        ({"floor": "blur"}, FreqkdError, "the floor none, noise"),
        ({"floor": "shifted:12"}, RunError, "shifts up to 8 px"),
        ({"bands": "octve:3"}, BandsError, 'Did you mean "octave"'),
    ],
)
def test_wrong_options_write_nothing(run, tmp_path, options, error, says):
    with pytest.raises(error, match=says):
        summary.summarize(run, out=tmp_path / "no", **options)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "no manifest.json in"),
        ("{", "not readable JSON"),
        ("[]", "expected an object, got a list"),
        ('{"schema": 1, "config": {"bands": "octave:3"}, "data": {}, "taps": []}', "expected taps, got an empty list"),
    ],
)
def test_a_folder_that_is_no_run_is_refused(tmp_path, content, says):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(RunError, match=says):
        summary.summarize(tmp_path)


def test_a_run_without_the_question_is_refused(tmp_path):
    folder = spectra_run.write_run(tmp_path / "run", {"grey": (0.9, 0.9)}, pairs=12, layers=1)
    with pytest.raises(RunError, match="neither `paired` nor `mean_removed`"):
        summary.summarize(folder, draws=50)


def test_groups_unknown_are_said(tmp_path):
    folder = spectra_run.write_run(tmp_path / "run", KNOWN, pairs=20, layers=1, groups=1)
    verdict = summary.summarize(folder, draws=100)
    assert verdict["statistics"]["unit"] == "pair" and verdict["statistics"]["units"] == 20
    assert any("pairs are the unit" in text for text in verdict["warnings"])


def test_convergence_holds_both_ends_and_the_ratio(run):
    table = pd.read_csv(run / "convergence.csv")
    assert tuple(table.columns) == schema.CONVERGENCE
    assert set(table["band"]) == {"low", "high", "ratio"} and set(table["n"]) == {40}
    rows = table.query("condition == 'paired' and measure == 'cosine' and layer == 'all' and band == 'high'")
    means = schema.read(run / "summary.csv")
    at = {"condition": "paired", "measure": "cosine", "layer": "all", "band": "high"}
    assert rows["ci_low"].iloc[0] == pytest.approx(cell(means, "ci_low", **at), rel=1e-9)
    assert rows["width"].iloc[0] == pytest.approx(rows["ci_high"].iloc[0] - rows["ci_low"].iloc[0])


def test_runs_over_the_same_pairs_are_compared_by_pair(run, tmp_path):
    other = spectra_run.write_run(tmp_path / "other", {**KNOWN, "paired": (0.8, 0.3)}, spread=0.01)
    summary.summarize(other, draws=100)
    table = comparison.compare(other, run)
    assert tuple(table.columns) == comparison.COMPARISON and set(table["how"]) == {"paired"}
    at = {"condition": "paired", "layer": "all", "measure": "cosine"}
    assert cell(table, "difference", band="high", **at) == pytest.approx(0.1, abs=0.01)
    # The same seeds made both: what differs is the coherence alone, and pairing sees that.
    high, low = (cell(table, "ci_high", band=b, **at) - cell(table, "ci_low", band=b, **at) for b in ("high", "low"))
    assert cell(table, "ci_low", band="high", **at) > 0.09 and high < 0.005 and low == 0
    a, b = cell(table, "a", band="high", **at), cell(table, "b", band="high", **at)
    assert a - b == pytest.approx(cell(table, "difference", band="high", **at), rel=1e-9)


def test_runs_over_other_pairs_are_compared_unpaired(run, tmp_path):
    other = spectra_run.write_run(tmp_path / "other", KNOWN, spread=0.01, seed=5)
    table = schema.read(other / "spectra.parquet")
    schema.write(table.assign(pair="x" + table["pair"]), other / "spectra.parquet")
    summary.summarize(other, draws=100)
    got = comparison.compare(run, other)
    assert set(got["how"]) == {"unpaired"}
    row = got.query("condition == 'paired' and layer == 'all' and measure == 'cosine' and band == 'high'").iloc[0]
    assert row["ci_low"] < row["difference"] < row["ci_high"] and row["ci_low"] < 0 < row["ci_high"]


def test_runs_with_other_bands_are_not_compared(run, tmp_path):
    other = spectra_run.write_run(tmp_path / "other", KNOWN, pairs=12, text="0.25")
    summary.summarize(other, draws=50)
    with pytest.raises(RunError, match=r'same bands, got "octave:3" and "0.25"; run `freqkd-analyze summarize'):
        comparison.compare(run, other)


def test_calibrated_divergence_is_compared_too(run):
    """C of each side as calibration tells it; the difference of a run with itself is 0 with no width."""
    table = comparison.compare(run, run)
    rows = table[table["measure"] == comparison.CALIBRATED]
    values = cube(schema.read(run / "divergence.parquet"))
    for condition in ("paired", "mean_removed"):
        got = rows[rows["condition"] == condition]
        expected = calibrated_bands(values, condition)
        layered = got[got["layer"] != "all"]
        np.testing.assert_allclose(layered["a"].to_numpy().reshape(expected.shape), expected, rtol=1e-12)
        known = got["difference"].notna()
        assert known.any()
        assert (got[["difference", "ci_low", "ci_high"]][known] == 0).all(axis=None)


def test_calibrated_change_between_runs_is_resampled_together(run, tmp_path):
    """The question's divergence halved and the ceiling left alone: C halves, and every group agrees."""
    other = tmp_path / "other"
    shutil.copytree(run, other)
    table = schema.read(other / "divergence.parquet")
    question = table["condition"].isin(["paired", "mean_removed"]) & (table["measure"] == "cosine")
    table.loc[question, "value"] *= 0.5
    schema.write(table, other / "divergence.parquet")
    rows = comparison.compare(run, other)
    got = rows[(rows["measure"] == comparison.CALIBRATED) & (rows["condition"] == "mean_removed")].dropna()
    assert len(got)
    np.testing.assert_allclose(got["b"], got["a"] / 2, rtol=1e-9)
    assert (got["difference"] > 0).all()
    assert (got["ci_low"] > 0).all()
