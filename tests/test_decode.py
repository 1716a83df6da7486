"""Pixels come back as stored: against arrays written by hand, by another writer, and broken on purpose."""

from __future__ import annotations

import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from freqkd_analysis.data import decode
from freqkd_analysis.errors import DataError

RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)


def write_png(path: Path, pixels: np.ndarray, colour_type: int, size: tuple[int, int] | None = None) -> Path:
    """A PNG made here from the format's definition, so that writer and reader do not share a fault."""
    height, width = size or pixels.shape[:2]
    depth = 8 * pixels.dtype.itemsize
    body = pixels.astype(f">u{pixels.dtype.itemsize}")
    lines = b"".join(b"\0" + row.tobytes() for row in body)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def one_line(error: pytest.ExceptionInfo[DataError], path: Path) -> None:
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["png", "png by hand", "tiff", "tiff big-endian", "tiff lzw"])
def test_a_16_bit_ramp_comes_back_exact(tmp_path, kind):
    """Pillow's I;16 to L saturates at 255, and an 8-bit read drops the low byte: both would fail here."""
    path = tmp_path / f"ramp.{kind[:4].strip()}"
    if kind == "png by hand":
        write_png(path, RAMP, colour_type=0)
    elif kind.startswith("tiff") and kind != "tiff lzw":
        tifffile.imwrite(path, RAMP, byteorder=">" if "big" in kind else "<")
    else:
        save(path, RAMP, **({"compression": "tiff_lzw"} if "lzw" in kind else {}))
    pixels = decode.read_pixels(path)
    assert pixels.dtype == np.uint16
    np.testing.assert_array_equal(pixels, RAMP)
    ir, info = decode.read_ir(path, "range:0:65535")
    assert ir.dtype == np.float32
    np.testing.assert_array_equal(np.rint(ir.astype(np.float64) * 65535), RAMP)
    assert info == {"bits": 16, "conversion": "range:0:65535", "false_colour": False}


def test_a_window_is_linear_and_clips(tmp_path):
    path = save(tmp_path / "a.png", np.array([[0, 7000, 8000, 9000, 65535]], dtype=np.uint16))
    ir, _ = decode.read_ir(path, "range:7000:9000")
    np.testing.assert_array_equal(ir, np.float32([[0, 0, 0.5, 1, 1]]))


def test_the_per_image_conversion_records_its_numbers(tmp_path, rng):
    counts = rng.integers(7000, 9000, (50, 60)).astype(np.uint16)
    ir, info = decode.read_ir(save(tmp_path / "a.png", counts), "image")
    ordered = np.sort(counts.ravel().astype(float))
    low, high = ordered[int(0.01 * 2999)], ordered[int(np.ceil(0.99 * 2999))]
    assert info["conversion"] == f"image:{low:g}:{high:g}"
    np.testing.assert_allclose(ir, np.clip((counts - low) / (high - low), 0, 1), atol=1e-6)


def test_the_data_set_window_is_one_for_all_images(tmp_path):
    """Two images of different brightness keep their difference, which a stretch per image would hide."""
    dark = save(tmp_path / "dark.png", np.full((40, 40), 7000, np.uint16))
    bright = save(tmp_path / "bright.tiff", np.full((40, 40), 9000, np.uint16))
    window = decode.dataset_range([dark, bright])
    assert window == decode.dataset_range([bright, dark]) == "range:7000:9000"
    assert decode.read_ir(dark, window)[0].max() == 0.0
    assert decode.read_ir(bright, window)[0].min() == 1.0


def test_the_data_set_window_leaves_out_one_percent_at_either_end(tmp_path):
    window = decode.dataset_range([save(tmp_path / "a.png", RAMP)])
    low, high = decode.parse_range(window)
    assert abs(low - 655) <= 2
    assert abs(high - 64880) <= 2


def test_the_data_set_window_looks_at_the_same_files_in_any_order(tmp_path):
    paths = [save(tmp_path / f"{i}.png", np.full((9, 9), 1000 * i, np.uint16)) for i in range(1, 6)]
    assert decode.dataset_range(paths, files=3) == decode.dataset_range(paths[1:] + paths[:1], files=3)
    assert decode.dataset_range(paths, files=3) == "range:1000:5000"


def test_the_data_set_window_passes_over_broken_files_but_not_over_a_broken_set(tmp_path):
    good, bad = save(tmp_path / "a.png", np.full((9, 9), 7000, np.uint16)), tmp_path / "b.png"
    bad.write_bytes(b"nothing")
    assert decode.dataset_range([good, bad]) == "range:7000:7001"
    with pytest.raises(DataError, match=r"b\.png"):
        decode.dataset_range([bad])


