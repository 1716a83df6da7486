"""Registration by phase correlation: known shifts with their sign, unlike contrasts, and when it is not measured."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats

from freqkd_analysis import spectral
from freqkd_analysis.spectral import phase_correlation


def scene(seed: int, size: tuple[int, int] = (200, 240)) -> np.ndarray:
    """Blobs and edges with a 1/f spectrum."""
    rng = np.random.default_rng(seed)
    f = np.hypot(np.fft.fftfreq(size[0])[:, None], np.fft.fftfreq(size[1]))
    noise = np.fft.fft2(rng.standard_normal(size)) / np.maximum(f, 1 / 200) ** 1.2
    return np.tanh(2 * scipy.stats.zscore(np.fft.ifft2(noise).real, axis=None))


def moved(image: np.ndarray, dx: float, dy: float) -> np.ndarray:
    """Content moved right and down by spline interpolation, then the middle of it."""
    return scipy.ndimage.shift(image, (dy, dx), order=3, mode="nearest")[30:-30, 30:-30]


@pytest.mark.parametrize("dx, dy", [(0, 0), (5, 0), (0, -7), (-3.5, 2.25), (0.5, 0.5), (12.3, -9.6), (20, 18)])
@pytest.mark.parametrize("contrast", ["same", "negative", "other"])
def test_phase_correlation_tells_how_to_move_b_onto_a(dx, dy, contrast):
    a = scene(0)
    b = {"same": a, "negative": 3 - 2 * a, "other": np.abs(a + 0.4) + 0.02 * scene(7)}[contrast]
    got_x, got_y, confidence = phase_correlation(moved(a, dx, dy), moved(b, 0, 0))
    assert confidence > 6
    assert got_x == pytest.approx(dx, abs=0.35) and got_y == pytest.approx(dy, abs=0.35)


def test_unrelated_images_are_not_measured():
    confidences = [phase_correlation(moved(scene(i), 0, 0), moved(scene(i + 100), 0, 0))[2] for i in range(12)]
    assert max(confidences) < 6, confidences


def test_registration_of_flat_and_tiny_images_is_finite_and_unsure():
    flat = np.full((40, 50), 0.3)
    assert np.isfinite(phase_correlation(flat, flat)).all() and phase_correlation(flat, flat)[2] < 6
    assert np.isfinite(phase_correlation(scene(0)[:8, :9], scene(1)[:8, :9])).all()


# By another road ------------------------------------------------------------------------------------------------


def dft(n: int) -> np.ndarray:
    """(n, n) the Fourier matrix, written out."""
    return np.exp(-2j * np.pi * np.outer(np.arange(n), np.arange(n)) / n)


def surface(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The surface that the docstring describes, (H, W), shift 0 at (H // 2, W // 2): matrices for transforms."""
    rows, columns = (dft(n) for n in a.shape)
    hann = [np.sin(np.pi * np.arange(1, n + 1) / (n + 1)) ** 2 for n in a.shape]
    spectra = []
    for image in (a, b):
        slopes = [scipy.ndimage.gaussian_filter(image, 1.0, order=order) for order in ((1, 0), (0, 1))]
        edges = np.hypot(*slopes) ** 0.5
        spectra.append(rows @ (np.outer(*hann) * (edges - edges.mean())) @ columns)
    cross = spectra[0] * spectra[1].conj()
    f2 = np.add.outer(*(np.minimum(np.arange(n), n - np.arange(n)) ** 2 / n**2 for n in a.shape))
    size = np.abs(cross)
    turned = cross / size * size**0.25 * np.exp(-f2 / (2 * 0.15**2))
    back = (rows.conj() @ turned @ columns.conj()).real / a.size
    return np.roll(back, (a.shape[0] // 2, a.shape[1] // 2), (0, 1))


@pytest.mark.parametrize("size", [(40, 46), (37, 40), (31, 33)])
def test_the_surface_is_the_one_that_is_described(size, monkeypatch):
    """Stored registrations rest on this very formula: another whitening or blur would answer otherwise."""
    a, b = (scene(seed, size) for seed in (3, 4))
    seen = []
    monkeypatch.setattr(spectral, "_peak", lambda surface, reach: seen.append((surface, reach)))
    phase_correlation(a, b, 7)
    np.testing.assert_allclose(seen[0][0], surface(a, b), rtol=1e-9, atol=1e-12 * np.abs(seen[0][0]).max())
    assert seen[0][1] == 7


def paraboloid(size: tuple[int, int], top: tuple[float, float]) -> np.ndarray:
    """A surface whose highest place lies between its points, `top` rows and columns from the middle."""
    y, x = (np.arange(n) - n // 2 - t for n, t in zip(size, top, strict=True))
    return 5 - 0.5 * y[:, None] ** 2 - 0.25 * x**2


@pytest.mark.parametrize("size", [(24, 31), (25, 30)])
@pytest.mark.parametrize("top", [(0, 0), (0.25, -0.4), (-3.75, 3.75), (4, -4), (3.75, -3.75), (-4.3, 4.3)])
def test_the_vertex_of_a_paraboloid_is_found_to_the_last_digit(size, top):
    dx, dy, _ = spectral._peak(paraboloid(size, top), 5)
    np.testing.assert_allclose([dy, dx], top, atol=1e-12)


@pytest.mark.parametrize("size", [(24, 31), (25, 30)])
@pytest.mark.parametrize("top", [(5, -5), (-5, 5), (9, -8), (-7, 11)])
def test_no_shift_beyond_the_largest_is_told(size, top):
    """At the last shift looked for nothing lies on the far side, so there is no parabola."""
    dx, dy, _ = spectral._peak(paraboloid(size, top), 5)
    assert (dy, dx) == tuple(np.clip(top, -5, 5))


@pytest.mark.parametrize("size", [(12, 15), (13, 14)])
def test_a_small_image_is_searched_up_to_half_of_it(size):
    """The point farthest from the middle has no partner on the other side where a side is even, and is left out."""
    half = size[0] // 2 - 1, size[1] // 2 - 1
    for sign in (1, -1):
        dx, dy, _ = spectral._peak(paraboloid(size, (sign * 40, -sign * 40)), 24)
        assert (dy, dx) == (sign * half[0], -sign * half[1])


def test_confidence_is_the_height_in_robust_deviations_of_what_was_searched():
    surface = np.random.default_rng(0).standard_normal((40, 50))
    surface[:12] += 100  # outside of what is searched
    window = surface[20 - 6 : 20 + 7, 25 - 6 : 25 + 7]
    deviation = scipy.stats.median_abs_deviation(window, axis=None, scale="normal")
    assert spectral._peak(surface, 6)[2] == pytest.approx((window.max() - np.median(window)) / deviation, rel=1e-4)


# What may not matter --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [1e-12, 1e12])
def test_the_unit_of_an_image_does_not_matter(unit):
    """Kelvin, counts or a share of the range; a floor with a size of its own would."""
    a, b = scene(0)[30:94, 30:110], scene(0)[27:91, 34:114]
    for both in ((unit * a, b), (unit * a, unit * b)):
        assert phase_correlation(*both) == pytest.approx(phase_correlation(a, b), rel=1e-6)


def test_an_offset_of_an_image_does_not_matter():
    a, b = scene(0)[30:94, 30:110], scene(0)[27:91, 34:114]
    assert phase_correlation(a + 300, b - 7) == pytest.approx(phase_correlation(a, b), rel=1e-6)


def test_a_pattern_fixed_to_the_border_does_not_hide_the_shift():
    """Bars and captions at the edge of both sensors stand still while the scene moves."""
    a, b = moved(scene(0), 6, -4), moved(scene(0), 0, 0)
    bars = np.random.default_rng(0).standard_normal(a.shape)
    bars[6:-6, 6:-6] = 0
    dx, dy, confidence = phase_correlation(a + 10 * bars, b + 10 * bars)
    assert confidence > 6 and (dx, dy) == pytest.approx((6, -4), abs=0.35)


def test_a_shift_is_found_under_noise_of_half_the_contrast_and_none_is_invented():
    for seed in range(4):
        rng = np.random.default_rng(seed)
        a, b, other = moved(scene(seed), 5.3, -3.6), moved(-scene(seed), 0, 0), moved(scene(seed + 50), 0, 0)
        a, b, other = (image + 0.5 * rng.standard_normal(image.shape) for image in (a, b, other))
        dx, dy, confidence = phase_correlation(a, b)
        assert confidence > 10 and (dx, dy) == pytest.approx((5.3, -3.6), abs=0.35)
        assert phase_correlation(a, other)[2] < 6
