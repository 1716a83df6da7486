"""What every script of this folder writes: small tables, and a manifest that names no folder of the machine.

The same input gives the same bytes: numbers are cut to 6 significant digits, rows keep their order, and a manifest
that differs from the one already there in `seconds` and `commit` alone is left as it is.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freqkd_analysis import provenance, schema
from freqkd_analysis.errors import FreqkdError
from freqkd_analysis.terminal import run_app

if TYPE_CHECKING:
    import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
TEST_DATA = "FREQKD_TEST_DATA"
NEEDED = {"data": dict, "network": dict, "n": int, "command": list, "seed": int, "seconds": float, "commit": str}
"""What every manifest.json under results/ says, and in which form; tests/test_figures.py holds them to it."""

_PATH = re.compile(r"(?<![\w.$/])/(?:[\w.@+-]+/)*[\w.@+-]+")


def write_table(table: pd.DataFrame, path: Path) -> None:
    """A csv of `table`, numbers to 6 significant digits, whole or not at all."""
    schema.write_text(path, table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))


def merge_table(table: pd.DataFrame, path: Path, key: str) -> None:
    """`write_table`, but rows of other runs that are there stay: a study is tabulated in parts. Sorted by `key`.

    Args: key: the column that names the run, or the study.
    """
    import pandas as pd

    def read(source: Any) -> pd.DataFrame:
        return pd.read_csv(source, dtype=str, keep_default_na=False)  # as text: what stays keeps its bytes

    new = read(io.StringIO(table.to_csv(index=False, float_format="%.6g", lineterminator="\n")))
    if path.is_file():
        old = read(path)
        new = pd.concat([old[~old[key].isin(new[key])], new], ignore_index=True)
    write_table(new.sort_values(key, kind="stable"), path)


def merge_rows(rows: list[dict[str, Any]], folder: Path, name: str, key: str) -> list[dict[str, Any]]:
    """The list `name` of the manifest in `folder` with `rows` in the place of those of the same `key`."""
    path = folder / "manifest.json"
    old = json.loads(path.read_text(encoding="utf-8"))[name] if path.is_file() else []
    new = {row[key] for row in rows}
    return sorted([*(row for row in old if row[key] not in new), *rows], key=lambda row: str(row[key]))


def write_json(content: Any, path: Path, runs: Sequence[str] = ()) -> None:
    """A json file with `anonymous` paths, whole or not at all."""
    made = anonymous(provenance.plain(content), runs)
    schema.write_text(path, json.dumps(made, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_manifest(content: Mapping[str, Any], folder: Path, runs: Sequence[str] = ()) -> None:
    """`manifest.json` of a folder of results, with `anonymous` paths; see the head of this file for a second time.

    Raises: AssertionError when one of NEEDED is missing.
    """
    lacking = [name for name in NEEDED if name not in content]
    assert not lacking, f"{folder.name}: the manifest lacks {lacking}"
    made = anonymous(provenance.plain(content), runs)
    path = folder / "manifest.json"
    if not path.is_file() or _lasting(json.loads(path.read_text(encoding="utf-8"))) != _lasting(made):
        write_json(made, path)


def _lasting(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in ("seconds", "commit")}


def anonymous(value: Any, runs: Sequence[str] = ()) -> Any:
    """`value` with every absolute path in its texts replaced: the test data by `$FREQKD_TEST_DATA`, the folder of a
    run in `runs` by `runs/NAME`, anything else by its last part.

    Example:
        >>> anonymous(["kit:/home/me/pairs", "/tmp/a/vit", "--size", "csv:/x/train.csv", 3, "a/b"], runs=["vit"])
        ['kit:pairs', 'runs/vit', '--size', 'csv:train.csv', 3, 'a/b']
    """
    if isinstance(value, dict):
        return {key: anonymous(item, runs) for key, item in value.items()}
    if isinstance(value, list):
        return [anonymous(item, runs) for item in value]
    return _PATH.sub(lambda found: _name(found.group(), runs), value) if isinstance(value, str) else value


def _name(path: str, runs: Sequence[str]) -> str:
    data = os.environ.get(TEST_DATA, "").rstrip("/")
    if data and (path == data or path.startswith(data + "/")):
        return f"${TEST_DATA}{path[len(data) :]}"
    last = path.rsplit("/", 1)[1]
    return f"runs/{last}" if last in runs else last


def started(script: str, *words: str) -> list[str]:
    """The command that a derived table's manifest names."""
    return ["python", f"study/{script}", *words]


def main(body: Callable[[list[str]], None], usage: str) -> None:
    """Run a script: `body` gets the words after its name; a user's error is one line and status 2."""

    def checked(args: list[str]) -> None:
        if not args or args[0].startswith("-"):
            raise FreqkdError(f"usage: {usage}")
        body(args)

    run_app(checked, sys.argv[1:])
