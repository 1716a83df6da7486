"""The tables of a run: columns, types, version; read, write and check them.

Every table is a pandas frame in memory and a Parquet (large) or CSV (small) file on disk. Writing goes to a
temporary name beside the target and is renamed, so that a table on disk is always whole.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freqkd_analysis.errors import RunError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

VERSION = 1

_TEXT, _INT, _SINGLE, _REAL = "string", "int32", "float32", "float64"

SPECTRA = {
    "condition": _TEXT, "pair": _TEXT, "group": _TEXT, "layer": _INT, "tap": _TEXT, "depth": _SINGLE,
    "radius": _INT, "f_lo": _REAL, "f_hi": _REAL, "modes": _INT,
    "p_rgb": _REAL, "p_ir": _REAL, "cross": _REAL, "p_diff": _REAL,
}  # fmt: skip
"""One row a condition, pair, layer and radius bin. Energies are sums over modes and channels of the
orthonormal transform, in squared feature units; f in cycles per token; `depth` = (layer + 1) / layers."""

COHERENCE = {
    "layer": _INT, "tap": _TEXT, "radius": _INT, "f_lo": _REAL, "f_hi": _REAL, "modes": _INT,
    "coherence": _REAL, "phase": _REAL, "n": _INT,
}  # fmt: skip
"""Debiased squared coherence over images (0..1, mean over the bin's modes), mean |phase| in radians."""

DIVERGENCE = {
    "condition": _TEXT, "pair": _TEXT, "group": _TEXT, "layer": _INT, "band": _TEXT,
    "f_lo": _REAL, "f_hi": _REAL, "measure": _TEXT, "value": _REAL,
}  # fmt: skip

SUMMARY = {
    "condition": _TEXT, "layer": _TEXT, "band": _TEXT, "measure": _TEXT,
    "mean": _REAL, "ci_low": _REAL, "ci_high": _REAL, "n": _INT, "groups": _INT,
}  # fmt: skip

RATIO = {
    "condition": _TEXT, "layer": _TEXT, "measure": _TEXT, "low": _REAL, "high": _REAL,
    "ratio": _REAL, "ratio_ci_low": _REAL, "ratio_ci_high": _REAL, "difference": _REAL, "p": _REAL, "p_fdr": _REAL,
    "calibrated_low": _REAL, "calibrated_high": _REAL, "calibrated_ratio": _REAL,
    "calibrated_ci_low": _REAL, "calibrated_ci_high": _REAL,
    "shift_low_px": _TEXT, "shift_high_px": _TEXT, "verdict": _TEXT,
}  # fmt: skip
"""`layer` is a number or `all`. `shift_*_px` holds a number such as `3.1`, `> 8`, or is empty."""

SIMILARITY = {
    "layer": _INT, "band": _TEXT, "measure": _TEXT, "value": _REAL, "null": _REAL, "adjusted": _REAL, "n": _INT,
}  # fmt: skip
"""Optional CKA and MMD over images, each beside its null."""

CONVERGENCE = ("condition", "layer", "band", "measure", "n", "groups", "width", "ci_low", "ci_high")
"""Columns of convergence.csv."""

PRIMARY_MEASURE = "cosine"
PRIMARY_CONDITIONS = ("mean_removed", "paired")
"""The measure and condition fixed before looking: the first of these conditions that the run holds."""

CONDITION_ORDER = ("paired", "mean_removed", "shuffled", "mean_removed_shuffled", "without_artefacts", "shifted",
                   "mean_removed_shifted", "grey", "inverted", "blur", "noise", "mean_removed_noise", "random",
                   "pixels")  # fmt: skip
"""The order in which figures, tables and text list the conditions (stems, without an amount)."""

TABLES = {
    "spectra.parquet": SPECTRA,
    "coherence.parquet": COHERENCE,
    "divergence.parquet": DIVERGENCE,
    "summary.csv": SUMMARY,
    "ratio.csv": RATIO,
    "similarity.csv": SIMILARITY,
}


STORED: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
"""Without its checksums, a flipped bit in a Parquet file often reads as another number."""


def condition_order(name: str) -> tuple[int, float, str]:
    """Sort key of a condition: the question and its ceiling, then the controls; amounts ascend; unknown ones last.

    Example:
        >>> sorted(["noise", "shifted:16", "shifted:4", "mine", "paired"], key=condition_order)
        ['paired', 'shifted:4', 'shifted:16', 'noise', 'mine']
    """
    stem, _, amount = name.partition(":")
    place = CONDITION_ORDER.index(stem) if stem in CONDITION_ORDER else len(CONDITION_ORDER)
    try:
        return place, float(amount or 0), name
    except ValueError:
        return place, math.inf, name


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; renamed onto it on success, removed on failure.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with atomic(folder / "a.txt") as temporary:
        ...     _ = temporary.write_text("whole")
        >>> [p.name for p in folder.iterdir()]
        ['a.txt']
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check(table: pd.DataFrame, columns: dict[str, str], name: str) -> None:
    """Raise RunError unless `table` has exactly `columns`, in order."""
    got, expected = list(table.columns), list(columns)
    if got != expected:
        missing = [c for c in expected if c not in got]
        unknown = [c for c in got if c not in expected]
        raise RunError(
            f"{name}: expected the columns of schema version {VERSION}; missing {missing or 'none'}, "
            f"unknown {unknown or 'none'}. Was it written by another version? Run `freqkd-analyze layers` again."
        )


def write(table: pd.DataFrame, path: Path) -> None:
    """Write one of `TABLES` (chosen by the file's name), checked and atomic."""
    columns = TABLES[path.name]
    check(table, columns, path.name)
    with atomic(path) as temporary:
        if path.suffix == ".csv":
            table.to_csv(temporary, index=False)
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pandas(table, preserve_index=False).cast(arrow(columns)), temporary, **STORED)


