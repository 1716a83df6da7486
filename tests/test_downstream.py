"""Fine-tuning and evaluation on small real-shaped files: what they leave, and what they refuse in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import call
from test_cli import refused as _refused

from freqkd_analysis.errors import RunError
from freqkd_train import assembly, cli, config, evaluate, finetune
from freqkd_train.config import ConfigError
from freqkd_train.downstream import Downstream

NAMES = ("person", "car")


def refused(capsys, *words: object) -> str:
    return _refused(capsys, *words, main=cli.main)


def quiet(text: str) -> None:
    pass


def written(root: Path, split: str, images: int, names=NAMES, empty: int = 0) -> None:
    """Noise images, each with one bright box but for the last `empty`, of the classes in turn."""
    rng = np.random.default_rng(len(split))
    made = {"images": [], "annotations": [], "categories": [{"id": i, "name": n} for i, n in enumerate(names)]}
    (root / split).mkdir(parents=True)
    for number in range(images):
        pixels = rng.integers(0, 90, (48, 64)).astype(np.uint8)
        x, y = (int(v) for v in rng.integers(2, (40, 24)))
        if number < images - empty:
            pixels[y : y + 20, x : x + 20] = 220
            made["annotations"].append({"id": number, "image_id": number, "category_id": number % len(names),
                                        "bbox": [x, y, 20, 20]})  # fmt: skip
        name = f"{split}{number}.png"
        made["images"].append({"id": number, "file_name": name, "width": 64, "height": 48})
        Image.fromarray(pixels).save(root / split / name)
    (root / f"{split}.json").write_text(json.dumps(made))


def settings(root: Path, **changes) -> Downstream:
    made = config.parsed(Downstream, {
        "method": "none", "model": "freqkd_demo", "data": {"size": [48, 64], "geometry": "pad", "holdout": 0.0},
        "targets": {"spec": f"coco:{root}/{{split}}:{root}/{{split}}.json"},
        "head": {"channels": 32, "hidden": 16, "regions": 16, "train": "frozen"},
        "training": {"epochs": 2, "batch": 2, "lr": 1e-3, "device": "cpu"},
    })  # fmt: skip
    return config.updated(made, changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A detector fine-tuned on six images, the last two without boxes."""
    root = tmp_path_factory.mktemp("downstream")
    written(root / "data", "train", 6, empty=2)
    written(root / "data", "test", 3)
    finetune.run(settings(root / "data"), root / "run", False, quiet, ["test"])
    return root


def test_images_without_boxes_are_trained_on(trained):
    manifest = json.loads((trained / "run/manifest.json").read_text())
    assert manifest["train"]["frames_without_boxes"] == 2 and manifest["steps"] == 6
    assert manifest["chosen"] is None and manifest["leak"]["shared"] == 0


def test_the_weights_that_are_kept_are_the_chosen_epoch_s(trained, tmp_path, monkeypatch):
    """Of three epochs the second is told to be the best."""
    told = iter([0.2, 0.9, 0.4])
    monkeypatch.setattr(finetune, "_figure", lambda built, judged, size: next(told))
    finetune.run(
        settings(trained / "data", **{"training.epochs": 3, "select": "test"}), tmp_path / "a", False, quiet, []
    )
    manifest = json.loads((tmp_path / "a/manifest.json").read_text())
    assert manifest["chosen"] == {"metric": "test/ap50", "value": 0.9, "step": 6} and manifest["steps"] == 9
    from freqkd_train import checkpoint

    best = checkpoint.load(checkpoint.folder_of(tmp_path / "a") / checkpoint.BEST)["module"]
    last = checkpoint.newest_valid(tmp_path / "a", quiet)[1]["module"]
    kept = assembly.loaded(tmp_path / "a", "cpu").step.state_dict()
    changed = [name for name, value in best.items() if not value.equal(last[name])]
    assert changed and all(kept[name].equal(best[name]) for name in changed)


