"""One geometry for both images, and controls that do what their names say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from freqkd_analysis import conditions
from freqkd_analysis.conditions import MARGIN, NOISE_LEVELS, SHIFTS, Geometry, gaussian_blur, luminance, sharpness
from freqkd_analysis.data.records import PairedSample
from freqkd_analysis.errors import FreqkdError


def coordinates(height: int, width: int) -> np.ndarray:
    """(H, W, 3): red is the column, green the row, each from 0 at the left/top border to 1 at the other, blue 0.5."""
    y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    return np.stack([x, y, np.full_like(x, 0.5)], axis=-1).astype(np.float32)


def texture(height: int, width: int, seed: int = 0, smooth: int = 4) -> torch.Tensor:
    """(3, H, W) in [0, 1] with a falling spectrum."""
    noise = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))
    coarse = torch.nn.functional.avg_pool2d(noise[None], smooth, 1, smooth // 2)[0, :, :height, :width]
    fine = noise[:, : coarse.shape[1], : coarse.shape[2]]
    mixed = coarse + 0.2 * fine
    return (mixed - mixed.min()) / (mixed.max() - mixed.min())


# Geometry -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, size, stride, expected",
    [("crop", (512, 640), 14, (504, 630)), ("pad", (512, 640), 14, (518, 644)), ("crop", (448, 448), 14, (448, 448)),
     ("pad", (448, 448), 14, (448, 448)), ("crop", (100, 33), 32, (96, 32)), ("pad", (100, 33), 32, (128, 64))],
)  # fmt: skip
def test_sizes_become_multiples_of_the_stride(kind, size, stride, expected):
    geometry = Geometry.make(kind, size, stride)
    assert geometry.size == expected
    assert geometry.content == (expected if kind == "crop" else size)


def test_the_paper_pads_kaist_to_37_by_46_tokens():
    geometry = Geometry.make("pad", (512, 640), 14)
    frame = geometry.frame(np.ones((512, 640, 3), np.float32))
    assert frame.shape == (3, 512, 640) and geometry.scale(512, 640) == 1  # native size, not resampled
    padded = geometry.padded(geometry.view(frame) - 0.3)
    assert padded.shape == (3, 518, 644)
    assert (padded[:, :512, :640] == 0.7).all() and (padded[:, 512:] == 0).all() and (padded[:, :, 640:] == 0).all()
    assert geometry.padded_tokens(14) == 37 * 46 - 36 * 45


@pytest.mark.parametrize("image", [(480, 640), (300, 300), (60, 500), (97, 41), (1000, 30)])
@pytest.mark.parametrize("size", [(64, 96), (112, 112)])
def test_crop_covers_view_and_margin(image, size):
    """Whatever the image's shape: no empty pixel in any view, also when shifted by the whole margin."""
    geometry = Geometry.make("crop", size, 16)
    frame = geometry.frame(np.ones(image, np.float32))
    assert frame.shape[1] >= geometry.size[0] + 2 * MARGIN and frame.shape[2] >= geometry.size[1] + 2 * MARGIN
    assert min(frame.shape[1] - geometry.size[0], frame.shape[2] - geometry.size[1]) <= 2 * MARGIN + 1  # and no more
    for dx, dy in [(0, 0), (MARGIN, 0), (0, MARGIN), (-MARGIN, -MARGIN)]:
        view = geometry.view(frame, dx, dy)
        assert view.shape == (3, *geometry.size) and (view - 1).abs().max() < 1e-6


@pytest.mark.parametrize("image", [(480, 640), (60, 500), (97, 41), (1000, 30)])
def test_pad_fits_the_image_into_its_content(image):
    geometry = Geometry.make("pad", (100, 120), 16)
    frame = geometry.frame(np.ones(image, np.float32))
    assert frame.shape[1] <= 100 and frame.shape[2] <= 120
    assert frame.shape[1] == 100 or frame.shape[2] == 120
    assert geometry.padded(frame).shape == (3, 112, 128)