def read(path: Path) -> pd.DataFrame:
    """Read one of `TABLES`; RunError names the file when it is missing, broken or of another schema."""
    import pandas as pd

    columns = TABLES[path.name]
    if not path.is_file():
        raise RunError(
            f"no {path.name} in {path.parent}; expected the folder of a finished `freqkd-analyze layers` run."
        )
    try:
        if path.suffix == ".csv":
            table = pd.read_csv(path, dtype=_pandas(columns))
        else:
            table = pd.read_parquet(path, page_checksum_verification=True)
    except Exception as error:
        raise RunError(f"{path} cannot be read as a table ({type(error).__name__}); make it again.") from error
    check(table, columns, path.name)
    return table


def parts(path: Path, columns: Sequence[str] | None = None) -> Iterator[pd.DataFrame]:
    """A Parquet table of `TABLES` in pieces, one row group each, so that memory does not grow with its length."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    expected = TABLES[path.name]
    if not path.is_file():
        read(path)  # says what is missing
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            check(pd.DataFrame(columns=file.schema_arrow.names), expected, path.name)
            for number in range(file.num_row_groups):
                yield file.read_row_group(number, columns=columns).to_pandas()
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"{path} cannot be read as a table ({type(error).__name__}); make it again.") from error


@contextmanager
def writer(path: Path) -> Iterator[Callable[[pd.DataFrame], None]]:
    """Write one of the Parquet `TABLES` piece by piece; it appears whole when the block ends well, else not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = TABLES[path.name]
    with atomic(path) as temporary, pq.ParquetWriter(temporary, arrow(columns), **STORED) as file:

        def write_part(table: pd.DataFrame) -> None:
            check(table, columns, path.name)
            file.write_table(pa.Table.from_pandas(table, preserve_index=False).cast(arrow(columns)))

        yield write_part


def arrow(columns: dict[str, str]) -> pa.Schema:
    """The Parquet schema of a table's columns, with the schema version as metadata."""
    import pyarrow as pa

    kinds = {_TEXT: pa.string(), _INT: pa.int32(), _SINGLE: pa.float32(), _REAL: pa.float64()}
    fields = [pa.field(name, kinds[kind]) for name, kind in columns.items()]
    return pa.schema(fields, metadata={"freqkd_schema": str(VERSION)})


def _pandas(columns: dict[str, str]) -> dict[str, str]:
    return {name: "str" if kind == _TEXT else kind for name, kind in columns.items()}
