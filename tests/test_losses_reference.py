"""FreqKD's loss against float64 by another road: masked complex transforms, textbook forms, autograd's own gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from freqkd_analysis.bands import Bands
from freqkd_analysis.spectral import STANDARDIZATIONS, band_filter, split_bands, standardize
from freqkd_train.losses import FORMS, FreqKDLoss

GRIDS = [(14, 14), (13, 17), (7, 7), (8, 5), (1, 7), (16, 16), (37, 46), (2, 3)]
SPECS = ["octave:3", "split:0.5", "paper", "released:0.5", "released:0.25", "linear:1", "linear:5", "random:3"]
SIGN_BLIND = "log1p_abs"


def draw(grid: tuple[int, int], seed: int, scale: float = 1.0, images: int = 2, channels: int = 3) -> Tensor:
    """(B, C, H, W) float64 with a mean and more energy in low frequencies."""
    x = np.random.default_rng(seed).standard_normal((images, channels, *grid))
    return torch.from_numpy(scale * (x + 0.7 * np.roll(x, 1, -1) + 0.5 * np.roll(x, 1, -2) + 0.5))


def parts(x: Tensor, bands: Bands) -> Tensor:
    """(K, B, C, H, W): real part of the inverse transform of each masked spectrum; masks of 0 and 1."""
    masks = torch.from_numpy(bands.index == np.arange(len(bands))[:, None, None])[:, None, None]
    return torch.fft.ifft2(masks * torch.fft.fft2(x)).real


def form(name: str, s: Tensor, t: Tensor) -> Tensor:
    """A term as the table of the method writes it."""
    d2, signed = (s - t).square(), lambda x: x.sign() * x.abs().log1p()
    image = (1, 2, 3)
    return {
        "mse": lambda: d2.mean(),
        "log1p_abs": lambda: (s.abs().log1p() - t.abs().log1p()).square().mean(),
        "signed_log": lambda: (signed(s) - signed(t)).square().mean(),
        "log_of_sum": lambda: d2.sum(image).log1p().mean(),
        "log_of_mse": lambda: d2.mean(image).log1p().mean(),
        "cosine": lambda: (1 - (s * t).sum(image) / ((s * s).sum(image) * (t * t).sum(image)).sqrt()).mean(),
    }[name]()


def standard(x: Tensor, how: str) -> Tensor:
    return standardize(x.flatten(2).mT, how).mT.unflatten(2, x.shape[2:])


def expected(x: Tensor, y: Tensor, bands: Bands, forms: list[str], weights: list[float], how: str = "none"):
    """Value and gradient in float64."""
    leaf = x.double().clone().requires_grad_()
    s, t = parts(standard(leaf, how), bands), parts(standard(y.double(), how), bands)
    value = torch.stack([w * form(f, s[k], t[k]) for k, (f, w) in enumerate(zip(forms, weights, strict=True)) if w])
    return value.sum().item(), torch.autograd.grad(value.sum(), leaf)[0]


def got(x: Tensor, y: Tensor, loss: FreqKDLoss):
    leaf = x.detach().clone().requires_grad_()
    out = loss([leaf], [y])["loss"]
    assert out.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    return out.item(), torch.autograd.grad(out, leaf)[0]


def errors(x: Tensor, y: Tensor, text: str, forms: str | list[str], how: str = "none") -> tuple[float, float]:
    """Relative error of value and of gradient (as vectors); weights of 1, 2, ... on bands that have modes."""
    bands = Bands.parse(text, tuple(x.shape[2:]))
    forms = [forms] * len(bands) if isinstance(forms, str) else forms
    weights = [float(k + 1) if m else 0.0 for k, m in enumerate(bands.modes)]
    value, gradient = expected(x, y, bands, forms, weights, how)
    v, g = got(x, y, FreqKDLoss(bands.grid, text, how, forms, weights))
    return abs(v / value - 1), float((g.double() - gradient).norm() / gradient.norm())


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_form_and_band_is_its_naive_form(grid, name):
    """Value and gradient: float64 to 1e-10; float32 to 1e-5, but see the test of sign flips for `log1p_abs`."""
    for text in SPECS:
        for scale in (1e-6, 1.0):
            x, y = draw(grid, 1, scale), draw(grid, 2, scale)
            assert max(errors(x, y, text, name)) < 1e-10, (text, scale)
            value, gradient = errors(x.float(), y.float(), text, name)
            assert value < 1e-5 and (gradient < 1e-5 or name == SIGN_BLIND), (text, scale)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("grid", [(14, 14), (13, 17), (37, 46)])
def test_huge_features(grid, name):
    """At 1e6 the logs' gradient 1 / (1 + |S|) peaks where S crosses 0, which float32 knows to 0.1 only."""
    x, y = draw(grid, 1, 1e6), draw(grid, 2, 1e6)
    for text in ("octave:3", "released:0.5", "paper"):
        value, gradient = errors(x, y, text, name)
        assert value < 1e-10 and gradient < (1e-7 if name in ("log1p_abs", "signed_log") else 1e-10)
        value, gradient = errors(x.float(), y.float(), text, name)
        assert value < (1e-4 if name == SIGN_BLIND else 1e-5)
        assert gradient < 1e-5 or name in ("log1p_abs", "signed_log")


