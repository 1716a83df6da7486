"""Image files to float arrays: 8-bit, 14- and 16-bit PNG, TIFF, JPEG, BMP, with a named infrared conversion.

Values are taken as stored: no colour management, no rotation by metadata, no stretch. An 8-bit infrared image
is divided by 255 (`unit:255`). One of more bits needs a window of counts, by one of three conversions:

- `range:LO:HI`: the counts LO..HI become 0..1, values outside are clipped; the same for every image.
- `dataset`: such a window from the data set itself (`dataset_range`), found once and recorded as `range:LO:HI`.
- `image`: the 1st to 99th percentile of each image; this hides absolute temperature and is recorded as such.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from freqkd_analysis.errors import DataError, nearest

FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"))
PIXEL_CAP = 25_000_000
"""Most pixels of one image; a file that claims more is refused before it is decoded. In float32 so many are 300 MB."""

UNIT = "unit:255"
CONVERSIONS = ("dataset", "image", "range:LO:HI")

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_GREY_SPREAD = 3
"""Largest difference between channels, in 8-bit steps, that still is a grey image stored as colour JPEG."""

_opening = threading.Lock()


def read_rgb(path: Path) -> tuple[np.ndarray, bool]:
    """A visible image, (H, W, 3) float32 in [0, 1], and whether it is grey (one channel, or three alike).

    Alpha is dropped. 16-bit colour is read with at least its upper 8 bits. Raises: DataError naming the file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.png"
        >>> Image.new("L", (3, 2), 255).save(path)
        >>> rgb, grey = read_rgb(path)
        >>> rgb.shape, float(rgb.max()), grey
        ((2, 3, 3), 1.0, True)
    """
    return rgb_from_pixels(read_pixels(path))


def read_ir(path: Path, conversion: str) -> tuple[np.ndarray, dict[str, Any]]:
    """An infrared image, (H, W) float32 in [0, 1] (0 = low counts), and how it was converted.

    Args:
        conversion: `range:LO:HI`, `image` or `unit:255`; resolve `dataset` first with `dataset_range`.
    Returns: pixels and {"bits": 8 | 16 as stored, "conversion": name with numbers, "false_colour": bool}.
    Raises: DataError naming the file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.png"
        >>> Image.fromarray(np.array([[7000, 8000, 9000]], dtype=np.uint16)).save(path)
        >>> ir, info = read_ir(path, "range:7000:9000")
        >>> ir.tolist(), info["bits"]
        ([[0.0, 0.5, 1.0]], 16)
    """
    pixels = read_pixels(path)
    if pixels.ndim == 3 and pixels.dtype == np.uint8 and _png_depth(path) == 16:
        raise DataError(f"{path} is a 16-bit PNG of several channels, of which 8 bits can be read; save one channel.")
    return ir_from_pixels(pixels, conversion, path)


def read_rgbt(path: Path) -> tuple[np.ndarray, bool, np.ndarray, dict[str, Any]]:
    """An image of four 8-bit channels R, G, B, thermal (MFNet): what `read_rgb` and `read_ir` give, in turn."""
    pixels = read_pixels(path)
    if pixels.ndim != 3 or pixels.shape[2] != 4:
        channels = 1 if pixels.ndim == 2 else pixels.shape[2]
        raise DataError(f"{path}: expected 4 channels (R, G, B, thermal), got {channels}; is it a colour image alone?")
    return *rgb_from_pixels(pixels[..., :3]), *ir_from_pixels(pixels[..., 3], UNIT, path)


def rgb_from_pixels(pixels: np.ndarray) -> tuple[np.ndarray, bool]:
    scale = np.float32(np.iinfo(pixels.dtype).max)
    if pixels.ndim == 2 or pixels.shape[2] < 3:
        plane = pixels if pixels.ndim == 2 else pixels[..., 0]
        return np.repeat((plane / scale)[..., None], 3, axis=2).astype(np.float32, copy=False), True
    colour = pixels[..., :3]
    return (colour / scale).astype(np.float32, copy=False), _is_grey(colour)


def ir_from_pixels(pixels: np.ndarray, conversion: str, path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    bits, false_colour = 8 * pixels.dtype.itemsize, False
    if pixels.ndim == 3:
        colour = pixels[..., :3]
        false_colour = pixels.shape[2] >= 3 and not _is_grey(colour)
        # One channel of a grey image is the sensor's value; a palette has none, so its brightness has to do.
        pixels = colour @ _LUMA if false_colour else pixels[..., 0]
    info = {"bits": bits, "conversion": UNIT, "false_colour": false_colour}
    if bits == 8:
        return (pixels / np.float32(255)).astype(np.float32, copy=False), info
    if conversion == UNIT:
        raise DataError(f"{path} has 16 bits where the data set has 8; keep one bit depth, or name a range:LO:HI.")
    low, high = _percentiles(pixels) if conversion == "image" else parse_range(conversion)
    info["conversion"] = f"image:{low:g}:{high:g}" if conversion == "image" else conversion
    return np.clip((pixels - np.float32(low)) / np.float32(high - low), 0, 1), info


def parse_range(conversion: str) -> tuple[float, float]:
    """LO and HI of `range:LO:HI`, in counts.

    Example:
        >>> parse_range("range:7000:9000")
        (7000.0, 9000.0)
    """
    kind, *numbers = conversion.split(":")
    if kind != "range":
        raise DataError(
            f'expected an infrared conversion among {", ".join(CONVERSIONS)}, got "{conversion}".'
            f"{nearest(kind, ('dataset', 'image', 'range'))} `dataset` becomes a range in `dataset_range` first."
        )
    try:
        low, high = (float(number) for number in numbers)
    except ValueError:
        raise DataError(f'expected range:LO:HI with two numbers, got "{conversion}"; e.g. range:7000:9000.') from None
    if not (np.isfinite([low, high]).all() and low < high):
        raise DataError(f'expected LO below HI in range:LO:HI, got "{conversion}".')
    return low, high


def dataset_range(paths: Sequence[Path], files: int = 64) -> str:
    """The window of a data set: 1st to 99th percentile of counts over `files` of its infrared images.

    Looks at files spread evenly over the sorted paths, each with the same number of pixels at most, so that the
    answer depends neither on order nor on a seed. Unreadable files are passed over.

    Returns: `range:LO:HI` with whole counts, or `unit:255` when no looked-at file has more than 8 bits.
    Raises: DataError when none of the files can be read.
    """
    ordered = sorted(paths)
    picks = np.unique(np.linspace(0, len(ordered) - 1, min(files, len(ordered))).astype(int))
    counts, failure = [], None
    readable = 0
    for path in (ordered[i] for i in picks):
        try:
            deep = bit_depth(path) > 8
            pixels = read_pixels(path) if deep else None
        except DataError as error:
            failure = error
            continue
        readable += 1
        if pixels is not None and pixels.dtype == np.uint16:
            plane = (pixels if pixels.ndim == 2 else pixels[..., 0]).ravel()
            counts.append(plane[np.linspace(0, plane.size - 1, min(plane.size, 65536)).astype(int)])
    if failure and not readable:
        raise failure
    if not counts:
        return UNIT
    low, high = _percentiles(np.concatenate(counts))
    return f"range:{low}:{high}"


def bit_depth(path: Path) -> int:
    """8 or 16: bits a channel as stored, from the header alone."""
    with _opened(path) as image:
        return 16 if _deep(image, path) else 8


def read_pixels(path: Path) -> np.ndarray:
    """Pixels as stored: (H, W) or (H, W, C), uint8 or uint16; the first page of a TIFF.

    Raises: DataError naming the file when it is missing, of another format, too large, corrupt or truncated,
        or holds other than 8- or 16-bit whole numbers. A JPEG whose bytes were altered but not cut decodes to
        garbage without an error; the format has no checksum.
    """
    with _opened(path) as image:
        if image.format == "TIFF" and image.mode in ("RGB", "RGBA", "RGBX", "LA") and _deep(image, path):
            return _read_deep_tiff(path)
        if image.mode == "1":
            return np.asarray(image).astype(np.uint8) * np.uint8(255)
        if image.mode in ("L", "LA", "RGB", "RGBA", "RGBX"):
            return np.asarray(image)
        if image.mode.startswith("I;16"):
            # Never through convert("L"), which saturates at 255; astype settles the byte order.
            return np.asarray(image).astype(np.uint16)
        if image.mode == "I":
            return _as_counts(np.asarray(image), path)
        if image.mode in ("P", "PA", "CMYK", "YCbCr"):
            image.info.pop("transparency", None)
            return np.asarray(image.convert("RGB"))
        raise DataError(f"{path} holds pixels of kind {image.mode}; expected whole numbers of 8 or 16 bits.")


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The opened image, its header read and its size within the cap; every failure becomes one DataError."""
    try:
        # Pillow reports oversized headers as a warning; the filter list is global, hence the lock.
        with _opening, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=FORMATS)
        with image:
            if image.width * image.height > PIXEL_CAP:
                raise DataError(_too_large(path, f"{image.width}x{image.height} pixels"))
            yield image
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"no image file {path}; check the path and the list that names it.") from None
    except Image.DecompressionBombError:
        raise DataError(_too_large(path, "far more pixels")) from None
    except UnidentifiedImageError:
        raise DataError(f"{path} is no image of kind {', '.join(FORMATS)}; replace it.") from None
    except (PermissionError, IsADirectoryError) as error:
        raise DataError(f"{path} cannot be opened ({error.strerror}); check the file and its permissions.") from None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path} is corrupt or truncated ({reason}); replace it or leave it out.") from error


