"""The streamed run against a plain float64 reimplementation: one image at a time, np.fft.fft2, boolean masks."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image

from freqkd_analysis import conditions, layers, plan, schema, shards
from freqkd_analysis.errors import DataError, FreqkdError, NonFiniteError, RunError
from freqkd_analysis.plan import Machine, Settings

SIZE = (64, 96)  # 4 x 6 tokens of 16 px, and 2 x 3 at stride 32
NETWORK = "vit_tiny_patch16_224"


def quiet(text: str) -> None:
    pass


@contextlib.contextmanager
def no_progress(total: int):
    yield lambda step, what: None


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """14 pairs in 5 groups of smooth noise, visible and infrared partly alike."""
    root, rng = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    rows = []
    for number in range(14):
        base = np.cumsum(np.cumsum(rng.standard_normal((90, 130, 3)), 0), 1)
        for name, image in (("v", base), ("i", base[..., :1] + np.cumsum(rng.standard_normal((90, 130, 1)), 1))):
            image = 255 * (image - image.min()) / np.ptp(image)
            mode = image.astype(np.uint8)
            Image.fromarray(mode if name == "v" else mode[..., 0]).save(root / f"{number}{name}.png")
        rows.append(f"{number}v.png,{number}i.png,p{number:02d},g{number % 5},{'day' if number % 2 else 'night'}")
    (root / "list.csv").write_text("rgb,ir,id,group,time\n" + "\n".join(rows) + "\n")
    return root / "list.csv"


def settings(scenes: Path, **more) -> Settings:
    base = {"pairs": 14, "data": f"csv:{scenes}", "model": NETWORK, "weights": "random", "size": SIZE,
            "layers": "0,5,11", "control_pairs": 6, "conditions": conditions.parse("all")}  # fmt: skip
    return Settings(**{**base, **more})


def run(made: Settings, out: Path, machine: Machine | None = None, resume: bool = False) -> Path:
    layers.run(made, machine or Machine("cpu", 4, 2), out, resume, quiet, no_progress, ["test"])
    return out


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory) -> Path:
    return run(settings(scenes), tmp_path_factory.mktemp("runs") / "whole")


def features(job: layers.Job, record, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """(C, H, W) float64 of the visible and the infrared image, straight from timm."""
    loaded = conditions.frames(layers.layouts.decode(record, "unit"), job.bench.geometry)
    views = [job.bench.geometry.view(frame) for frame in loaded]
    config = job.bench.network.model.pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    out = []
    for view in views:
        with torch.no_grad():
            maps = job.bench.network.model.forward_intermediates((view[None] - mean) / std, intermediates_only=True)
        out.append(maps[layer][0].double().numpy())
    return out[0], out[1]


def band_sums(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(3, 4) pa, pb, re, pd of octave:3 by complex FFT and float radii."""
    fx, fy = (np.fft.fft2(z, norm="ortho") for z in (x, y))
    radius = np.hypot(np.fft.fftfreq(x.shape[1])[:, None], np.fft.fftfreq(x.shape[2]))
    masks = [radius < 0.125, (radius >= 0.125) & (radius < 0.25), radius >= 0.25]
    return np.array([[(abs(fx[:, m]) ** 2).sum(), (abs(fy[:, m]) ** 2).sum(), (fx[:, m] * fy[:, m].conj()).real.sum(),
                      (abs(fx[:, m] - fy[:, m]) ** 2).sum()] for m in masks])  # fmt: skip


def stored(run_folder: Path, condition: str, pair: str, layer: int) -> np.ndarray:
    table = schema.read(run_folder / "spectra.parquet")
    rows = table[(table["condition"] == condition) & (table["pair"] == pair) & (table["layer"] == layer)]
    band = np.searchsorted([0.125, 0.25], rows["f_lo"], side="right")
    energies = rows[["p_rgb", "p_ir", "cross", "p_diff"]].to_numpy()
    return np.array([energies[band == k].sum(0) for k in range(3)])


def close(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, atol=2e-6 * expected.max(), rtol=2e-6)


@pytest.fixture(scope="module")
def job(scenes) -> layers.Job:
    return layers.prepare(settings(scenes), Machine("cpu", 4, 1), quiet)


def test_paired_spectra_match_an_fft_of_timm_features(finished, job):
    for record in job.plan.records[:3]:
        for layer in (0, 11):
            close(stored(finished, "paired", record.id, layer), band_sums(*features(job, record, layer)))


def test_shuffled_compares_a_pair_with_another_groups_infrared(finished, job):
    """The chain: each pair meets the infrared image of the pair before it in its block, the first that of the last."""
    block = job.plan.of_kind("main")[1]
    for i in (0, 2):
        this, other = block.records[i], block.records[i - 1]
        assert this.group != other.group
        expected = band_sums(features(job, this, 5)[0], features(job, other, 5)[1])
        close(stored(finished, "shuffled", this.id, 5), expected)