def test_float32_gradient_of_the_sign_blind_form_is_off_only_where_the_part_is_next_to_zero():
    x, y = draw((37, 46), 1).float(), draw((37, 46), 2).float()
    bands = Bands.parse("released:0.5", (37, 46))
    _, gradient = expected(x, y, bands, ["mse", SIGN_BLIND], [0.0, 1.0])
    _, g = got(x, y, FreqKDLoss((37, 46), weights=(0, 1), standardize="none"))
    s = parts(x.double(), bands)[1]
    step = parts(g.double() - gradient, bands)[1].abs() / gradient.abs().max()
    assert (step[s.abs() > 1e-4] < 1e-3).all() and step.median() < 1e-6


@pytest.mark.parametrize("name", ["log1p_abs", "signed_log"])
@pytest.mark.parametrize(("student", "teacher"), [(1e6, 1.0), (1.0, 1e6), (1e-6, 1.0), (30.0, 1.0)])
def test_logs_of_unlike_sizes(name, student, teacher):
    """Where 2 atanh would lose its digits the plain difference of logs takes over."""
    x, y = draw((8, 5), 1, student), draw((8, 5), 2, teacher)
    assert errors(x, y, "linear:1", name)[0] < 1e-10
    assert errors(x.float(), y.float(), "linear:1", name)[0] < 1e-5


@pytest.mark.parametrize("name", FORMS)
def test_almost_all_energy_in_one_band(name):
    grid, tilt = (13, 17), 1e3
    for text in ("octave:3", "split:0.5", "random:1"):
        bands = Bands.parse(text, grid)
        for k in range(len(bands)):
            x, y = (z + tilt * split_bands(z, bands)[k] for z in (draw(grid, 1), draw(grid, 2)))
            assert max(errors(x, y, text, name)) < 1e-9
            assert errors(x.float(), y.float(), text, name)[0] < 1e-5


@pytest.mark.parametrize("how", STANDARDIZATIONS)
def test_standardised_features(how):
    x, y = draw((14, 14), 1, channels=6), draw((14, 14), 2, channels=6)
    forms = ["mse", "cosine", "signed_log"]
    assert max(errors(x, y, "octave:3", forms, how)) < 1e-10
    assert max(errors(x.float(), y.float(), "octave:3", forms, how)) < 1e-5


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("text", ["octave:3", "released:0.5", "random:0"])
def test_gradcheck(name, text):
    bands = Bands.parse(text, (6, 5))
    loss = FreqKDLoss((6, 5), text, "released", name, [float(m > 0) for m in bands.modes])
    x, y = draw((6, 5), 3).requires_grad_(), draw((6, 5), 4)
    assert torch.autograd.gradcheck(lambda z: tuple(loss([z], [y])["terms"].values()), (x,))


