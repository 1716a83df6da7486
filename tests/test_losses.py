"""What FreqKD's loss takes and refuses, presets, weights of a run, gradient shares, random halves, its benchmark."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_run import fake_run
from torch import Tensor

from freqkd_analysis.bands import Bands, frequency
from freqkd_analysis.errors import BandsError, FreqkdError
from freqkd_train import losses
from freqkd_train.losses import FORMS, PRESETS, FreqKDLoss, gradient_shares, measured_settings

_FOLDER = str(Path(__file__).parent.parent / "benchmarks")
sys.path.insert(0, _FOLDER)
import distill  # noqa: E402

sys.path.remove(_FOLDER)


def draw(seed: int, shape: tuple[int, ...] = (2, 4, 8, 8), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def values(loss: FreqKDLoss, x: Tensor, y: Tensor) -> list[float]:
    return [float(term) for term in loss([x], [y])["terms"].values()]


# Calls -----------------------------------------------------------------------------------------------------------


def test_lists_and_mappings_give_the_same_terms_under_their_own_names():
    x, y = draw(0), draw(1)
    loss = FreqKDLoss((8, 8), "octave:3", "token", "mse", (1, 0.5, 0.25))
    listed, named = loss([x, y], [y, x]), loss({"a.1": x, "b": y}, {"b": x, "a.1": y, "unused": x})
    assert list(listed["terms"]) == [f"{tap}/{band}" for tap in "01" for band in ("low", "mid", "high")]
    assert list(named["terms"]) == [f"{tap}/{band}" for tap in ("a.1", "b") for band in ("low", "mid", "high")]
    assert [float(v) for v in listed["terms"].values()] == [float(v) for v in named["terms"].values()]
    assert float(listed["loss"]) == float(sum(listed["terms"].values()))


def test_one_grid_and_weight_a_tap_as_mappings_or_lists():
    big, small = draw(0, (1, 2, 8, 8)), draw(0, (1, 2, 4, 4))
    weights = {"a": (1, 2), "b": (3, 0)}
    named = FreqKDLoss({"a": (8, 8), "b": (4, 4)}, "split:0.5", "none", "mse", weights)
    listed = FreqKDLoss([(8, 8), (4, 4)], "split:0.5", "none", "mse", list(weights.values()))
    a = named({"b": small, "a": big}, {"a": 0 * big, "b": 0 * small})["terms"]
    b = listed([big, small], [0 * big, 0 * small])["terms"]
    assert {name.replace("a", "0", 1).replace("b", "1", 1): float(v) for name, v in a.items() if "/low" in name} == {
        name: float(v) for name, v in b.items() if "/low" in name
    }
    assert float(a["b/high"]) == 0 and float(a["a/high"]) > 0
    unweighted = FreqKDLoss((8, 8), "split:0.5", "none", "mse", (1, 1))
    assert float(a["a/high"]) == pytest.approx(2 * values(unweighted, big, 0 * big)[1])


@pytest.mark.parametrize("form", FORMS)
def test_terms_are_means_over_images(form):
    x, y = draw(0, (6, 3, 8, 8), torch.float64), draw(1, (6, 3, 8, 8), torch.float64)
    loss = FreqKDLoss((8, 8), "split:0.5", "released", form, (1, 1))
    alone = [values(loss, x[i : i + 1], y[i : i + 1]) for i in range(6)]
    np.testing.assert_allclose(values(loss, x, y), np.mean(alone, 0), rtol=1e-12)


@pytest.mark.parametrize("how", ["none", "released"])
@pytest.mark.parametrize("form", FORMS)
def test_memory_layout_and_half_types_do_not_matter(form, how):
    x, y = draw(0), draw(1)
    loss = FreqKDLoss((8, 8), "released:0.5", how, form, (1, 0.3))
    layouts = [x, x.contiguous(memory_format=torch.channels_last), x.flatten(2).mT.contiguous().mT.unflatten(2, (8, 8))]
    for z in layouts:
        np.testing.assert_allclose(values(loss, z, y), values(loss, x, y), rtol=1e-6)
    half = x.bfloat16().requires_grad_()
    out = loss([half], [y])["loss"]
    out.backward()
    assert out.dtype == torch.float32 and half.grad is not None and half.grad.dtype == torch.bfloat16
    assert out.item() == pytest.approx(sum(values(loss, x.bfloat16().float(), y)), rel=1e-6)


@pytest.mark.parametrize("form", ["mse", "log1p_abs"])
def test_autocast_leaves_value_and_gradient(form):
    loss, y = FreqKDLoss((8, 8), "octave:3", "released", form, (1, 1, 1)), draw(1)
    plain, under = draw(0).requires_grad_(), draw(0).requires_grad_()
    a = loss([plain], [y])["loss"]
    a.backward()
    with torch.autocast("cpu", torch.bfloat16):
        b = loss([under], [y])["loss"]
        b.backward()
    assert b.dtype == torch.float32 and a.item() == b.item()
    assert torch.equal(plain.grad, under.grad)


def test_the_teacher_gets_no_gradient():
    x, y = draw(0).requires_grad_(), draw(1).requires_grad_()
    FreqKDLoss((8, 8))([x], [y])["loss"].backward()
    assert x.grad is not None and y.grad is None


def test_inputs_are_left_alone_and_gradients_can_be_taken_twice():
    for form in FORMS:
        x, y = draw(0).requires_grad_(), draw(1)
        before = x.detach().clone(), y.clone()
        out = FreqKDLoss((8, 8), "released:0.5", "none", form, (1, 1))([x], [y])["loss"]
        first, second = (torch.autograd.grad(out, x, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second) and torch.equal(x, before[0]) and torch.equal(y, before[1])


def test_it_has_no_parameters_and_can_be_copied():
    loss = FreqKDLoss.preset("released", grid={"a": (8, 8)})
    assert list(loss.parameters()) == [] and loss.state_dict() == {}
    x, y = draw(0), draw(1)
    assert float(copy.deepcopy(loss)({"a": x}, {"a": y})["loss"]) == float(loss({"a": x}, {"a": y})["loss"])


def test_a_band_of_weight_zero_is_not_computed(monkeypatch):
    """No term, no gradient, no work: the form of the other band is all that is asked for."""
    monkeypatch.setitem(losses.MAP_FORMS, "log1p_abs", lambda *a: pytest.fail("computed"))
    x = draw(0).requires_grad_()
    out = FreqKDLoss.preset("low_only", grid=(8, 8))([x], [draw(1)])
    assert out["terms"]["0/high"].item() == 0 < out["terms"]["0/low"].item()
    out["loss"].backward()
    nothing = FreqKDLoss((4, 4), "octave:6", "none", "mse", (0,) * 6)([draw(0, (1, 2, 4, 4))], [draw(1, (1, 2, 4, 4))])
    assert float(nothing["loss"]) == 0 and len(nothing["terms"]) == 6


# Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"forms": ("mse", "log1p")}, 'got "log1p". Did you mean "log1p_abs"?'),
        ({"forms": ("mse",)}, "one of forms for each band low, high of t, got 1: mse"),
        ({"weights": (1, 2, 3)}, "one of weights for each band low, high of t, got 3: 1, 2, 3"),
        ({"weights": (1, None)}, 'band "high" of t has no weight (null)'),
        ({"weights": {"t": (float("nan"), 1)}}, 'band "low" of t has no weight (null)'),
        ({"weights": (1, -1)}, 'at least 0 for band "high" of t, got -1'),
        ({"weights": (1, float("inf"))}, 'at least 0 for band "high" of t, got inf'),
        ({"weights": {"s": (1, 1)}}, 'no weights for tap "t"; there are s'),
        ({"energy": (0.0, 1)}, 'energy above 0 for band "low" of t, got 0.0'),
        ({"energy": (1, None)}, 'energy above 0 for band "high" of t, got null'),
        ({"standardize": "tokens"}, 'got "tokens". Did you mean "token"?'),
        ({"bands": "0.01,0.02", "forms": "mse", "weights": (1, 1, 1)}, 'band "mid" of t holds no mode on the 8x8 grid'),
        ({"bands": "0.01/px"}, "need the stride"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(settings, says):
    with pytest.raises(FreqkdError) as error:
        FreqKDLoss({"t": (8, 8)}, **{"bands": "split:0.5", **settings})
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("students", "teachers", "says"),
    [
        ({"a": draw(0)}, {"a": draw(1)}, "expected the student's taps t, got a"),
        ({"t": draw(0)}, {"a": draw(1)}, "expected the teacher's features of t, got a"),
        ({}, {}, "expected the student's taps t, got none"),
        ({"t": draw(0)[0]}, {"t": draw(1)}, 'of the student at tap "t", got torch.float32 (4, 8, 8)'),
        ({"t": draw(0)}, {"t": draw(1, (2, 4, 8, 7))}, 'features (B, C, 8, 8) of the teacher at tap "t"'),
        ({"t": draw(0)}, {"t": draw(1, (2, 5, 8, 8))}, "one shape at tap"),
        ({"t": draw(0).long()}, {"t": draw(1)}, "got torch.int64"),
    ],
)
def test_features_that_do_not_fit_are_refused_in_one_line(students, teachers, says):
    with pytest.raises(FreqkdError) as error:
        FreqKDLoss({"t": (8, 8)})(students, teachers)
    assert says in str(error.value) and "\n" not in str(error.value)


# Presets ---------------------------------------------------------------------------------------------------------


def test_presets_replace_single_settings_and_name_what_is_near():
    x, y = draw(0), draw(1)
    assert values(FreqKDLoss.preset("released", grid=(8, 8)), x, y) == values(FreqKDLoss((8, 8)), x, y)
    low, high = values(FreqKDLoss.preset("released", grid=(8, 8)), x, y)
    assert values(FreqKDLoss.preset("low_only", grid=(8, 8)), x, y) == [low, 0]
    assert values(FreqKDLoss.preset("high_only", grid=(8, 8)), x, y) == [0, pytest.approx(10 * high, rel=1e-6)]
    changed = FreqKDLoss.preset("released", grid=(8, 8), forms=("mse", "mse"), weights=(1, 1))
    paper = FreqKDLoss.preset("paper", grid=(8, 8))
    assert values(changed, x, y)[0] == low and paper.plans["all taps"].bands.text == "split:0.5"
    with pytest.raises(FreqkdError, match=r'no preset "relesed".*Did you mean "released"'):
        FreqKDLoss.preset("relesed", grid=(8, 8))
    with pytest.raises(FreqkdError, match="the preset measured needs bands and weights of a run"):
        FreqKDLoss.preset("measured", grid=(8, 8))
    assert set(PRESETS) == {"released", "paper", "uniform", "low_only", "high_only", "measured"}


def test_uniform_is_plain_mse_of_the_standardised_features():
    x, y = draw(0), draw(1)
    s, t = (z - z.mean((2, 3), keepdim=True) for z in (x, y))
    want = (s / s.norm(dim=1, keepdim=True) - t / t.norm(dim=1, keepdim=True)).square().mean()
    assert values(FreqKDLoss.preset("uniform", grid=(8, 8)), x, y) == [pytest.approx(float(want), rel=1e-5)]


def test_energy_makes_bands_of_unlike_size_count_alike():
    x, y = draw(0), draw(1)
    plain = values(FreqKDLoss((8, 8), "split:0.5", "none", "mse", (1, 1)), x, y)
    divided = values(FreqKDLoss((8, 8), "split:0.5", "none", "mse", (1, 0.5), energy=(4, 0.01)), x, y)
    np.testing.assert_allclose(divided, [plain[0] / 4, plain[1] * 0.5 / 0.01], rtol=1e-6)


def test_bands_in_cycles_per_pixel_follow_the_stride_of_each_tap():
    loss = FreqKDLoss({"a": (8, 8), "b": (8, 8)}, "0.02/px", "none", "mse", (1, 1), strides={"a": 8, "b": 16})
    assert [plan.bands.f_hi[0] for plan in loss.plans.values()] == pytest.approx([0.16, 0.32])


# Weights of a run ------------------------------------------------------------------------------------------------

PLACES = {"blocks.1": ((16, 16), 14), "blocks.3": ((16, 16), 14)}


def altered(folder, change):
    path = folder / "band_weights.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return folder


@pytest.fixture
def run(tmp_path):
    """A run with the edges that its bands really have, per layer as the analysis writes them."""
    bands = Bands.parse("linear:3", (16, 16), 14)

    def edges(content):
        for entry in [*content["layers"], content["bands"]]:
            entry.update(f_lo=bands.f_lo.tolist(), f_hi=bands.f_hi.tolist())

    return altered(fake_run(tmp_path / "run"), edges)


def test_measured_weights_and_energies_make_the_loss(run):
    settings = measured_settings(run, PLACES, "precision", "band")
    assert settings["bands"] == "linear:3" and set(settings["energy"]) == set(PLACES)
    loss = FreqKDLoss.preset("measured", grid={tap: grid for tap, (grid, _) in PLACES.items()}, **settings)
    plan = loss.plans["blocks.3"]
    np.testing.assert_allclose(plan.weights, np.linspace(1, 0.1, 3) / np.geomspace(900, 30, 3))
    assert plan.forms == ("mse",) * 3
    assert "energy" not in measured_settings(run, PLACES, "shared")


@pytest.mark.parametrize(
    ("change", "arguments", "says"),
    [
        (lambda c: None, {"taps": {"blocks.33": PLACES["blocks.1"]}}, 'no tap "blocks.33"'),
        (lambda c: None, {"bands": "octave:3"}, 'bands "octave:3" of tap "blocks.1" have f_lo 0 0.125 0.25'),
        (lambda c: None, {"bands": "octave:4"}, 'bands "octave:4" of tap "blocks.1" have f_lo'),
        (lambda c: c["layers"][3]["f_hi"].__setitem__(0, 0.2), {}, 'of tap "blocks.3" have f_hi'),
        (lambda c: c["layers"][1]["weights"].pop("shared"), {}, 'no weights by the rule "shared" for tap "blocks.1"'),
        (lambda c: c["layers"][1]["weights"]["shared"].__setitem__(2, None), {}, 'band "high" of blocks.1 has no'),
        (lambda c: c["layers"][1]["weights"]["shared"].pop(), {}, 'expected 3 numbers for tap "blocks.1", got 2'),
        (lambda c: c["layers"][1].pop("energy"), {"normalize": "band"}, 'expected 3 numbers for tap "blocks.1", got 0'),
        (lambda c: None, {"normalize": "bands"}, 'expected normalize none|band, got "bands"'),
        (lambda c: None, {"rule": "sharde"}, 'no weights by the rule "sharde" for tap "blocks.1" (known: shared, '),
        (lambda c: c.pop("layers"), {}, "band_weights.json"),
    ],
)  # fmt: skip
def test_a_run_that_does_not_fit_is_told_by_tap_and_band(run, change, arguments, says):
    altered(run, change)
    with pytest.raises(FreqkdError) as error:
        measured_settings(run, **{"taps": PLACES, **arguments})
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_rule_that_was_not_computed_says_why(run):
    def without(content):
        content["rules"]["precision"] = "not computed: the run has no coherence.parquet"
        for entry in content["layers"]:
            entry["weights"].pop("precision")

    with pytest.raises(FreqkdError, match=r'"precision" for tap "blocks.1" \(not computed: the run has no coherence'):
        measured_settings(altered(run, without), PLACES, "precision")


def test_a_run_that_is_not_there_is_named_with_its_like(run):
    (run / "band_weights.json").rename(run / "weights.json")
    with pytest.raises(FreqkdError, match=rf"no band_weights\.json in {run}\. Expected the folder of a finished"):
        measured_settings(run, PLACES)
    with pytest.raises(FreqkdError, match=rf'no run folder {run}s\. Did you mean "{run.name}"\? Expected the folder'):
        measured_settings(run.with_name(f"{run.name}s"), PLACES)
    with pytest.raises(FreqkdError, match=rf"no run folder {run}/nope\. Expected the folder"):
        measured_settings(run / "nope", PLACES)


# Shares ----------------------------------------------------------------------------------------------------------


def test_gradient_shares_are_the_norms_of_each_terms_gradient():
    x, y = {"a": draw(0), "b": draw(1)}, {"a": draw(2), "b": draw(3)}
    loss = FreqKDLoss((8, 8), "split:0.5", "none", ("mse", "cosine"), {"a": (1, 2), "b": (0.5, 0)})
    shares, norms = gradient_shares(loss, x, y), {}
    for tap in x:
        for k, band in enumerate(("low", "high")):
            leaf = x[tap].clone().requires_grad_()
            weights = [0.0, 0.0]
            weights[k] = loss.plans[tap].weights[k]
            out = FreqKDLoss((8, 8), "split:0.5", "none", ("mse", "cosine"), weights)([leaf], [y[tap]])["loss"]
            norms[f"{tap}/{band}"] = float(torch.autograd.grad(out, leaf)[0].norm()) if weights[k] else 0.0
    assert shares == pytest.approx({name: norm / sum(norms.values()) for name, norm in norms.items()}, rel=1e-5)
    assert sum(shares.values()) == pytest.approx(1) and shares["b/high"] == 0
    assert set(gradient_shares(loss, x, x).values()) == {0.0}
    with torch.no_grad():
        assert gradient_shares(loss, x, y) == shares


def test_shares_of_any_loss_with_this_call_form():
    def loss(students, teachers):
        terms = {"0": (students[0] - teachers[0]).square().sum(), "1": 3 * students[1].sum(), "none": torch.zeros(())}
        return {"loss": sum(terms.values()), "terms": terms}

    shares = gradient_shares(loss, [torch.ones(4), torch.ones(4)], [torch.zeros(4), torch.zeros(4)])
    assert shares == pytest.approx({"0": 0.4, "1": 0.6, "none": 0})


# Random halves ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(14, 14), (16, 16), (37, 46), (13, 17), (7, 7), (1, 7), (32, 40)])
@pytest.mark.parametrize("seed", range(4))
def test_random_bands_are_two_like_halves(grid, seed):
    bands = Bands.parse(f"random:{seed}", grid)
    assert bands.names == ("chosen", "rest") and bands.covers and bands.mirrored and bands.index[0, 0] == 0
    assert abs(bands.modes[0] - bands.modes[1]) <= 8
    if min(grid) > 8:
        energy = 1 / (0.05 + frequency(grid)) ** 2  # red, as features are
        energy[0, 0] = 0
        assert 0.4 < energy[bands.index == 0].sum() / energy.sum() < 0.6


def test_every_radius_is_dealt_in_half():
    """Groups of one radius: as many in either band, save one left over."""
    grid, bands = (14, 14), Bands.parse("random:5", (14, 14))
    u, v = np.abs(np.rint(np.fft.fftfreq(14) * 14)).astype(int)[:, None], None
    v = u.T
    radius = u**2 + v**2
    for r in np.unique(radius)[1:]:
        for size in (1, 2, 4):
            groups = {(min(a, 14 - a), min(b, 14 - b)) for a, b in np.argwhere(radius == r)}
            dealt = [
                bands.index[a, b] for a, b in groups if (1 if a in (0, 7) else 2) * (1 if b in (0, 7) else 2) == size
            ]
            assert abs(2 * sum(dealt) - len(dealt)) <= 1, (grid, r, size)


@pytest.mark.parametrize("grid", [(16, 16), (37, 46)])
def test_random_bands_are_their_seeds(grid):
    """On 37x46 nearly every radius has one group, so that the coin alone tells the seeds apart."""
    a, b, again = (Bands.parse(f"random:{seed}", grid).index for seed in (1, 2, 1))
    assert (a == again).all() and 0.3 < (a == b).mean() < 0.7
    for text in ("random", "random:", "random:-1", "random:x"):
        with pytest.raises(BandsError, match=f'expected random:SEED with a whole number of at least 0, got "{text}"'):
            Bands.parse(text, (8, 8))


# The benchmark ---------------------------------------------------------------------------------------------------


def test_the_benchmark_agrees_before_it_times(monkeypatch):
    """Tiny shapes; every row has a verdict, and one whose numbers are others is told instead of timed."""
    stage = distill.Stage("vit_tiny_patch16_224", (112, 128), 2, "2,11", "lora")
    rows = [*distill.loss_rows(stage, distill.FORMS, 1, False), distill.cache_row(stage, "lora", 1, 0.75)]
    assert {row["verdict"] for row in rows} <= {"met", "not met", "measured"}
    assert max(row.get("difference", 0) for row in rows) < distill.TOLERANCE
    assert all(f"| {row['row']} |" in distill.table(rows) for row in rows) and "cached" in rows[-1]["row"]
    monkeypatch.setitem(losses.MAP_FORMS, "signed_log", lambda s, t, *w: (s.sum(), s, 1.0))
    (row,) = distill.loss_rows(stage, [form for form in distill.FORMS if form.name == "mse + signed_log"], 1, False)
    assert row["verdict"] == "FAILED: other numbers" and "median" not in row
