"""The command line as a user meets it: one line an error, exit status 2, nothing half-written."""

from __future__ import annotations

import json
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from freqkd_analysis import cli, terminal

FAST = ["--model", "resnet10t", "--weights", "random", "--size", "64", "--control-pairs", "4", "--device", "cpu"]


def call(capsys, *words: object, main=cli.main) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `freqkd-analyze WORDS`, or of another command line's `main`."""
    try:
        main([str(word) for word in words])
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    said = capsys.readouterr()
    return status, said.out, said.err


def refused(capsys, *words: object, main=cli.main) -> str:
    """The one line of an error, with exit status 2 and no traceback."""
    status, out, err = call(capsys, *words, main=main)
    lines = [line for line in err.splitlines() if line.startswith("Error")]
    assert status == 2 and len(lines) == 1 and "Traceback" not in err and not out, (status, out, err)
    return lines[0]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    root, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for number in range(8):
        image = np.cumsum(np.cumsum(rng.standard_normal((96, 96)), 0), 1)
        image = (255 * (image - image.min()) / np.ptp(image)).astype(np.uint8)
        for folder, pixels in (("vis", np.stack([image] * 3, -1) // 2), ("ir", 255 - image)):
            (root / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(root / folder / f"{number * 20:03d}.png")
    return root


def spec(pairs: Path) -> str:
    return f"folder:{pairs / 'vis'}:{pairs / 'ir'}"


@pytest.fixture(scope="module")
def run(pairs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.raises(SystemExit) as stop:
        cli.main(["layers", "--data", spec(pairs), "--pairs", "8", "--out", str(out), *FAST])
    assert not stop.value.code
    return out


def test_a_run_leaves_every_file(run):
    names = {path.name for path in run.iterdir()}
    assert names >= {"manifest.json", "spectra.parquet", "coherence.parquet", "divergence.parquet", "summary.csv",
                     "ratio.csv", "band_weights.json", "methods.md", "report.html", "figures"}  # fmt: skip
    assert "shards" not in names and not list(run.rglob("*.tmp"))


def test_table_on_stdout_talk_on_stderr(pairs, tmp_path, capsys):
    status, out, err = call(capsys, "layers", "--data", spec(pairs), "--pairs", 8, "--out", tmp_path / "r",
                            "--conditions", "shuffled", *FAST)  # fmt: skip
    assert status == 0 and "verdict" in out and "report.html" in err and "16/16 images" in err


def test_json_is_one_object(pairs, tmp_path, capsys):
    status, out, _ = call(capsys, "layers", "--data", spec(pairs), "--pairs", 8, "--out", tmp_path / "r", "--json",
                          "--conditions", "none", *FAST)  # fmt: skip
    assert status == 0 and json.loads(out)["verdict"] in ("supports", "against", "undetermined")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model", "resnet5O"], 'Did you mean "resnet50"?'),
        (["--layers", "9"], "layer 9 is out of range; the network has layers 0 to 4"),
        (["--layers", "layr*"], 'no layer matches "layr*"'),
        (["--bands", "0.2,0.1"], 'expected increasing band edges, got "0.2,0.1"'),
        (["--bands", "octve:3"], 'Did you mean "octave"?'),
        (["--conditions", "shufled"], 'Did you mean "shuffled"?'),
        (["--measure", "cosin"], 'Did you mean "cosine"?'),
        (["--standardize", "tokn"], 'Did you mean "token"?'),
        (["--geometry", "croop"], 'Did you mean "crop"?'),
        (["--window", "han"], 'Did you mean "hann"?'),
        (["--sample", "stratifid"], 'Did you mean "stratified"?'),
        (["--dtype", "bf"], 'Did you mean "bf16"?'),
        (["--preset", "papr"], 'Did you mean "paper"?'),
        (["--size", "0"], 'expected --size N or ROWSxCOLUMNS, 1 to 4096 px, got "0"'),
        (["--batch-size", "none"], 'expected --batch-size auto or a number of pairs from 1, got "none"'),
        (["--device", "cua"], 'Did you mean "cuda"?'),
        (["--data", "floder:a:b"], 'Did you mean "folder"?'),
        (["--data", "folder:nowhere:ir"], "nowhere"),
        (["--data", "folder:vis"], 'expected folder:VIS:IR, got "folder:vis" (1 part after folder:)'),
        (["--data", "docs:tests"], "For two folders: folder:docs:tests."),
        (["--data", "docs"], "For two folders: folder:docs:INFRARED."),
        (["--weights", "nowhere.safetensors"], "no weights file nowhere.safetensors"),
    ],
)
def test_wrong_words_get_one_line_and_leave_nothing(pairs, tmp_path, capsys, monkeypatch, words, says):
    monkeypatch.chdir(Path(__file__).parent.parent)
    line = refused(capsys, "layers", "--data", spec(pairs), "--out", tmp_path / "r", *FAST, *words)
    assert says in line
    assert not (tmp_path / "r").exists()


def test_unmatched_stems_say_how_many_and_which(pairs, tmp_path, capsys):
    import shutil

    shutil.copytree(pairs, tmp_path / "p")
    for name in ("000", "040"):
        (tmp_path / "p" / "ir" / f"{name}.png").unlink()
    status, _, err = call(capsys, "layers", "--data", spec(tmp_path / "p"), "--pairs", 6, "--out", tmp_path / "r",
                          "--conditions", "none", *FAST)  # fmt: skip
    assert status == 0 and "2 pairs lack a file" in err
    status, out, _ = call(capsys, "data", "verify", spec(tmp_path / "p"))
    assert status == 1 and "000" in out and "040" in out


def test_two_sizes_in_one_pair_count_as_unreadable(pairs, tmp_path, capsys):
    import shutil

    shutil.copytree(pairs, tmp_path / "p")
    Image.new("L", (40, 96)).save(tmp_path / "p" / "ir" / "020.png")
    line = refused(capsys, "layers", "--data", spec(tmp_path / "p"), "--pairs", 8, "--out", tmp_path / "r",
                   "--max-bad", 0, "--conditions", "none", *FAST)  # fmt: skip
    assert "1 pairs cannot be read, more than --max-bad 0" in line and "020" in line


def test_an_unreadable_pair_is_named_where_the_table_is_printed(pairs, tmp_path, capsys):
    import shutil

    shutil.copytree(pairs, tmp_path / "p")
    (tmp_path / "p" / "ir" / "020.png").write_bytes(b"no image")
    status, _, err = call(capsys, "layers", "--data", spec(tmp_path / "p"), "--pairs", 8, "--out", tmp_path / "r",
                          "--conditions", "none", *FAST)  # fmt: skip
    assert status == 0 and "left out, as they cannot be read: 020;" in err


def test_a_pickle_with_a_payload_is_refused_and_not_run(pairs, tmp_path, capsys):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"weight": Payload()}))
    line = refused(capsys, "layers", "--data", spec(pairs), *FAST, "--weights", tmp_path / "evil.pth")
    assert "evil.pth" in line and not (tmp_path / "owned").exists()


