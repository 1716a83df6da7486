"""Folders, lists and frame names: what every layout needs to find its files."""

from __future__ import annotations

import csv
import gzip
import io
import re
from collections.abc import Iterable
from pathlib import Path

from freqkd_analysis import schema
from freqkd_analysis.data.decode import SUFFIXES
from freqkd_analysis.data.records import PairRecord
from freqkd_analysis.errors import DataError, nearest, nearest_folder

RENDERED = "SYNTHETIC.md"
"""The file by which a rendered set says that it is one."""
_BLOCK = 20
_MODALITY = re.compile(r"[_-](rgb|vis|vi|visible|color|co|ir|infrared|lwir|thermal|th|previewdata)$", re.IGNORECASE)


def existing(path: str | Path) -> Path:
    """The folder `path`, or a DataError with the nearest name beside it.

    Example:
        >>> existing("/").as_posix()
        '/'
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise DataError(f"no folder {path}.{nearest_folder(path)} Check the path.")
    return path


def rendered(spec: str) -> bool:
    """Whether a folder of a specification says that its scenes are rendered: nothing is published of such a set.

    Example:
        >>> rendered("kaist:/")
        False
    """
    return any((Path(part).expanduser() / RENDERED).is_file() for part in spec.split(":")[1:])


def hint(spec: str) -> str:
    """The layout that is missing before folders that are there, as a ready phrase.

    Example:
        >>> hint("/:/"), hint("no/such:folders")
        (' For two folders: folder:/:/.', '')
    """
    folders = spec.split(":")
    if not all(part and Path(part).expanduser().is_dir() for part in folders):
        return ""
    if len(folders) == 2:
        return f" For two folders: folder:{spec}."
    listed = (Path(spec).expanduser() / "manifest.csv").is_file()
    return f" For a folder with manifest.csv: kit:{spec}." if listed else f" For two folders: folder:{spec}:INFRARED."


def child(base: Path, *names: str) -> Path | None:
    """The folder of `base` with one of `names`, whatever its case."""
    wanted = {name.lower() for name in names}
    return next((path for path in sorted(base.iterdir()) if path.name.lower() in wanted and path.is_dir()), None)


def images(folder: Path) -> dict[str, Path]:
    """Image files of a folder by bare name, sorted; a folder that is not there holds none."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        if found.setdefault(path.stem, path) is not path:
            raise DataError(f"two images share a name: {found[path.stem]} and {path.name}; keep one.")
    shortened = {bare(stem): path for stem, path in found.items()}
    return shortened if len(shortened) == len(found) else found


def bare(stem: str) -> str:
    """A file's name without the ending that tells its modality.

    Example:
        >>> bare("FLIR_00006_PreviewData"), bare("street_0047")
        ('FLIR_00006', 'street_0047')
    """
    return _MODALITY.sub("", stem)


def entries(listing: str, folder: Path) -> list[str]:
    """Entries of a list: a path, or a name in `folder` with or without .txt or .txt.gz."""
    tries = [Path(listing), *(folder / f"{listing}{suffix}" for suffix in ("", ".txt", ".txt.gz"))]
    path = next((path for path in tries if path.is_file()), None)
    if path is None:
        known = [p.name for p in folder.glob("*.txt*")] if folder.is_dir() else []
        raise DataError(f'no list "{listing}" in {folder}.{nearest(listing, known)} Give a file or a name in there.')
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a list ({type(error).__name__}); fetch it again.") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def rows(path: Path, required: tuple[str, ...]) -> list[dict[str, str]]:
    """Rows of a csv file with a header that holds at least the `required` columns; empty fields are ""."""
    path = path.expanduser()
    if not path.is_file():
        raise DataError(f"no list {path}; expected a csv file with the columns {', '.join(required)}.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            columns = list(reader.fieldnames or ())
            table = [{key: value or "" for key, value in row.items() if key} for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as csv in UTF-8 ({type(error).__name__}); save it again.") from error
    absent = [name for name in required if name not in columns]
    if absent:
        got = ", ".join(columns) or "none"
        raise DataError(f"{path}: expected the columns {', '.join(required)}, got {got}; add {', '.join(absent)}.")
    return table


def number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def light(stem: str) -> str:
    return {"D": "day", "N": "night"}.get(stem[-1:].upper(), "")


def block(stem: str) -> str:
    """The group of a frame by name: its last number, rounded down to a block of 20.

    Example:
        >>> block("street_0047"), block("00123D"), block("portrait")
        ('street_0040', '00120', 'portrait')
    """
    match = re.match(r"(.*?)(\d+)(\D*)$", stem)
    if not match:
        return stem
    head, digits, _ = match.groups()
    return f"{head}{int(digits) // _BLOCK * _BLOCK:0{len(digits)}d}"


def write_pairs(path: Path, records: Iterable[PairRecord]) -> None:
    """The list that the layout `csv` reads, with absolute paths; whole or not at all."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["rgb", "ir", "id", "group", "time"])
    for record in records:
        table.writerow([record.rgb.resolve(), record.ir.resolve(), record.id, record.group, record.time])
    schema.write_text(path, text.getvalue())