def test_mean_removed_subtracts_means_over_the_other_fold(finished, job):
    for block in job.plan.of_kind("main")[:2]:
        means = job.plan.of_kind("mean")[1 - block.fold].records
        assert not {r.group for r in means} & {r.group for r in block.records}
        maps = [features(job, record, 11) for record in means]
        mean_x, mean_y = (np.mean([m[side] for m in maps], axis=0) for side in (0, 1))
        this, other = block.records[1], block.records[0]
        x, y = features(job, this, 11)
        close(stored(finished, "mean_removed", this.id, 11), band_sums(x - mean_x, y - mean_y))
        shuffled = band_sums(x - mean_x, features(job, other, 11)[1] - mean_y)
        close(stored(finished, "mean_removed_shuffled", this.id, 11), shuffled)


def test_shifted_is_the_mean_of_both_directions(finished, job):
    record = job.plan.control[0]
    rgb, _ = conditions.frames(layers.layouts.decode(record, "unit"), job.bench.geometry)
    geometry, network = job.bench.geometry, job.bench.network
    views = [geometry.view(rgb), geometry.view(rgb, dx=4), geometry.view(rgb, dy=4)]
    with torch.no_grad():
        maps = network.model.forward_intermediates(job.bench.input(views, network), intermediates_only=True)[5]
    base, right, down = maps.double().numpy()
    close(stored(finished, "shifted:4", record.id, 5), (band_sums(base, right) + band_sums(base, down)) / 2)
    assert torch.equal(views[1][:, :, :-4], views[0][:, :, 4:])  # moved by real pixels, no wrap, no fill


def test_pixels_use_the_same_physical_frequencies(finished, job):
    record = job.plan.control[1]
    frames = conditions.frames(layers.layouts.decode(record, "unit"), job.bench.geometry)
    x, y = (job.bench.grey(job.bench.geometry.view(frame)).astype(float) for frame in frames)
    fx, fy = np.fft.fft2(x, norm="ortho"), np.fft.fft2(y, norm="ortho")
    radius = 16 * np.hypot(np.fft.fftfreq(x.shape[0])[:, None], np.fft.fftfreq(x.shape[1]))
    mask = (radius >= 0.125) & (radius < 0.25)
    got = stored(finished, "pixels", record.id, 0)[1]
    np.testing.assert_allclose(got[2], (fx * fy.conj()).real[mask].sum(), rtol=1e-6)


def test_every_condition_has_its_rows(finished, job):
    table = schema.read(finished / "spectra.parquet")
    counts = table.groupby("condition")["pair"].nunique()
    assert set(counts.index) == {*conditions.CONDITIONS, "mean_removed_shuffled"}
    assert counts["paired"] == counts["mean_removed"] == 14
    assert counts["grey"] == counts["random"] == len(job.plan.control)


@pytest.mark.parametrize("machine", [Machine("cpu", 1, 0), Machine("cpu", 14, 3)])
def test_batch_size_and_workers_leave_the_numbers(finished, scenes, tmp_path, machine):
    other = schema.read(run(settings(scenes), tmp_path / "other", machine) / "spectra.parquet")
    table = schema.read(finished / "spectra.parquet")
    pd.testing.assert_frame_equal(table.iloc[:, :10], other.iloc[:, :10])
    for name in ("p_rgb", "p_ir", "cross", "p_diff"):
        np.testing.assert_allclose(table[name], other[name], rtol=2e-5, atol=1e-5 * table[name].abs().max())


def test_order_of_the_list_leaves_the_bytes(scenes, tmp_path):
    lines = scenes.read_text().splitlines()
    turned = scenes.with_name("turned.csv")
    turned.write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    few = {"conditions": conditions.parse("shuffled,mean_removed"), "layers": "3"}
    a = run(settings(scenes, **few), tmp_path / "a")
    b = run(settings(turned, **few), tmp_path / "b")
    assert (a / "spectra.parquet").read_bytes() == (b / "spectra.parquet").read_bytes()


