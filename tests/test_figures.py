"""Every figure is drawn anew from results/, and what is drawn is compared with the tables, read by another road."""

from __future__ import annotations

import ast
import json
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS, FOLDER = ROOT / "results", ROOT / "figures"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if path.name != "common.py")
MOST_BYTES, MOST_LINES = 5_000_000, 40
NAMES = {"vit": "ViT-S/14", "lite0": "EfficientNet-Lite0", "mnv2": "MobileNetV2"}


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Figure, pd.DataFrame]]]:
    """Name -> the figure and the csv beside it, every script run once into a folder of the test."""
    out, patch = tmp_path_factory.mktemp("figures"), pytest.MonkeyPatch()
    patch.syspath_prepend(str(FOLDER))
    made = {}
    try:
        for path in SCRIPTS:
            patch.setattr(sys, "argv", [str(path), str(out)])
            figure = runpy.run_path(str(path), run_name="__main__")["figure"]
            assert {p.suffix for p in out.glob(f"{path.stem}.*")} == {".pdf", ".svg", ".png", ".csv"}
            made[path.stem] = figure, pd.read_csv(out / f"{path.stem}.csv")
        yield made
    finally:
        patch.undo()
        sys.modules.pop("common", None)


def bars(figure: Figure, axes: int = 0) -> dict[str, np.ndarray]:
    """Label -> x of the points that `errorbar` drew, in order, and both ends of each bar: (n, 3)."""
    found = {}
    for container in figure.axes[axes].containers:
        points, _, ends = container
        segments = np.array([segment[:, 0] for segment in ends[0].get_segments()])
        found[str(container.get_label())] = np.column_stack([points.get_xdata(), segments]).astype(float)
    return found


def csv(*parts: str) -> pd.DataFrame:
    return pd.read_csv(RESULTS.joinpath(*parts), dtype={"layer": str})


def ratio(run: str, condition: str, measure: str = "cosine", layer: str = "all") -> pd.Series:
    table = csv(run, "ratio.csv").set_index(["condition", "measure", "layer"])
    return table.loc[(condition, measure, layer)]


def test_the_map_shows_paired_over_unrelated_rings(figures: dict[str, Any]) -> None:
    mesh = figures["divergence_map"][0].axes[0].collections[0]
    table = csv("vit", "profile.csv")
    table = table.assign(layer=table["layer"].astype(int))
    own, ceiling = (
        table[table["condition"] == name].pivot(index="layer", columns="f_lo", values="value")
        for name in ("mean_removed", "mean_removed_shuffled")
    )
    assert mesh.get_array().shape[0] == 12
    np.testing.assert_allclose(mesh.get_array(), own.to_numpy() / ceiling.to_numpy(), rtol=1e-9)


def test_depth_shows_bands_ceilings_and_floors(figures: dict[str, Any]) -> None:
    axes = figures["low_high_by_depth"][0].axes[0]
    lines = {str(line.get_label()): np.asarray(line.get_ydata(), dtype=float) for line in axes.lines}
    containers = {c.get_label(): np.asarray(c[0].get_ydata(), dtype=float) for c in axes.containers}
    summary, floors = csv("vit", "summary.csv"), csv("vit", "floors.csv")
    summary = summary[(summary["measure"] == "cosine") & (summary["layer"] != "all")]
    for band in ("low", "high"):
        mean = {c: part["mean"].to_numpy() for c, part in summary[summary["band"] == band].groupby("condition")}
        np.testing.assert_allclose(containers[f"{band} band"], mean["mean_removed"], rtol=1e-9)
        np.testing.assert_allclose(lines[f"{band}, unrelated scenes"], mean["mean_removed_shuffled"], rtol=1e-9)
        for kind, label in (("registration", "2.1 px shift"), ("mean_removed_noise", "noise")):
            floor = floors[(floors["condition"] == kind) & (floors["band"] == band)]["mean"]
            np.testing.assert_allclose(lines[f"{band} band, {label}"], floor, rtol=1e-9)


