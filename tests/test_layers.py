"""The main job around the numbers: options that must reach them, data that cannot be read, runs that are taken up."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from test_measure import NETWORK, Stop, close, features, quiet, run, scenes, settings, stored  # noqa: F401

from freqkd_analysis import conditions, layers, measure, provenance, schema, shards, summary
from freqkd_analysis.errors import BandsError, DataError, FreqkdError, NonFiniteError, RunError
from freqkd_analysis.plan import Machine

CPU = Machine("cpu", 4, 1)
FEW = {"layers": "3", "conditions": conditions.parse("grey,pixels,without_artefacts")}


def broken(scenes, names: set[str]):  # noqa: F811
    """The list with these pairs' infrared images cut short."""
    root = scenes.parent
    (root / "cut.png").write_bytes((root / "0i.png").read_bytes()[:60])
    lines = scenes.read_text().splitlines()
    cells = [line.split(",") for line in lines]
    made = [",".join([c[0], "cut.png", *c[2:]]) if c[2] in names else ",".join(c) for c in cells]
    path = root / f"cut{len(names)}.csv"
    path.write_text("\n".join(made) + "\n")
    return path


@pytest.mark.parametrize("how", [{"standardize": "channel"}, {"window": "hann"}])
def test_coherence_is_of_the_maps_that_the_spectra_are_of(scenes, tmp_path, how):  # noqa: F811
    plain = run(settings(scenes, **FEW), tmp_path / "plain")
    other = run(settings(scenes, **FEW, **how), tmp_path / "other")
    a, b = (schema.read(folder / "coherence.parquet") for folder in (plain, other))
    assert not a["coherence"].equals(b["coherence"])


def test_a_dct_run_has_no_coherence_counts_its_own_modes_and_refuses_edges_between_rings(scenes, tmp_path):  # noqa: F811
    made = run(settings(scenes, **FEW, window="dct"), tmp_path / "dct")
    weights = json.loads((made / "band_weights.json").read_text())
    assert not (made / "coherence.parquet").exists() and "not computed" in weights["rules"]["precision"]
    table = schema.read(made / "summary.csv").query("condition == 'paired' and layer == '3' and measure == 'modes'")
    assert weights["layers"][0]["modes"] == table["mean"].astype(int).tolist()
    assert summary.summarize(made, bands="0.25")["measure"] == "cosine"
    with pytest.raises(BandsError, match="cut stored rings of a DCT run"):
        summary.summarize(made, bands="0.2")


def test_what_is_told_otherwise_never_overwrites_the_run(scenes, tmp_path):  # noqa: F811
    made = run(settings(scenes, **FEW), tmp_path / "run")
    for otherwise in ({"bands": "0.25"}, {"floor": "noise"}, {"measures": ["mse"]}):
        with pytest.raises(RunError, match="need a folder of their own"):
            summary.summarize(made, out=made / ".." / made.name, **otherwise)


def test_the_seed_reaches_the_resampling(scenes, tmp_path):  # noqa: F811
    made = run(settings(scenes, **FEW, seed=5), tmp_path / "run")
    before = (made / "verdict.json").read_bytes()
    assert json.loads(before)["statistics"]["seed"] == 5
    summary.summarize(made)  # again by itself: the run's own seed, the same bytes
    assert (made / "verdict.json").read_bytes() == before


@pytest.mark.parametrize(("geometry", "size"), [("crop", [224, 320]), ("pad", [256, 320])])
def test_the_input_is_a_multiple_of_the_largest_reduction(scenes, geometry, size):  # noqa: F811
    asked = settings(scenes, model="resnet10t", size=(240, 320), geometry=geometry, layers="all")
    job = layers.prepare(asked, CPU, quiet)
    assert list(job.bench.geometry.size) == size
    assert [tap.stride for tap in job.bench.taps] == [2, 4, 8, 16, 32]


def test_weights_asked_for_stay_when_the_size_is_rounded(scenes):  # noqa: F811
    job = layers.prepare(settings(scenes, model="auto", size=(60, 60), layers="0", conditions=("paired",)), CPU, quiet)
    assert job.bench.network.source.startswith("random") and job.bench.geometry.size == (56, 56)


