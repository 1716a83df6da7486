"""The fast road equals the plain one: bands, windows, standardisation, shared scratch, means, chain, pixels."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.fft
import torch

from freqkd_analysis.bands import Bands, frequency
from freqkd_analysis.errors import BandsError
from freqkd_analysis.spectral import STANDARDIZATIONS, cross_spectrum, hann, standardize
from freqkd_analysis.spectrometer import (
    References,
    Spectrometer,
    mean_removed,
    pixel_products,
    pixel_spectra,
    shuffled,
)

GRIDS = [(14, 14), (9, 16), (5, 8), (13, 1), (37, 46)]
SPECS = ["octave:3", "linear:7", "paper", "released:0.5", "0.1,0.3"]


def maps(grid, seed: int, channels: int = 6) -> torch.Tensor:
    """(N, C) float32 with a mean and a slope."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((*grid, channels)) + 0.3 * rng.standard_normal(channels)
    return torch.from_numpy(x + np.linspace(0, 1, grid[0])[:, None, None]).float().flatten(0, 1)


def batch(x_NC: torch.Tensor, grid) -> torch.Tensor:
    """(1, C, H, W) float64 of a map, as the plain functions take it."""
    return x_NC.double().T.reshape(1, -1, *grid)


def energies(x_NC: torch.Tensor, y_NC: torch.Tensor, bands: Bands) -> np.ndarray:
    """(K, 4) of the plain road in float64."""
    return torch.stack(list(cross_spectrum(batch(x_NC, bands.grid), batch(y_NC, bands.grid), bands))).numpy()[:, 0].T


def measured(meter: Spectrometer, pairs, bands: Bands) -> np.ndarray:
    """(P, K, 4)."""
    for x, y in pairs:
        meter.measure(x, y)
    return np.einsum("pae,ak->pke", meter.collect()["energies"], bands.atoms().to_bands)


def close(got: np.ndarray, expected: np.ndarray, bar: float = 2e-6) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=bar * np.abs(expected).max())


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("grid", GRIDS)
def test_energies_equal_the_plain_cross_spectrum(grid, text):
    bands = Bands.parse(text, grid=grid)
    pairs = [(maps(grid, i), maps(grid, i + 10)) for i in range(3)]
    got = measured(Spectrometer(bands, 6), pairs, bands)
    close(got, np.stack([energies(x, y, bands) for x, y in pairs]))


@pytest.mark.parametrize("how", STANDARDIZATIONS)
@pytest.mark.parametrize("text", ["octave:3", "released:0.5"])
def test_standardisation_comes_before_the_transform(text, how):
    bands, x, y = Bands.parse(text, grid=(9, 16)), maps((9, 16), 0), maps((9, 16), 1)
    got = measured(Spectrometer(bands, 6, standardization=how), [(x, y)], bands)[0]
    close(got, energies(*(standardize(z[None].double(), how)[0] for z in (x, y)), bands))


@pytest.mark.parametrize("text", ["octave:3", "paper", "released:0.5"])
@pytest.mark.parametrize("how", ["none", "token"])
def test_hann_multiplies_both_maps_after_standardisation(text, how):
    bands, x, y = Bands.parse(text, grid=(9, 16)), maps((9, 16), 0), maps((9, 16), 1)
    taper = torch.from_numpy(np.outer(hann(9), hann(16))).reshape(-1, 1)
    expected = energies(*(standardize(z[None].double(), how)[0] * taper for z in (x, y)), bands)
    close(measured(Spectrometer(bands, 6, "hann", how), [(x, y)], bands)[0], expected)


