"""The manifest: hashes against known digests, git from a real checkout, JSON that any reader takes, atomic writes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from freqkd_analysis import __version__, provenance, schema
from freqkd_analysis.errors import RunError


def test_file_hash_is_the_published_digest(tmp_path: Path) -> None:
    """SHA-256 of `abc` as FIPS 180-2 prints it."""
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert provenance.sha256_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_file_hash_reads_past_one_buffer(tmp_path: Path) -> None:
    path = tmp_path / "big"
    content = np.random.default_rng(0).integers(0, 256, 3_000_001, dtype=np.uint8).tobytes()
    path.write_bytes(content)
    assert provenance.sha256_file(path) == hashlib.sha256(content).hexdigest()


def test_line_hash_is_that_of_the_joined_text_and_sees_every_border() -> None:
    assert provenance.sha256_lines(["é1", "b"]) == hashlib.sha256("é1\nb\n".encode()).hexdigest()
    assert provenance.sha256_lines(["ab", "c"]) != provenance.sha256_lines(["a", "bc"])
    assert provenance.sha256_lines([]) == hashlib.sha256(b"").hexdigest()


def _git(folder: Path, *arguments: str) -> str:
    isolated = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    name = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    done = subprocess.run(
        ["git", "-C", str(folder), *name, *arguments], capture_output=True, text=True, check=True, env=isolated
    )
    return done.stdout.strip()


def test_commit_of_a_checkout_and_its_changes(tmp_path: Path) -> None:
    _git(tmp_path, "init", "-q")
    assert provenance.commit(tmp_path) is None, "no commit yet"
    (tmp_path / "a").write_text("1")
    _git(tmp_path, "add", "a")
    _git(tmp_path, "commit", "-q", "-m", "Add a")
    head = _git(tmp_path, "rev-parse", "HEAD")
    assert provenance.commit(tmp_path) == head
    (tmp_path / "untracked").touch()
    assert provenance.commit(tmp_path) == head
    (tmp_path / "a").write_text("2")
    assert provenance.commit(tmp_path) == head + "+changes"
    (tmp_path / "installed").mkdir()
    assert provenance.commit(tmp_path / "installed") is None, "a folder below a foreign checkout is not its own"


def test_no_git_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commit(tmp_path) is None


def test_environment_names_what_ran_and_nobody() -> None:
    import numpy

    found = provenance.environment(device="cpu", threads=1, precision="fp32")
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["numpy"] == numpy.__version__
    assert set(provenance.LIBRARIES) <= set(found)
    assert (found["device"], found["threads"], found["precision"]) == ("cpu", 1, "fp32")
    text = json.dumps(found)
    assert str(Path.home()) not in text
    assert os.uname().nodename not in text


TAP = {"layer": 0, "tap": "blocks.0", "grid": np.array([32, 40]), "stride": 14, "channels": 8}
NEEDED = {"config": {"bands": "octave:3"}, "data": {}, "taps": [TAP]}
"""What every reader of a manifest needs."""


def _manifest(**sections: object) -> dict:
    return provenance.manifest(
        sections,
        environment={"device": "cpu"},
        started="2026-01-02T03:04:05+00:00",
        seconds=2.00049,
        command=["a", "b"],
    )


def test_manifest_has_its_parts_in_order() -> None:
    made = _manifest(data={"n": 2}, config={"pairs": 3})
    assert list(made) == [
        "schema", "command", "version", "commit", "started", "seconds", "environment", "config", "data",
    ]  # fmt: skip
    assert (made["schema"], made["version"], made["command"]) == (schema.VERSION, __version__, ["a", "b"])
    assert made["seconds"] == 2.0


def test_a_part_without_a_home_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="nework"):
        _manifest(nework={})


def test_manifest_survives_the_disk(tmp_path: Path) -> None:
    made = _manifest(
        config={
            "bands": "paper",
            "data": Path("pairs"),
            "layers": (1, 2),
            "seed": np.int64(3),
            "size": None,
            "norm": np.bool_(False),
        },
        data={"scale": np.float32(0.5), "registration_px": float("nan"), "skipped": [{"id": "<é>", "reason": "x"}]},
        taps=[TAP],
    )
    path = provenance.write_manifest(tmp_path / "run", made)
    assert path == tmp_path / "run" / "manifest.json"
    read = provenance.read_manifest(tmp_path / "run")
    expected = {"bands": "paper", "data": "pairs", "layers": [1, 2], "seed": 3, "size": None, "norm": False}
    assert read["config"] == expected
    assert read["data"] == {"scale": 0.5, "registration_px": None, "skipped": [{"id": "<é>", "reason": "x"}]}
    assert read["taps"] == [TAP | {"grid": [32, 40]}]
    strict = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert strict == read


def test_something_without_a_plain_form_is_refused_and_leaves_the_old_manifest(tmp_path: Path) -> None:
    provenance.write_manifest(tmp_path, _manifest(**NEEDED))
    with pytest.raises(TypeError, match="object"):
        provenance.write_manifest(tmp_path, _manifest(**NEEDED | {"config": {"pairs": object()}}))
    assert provenance.read_manifest(tmp_path)["config"] == NEEDED["config"]


def test_a_write_that_fails_leaves_the_old_manifest_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provenance.write_manifest(tmp_path, _manifest(**NEEDED))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        provenance.write_manifest(tmp_path, _manifest(**NEEDED | {"config": {"bands": "paper"}}))
    monkeypatch.undo()
    assert provenance.read_manifest(tmp_path)["config"] == NEEDED["config"]
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "no manifest.json in .*expected the folder of"),
        ('{"schema": 1', "not readable JSON"),
        ('{"schema": 0}', "expected schema 1, got 0"),
        ("[]", "expected an object, got a list"),
        ('{"schema": 99}', "expected schema 1, got 99"),
        ('{"schema": 1}', "expected config, got none"),
        (b"\xff\xfe", "not readable JSON"),
    ],
)
def test_a_bad_manifest_is_one_line(tmp_path: Path, content: str | bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(RunError, match=says) as caught:
        provenance.read_manifest(tmp_path)
    assert "\n" not in str(caught.value)
