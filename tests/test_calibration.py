"""Calibrated divergence, equivalent shift, verdict and weights on answers worked out by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import spectra_run
from spectra_run import KNOWN

from freqkd_analysis import band_weights, calibration, divergence
from freqkd_analysis.errors import FreqkdError, RunError


def cube(coherence: dict[str, tuple[float, float]], **options) -> divergence.Cube:
    table = spectra_run.spectra(coherence, **options)
    return divergence.cube(divergence.band_table(table, spectra_run.taps(options.get("layers", 3)), "octave:3"))


@pytest.fixture(scope="module")
def known() -> divergence.Cube:
    return cube(KNOWN, pairs=80, spread=0.01)


def test_calibrated_values_by_hand(known):
    """mean_removed: D = (0.3, 0.65) of ceiling 1; paired: (0.2, 0.6) of ceilings (0.8, 0.9)."""
    got = calibration.answer(known, "mean_removed", "cosine")
    np.testing.assert_allclose(got.intervals["c_low"].estimate, 0.3, atol=0.015)
    np.testing.assert_allclose(got.intervals["c_high"].estimate, 0.65, atol=0.015)
    paired = calibration.answer(known, "paired", "cosine")
    np.testing.assert_allclose(paired.intervals["c_low"].estimate, 0.25, atol=0.015)
    np.testing.assert_allclose(paired.intervals["c_high"].estimate, 0.6667, atol=0.015)
    np.testing.assert_allclose(paired.intervals["ratio"].estimate, 3, atol=0.15)
    assert [got.verdict(i) for i in range(4)] == ["supports"] * 4


def test_estimates_are_plain_means(known):
    """The same numbers from pandas-free means over pairs; `all` is the mean over layers of each column."""
    got = calibration.answer(known, "paired", "nmse").intervals
    d = known.of("paired", "nmse").mean(0)[:, [0, 2]]
    ceiling = known.of("shuffled", "nmse").mean(0)[:, [0, 2]]
    c = d / ceiling
    for name, column in {
        "low": d[:, 0], "high": d[:, 1], "ratio": d[:, 1] / d[:, 0], "difference": d[:, 1] - d[:, 0],
        "c_low": c[:, 0], "c_high": c[:, 1], "c_ratio": c[:, 1] / c[:, 0],
    }.items():  # fmt: skip
        np.testing.assert_allclose(got[name].estimate, [*column, column.mean()], rtol=1e-12)
    np.testing.assert_allclose(got["geometric"].estimate, np.prod(d[:, 1] / d[:, 0]) ** (1 / 3), rtol=1e-12)


def test_numerator_and_denominator_share_their_draws():
    """Paired and shuffled move together with the group: C hardly varies, and its interval must say so."""
    table = spectra_run.spectra({"paired": (0.5, 0.5), "shuffled": (0.5, 0.5)}, spread=0.1, groups=10)
    full = divergence.cube(divergence.band_table(table, spectra_run.taps(), "octave:3"))
    ratio = full.values["shuffled"] / full.values["paired"]
    full.values["shuffled"][...] = full.values["paired"] * 2
    assert np.isfinite(ratio).any()
    got = calibration.answer(full, "paired", "cosine").intervals
    np.testing.assert_allclose([got["c_low"].low, got["c_low"].high], 0.5, rtol=1e-9)
    assert (got["low"].high - got["low"].low > 0.05).all()


@pytest.mark.parametrize(
    "paired, expected", [((0.8, 0.4), "supports"), ((0.4, 0.8), "against"), ((0.6, 0.6), "undetermined")]
)
def test_the_verdict_can_go_either_way(paired, expected):
    full = cube({"mean_removed": paired, "mean_removed_shuffled": (0.0, 0.0)}, spread=0.05)
    if expected == "undetermined":  # no difference but what groups have by themselves
        wobble = dict(zip(sorted(set(full.groups["mean_removed"])), np.linspace(-0.1, 0.1, 12), strict=True))
        values = full.values["mean_removed"]
        values[:, :, 2] = values[:, :, 0] * np.exp([wobble[g] for g in full.groups["mean_removed"]])[:, None, None]
        full.values["mean_removed_shuffled"][:, :, 2] = full.values["mean_removed_shuffled"][:, :, 0]
    got = calibration.answer(full, "mean_removed", "cosine")
    assert got.verdict(3) == expected


def test_a_ceiling_on_the_floor_gives_no_number():
    full = cube({"paired": (0.6, 0.4), "shuffled": (0.98, 0.1), "noise": (0.98, 0.97)}, few=40, spread=0.02)
    got = calibration.answer(full, "paired", "cosine", floor="noise")
    assert np.isnan(got.intervals["c_low"].estimate).all()
    assert np.isfinite(got.intervals["c_high"].estimate[:3]).all()
    assert np.isnan(got.intervals["c_ratio"].estimate).all() and np.isnan(got.intervals["c_ratio"].low).all()
    assert [got.verdict(i) for i in range(4)] == ["undetermined"] * 4
    assert got.reasons == ["shuffled is not above the floor"] * 4


def test_without_unrelated_scenes_nothing_is_calibrated():
    got = calibration.answer(cube({"paired": (0.6, 0.4)}), "paired", "cosine")
    assert np.isnan(got.intervals["c_low"].estimate).all() and got.verdict(0) == "undetermined"
    assert got.reasons[0] == "no rows of unrelated scenes to calibrate against"


def test_a_low_band_at_the_floor_has_no_ratio():
    full = cube({"paired": (0.98, 0.4), "shuffled": (0.1, 0.1), "noise": (0.98, 0.98)}, few=40, spread=0.01)
    got = calibration.answer(full, "paired", "cosine", floor="noise")
    assert np.isfinite(got.intervals["c_low"].estimate).all()
    assert np.isnan(got.intervals["c_ratio"].estimate).all()
    assert got.reasons[0] == "C of the low band may be 0"


def test_an_undetermined_layer_is_left_out_of_all(known):
    holed = cube(KNOWN, pairs=80, spread=0.01)
    holed.values["mean_removed_shuffled"][:, 1] = holed.values["mean_removed_shuffled"][:, 1] * 0
    got = calibration.answer(holed, "mean_removed", "cosine")
    ratio = got.intervals["c_ratio"].estimate
    assert np.isnan(ratio[1]) and ratio[3] == pytest.approx((ratio[0] + ratio[2]) / 2)
    assert [bool(reason) for reason in got.reasons] == [False, True, False, False]


@pytest.mark.parametrize("floor", ["noise", "shifted:3", "shifted"])
def test_floors_by_hand(known, floor):
    got = calibration.answer(known, "paired", "cosine", floor=floor, registration_px=3.0).intervals
    d, ceiling = (known.of(c, "cosine").mean(0)[:, [0, 2]] for c in ("paired", "shuffled"))
    if floor == "noise":
        base = known.of("noise", "cosine").mean(0)[:, [0, 2]]
    else:
        two, four = (known.of(f"shifted:{k}", "cosine").mean(0)[:, [0, 2]] for k in (2, 4))
        base = ((np.sqrt(two) + np.sqrt(four)) / 2) ** 2
    expected = (d - base) / (ceiling - base)
    # A layer whose denominator may be 0 has no number; with these rows the low band always has one.
    np.testing.assert_allclose(got["c_low"].estimate[:3], expected[:, 0], rtol=1e-12)


def test_a_floor_of_no_shift_is_no_floor(known):
    a, b = (calibration.answer(known, "paired", "cosine", floor=f).intervals["c_ratio"] for f in ("none", "shifted:0"))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "floor, error, says",
    [
        ("blurred", FreqkdError, r'the floor none, noise, shifted or shifted:PIXELS; got "blurred"'),
        ("shifted:x", FreqkdError, "shifted:PIXELS"),
        ("shifted:-1", FreqkdError, "shifted:PIXELS"),
        ("shifted:9", RunError, "shifts up to 8 px"),
        ("shifted", RunError, "no registration shift was measured"),
    ],
)
def test_floors_that_cannot_be_are_refused(known, floor, error, says):
    with pytest.raises(error, match=says):
        calibration.answer(known, "paired", "cosine", floor=floor)


def test_a_floor_without_rows_is_refused():
    full = cube({"paired": (0.5, 0.5), "shuffled": (0, 0)})
    with pytest.raises(RunError, match="no rows of `noise`"):
        calibration.answer(full, "paired", "cosine", floor="noise")
    with pytest.raises(RunError, match="no shifted rows"):
        calibration.answer(full, "paired", "cosine", floor="shifted:1")


@pytest.mark.parametrize("frequency", [0.02, 0.05])
def test_equivalent_shift_finds_the_shift_of_one_frequency(frequency):
    """D(d) = 1 - cos(2 pi f d): the inverse is known, also between the tested shifts."""
    pixels = np.array([1.0, 2.0, 4.0, 8.0])
    curve = (1 - np.cos(2 * np.pi * frequency * pixels))[:, None]
    for d in (0.3, 1.0, 1.5, 3.0, 6.0, 8.0):
        found = calibration.equivalent_shift(np.array([1 - np.cos(2 * np.pi * frequency * d)]), pixels, curve)
        assert found[0] == pytest.approx(d, rel=0.08 if frequency > 0.03 else 0.01)
        assert calibration.divergence_at(found[0], pixels, curve)[0] == pytest.approx(
            1 - np.cos(2 * np.pi * frequency * d), rel=1e-9
        )


def test_equivalent_shift_at_the_ends():
    pixels, curve = np.array([1.0, 2.0]), np.array([[0.2, 0.2], [0.5, np.nan]])
    found = calibration.equivalent_shift(np.array([[0.0, 0.1], [0.6, 0.1]]), pixels, np.stack([curve, curve]))
    assert found[:, 0].tolist() == [0.0, 2 * calibration.BEYOND] and np.isnan(found[:, 1]).all()
    # A curve that falls is made monotone: the first shift that costs as much counts.
    falling = np.array([[0.4], [0.3], [0.5]])
    pixels = np.array([1.0, 2.0, 4.0])
    assert calibration.equivalent_shift(np.array([0.4]), pixels, falling)[0] == 1.0
    share = (0.45**0.5 - 0.4**0.5) / (0.5**0.5 - 0.4**0.5)  # 0.3 at 2 px counts as the 0.4 of 1 px
    assert calibration.equivalent_shift(np.array([0.45]), pixels, falling)[0] == pytest.approx(2 + 2 * share)


def test_the_gap_told_in_pixels(known):
    """Paired cosine 0.6 of the high band against the curve of the same cube, by plain search."""
    got = calibration.answer(known, "paired", "cosine").intervals["shift_high"]
    curve = [0.0] + [known.of(f"shifted:{d}", "cosine").mean(0)[0, 2] for d in (1, 2, 4, 8)]
    target = known.of("paired", "cosine").mean(0)[0, 2]
    expected = np.interp(np.sqrt(target), np.sqrt(curve), [0, 1, 2, 4, 8])
    assert got.estimate[0] == pytest.approx(expected, rel=1e-9)
    assert got.low[0] < expected < got.high[0]
    low = calibration.answer(cube({**KNOWN, "paired": (-0.5, 0.4)}), "paired", "cosine")
    assert calibration.shift_text(float(low.intervals["shift_low"].estimate[0]), low.largest_shift) == "> 8"


def test_what_lost_its_map_is_told_against_controls_that_lost_it(known):
    """Without such controls there is no equivalent shift and no floor; with them they are used, not the raw ones."""
    bare = calibration.answer(known, "mean_removed", "cosine")
    assert np.isnan(bare.intervals["shift_high"].estimate).all()
    with pytest.raises(RunError, match="no rows of `noise`"):
        calibration.answer(known, "mean_removed", "cosine", floor="noise")
    table = spectra_run.spectra(KNOWN, pairs=80, spread=0.01)
    both = pd.concat([table, calibration.map_free(table)], ignore_index=True)
    full = divergence.cube(divergence.band_table(both, spectra_run.taps(), "octave:3"))
    got = calibration.answer(full, "mean_removed", "cosine", floor="noise").intervals
    d, ceiling, noise = (
        full.of(c, "cosine").mean(0)[:, [0, 2]] for c in ("mean_removed", "mean_removed_shuffled", "mean_removed_noise")
    )
    np.testing.assert_allclose(got["c_high"].estimate[:3], ((d - noise) / (ceiling - noise))[:, 1], rtol=1e-12)
    curve = [0.0] + [full.of(f"mean_removed_shifted:{k}", "cosine").mean(0)[0, 2] for k in (1, 2, 4, 8)]
    expected = np.interp(np.sqrt(d[0, 1]), np.sqrt(curve), [0, 1, 2, 4, 8])
    assert got["shift_high"].estimate[0] == pytest.approx(expected, rel=1e-9)
    amplitude = calibration.answer(full, "mean_removed", "log_spectral", floor="noise").intervals
    assert np.isnan(amplitude["shift_high"].estimate).all()  # no gain in those controls to compare with


def test_controls_are_not_calibrated_against_other_features(known):
    names = list(known.values)
    assert calibration.ceiling_of("random", names) is None
    assert calibration.ceiling_of("pixels", names) is None
    assert calibration.ceiling_of("pixels", [*names, "pixels_shuffled"]) == "pixels_shuffled"
    assert calibration.ceiling_of("mean_removed", ["mean_removed", "shuffled"]) is None
    assert np.isnan(calibration.answer(known, "random", "cosine").intervals["c_low"].estimate).all()


def test_energies_have_a_ratio_but_no_calibration(known):
    got = calibration.answer(known, "paired", "energy_rgb").intervals
    assert np.isfinite(got["ratio"].estimate).all() and np.isnan(got["c_low"].estimate).all()


def test_renaming_groups_changes_no_estimate_and_no_exact_p():
    table = spectra_run.spectra({"paired": (0.7, 0.5), "shuffled": (0, 0)}, groups=8)
    renamed = table.assign(group=table["group"].map({f"g{i:02d}": f"{(i * 5) % 8}" for i in range(8)}))
    a, b = (
        calibration.answer(
            divergence.cube(divergence.band_table(t, spectra_run.taps(), "octave:3")), "paired", "cosine"
        )
        for t in (table, renamed)
    )
    np.testing.assert_allclose(a.intervals["c_ratio"].estimate, b.intervals["c_ratio"].estimate, rtol=1e-12)
    np.testing.assert_array_equal(a.p, b.p)
    width = a.intervals["c_ratio"].high - a.intervals["c_ratio"].low
    np.testing.assert_allclose(b.intervals["c_ratio"].low, a.intervals["c_ratio"].low, atol=0.1 * width.max())


def test_mean_of_ratios_is_the_other_one(known):
    got = calibration.answer(known, "paired", "cosine")
    values = known.of("paired", "cosine")
    expected = (values[:, :, 2] / values[:, :, 0]).mean(0)
    np.testing.assert_allclose(got.mean_of_ratios, [*expected, expected.mean()], rtol=1e-12)


def test_shared_weights(known):
    c = calibration.calibrated_bands(known, "mean_removed")
    weights = band_weights.shared_weights(c)
    np.testing.assert_allclose(weights, np.tile([1, 0.5, 0.5], (3, 1)), atol=0.03)
    assert band_weights.shared_weights(np.array([[1.2, 1.1]])).tolist() == [[0.0, 0.0]]


def test_precision_weights_are_limited_and_null_when_empty():
    energy = np.array([[1.0, 1000.0, np.nan]])
    weights = band_weights.precision_weights(energy, np.zeros((1, 3)), np.array([[1, 1, 0]]))
    assert weights[0, :2].tolist() == [1.0, 0.01] and np.isnan(weights[0, 2])