@pytest.mark.parametrize("kind", ["crop", "pad"])
@pytest.mark.parametrize(
    "visible, infrared", [((480, 640), (480, 640)), ((480, 640), (240, 320)), ((512, 640), (256, 320))]
)
@pytest.mark.parametrize("size", [(224, 224), (112, 160), (512, 640)])
def test_both_images_keep_their_common_coordinates(kind, visible, infrared, size):
    """Paint each pixel with its place: after the geometry both images name the same place, within half a pixel."""
    geometry = Geometry.make(kind, size, 16)
    sample = PairedSample(rgb=coordinates(*visible), ir=coordinates(*infrared)[..., 0], id="p", group="g", meta={})
    rgb, ir = (geometry.view(frame) for frame in conditions.frames(sample, geometry))
    assert rgb.shape == ir.shape
    scale = geometry.scale(*visible)
    inner = slice(4, -4)  # the border of a resampled image is clamped
    x, y = rgb[0] * visible[1] * scale, rgb[1] * visible[0] * scale  # network px in the scaled frame
    assert (ir[0] * visible[1] * scale - x)[inner, inner].abs().max() <= 0.5
    steps_x, steps_y = x.diff(dim=1)[inner, inner], y.diff(dim=0)[inner, inner]
    np.testing.assert_allclose(steps_x.mean(), 1, atol=0.02)  # one network px a px, along both axes: no distortion
    np.testing.assert_allclose(steps_y.mean(), 1, atol=0.02)
    whole = geometry.frame(sample.rgb).shape[1:]
    for axis, (got, side, view) in enumerate(zip((rgb[1][:, 8], rgb[0][8]), whole, rgb.shape[1:], strict=True)):
        start = (side - view) // 2 if kind == "crop" else 0  # centred, or flush left and top
        exact = (np.arange(view) + start + 0.5) / side  # of the image's side: pixel i of the frame has its centre there
        np.testing.assert_allclose(got[inner] * side, exact[inner] * side, atol=0.02, err_msg=f"axis {axis}")


def test_down_scaling_is_antialiased():
    """A checkerboard of single pixels becomes grey, not stripes."""
    board = np.indices((400, 400)).sum(0) % 2
    frame = Geometry.make("crop", (64, 64), 16).frame(board.astype(np.float32))
    assert (frame[:, 5:-5, 5:-5] - 0.5).abs().max() < 0.1


def test_grey_images_get_three_equal_channels_and_stay_in_range():
    frame = Geometry.make("crop", (64, 64), 16).frame(np.random.default_rng(0).random((50, 70)).round())
    assert frame.shape[0] == 3 and torch.equal(frame[0], frame[2])
    assert frame.min() >= 0 and frame.max() <= 1


@pytest.mark.parametrize(
    "kind, size, says",
    [("corp", (64, 64), 'expected --geometry crop or pad, got "corp". Did you mean "crop"?'),
     ("crop", (8, 64), "expected --size of at least the network's stride 16, got 8x64"),
     ("pad", (64, 15), "got 64x15")],
)  # fmt: skip
def test_impossible_geometries_are_refused(kind, size, says):
    with pytest.raises(FreqkdError) as error:
        Geometry.make(kind, size, 16)
    assert says in str(error.value)


# Shifts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["crop", "pad"])
@pytest.mark.parametrize("d", SHIFTS)
def test_shifts_move_real_pixels_along_x_and_along_y(kind, d):
    geometry = Geometry.make(kind, (64, 80), 16)
    frame = geometry.frame(texture(90, 120).permute(1, 2, 0).numpy())
    (a, right), (b, down) = conditions.shifted(geometry, frame, d)
    assert a.shape == right.shape and b.shape == down.shape
    assert torch.equal(right[:, :, :-d], a[:, :, d:]) and torch.equal(down[:, :-d], b[:, d:])
    for image, axis in ((right, 2), (down, 1)):  # the new edge is scene, neither wrapped round nor filled
        edge, first = image.narrow(axis, image.shape[axis] - d, d), a.narrow(axis, 0, d) if axis == 2 else b[:, :d]
        assert not torch.equal(edge, first) and edge.std() > 0.01
        here = frame.unfold(1, image.shape[1], 1).unfold(2, image.shape[2], 1)
        assert (here.permute(1, 2, 0, 3, 4) == image).flatten(2).all(2).sum() == 1  # it is one crop of the frame


def test_a_frame_that_pad_keeps_is_as_wide_for_both_images_of_a_shift():
    geometry = Geometry.make("pad", (64, 64), 16)
    frame = geometry.frame(np.random.default_rng(0).random((64, 64, 3)))
    (a, right), (b, down) = conditions.shifted(geometry, frame, 8)
    assert a.shape == right.shape == (3, 64, 56) and b.shape == down.shape == (3, 56, 64)
    assert geometry.padded(a).shape == geometry.padded(down).shape == (3, 64, 64)


# Image controls -------------------------------------------------------------------------------------------------


def variant(name: str, rgb: torch.Tensor, ir: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    geometry = Geometry.make("pad", tuple(rgb.shape[1:]), 1)
    ((got, base, other),) = conditions.image_comparisons(geometry, rgb, ir, ("paired", name), seed)
    assert got == name and base is rgb
    return base, other


def test_grey_is_the_luminance_and_inverted_its_negative():
    rgb = texture(40, 50)
    expected = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]
    grey = variant("grey", rgb, rgb)[1]
    assert grey.shape == rgb.shape
    for channel in grey:
        torch.testing.assert_close(channel, expected)
    torch.testing.assert_close(variant("inverted", rgb, rgb)[1], (1 - expected).expand(3, -1, -1))


def test_blur_brings_the_visible_image_to_the_infrared_ones_sharpness():
    rgb, ir = texture(100, 120, 0), gaussian_blur(texture(100, 120, 1), 2.5)
    blurred = variant("blur", rgb, ir)[1]
    assert sharpness(rgb) > 2 * sharpness(ir)
    assert sharpness(blurred) == pytest.approx(sharpness(ir), rel=0.02)


