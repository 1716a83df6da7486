"""Registration by phase correlation: known shifts with their sign, unlike contrasts, and when it is not measured."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats

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