def test_eight_bits_are_divided_by_255_whatever_the_format(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for name in ("a.png", "a.bmp", "a.tiff"):
        path = save(tmp_path / name, grey)
        ir, info = decode.read_ir(path, "range:7000:9000")
        np.testing.assert_array_equal(ir, grey.astype(np.float32) / 255)
        assert (info["bits"], info["conversion"]) == (8, "unit:255")
    assert decode.dataset_range([tmp_path / "a.png"]) == "unit:255"


def test_colour_comes_back_exact_and_grey_is_flagged(tmp_path, rng):
    colour = rng.integers(0, 256, (12, 10, 3)).astype(np.uint8)
    rgb, grey = decode.read_rgb(save(tmp_path / "colour.png", colour))
    np.testing.assert_array_equal(rgb, colour.astype(np.float32) / 255)
    assert (rgb.dtype, grey) == (np.float32, False)
    for name, pixels in {"one.png": colour[..., 0], "three.jpg": np.repeat(colour[..., :1], 3, axis=2)}.items():
        rgb, grey = decode.read_rgb(save(tmp_path / name, pixels))
        assert (rgb.shape, rgb.dtype, grey) == ((12, 10, 3), np.float32, True)


def test_a_little_colour_is_still_colour(tmp_path):
    pixels = np.full((20, 20, 3), 90, np.uint8)
    pixels[5, 5] = 90, 90, 110
    assert not decode.read_rgb(save(tmp_path / "a.png", pixels))[1]


def test_alpha_palette_and_one_bit_are_read(tmp_path):
    solid = np.full((4, 5, 4), (10, 20, 30, 0), np.uint8)
    rgb, _ = decode.read_rgb(save(tmp_path / "alpha.png", solid))
    np.testing.assert_array_equal(np.rint(rgb[0, 0] * 255), [10, 20, 30])
    solid[2:] = 90, 80, 70, 0
    Image.fromarray(solid[..., :3]).quantize(4).save(tmp_path / "p.png", transparency=b"\1\2")
    np.testing.assert_array_equal(np.rint(decode.read_rgb(tmp_path / "p.png")[0][0, 0] * 255), [10, 20, 30])
    Image.fromarray(np.eye(8, dtype=bool)).save(tmp_path / "one.png")
    np.testing.assert_array_equal(decode.read_ir(tmp_path / "one.png", "unit:255")[0], np.eye(8, dtype=np.float32))


def test_infrared_of_three_channels_is_one_channel_or_false_colour(tmp_path, rng):
    plane = rng.integers(0, 256, (16, 16)).astype(np.uint8)
    ir, info = decode.read_ir(save(tmp_path / "grey.png", np.repeat(plane[..., None], 3, axis=2)), "unit:255")
    np.testing.assert_array_equal(ir, plane.astype(np.float32) / 255)
    assert not info["false_colour"]
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    ir, info = decode.read_ir(save(tmp_path / "red.png", red), "unit:255")
    assert info["false_colour"]
    np.testing.assert_allclose(ir, 0.299, atol=1e-6)


def test_16_bit_colour_tiff_keeps_its_low_byte(tmp_path):
    pixels = np.stack([RAMP] * 3, axis=2)
    tifffile.imwrite(tmp_path / "a.tiff", pixels, photometric="rgb")
    np.testing.assert_array_equal(decode.read_pixels(tmp_path / "a.tiff"), pixels)
    ir, info = decode.read_ir(tmp_path / "a.tiff", "range:0:65535")
    assert info["bits"] == 16
    np.testing.assert_array_equal(np.rint(ir.astype(np.float64) * 65535), RAMP)


def test_16_bit_colour_png_is_refused_as_infrared_and_read_as_visible(tmp_path):
    path = write_png(tmp_path / "a.png", np.stack([RAMP] * 3, axis=2), colour_type=2)
    assert decode.bit_depth(path) == 16
    with pytest.raises(DataError, match="16-bit PNG of several channels") as error:
        decode.read_ir(path, "range:0:65535")
    one_line(error, path)
    rgb, _ = decode.read_rgb(path)
    assert np.abs(rgb[..., 0] - RAMP / 65535).max() < 1 / 255


def test_four_channels_are_colour_and_thermal(tmp_path, rng):
    pixels = rng.integers(0, 256, (6, 7, 4)).astype(np.uint8)
    pixels[0, 0, 3] = 0  # thermal 0 is no transparency: the colour there must survive
    rgb, grey, ir, _ = decode.read_rgbt(save(tmp_path / "a.png", pixels))
    np.testing.assert_array_equal(rgb, pixels[..., :3].astype(np.float32) / 255)
    np.testing.assert_array_equal(ir, pixels[..., 3].astype(np.float32) / 255)
    assert not grey
    with pytest.raises(DataError, match=r"expected 4 channels.*got 3"):
        decode.read_rgbt(save(tmp_path / "b.png", pixels[..., :3]))


@pytest.mark.parametrize("pixels", [np.zeros((5, 5), np.float32), np.full((5, 5), -3, np.int16)], ids=str)
def test_floats_and_negative_counts_are_refused(tmp_path, pixels):
    tifffile.imwrite(tmp_path / "a.tiff", pixels)
    with pytest.raises(DataError, match="expected") as error:
        decode.read_ir(tmp_path / "a.tiff", "range:0:9")
    one_line(error, tmp_path / "a.tiff")


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tiff", "a.bmp"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.6, 0.95])
def test_truncated_files_are_named_in_one_line(tmp_path, rng, name, keep):
    path = save(tmp_path / name, rng.integers(0, 256, (64, 64, 3)).astype(np.uint8))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(DataError) as error:
        decode.read_rgb(path)
    one_line(error, path)


def test_damaged_bytes_in_a_png_are_found(tmp_path, rng):
    path = save(tmp_path / "a.png", rng.integers(0, 256, (64, 64)).astype(np.uint8))
    broken = bytearray(path.read_bytes())
    broken[len(broken) // 2] ^= 0xFF
    path.write_bytes(bytes(broken))
    with pytest.raises(DataError, match="corrupt or truncated") as error:
        decode.read_ir(path, "unit:255")
    one_line(error, path)


def test_other_formats_and_missing_files_are_named(tmp_path):
    gif = save(tmp_path / "a.png", np.zeros((4, 4), np.uint8), format="GIF")
    with pytest.raises(DataError, match="no image of kind PNG, JPEG, TIFF, BMP") as error:
        decode.read_rgb(gif)
    one_line(error, gif)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DataError, match="cannot be opened"):
        decode.read_rgb(tmp_path / "folder.png")
    with pytest.raises(DataError, match="no image file") as error:
        decode.read_rgb(tmp_path / "none.png")
    one_line(error, tmp_path / "none.png")


@pytest.mark.parametrize("side", [9_600, 12_000, 60_000], ids=["Pillow warns", "Pillow warns still", "Pillow fails"])
def test_a_decompression_bomb_is_refused_before_decoding(tmp_path, side, monkeypatch):
    """Without our cap, the sizes between Pillow's warning and its error would be decoded."""
    monkeypatch.setattr(decode, "PIXEL_CAP", 90_000_000)
    bomb = write_png(tmp_path / "bomb.png", np.zeros((1, 1), np.uint8), colour_type=0, size=(side, side))
    with pytest.raises(DataError, match="decompression bomb") as error:
        decode.read_rgb(bomb)
    one_line(error, bomb)


def test_large_but_permitted_images_raise_no_warning(tmp_path, recwarn, monkeypatch):
    """90 MP lies above Pillow's warning and below a cap of 100 MP."""
    monkeypatch.setattr(decode, "PIXEL_CAP", 100_000_000)
    path = write_png(tmp_path / "large.png", np.zeros((1, 1), np.uint8), colour_type=0, size=(9_600, 9_600))
    assert decode.bit_depth(path) == 8
    assert not recwarn.list


@pytest.mark.parametrize(
    ("conversion", "told"),
    [("dataset", "dataset_range"), ("rang:1:2", 'Did you mean "range"'), ("range:1", "two numbers"),
     ("range:a:b", "two numbers"), ("range:9:9", "LO below HI"), ("range:0:inf", "LO below HI")],
)  # fmt: skip
def test_wrong_conversions_are_explained(tmp_path, conversion, told):
    path = save(tmp_path / "a.png", RAMP[:4])
    with pytest.raises(DataError, match=told):
        decode.read_ir(path, conversion)


def test_a_deep_file_among_shallow_ones_is_not_squeezed_into_8_bits(tmp_path):
    path = save(tmp_path / "a.png", RAMP[:4])
    with pytest.raises(DataError, match="has 16 bits where the data set has 8") as error:
        decode.read_ir(path, "unit:255")
    one_line(error, path)


def test_real_files_of_each_kind(benchmarks):
    """KAIST jpg, FLIR jpeg, MFNet four-channel png: shapes, ranges, and thermal that is not an alpha channel."""
    rgb, grey = decode.read_rgb(benchmarks / "kaist/images/set06/V001/visible/I00459.jpg")
    ir, info = decode.read_ir(benchmarks / "kaist/images/set06/V001/lwir/I00459.jpg", "unit:255")
    assert (rgb.shape, ir.shape, grey, info["bits"]) == ((512, 640, 3), (512, 640), False, 8)
    rgb, grey, thermal, _ = decode.read_rgbt(benchmarks / "mfnet/images/00095D.png")
    alone, _ = decode.read_ir(benchmarks / "mfnet/thermal/00095D.jpg", "unit:255")
    assert (rgb.shape, grey) == ((480, 640, 3), False)
    assert np.abs(thermal - alone).mean() < 0.02  # the same frame, through JPEG once


def test_decoding_in_threads_gives_the_same_pixels_and_leaves_the_warning_filters_alone(tmp_path, rng):
    paths = [save(tmp_path / f"{i}.png", rng.integers(0, 256, (20, 20, 3)).astype(np.uint8)) for i in range(24)]
    expected = [decode.read_rgb(path)[0] for path in paths]
    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, one in zip(pool.map(decode.read_rgb, paths), expected, strict=True):
                np.testing.assert_array_equal(got[0], one)
    assert warnings.filters == before