class Stop(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interrupted_run_resumes_to_the_same_bytes(finished, scenes, tmp_path, monkeypatch, after):
    """Stopped inside the write of a shard: the half-written file is there, the shard is not."""
    real, count = shards.save, 0

    def save(folder, block, shard):
        nonlocal count
        if count == after:
            shards.path_of(folder, block).parent.mkdir(exist_ok=True)
            shards.path_of(folder, block).write_bytes(b"PK half a shard")
            raise Stop
        count += 1
        real(folder, block, shard)

    monkeypatch.setattr(shards, "save", save)
    with pytest.raises(Stop):
        run(settings(scenes), tmp_path / "cut")
    monkeypatch.setattr(shards, "save", real)
    run(settings(scenes), tmp_path / "cut", resume=True)
    for name in ("spectra.parquet", "divergence.parquet", "coherence.parquet", "summary.csv", "ratio.csv"):
        assert (tmp_path / "cut" / name).read_bytes() == (finished / name).read_bytes(), name


def test_resume_refuses_other_settings(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "save", lambda *a: (_ for _ in ()).throw(Stop()))
    with pytest.raises(Stop):
        run(settings(scenes), tmp_path / "cut")
    with pytest.raises(RunError, match="seed = 0, now 1"):
        run(settings(scenes, seed=1), tmp_path / "cut", resume=True)


def test_a_taken_folder_is_refused(finished, scenes):
    with pytest.raises(RunError, match="exists; give another --out"):
        run(settings(scenes), finished)


def test_unreadable_pairs_are_skipped_listed_and_bounded(scenes, tmp_path):
    root = scenes.parent
    broken = root / "broken.csv"
    lines = scenes.read_text().splitlines()
    (root / "bad.png").write_bytes((root / "3v.png").read_bytes()[:60])
    broken.write_text("\n".join(lines).replace("\n3v.png", "\nbad.png").replace("13i.png", "bad.png") + "\n")
    few = {"conditions": ("paired", "shuffled"), "layers": "3"}
    made = run(settings(broken, **few), tmp_path / "run")
    manifest = layers.provenance.read_manifest(made)
    assert [skip["id"] for skip in manifest["data"]["skipped"]] == ["p03", "p13"]
    assert manifest["data"]["n"] == 12
    with pytest.raises(DataError, match="more than --max-bad 1"):
        run(settings(broken, max_bad=1, **few), tmp_path / "run2")


def test_nan_features_name_layer_and_pair(scenes, tmp_path, monkeypatch):
    real = timm.models.vision_transformer.VisionTransformer._pos_embed

    def poisoned(self, x):
        out = real(self, x)
        out[0, 3, 7] = float("nan")
        return out

    monkeypatch.setattr(timm.models.vision_transformer.VisionTransformer, "_pos_embed", poisoned)
    with pytest.raises(NonFiniteError, match=r"layer 0 \(blocks.0\) are not finite for pair p\d\d"):
        run(settings(scenes, conditions=("paired",), layers="0"), tmp_path / "run")


def test_one_group_leaves_out_what_needs_others(scenes, tmp_path):
    said: list[str] = []
    text = scenes.read_text()
    for number in range(1, 5):
        text = text.replace(f",g{number},", ",g0,")
    alone = scenes.with_name("alone.csv")
    alone.write_text(text)
    made = settings(alone, conditions=conditions.parse("shuffled,mean_removed"), layers="3")
    layers.run(made, Machine("cpu", 4, 1), tmp_path / "run", False, said.append, no_progress, ["test"])
    assert any("one group" in line for line in said)
    assert set(schema.read(tmp_path / "run" / "spectra.parquet")["condition"]) == {"paired"}


def test_more_pairs_than_there_are_uses_all_and_says_so(scenes):
    said: list[str] = []
    made = layers.prepare(settings(scenes, pairs=99, layers="0"), Machine("cpu", 4, 1), said.append)
    assert len(made.plan.records) == 14
    assert any("asked for 99 pairs, there are 14" in line for line in said)


def test_plan_depends_on_records_and_seed_alone(job):
    turned = plan.make(list(reversed(job.plan.records)), job.plan.settings)
    assert [[r.id for r in b.records] for b in turned.blocks] == [[r.id for r in b.records] for b in job.plan.blocks]


def test_dry_run_writes_nothing_and_counts_the_work(scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = layers.dry_run(layers.prepare(settings(scenes), Machine("cpu", 4, 1), quiet))
    assert said["pairs"] == 14 and said["seconds"] > 0 and len(said["layers"]) == 3
    assert list(tmp_path.iterdir()) == []


def test_unknown_layers_and_presets_say_what_is_near(scenes):
    with pytest.raises(FreqkdError, match="layer 12 is out of range; the network has layers 0 to 11"):
        layers.prepare(settings(scenes, layers="12"), Machine("cpu", 4, 1), quiet)
    with pytest.raises(FreqkdError, match='no layer matches "block.*"'):
        layers.prepare(settings(scenes, layers="block.*"), Machine("cpu", 4, 1), quiet)


def test_cka_and_mmd_over_the_control_pairs(scenes, tmp_path, job):
    """Descriptors are band amplitudes a channel: CKA by hand from the same features."""
    made = run(settings(scenes, cka=True, mmd=True, conditions=("paired",), layers="5"), tmp_path / "run")
    table = schema.read(made / "similarity.csv")
    assert table["measure"].tolist() == ["cka", "mmd"] * 3 and set(table["n"]) == {6}
    rows = []
    for record in job.plan.control:
        pair = [np.fft.fft2(maps, norm="ortho") for maps in features(job, record, 5)]
        radius = np.hypot(np.fft.fftfreq(4)[:, None], np.fft.fftfreq(6))
        rows.append([np.sqrt((np.abs(z[:, radius >= 0.25]) ** 2).sum(1)) for z in pair])
    x, y = np.swapaxes(rows, 0, 1)
    got = table[(table["band"] == "high") & (table["measure"] == "cka")]["value"].item()
    assert got == pytest.approx(layers.similarity.debiased_cka(x, y), abs=1e-4)
