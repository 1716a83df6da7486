"""From finished runs to results/: the same bytes twice, no folder of the machine, numbers against a known answer."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fake_run import fake_run

from freqkd_analysis.divergence import Cube
from freqkd_analysis.errors import FreqkdError, RunError
from freqkd_analysis.runfolder import read_run
from freqkd_train.metrics.boxes import make_detections, make_truth
from freqkd_train.score import Run

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("outputs", "collect", "subsets", "distilled", "detectors", "downstream", "cells", "differ", "trained", "page",
         "jobs", "run")  # fmt: skip


@pytest.fixture(scope="module")
def study() -> Iterator[dict[str, ModuleType]]:
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(ROOT / "study"))
    yield {name: importlib.import_module(name) for name in NAMES}
    patch.undo()
    for name in NAMES:
        sys.modules.pop(name, None)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_is_collected_to_the_same_bytes_without_its_paths(study: dict[str, ModuleType], tmp_path: Path) -> None:
    words = ["freqkd-analyze", "layers", "--data", "kit:/srv/me/pairs", "--out", "/srv/me/runs/first"]
    run = fake_run(tmp_path / "vit", command=words)
    made = study["collect"].collect(run, tmp_path / "results")
    first = contents(made)
    assert first == contents(study["collect"].collect(run, tmp_path / "results"))
    assert first == contents(study["collect"].collect(run, tmp_path / "again"))
    assert not [name for name, content in first.items() if b"/srv" in content or str(tmp_path).encode() in content]
    manifest = json.loads(first["manifest.json"])
    assert manifest["command"] == ["freqkd-analyze", "layers", "--data", "kit:pairs", "--out", "runs/vit"]
    assert (manifest["n"], manifest["seed"]) == (40, 0)


def test_what_is_collected_reads_as_a_run_with_the_same_answer(study: dict[str, ModuleType], tmp_path: Path) -> None:
    run = fake_run(tmp_path / "vit")
    whole, small = read_run(run), read_run(study["collect"].collect(run, tmp_path / "results"))
    for run_ in (small, whole):
        assert (run_.condition, run_.measure, run_.ends) == ("mean_removed", "cosine", ("low", "high"))
    assert small.verdict == whole.verdict and small.bands == whole.bands
    keys = ["condition", "layer", "measure"]
    both = small.ratio.merge(whole.ratio, on=keys, suffixes=("", "_whole"))
    assert len(both) == len(small.ratio) and {"shifted:8", "pixels"} <= set(both["condition"])
    np.testing.assert_allclose(both["ratio"], both["ratio_whole"], rtol=1e-5)


def test_the_profile_names_each_condition_by_its_own_rows(study: dict[str, ModuleType], tmp_path: Path) -> None:
    """paired, mean_removed and their ceilings differ in the made-up run by known levels: none may stand for another."""
    made = study["collect"].collect(fake_run(tmp_path / "vit"), tmp_path / "results")
    profile = pd.read_csv(made / "profile.csv").groupby("condition")["value"].mean()
    assert list(profile.sort_values().index) == ["paired", "mean_removed", "shuffled", "mean_removed_shuffled"]


def test_a_manifest_that_says_nothing_new_stays(study: dict[str, ModuleType], tmp_path: Path) -> None:
    content = {"data": {}, "network": {}, "n": 1, "command": [], "seed": 0, "seconds": 1.5, "commit": "a"}
    write = study["outputs"].write_manifest
    write(content, tmp_path)
    first = contents(tmp_path)
    write(content | {"seconds": 9.0, "commit": "b"}, tmp_path)
    assert contents(tmp_path) == first
    write(content | {"n": 2, "seconds": 9.0}, tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text())["seconds"] == 9.0
    with pytest.raises(AssertionError, match="lacks"):
        write({"n": 1}, tmp_path)


def test_paths_lose_their_machine(study: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FREQKD_TEST_DATA", "/data/kit/")
    given = ["kit:/data/kit/pairs", "/data/kitten/a", "a=/x/y/list.txt", "/x/vit", {"deep": "/x/lite0"}, "1/2", 0.5]
    assert study["outputs"].anonymous(given, runs=["vit"]) == [
        "kit:$FREQKD_TEST_DATA/pairs", "a", "a=list.txt", "runs/vit", {"deep": "lite0"}, "1/2", 0.5,
    ]  # fmt: skip


def made_cube(factor: float, sources: list[str], shift: np.ndarray, level: dict[str, float]) -> Cube:
    """Pairs whose high / low is level(source) x factor^shift in both layers, before a ceiling of high 1 and low 0.8."""
    names = tuple(f"p{i:03d}" for i in range(len(sources)))
    groups = tuple(f"{source}-g{i % 13}" for i, source in enumerate(sources))
    ratio = np.array([level[s] for s in sources]) * factor**shift
    low = 0.5 + 0.2 * np.random.default_rng(0).random((len(names), 2))
    own = np.stack([low, low * ratio[:, None]], axis=-1)
    ceiling = np.broadcast_to([0.8, 1.0], own.shape)
    values = {"mean_removed": own, "mean_removed_shuffled": ceiling, "paired": own, "shuffled": ceiling}
    return Cube((0, 1), ("low", "high"), ("cosine",), dict.fromkeys(values, names), dict.fromkeys(values, groups),
                {name: v[..., None] for name, v in values.items()})  # fmt: skip


def test_the_regression_finds_a_known_factor_and_a_confounded_one(study: dict[str, ModuleType]) -> None:
    """Sources of other ratio and other displacement look like an effect over all pairs; within them there is 2 %."""
    sources = ["near"] * 60 + ["far"] * 60
    shift = np.r_[np.linspace(0, 2, 60), np.linspace(3, 6, 60)]
    whole = made_cube(1.02, sources, shift, {"near": 1.0, "far": 1.5})
    px = dict(zip(whole.pairs["paired"], shift.tolist(), strict=True))
    of = dict(zip(whole.pairs["paired"], sources, strict=True))
    got = {row["quantity"]: row for row in study["subsets"].regression(whole, px, of, seed=0)}
    assert got["factor a px within sources"]["value"] == pytest.approx(1.02, rel=1e-9)
    assert got["factor a px"]["value"] > 1.1
    d_PLK = whole.of("paired", "cosine")
    slope = np.polyfit(shift, np.log(d_PLK[..., 1] / d_PLK[..., 0]).mean(axis=1), 1)[0]
    assert got["factor a px"]["value"] == pytest.approx(np.exp(slope), rel=1e-9)
    lines = [[np.polyfit(shift, d_PLK[:, layer, k], 1)[1] for k in (0, 1)] for layer in (0, 1)]
    at_zero = np.mean([(high / 1.0) / (low / 0.8) for low, high in lines])
    assert got["calibrated ratio at 0 px"]["value"] == pytest.approx(at_zero, rel=1e-9)
    assert got["calibrated ratio at 0 px"]["ci_low"] < at_zero < got["calibrated ratio at 0 px"]["ci_high"]


def test_a_part_of_the_pairs_is_answered_by_its_own_rows(study: dict[str, ModuleType]) -> None:
    sources = ["near"] * 60 + ["far"] * 60
    whole = made_cube(1.0, sources, np.zeros(120), {"near": 1.0, "far": 1.5})
    names = whole.pairs["paired"]
    for source, level in (("near", 1.0), ("far", 1.5)):
        row = study["subsets"].subset_row(whole, {n for n, s in zip(names, sources, strict=True) if s == source}, 0)
        assert (row["n"], row["groups"]) == (60, 13)
        assert row["calibrated_ratio"] == pytest.approx(0.8 * level)
        assert row["verdict"] == ("supports" if 0.8 * level > 1 else "against")
    two = {n for n, g in zip(names, whole.groups["paired"], strict=True) if g in ("far-g0", "far-g1")}
    assert study["subsets"].subset_row(whole, two, 0)["note"] == "2 groups make no interval"


def distillation(folder: Path, name: str, **loss: Any) -> Path:
    """The files of a finished distillation that the tables need."""
    run = folder / name
    run.mkdir(parents=True)
    network = {"name": "net", "trained": True, "sha256": "ab"}
    row = {"measure": "calibrated cosine", "band": "low", "before": 0.5, "after": 0.4, "change": -0.1, "ci_low": -0.2,
           "ci_high": -0.05, "n": 4, "groups": 3}  # fmt: skip
    (run / "manifest.json").write_text(json.dumps({
        "command": ["freqkd-train", "distill", "--out", str(run)], "commit": "abc", "seconds": 2.0,
        "config": {"seed": 0, "data": {"pairing": "paired", "size": [32, 32]}, "training": {"epochs": 1},
                   "loss": {"name": "released", "weights_from": ""} | loss},
        "teacher": network, "student": network, "data": {"held": 4, "train": 8}, "outcome": {"steps": 2},
        "heldout": [row, row | {"band": "high"}],
    }))  # fmt: skip
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "terms": {"a/low": 0.25, "b/low": 0.5, "a/high": 2.0}, "shares": {"a/low": 0.75, "b": 0.25}}\n'
        '{"step": 1, "val/loss": 3.0}\n'
    )
    return run


def test_distillations_become_three_tables(study: dict[str, ModuleType], tmp_path: Path) -> None:
    run = distillation(tmp_path / "vit-to-vit" / "distil", "freqkd-0")
    other = distillation(tmp_path / "vit-to-vit" / "distil", "freqkd-1")
    study["distilled"].body([str(run), str(other)], tmp_path / "out")
    terms, shares = (pd.read_csv(tmp_path / "out" / f"{name}.csv") for name in ("terms", "shares"))
    assert terms[["band", "term"]].values.tolist() == [["low", 0.75], ["high", 2.0]]
    assert shares[["tap", "band", "share"]].values.tolist() == [["a", "low", 0.75], ["b", "whole", 0.25]]
    heldout = pd.read_csv(tmp_path / "out" / "heldout.csv")
    assert heldout[["run", "arm", "seed", "band", "change"]].values.tolist() == [
        [f"vit-to-vit/freqkd-{seed}", "freqkd", seed, band, -0.1] for seed in (0, 1) for band in ("low", "high")
    ]
    made = json.loads((tmp_path / "out" / "manifest.json").read_text())["arms"]
    assert [one["command"][-1] for one in made] == [f"runs/vit-to-vit/distil/freqkd-{seed}" for seed in (0, 1)]
    first = contents(tmp_path / "out")
    study["distilled"].body([str(other)], tmp_path / "out")
    assert contents(tmp_path / "out") == first, "rows of runs that are not named stay"
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="no finished distillation"):
        study["distilled"].body([str(tmp_path / "empty")])


def test_an_arm_is_held_against_mse_of_its_own_study_and_seed(
    study: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm, other, *_ = [
        distillation(tmp_path / "a-to-b" / "distil", name) for name in ("freqkd-1", "mse-1", "mse-0", "freqkd-2")
    ]
    (other / "heldout").mkdir()

    def compare(first: Path, second: Path) -> pd.DataFrame:
        assert (first, second) == (arm / "heldout/after", other / "heldout/after"), "the arm less mse"
        row = {"condition": "mean_removed", "layer": "all", "measure": "calibrated cosine", "band": "low", "a": 0.4,
               "b": 0.3, "difference": 0.1, "ci_low": 0.05, "ci_high": 0.2, "n": 4, "groups": 3}  # fmt: skip
        return pd.DataFrame([row, row | {"layer": "2", "difference": 9.0}])

    monkeypatch.setattr(study["distilled"].comparison, "compare", compare)
    found = study["distilled"].to_mse(arm)
    assert found == {("calibrated cosine", "low"): {"to_mse": 0.1, "to_mse_low": 0.05, "to_mse_high": 0.2}}
    assert study["distilled"].to_mse(other) == {} == study["distilled"].to_mse(tmp_path / "a-to-b/distil/freqkd-2")


def test_a_curve_is_read_at_no_more_than_its_rate(study: dict[str, ModuleType]) -> None:
    """Two images, two persons: found at 0.9, a false one at 0.8, found at 0.7; so 0.5 up to the rate 0.5, then 0."""
    truth = make_truth(["a", "b"], classes=["person"], image=[0, 1], category=[0, 0], box=[[100, 100, 30, 80]] * 2)
    found = make_detections(image=[0, 0, 1], category=[0, 0, 0], score=[0.9, 0.8, 0.7],
                            box=[[100, 100, 30, 80], [400, 100, 30, 80], [100, 100, 30, 80]])  # fmt: skip
    table = study["detectors"].curve(truth, Run("one", found))
    assert set(table[table["fppi"] < 0.49]["miss_rate"]) == {0.5}
    assert set(table[table["fppi"] > 0.51]["miss_rate"]) == {0.0}


def test_the_page_is_what_the_results_say(study: dict[str, ModuleType]) -> None:
    text = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    assert text.count("<!-- table ") == len(study["page"].TABLES)
    assert study["page"].filled(text) == text, "run `make tables`, or python study/page.py RESULTS.md"


@pytest.mark.parametrize(
    "text, says",
    [("<!-- table ratio --> <!-- end ratio -->", 'no table "ratio"'), ("<!-- table ratios -->", "has no `<!-- end")],
)
def test_a_wrong_marker_is_told(study: dict[str, ModuleType], text: str, says: str) -> None:
    with pytest.raises(FreqkdError, match=says):
        study["page"].filled(text)


def downstream_study(root: Path, task: str = "segment") -> Path:
    """The files of a finished study of two methods and seeds, with figures that say whose they are."""
    folder = root / "vit-x"
    for n, method in enumerate(("none", "freqkd")):
        for seed in (0, 1):
            name = f"{method}-{seed}"
            for part in ("finetune", "evaluate"):
                (folder / part / name).mkdir(parents=True)
            config = {"task": task, "seed": seed, "head": {"kind": "light", "train": "frozen"},
                      "data": {"size": [48, 64]}, "training": {"epochs": 4}}  # fmt: skip
            words = ["freqkd-train", "mfnet", "--students", str(root / "vit"), *("x" * seed)]
            made = {"config": config, "command": words, "commit": "abc", "seconds": 1.5, "network": {"name": "vit"},
                    "steps": 3, "train": {"frames": 9}, "started": f"2026-01-0{1 + seed}",
                    "leak": {"shared": 3}}  # fmt: skip
            (folder / "finetune" / name / "manifest.json").write_text(json.dumps(made))
            figures = {"all": {"miou_8": 10 * n + seed, "miou_9": 20 * n + seed}}
            card = {"data_set": "mfnet", "annotation_set": "masks", "frames": 7, "split": "val"}
            found = {"task": task, "units": "percent", "method": method, "seed": seed, "figures": figures, "card": card}
            (folder / "evaluate" / name / "metrics.json").write_text(json.dumps(found))
    (folder / "distil_leak.json").write_text(json.dumps({"shared": 0}))
    (folder / "compare").mkdir()
    row = {"method": "freqkd", "metric": "miou_8", "seeds": 2, "value": 10.5, "low": 9.0, "high": 12.0, "spread": 0.7,
           "to_none": 10.0, "to_none_low": 8.0, "to_none_high": 12.0, "to_mse": float("nan"),
           "to_mse_low": float("nan"), "to_mse_high": float("nan"), "groups": 5}  # fmt: skip
    pd.DataFrame([row]).to_csv(folder / "compare" / "compare.csv", index=False)
    return folder


def test_a_downstream_study_is_collected_with_each_seed(study: dict[str, ModuleType], tmp_path: Path) -> None:
    folder = downstream_study(tmp_path)
    study["downstream"].body([str(folder)], tmp_path / "results")
    first = contents(tmp_path / "results")
    study["downstream"].body([str(folder)], tmp_path / "results")
    assert first == contents(tmp_path / "results")
    assert not [name for name, content in first.items() if str(tmp_path).encode() in content]
    table = pd.read_csv(tmp_path / "results" / "seeds.csv").set_index(["method", "seed", "metric"])["value"]
    assert table["freqkd", 1, "miou_9"] == 21 and table["none", 1, "miou_8"] == 1 and len(table) == 8
    made = json.loads(first["manifest.json"])["studies"][0]
    assert (made["seconds"], made["test"], made["train"], made["seeds"]) == (6.0, 7, 9, [0, 1])
    assert made["command"][-1] == "x", "the last command, which names all seeds"
    assert made["leak"] == {"distil": {"shared": 0}, "finetune": {"shared": 3}}
    with pytest.raises(RunError, match="holds no finished fine-tuning"):
        study["downstream"].body([str(tmp_path)], tmp_path / "other")


def test_every_row_has_a_cell_for_each_column(study: dict[str, ModuleType]) -> None:
    for name, table in study["page"].TABLES.items():
        widths = {line.count(" | ") for line in table().splitlines() if not line.startswith("|---")}
        assert len(widths) == 1, name


def test_a_difference_is_bold_only_where_its_interval_leaves_out_0(study: dict[str, ModuleType]) -> None:
    row = {"to_none": 1.0, "to_none_low": 0.1, "to_none_high": 2.0}
    assert study["trained"].signed(row, "to_none") == "**+1.00 [+0.1, +2.0]**"
    assert study["trained"].signed(row | {"to_none_low": -0.1}, "to_none") == "+1.00 [-0.1, +2.0]"


FAKE = """
import pathlib, sys
words = sys.argv[1:]
folder = pathlib.Path(words[words.index("--out") + 1])
folder.mkdir(parents=True, exist_ok=True)
print(*words, file=(folder / "said").open("a"))
if words[0] == "stops" and "--resume" not in words:
    (folder / "begun").touch()
    raise SystemExit(1)