@pytest.mark.parametrize("text", ["octave:3", "linear:5", "0.11,0.3"])
@pytest.mark.parametrize("grid", [(9, 16), (14, 14), (5, 7)])
def test_dct_bins_half_cycles(grid, text):
    """Coefficient (k, l) of SciPy's DCT-II has k half cycles over H tokens: f = hypot(k / 2H, l / 2W)."""
    bands, x, y = Bands.parse(text, grid=grid), maps(grid, 0), maps(grid, 1)
    fx, fy = (scipy.fft.dctn(z.double().numpy().reshape(*grid, -1), axes=(0, 1), norm="ortho") for z in (x, y))
    radius = np.hypot(np.arange(grid[0])[:, None] / (2 * grid[0]), np.arange(grid[1]) / (2 * grid[1]))
    band = np.searchsorted(bands.f_lo[1:] - 1e-9, radius, side="right")
    products = (fx**2, fy**2, fx * fy, (fx - fy) ** 2)
    expected = np.array([[part[band == k].sum() for part in products] for k in range(len(bands))])
    close(measured(Spectrometer(bands, 6, "dct"), [(x, y)], bands)[0], expected)


def test_dct_takes_rings_only():
    for text in ("paper", "released:0.5"):
        with pytest.raises(BandsError, match=f'bands "{text}" are defined on Fourier modes; expected rings'):
            Spectrometer(Bands.parse(text, grid=(8, 8)), 4, "dct")


@pytest.mark.parametrize("window", ["none", "hann", "dct"])
def test_energies_add_up_to_the_maps_own(window):
    bands, x, y = Bands.parse("octave:3", grid=(9, 16)), maps((9, 16), 0), maps((9, 16), 1)
    taper = torch.from_numpy(np.outer(hann(9), hann(16))).reshape(-1, 1) if window == "hann" else 1
    a, b = (z.double() * taper for z in (x, y))
    whole = np.array([float((p * q).sum()) for p, q in ((a, a), (b, b), (a, b), (a - b, a - b))])
    close(measured(Spectrometer(bands, 6, window), [(x, y)], bands)[0].sum(0), whole)


@pytest.mark.parametrize("text", ["octave:3", "released:0.5"])
def test_near_equal_maps_keep_the_energy_of_their_difference(text):
    bands, x = Bands.parse(text, grid=(14, 14)), maps((14, 14), 0, 32) + 3
    y = x + 1e-4 * maps((14, 14), 1, 32)
    got = measured(Spectrometer(bands, 32), [(x, y)], bands)[0]
    np.testing.assert_allclose(got[:, 3], energies(x, y, bands)[:, 3], rtol=1e-5)
    assert (measured(Spectrometer(bands, 32), [(x, x)], bands)[0, :, 3] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_brought_to_float32_even_inside_autocast(dtype):
    bands, x, y = Bands.parse("octave:3", grid=(9, 16)), maps((9, 16), 0).to(dtype), maps((9, 16), 1).to(dtype)
    plain = measured(Spectrometer(bands, 6), [(x.float(), y.float())], bands)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        np.testing.assert_array_equal(measured(Spectrometer(bands, 6), [(x, y)], bands), plain)


def test_maps_that_are_views_of_channels_first_memory_count_the_same():
    bands, x, y = Bands.parse("octave:3", grid=(9, 16)), maps((9, 16), 0), maps((9, 16), 1)
    views = [z.T.contiguous().T for z in (x, y)]
    assert not views[0].is_contiguous()
    meter = Spectrometer(bands, 6)
    np.testing.assert_array_equal(measured(meter, [tuple(views)], bands), measured(meter, [(x, y)], bands))
    assert torch.equal(views[0], maps((9, 16), 0))  # the caller's map is left alone


@pytest.mark.parametrize("how", ["none", "released"])
@pytest.mark.parametrize("window", ["none", "hann"])
@pytest.mark.parametrize("layout", ["plain", "sliced", "channels first", "half"])
def test_many_pairs_at_once_are_those_pairs_one_by_one(layout, window, how):
    """A forward's maps come as slices behind prefix tokens, as views of channels-first memory, or in half precision."""
    grid, bands = (9, 16), Bands.parse("octave:3", grid=(9, 16))
    x, y = (torch.stack([maps(grid, i + base) for i in range(3)]) for base in (0, 10))
    if layout == "sliced":
        x, y = (torch.cat([torch.full((3, 5, 6), 9.0), z], dim=1)[:, 5:] for z in (x, y))
    elif layout == "channels first":
        x, y = (z.transpose(1, 2).contiguous().transpose(1, 2) for z in (x, y))
    elif layout == "half":
        x, y = x.bfloat16(), y.bfloat16()
    together, alone = (Spectrometer(bands, 6, window, how) for _ in range(2))
    first, second = (References(torch.ones(3, *together.z.shape[1:])) for _ in range(2))
    together.measure_pairs(x, y, first)
    for a, b in zip(x, y, strict=True):
        alone.measure(a, b, second)
    got, expected = together.collect(), alone.collect()
    assert got["energies"].shape[0] == 3 and torch.equal(first.stack, second.stack)
    for name in ("energies", "products"):
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-12)


