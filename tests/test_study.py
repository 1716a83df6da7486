"""Every stage of a downstream study on small synthetic scenes: folders, resumption, comparison, bad words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_study import tiny

from freqkd_analysis.errors import RunError
from freqkd_train import assembly, compare, config, evaluate, leaks, predictions, study
from freqkd_train.metrics.card import CardError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def quiet(text: str) -> None:
    pass


def without_checkpoints(out: Path) -> None:
    """A finished study needs none to be read or run again, and they are four fifths of it: 400 MB."""
    for folder in out.glob("*/*/checkpoints"):
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("study") / "mfnet"
    patch = pytest.MonkeyPatch()
    patch.setattr(study, "SCENES", "pairs=24,groups=8,size=128x96")
    study.run(tiny("mfnet"), out, quiet, ["test"])
    told: list[str] = []
    study.run(tiny("mfnet"), out, told.append, ["test"])
    (out / "told.json").write_text(json.dumps(told))
    patch.undo()
    without_checkpoints(out)
    return out


@pytest.fixture(scope="module")
def detected(tmp_path_factory) -> Path:
    """A detection study with the paper's arms on a KAIST layout."""
    out = tmp_path_factory.mktemp("study") / "kaist"
    patch = pytest.MonkeyPatch()
    patch.setattr(study, "SCENES", "pairs=24,groups=8,size=128x96")
    study.run(tiny("kaist", names=("none", "none_paper", "response", "freqkd")), out, quiet, ["test"])
    patch.undo()
    without_checkpoints(out)
    return out


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    for name in ("manifest.json", "holiday.txt"):
        out = tmp_path / name.partition(".")[0]
        out.mkdir()
        (out / name).write_text("{}")
        with pytest.raises(RunError, match="exists and is no study"):
            study.run(tiny("kaist"), out, quiet, ["test"])
        assert [path.name for path in out.iterdir()] == [name]


def test_every_stage_leaves_its_folder(done):
    for name in ("none-0", "freqkd-0"):
        assert (done / "distil" / name / "student.safetensors").is_file()
        assert (done / "finetune" / name / "model.safetensors").is_file()
        found = json.loads((done / "evaluate" / name / "metrics.json").read_text())
        assert (
            found["method"] == name[:-2] and found["card"]["data_set"] and 0 <= found["figures"]["all"]["miou_9"] <= 100
        )
    assert {p.name for p in (done / "compare").iterdir()} >= {"compare.csv", "compare.md", "compare.tex", "compare.svg"}


def test_four_channel_pairs_are_distilled_on_as_pairs(done):
    """A list in csv would name one file for both modalities: teacher and student would see the same image."""
    made = config.read(done / "distil/none-0/config.yaml")
    assert made.data.spec == f"mfnet:{done}/data:train"


def test_a_second_call_uses_what_is_there(done):
    told = json.loads((done / "told.json").read_text())
    assert sum("there already" in text for text in told) == 6


def test_the_comparison_is_of_the_confusion_matrices(done):
    table = compare.compare([done / "evaluate" / name for name in ("none-0", "freqkd-0")], draws=50)
    row = table[(table["method"] == "freqkd") & (table["metric"] == "miou_9")].iloc[0]
    total = np.load(done / "evaluate" / "freqkd-0" / predictions.CONFUSIONS).sum(0)
    hit = np.diag(total)
    union = total.sum(0) + total.sum(1) - hit
    expected = np.mean([h / u if u else 0.0 for h, u in zip(hit, union, strict=True)])
    assert row["value"] == pytest.approx(100 * expected)
    other = table[(table["method"] == "none") & (table["metric"] == "miou_9")].iloc[0]
    assert row["to_none"] == pytest.approx(row["value"] - other["value"])


