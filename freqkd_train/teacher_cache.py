"""The frozen teacher's features on disk: each pair plain and mirrored, computed apart, in half precision.

A network is not equivariant to mirroring: mirrored features of a plain image are not the features of the mirrored
image, so both views are computed and no stored map is ever turned. A value is stored times a power of two that brings
the largest one of its map below the largest half-precision number: rounding is then 2^-11 of the value, or 2^-39 of
the largest one where that is more, and nothing overflows.

FOLDER/freqkd-cache.json says what the features are of, plain-00000.bin and mirrored-00000.bin hold PAIRS_A_SHARD pairs
each (rows of `_row`) and end in a digest over key, name and content, index.json comes last and names them all.

Letters: B pairs, C channels, H x W tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freqkd_analysis import provenance, schema
from freqkd_analysis.data.records import PairRecord
from freqkd_analysis.errors import FreqkdError, NonFiniteError, nearest
from freqkd_analysis.features import Tap

VERSION = 1
ROOT = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "freqkd" / "teacher"
"""Where caches live, one folder each."""

MARKER, INDEX = "freqkd-cache.json", "index.json"
VIEWS = ("plain", "mirrored")
PAIRS_A_SHARD = 64
PAIRS_A_FORWARD = 16
_WHAT = "freqkd teacher features"
_DIGEST = 32
_LIMIT = 15
"""Stored values lie below 2^15; half precision ends at 65504."""
_RANGE = 126
"""Exponents that float32 can undo."""

Run = Callable[[list[str], bool], Mapping[str, Tensor]]
Say = Callable[[str], None]


class CacheError(FreqkdError):
    """Stored features that are not there, not whole, or of something else."""


def data_digest(records: Iterable[PairRecord]) -> str:
    """SHA-256 over ids and the size and time of change of both files; of a rendered pair, over its options.

    Example:
        >>> record = PairRecord("a", "g", Path("none"), Path("none"), meta={"seed": 1})
        >>> len(data_digest([record]))
        64
    """
    return provenance.sha256_lines(_state(record) for record in records)


def _state(record: PairRecord) -> str:
    told = [record.id]
    for path in (record.rgb, record.ir):
        try:
            there = path.stat()
            told.append(f"{path.resolve()} {there.st_size} {there.st_mtime_ns}")
        except OSError:
            told.append(json.dumps(provenance.plain(record.meta), sort_keys=True))
    return "\t".join(told)


def size_bytes(taps: Sequence[Tap], pairs: int) -> int:
    """Room on disk for both views of so many pairs, but for two small files of text.

    Example:
        >>> size_bytes([Tap(0, "blocks.0", 1.0, (14, 14), 16, 384, "tokens")], 1000)
        301061024
    """
    shards = -(-pairs // PAIRS_A_SHARD)
    return len(VIEWS) * (pairs * _row(taps).itemsize + shards * _DIGEST)


def _row(taps: Sequence[Tap]) -> np.dtype[Any]:
    """One pair: an exponent a tap, then the maps one after the other."""
    values = sum(tap.channels * tap.grid[0] * tap.grid[1] for tap in taps)
    return np.dtype([("exponents", "<i2", (len(taps),)), ("values", "<f2", (values,))])


def _key_digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(provenance.plain(key), sort_keys=True).encode()).hexdigest()


class TeacherCache:
    """Features of `ids`, plain and mirrored, in a folder of their own.

    Args:
        folder: of its own; `under` names one by the key.
        key: all that the features depend on, in plain values: digest of the weights; size, geometry, normalisation,
            what the teacher sees, conversion; layers, norm, precision; `data_digest`. Taps and ids are added to it.
        taps, ids: what is stored, in this order.
    Nothing is read or written until `build` or `read`.

    Example:
        >>> import tempfile
        >>> tap = Tap(0, "blocks.0", 1.0, (2, 3), 16, 4, "tokens")
        >>> cache = TeacherCache(Path(tempfile.mkdtemp()) / "made", {"weights": "abc"}, [tap], ["a", "b"])
        >>> cache.build(lambda ids, flipped: {"blocks.0": torch.full((len(ids), 4, 2, 3), 1.0 + flipped)})
        >>> cache.read(["b", "a"], [True, False])["blocks.0"][:, 0, 0, 0].tolist()
        [2.0, 1.0]
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], taps: Sequence[Tap], ids: Sequence[str]) -> None:
        self.folder, self.taps, self.ids = Path(folder), list(taps), list(ids)
        told = {"taps": [tap.describe() for tap in taps], "ids": provenance.sha256_lines(ids)}
        self.key: dict[str, Any] = provenance.plain(key) | provenance.plain(told)
        self.digest = _key_digest(self.key)
        self._place = {name: i for i, name in enumerate(self.ids)}
        assert len(self._place) == len(self.ids) > 0, "ids must be unique, and at least one"
        self._dtype = _row(self.taps)
        self._open: dict[str, np.ndarray] = {}
        self._digests: dict[str, str] | None = None
        self._sound: set[str] = set()

    @classmethod
    def under(cls, root: Path, key: Mapping[str, Any], taps: Sequence[Tap], ids: Sequence[str]) -> TeacherCache:
        """The cache of this key, these taps and pairs in its folder below `root`."""
        made = cls(root, key, taps, ids)
        made.folder = Path(root) / made.digest[:16]
        return made

    def build(self, run: Run, progress: Callable[[int, int], None] = lambda done, total: None,
              say: Say = print) -> None:  # fmt: skip
        """Compute and store what is missing; whole shards of an earlier build are kept.

        Args:
            run: (ids, flipped) -> {tap: (B, C, H, W)}, of the mirrored images when flipped.
            progress: told views done and views in all.
            say: told which shards were damaged and are made again.
        Raises: CacheError when the folder holds something else, or the disk is too small; NonFiniteError naming tap
            and pair.
        """
        self._claim()
        shards = [(view, number) for number in range(-(-len(self.ids) // PAIRS_A_SHARD)) for view in range(len(VIEWS))]
        found = {_shard(view, number): self._check(view, number, say) for view, number in shards}
        self._fits([name for name, digest in found.items() if digest is None])
        done, total = 0, len(VIEWS) * len(self.ids)
        for view, number in shards:
            name = _shard(view, number)
            if found[name] is None:
                (self.folder / INDEX).unlink(missing_ok=True)
                found[name] = self._write(view, number, run)
            done += len(self._members(number))
            progress(done, total)
        self._digests = {name: str(digest) for name, digest in found.items()}
        self._sound = set(found)
        index = {"what": _WHAT, "version": VERSION, "digest": self.digest, "shards": self._digests}
        self._kept(lambda: schema.write_text(self.folder / INDEX, json.dumps(index) + "\n"))

    def read(self, ids: Sequence[str], flipped: Sequence[bool] | Tensor | bool) -> dict[str, Tensor]:
        """{tap: (B, C, H, W) float32} of these pairs; `flipped` for all of them or one by one.

        Raises: CacheError for an id that is not stored, or a cache that is not whole, or of something else.
        """
        mirrored = [flipped] * len(ids) if isinstance(flipped, bool) else [bool(one) for one in flipped]
        rows = np.empty(len(ids), self._dtype)
        for i, (name, view) in enumerate(zip(ids, mirrored, strict=True)):
            if name not in self._place:
                raise CacheError(f"no stored features of pair {name}.{nearest(name, self.ids)} "
                                 f"{self.folder} holds {len(self.ids)} other pairs.")  # fmt: skip
            number, row = divmod(self._place[name], PAIRS_A_SHARD)
            rows[i] = self._shard_rows(int(view), number)[row]
        return self._unpacked(rows)

    def _unpacked(self, rows: np.ndarray) -> dict[str, Tensor]:
        values, exponents = torch.from_numpy(rows["values"]), torch.from_numpy(rows["exponents"].astype(np.float32))
        out, start = {}, 0
        for k, tap in enumerate(self.taps):
            count = tap.channels * tap.grid[0] * tap.grid[1]
            factor = torch.exp2(-exponents[:, k, None])
            maps = values[:, start : start + count].float().mul_(factor)
            out[tap.tap] = maps.view(len(rows), tap.channels, *tap.grid)
            start += count
        return out

    def _members(self, number: int) -> list[str]:
        return self.ids[number * PAIRS_A_SHARD : (number + 1) * PAIRS_A_SHARD]

    def _claim(self) -> None:
        """Mark the folder as this cache's, or find that it is."""
        marker = self.folder / MARKER
        if not marker.exists():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise CacheError(f"{self.folder} holds other files; give the teacher cache a folder of its own.")
            content = {"what": _WHAT, "version": VERSION, "digest": self.digest, "key": self.key,
                       "pairs": len(self.ids)}  # fmt: skip
            self._kept(lambda: schema.write_text(marker, json.dumps(content, indent=1) + "\n"))
        self._same()

    def _same(self) -> None:
        told = _marker(self.folder)
        if told is None:
            raise CacheError(f"{self.folder} is no teacher cache, or its {MARKER} is damaged; build it in "
                             "another folder.")  # fmt: skip
        if told.get("version") != VERSION:
            raise CacheError(f"{self.folder} is a teacher cache of version {told.get('version')}, expected {VERSION}; "
                             "remove it with `freqkd-train cache purge`.")  # fmt: skip
        if told.get("digest") != self.digest:
            stored = _stored_key(told)
            unlike = [name for name in {**stored, **self.key} if stored.get(name) != self.key.get(name)]
            raise CacheError(f"{self.folder} holds features of something else ({', '.join(unlike) or 'key'} differ); "
                             "give another folder, or remove it with `freqkd-train cache purge`.")  # fmt: skip

    def _fits(self, missing: list[str]) -> None:
        wanted = sum(self._bytes(int(name[-9:-4])) for name in missing)
        free = shutil.disk_usage(self.folder).free
        if wanted > free:
            raise CacheError(f"the teacher cache needs {wanted / 1e9:.2f} GB more in {self.folder}, "
                             f"{free / 1e9:.2f} GB are free; make room, or use training.cache_gb 0.")  # fmt: skip

    def _bytes(self, number: int) -> int:
        return len(self._members(number)) * self._dtype.itemsize + _DIGEST

    def _seal(self, view: int, number: int) -> Any:
        """A digest begun with key and place, so that no shard passes for another."""
        return hashlib.sha256(f"{self.digest} {_shard(view, number)}\n".encode())

    def _write(self, view: int, number: int, run: Run) -> str:
        members = self._members(number)
        rows = np.zeros(len(members), self._dtype)
        for start in range(0, len(members), PAIRS_A_FORWARD):
            part = members[start : start + PAIRS_A_FORWARD]
            maps = run(list(part), bool(view))
            self._pack(rows[start : start + len(part)], part, maps)
        content = rows.view(np.uint8).data
        seal = self._seal(view, number)
        seal.update(content)
        path = self.folder / _shard(view, number)

        def write() -> None:
            with schema.atomic(path) as temporary, temporary.open("wb") as handle:
                handle.write(content)
                handle.write(seal.digest())

        self._kept(write)
        self._open.pop(path.name, None)
        return str(seal.hexdigest())

    def _pack(self, rows: np.ndarray, names: Sequence[str], maps: Mapping[str, Tensor]) -> None:
        start = 0
        for k, tap in enumerate(self.taps):
            found = maps[tap.tap].detach().to("cpu", torch.float32)
            shape = (len(names), tap.channels, *tap.grid)
            assert tuple(found.shape) == shape, f"{tap.tap}: expected features {shape}, got {tuple(found.shape)}"
            flat = found.flatten(1).numpy()
            most = np.abs(flat).max(1)
            if not np.isfinite(most).all():
                pair = names[int(np.argmin(np.isfinite(most)))]
                raise NonFiniteError(f"the teacher's features at {tap.tap} are not finite for pair {pair}; expected "
                                     "finite numbers. Try training.precision fp32 or other weights.")  # fmt: skip
            exponents = np.where(most > 0, np.clip(_LIMIT - np.frexp(most)[1], -_RANGE, _RANGE), 0)
            rows["exponents"][:, k] = exponents
            stored = np.ldexp(flat, exponents[:, None]).astype(np.float16)
            rows["values"][:, start : start + flat.shape[1]] = stored
            start += flat.shape[1]

    def _check(self, view: int, number: int, say: Say = lambda text: None) -> str | None:
        """The digest of a shard on disk; None when it is missing or not whole."""
        path = self.folder / _shard(view, number)
        if not path.is_file():
            return None
        size, wanted = path.stat().st_size, self._bytes(number)
        if size != wanted:
            say(f"{path} has {size} bytes, expected {wanted}; it is made again")
            return None
        seal = self._seal(view, number)
        with path.open("rb") as handle:
            left = size - _DIGEST
            while left:
                piece = handle.read(min(left, 1 << 22))
                seal.update(piece)
                left -= len(piece)
            if handle.read() != seal.digest():
                say(f"{path} is damaged: its bytes are not those written; it is made again")
                return None
        return str(seal.hexdigest())

    def _shard_rows(self, view: int, number: int) -> np.ndarray:
        """The rows of a shard, mapped; checked when it is first touched and `build` has not done so."""
        name = _shard(view, number)
        if name not in self._open:
            digest = self._index().get(name)
            if name not in self._sound and (digest is None or self._check(view, number) != digest):
                raise CacheError(f"{self.folder / name} is damaged or missing; build the teacher cache again.")
            self._sound.add(name)
            self._open[name] = np.memmap(self.folder / name, self._dtype, "r", shape=(len(self._members(number)),))
        return self._open[name]

    def _index(self) -> dict[str, str]:
        if self._digests is None:
            self._same()
            try:
                told = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
                if (told["version"], told["digest"]) != (VERSION, self.digest):
                    raise ValueError
                self._digests = dict(told["shards"])
            except (OSError, ValueError, KeyError, TypeError):
                raise CacheError(f"{self.folder} is not finished, or its {INDEX} is damaged; build the teacher cache "
                                 "again: what is whole is kept.") from None  # fmt: skip
        return self._digests

    def _kept(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            raise CacheError(f"the teacher cache {self.folder} could not be written ({error.strerror or error}); make "
                             "room and start again: whole shards are kept.") from None  # fmt: skip


def _shard(view: int, number: int) -> str:
    return f"{VIEWS[view]}-{number:05d}.bin"


def _marker(folder: Path) -> dict[str, Any] | None:
    """The marker of a cache's folder, of any version; None when there is none of ours."""
    try:
        told = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return told if isinstance(told, dict) and told.get("what") == _WHAT else None


def _stored_key(told: Mapping[str, Any]) -> dict[str, Any]:
    key = told.get("key")
    return key if isinstance(key, dict) else {}


def _folders(root: Path) -> list[Path]:
    """Folders of caches: `root` itself and those right below it."""
    if not root.is_dir():
        return []
    below = sorted(path for path in root.iterdir() if path.is_dir() and not path.is_symlink())
    return [folder for folder in (root, *below) if _marker(folder) is not None]


def _files(folder: Path) -> list[Path]:
    """The files of a cache in its folder, unfinished ones too; nothing else that may lie there. The marker last."""
    names = (f"{view}-*.bin" for view in VIEWS)
    found = [path for name in (*names, INDEX) for pattern in (name, f".{name}.*.tmp") for path in folder.glob(pattern)]
    return [*sorted(path for path in found if path.is_file()), folder / MARKER]


def listing(root: Path = ROOT) -> list[dict[str, Any]]:
    """The caches at `root` and right below it: folder, size in GB, pairs, whether finished, and of which weights.

    Example:
        >>> listing(Path("no-such-folder"))
        []
    """
    rows = []
    for folder in _folders(root):
        told = _marker(folder) or {}
        rows.append({
            "folder": str(folder), "gb": sum(path.stat().st_size for path in _files(folder)) / 1e9,
            "pairs": told.get("pairs"), "finished": (folder / INDEX).is_file(),
            "weights": str(_stored_key(told).get("weights", ""))[:12],
        })  # fmt: skip
    return rows


def purge(root: Path = ROOT) -> int:
    """Remove the caches at `root` and right below it; bytes freed. Other files and folders stay.

    Example:
        >>> purge(Path("no-such-folder"))
        0
    """
    freed = 0
    for folder in _folders(root):
        for path in _files(folder):
            freed += path.stat().st_size
            path.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()
    return freed
