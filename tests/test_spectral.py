"""Band energies, cross spectra, splits and bases against float64 NumPy by another road."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.fft
import scipy.ndimage
import torch
from hypothesis import given
from hypothesis import strategies as st

from freqkd_analysis.bands import Bands
from freqkd_analysis.errors import FreqkdError
from freqkd_analysis.spectral import (
    STANDARDIZATIONS,
    CrossSpectrum,
    band_energies,
    complex_maps,
    cross_modes,
    cross_spectrum,
    hann,
    real_basis,
    real_numbers,
    split_bands,
    standardize,
)

SIDES = [1, 2, 3, 5, 8, 13, 14]
GRIDS = [(h, w) for h in SIDES for w in SIDES] + [(37, 46), (24, 18), (7, 31), (16, 40)]
FEW = [(1, 7), (5, 8), (8, 5), (13, 13), (14, 14), (9, 16), (37, 46)]
SPECS = ["octave:3", "linear:7", "equal-modes:2", "0.11,0.3", "split:0.5", "paper", "released:0.5", "released:0.25"]
COVERING = [text for text in SPECS if text != "paper"]


def draw(grid, seed: int = 0, shape: tuple[int, int] = (2, 3), mean: float = 0.5) -> torch.Tensor:
    """(B, C, H, W) float64 with a mean and more energy in low frequencies."""
    x = np.random.default_rng(seed).standard_normal((*shape, *grid))
    return torch.from_numpy(x + 0.7 * np.roll(x, 1, -1) + 0.5 * np.roll(x, 1, -2) + mean)


def masked_parts(x: torch.Tensor, bands: Bands) -> np.ndarray:
    """(K, B, C, H, W): real part of the inverse transform of each masked spectrum."""
    masks = bands.index == np.arange(len(bands))[:, None, None]
    spectrum = np.fft.fft2(x.double().numpy(), norm="ortho")
    return np.fft.ifft2(masks[:, None, None] * spectrum, norm="ortho").real


def by_space(x: torch.Tensor, y: torch.Tensor, bands: Bands) -> list[np.ndarray]:
    """pa, pb, re, pd (B, K) as sums over positions of the masked parts."""
    a, b = masked_parts(x, bands), masked_parts(y, bands)
    return [np.einsum("kbchw,kbchw->bk", p, q) for p, q in ((a, a), (b, b), (a, b), (a - b, a - b))]


def by_matrix(x: torch.Tensor, y: torch.Tensor, bands: Bands) -> list[np.ndarray]:
    """The same as two products with DFT matrices and sums over modes; masks of 0 and 1 only."""
    rows, columns = (np.exp(-2j * np.pi * np.outer(np.arange(n), np.arange(n)) / n) / np.sqrt(n) for n in bands.grid)
    fx, fy = (rows @ z.double().numpy() @ columns.T for z in (x, y))
    products = (abs(fx) ** 2, abs(fy) ** 2, (fx * fy.conj()).real, abs(fx - fy) ** 2)
    masks = bands.index == np.arange(len(bands))[:, None, None]
    return [np.stack([(p * m).sum((1, 2, 3)) for m in masks], axis=1) for p in products]


def close(got: CrossSpectrum, expected: list[np.ndarray], bar: float) -> None:
    """Within `bar` of the largest band energy."""
    largest = max(np.abs(part).max() for part in expected)
    for name, a, b in zip(CrossSpectrum._fields, got, expected, strict=True):
        np.testing.assert_allclose(a.numpy(), b, atol=bar * largest, rtol=0, err_msg=name)


# Exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("grid", FEW)
def test_cross_spectrum_is_that_of_masked_ffts(grid, text):
    bands = Bands.parse(text, grid=grid)
    x, y = draw(grid, 0), draw(grid, 1)
    got = cross_spectrum(x, y, bands)
    assert all(part.shape == (2, len(bands)) and part.dtype == torch.float64 for part in got)
    close(got, by_space(x, y, bands), 1e-13)
    close(cross_spectrum(x.float(), y.float(), bands), by_space(x.float(), y.float(), bands), 2e-6)
    np.testing.assert_allclose(band_energies(x, bands), got.pa, rtol=1e-13)
    if not text.startswith("released"):
        close(got, by_matrix(x, y, bands), 1e-13)


@pytest.mark.parametrize("grid", GRIDS)
def test_parseval(grid):
    """Over bands that cover the plane, energies add up to the sum of squares, whatever the grid."""
    x = draw(grid)
    whole = x.square().sum((1, 2, 3))
    for text in ("octave:3", "linear:5"):
        torch.testing.assert_close(band_energies(x, Bands.parse(text, grid=grid)).sum(1), whole, rtol=1e-13, atol=0)
        torch.testing.assert_close(
            band_energies(x.float(), Bands.parse(text, grid=grid)).sum(1).double(), whole, rtol=2e-6, atol=0
        )


@pytest.mark.parametrize("text", [*COVERING, "linear:12"])
@pytest.mark.parametrize("grid", FEW)
def test_parts_add_up_to_the_whole(grid, text):
    """To the last bit of the largest value, not to the rounding of K inverse transforms."""
    bands, x = Bands.parse(text, grid=grid), draw(grid, mean=100).float()
    parts = split_bands(x, bands)
    assert parts.shape == (len(bands), *x.shape) and parts.dtype == torch.float32
    bit = 2.0**-17  # half a unit in the last place of numbers from 64 to 128
    assert ((parts[:-1].sum(0) + parts[-1]) - x).abs().max() <= 2 * bit


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("grid", FEW)
def test_parts_are_masked_inverse_ffts(grid, text):
    bands, x = Bands.parse(text, grid=grid), draw(grid)
    parts = split_bands(x, bands)
    np.testing.assert_allclose(parts.numpy(), masked_parts(x, bands), atol=1e-13)
    energy = parts.square().sum((2, 3, 4)).T
    torch.testing.assert_close(energy, band_energies(x, bands), rtol=1e-12, atol=1e-12)


def test_a_band_without_a_mode_has_no_energy_and_an_empty_part():
    bands, x = Bands.parse("octave:6", grid=(4, 4)), draw((4, 4))
    assert band_energies(x, bands)[:, 1:5].abs().max() == 0
    assert split_bands(x, bands)[1:5].abs().max() < 1e-15


def test_a_wave_is_in_the_band_of_its_frequency():
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(20.0), indexing="ij")
    wave = torch.cos(2 * torch.pi * (3 * y / 24 + 4 * x / 20))[None, None]  # f = hypot(1/8, 1/5) = 0.236
    energy = band_energies(wave, Bands.parse("octave:3", grid=(24, 20)))
    torch.testing.assert_close(energy, torch.tensor([[0.0, 240.0, 0.0]]), atol=1e-4, rtol=1e-6)


@given(st.sampled_from(FEW), st.integers(0, 36), st.integers(0, 45))
def test_circular_shift_flip_and_batch_leave_energies(grid, dy, dx):
    bands, x = Bands.parse("octave:3", grid=grid), draw(grid, shape=(3, 2))
    energy = band_energies(x, bands)
    torch.testing.assert_close(band_energies(x.roll((dy, dx), (2, 3)), bands), energy, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(band_energies(x.flip(2), bands), energy, rtol=1e-11, atol=1e-11)
    alone = torch.cat([band_energies(image[None], bands) for image in x])
    torch.testing.assert_close(alone, energy, rtol=1e-13, atol=0)


def test_near_equal_pairs_keep_the_energy_of_their_difference():
    """y = x + 1e-4 n in float32: pd within 1e-5 of float64, where pa + pb - 2 re is off by more than itself."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(3, 1, (1, 32, 16, 16))).float()
    y = x + 1e-4 * torch.from_numpy(rng.standard_normal(x.shape)).float()
    for text in ("octave:3", "linear:7", "paper", "released:0.5"):
        bands = Bands.parse(text, grid=(16, 16))
        pa, pb, re, pd = cross_spectrum(x, y, bands)
        expected = by_space(x, y, bands)[3]
        np.testing.assert_allclose(pd.numpy(), expected, rtol=1e-5)
        assert (abs((pa + pb - 2 * re).numpy() - expected) / expected).max() > 1


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_scale_passes_through(scale):
    bands, x, y = Bands.parse("octave:3", grid=(9, 16)), draw((9, 16), 0).float(), draw((9, 16), 1).float()
    base, scaled = cross_spectrum(x, y, bands), cross_spectrum(scale * x, scale * y, bands)
    for a, b in zip(scaled, base, strict=True):
        torch.testing.assert_close(a.double() / scale**2, b.double(), rtol=1e-5, atol=1e-3)


