"""The whole job on a small scale: files, plain student, adapters, before and after, resume, replay, bad input."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import load_file

from freqkd_analysis import comparison, models
from freqkd_analysis.errors import FreqkdError, NetworkError, RunError
from freqkd_analysis.features import read_taps
from freqkd_train import config, distill, heldout, job, recipes, revisit, taps
from freqkd_train import student as students
from freqkd_train.config import Config

TEACHER_LAYERS = "3,7"
FAST = {
    "data.spec": "synthetic:pairs=16,groups=8,size=96x72", "data.size": [48, 64], "data.limit": 16,
    "data.holdout": 0.3, "teacher.name": "freqkd_demo", "teacher.layers": TEACHER_LAYERS, "student.rank": 2,
    "training.epochs": 2, "training.batch": 4, "training.lr": 1e-2, "training.device": "cpu",
}  # fmt: skip


def quiet(text: str) -> None:
    pass


def settings(**changes: object) -> Config:
    return Config().updated(FAST | {key.replace("__", "."): value for key, value in changes.items()})


def run(out: Path, made: Config, resume: bool = False) -> dict:
    return job.run(made, out, resume, quiet, ["freqkd-train", "distill"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "lora"
    run(out, settings())
    return out


@pytest.fixture(scope="module")
def crossed(tmp_path_factory) -> Path:
    """A ViT teacher, a convolutional student from random weights: projectors, other grids, batch statistics."""
    out = tmp_path_factory.mktemp("runs") / "cross"
    run(out, settings(student__name="mobilenetv2_050", student__weights="random", student__layers="2,3",
                      data__size=[96, 128]))  # fmt: skip
    return out


def test_a_run_leaves_what_it_says(finished):
    there = {path.name for path in finished.iterdir()}
    assert there == {"config.yaml", "manifest.json", "metrics.jsonl", "timings.jsonl", "checkpoints", "adapter",
                     "heldout", "student.safetensors", "model_card.md"}  # fmt: skip
    figure = {f"change_by_layer.{suffix}" for suffix in ("csv", "svg", "png")}
    assert {path.name for path in (finished / "heldout").iterdir()} == {"before", "after", "change.csv", *figure}
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["data"]["train"] + manifest["data"]["held"] == 16
    assert manifest["outcome"]["steps"] == 2 * (manifest["data"]["train"] // 4)
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert set(lines[0]["terms"]) == {f"blocks.{n}/{band}" for n in (3, 7) for band in ("low", "high")}
    assert sum(lines[0]["terms"].values()) == pytest.approx(lines[0]["loss"], rel=1e-5)
    assert sum(lines[0]["shares"].values()) == pytest.approx(1)
    assert [line for line in lines if "val/loss" in line][-1]["val/loss"] > 0


def test_the_student_is_the_base_plus_half_of_the_adapters(finished):
    """Rebuilt from adapter/ and the base alone, with the formula written out."""
    base = models.create("freqkd_demo", size=(48, 64)).model.state_dict()
    adapter = load_file(finished / "adapter" / "adapter_model.safetensors")
    student = load_file(finished / "student.safetensors")
    assert set(student) == set(base)
    told = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    moved = 0
    for name, value in student.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        expected = base[name].double()
        if f"{stem}.lora_A.weight" in adapter:
            a, b = (adapter[f"{stem}.lora_{x}.weight"].double() for x in "AB")
            expected = expected + 0.5 * told["lora_alpha"] / told["r"] * b @ a
            moved += bool(b.any())
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6)
    assert moved > 10


def test_the_card_loads_the_student(finished, monkeypatch):
    card = (finished / "model_card.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(finished)
    done = subprocess.run(
        [sys.executable, "-c", code + "\nprint(type(model).__name__)"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.strip() == "VisionTransformer", done.stderr
    change = pd.read_csv(finished / "heldout" / "change.csv")
    row = change.query(
        "condition == 'mean_removed' and layer == 'all' and measure == 'cosine' and band == 'high'"
    ).iloc[0]
    assert f"{row['before']:.3g}" in card and f"{row['after']:.3g}" in card


def test_a_student_of_timm_loads_by_the_cards_line(crossed, monkeypatch):
    """Plain `timm.create_model(..., checkpoint_path=...)`, key for key what was exported."""
    monkeypatch.chdir(crossed)
    line = json.loads((crossed / "manifest.json").read_text())["loading"]
    assert 'timm.create_model("mobilenetv2_050", num_classes=0, checkpoint_path="student.safetensors")' in line
    model = timm.create_model("mobilenetv2_050", num_classes=0, checkpoint_path="student.safetensors")
    for name, value in load_file("student.safetensors").items():
        assert torch.equal(model.state_dict()[name], value), name
    assert not (crossed / "adapter").exists()  # nothing was trained by LoRA


def test_a_fixed_size_student_says_its_size(tmp_path):
    """A plain ViT of timm by the card's line, at the size it was trained at."""
    from freqkd_train import export

    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=(48, 64))
    assert export.fixed_size(model) and not export.fixed_size(timm.create_model("resnet18"))
    export.save(model, model.state_dict(), tmp_path)
    lines = export.loading_lines("vit_tiny_patch16_224.augreg_in21k", (48, 64), True)
    done = subprocess.run([sys.executable, "-c", lines + "\nprint(tuple(model.pos_embed.shape))"], cwd=tmp_path,
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout.strip() == "(1, 13, 192)", done.stderr


def test_held_out_numbers_are_the_analysis_own(finished):
    after, before = finished / "heldout" / "after", finished / "heldout" / "before"
    again = comparison.compare(after, before)
    told = pd.read_csv(finished / "heldout" / "change.csv", dtype={"layer": str})
    np.testing.assert_allclose(told["difference"], again["difference"], rtol=1e-9)
    np.testing.assert_allclose(told["before"], again["b"], rtol=1e-9)
    assert set(told["layer"]) == {"3", "7", "all"}


def test_before_is_what_the_analysis_says_of_the_start(finished):
    """The start's student is its teacher: `layers` on the held-out pairs gives the same divergences."""
    from freqkd_analysis import measure, plan, schema

    made = job.prepare(settings(), quiet)
    asked = plan.Settings(
        pairs=len(made.held), model="freqkd_demo", weights="auto", layers=TEACHER_LAYERS, size=(48, 64)
    )
    network = models.create("freqkd_demo", size=(48, 64))
    found = [t for t, _ in made.paired]
    bench = measure.Bench(plan.make(made.held, asked), network, found, made.geometry, made.conversion)
    ours = schema.read(finished / "heldout" / "before" / "spectra.parquet").query("condition == 'paired'")
    for block in bench.plan.of_kind("main"):
        shard = measure.main_block(bench, block, Path(), lambda n, text: None)
        for i, (name, _) in enumerate(shard.pairs["paired"]):
            rows = ours[(ours["pair"] == name) & (ours["layer"] == 7)]["p_diff"].to_numpy()
            values = shard.energies["paired", 7][i][:, 3]
            np.testing.assert_allclose(rows, values[bench.bands[7].atoms().modes > 0], rtol=1e-5)


def test_training_reaches_what_it_is_for(finished):
    """The unmerged change brings held-out features closer to the teacher's than chance would: the loss falls."""
    losses = [json.loads(line).get("val/loss") for line in (finished / "metrics.jsonl").read_text().splitlines()]
    known = [value for value in losses if value is not None]
    assert known[-1] < known[0]


def test_the_teacher_is_untouched_and_in_no_checkpoint(tmp_path):
    made = job.prepare(settings(), quiet)
    job.ready(made, quiet)
    before = heldout.state_digest(made.teacher.model)
    made.step.train()
    job.train(made, tmp_path, False, quiet)
    assert heldout.state_digest(made.teacher.model) == before
    assert not any(p.requires_grad for p in made.teacher.model.parameters()) and not made.teacher.model.training
    assert not any("teacher" in name for name in made.step.state_dict())
    from freqkd_train import checkpoint

    _, state = checkpoint.newest_valid(tmp_path, quiet)
    assert all(".lora_" in name or name == "scale" for name in state["module"])


def test_the_saved_settings_replay_the_run(finished, tmp_path):
    run(tmp_path / "again", config.read(finished / "config.yaml"))
    for name in ("student.safetensors", "metrics.jsonl", "heldout/change.csv"):
        assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_finished_run_is_taken_up_without_harm(finished):
    before = (finished / "student.safetensors").read_bytes()
    run(finished, settings(), resume=True)
    assert (finished / "student.safetensors").read_bytes() == before


def test_another_setting_is_not_resumed_but_another_machine_is(finished):
    with pytest.raises(RunError, match=r"was started with training\.lr = 0\.01, now 0\.02"):
        run(finished, settings(training__lr=0.02), resume=True)
    run(finished, settings(training__accumulate=2), resume=True)


def test_a_folder_with_something_in_it_is_not_written_to(finished, tmp_path):
    with pytest.raises(RunError, match=r"exists; give another --out\.$"):
        run(finished, settings())
    with pytest.raises(RunError, match="nothing to resume"):
        run(tmp_path / "none", settings(), resume=True)


def test_export_at_another_merge(finished, tmp_path):
    revisit.export_run(finished, "newest", 0.0, False, tmp_path, quiet)
    base = models.create("freqkd_demo", size=(48, 64)).model.state_dict()
    for name, value in load_file(tmp_path / "student.safetensors").items():
        assert torch.equal(value, base[name])
    revisit.export_run(finished, "best", None, False, tmp_path, quiet)
    with pytest.raises(RunError, match='got "beast". Did you mean "best"'):
        revisit.export_run(finished, "beast", None, False, tmp_path, quiet)


def test_export_as_onnx_agrees_and_holds_no_transform(crossed, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    told = []
    revisit.export_run(crossed, "newest", None, True, tmp_path, told.append)
    assert any("agrees with torch" in text for text in told)
    kinds = {node.op_type for node in onnx.load(str(tmp_path / "student.onnx")).graph.node}
    assert "Conv" in kinds and not any("DFT" in kind for kind in kinds)


def test_onnx_that_differs_is_not_written(crossed, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from freqkd_analysis.errors import CheckFailed
    from freqkd_train import export

    monkeypatch.setattr(export, "ONNX_TOLERANCE", 0.0)
    with pytest.raises(CheckFailed, match="differs from torch"):
        revisit.export_run(crossed, "newest", None, True, tmp_path, quiet)
    assert not (tmp_path / "student.onnx").exists()


def test_a_cross_architecture_run_measures_through_a_regression(crossed):
    manifest = json.loads((crossed / "manifest.json").read_text())
    assert manifest["parameters"]["projectors"] > 0 and manifest["config"]["student"]["merge"] == 1.0
    change = pd.read_csv(crossed / "heldout" / "change.csv")
    before = change.query("condition == 'paired' and measure == 'cosine' and band == 'low'")["before"]
    assert (before < 0.9).all()  # a fitted reading of a random network; an unfitted projector would give 1


def test_the_regression_is_least_squares(tmp_path):
    """Against numpy's lstsq on the stacked features, up to the ridge; exact for a student that is a linear map."""
    made = job.prepare(settings(student__name="mobilenetv2_050", student__weights="random", student__layers="2,3",
                                data__size=[96, 128]), quiet)  # fmt: skip
    batches = list(made.source.evaluation_batches(made.train[:6], 3))
    plain = job.standing(made, made.origin, "start")
    question = heldout.Question(made.teacher, made.paired, made.held, made.geometry, made.conversion, "", "3,7",
                                False, 0, "cpu", lambda: batches)  # fmt: skip
    found = heldout.ridge(question, plain, made.paired)
    teacher, student = made.paired[1]
    xs, ys = [], []
    with torch.no_grad():
        for batch in batches:
            y = read_taps(made.teacher.model, [teacher], batch["teacher"])[teacher.tap]
            x = taps.resized(read_taps(plain.model, [student], batch["student"])[student.tap], teacher.grid)
            ys.append(y.permute(0, 2, 3, 1).reshape(-1, y.shape[1]).numpy().astype(float))
            xs.append(x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).numpy().astype(float))
    x, y = np.concatenate(xs), np.concatenate(ys)
    x1 = np.column_stack([x, np.ones(len(x))])
    penalty = np.sqrt(heldout.RIDGE * np.mean(np.sum(x**2, axis=0)))
    stacked = np.vstack([x1, penalty * np.eye(x1.shape[1])[:-1]])
    expected = np.linalg.lstsq(stacked, np.vstack([y, np.zeros((x.shape[1], y.shape[1]))]), rcond=None)[0]
    np.testing.assert_allclose(found[teacher.tap].numpy(), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_stored_teacher_features_train_the_same_student(tmp_path, monkeypatch):
    """With mirrored views in the batches; up to half-precision rounding of the stored features."""
    from freqkd_train import teacher_cache

    monkeypatch.setattr(teacher_cache, "ROOT", tmp_path / "cache")
    made = settings(training__epochs=1, data__holdout=0.0)
    run(tmp_path / "live", made)
    run(tmp_path / "stored", made.updated({"training.cache_gb": 1.0}))
    live, stored = (load_file(tmp_path / name / "student.safetensors") for name in ("live", "stored"))
    lines = [[json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
             for name in ("live", "stored")]  # fmt: skip
    np.testing.assert_allclose(lines[0], lines[1], rtol=1e-3)
    moved = max(float((live[name] - stored[name]).abs().max()) for name in live)
    assert moved < 1e-3 and any(tmp_path.glob("cache/*/plain-*.bin"))
    teacher_cache.purge(tmp_path / "cache")
    assert not any(tmp_path.glob("cache/*"))


@pytest.mark.parametrize("adapt", ["full", "last:2"])
def test_other_ways_to_train(tmp_path, adapt):
    made = settings(student__adapt=adapt, training__epochs=1, data__holdout=0.0, training__lr=1e-3)
    found = run(tmp_path / "run", made)
    assert found["heldout"] == [] and not (tmp_path / "run" / "heldout").exists()
    base = models.create("freqkd_demo", size=(48, 64)).model.state_dict()
    student = load_file(tmp_path / "run" / "student.safetensors")
    moved = {name.split(".")[1] for name, value in student.items()
             if name.startswith("blocks.") and not torch.equal(value, base[name])}  # fmt: skip
    assert moved == ({str(n) for n in range(8)} if adapt == "full" else {"6", "7"})
    assert torch.equal(student["norm.weight"], base["norm.weight"])  # behind the last tap


def test_none_leaves_the_student_as_it_started(tmp_path):
    found = run(tmp_path / "run", settings(loss__name="none"))
    base = models.create("freqkd_demo", size=(48, 64)).model.state_dict()
    assert all(torch.equal(v, base[n]) for n, v in load_file(tmp_path / "run" / "student.safetensors").items())
    assert found["steps"] == 0
    assert {row["change"] for row in found["heldout"] if row["change"] == row["change"]} == {0.0}


@pytest.mark.parametrize("value", list(recipes.CONTROLS))
def test_controls_take_a_step(tmp_path, value):
    made = recipes.controls(value, "smoke").updated({
        key: FAST[key] for key in ("data.spec", "data.size", "data.limit", "teacher.layers")
    } | {"training.epochs": 1, "data.holdout": 0.0})  # fmt: skip
    ready = job.prepare(made, quiet)
    if value != "none":
        job.ready(ready, quiet)
        found = job.train(ready, tmp_path, False, quiet)
        assert found["steps"] > 0 and np.isfinite(found["metrics"]["loss"])


def test_the_gradient_is_matched(tmp_path):
    """The scaled loss pulls as hard at step 0 as the reference does, measured anew from parameter gradients."""
    made = job.prepare(settings(loss__name="mse", loss__match_gradient="released"), quiet)
    job.ready(made, quiet)
    keys = [(0, int(i)) for i in job.engine.order(0, 0, len(made.train))[:4]]
    batch = made.source.batch(keys)
    made.step.eval()
    made.step(batch)["loss"].backward()
    ours = torch.cat([p.grad.flatten() for p in made.step.parameters() if p.grad is not None]).norm()
    other = job.prepare(settings(), quiet)
    other.step.eval()
    other.step(batch)["loss"].backward()
    theirs = torch.cat([p.grad.flatten() for p in other.step.parameters() if p.grad is not None]).norm()
    assert float(ours / theirs) == pytest.approx(1, rel=1e-4)
    assert float(made.step.scale) != 1


def test_frozen_parts_keep_their_batch_statistics():
    torch.manual_seed(0)
    made = job.prepare(settings(student__name="mobilenetv2_050", student__weights="random", student__layers="2,3",
                                student__adapt="last:2", data__size=[96, 128]), quiet)  # fmt: skip
    job.ready(made, quiet)
    before = copy.deepcopy(made.step.student.state_dict())
    made.step.train()
    made.step(made.source.batch([(0, 0), (0, 1)]))
    now = made.step.student.state_dict()
    moved = {name for name in now if "running_mean" in name and not torch.equal(now[name], before[name])}
    assert moved and all(name.startswith(("blocks.3", "blocks.4", "blocks.5")) for name in moved), moved


@pytest.mark.parametrize("changes, error, says", [
    ({"loss__name": "relased"}, FreqkdError, r'no loss "relased"\. Did you mean "released"'),
    ({"loss__name": "mse", "loss__bands": "split:0.5"}, FreqkdError, r"loss\.bands belongs to the FreqKD presets"),
    ({"teacher__layers": "99"}, NetworkError, "layer 99 is out of range"),
    ({"teacher__layers": "blcks.*"}, NetworkError, "no layer matches"),
    ({"teacher__name": "resnt50"}, NetworkError, "Did you mean"),
    ({"student__name": "mobilenetv2_050", "student__weights": "random", "student__layers": "3,4",
      "data__size": [32, 48]}, NetworkError, "one token has no spatial detail"),
    ({"student__adapt": "lora", "student__targets": ["qvk"]}, FreqkdError, "no linear layer qvk"),
    ({"student__adapt": "head"}, FreqkdError, "nothing to train with student.adapt head"),
    ({"training__batch": 64}, FreqkdError, "fewer than a batch of 64"),
    ({"training__best": "val/los"}, FreqkdError, 'Did you mean "val/loss"'),
    ({"training__cache_gb": 1e-6}, FreqkdError, "more than training.cache_gb"),
    ({"loss__name": "measured", "loss__weights_from": "nowhere"}, FreqkdError, "nowhere"),
    ({"data__exclude": "nowhere.txt"}, FreqkdError, "nowhere.txt"),
    ({"data__spec": "synthetic:pairs=4,groups=1"}, FreqkdError, "at least 2 groups"),
])  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, changes, error, says):
    with pytest.raises(error, match=says) as caught:
        run(tmp_path / "run", settings(**changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = job.dry_run(job.prepare(settings(), quiet), quiet)
    assert list(tmp_path.iterdir()) == [] and found["trained"] > 0 and found["seconds_per_epoch"] > 0
    assert found["parameters"]["trained"] < found["parameters"]["student"] and len(found["taps"]) == 2


def test_losses_have_names_and_a_place():
    assert len(set(distill.LOSSES)) == len(distill.LOSSES) >= 19
    assert students.has_lora(torch.nn.Linear(1, 1)) is False