def test_floors_are_those_of_the_verdict(figures: dict[str, Any]) -> None:
    """(D - floor) / (ceiling - floor) of the figure's floor gives the calibrated number of the run told again."""
    told = json.loads((RESULTS / "vit-floor-shifted" / "verdict.json").read_text())
    table = figures["low_high_by_depth"][1].set_index(["series", "layer"])["mean"]
    for entry in told["layers"]:
        for band in ("low", "high"):
            d, ceiling, floor = (
                table[name, entry["layer"]] for name in (band, f"{band} ceiling", f"{band} floor: 2.1 px shift")
            )
            assert (d - floor) / (ceiling - floor) == pytest.approx(entry[f"calibrated_{band}"], rel=1e-4)


def test_measures_are_geometric_means_over_layers(figures: dict[str, Any]) -> None:
    drawn = bars(figures["measures"][0])
    for run, name in NAMES.items():
        verdict = json.loads((RESULTS / run / "verdict.json").read_text())
        beside = verdict["beside"]["paired"]
        expected = [
            beside[m]["geometric"] for m in ("cosine", "relative", "nmse", "mse", "mse_per_mode", "log_spectral")
        ]
        expected += [verdict["layer_ratios"]["geometric"], verdict["layer_ratios"]["calibrated_geometric"]]
        np.testing.assert_allclose(drawn[name][:, 0], expected, rtol=1e-4)
        assert (drawn[name][:, 1] <= drawn[name][:, 0]).all() and (drawn[name][:, 0] <= drawn[name][:, 2]).all()


def test_controls_are_rows_of_the_ratio_table(figures: dict[str, Any]) -> None:
    figure, table = figures["controls"]
    for run in ("vit", "lite0"):
        conditions = table[table["series"] == NAMES[run]]["condition"]
        rows = [ratio(run, c) for c in conditions]
        expected = [(row["ratio"], row["ratio_ci_low"], row["ratio_ci_high"]) for row in rows]
        np.testing.assert_allclose(bars(figure)[NAMES[run]], expected, rtol=1e-6)
        assert {"paired", "shuffled", "mean_removed", "mean_removed_shuffled", "shifted:2"} <= set(conditions)


def test_all_pairs_of_the_subsets_are_the_verdict(figures: dict[str, Any]) -> None:
    for run, name in NAMES.items():
        row = ratio(run, "mean_removed")
        whole = (row["calibrated_ratio"], row["calibrated_ci_low"], row["calibrated_ci_high"])
        np.testing.assert_allclose(bars(figures["subsets"][0])[name][0], whole, rtol=1e-5)


def test_lost_energy_is_half_of_the_lone_border(figures: dict[str, Any]) -> None:
    """[-h, h) lacks the mirror of one row and one column: 2 (4h - 1) modes keep half their amplitude in each band, a
    quarter of their energy twice, so that half of it is gone."""
    white = figures["masks"][0].axes[3].lines[0]
    for side, percent in zip(white.get_xdata(), white.get_ydata(), strict=True):
        half = max(1, int(side * 0.5 / 2))
        assert percent == pytest.approx(100 * (4 * half - 1) / side**2, abs=1e-9)


def test_shares_of_the_gradient_add_up_and_are_those_drawn(figures: dict[str, Any]) -> None:
    shares = csv("distilled", "shares.csv")
    np.testing.assert_allclose(shares.groupby(["run", "step"])["share"].sum(), 1.0, atol=1e-4)
    axes = figures["training"][0].axes
    for place, run in ((2, "vit-to-vit/freqkd-0"), (3, "vit-to-vit/measured-0")):
        own = shares[shares["run"] == run]
        for line in axes[place].lines:
            band = str(line.get_label()).removesuffix(" band")
            np.testing.assert_allclose(
                line.get_ydata(), own[own["band"] == band].groupby("step")["share"].sum(), rtol=1e-9
            )
    terms = csv("distilled", "terms.csv")
    low = terms[(terms["run"] == "vit-to-vit/freqkd-0") & (terms["band"] == "low")]["term"].to_numpy()
    drawn = axes[0].lines[0].get_ydata()
    assert drawn[50] == pytest.approx(low[46:55].mean()) and len(drawn) == len(low)