def test_the_twin_of_a_random_network_is_another_draw(scenes):  # noqa: F811
    job = layers.prepare(settings(scenes), CPU, quiet)
    assert "seed 0" in job.bench.network.source and "seed 1" in job.bench.twin.source


def test_pixels_leave_brightness_out_where_the_low_band_is_the_mean_alone(scenes, tmp_path):  # noqa: F811
    made = run(settings(scenes, **{**FEW, "layers": "4"}, model="resnet10t"), tmp_path / "run")
    rows = schema.read(made / "ratio.csv").query("condition == 'pixels' and measure == 'cosine'")
    assert rows["ratio"].isna().all()


def test_replaced_tokens_have_no_ceiling(scenes, tmp_path):  # noqa: F811
    more = conditions.parse("shuffled,grey,without_artefacts")
    made = run(settings(scenes, layers="3", conditions=more), tmp_path / "run")
    rows = schema.read(made / "ratio.csv").query("layer == 'all' and measure == 'cosine'").set_index("condition")
    assert pd.isna(rows.loc["without_artefacts", "calibrated_high"])
    assert not pd.isna(rows.loc["grey", "calibrated_high"])


def test_mean_maps_that_cannot_be_read_stop_the_run(scenes, tmp_path):  # noqa: F811
    job = layers.prepare(settings(scenes, layers="3"), CPU, quiet)
    lost = {record.id for record in job.plan.of_kind("mean")[0].records}
    with pytest.raises(DataError, match="no pair of the mean maps can be read"):
        run(settings(broken(scenes, lost), layers="3"), tmp_path / "run")


def test_an_unreadable_control_block_is_left_out(scenes, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(layers.plan, "CONTROL_BLOCK", 2)
    job = layers.prepare(settings(scenes, **FEW), CPU, quiet)
    lost = {record.id for record in job.plan.of_kind("control")[0].records}
    made = run(settings(broken(scenes, lost), **FEW), tmp_path / "run")
    assert set(schema.read(made / "coherence.parquet")["n"]) == {len(job.plan.control) - 2}


def test_nan_in_the_mean_pass_names_the_pair(scenes, tmp_path, monkeypatch):  # noqa: F811
    made = settings(scenes, layers="3")
    wanted = layers.prepare(made, CPU, quiet).plan.of_kind("mean")[0].records[1].id
    real = measure.load

    def poisoned(bench, records, shard):
        for item in real(bench, records, shard):
            if item.record.id == wanted:
                item.ir[:] = float("nan")
            yield item

    monkeypatch.setattr(measure, "load", poisoned)
    with pytest.raises(NonFiniteError, match=f"for pair {wanted}"):
        run(made, tmp_path / "run")


def test_resume_takes_another_max_bad_but_no_other_pairs(scenes, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(shards, "save", lambda *a: (_ for _ in ()).throw(Stop()))
    with pytest.raises(Stop):
        run(settings(scenes, **FEW), tmp_path / "cut")
    monkeypatch.undo()
    other = scenes.with_name("renamed.csv")
    other.write_text(scenes.read_text().replace("p03", "q03"))
    scenes_text, kept = scenes.read_text(), scenes
    try:
        kept.write_text(other.read_text())
        with pytest.raises(RunError, match="was started with ids"):
            run(settings(scenes, **FEW), tmp_path / "cut", resume=True)
    finally:
        kept.write_text(scenes_text)
    run(settings(scenes, **FEW, max_bad=3), tmp_path / "cut", resume=True)
    assert provenance.read_manifest(tmp_path / "cut")["config"]["max_bad"] == 3


def test_padding_is_told_a_tap(scenes, tmp_path):  # noqa: F811
    made = run(settings(scenes, **FEW, size=(60, 96), geometry="pad"), tmp_path / "run")
    tap = provenance.read_manifest(made)["taps"][0]
    assert tap["grid"] == [4, 6] and tap["padded_tokens"] == 6


def test_one_device_a_process(monkeypatch):
    monkeypatch.setattr(layers.torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert layers.device_of("auto") == "cuda:1"


@pytest.mark.parametrize("text", ["--5", "1,²", "5-"])
def test_numbers_that_are_none_are_read_as_names(scenes, text):  # noqa: F811
    with pytest.raises(FreqkdError, match="no layer matches"):
        layers.prepare(settings(scenes, layers=text), CPU, quiet)
