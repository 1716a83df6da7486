"""Standardisation of features against NumPy, and what it does with channels and tokens that hold nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from fake_run import fake_run

from freqkd_analysis.bands import Bands
from freqkd_analysis.errors import FreqkdError
from freqkd_analysis.features import Tap
from freqkd_analysis.spectral import STANDARDIZATIONS, standardize
from freqkd_train import config, distill


def reference(x: np.ndarray, how: str) -> np.ndarray:
    """(B, N, C) by NumPy, one image at a time."""
    out = []
    for image in x:
        if how in ("channel", "released"):
            image = image - image.mean(0)
        if how == "channel":
            image = image / image.std(0)
        if how in ("token", "released"):
            image = image / np.linalg.norm(image, axis=1, keepdims=True)
        out.append(image)
    return np.stack(out)


@pytest.mark.parametrize("how", STANDARDIZATIONS)
def test_standardize_is_its_numpy_form(how):
    x = np.random.default_rng(0).normal(1, 2, (3, 20, 6))
    np.testing.assert_allclose(standardize(torch.from_numpy(x), how).numpy(), reference(x, how), rtol=1e-12, atol=1e-13)
    got = standardize(torch.from_numpy(x).float(), how)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), reference(x, how), rtol=1e-4, atol=1e-5)


def test_released_order_leaves_channel_means_behind():
    """Centring first and unit tokens second: the DC bin is not exactly 0 again."""
    x = torch.from_numpy(np.random.default_rng(0).normal(1, 2, (1, 20, 6)))
    assert standardize(x, "released").mean(1).abs().max() > 1e-3
    assert standardize(x, "channel").mean(1).abs().max() < 1e-14
    torch.testing.assert_close(standardize(x, "released").norm(dim=2), torch.ones(1, 20, dtype=torch.float64))


@pytest.mark.parametrize("how", STANDARDIZATIONS)
def test_constant_channels_and_zero_tokens_stay_zero(how):
    x = torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(0))
    x[:, :, 1] = 5.0
    x[:, 3] = 0.0
    got = standardize(x, how)
    assert got.isfinite().all()
    if how == "token":
        assert (got[:, 3] == 0).all()
    flat = standardize(torch.full((1, 12, 4), 5.0), how)
    assert flat.isfinite().all() and ((flat == 0).all() or how in ("none", "token"))


@pytest.mark.parametrize("value", [0.1, 0.3, 5.1, 1e3 + 0.1])
@pytest.mark.parametrize("how", ["channel", "released"])
def test_a_constant_channel_is_zero_and_not_rounding_blown_up(how, value):
    """The mean of equal float32 numbers need not be that number: what is left must not be divided up to 1."""
    x = torch.randn(1, 1702, 3, generator=torch.Generator().manual_seed(0))
    x[:, :, 1] = value
    assert standardize(x, how)[:, :, 1].abs().max() < 1e-2


@pytest.mark.parametrize("how", STANDARDIZATIONS)
def test_gradients_of_constant_channels_and_zero_tokens_are_finite(how):
    x = torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(0))
    x[:, :, 1] = 5.0
    x[:, 3] = 0.0
    for maps in (x, torch.full((1, 12, 4), 5.0), torch.zeros(1, 12, 4)):
        maps = maps.clone().requires_grad_()
        (100 * standardize(maps, how)).square().sum().backward()
        assert maps.grad is not None and maps.grad.abs().max() < 1e6


def test_unit_tokens_are_never_longer_than_one():
    """Squares of 1e-25 vanish in float32: such a token may stay small, it may not be divided by the smallest number."""
    x = torch.full((1, 3, 4), 1e-25)
    assert standardize(x, "token").norm(dim=2).max() <= 1.0001


def test_unknown_standardization_says_what_is_near():
    with pytest.raises(FreqkdError, match=r'none\|token\|channel\|released, got "chanel". Did you mean "channel"'):
        standardize(torch.ones(1, 2, 3), "chanel")


def test_energies_of_features_standardised_otherwise_are_refused(tmp_path):
    """A run measures plain features unless asked; divided by those energies, a loss of standardised ones is skewed."""
    run = fake_run(tmp_path / "run")
    bands, path = Bands.parse("linear:3", (16, 16), 14), run / "band_weights.json"
    content = json.loads(path.read_text())
    for entry in [*content["layers"], content["bands"]]:
        entry.update(f_lo=bands.f_lo.tolist(), f_hi=bands.f_hi.tolist())
    path.write_text(json.dumps(content))
    taps = [(Tap(3, "blocks.3", 1.0, (16, 16), 14, 384, "tokens"),) * 2]

    def made(**settings):
        return distill.objective(config.Loss(name="measured", weights_from=str(run), **settings), taps)

    with pytest.raises(FreqkdError, match="energies with --standardize none, the loss has released; .* measure with"):
        made(normalize="band")
    plain, divided = (made(standardize="none", normalize=how).plans["blocks.3"].weights for how in ("none", "band"))
    assert plain != divided
    told = json.loads((run / "manifest.json").read_text())
    told["config"]["standardize"] = "released"
    (run / "manifest.json").write_text(json.dumps(told))
    assert made(normalize="band").standardize == "released"
