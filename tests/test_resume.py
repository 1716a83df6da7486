"""A run killed anywhere and resumed is, to the last bit, the run that nobody killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_training
from tiny_training import PAIRS, SETTINGS, STEPS, Samples, train, unlike

from freqkd_analysis.errors import FreqkdError, RunError
from freqkd_train import checkpoint, engine, metrics_file


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was left alone."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder


def script(*words: object) -> list[str]:
    return [sys.executable, tiny_training.__file__, *map(str, words)]


def kills(folder: Path, seed: int, count: int) -> list[dict[str, Any]]:
    done = subprocess.run(script("kills", folder, seed, count), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(rows: list[dict[str, Any]]) -> None:
    assert [row for row in rows if row["unlike"] or any("failed" in name for name in row["killed"])] == []
    deaths = [name.rsplit(" ", 1)[0] for row in rows for name in row["killed"]]
    assert set(deaths) == set(tiny_training.KILLS)  # each way to die was met
    assert len(deaths) > len(rows)


def test_killed_runs_end_as_the_one_left_alone(tmp_path: Path) -> None:
    """Weights, average, optimiser, random state, step, best, metrics file, and the files that are left."""
    check(kills(tmp_path, seed=0, count=14))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_many_killed_runs(tmp_path: Path, seed: int) -> None:
    check(kills(tmp_path, seed, count=70))


def test_two_runs_are_equal(whole: Path, tmp_path: Path) -> None:
    train(tmp_path)
    assert unlike(whole, tmp_path) == []


def test_the_comparison_can_fail(whole: Path, tmp_path: Path) -> None:
    train(tmp_path, module=tiny_training.Student(dropout=0.1))
    found = unlike(whole, tmp_path)
    last = f"step-{STEPS:08d}.pt"
    assert {"metrics", f"{last} module", f"{last} optimiser", f"{last} ema"} <= set(found)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [2, 10])  # inside an epoch, and the last of one
def test_a_signal_saves_and_stops(
    whole: Path, tmp_path: Path, number: signal.Signals, step: int, capfd: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    source = Samples(before=lambda keys: os.kill(os.getpid(), number) if len(source.seen) == step - 1 else None)
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, source=source, say=said.append)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert said == [f"stopped after step {step} of {STEPS}; what is learned is kept"]
    assert capfd.readouterr().err.count("stopping after this step") == 1
    assert checkpoint.load(checkpoint.steps(tmp_path)[-1])["step"] == step
    again = Samples()
    train(tmp_path, source=again, resume=True, say=said.append)
    assert said[1] == f"resumed at step {step} of {STEPS}"
    assert unlike(whole, tmp_path) == []
    left_alone = Samples()
    train(tmp_path / "other", source=left_alone)
    assert source.seen + again.seen == left_alone.seen


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with subprocess.Popen(script("slow", tmp_path, 60), stderr=subprocess.PIPE) as running:
        wait_for(tmp_path / metrics_file.METRICS)
        time.sleep(0.2)  # into the first step, which takes a minute
        running.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert running.poll() is None
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=10) == -signal.SIGTERM


def wait_for(path: Path) -> None:
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


def test_signals_are_left_alone_outside_the_main_thread(tmp_path: Path, whole: Path) -> None:
    worker = threading.Thread(target=train, args=(tmp_path,))
    worker.start()
    worker.join()
    assert unlike(whole, tmp_path) == []


def test_a_finished_run_resumed_stays_as_it_is(whole: Path, tmp_path: Path) -> None:
    train(tmp_path)
    source = Samples()
    outcome = engine.fit(tiny_training.Student(), source, SETTINGS, 7, tmp_path, resume=True, shares_every=4,
                         say=tiny_training.quiet)  # fmt: skip
    assert (outcome.steps, outcome.epochs, outcome.resumed_at, source.seen) == (STEPS, 3, STEPS, [])
    train(tmp_path, resume=True)
    assert unlike(whole, tmp_path) == []


def test_a_cut_checkpoint_is_passed_over(whole: Path, tmp_path: Path) -> None:
    train(tmp_path)
    newest = checkpoint.steps(tmp_path)[-1]
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    said: list[str] = []
    train(tmp_path, resume=True, say=said.append)
    assert f"{newest.name} is cut" in said[0] and said[0].endswith("using step-00000012.pt instead")
    assert unlike(whole, tmp_path) == []


def test_nothing_to_resume_starts_at_the_beginning(whole: Path, tmp_path: Path) -> None:
    (tmp_path / metrics_file.METRICS).write_text('{"step": 1}\n')  # of a run killed before its first checkpoint
    said: list[str] = []
    train(tmp_path, resume=True, say=said.append)
    assert said == [f"no checkpoint in {tmp_path}: starting from step 1"]
    assert unlike(whole, tmp_path) == []


def test_a_taken_folder_is_refused(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(RunError, match="holds checkpoints of a run; go on with --resume, or name another folder"):
        train(tmp_path)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"settings": SETTINGS.model_copy(update={"lr": 0.5})}, "training.lr was 0.01 when this run began and is 0.5"),
        ({"source": Samples(PAIRS + 4)}, "pairs was 22 when this run began and is 26 now"),
        ({"fingerprint": {"teacher": "ab"}}, "teacher was not set when this run began and is ab now"),
        ({"module": tiny_training.Student(norm=False)}, "does not fit this student: norm.weight has shape"),
    ],
)
def test_another_run_is_not_resumed(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    train(tmp_path)
    kept = (tmp_path / metrics_file.METRICS).read_bytes()
    with pytest.raises(FreqkdError, match=says):
        train(tmp_path, resume=True, **change)
    assert (tmp_path / metrics_file.METRICS).read_bytes() == kept


def test_another_seed_is_not_resumed(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(FreqkdError, match="seed was 7 when this run began and is 8 now; resume with the same"):
        engine.fit(tiny_training.Student(), Samples(), SETTINGS, 8, tmp_path, resume=True)


def test_settings_of_the_machine_may_change(tmp_path: Path) -> None:
    train(tmp_path, SETTINGS)
    given = {name: getattr(SETTINGS, name) for name in engine.MAY_CHANGE}
    changed = {"keep": 5, "checkpoint_every": 1}
    assert changed.keys() < given.keys()
    train(tmp_path, SETTINGS.model_copy(update=changed), resume=True)


def test_a_metrics_file_that_lost_lines_is_refused(tmp_path: Path) -> None:
    train(tmp_path)
    (tmp_path / metrics_file.METRICS).write_text("")
    with pytest.raises(FreqkdError, match=r"metrics.jsonl has 0 bytes, \d+ when its checkpoint was written"):
        train(tmp_path, resume=True)


def test_steps_draw_from_seed_and_step_alone(tmp_path: Path) -> None:
    """Dropout of step s does not depend on what was drawn before: other evaluations leave the run as it is."""
    drawn = {}
    for name, noise in (("a", 0), ("b", 3)):
        module = tiny_training.Student()

        def evaluate(noise: int = noise) -> dict[str, float]:
            import torch

            torch.rand(noise)
            np.random.default_rng().random()
            return {"val/loss": 1.0}

        train(tmp_path / name, module=module, evaluate=evaluate)
        drawn[name] = module.state_dict()
    assert tiny_training.same(dict(drawn["a"]), dict(drawn["b"]))