def test_held_out_changes_are_after_less_before(figures: dict[str, Any]) -> None:
    figure, table = figures["heldout"]
    heldout = csv("distilled", "heldout.csv")
    heldout = heldout[heldout["measure"] == "calibrated cosine"].set_index(["run", "band"])
    for place, study in enumerate(("vit-to-vit", "vit-to-lite0", "lite2-to-lite0")):
        for band in ("low", "high"):
            names = table[(table["study"] == study) & (table["band"] == band)]["run"]
            rows = heldout.loc[[(name, band) for name in names]]
            got = bars(figure, place)[band]
            np.testing.assert_allclose(got[:, 0], rows["after"] - rows["before"], atol=2e-6)
            np.testing.assert_allclose(got[:, 1:], rows[["ci_low", "ci_high"]], rtol=1e-9)


def test_downstream_differences_are_those_of_the_seeds(figures: dict[str, Any]) -> None:
    """The mean over seeds of an arm less that of no distillation, from each seed's own figure."""
    table = figures["downstream"][1]
    seeds = csv("downstream", "seeds.csv").groupby(["study", "metric", "method"])["value"].mean()
    for row in table.to_dict("records"):
        there = seeds[row["study"], row["metric"]]
        assert row["to_none"] == pytest.approx(there[row["method"]] - there["none"], abs=1e-4)
        assert row["to_none_low"] < row["to_none"] < row["to_none_high"]
    drawn = bars(figures["downstream"][0], 1)["Lite0, HIT-UAV"]
    rows = table[table["study"] == "lite0-hituav"]
    np.testing.assert_allclose(drawn, rows[["to_none", "to_none_low", "to_none_high"]], rtol=1e-9)


def test_the_pictures_of_the_readme_show_the_results(figures: dict[str, Any]) -> None:
    shown = re.findall(r"docs/images/(\w+)\.svg", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(shown) == 2
    for name in shown:
        kept = pd.read_csv(ROOT / "docs" / "images" / f"{name}.csv")
        pd.testing.assert_frame_equal(kept, figures[name][1], obj=f"{name}: run `make figures`; its table")


def test_miss_rates_of_the_curves_are_those_in_the_legend(figures: dict[str, Any]) -> None:
    """The log-average at nine points, computed from the drawn line, is the figure that stands beside its name."""
    rates = csv("detectors", "figures.csv").set_index(["figure", "detector"])["value"]
    lines = figures["detectors"][0].axes[0].lines[: len(rates["mr_all"])]
    assert len(lines) == 5
    for line in lines:
        fppi, missed = (np.asarray(data, dtype=float) for data in line.get_data())
        at = [int(np.argmin(np.abs(np.log(fppi / point)))) for point in 10.0 ** np.linspace(-2, 0, 9)]
        name, _, rest = str(line.get_label()).partition(" ")
        average = 100 * np.exp(np.log(missed[at]).mean())
        assert average == pytest.approx(rates["mr_all", name], rel=1e-4)
        assert float(rest.split()[0]) == pytest.approx(average, abs=0.05)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_short_and_says_what_it_shows(path: Path, figures: dict[str, Any]) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    assert (ast.get_docstring(ast.parse(text)) or "").endswith(".")
    figure = figures[path.stem][0]
    words = figure.get_suptitle() + " ".join(str(axis.get_title()) for axis in figure.axes)
    assert path.stem == "masks" or "n = " in words or "(n pairs" in words, "how many pairs or images?"
    for axis in figure.axes:
        label, shared = (
            axis.get_xlabel(),
            axis.get_label() == "<colorbar>" or not axis.xaxis.get_tick_params()["labelbottom"],
        )
        assert label or shared, "an axis without a name"


def test_results_are_small_and_hold_no_image() -> None:
    files = [path for path in RESULTS.rglob("*") if path.is_file()]
    assert files and sum(path.stat().st_size for path in files) <= MOST_BYTES
    assert {path.suffix for path in files} <= {".csv", ".json", ".parquet"}


@pytest.mark.parametrize("folder", sorted(p for p in RESULTS.iterdir() if p.is_dir()), ids=lambda path: path.name)
def test_every_folder_says_where_it_comes_from(folder: Path) -> None:
    made = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert {"data", "network", "n", "command", "seed", "seconds", "commit"} <= set(made)
    assert isinstance(made["n"], int) and made["n"] > 0 and made["seconds"] > 0 and made["command"]
    for path in folder.iterdir():
        text = path.read_text(encoding="utf-8")
        for start in ("/home/", "/tmp/", "/root/", "/work/", "/Users/", ":\\\\"):
            assert start not in text, f"{path.name} names a folder of a machine"