def test_blur_leaves_an_image_that_is_no_sharper():
    soft, sharp = gaussian_blur(texture(60, 70, 0), 3), texture(60, 70, 1)
    assert conditions.matching_blur(soft, sharp) == 0 and variant("blur", soft, sharp)[1] is soft
    assert conditions.matching_blur(sharp, torch.full_like(sharp, 0.5)) == pytest.approx(8, abs=0.01)  # flat: the most


def test_sharpness_is_blind_to_gain_and_offset_and_falls_with_blur():
    image = texture(60, 70)
    assert sharpness(0.3 * image + 0.4) == pytest.approx(sharpness(image), rel=1e-4)
    values = [sharpness(gaussian_blur(image, sigma)) for sigma in (0, 0.5, 1, 2, 4)]
    assert values == sorted(values, reverse=True) and values[-1] < 0.2 * values[0]
    assert sharpness(torch.full((3, 9, 9), 0.4)) == 0


@pytest.mark.parametrize("sigma", [0.7, 2.0])
def test_gaussian_blur_is_scipys(sigma):
    from scipy.ndimage import gaussian_filter

    image = texture(40, 50)
    reach = max(1, round(3 * sigma))
    expected = gaussian_filter(image.double().numpy(), (0, sigma, sigma), mode="mirror", radius=(0, reach, reach))
    np.testing.assert_allclose(gaussian_blur(image, sigma).numpy(), expected, atol=1e-6)
    assert gaussian_blur(torch.rand(3, 3, 5), 8.0).isfinite().all()  # reach beyond the image


def test_noise_has_its_size_on_the_8_bit_grid_and_depends_on_the_seed():
    rgb = torch.full((3, 200, 200), 128 / 255)
    noisy = variant("noise", rgb, rgb, 1)[1]
    levels = noisy * 255
    torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
    difference = levels - 128
    expected = (NOISE_LEVELS**2 + 1 / 12) ** 0.5  # rounding to whole levels adds a twelfth
    assert float(difference.std()) == pytest.approx(expected, rel=0.01) and abs(float(difference.mean())) < 0.02
    assert abs(float((difference[0] * difference[1]).mean())) < 0.05  # channels are drawn apart
    assert torch.equal(variant("noise", rgb, rgb, 1)[1], noisy)
    assert not torch.equal(variant("noise", rgb, rgb, 2)[1], noisy)
    assert variant("noise", torch.ones_like(rgb), rgb)[1].max() <= 1 and variant("noise", 0 * rgb, rgb)[1].min() >= 0


def test_noise_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    variant("noise", texture(8, 8), texture(8, 8))
    assert torch.equal(torch.rand(3), expected)


def test_comparisons_come_in_order_with_shifts_twice_and_the_visible_image_first():
    geometry = Geometry.make("crop", (32, 32), 16)
    rgb, ir = (geometry.frame(texture(60, 60, seed).permute(1, 2, 0).numpy()) for seed in (0, 1))
    out = conditions.image_comparisons(geometry, rgb, ir, conditions.CONDITIONS, 0)
    assert [name for name, _, _ in out] == [*(f"shifted:{d}" for d in SHIFTS for _ in "xy"), "grey", "inverted", "blur",
                                            "noise"]  # fmt: skip
    for _, a, b in out:
        assert a.shape == b.shape == (3, 32, 32) and torch.equal(a, geometry.view(rgb))
    assert conditions.image_comparisons(geometry, rgb, ir, ("paired", "shuffled", "random"), 0) == []


def test_luminance_of_grey_is_itself():
    grey = torch.rand(1, 6, 7).expand(3, -1, -1)
    torch.testing.assert_close(luminance(grey), grey)


# The list -------------------------------------------------------------------------------------------------------


def test_lists_are_read_in_the_projects_own_order_with_paired_always_in():
    assert conditions.parse("none") == ("paired",)
    assert conditions.parse("all") == conditions.CONDITIONS
    assert conditions.parse("noise, shuffled,paired") == ("paired", "shuffled", "noise")
    assert conditions.parse("shifted:4") == ("paired", "shifted:4")
    assert set(conditions.IMAGE_CONDITIONS) == {*(f"shifted:{d}" for d in SHIFTS), *conditions._VARIANTS}


@pytest.mark.parametrize(
    "text, near", [("shufled", "shuffled"), ("shifted:3", "shifted:"), ("grey,inverse", "inverted")]
)
def test_an_unknown_condition_names_the_nearest(text, near):
    with pytest.raises(FreqkdError, match=f'expected all, none or some of paired, .*Did you mean "{near}'):
        conditions.parse(text)


@pytest.mark.parametrize("text", ["", ",", "all,grey"])
def test_half_written_lists_are_refused(text):
    with pytest.raises(FreqkdError, match="no condition"):
        conditions.parse(text)