(folder / "ended").touch()
"""


@pytest.fixture
def three(study: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study of three runs in a folder of its own, of which the second stops the first time."""
    (tmp_path / "fake_job.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    runs = [study["jobs"].Job(name, ("fake_job", word), "ended", "begun")
            for name, word in (("one", "goes"), ("two", "stops"), ("two/three", "goes"))]  # fmt: skip
    monkeypatch.setattr(study["jobs"], "jobs", lambda: runs)
    monkeypatch.setattr(study["run"], "lists", lambda: None)
    return tmp_path / "runs"


def test_a_study_that_was_stopped_goes_on_where_it_was(
    study: dict[str, ModuleType], three: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FreqkdError, match="two ended with status 1"):
        study["run"].main([])
    assert not (three / "two/three").exists()
    study["run"].main([])
    assert "3 runs, 1 of them there already" in capsys.readouterr().err
    assert (three / "one/said").read_text() == "goes --out runs/one\n"
    assert (three / "two/said").read_text().splitlines() == ["stops --out runs/two", "stops --out runs/two --resume"]
    study["run"].main(["--list"])
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == ["done"] * 3


def test_runs_are_chosen_by_name(study: dict[str, ModuleType], three: Path) -> None:
    study["run"].main(["one", "two/*"])
    assert (three / "one/ended").is_file() and (three / "two/three/ended").is_file()
    assert not (three / "two/said").exists()
    with pytest.raises(FreqkdError, match=r'no run "won"\.'):
        study["run"].main(["won"])


def test_every_result_is_of_a_run_of_the_study_and_every_run_has_one(
    study: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data" / "pairs").mkdir(parents=True)
    monkeypatch.setenv("FREQKD_TEST_DATA", str(tmp_path))
    names = [job.name for job in study["jobs"].jobs()]
    assert len(names) == len(set(names))
    results = ROOT / "results"
    analyses = {path.parent.name for path in results.glob("*/verdict.json")}
    arms = {
        one["run"].replace("/", "/distil/")
        for one in json.loads((results / "distilled/manifest.json").read_text())["arms"]
    }
    studies = {one["study"] for one in json.loads((results / "downstream/manifest.json").read_text())["studies"]}
    # Students and analyses of all pairs leave numbers in the studies alone that take them.
    assert analyses | arms | studies == {name for name in names if not name.startswith(("vit-all/", "lite0-all/"))}
    monkeypatch.delenv("FREQKD_TEST_DATA")
    with pytest.raises(FreqkdError, match="expected FREQKD_TEST_DATA to name a folder with data/pairs"):
        study["jobs"].jobs()
