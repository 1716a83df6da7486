"""Other people's losses against their formulas in plain loops, and through the suite that every loss passes."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from baseline_formulas import REFERENCES, mgd
from check_loss import SEED, TAPS, check_loss

from freqkd_analysis.errors import FreqkdError
from freqkd_analysis.similarity import debiased_cka
from freqkd_train import baselines
from freqkd_train.baselines import BASELINES, BaselineLoss
from freqkd_train.losses import gradient_shares

SIGN_BLIND = ("at", "rkd", "sp", "cka")
# Differences of softmaxes below float32 rounding of 1 are lost, so tiny maps agree less.
SPECIAL = {"cwd": {"scales": (1.0, 1e6)}, "cka": {"batch": 6, "least": 4}}


# Formulas and the suite ------------------------------------------------------------------------------------------


def make(name: str, weight: float | None = None):
    return lambda grids, channels: BaselineLoss(name, weight, channels)


@pytest.mark.parametrize("name", REFERENCES)
def test_every_baseline_passes_the_suite_and_is_its_formula(name):
    entry, special = BASELINES[name], SPECIAL.get(name, {})
    reference = lambda s, t, tap: entry.weight * REFERENCES[name](s, t)
    check_loss(make(name), reference=reference, sign_blind=name in SIGN_BLIND, match=entry.needs_match, **special)


def test_mgd_passes_the_suite_and_is_its_formula():
    made = []

    def making(grids, channels):
        made.append(BaselineLoss("mgd", channels=channels))
        return made[-1]

    def reference(s, t, tap):
        torch.manual_seed(SEED)
        masks = {name: torch.rand(len(s), 1, *s.shape[2:]).numpy() >= np.float32(0.65) for name in TAPS}
        return 2e-5 * mgd(s, t, made[-1].generators[tap], masks[tap])

    check_loss(making, reference=reference, self_zero=False)


@pytest.mark.parametrize("name", REFERENCES)
def test_gradients_are_differences_of_the_formula_entry_by_entry(name):
    """And differences of the code itself, all inputs of which are in general position."""
    rng = np.random.default_rng(3)
    s, t = rng.standard_normal((2, 5, 4, 2, 3)) + 0.3
    x = torch.from_numpy(s.copy()).requires_grad_()
    function = BASELINES[name].function
    (got,) = torch.autograd.grad(function(x, torch.from_numpy(t)), x)
    want, step = np.zeros_like(s), 1e-6
    for at in np.ndindex(s.shape):
        up, down = s.copy(), s.copy()
        up[at] += step
        down[at] -= step
        want[at] = (REFERENCES[name](up, t) - REFERENCES[name](down, t)) / (2 * step)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-7 * abs(want).max())
    assert torch.autograd.gradcheck(lambda v: function(v, torch.from_numpy(t)), x, fast_mode=True)


@pytest.mark.parametrize("tau", [0.5, 4.0])
def test_cwd_is_its_formula_at_other_temperatures(tau):
    s, t = draw(0, 3, 4, 3, 5), draw(1, 3, 4, 3, 5)
    assert float(baselines.cwd(s, t, tau)) == pytest.approx(REFERENCES["cwd"](s.numpy(), t.numpy(), tau), rel=1e-12)


def test_the_suite_holds_every_baseline():
    assert {*REFERENCES, "mgd"} == set(BASELINES)


# What each claims of itself --------------------------------------------------------------------------------------


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape or (5, 8, 4, 6)))


def value(name: str, s, t) -> float:
    with torch.no_grad():
        return float(BaselineLoss(name, 1.0)([s], [t])["loss"])


def test_weights_are_the_published_ones():
    published = {"mse": 1, "cosine": 1, "fitnet": 100, "at": 1000, "cwd": 10, "pkd": 6, "rkd": 1, "sp": 3000,
                 "mgd": 2e-5, "freekd": 1, "fdcmkd": 1, "cka": 1}  # fmt: skip
    assert {name: entry.weight for name, entry in BASELINES.items()} == published
    assert list(BASELINES) == list(published)
    assert inspect.signature(rkd_function := BASELINES["rkd"].function).parameters["distance"].default == 25
    assert inspect.signature(rkd_function).parameters["angle"].default == 50
    assert inspect.signature(BASELINES["mgd"].function).parameters["masked"].default == 0.65


def test_only_fitnet_is_projected_always_and_relations_need_no_match():
    """How the student's features are brought to the teacher's shape."""
    assert [name for name, entry in BASELINES.items() if entry.projector] == ["fitnet"]
    assert [name for name, entry in BASELINES.items() if not entry.needs_match] == ["at", "rkd", "sp", "cka"]


@pytest.mark.parametrize("name", REFERENCES)
def test_what_a_weight_assumes_is_true_of_the_loss(name):
    """Blind to gain, or not."""
    s, t = draw(0), draw(1)
    blind = value(name, 3 * s, t) == pytest.approx(value(name, s, t), rel=1e-4)
    assert blind == BASELINES[name].assumes.startswith("nothing")


@pytest.mark.parametrize("name", ["cosine", "at", "rkd", "sp", "fdcmkd", "cka"])
def test_what_is_blind_to_gain_has_no_smallest_or_largest_size(name):
    """Squares of these features leave float32."""
    t = draw(1).float()
    for s in (draw(0).float(), -draw(0).float().relu()):  # the second has no number above 0
        for gain in (1e-25, 1e25):
            assert value(name, gain * s, t) == pytest.approx(value(name, s, t), rel=1e-5)
            assert value(name, t, gain * s) == pytest.approx(value(name, t, s), rel=1e-5)


@pytest.mark.parametrize("name", REFERENCES)
def test_only_losses_so_marked_couple_the_images_of_a_batch(name):
    s, t = draw(0, 8, 6, 4, 6), draw(1, 8, 6, 4, 6)
    halves = [value(name, s[i : i + 4], t[i : i + 4]) for i in (0, 4)]
    assert (value(name, s, t) != pytest.approx(np.mean(halves), rel=1e-9)) == BASELINES[name].batch


@pytest.mark.parametrize("name", [n for n, entry in BASELINES.items() if not entry.needs_match])
def test_those_that_need_no_match_take_other_channels_and_grids(name):
    s = draw(0, 5, 3, 4, 6).requires_grad_()
    grids = [(4, 6)] if name == "at" else [(4, 6), (7, 5)]
    for grid in grids:
        for channels in (3, 8):
            out = BaselineLoss(name)([s], [draw(1, 5, channels, *grid)])["loss"]
            assert out.isfinite() and torch.autograd.grad(out, s)[0].isfinite().all()
    if name == "at":
        with pytest.raises(FreqkdError, match=r"\(5, 3, 4, 6\) and \(5, 3, 7, 5\)"):
            BaselineLoss(name)([s], [draw(1, 5, 3, 7, 5)])


def test_a_zero_token_has_no_direction_and_costs_one_unless_both_are_zero():
    s, t = draw(0, 1, 8, 1, 2), draw(1, 1, 8, 1, 2)
    usual = value("cosine", s[..., 1:], t[..., 1:])
    s[..., 0] = 0
    assert value("cosine", s, t) == pytest.approx((1 + usual) / 2) == value("cosine", t, s)
    t[..., 0] = 0
    assert value("cosine", s, t) == pytest.approx(usual / 2)


def test_pkd_is_one_minus_pearson_and_sees_no_rounding_of_a_constant():
    s, t = draw(0), draw(1)
    r = [np.corrcoef(s[:, c].ravel(), t[:, c].ravel())[0, 1] for c in range(8)]
    assert value("pkd", s, t) == pytest.approx(1 - np.mean(r), rel=1e-5)
    noise = draw(1, 32, 2, 16, 16).float()
    for constant in (333333.3, 5.9, 0.1, 3e-7):
        assert value("pkd", torch.full_like(noise, constant), noise) == pytest.approx(0.5, abs=1e-3)


def test_cka_is_that_of_the_analysis_and_one_where_a_side_does_not_vary():
    s, t = draw(0), draw(1)
    want = 1 - debiased_cka(s.mean((2, 3)).numpy(), t.mean((2, 3)).numpy())
    assert value("cka", s, t) == pytest.approx(want, rel=1e-10)
    for n in (5, 11, 25, 39):
        same = draw(0, 1, 64, 2, 2).float().expand(n, -1, -1, -1).clone().requires_grad_()
        out = BaselineLoss("cka")([same], [draw(1, n, 64, 2, 2).float()])["loss"]
        assert out.item() == 1 and not torch.autograd.grad(out, same)[0].any()
    many = [value("cka", draw(2 * i, 8, 40, 1, 1), draw(2 * i + 1, 8, 40, 1, 1)) for i in range(60)]
    assert np.mean(many) == pytest.approx(1, abs=0.05)


def test_rkd_has_nothing_to_compare_in_one_or_two_images():
    for images in (1, 2):
        assert value("rkd", draw(0, images, 8, 4, 6), draw(1, images, 8, 4, 6)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("channels", [512, 64, 33])
def test_fdcmkd_splits_512_channels_behind_bin_128(channels):
    """One wave along the channels at a time: which of the two bands answers."""
    low, high = baselines._embedding_bands(channels, torch.float64, torch.device("cpu"))
    for number in range(channels // 2 + 1):
        wave = torch.cos(2 * torch.pi * number * torch.arange(channels).double() / channels)
        shares = [float((wave @ m).norm() / wave.norm()) for m in (low, high)]
        want = [float(1 <= number <= channels // 4), float(number > channels // 4)]
        assert shares == pytest.approx(want, abs=1e-9), number


def test_fdcmkd_counts_a_band_of_rounding_as_nothing():
    """A flat embedding has neither band, a slow wave no high one: noise is not blown up to unit length."""
    flat = torch.full((2, 64, 3, 3), 0.1).requires_grad_()
    out = BaselineLoss("fdcmkd")([flat], [torch.full((2, 64, 3, 3), 0.7)])["loss"]
    assert out.item() == 0 and not torch.autograd.grad(out, flat)[0].any()
    slow = torch.cos(2 * torch.pi * torch.arange(64) / 64)[:, None, None].expand(2, 64, 3, 3)
    assert value("fdcmkd", slow, 5 * slow + 1) < 1e-9


def test_freekd_lets_the_low_band_free():
    """What is constant on blocks of 8x8 costs nothing; a checkerboard costs its level's diagonal band alone."""
    s = draw(0, 2, 3, 2, 3).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert value("freekd", s, torch.zeros_like(s)) == 0
    board = (-1.0) ** torch.add(*torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")).expand(1, 1, 8, 8)
    assert value("freekd", board, 0 * board) == 2
    row = draw(0, 2, 3, 1, 7)  # a grid of one row still has its horizontal detail
    assert value("freekd", row, 0 * row) > 0.1


# MGD -------------------------------------------------------------------------------------------------------------


def test_the_mask_comes_from_torchs_generator_and_hides_two_thirds():
    s, t = draw(0), draw(1)
    loss = BaselineLoss("mgd", channels={"a.b": 8})
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second = (loss({"a.b": s}, {"a.b": t})["loss"].item() for _ in range(2))
    torch.set_rng_state(state)
    assert loss({"a.b": s}, {"a.b": t})["loss"].item() == first != second
    x = torch.ones(64, 8, 30, 30, requires_grad=True)
    loss({"a.b": x}, {"a.b": torch.zeros(64, 8, 30, 30)})["loss"].backward()
    assert float((x.grad == 0).all(1).float().mean()) == pytest.approx(0.65, abs=0.01)
    assert ((x.grad == 0).all(1) == (x.grad == 0).any(1)).all(), "one mask for all channels"


def test_taps_that_would_share_a_generator_are_refused():
    """They were one module, silently, for both."""
    with pytest.raises(FreqkdError, match='taps "a.b" and "a_b" cannot be told apart'):
        BaselineLoss("mgd", channels={"a.b": 8, "c": 8, "a_b": 8})


def test_generators_are_trained_with_the_student_and_saved():
    t = draw(1).float()
    loss = BaselineLoss("mgd", weight=1.0, channels={"a.b": 8})
    assert len(list(loss.parameters())) == 4 and all(key.startswith("generators.a_b.") for key in loss.state_dict())
    optimiser = torch.optim.Adam(loss.parameters(), 1e-2)
    found = []
    for _ in range(60):
        optimiser.zero_grad()
        out = loss({"a.b": t}, {"a.b": t})["loss"]
        out.backward()
        optimiser.step()
        found.append(out.item())
    assert np.mean(found[-5:]) < 0.9 * np.mean(found[:5])
    twin = BaselineLoss("mgd", channels={"a.b": 8})
    twin.load_state_dict(loss.state_dict())


def test_what_mgd_cannot_generate_is_refused():
    x = draw(0)
    with pytest.raises(FreqkdError, match="needs the teacher's channels by tap"):
        BaselineLoss("mgd")
    with pytest.raises(FreqkdError, match='no generator for tap "b", only a'):
        BaselineLoss("mgd", channels={"a": 8})({"b": x}, {"b": x})
    with pytest.raises(FreqkdError, match="expected 7 channels"):
        BaselineLoss("mgd", channels={"a": 7})({"a": x}, {"a": x})


# The loss object -------------------------------------------------------------------------------------------------


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(FreqkdError, match=r'no baseline "cosin".*Did you mean "cosine"'):
        BaselineLoss("cosin")


@pytest.mark.parametrize("name", REFERENCES)
def test_a_weight_replaces_the_published_one_in_every_term(name):
    s, t = {"a": draw(0), "b": draw(2)}, {"a": draw(1), "b": draw(3)}
    own, other = BaselineLoss(name)(s, t), BaselineLoss(name, 0.25)(s, t)
    for tap in "ab":
        assert float(other["terms"][tap]) == pytest.approx(0.25 / BASELINES[name].weight * float(own["terms"][tap]))
    assert float(other["loss"]) == pytest.approx(sum(map(float, other["terms"].values())))


def test_precisions_of_student_and_teacher_may_differ():
    s, t = draw(0), draw(1)
    for name in REFERENCES:
        want = value(name, s, t)
        assert value(name, s, t.float()) == pytest.approx(want, rel=1e-5)
        assert value(name, s.float(), t) == pytest.approx(want, rel=1e-5)


def test_gradient_shares_of_a_baseline_are_one_a_tap():
    x, y = draw(0), draw(1)
    shares = gradient_shares(BaselineLoss("mse"), {"a": x, "b": x}, {"a": y, "b": 3 * y})
    assert set(shares) == {"a", "b"} and sum(shares.values()) == pytest.approx(1) and shares["b"] > shares["a"]


def test_every_loss_tells_its_source_weight_and_example():
    for name, entry in BASELINES.items():
        text = inspect.getdoc(entry.function)
        assert "Example:" in text and "eight" in text and ("ource" in text), name