# The released code --------------------------------------------------------------------------------------------


def released(x: np.ndarray, y: np.ndarray, cut: float) -> float:
    """The release's loss of one layer, NumPy float64: centred spectrum, half-open rectangle, real parts."""
    (height, width), maps = x.shape[2:], []
    mask = np.zeros((height, width))
    (ch, cw), (h, w) = (height // 2, width // 2), (max(1, int(n * cut / 2)) for n in (height, width))
    mask[ch - h : ch + h, cw - w : cw + w] = 1
    for z in (x, y):
        z = z - z.mean((2, 3), keepdims=True)
        z = z / np.sqrt((z**2).sum(1, keepdims=True))
        spectrum = np.fft.fftshift(np.fft.fft2(z), axes=(2, 3))
        maps.append([np.fft.ifft2(np.fft.ifftshift(spectrum * m, axes=(2, 3))).real for m in (mask, 1 - mask)])
    (s_low, s_high), (t_low, t_high) = maps
    low = np.mean((s_low - t_low) ** 2)
    return float(low + 0.1 * np.mean((np.log1p(np.abs(s_high)) - np.log1p(np.abs(t_high))) ** 2))


@pytest.mark.parametrize("cut", [0.1, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_released_is_the_released_formula_summed_over_layers(cut, dtype):
    layers = [[draw((37, 46), seed, channels=8) for seed in (a, a + 1)] for a in (1, 3)]
    want = sum(released(x.numpy(), y.numpy(), cut) for x, y in layers)
    loss = FreqKDLoss.preset("released", grid=(37, 46), bands=f"released:{cut}")
    out = loss([x.to(dtype) for x, _ in layers], [y.to(dtype) for _, y in layers])
    assert out["loss"].item() == pytest.approx(want, rel=1e-6)
    assert out["loss"].item() == sum(out["terms"].values()).item()


# Near, opposite, nothing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("how", STANDARDIZATIONS)
def test_equal_features_cost_nothing_and_pull_nowhere(name, how):
    for text in ("octave:3", "released:0.5", "paper", "linear:1"):
        for dtype in (torch.float32, torch.float64):
            x = draw((14, 14), 1, 1e3).to(dtype)
            value, gradient = got(
                x, x.clone(), FreqKDLoss((14, 14), text, how, name, (1,) * len(Bands.parse(text, (14, 14))))
            )
            assert value == 0 and gradient.abs().max() == 0


@pytest.mark.parametrize("name", FORMS)
def test_only_the_sign_blind_form_takes_the_negative_for_the_same(name):
    x = draw((14, 14), 1).float()
    value, _ = got(x, -x, FreqKDLoss((14, 14), "split:0.5", "none", name, (1, 1)))
    assert (value == 0) == (name == SIGN_BLIND)


def test_near_equal_features_keep_the_energy_of_their_difference():
    x = draw((16, 16), 1, channels=32) + 3
    y = x + 1e-4 * draw((16, 16), 2, channels=32)
    for text in ("octave:3", "released:0.5", "random:1"):
        assert max(errors(x.float(), y.float(), text, "mse")) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_band_without_energy_has_a_cosine_of_nothing(dtype):
    """1 where one side is empty, 0 where both are; no gradient, whatever rounding left in the band."""
    flat, rich = torch.full((1, 2, 14, 14), 7.3, dtype=dtype), draw((14, 14), 1, images=1, channels=2).to(dtype)
    for x, y, value in ((flat, rich, 1.0), (rich, flat, 1.0), (flat, 2 * flat, 0.0), (0 * flat, rich, 1.0)):
        assert got(x, y, FreqKDLoss((14, 14), "split:0.5", "none", "cosine", (0, 1)))[0] == value
        gradient = got(x, y, FreqKDLoss((14, 14), "split:0.5", "none", "cosine", (0, 1)))[1]
        assert gradient.abs().max() == 0
    assert got(rich, 5 * rich, FreqKDLoss((14, 14), "octave:3", "none", "cosine", (1, 1, 1)))[0] < 1e-9


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("how", STANDARDIZATIONS)
def test_constant_and_zero_features_give_finite_gradients(name, how):
    loss = FreqKDLoss((7, 8), "split:0.5", how, name, (1, 1))
    for x in (torch.zeros(1, 3, 7, 8), torch.full((1, 3, 7, 8), 0.3), draw((7, 8), 1).float()):
        for y in (torch.zeros_like(x), torch.full_like(x, -5.1)):
            value, gradient = got(x, y, loss)
            assert math.isfinite(value) and gradient.isfinite().all()


def test_a_value_that_is_no_number_stays_one():
    x = draw((8, 8), 1).float()
    x[0, 0, 3, 3] = math.nan
    for name in FORMS:
        for y in (draw((8, 8), 2).float(), torch.ones_like(x), torch.zeros_like(x)):
            assert math.isnan(got(x, y, FreqKDLoss((8, 8), "split:0.5", "none", name, (1, 1)))[0])


# The parts in spectral -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*SPECS, "released:0.9"])
@pytest.mark.parametrize("grid", [*GRIDS, (1, 1), (2, 2), (5, 8)])
def test_a_filter_splits_as_split_bands_does_and_is_its_own_adjoint(grid, text):
    bands = Bands.parse(text, grid)
    split = band_filter(bands, torch.float64, torch.device("cpu"))
    x, g = (draw(grid, seed).flatten(2).mT.contiguous() for seed in (1, 2))
    z, want = split.project(x), split_bands(draw(grid, 1), bands).flatten(3).mT
    for k in range(len(bands)):
        part = split.part(x, z.clone(), k)
        torch.testing.assert_close(part, want[k], rtol=0, atol=1e-12)
        back = split.lift(split.adjoint(g, k), g if k == split.rest else None)
        assert float((back * x).sum()) == pytest.approx(float((g * part).sum()), abs=1e-10)


def test_a_filter_holds_only_the_low_rectangle():
    sizes = {text: tuple(band_filter(Bands.parse(text, (14, 14)), torch.float32, torch.device("cpu")).amplitudes.shape)
             for text in ("split:0.5", "released:0.5", "random:0", "linear:1")}  # fmt: skip
    assert sizes == {"split:0.5": (2, 7, 7, 1), "released:0.5": (2, 7, 7, 1), "random:0": (2, 14, 14, 1),
                     "linear:1": (1, 0, 0, 1)}  # fmt: skip


def in_parts(x, how):
    """Standardisation step by step, whose gradient is autograd's own."""
    if how == "none":
        return x
    if how in ("channel", "released"):
        mean = x.mean(1, keepdim=True)
        x = x - mean
        variance = x.square().mean(1, keepdim=True)
        constant = variance <= (16 * torch.finfo(x.dtype).eps * mean).square()
        x = x.masked_fill(constant, 0)
        if how == "channel":
            return x / variance.masked_fill(constant, 1).sqrt()
    norm = x.norm(dim=2, keepdim=True)
    return x / torch.where(norm > 0, norm, 1)


@pytest.mark.parametrize("how", STANDARDIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_standardising_has_the_gradient_of_its_parts(how, dtype):
    rng = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 12, 5, generator=rng, dtype=dtype)
    maps[:, :, 1], maps[0, 3] = 0.1, 0.0
    for x in (maps, maps[1:, :, 2:], torch.full_like(maps, 0.3), torch.zeros_like(maps)):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = in_parts(a, how), standardize(b, how)
        assert (y == z).all() and z.dtype == dtype
        g = torch.randn(x.shape, generator=rng, dtype=dtype)
        want, found = (torch.autograd.grad(out, leaf, g)[0] for out, leaf in ((y, a), (z, b)))
        bar = 1e-5 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(found, want, rtol=0, atol=bar * (1 + float(want.abs().max())))