@pytest.mark.parametrize("text", ["octave:3", "released:0.5"])
def test_scratch_may_be_shared(text):
    """Two meters in turn on one scratch give what each gives alone."""
    bands = Bands.parse(text, grid=(9, 16))
    alone = Spectrometer(bands, 6)
    other = Spectrometer(bands, 6, standardization="token", like=alone)
    assert other.z is alone.z and other.standardization == "token" and alone.standardization == "none"
    pairs = [(maps((9, 16), i), maps((9, 16), i + 10)) for i in range(4)]
    for i, (x, y) in enumerate(pairs):
        (alone if i % 2 else other).measure(x, y)
    unit = [tuple(standardize(z[None].double(), "token")[0] for z in pair) for pair in pairs[::2]]
    to_bands = bands.atoms().to_bands
    got = np.einsum("pae,ak->pke", alone.collect()["energies"], to_bands)
    close(got, np.stack([energies(x, y, bands) for x, y in pairs[1::2]]))
    got = np.einsum("pae,ak->pke", other.collect()["energies"], to_bands)
    close(got, np.stack([energies(x, y, bands) for x, y in unit]))


def test_collect_and_forget_empty_the_meter():
    bands, x, y = Bands.parse("octave:3", grid=(5, 8)), maps((5, 8), 0), maps((5, 8), 1)
    meter = Spectrometer(bands, 6)
    meter.measure(x, y)
    meter.forget()
    meter.measure(y, x)
    assert meter.collect()["energies"].shape == (1, len(bands.atoms()), 4)
    assert meter.norms == [] and meter.products == []


def test_modes_of_a_meter_are_those_of_its_atoms():
    bands = Bands.parse("octave:3", grid=(9, 16))
    np.testing.assert_array_equal(Spectrometer(bands, 6).modes, bands.atoms().modes)
    np.testing.assert_array_equal(Spectrometer(bands, 6, "hann").modes, bands.atoms().modes)
    assert Spectrometer(bands, 6, "dct").modes.sum() == 9 * 16


# References: mean maps and the chain ----------------------------------------------------------------------------


@pytest.mark.parametrize("text, window", [("octave:3", "none"), ("octave:3", "hann"), ("linear:5", "dct"),
                                          ("paper", "none"), ("released:0.5", "none")])  # fmt: skip
