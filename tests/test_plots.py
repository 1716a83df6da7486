"""Figures: they show the tables' numbers, twice the same bytes, and leave out what a run does not hold."""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fake_run import ALL, MEASURES, fake_run
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from freqkd_analysis import plots, schema
from freqkd_analysis.errors import RunError
from freqkd_analysis.figures import FIGURES, draw_figures, write_figures
from freqkd_analysis.runfolder import read_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = fake_run(tmp_path_factory.mktemp("runs") / "whole", layers=12, bands=3)
    write_figures(folder)
    return folder


def table_of(run: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(run / "figures" / f"{name}.csv")


def test_every_figure_is_written_three_times(run: Path) -> None:
    expected = {f"{name}.{suffix}" for name in FIGURES for suffix in ("svg", "png", "csv")} | {"left_out.json"}
    assert {path.name for path in (run / "figures").iterdir()} == expected
    for name in FIGURES:
        assert (run / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        ET.parse(run / "figures" / f"{name}.svg")


def test_map_and_lines_hold_the_numbers_of_the_summary(run: Path) -> None:
    summary = schema.read(run / "summary.csv").set_index(["condition", "measure", "layer", "band"])["mean"]
    for _, row in table_of(run, "layer_band_map").iterrows():
        band = row["band"].split(" ")[0]
        assert row["mean"] == summary["mean_removed", "cosine", str(row["layer"]), band]
    lines = table_of(run, "low_high_by_layer")
    assert len(lines) == 4 * 12
    for _, row in lines.iterrows():
        ceiling = row["series"].endswith("ceiling")
        assert row["condition"] == ("mean_removed_shuffled" if ceiling else "mean_removed")
        assert row["band"] == row["series"].split(" ")[0]
        assert row["mean"] == summary[row["condition"], "cosine", str(row["layer"]), row["band"]]


def test_ratio_controls_and_convergence_hold_the_numbers_of_their_tables(run: Path) -> None:
    ratio = schema.read(run / "ratio.csv").set_index(["condition", "measure", "layer"])
    for _, row in table_of(run, "ratio_by_layer").iterrows():
        expected = ratio.loc[("mean_removed", "cosine", str(row["layer"]))]
        names = ("ratio", "ratio_ci_low") if row["kind"] == "raw" else ("calibrated_ratio", "calibrated_ci_low")
        assert (row["ratio"], row["ci_low"]) == (expected[names[0]], expected[names[1]])
    summary = schema.read(run / "summary.csv").set_index(["condition", "measure", "layer", "band"])
    controls = table_of(run, "controls")
    assert list(dict.fromkeys(controls["condition"]))[:3] == ["paired", "mean_removed", "shuffled"]
    assert set(controls["condition"]) == set(ALL) and set(controls["layer"]) == {"all"}
    for _, row in controls.iterrows():
        assert row["ci_high"] == summary.loc[(row["condition"], "cosine", "all", row["band"])]["ci_high"]
    width = table_of(run, "convergence")
    assert list(width[width["band"] == "low"]["width"]) == pytest.approx([0.9 / g**0.5 for g in (12, 22, 34, 41)])


def test_profile_is_one_minus_the_correlation_of_energies_summed_over_pairs(run: Path) -> None:
    spectra = pd.read_parquet(run / "spectra.parquet")
    spectra = spectra[(spectra["condition"] == "mean_removed") & (spectra["layer"] == 7)]
    profile = table_of(run, "radial_profile")
    profile = profile[profile["layer"] == 7].set_index("radius")["value"]
    for radius, part in spectra.groupby("radius"):
        expected = 1 - part["cross"].sum() / np.sqrt(part["p_rgb"].sum() * part["p_ir"].sum())
        assert profile[radius] == pytest.approx(expected, abs=1e-10)
    assert len(profile) == spectra["radius"].nunique()


def test_the_same_tables_give_the_same_bytes(run: Path, tmp_path: Path) -> None:
    again = fake_run(tmp_path / "again", layers=12, bands=3)
    write_figures(again)
    for path in sorted((run / "figures").iterdir()):
        assert path.read_bytes() == (again / "figures" / path.name).read_bytes(), path.name


def test_a_user_style_does_not_change_a_figure(run: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "svg.fonttype": "path"}):
        drawn, _ = draw_figures(read_run(run), png=False)
    assert drawn[0].svg == (run / "figures" / f"{drawn[0].name}.svg").read_text()


@pytest.mark.parametrize("layers, bands", [(1, 2), (24, 5), (2, 3)])
def test_any_number_of_layers_and_bands(tmp_path: Path, layers: int, bands: int) -> None:
    folder = fake_run(tmp_path, layers=layers, bands=bands)
    assert len(write_figures(folder)) == 3 * len(FIGURES)
    assert len(table_of(folder, "layer_band_map")) == layers * bands
    shown = table_of(folder, "low_high_by_layer")
    assert set(shown["band"]) == {"low", "high"}


def test_missing_conditions_leave_figures_out_with_a_reason(tmp_path: Path) -> None:
    folder = fake_run(tmp_path, layers=3)
    write_figures(folder)
    fake_run(tmp_path, layers=3, conditions=["paired"])
    (folder / "convergence.csv").unlink()
    names = {path.stem for path in write_figures(folder)}
    left_out = json.loads((folder / "figures" / "left_out.json").read_text())
    assert set(left_out) == {"controls", "equivalent_shift", "convergence"}
    assert names == set(FIGURES) - set(left_out)
    assert "one condition" in left_out["controls"] and "shifted" in left_out["equivalent_shift"]
    assert not (folder / "figures" / "controls.svg").exists(), "a stale figure of the run before stayed"
    assert set(table_of(folder, "ratio_by_layer")["kind"]) == {"raw"}
    assert set(table_of(folder, "low_high_by_layer")["series"]) == {"low", "high"}


def test_a_run_without_spectra_or_with_other_columns_says_so(tmp_path: Path) -> None:
    folder = fake_run(tmp_path, layers=1)
    (folder / "spectra.parquet").unlink()
    assert "no spectra.parquet" in draw_figures(read_run(folder), png=False)[1]["radial_profile"]
    pd.DataFrame({"a": [1]}).to_parquet(folder / "spectra.parquet")
    with pytest.raises(RunError, match=r"spectra\.parquet: expected the columns"):
        write_figures(folder)


def test_one_sample_size_is_no_convergence(tmp_path: Path) -> None:
    folder = fake_run(tmp_path, layers=1)
    table = pd.read_csv(folder / "convergence.csv").query("n == 50")
    table.to_csv(folder / "convergence.csv", index=False)
    assert "one sample size only (n = 50)" in draw_figures(read_run(folder), png=False)[1]["convergence"]


def test_other_bands_of_a_run_find_the_spectra_of_that_run(tmp_path: Path) -> None:
    whole = fake_run(tmp_path / "run", layers=2)
    other = fake_run(whole / "rebanded-linear-2", layers=2, bands=2, derived_from="run")
    (other / "spectra.parquet").unlink()
    assert draw_figures(read_run(other), png=False)[1] == {}


def axes() -> tuple[Figure, object]:
    figure = Figure(figsize=(3.3, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def test_ratios_not_above_zero_are_counted_not_drawn() -> None:
    table = pd.DataFrame({"kind": ["raw", "raw", "calibrated"], "layer": [0, 1, 1], "ratio": [1.5, -0.2, np.nan],
                          "ci_low": [1.0, -1.0, np.nan], "ci_high": [2.0, 0.5, np.nan]})  # fmt: skip
    figure, ax = axes()
    assert plots.ratio_by_layer(table, ax, "cosine") is ax
    assert any("2 not above 0" in t.get_text() for t in ax.texts)
    figure.savefig(io.BytesIO(), format="svg")


def test_an_interval_that_misses_its_mean_is_drawn_without_that_side() -> None:
    table = pd.DataFrame({"series": ["low", "high"], "layer": [0, 0], "mean": [0.5, 0.6], "ci_low": [0.51, np.nan],
                          "ci_high": [0.6, np.nan]})  # fmt: skip
    figure, ax = axes()
    plots.low_high_by_layer(table, ax, "cosine")
    figure.savefig(io.BytesIO(), format="svg")


def test_a_shift_beyond_the_largest_is_a_triangle_and_the_rest_are_points() -> None:
    table = pd.DataFrame({"layer": [0, 1], "band": "high", "shift_px": ["3.1", "> 8"], "ci_low": ["2.8", "7"],
                          "ci_high": ["3.4", "> 8"]})  # fmt: skip
    _, ax = axes()
    plots.equivalent_shift(table, ax)
    points = {(line.get_marker(), float(np.asarray(line.get_ydata())[0])) for line in ax.lines if len(line.get_ydata())}
    assert {("s", 3.1), ("^", 8.0), ("_", 2.8), ("_", 7.0)} == points


def test_an_empty_band_is_named_not_coloured() -> None:
    table = pd.DataFrame({"layer": [0, 0], "band": ["low", "high"], "mean": [0.4, np.nan]})
    _, ax = axes()
    plots.layer_band_map(table, ax, "cosine")
    assert [t.get_text() for t in ax.texts] == ["0.400", "no mode"]


def test_every_axis_names_its_unit_and_every_title_its_n(run: Path) -> None:
    drawn, _ = draw_figures(read_run(run), png=False)
    for figure in drawn:
        assert "n = " in figure.title or "n per row" in figure.title
        words = " ".join(ET.fromstring(figure.svg).itertext())
        units = ("cycles per token", "input pixels", "0 same", "no unit", "units of")
        assert any(unit in words for unit in units), figure.name
    assert set(plots.UNITS) == {m for m in MEASURES if m not in ("energy_rgb", "modes")}