def test_zero_is_zero_and_equal_maps_differ_by_nothing():
    bands, x = Bands.parse("octave:3", grid=(5, 8)), draw((5, 8)).float()
    assert all((part == 0).all() for part in cross_spectrum(0 * x, 0 * x, bands))
    assert (cross_spectrum(x, x, bands).pd == 0).all()
    assert (split_bands(0 * x, bands) == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("text", ["octave:3", "released:0.5"])
def test_one_bad_value_spoils_its_image_and_no_other(bad, text):
    bands, x = Bands.parse(text, grid=(5, 8)), draw((5, 8)).float()
    spoiled = x.clone()
    spoiled[0, 1, 2, 3] = bad
    for part, good in zip(cross_spectrum(spoiled, x, bands), cross_spectrum(x, x, bands), strict=True):
        assert torch.equal(part[1], good[1])
    assert not cross_spectrum(spoiled, x, bands).pd[0].isfinite().any()
    assert not band_energies(spoiled, bands)[0].isfinite().any()


# Precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", ["octave:3", "released:0.5", "paper"])
def test_half_types_are_raised_before_anything_is_done(dtype, text):
    bands, x, y = Bands.parse(text, grid=(14, 14)), draw((14, 14), 0).to(dtype), draw((14, 14), 1).to(dtype)
    for got, want in zip(cross_spectrum(x, y, bands), cross_spectrum(x.float(), y.float(), bands), strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, want)
    assert torch.equal(band_energies(x, bands), band_energies(x.float(), bands))
    assert torch.equal(split_bands(x, bands), split_bands(x.float(), bands))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("text", ["octave:3", "released:0.5"])
def test_autocast_changes_no_bit(dtype, given, text):
    """Inside autocast a matrix product would run in half precision; here none may."""
    bands, x, y = Bands.parse(text, grid=(14, 14)), draw((14, 14), 0).to(given), draw((14, 14), 1).to(given)
    jobs = [
        lambda: list(cross_spectrum(x, y, bands)), lambda: [band_energies(x, bands)], lambda: [split_bands(x, bands)],
        lambda: [part.real for part in cross_modes(x, y)],
        *(lambda how=how: [standardize(x.flatten(2), how)] for how in STANDARDIZATIONS),
    ]  # fmt: skip
    for job in jobs:
        outside = job()
        with torch.autocast("cpu", dtype=dtype):
            inside = job()
        for a, b in zip(inside, outside, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


# Gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["octave:2", "released:0.5", "paper"])
@pytest.mark.parametrize("grid", [(3, 4), (4, 5)])
def test_gradients_are_those_of_finite_differences(grid, text):
    bands = Bands.parse(text, grid=grid)
    x, y = (draw(grid, seed, (1, 2)).requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(lambda a: band_energies(a, bands), (x,))
    assert torch.autograd.gradcheck(lambda a, b: tuple(cross_spectrum(a, b, bands)), (x, y))
    assert torch.autograd.gradcheck(lambda a: split_bands(a, bands), (x,))


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_gradients_of_flat_and_equal_maps_are_finite(value):
    bands = Bands.parse("octave:3", grid=(5, 8))
    x = torch.full((1, 2, 5, 8), value, requires_grad=True)
    sum(part.sum() for part in cross_spectrum(x, x.detach(), bands)).backward()
    assert x.grad is not None and x.grad.isfinite().all()


# Which is which -------------------------------------------------------------------------------------------------


def test_pa_is_of_the_first_and_pb_of_the_second():
    """Blur only the second map: its high-band energy falls, the first one's does not move."""
    bands, x = Bands.parse("octave:3", grid=(16, 16)), draw((16, 16))
    y = torch.from_numpy(scipy.ndimage.gaussian_filter(x.numpy(), (0, 0, 1, 1), mode="wrap"))
    same, blurred = cross_spectrum(x, x, bands), cross_spectrum(x, y, bands)
    assert torch.equal(blurred.pa, same.pa)
    assert (blurred.pb[:, 2] < 0.2 * same.pb[:, 2]).all()
    swapped = cross_spectrum(y, x, bands)
    torch.testing.assert_close(torch.stack([swapped.pb, swapped.pa]), torch.stack([blurred.pa, blurred.pb]))
    torch.testing.assert_close(torch.stack([swapped.re, swapped.pd]), torch.stack([blurred.re, blurred.pd]))


def test_cross_modes_conjugate_the_second():
    """A delay of the second map turns the phase of X conj(Y) positive."""
    x = draw((8, 10))
    y = x.roll(1, 3)
    z, pa, pb = cross_modes(x, y)
    fx, fy = np.fft.fft2(x.numpy(), norm="ortho"), np.fft.fft2(y.numpy(), norm="ortho")
    np.testing.assert_allclose(z.numpy(), (fx * fy.conj()).sum(1), atol=1e-12)
    np.testing.assert_allclose(pa.numpy(), (abs(fx) ** 2).sum(1), rtol=1e-12)
    np.testing.assert_allclose(pb.numpy(), (abs(fy) ** 2).sum(1), rtol=1e-12)
    assert z.angle()[0, 0, 1] == pytest.approx(2 * np.pi / 10)


def test_complex_maps_are_the_fft_of_a_token_map():
    x = draw((5, 8), shape=(1, 3))[0]
    got = complex_maps(x.flatten(1).T, (5, 8)).numpy()
    expected = np.fft.fft2(x.numpy(), norm="ortho").reshape(3, -1).T
    np.testing.assert_allclose(got, np.hstack([expected.real, expected.imag]), atol=1e-13)


# Known answers --------------------------------------------------------------------------------------------------


def test_prescribed_coherence_is_recovered():
    """Y = g X + sqrt(1 - g^2) N a band: cosine = relative = 1 - g, mse a mode = 2 (1 - g) sigma^2."""
    bands, channels = Bands.parse("octave:3", grid=(32, 40)), 96
    rng, g = np.random.default_rng(0), torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    x, n = (torch.from_numpy(rng.standard_normal((1, channels, 32, 40))) for _ in range(2))
    y = torch.einsum("k,kbchw->bchw", g, split_bands(x, bands))
    y = y + torch.einsum("k,kbchw->bchw", (1 - g**2).sqrt(), split_bands(n, bands))
    pa, pb, re, pd = (part[0] for part in cross_spectrum(x, y, bands))
    count = torch.from_numpy(bands.modes * channels).double()
    error = 4 / count.sqrt()  # four standard errors of a mean of `count` products
    assert ((1 - re / (pa * pb).sqrt() - (1 - g)).abs() < error).all()
    assert ((pd / (pa + pb) - (1 - g)).abs() < error).all()
    assert ((pd / count - 2 * (1 - g)).abs() < 2 * error).all()


@pytest.mark.parametrize("dx, dy", [(1, 0), (0, 2), (3, 1)])
def test_shift_theorem(dx, dy):
    """Equal energy in every mode and a shift: cosine = 1 - mean over the band of cos 2 pi (fu dy + fv dx), exactly."""
    grid = (15, 22)
    spectrum = np.fft.fft2(np.random.default_rng(0).standard_normal((1, 4, *grid)))
    x = torch.from_numpy(np.fft.ifft2(spectrum / abs(spectrum)).real.copy())
    bands = Bands.parse("linear:4", grid=grid)
    pa, pb, re, _ = (part[0].numpy() for part in cross_spectrum(x, x.roll((dy, dx), (2, 3)), bands))
    phase = np.cos(2 * np.pi * (np.fft.fftfreq(15)[:, None] * dy + np.fft.fftfreq(22) * dx))
    expected = [1 - phase[bands.index == k].mean() for k in range(4)]
    np.testing.assert_allclose(1 - re / np.sqrt(pa * pb), expected, atol=1e-12)


# Bases and windows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 14, 37, 46])
def test_bases_are_orthonormal(n):
    for window in ("none", "dct"):
        basis = real_basis(n, window)
        np.testing.assert_allclose(basis @ basis.T, np.eye(n), atol=1e-13)
    np.testing.assert_allclose(real_basis(n, "dct"), scipy.fft.dct(np.eye(n), axis=0, norm="ortho"), atol=1e-13)
    spectra = abs(np.fft.fft(real_basis(n), axis=1)) > 1e-9
    for row, number in zip(spectra, real_numbers(n), strict=True):
        assert set(np.flatnonzero(row)) == {number, -number % n}


@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_hann_keeps_the_energy_of_white_noise_and_falls_to_the_edges(n):
    window = hann(n)
    assert np.mean(window**2) == pytest.approx(1)
    np.testing.assert_allclose(window, window[::-1], atol=1e-15)
    assert n < 3 or window[0] < 0.4 * window[n // 2]


# Errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x, says",
    [
        (torch.ones(3, 4, 4), r"expected real features \(B, C, H, W\), got torch.float32 of 3x4x4"),
        (torch.ones(1, 3, 4, 4, dtype=torch.int64), "got torch.int64 of 1x3x4x4"),
        (torch.ones(1, 3, 4, 4, dtype=torch.complex64), "got torch.complex64 of 1x3x4x4"),
        (torch.ones(1, 3, 4, 5), "expected the bands' grid 4x4, got 4x5"),
    ],
)
def test_wrong_features_are_refused_by_their_numbers(x, says):
    bands = Bands.parse("octave:3", grid=(4, 4))
    for function in (band_energies, split_bands, lambda x, bands: cross_spectrum(x, x, bands)):
        with pytest.raises(ValueError, match=says):
            function(x, bands)


def test_two_shapes_in_a_cross_spectrum_are_refused():
    with pytest.raises(FreqkdError, match="expected two batches of one shape, got 1x3x4x4 and 2x3x4x4"):
        cross_spectrum(torch.ones(1, 3, 4, 4), torch.ones(2, 3, 4, 4), Bands.parse("octave:3", grid=(4, 4)))
