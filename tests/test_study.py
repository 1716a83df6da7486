"""Every stage of a downstream study on small synthetic scenes: folders, resumption, comparison, bad words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from freqkd_analysis.errors import FreqkdError, RunError
from freqkd_train import compare, evaluate, study
from freqkd_train.config import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def quiet(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("study") / "mfnet"
    patch = pytest.MonkeyPatch()
    patch.setattr(study, "SCENES", "pairs=24,groups=8,size=128x96")
    made = study.finetuning

    def short(*arguments):
        settings = made(*arguments)
        training = settings.training.model_copy(update={"epochs": 1})
        return settings.model_copy(update={"training": training})

    patch.setattr(study, "finetuning", short)
    first = study.distillation

    def small(*arguments):
        return first(*arguments).updated({"data.size": [48, 64], "training.epochs": 1})

    patch.setattr(study, "distillation", small)
    chosen = study.Study("mfnet", "synthetic", "smoke", ("none", "freqkd"), (0,), device="cpu")
    study.run(chosen, out, quiet, ["test"])
    told: list[str] = []
    study.run(chosen, out, told.append, ["test"])
    (out / "told.json").write_text(json.dumps(told))
    patch.undo()
    return out


def test_every_stage_leaves_its_folder(done):
    for name in ("none-0", "freqkd-0"):
        assert (done / "distil" / name / "student.safetensors").is_file()
        assert (done / "finetune" / name / "model.safetensors").is_file()
        found = json.loads((done / "evaluate" / name / "metrics.json").read_text())
        assert (
            found["method"] == name[:-2] and found["card"]["data_set"] and 0 <= found["figures"]["all"]["miou_9"] <= 1
        )
    assert {p.name for p in (done / "compare").iterdir()} >= {"compare.csv", "compare.md", "compare.tex", "compare.svg"}


def test_a_second_call_uses_what_is_there(done):
    told = json.loads((done / "told.json").read_text())
    assert sum("there already" in text for text in told) == 6


def test_the_comparison_is_of_the_confusion_matrices(done):
    table = compare.compare([done / "evaluate" / name for name in ("none-0", "freqkd-0")], draws=50)
    row = table[(table["method"] == "freqkd") & (table["metric"] == "miou_9")].iloc[0]
    total = np.load(done / "evaluate" / "freqkd-0" / evaluate.CONFUSIONS).sum(0)
    hit = np.diag(total)
    union = total.sum(0) + total.sum(1) - hit
    expected = np.mean([h / u if u else 0.0 for h, u in zip(hit, union, strict=True)])
    assert row["value"] == pytest.approx(100 * expected)
    other = table[(table["method"] == "none") & (table["metric"] == "miou_9")].iloc[0]
    assert row["to_none"] == pytest.approx(row["value"] - other["value"])


def test_unlike_cards_are_refused(done, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(done / "evaluate" / "freqkd-0", other)
    found = json.loads((other / "metrics.json").read_text())
    found["card"]["split"] = "val"
    (other / "metrics.json").write_text(json.dumps(found))
    with pytest.raises(FreqkdError, match="were not evaluated alike: split is test and val"):
        compare.compare([done / "evaluate" / "none-0", other], draws=20)


def test_bad_words():
    with pytest.raises(ConfigError, match='no method "frekd"'):
        study.methods("none,frekd", False)
    with pytest.raises(RunError, match=r"no metrics\.json"):
        compare.compare([Path("nowhere")])


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
