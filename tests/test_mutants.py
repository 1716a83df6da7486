"""Properties that `tools/mutate.py` found no test for: a change of the code went by unseen, and now does not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from freqkd_analysis import spectral, statistics
from freqkd_analysis.bands import CORNER, Bands
from freqkd_train.metrics import kaist
from freqkd_train.metrics.boxes import make_truth

# KAIST's settings -----------------------------------------------------------------------------------------------

# As the benchmark's MATLAB kit lists them (experiment, height from, to, occlusion); both heights count.
PROTOCOL = {
    "Reasonable": (55, math.inf, {0, 1}), "Reasonable_small": (50, 75, {0, 1}),
    "Reasonable_occ=heavy": (50, math.inf, {2}), "All": (1, math.inf, {0, 1, 2}), "All_h20": (20, math.inf, {0, 1, 2}),
    "Near": (115, math.inf, {0}), "Medium": (45, 115, {0}), "Far": (1, 45, {0}),
    "Occ=none": (1, math.inf, {0}), "Occ=partial": (1, math.inf, {1}), "Occ=heavy": (1, math.inf, {2}),
}  # fmt: skip


def counted(boxes: list[tuple[float, float, float, float]], setting: str, occlusion: int) -> list[bool]:
    image, category = np.zeros(len(boxes), int), np.zeros(len(boxes), int)
    truth = make_truth(["a"], classes=["person"], image=image, category=category, box=boxes,
                       occlusion=[occlusion] * len(boxes), sizes=[(640, 512)])  # fmt: skip
    return kaist.counts(truth, kaist.SETTINGS[setting]).tolist()


@pytest.mark.parametrize("name", PROTOCOL)
def test_which_persons_count_under_a_setting(name: str) -> None:
    low, high, levels = PROTOCOL[name]
    heights = [low - 0.25, low, low + 1, min(high, 400) - 1, min(high, 400), min(high, 400) + 0.25]
    expected = [False, True, True, True, True, high == math.inf]
    for level in (0, 1, 2):
        got = counted([(100, 50, 20, h) for h in heights], name, level)
        assert got == [one and level in levels for one in expected], (name, level)


def test_no_setting_is_without_its_protocol() -> None:
    assert set(PROTOCOL) == set(kaist.SETTINGS)


@pytest.mark.parametrize("box, counts", [
    ((5, 100, 20, 60), True), ((4.75, 100, 20, 60), False), ((100, 5, 20, 60), True), ((100, 4.75, 20, 60), False),
    ((615, 100, 20, 60), True), ((615.25, 100, 20, 60), False),
    ((100, 447, 20, 60), True), ((100, 447.25, 20, 60), False),
])  # fmt: skip
def test_a_box_may_come_within_five_px_of_each_edge_and_no_nearer(box: tuple, counts: bool) -> None:
    assert counted([box], "Reasonable", 0) == [counts]


@pytest.mark.parametrize("box, counts", [
    ((615, 100, 20, 60), True), ((615.25, 100, 20, 60), False),
    ((100, 447, 20, 60), True), ((100, 447.25, 20, 60), False),
])  # fmt: skip
def test_without_a_size_an_image_is_one_of_kaist(box: tuple, counts: bool) -> None:
    truth = make_truth(["a"], classes=["person"], image=[0], category=[0], box=[box], occlusion=[0])
    assert kaist.counts(truth, kaist.SETTINGS["Reasonable"]).tolist() == [counts]


# Statistics -----------------------------------------------------------------------------------------------------


def test_weights_that_all_callers_share_cannot_be_written_to() -> None:
    with pytest.raises(ValueError, match="read-only"):
        statistics.bootstrap_weights(5, draws=3)[0, 0] = 7


def test_two_groups_have_an_effect_size_and_one_has_none() -> None:
    values = np.array([[1.0], [2.0]])
    np.testing.assert_allclose(statistics.effect_size(values), values.mean(0) / values.std(0, ddof=1))
    assert np.isnan(statistics.effect_size(values[:1])).all()


def test_an_acceleration_that_turns_the_limits_round_is_told() -> None:
    """BCa divides by 1 - a (bias + z): at or below 0 there is no limit, and the plain percentiles have to do."""
    jackknife = np.zeros((1000, 1))
    jackknife[0] = -1.0  # one group decides all: a is near 1/6
    draws = np.linspace(0, 1, 100_000)[:, None]
    near_all = statistics.bca(np.array([draws[-2, 0] + 1e-9]), draws, jackknife)
    assert near_all.method.tolist() == ["percentile"]
    np.testing.assert_allclose([near_all.low[0], near_all.high[0]], [0.025, 0.975], atol=2e-4)
    assert statistics.bca(np.array([0.5]), draws, jackknife).method.tolist() == ["bca"]


# Bands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(3, 3), (4, 6), (7, 5), (14, 14)])
def test_equal_modes_never_gives_an_empty_band(grid: tuple[int, int]) -> None:
    u, v = (np.abs(np.fft.fftfreq(n) * n).round().astype(int) for n in grid)
    radii = len({int(a) ** 2 * grid[1] ** 2 + int(b) ** 2 * grid[0] ** 2 for a in u for b in v})
    for count in range(1, radii + 1):
        bands = Bands.parse(f"equal-modes:{count}", grid)
        assert len(bands) == count and bands.modes.min() > 0 and (np.diff(bands.f_lo) > 0).all()


@pytest.mark.parametrize("grid", [(14, 14), (37, 46), (46, 37), (9, 30)])
def test_nominal_edges_of_the_papers_bands_are_frequencies_of_the_shorter_side(grid: tuple[int, int]) -> None:
    """A quarter and three quarters of its largest mode number, in cycles per token."""
    short = min(grid)
    largest = (short // 2) / short
    bands = Bands.parse("paper", grid)
    np.testing.assert_allclose(bands.f_lo, [0, 0.75 * largest])
    np.testing.assert_allclose(bands.f_hi, [0.25 * largest, CORNER])


@pytest.mark.parametrize("text", ["octave:3", "linear:4", "equal-modes:3", "0.1,0.3", "split:0.5", "paper",
                                  "released:0.5", "random:1"])  # fmt: skip
@pytest.mark.parametrize("grid", [(12, 12), (9, 14)])
def test_bands_begin_at_zero_and_end_at_the_corner(text: str, grid: tuple[int, int]) -> None:
    bands = Bands.parse(text, grid)
    assert bands.f_lo[0] == 0 and bands.f_hi[-1] == pytest.approx(math.sqrt(0.5)) and (bands.f_lo < bands.f_hi).all()
    held = bands.atoms().modes @ bands.atoms().to_bands
    np.testing.assert_allclose(held, (bands.weights**2).sum((1, 2)))


@pytest.mark.parametrize("seed", range(6))
def test_the_mean_is_in_the_first_of_two_random_bands(seed: int) -> None:
    assert Bands.parse(f"random:{seed}", (7, 10)).index[0, 0] == 0


# Transform ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(8, 8), (7, 9), (6, 11), (12, 5)])
@pytest.mark.parametrize("cut", ["0.3", "0.5", "0.8", "0.9"])  # 0.9 of an odd side reaches every mode: there is no rest
def test_parts_of_the_released_mask_are_those_of_a_transform(grid: tuple[int, int], cut: str) -> None:
    """Its rows and columns [c - h, c + h) of the centred spectrum, kept or removed, real part of the inverse."""
    x = np.random.default_rng(0).standard_normal((2, *grid, 3))
    mask = np.zeros(grid, bool)
    rows, columns = ((n // 2, max(1, int(n * float(cut) / 2))) for n in grid)
    mask[rows[0] - rows[1] : rows[0] + rows[1], columns[0] - columns[1] : columns[0] + columns[1]] = True
    centred = np.fft.fftshift(np.fft.fft2(x, axes=(1, 2)), axes=(1, 2))
    wanted = [np.fft.ifft2(np.fft.ifftshift(centred * m[None, :, :, None], axes=(1, 2)), axes=(1, 2)).real
              for m in (mask, ~mask)]  # fmt: skip
    split = spectral.band_filter(Bands.parse(f"released:{cut}", grid), torch.float64, torch.device("cpu"))
    maps = torch.from_numpy(x.reshape(2, -1, 3))
    for band, part in enumerate(wanted):
        got = split.part(maps, split.project(maps), band).numpy()
        np.testing.assert_allclose(got, part.reshape(2, -1, 3), atol=1e-12)


@pytest.mark.parametrize("how", [how for how in spectral.STANDARDIZATIONS if how != "none"])
def test_the_gradient_of_standardising_is_that_of_finite_differences(how: str) -> None:
    x = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: spectral.standardize(z, how), x)


@pytest.mark.parametrize("how", ["channel", "released"])
def test_a_constant_channel_is_exactly_zero_and_gets_no_gradient(how: str) -> None:
    x, pull = torch.randn(2, 1, 1702, 4, generator=torch.Generator().manual_seed(1))
    x[:, :, 1] = 0.1
    assert (x - x.mean(1))[0, 0, 1] != 0, "rounding leaves something to be taken for 0"
    x.requires_grad_()
    y = spectral.standardize(x, how)
    (y * pull).sum().backward()
    assert x.grad is not None
    assert (y[:, :, 1] == 0).all() and (x.grad[:, :, 1] == 0).all() and (x.grad[:, :, 0] != 0).any()


@pytest.mark.parametrize("n", [4, 7, 16])
def test_the_hann_window_is_a_squared_sine_that_keeps_white_noise(n: int) -> None:
    window = spectral.hann(n)
    sine2 = np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2
    np.testing.assert_allclose(window / window.max(), sine2 / sine2.max(), rtol=1e-12)
    assert np.mean(window**2) == pytest.approx(1)