def test_unlike_cards_are_refused(done, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(done / "evaluate" / "freqkd-0", other)
    found = json.loads((other / "metrics.json").read_text())
    found["card"]["ignore_rule"] = "another"
    (other / "metrics.json").write_text(json.dumps(found))
    folders = [done / "evaluate" / "none-0", other]
    with pytest.raises(CardError, match=r"ignore_rule: 'none.*' in .*none-0, 'another' in .*other"):
        compare.compare(folders, draws=20)
    forced = compare.compare(folders, draws=20, force=True)
    unlike = forced.attrs["unlike"]
    assert unlike.startswith("ignore_rule: 'none")
    compare.write(forced, tmp_path / "forced")
    assert (tmp_path / "forced" / "compare.md").read_text().startswith(f"Not evaluated alike:\n\n{unlike}\n\n| method")
    found["task"] = "detect"
    (other / "metrics.json").write_text(json.dumps(found))
    with pytest.raises(RunError, match="are of two tasks: segment and detect"):
        compare.compare(folders, draws=20, force=True)


def test_the_table_shown_holds_each_metrics_own_difference(done, capsys):
    """A column a metric and reference: with one name for all, the last metric's difference stood under the first."""
    from freqkd_train import choose

    table = compare.compare([done / "evaluate" / name for name in ("none-0", "freqkd-0")], draws=50)
    head, *rows = compare.cells(table)
    assert len(set(head)) == len(head) == len(rows[0])
    choose.show_comparison(table, None, False)
    shown = capsys.readouterr().out
    for metric in ("miou_9", "miou_8"):
        row = table[(table["method"] == "freqkd") & (table["metric"] == metric)].iloc[0]
        assert f"{row['to_none']:+.2f} [" in shown


def test_arms_differ_in_their_distillation_alone(detected):
    made = {path.parent.name: config.tree(path) for path in detected.glob("finetune/*/config.yaml")}
    assert set(made) == {"rgb-0", "none-0", "none_paper-0", "response-0", "freqkd-0"}
    own = {
        "none": set(),
        "freqkd": {"weights"},
        "response": {"teacher"},
        "none_paper": {"head"},
        "rgb": {"modality"},
    }
    for name, settings in made.items():
        unlike = {key for key in settings if settings[key] != made["none-0"][key]}
        assert unlike == own[name[:-2]] | ({"method"} if name != "none-0" else set()), name
    assert made["none_paper-0"]["head"]["consistency"] == 0.0 and made["none-0"]["head"]["consistency"] == 0.1
    assert sorted(path.name for path in (detected / "distil").iterdir() if path.is_dir()) == ["freqkd-0", "none-0"]
    terms = json.loads((detected / "finetune/response-0/metrics.jsonl").read_text().splitlines()[0])["terms"]
    assert "response" in terms and "consistency" in terms


def test_an_evaluation_leaves_figures_and_a_sheet(detected, tmp_path):
    found = evaluate.run(detected / "finetune/freqkd-0", tmp_path / "e", device="cpu", draw=3)
    assert {path.name for path in (tmp_path / "e" / "figures").iterdir()} >= {"miss_rate.svg", "precision_recall.csv"}
    assert (tmp_path / "e" / evaluate.SHEET).read_bytes()[:4] == b"\x89PNG"
    stored = json.loads((detected / "evaluate/freqkd-0/metrics.json").read_text())
    assert found["card"] == stored["card"] and found["mr_all"] == stored["mr_all"]


def test_training_images_are_no_test(detected):
    with pytest.raises(leaks.LeakError, match="share frames"):
        evaluate.run(detected / "finetune/freqkd-0", detected / "none", split="train", device="cpu")
    assert not (detected / "none").exists()


def test_students_and_backbones_of_another_study(detected, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "SCENES", "pairs=24,groups=8,size=128x96,seed=5")
    names = ("none", "freqkd", "none_stage2", "freqkd_stage2")
    table = study.run(tiny("mfnet", names=names, students=str(detected)), tmp_path / "m", quiet, ["test"])
    assert set(table["method"]) == set(names) and not (tmp_path / "m" / "distil").exists()
    from safetensors.torch import load_file

    whole = load_file(detected / "finetune/freqkd-0" / assembly.WEIGHTS)
    alone = load_file(tmp_path / "m/backbones/freqkd-0.safetensors")
    start = load_file(detected / "distil/freqkd-0/student.safetensors")
    name = next(key for key in alone if key.endswith("weight") and alone[key].ndim > 1)
    assert set(alone) == set(start)
    written = []
    with monkeypatch.context() as patch:
        patch.setattr(assembly, "save_backbone", lambda run, path: written.append(path.name))
        again = tiny("mfnet", names=names, students=str(detected))
        study.run(again, tmp_path / "m", quiet, ["test"])
        assert written == [], "nothing changed"
        (tmp_path / "m/backbones/.freqkd-0.json").write_text('{"model": "of another detector"}')
        study.run(again, tmp_path / "m", quiet, ["test"])
        assert written == ["freqkd-0.safetensors"]
    assert alone[name].equal(whole[f"detector.backbone.network.{name}"]) and not alone[name].equal(start[name])
    with pytest.raises(RunError, match=r"no student mse-0 in .*which holds freqkd-0, none-0"):
        study.run(tiny("mfnet", names=("mse",), students=str(detected)), tmp_path / "m", quiet, ["test"])
    with pytest.raises(RunError, match="Give --students STUDY"):
        study.run(tiny("mfnet", names=("none_stage2",)), tmp_path / "n", quiet, ["test"])
    with pytest.raises(RunError, match="is no study"):
        study.run(tiny("mfnet", students=str(tmp_path / "nowhere")), tmp_path / "o", quiet, ["test"])


def test_all_students_that_are_taken_say_which_pairs_they_saw(tmp_path, monkeypatch):
    """The first folder of the alphabet spoke for all: the leak check looked at pairs that the others never saw."""
    specs = {"cosine-0": "kaist:others", "freqkd-0": "kaist:theirs", "mse-0": "kaist:theirs", "none-0": "kaist:theirs"}
    for name, spec in specs.items():
        exclude = "left_out.txt" if name == "none-0" else ""
        config.write(tmp_path / f"distil/{name}/config.yaml", config.Config().updated(
            {"data.spec": spec, "data.exclude": exclude}))  # fmt: skip
        (tmp_path / f"distil/{name}/student.safetensors").touch()
    monkeypatch.setattr(study.Going, "_check_leak", lambda self: None)

    def going(*names: str) -> study.Going:
        asked = tiny("kaist", data="kaist:x", names=names, students=str(tmp_path))
        return study.Going(asked, tmp_path / "out", quiet, ["test"])

    taken = going("mse", "freqkd")
    assert (taken.pairs, taken.exclude) == ("kaist:theirs", "")
    with pytest.raises(RunError, match=r"freqkd-0 of kaist:theirs without nothing, cosine-0 of kaist:others"):
        going("freqkd", "cosine")
    with pytest.raises(
        RunError, match=r"unlike pairs: none-0 of .* without left_out\.txt, mse-0 of .* without nothing"
    ):
        going("none", "mse")
    with pytest.raises(RunError, match=r"no student shuffled-0 in .*; distil it there first"):
        going("mse", "shuffled")


def test_the_pairs_of_stage_1_are_listed_once_for_their_check(detected, tmp_path, monkeypatch):
    listed, load = [], study.layouts.load
    monkeypatch.setattr(
        study.layouts, "load", lambda spec, *more, **kinds: listed.append(spec) or load(spec, *more, **kinds)
    )
    asked = tiny("kaist", data=f"kaist:{detected}/data", distil_on=f"kaist:{detected}/data:train-all-20")
    study.Going(asked, tmp_path / "once", quiet, ["test"])
    assert listed.count(asked.distil_on) == 1 and (tmp_path / "once" / study.LEAK).is_file()


def test_pairs_of_stage_1_that_hold_test_frames_are_refused(detected, tmp_path):
    root = detected / "data"
    leaky = tiny("kaist", data=f"kaist:{root}", distil_on=f"kaist:{root}")
    with pytest.raises(leaks.LeakError, match="the pairs of stage 1"):
        study.run(leaky, tmp_path / "l", quiet, ["test"])
    assert not (tmp_path / "l" / "distil").exists()


def test_the_epoch_is_chosen_on_validation_and_on_test_only_when_asked(detected):
    manifest = json.loads((detected / "finetune/none-0/manifest.json").read_text())
    logged = [json.loads(line) for line in (detected / "finetune/none-0/metrics.jsonl").read_text().splitlines()]
    assert manifest["config"]["select"] == "validation" and any("val/ap50" in row for row in logged)
    assert not any("test/ap50" in row for row in logged)


@pytest.fixture
def copied(detected, tmp_path) -> Path:
    """A study that was finished, to be run again, with the arm `none` alone."""
    others = [f"{dot}{arm}-*" for arm in ("none_paper", "response", "freqkd", "rgb") for dot in ("", ".")]
    shutil.copytree(detected, tmp_path / "k", ignore=shutil.ignore_patterns(*others))
    # Settings hold absolute paths: where the folder was.
    for mark in [*tmp_path.glob("k/*/.*.json"), *tmp_path.glob("k/distil/*/config.yaml")]:
        mark.write_text(mark.read_text().replace(str(detected), str(tmp_path / "k")))
    return tmp_path / "k"


def again(out: Path, **more) -> list[str]:
    told: list[str] = []
    study.run(tiny("kaist", names=("none",), **more), out, told.append, ["test"])
    return told


def test_what_changes_no_number_redoes_nothing(copied, monkeypatch):
    from dataclasses import replace

    monkeypatch.chdir(copied.parent)
    told: list[str] = []
    study.run(replace(tiny("kaist", names=("none",)), device="auto"), Path("k"), told.append, ["test"])
    assert [text for text in told if "there already" in text] == [
        f"{name}/none-0: there already" for name in ("distil", "finetune", "evaluate")
    ]


def test_other_settings_throw_nothing_away(copied):
    kept = (copied / "finetune/none-0" / assembly.WEIGHTS).read_bytes()
    with pytest.raises(
        RunError, match=r"finetune/none-0 was made with training\.lr = 0\.001, now 0\.01; .*--from finetune"
    ):
        again(copied, changes=("finetune.training.lr=0.01",))
    assert (copied / "finetune/none-0" / assembly.WEIGHTS).read_bytes() == kept


def test_a_model_that_changed_is_evaluated_again(copied):
    before = json.loads((copied / "evaluate/none-0/metrics.json").read_text())
    shutil.rmtree(copied / "finetune/none-0")
    (copied / "finetune/.none-0.json").unlink()
    told = again(copied, changes=("finetune.training.lr=0.01",))
    assert "evaluate/none-0" in told and "finetune/none-0" in told and "distil/none-0: there already" in told
    assert json.loads((copied / "evaluate/none-0/metrics.json").read_text()) != before


def test_a_stage_without_its_last_file_is_done_again(copied):
    (copied / "evaluate/none-0/metrics.json").unlink()
    (copied / "distil/.none-0.json").write_text("{")  # a mark that was cut
    told = again(copied)
    assert "evaluate/none-0" in told and "finetune/none-0: there already" in told and "distil/none-0" in told


def test_from_a_stage_on_everything_is_done_again_also_after_a_stop(copied):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate, "run", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        study.run(tiny("kaist", names=("none",)), copied, quiet, ["test"], "finetune")
    told = again(copied)
    assert told[-3:] == ["distil/none-0: there already", "finetune/none-0: there already", "evaluate/none-0"]


def test_a_measured_arm_stopped_in_its_analysis_goes_on(copied):
    from freqkd_analysis import layers

    finish, stopped = layers.finish, []

    def stopping(*arguments, **more):
        if not stopped:
            stopped.append(1)
            raise KeyboardInterrupt
        return finish(*arguments, **more)

    chosen = tiny("kaist", names=("measured",), changes=("distil.data.size=[96, 128]",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "finish", stopping)
        with pytest.raises(KeyboardInterrupt):
            study.run(chosen, copied, quiet, ["test"])
        shards = sorted((copied / "analyse/teacher/shards").glob("*.npz"))
        times = [path.stat().st_mtime_ns for path in shards]
        assert shards

        def checking(job, place, *more):
            if place.name == "teacher":
                assert [path.stat().st_mtime_ns for path in shards] == times, "measured again"
            return finish(job, place, *more)

        patch.setattr(layers, "finish", checking)
        table = study.run(chosen, copied, quiet, ["test"])
    assert list(table["method"].unique()) == ["measured"] and (copied / "analyse/teacher/band_weights.json").is_file()


def test_evaluations_given_twice_or_of_unlike_seeds_are_refused(detected, tmp_path):
    none, freqkd = (detected / "evaluate" / name for name in ("none-0", "freqkd-0"))
    with pytest.raises(RunError, match="is none of seed 0 once more"):
        compare.compare([none, none])
    shutil.copytree(none, tmp_path / "none-1")
    found = json.loads((none / "metrics.json").read_text())
    (tmp_path / "none-1/metrics.json").write_text(json.dumps(found | {"seed": 1}))
    with pytest.raises(RunError, match="unlike seeds: none 0, 1; freqkd 0"):
        compare.compare([none, tmp_path / "none-1", freqkd])
    forced = compare.compare([none, tmp_path / "none-1", freqkd], draws=20, force=True)
    assert forced.attrs["unlike"] == "seeds: none 0, 1; freqkd 0"


def test_few_groups_are_told_with_the_table(done, capsys):
    from freqkd_train import choose

    table = compare.compare([done / "evaluate" / name for name in ("none-0", "freqkd-0")], draws=50)
    assert "group" in table.attrs["note"]
    choose.show_comparison(table, None, False)
    assert table.attrs["note"] in capsys.readouterr().out
    assert table.attrs["note"] in (done / "compare/compare.md").read_text()


def test_annotations_that_changed_since_are_refused(copied):
    folder = copied / "evaluate/none-0"
    found = json.loads((folder / "metrics.json").read_text())
    found["card"]["annotation_sha256"] = "0" * 64
    (folder / "metrics.json").write_text(json.dumps(found))
    with pytest.raises(RunError, match="are not those that"):
        compare.compare([folder])


@pytest.mark.parametrize("name", ["metrics.json", "predictions.json"])
@pytest.mark.parametrize("text", ["", "{}", "[]", '{"names": ["a'])
def test_cut_files_of_an_evaluation_are_named(copied, name, text):
    (copied / "evaluate/none-0" / name).write_text(text)
    with pytest.raises(RunError, match=name):
        compare.compare([copied / "evaluate/none-0"])


def test_cut_confusions_are_named(done, tmp_path):
    shutil.copytree(done / "evaluate/none-0", tmp_path / "e")
    for content in (b"", (tmp_path / "e/confusions.npy").read_bytes()[:200]):
        (tmp_path / "e/confusions.npy").write_bytes(content)
        with pytest.raises(RunError, match="confusions.npy cannot be read"):
            compare.compare([tmp_path / "e"])