@pytest.mark.parametrize("how", ["none", "released"])
def test_chain_and_mean_removed_equal_direct_computation(text, window, how):
    grid, count = (9, 16), 4
    bands = Bands.parse(text, grid=grid)
    meter = Spectrometer(bands, 6, window, how)
    xs, ys = ([maps(grid, i + base) for i in range(count)] for base in (0, 100))
    prepared = [[meter.prepared(z).double() for z in side] for side in (xs, ys)]
    mean_x, mean_y = (torch.stack([meter.prepared(maps(grid, i + base)) for i in range(3)]).double().mean(0)
                      for base in (200, 300))  # fmt: skip
    stack = torch.zeros(3, *meter.z.shape[1:])
    for slot, base in ((0, 200), (1, 300)):
        for i in range(3):
            stack[slot] += meter.coefficients(maps(grid, i + base)) / 3
    references = References(stack)
    for x, y in zip(xs, ys, strict=True):
        meter.measure(x, y, references)
    link, constants = meter.bin(meter.link(references)), meter.constants(references)
    out = meter.collect()
    assert out["products"].shape == (count, meter.atoms, 6)
    partner = [count - 1, *range(count - 1)]
    cross = out["products"][:, :, 2].copy()
    cross[0] = link

    plain = Spectrometer(bands, 6, "dct" if window == "dct" else "none")  # the taper is in the prepared maps

    def direct(pairs) -> np.ndarray:
        return measured(plain, [(a.float(), b.float()) for a, b in pairs], bands)

    def in_bands(values: np.ndarray) -> np.ndarray:
        return np.einsum("pae,ak->pke", values, bands.atoms().to_bands)

    a, b = prepared
    removed = mean_removed(out["energies"], out["products"], constants)
    centred = cross - out["products"][:, :, 1] - out["products"][partner][:, :, 3] + constants[2]
    others = [b[j] for j in partner]
    close(in_bands(out["energies"]), direct(zip(a, b, strict=True)), 1e-5)
    close(in_bands(shuffled(out["energies"], cross, partner)), direct(zip(a, others, strict=True)), 1e-5)
    close(in_bands(removed), direct([(x - mean_x, y - mean_y) for x, y in zip(a, b, strict=True)]), 1e-5)
    close(in_bands(shuffled(removed, centred, partner)),
          direct([(x - mean_x, y - mean_y) for x, y in zip(a, others, strict=True)]), 1e-5)  # fmt: skip


def test_removing_the_maps_themselves_leaves_nothing_and_never_a_negative_energy():
    bands, x, y = Bands.parse("octave:3", grid=(9, 16)), maps((9, 16), 0), maps((9, 16), 1)
    meter = Spectrometer(bands, 6)
    stack = torch.zeros(3, *meter.z.shape[1:])
    stack[0], stack[1] = meter.coefficients(x).clone(), meter.coefficients(y).clone()
    references = References(stack)
    meter.measure(x, y, references)
    constants, out = meter.constants(references), meter.collect()
    removed = mean_removed(out["energies"], out["products"], constants)[0]
    assert np.abs(removed).max() < 1e-4 * out["energies"].max() and (removed[:, [0, 1, 3]] >= 0).all()


# Pixels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, stride", [((64, 96), 16), ((70, 98), 14), ((45, 60), 5)])
def test_pixels_are_summed_at_the_physical_frequencies_of_tokens(size, stride):
    rng = np.random.default_rng(0)
    a = rng.random(size)
    b = 0.5 * a + 0.5 * rng.random(size)
    bands = Bands.parse("0.11,0.3", grid=(size[0] // stride, size[1] // stride), stride=stride)
    values, modes = pixel_spectra(pixel_products(a, b), size, bands)
    fa, fb = (np.fft.fft2(z, norm="ortho") for z in (a, b))
    f = stride * frequency(size)
    inside = [(f < 0.11), (f >= 0.11) & (f < 0.3), (f >= 0.3) & (f < 0.5**0.5 - 1e-9)]
    corner = np.isclose(f, 0.5**0.5)
    to_bands = bands.atoms().to_bands
    for k, mask in enumerate(inside):
        expected = [(abs(fa[mask]) ** 2).sum(), (abs(fb[mask]) ** 2).sum(), (fa * fb.conj()).real[mask].sum(),
                    (abs(fa - fb)[mask] ** 2).sum()]  # fmt: skip
        got, count = (values.T @ to_bands)[:, k], (modes @ to_bands)[k]
        if corner.any() and k == 2:
            assert mask.sum() <= count <= mask.sum() + corner.sum()
            continue
        np.testing.assert_allclose(got, expected, rtol=1e-10)
        assert count == mask.sum()


def test_a_ring_that_the_image_cannot_resolve_has_no_pixels():
    bands = Bands.parse("octave:6", grid=(4, 4), stride=8)
    values, modes = pixel_spectra(pixel_products(np.ones((32, 32)), np.ones((32, 32))), (32, 32), bands)
    np.testing.assert_array_equal(modes @ bands.atoms().to_bands > 0, [True, False, False, False, False, True])
    assert values[0, :3] == pytest.approx([1024] * 3) and np.abs(values[1:]).max() < 1e-9