def test_a_stopped_fine_tuning_goes_on_to_the_same_bytes(trained, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    made = settings(trained / "data")
    finetune.run(made, whole, False, quiet, [])
    from freqkd_train import loop

    step, calls = loop.Loop.step, []

    def stopping(self, *arguments):
        calls.append(0)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.Loop, "step", stopping)
        finetune.run(made, cut, False, quiet, [])
    assert not (cut / assembly.WEIGHTS).exists()
    told: list[str] = []
    finetune.run(made, cut, True, told.append, [])
    assert "resumed at step 3 of 6" in told
    for name in (assembly.WEIGHTS, "metrics.jsonl"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name


def test_a_signal_in_the_last_evaluation_ends_the_run(trained, tmp_path, monkeypatch):
    """It was swallowed, and a study went on to its next stage."""
    import os
    import signal

    calls = []

    def told(built, judged, size):
        calls.append(0)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return 0.5

    monkeypatch.setattr(finetune, "_figure", told)
    with pytest.raises(KeyboardInterrupt):
        finetune.run(settings(trained / "data", select="test"), tmp_path / "r", False, quiet, [])
    assert not (tmp_path / "r" / assembly.WEIGHTS).exists()


def test_infrared_is_no_visible_image_under_another_name(trained, tmp_path):
    for changes in ({"modality": "rgb"}, {"teacher": str(trained / "run")}):
        with pytest.raises(ConfigError, match="has infrared images alone"):
            finetune.run(settings(trained / "data", **changes), tmp_path / "r", False, quiet, [])


def test_an_unknown_protocol_is_refused_before_any_work(trained, tmp_path, capsys):
    line = refused(capsys, "evaluate", trained / "run", "--protocol", "kiast", "--out", tmp_path / "e")
    assert 'no protocol "kiast"' in line and not (tmp_path / "e").exists()


def test_other_settings_do_not_resume_and_a_full_folder_is_not_overwritten(trained):
    with pytest.raises(RunError, match=r"was started with training\.lr = 0\.001, now 0\.01"):
        finetune.run(settings(trained / "data", **{"training.lr": 0.01}), trained / "run", True, quiet, [])
    with pytest.raises(RunError, match="exists; give another --out"):
        finetune.run(settings(trained / "data"), trained / "run", False, quiet, [])


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_a_crop_is_refused(task):
    """Predictions could not be brought back, and what the crop cut off would count as missed."""
    with pytest.raises(ConfigError, match=r"expected data\.geometry pad"):
        config.parsed(Downstream, {"task": task, "data": {"geometry": "crop"}})


def test_an_evaluation_of_other_classes_is_refused(trained, tmp_path, capsys):
    written(tmp_path, "test", 2, names=("person", "lorry"))
    spec = f"coco:{tmp_path}/test:{tmp_path}/test.json"
    line = refused(capsys, "evaluate", trained / "run", "--data", spec, "--out", tmp_path / "e")
    assert "knows person, car" in line and "has person, lorry" in line and not (tmp_path / "e").exists()


def test_classes_that_differ_between_train_and_test_are_named(tmp_path):
    written(tmp_path, "train", 2)
    written(tmp_path, "test", 2, names=("person", "lorry"))
    with pytest.raises(Exception, match="alone has car.*alone has lorry") as told:
        finetune.run(settings(tmp_path), tmp_path / "run", False, quiet, [])
    assert "\n" not in str(told.value) and not (tmp_path / "run").exists()


def test_folders_of_another_task_are_refused(trained, tmp_path, capsys):
    from freqkd_train import job, recipes

    made = recipes.make("kaist", "smoke").updated({"training.epochs": 0, "data.limit": 8, "loss.name": "none"})
    job.run(made, tmp_path / "distilled", False, quiet, ["test"])
    assert "is no finished fine-tuning" in refused(capsys, "evaluate", tmp_path / "distilled")
    assert "is no finished fine-tuning" in refused(capsys, "evaluate", tmp_path / "nowhere")
    assert "no metrics.json" in refused(capsys, "compare", trained / "run")
    assert "is no study" in refused(capsys, "kaist", "--preset", "smoke", "--data", f"coco:{trained}/data/test:"
                                    f"{trained}/data/test.json", "--students", trained / "data")  # fmt: skip


def test_a_damaged_manifest_is_told_in_one_line(trained, tmp_path, capsys):
    for name, text in (
        ("cut", '{"classes": ["a"'),
        ("list", "[]"),
        ("bare", '{"classes": ["a"], "config": {"tusk": 1}}'),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "manifest.json").write_text(text)
        (folder / assembly.WEIGHTS).write_bytes((trained / "run" / assembly.WEIGHTS).read_bytes())
        assert "manifest.json" in refused(capsys, "evaluate", folder, "--out", tmp_path / "e")
    damaged = tmp_path / "weights"
    damaged.mkdir()
    (damaged / "manifest.json").write_bytes((trained / "run/manifest.json").read_bytes())
    (damaged / assembly.WEIGHTS).write_bytes(b"no weights at all")
    assert assembly.WEIGHTS in refused(capsys, "evaluate", damaged, "--out", tmp_path / "e")


def test_wrong_roots_and_sets_say_what_was_looked_for(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for recipe, words in (("kaist", "annotations_sanitized"), ("flir", "align"), ("mfnet", "images")):
        line = refused(
            capsys, recipe, "--preset", "smoke", "--data", f"{recipe}:{tmp_path}/empty", "--out", tmp_path / "o"
        )
        assert words in line and str(tmp_path / "empty") in line
    assert "Did you mean" in refused(capsys, "kaist", "--data", f"kiast:{tmp_path}")
    assert 'no method "frekd"' in refused(capsys, "kaist", "--methods", "frekd")
    assert not (tmp_path / "o").exists()


def test_a_set_whose_hash_differs_is_refused(trained, capsys, tmp_path):
    line = refused(capsys, "evaluate", trained / "run", "--annotations", "@abcd", "--out", tmp_path / "e")
    assert "expected sha256 abcd" in line and not (tmp_path / "e").exists()


def test_pycocotools_takes_predictions_and_tells_the_same_ap(trained, tmp_path, monkeypatch):
    """predictions.json was a form of its own, which neither pycocotools nor `score` took."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    from freqkd_train import predictions, score
    from freqkd_train.metrics.boxes import make_detections

    truth = trained / "data/test.json"
    content = json.loads(truth.read_text())
    boxes = [row["bbox"] for row in content["annotations"]]
    found = make_detections([0, 1, 2, 2], [*boxes, [0, 0, 9, 9]], [0.9, 0.4, 0.3, 0.8], [0, 1, 0, 0])
    monkeypatch.setattr(predictions, "boxes", lambda *arguments: found)
    ours = evaluate.run(trained / "run", tmp_path / "e", device="cpu")
    for row in content["annotations"]:
        row |= {"id": row["id"] + 1, "iscrowd": 0, "area": 400}  # pycocotools takes a match with box 0 for none
    (tmp_path / "known.json").write_text(json.dumps(content))
    known = COCO(str(tmp_path / "known.json"))
    told = COCOeval(known, known.loadRes(str(tmp_path / "e/predictions.json")), "bbox")
    told.evaluate()
    told.accumulate()
    told.summarize()
    assert 50 < ours["ap50"] < 100 and ours["ap50"] == pytest.approx(100 * told.stats[1])
    assert ours["ap"] == pytest.approx(100 * told.stats[0])
    assert score.score(truth, [tmp_path / "e/predictions.json"])["ap50"] == pytest.approx(ours["ap50"])


def test_nothing_found_is_ap_0_and_no_crash(trained, tmp_path, monkeypatch):
    from freqkd_train import predictions
    from freqkd_train.metrics.boxes import make_detections

    monkeypatch.setattr(predictions, "boxes", lambda *arguments: make_detections())
    found = evaluate.run(trained / "run", tmp_path / "e", device="cpu", draw=2)
    assert found["ap50"] == 0.0 and found["detections"] == 0
    assert (tmp_path / "e" / evaluate.SHEET).is_file()


def test_sheets_of_anybody_s_detections(trained, tmp_path, capsys):
    (tmp_path / "found.json").write_text(
        json.dumps([{"image_id": 0, "category_id": 0, "bbox": [1, 2, 9, 9], "score": 1}])
    )
    words = ("score", "--annotations", trained / "data/test.json", "--results", tmp_path / "found.json", "--draw", 2)
    assert call(capsys, *words, "--images", trained / "data/test", "--figures", tmp_path / "f", main=cli.main)[0] == 0
    with Image.open(tmp_path / "f/found_detections.png") as sheet:
        assert sheet.size[0] > 300
    status, _, err = call(capsys, *words, main=cli.main)
    assert status == 2 and "give --images FOLDER" in err
    status, out, err = call(capsys, *words, "--images", trained / "data/test", main=cli.main)
    assert status == 2 and "give --figures FOLDER" in err and not out


def test_score_with_figures_reads_its_files_once(trained, tmp_path, capsys, monkeypatch):
    from freqkd_train import annotation_files

    read, of = [], annotation_files.read_bytes
    monkeypatch.setattr(annotation_files, "read_bytes", lambda path: read.append(path.name) or of(path))
    row = {"image_id": 0, "category_id": 0, "bbox": [1, 2, 9, 9], "score": 1}
    (tmp_path / "found.json").write_text(json.dumps([row]))
    words = ("--annotations", trained / "data/test.json", "--results", tmp_path / "found.json")
    assert call(capsys, "score", *words, "--figures", tmp_path / "f", main=cli.main)[0] == 0
    assert sorted(read) == ["found.json", "test.json"] and list((tmp_path / "f").glob("*.svg"))


def test_help_shows_the_defaults_that_words_tell(capsys):
    """In square brackets they were taken for markup, and vanished."""
    assert "(default: the run's)" in call(capsys, "evaluate", "--help", main=cli.main)[1]