def _too_large(path: Path, what: str) -> str:
    return f"{path} claims {what}; expected at most {PIXEL_CAP} (a decompression bomb?). Leave it out or shrink it."


def _deep(image: Image.Image, path: Path) -> bool:
    """Whether a channel has more than 8 bits on disk; Pillow's mode hides it for colour images."""
    if image.mode.startswith("I"):
        return True
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (1,))) > 8  # type: ignore[attr-defined]
    return image.format == "PNG" and _png_depth(path) == 16


def _png_depth(path: Path) -> int:
    with open(path, "rb") as handle:
        header = handle.read(25)
    return header[24] if header.startswith(b"\x89PNG") and len(header) == 25 else 8


def _read_deep_tiff(path: Path) -> np.ndarray:
    import tifffile

    pixels = tifffile.imread(path, key=0)
    if pixels.ndim == 3 and pixels.shape[0] <= 4 < pixels.shape[2]:
        pixels = np.moveaxis(pixels, 0, 2)
    return _as_counts(pixels, path)


def _as_counts(pixels: np.ndarray, path: Path) -> np.ndarray:
    if not np.issubdtype(pixels.dtype, np.integer) or pixels.min() < 0 or pixels.max() > 65535:
        raise DataError(f"{path} holds {pixels.dtype} values outside 0..65535; expected 8- or 16-bit whole numbers.")
    return pixels.astype(np.uint16)


def _is_grey(colour: np.ndarray) -> bool:
    spread = _GREY_SPREAD * (257 if colour.dtype == np.uint16 else 1)
    # A few rows at a time: a copy of all in 32 bits would be the most memory that reading an image takes.
    for rows in np.array_split(colour, max(1, colour.shape[0] // 64)):
        wide = rows.astype(np.int32)
        if np.abs(wide - wide[..., :1]).max() > spread:
            return False
    return True


def _percentiles(counts: np.ndarray) -> tuple[int, int]:
    low = int(np.percentile(counts, 1, method="lower"))
    high = int(np.percentile(counts, 99, method="higher"))
    return low, max(high, low + 1)