def test_a_taken_run_folder_is_refused_and_kept(run, pairs, capsys):
    before = (run / "ratio.csv").read_bytes()
    line = refused(capsys, "layers", "--data", spec(pairs), "--out", run, *FAST)
    assert line.endswith("exists; give another --out.") and (run / "ratio.csv").read_bytes() == before
    assert "it is finished. A new run" in refused(capsys, "layers", "--data", spec(pairs), "--out", run, "--resume")


def test_a_taken_folder_is_refused_before_the_network_is_made(pairs, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    line = refused(capsys, "layers", "--data", spec(pairs), "--out", tmp_path, "--model", "no-such-network")
    assert "exists; give another --out." in line
    assert "is no interrupted run" in refused(capsys, "layers", "--data", spec(pairs), "--out", tmp_path, "--resume")
    assert "is a file" in refused(capsys, "layers", "--data", spec(pairs), "--out", tmp_path / "notes.txt")


def test_progress_counts_images_of_all_blocks(pairs, tmp_path, capsys):
    """A control pair makes many images; counted as one pair, the time left would be far too short."""
    words = ["layers", "--data", spec(pairs), "--pairs", 8, *FAST, "--conditions", "shuffled,grey,blur"]
    total = json.loads(call(capsys, *words, "--dry-run", "--json")[1])["images"]
    assert (
        total == 8 * 2 + 4 * (2 + 2) and f"{total}/{total} images" in call(capsys, *words, "--out", tmp_path / "r")[2]
    )


def test_the_table_keeps_its_numbers_whole_on_a_narrow_terminal(run, capsys, monkeypatch):
    monkeypatch.setattr(terminal.sys.stdout, "isatty", lambda: True, raising=False)
    for width in (60, 80, 100, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("TERM", "dumb" if width == 80 else "xterm")
        terminal.print_run(run)
        out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
        assert "…" not in out, width
        assert max(map(len, out.splitlines())) <= max(width, 80), width
        assert ("shift px low" in out) == (width >= 115), width


def test_resume_without_a_run_says_what_is_expected(pairs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "nothing to resume" in refused(capsys, "layers", "--data", spec(pairs), "--resume", *FAST)
    assert "nothing to resume" in refused(capsys, "layers", "--data", spec(pairs), "--resume", "--out", "r", *FAST)


@pytest.mark.parametrize("command", [["summarize"], ["figures"], ["report"], ["compare", "x"]])
def test_reading_commands_need_a_run(tmp_path, capsys, command):
    refused(capsys, *command, tmp_path / "none")


def test_a_parquet_of_another_schema_is_named(run, tmp_path, capsys):
    import shutil

    import pandas as pd

    shutil.copytree(run, tmp_path / "r")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "r" / "spectra.parquet")
    assert "schema version" in refused(capsys, "summarize", tmp_path / "r")


def test_other_bands_come_from_the_stored_spectra(run, capsys):
    status, out, _ = call(capsys, "summarize", run, "--bands", "split:0.5")
    assert status == 0 and "verdict" in out and (run / "rebanded-split-0.5" / "ratio.csv").is_file()
    assert "edge" in refused(capsys, "summarize", run, "--bands", "0.2")


def test_another_floor_says_its_folder_last(run, capsys):
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    for more in ([], ["--json"]):
        status, _, talk = call(capsys, "summarize", run, "--measure", "nmse", *more)
        assert status == 0 and str(run / "measures-nmse") in talk.splitlines()[-1]
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_summarize_figures_and_report_repeat_the_same_bytes(run, capsys):
    names = ["divergence.parquet", "summary.csv", "ratio.csv", "band_weights.json", "verdict.json", "report.html",
             "methods.md", *(f"figures/{path.name}" for path in (run / "figures").iterdir())]  # fmt: skip
    before = {name: (run / name).read_bytes() for name in names}
    for command in ("summarize", "figures", "report"):
        assert call(capsys, command, run)[0] == 0
    assert [name for name in names if (run / name).read_bytes() != before[name]] == []


def test_compare_shows_differences(run, capsys):
    status, out, _ = call(capsys, "compare", run, run, "--json")
    rows = json.loads(out)
    assert status == 0 and {row["difference"] for row in rows} <= {0, None} and rows[0]["difference"] == 0


def test_dry_run_says_what_it_would_take(pairs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = call(capsys, "layers", "--data", spec(pairs), "--dry-run", "--json", *FAST)
    said = json.loads(out)
    assert status == 0 and {"pairs", "layers", "seconds", "memory_bytes", "disk_bytes"} <= said.keys()
    assert list(tmp_path.iterdir()) == []


def test_models_list_layers_doctor_and_data_list(capsys):
    demo = json.loads(call(capsys, "models", "--json")[1])[0]
    assert demo == {"name": "freqkd_demo", "weights": "demo", "layers": 8, "grid": "14x14", "stride": "16",
                    "channels": "160"}  # fmt: skip
    assert "freqkd_demo" not in call(capsys, "models", "resnet1?")[1]
    assert 'no network matches "no-such-*"' in refused(capsys, "models", "no-such-*")
    rows = json.loads(call(capsys, "models", "resnet18", "--json")[1])
    assert [row["stride"] for row in rows] == [2, 4, 8, 16, 32]
    assert 'Did you mean "resnet18"' in refused(capsys, "models", "resnet1B")
    assert "torch" in call(capsys, "doctor")[1]
    assert "kaist" in call(capsys, "data", "list")[1]


def test_synthetic_scenes_are_written_and_read_back(tmp_path, capsys):
    out = tmp_path / "scenes"
    assert call(capsys, "data", "synth", out, "--layout", "kaist", "--options", "pairs=4,groups=2,size=96x80")[0] == 0
    status, text, _ = call(capsys, "data", "verify", f"kaist:{out}", "--json")
    assert json.loads(text)["problems"] == [] and status == 0
    assert str(out) in refused(capsys, "data", "synth", out)


def test_help_is_quick_and_every_command_has_an_example(capsys):
    names = ["layers", "models", "summarize", "figures", "report", "compare", "doctor",
             "data list", "data verify", "data synth"]  # fmt: skip
    for name in names:
        status, out, _ = call(capsys, *name.split(), "--help")
        assert status == 0 and "Example: freqkd-analyze" in " ".join(out.split()), name
    heavy = "('torch', 'pandas', 'matplotlib', 'numpy')"
    code = f"import sys, freqkd_analysis.cli; print([m for m in {heavy} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_a_run_whose_spectra_changed_on_disk_is_not_summarized(run, tmp_path, capsys):
    content = bytearray((run / "spectra.parquet").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "spectra.parquet").write_bytes(content)
    (tmp_path / "manifest.json").write_bytes((run / "manifest.json").read_bytes())
    said = refused(capsys, "summarize", tmp_path)
    assert f"{tmp_path / 'spectra.parquet'} cannot be read as a table" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "spectra.parquet"]


def test_a_full_disk_is_one_line_and_keeps_what_was_there(run, capsys, monkeypatch):
    import errno

    from freqkd_analysis import schema

    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(schema.os, "fsync", full)
    assert "No space left on device" in refused(capsys, "summarize", run)
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def start(pairs: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "freqkd_analysis", "layers", "--data", spec(pairs), "--pairs", "8", *FAST, *more]
    command += ["--out", str(out)]
    # A shell's background jobs ignore SIGINT, and so would all that they start.
    unignored = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=unignored)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_a_signal_leaves_a_run_that_resumes(pairs, run, tmp_path, capsys, kind):
    out = tmp_path / "r"
    process = start(pairs, out)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(out.glob("shards/main-*.npz")):
        time.sleep(0.01)
    process.send_signal(kind)
    err = process.communicate(timeout=60)[1]
    if kind != signal.SIGKILL:
        assert process.returncode == 130 and "Traceback" not in err
        again = shlex.split(err.splitlines()[-1].partition("Go on with: ")[2])
        assert again[0] == "freqkd-analyze" and again[-3:] == ["--out", str(out), "--resume"]
        assert again[1:-1] == process.args[3:]
    assert not (out / "spectra.parquet").exists()
    assert call(capsys, "layers", "--data", spec(pairs), "--pairs", 8, "--out", out, "--resume", *FAST)[0] == 0
    for name in ("spectra.parquet", "divergence.parquet", "coherence.parquet", "summary.csv", "ratio.csv"):
        assert (out / name).read_bytes() == (run / name).read_bytes(), name


def test_two_processes_give_the_numbers_of_one(pairs, run, tmp_path):
    out = tmp_path / "r"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "freqkd_analysis", "layers", "--data", spec(pairs), "--pairs", "8", *FAST]  # fmt: skip
    command += ["--out", str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("spectra.parquet", "divergence.parquet", "coherence.parquet", "summary.csv", "ratio.csv"):
        assert (out / name).read_bytes() == (run / name).read_bytes(), name
