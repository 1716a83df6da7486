"""Measures per band against an independent road (parts in space, float64), known answers, re-banding, bad tables."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import spectra_run

from freqkd_analysis import calibration, divergence, schema
from freqkd_analysis.bands import Bands
from freqkd_analysis.errors import BandsError, FreqkdError, RunError

GRIDS = [(8, 8), (16, 16), (7, 7), (13, 11), (9, 14), (37, 46)]
"""Even, odd, prime, non-square."""


def rows_of(x: np.ndarray, y: np.ndarray, text: str, condition: str = "paired") -> tuple[pd.DataFrame, list[dict]]:
    """spectra.parquet rows of fields (P, C, H, W), one layer, by a plain FFT and sums over modes."""
    grid = x.shape[2:]
    atoms = Bands.parse(text, grid, 14).atoms()
    fx, fy = (np.fft.fft2(v, norm="ortho") for v in (x, y))
    maps = [np.abs(fx) ** 2, np.abs(fy) ** 2, (fx * fy.conj()).real, np.abs(np.fft.fft2(x - y, norm="ortho")) ** 2]
    count, n = len(atoms), len(x)
    sums = [np.stack([np.bincount(atoms.index.ravel(), m[i].sum(0).ravel(), count) for i in range(n)]) for m in maps]
    table = pd.DataFrame({
        "condition": condition, "pair": np.repeat([f"p{i:03d}" for i in range(n)], count),
        "group": np.repeat([f"g{i % 4}" for i in range(n)], count), "layer": np.int32(0), "tap": "blocks.0",
        "depth": np.float32(1), "radius": np.tile(np.arange(count, dtype=np.int32), n), "f_lo": np.tile(atoms.f_lo, n),
        "f_hi": np.tile(atoms.f_hi, n), "modes": np.tile(atoms.modes.astype(np.int32), n),
        **{name: s.ravel() for name, s in zip(("p_rgb", "p_ir", "cross", "p_diff"), sums, strict=True)},
    })[list(schema.SPECTRA)]  # fmt: skip
    return table, [{"layer": 0, "tap": "blocks.0", "grid": list(grid), "stride": 14, "channels": x.shape[1]}]


def value(table: pd.DataFrame, measure: str, band: str, pair: str = "p000") -> float:
    rows = table[(table["measure"] == measure) & (table["band"] == band) & (table["pair"] == pair)]
    assert len(rows) == 1
    return float(rows["value"].iloc[0])


def in_space(x: np.ndarray, y: np.ndarray, edges: tuple[float, ...]) -> dict[tuple[str, int], float]:
    """Every measure from the parts of the images in space: masks, inverse transforms, plain sums of products."""
    height, width = x.shape[1:]
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    found = {}
    for k, (lo, hi) in enumerate(zip((0, *edges), (*edges, 1), strict=True)):
        mask = (f >= lo - 1e-12) & (f < hi - 1e-12)
        xb, yb = (np.fft.ifft2(np.fft.fft2(v) * mask).real for v in (x, y))
        norm_x, norm_y = np.sqrt((xb**2).sum()), np.sqrt((yb**2).sum())
        error = ((xb - yb) ** 2).sum()
        found |= {
            ("cosine", k): 1 - (xb * yb).sum() / (norm_x * norm_y),
            ("relative", k): error / (norm_x**2 + norm_y**2),
            ("nmse", k): error / norm_x**2,
            ("mse", k): ((xb - yb) ** 2).mean(),
            ("mse_per_mode", k): error / (mask.sum() * len(x)),
            ("log_spectral", k): abs(2 * np.log(norm_x / norm_y)),
            ("gain", k): (norm_x - norm_y) ** 2 / x.size,
            ("content", k): 2 * (norm_x * norm_y - (xb * yb).sum()) / x.size,
            ("energy_rgb", k): (xb**2).mean(),
            ("energy_ir", k): (yb**2).mean(),
            ("modes", k): mask.sum(),
        }
    return found


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_measure_agrees_with_sums_in_space(grid, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 5, *grid)) + 3 * rng.standard_normal((1, 5, 1, 1))
    y = 0.7 * x + 0.4 * rng.standard_normal(x.shape)
    table = divergence.band_table(*rows_of(x, y, "octave:3"), "octave:3")
    schema.check(table, schema.DIVERGENCE, "divergence.parquet")
    for pair in range(2):
        for (measure, k), expected in in_space(x[pair], y[pair], (0.125, 0.25)).items():
            got = value(table, measure, ("low", "mid", "high")[k], f"p{pair:03d}")
            assert got == pytest.approx(expected, rel=1e-6), (measure, k)
    assert set(table["measure"]) == set(divergence.MEASURES)


def test_the_stable_cosine_keeps_its_digits_near_equality(rng):
    """X and Y one part in 1e7 apart: 1 - R / sqrt(Pa Pb) would lose all but two digits."""
    x = rng.standard_normal((1, 4, 16, 16))
    noise = rng.standard_normal(x.shape)
    table = divergence.band_table(*rows_of(x, x + 1e-7 * noise, "octave:3"), "octave:3")
    fx, fn = np.fft.fft2(x[0], norm="ortho"), np.fft.fft2(noise[0], norm="ortho")
    high = np.hypot(np.fft.fftfreq(16)[:, None], np.fft.fftfreq(16)[None]) >= 0.25
    fx, fn = fx[:, high], fn[:, high]
    energy, along = (np.abs(fx) ** 2).sum(), (fx * fn.conj()).real.sum()
    across = (np.abs(fn) ** 2).sum() - along**2 / energy  # the part of the noise at right angles to X
    assert value(table, "cosine", "high") == pytest.approx(1e-14 * across / (2 * energy), rel=1e-4, abs=0)


def test_mse_is_gain_plus_content_and_adds_up(rng):
    x, y = rng.standard_normal((2, 1, 6, 13, 11))
    table = divergence.band_table(*rows_of(x, y * 1.5, "octave:3"), "octave:3")
    for band in ("low", "mid", "high"):
        parts = value(table, "gain", band) + value(table, "content", band)
        assert parts == pytest.approx(value(table, "mse", band), rel=1e-12)
    total = sum(value(table, "mse", band) for band in ("low", "mid", "high"))
    assert total == pytest.approx(((x - 1.5 * y) ** 2).mean(), rel=1e-10)


@pytest.mark.parametrize("grid", [(16, 16), (15, 20), (13, 11)], ids=str)
def test_prescribed_coherence_comes_back(grid, rng):
    """Y = g X + sqrt(1 - g^2) N per band, unit energy: cosine = relative = 1 - g, mse per mode = 2 (1 - g)."""
    bands = Bands.parse("octave:3", grid)
    x, n = rng.standard_normal((2, 40, 24, *grid))
    g = np.array([0.9, 0.6, 0.2])[bands.index]
    y = np.fft.ifft2(np.fft.fft2(x) * g + np.fft.fft2(n) * np.sqrt(1 - g**2)).real
    table = divergence.band_table(*rows_of(x, y, "octave:3"), "octave:3").groupby(["measure", "band"])["value"].mean()
    for band, coherence in zip(bands.names, (0.9, 0.6, 0.2), strict=True):
        assert table["cosine", band] == pytest.approx(1 - coherence, abs=0.015)
        assert table["relative", band] == pytest.approx(1 - coherence, abs=0.015)
        assert table["mse_per_mode", band] == pytest.approx(2 * (1 - coherence), abs=0.03)


def test_a_shift_costs_one_minus_the_mean_cosine(rng):
    x = rng.standard_normal((30, 24, 16, 16))
    table = divergence.band_table(*rows_of(x, np.roll(x, (1, 2), (2, 3)), "octave:3"), "octave:3")
    u, v = np.meshgrid(np.fft.fftfreq(16), np.fft.fftfreq(16), indexing="ij")
    bands = Bands.parse("octave:3", (16, 16))
    for k, band in enumerate(bands.names):
        expected = 1 - np.cos(2 * np.pi * (u + 2 * v))[bands.index == k].mean()
        got = table[(table["measure"] == "cosine") & (table["band"] == band)]["value"].mean()
        assert got == pytest.approx(expected, abs=0.02)


def test_a_shared_map_moves_cosine_by_a_known_amount(rng):
    """Unrelated content plus one smooth map of energy M in the low band: cosine = E / (E + M), high untouched."""
    x, y = rng.standard_normal((2, 30, 24, 16, 16))
    wave = 2 * np.cos(2 * np.pi * np.arange(16) / 16)[:, None] * np.ones(16)  # energy M = 2 * 256 a channel
    table = divergence.band_table(*rows_of(x + wave, y + wave, "octave:3"), "octave:3", ["cosine"])
    mean = table.groupby("band")["value"].mean()
    modes = Bands.parse("octave:3", (16, 16)).modes[0]
    assert mean["low"] == pytest.approx(modes / (modes + 512), abs=0.01)
    assert mean["high"] == pytest.approx(1, abs=0.01)


def test_scale_of_one_image_leaves_cosine_alone(rng):
    x, y = rng.standard_normal((2, 1, 6, 9, 14))
    a, b = (divergence.band_table(*rows_of(x, s * y, "octave:3"), "octave:3") for s in (1.0, 5.0))
    for band in ("low", "mid", "high"):
        assert value(a, "cosine", band) == pytest.approx(value(b, "cosine", band), rel=1e-9)
        assert value(b, "nmse", band) > value(a, "nmse", band)


def test_an_empty_band_and_a_silent_one_are_nan_never_zero():
    x = np.ones((1, 3, 4, 4))  # only DC: bands above hold no energy
    table = divergence.band_table(*rows_of(x, 2 * x, "0.05,0.1,0.3"), "0.05,0.1,0.3")
    high = table[(table["band"] == "high") & ~table["measure"].isin(["modes", "energy_rgb", "energy_ir"])]
    assert high["value"].isna().all() and len(high) == 8
    assert value(table, "energy_rgb", "high") == 0
    empty = table[(table["band"] == "b1") & (table["measure"] != "modes")]  # no mode between 0.05 and 0.1 on 4 x 4
    assert empty["value"].isna().all() and value(table, "modes", "b1") == 0
    assert value(table, "mse", "low") == 1.0


def test_rounding_is_not_a_signal(rng):
    """Constant maps in float32 leave energies of 1e-14 of the whole above DC: no divergence, not a random one."""
    x = (np.full((1, 3, 8, 8), 7.3) + rng.standard_normal((1, 3, 8, 8)) * 1e-7).astype(np.float32)
    y = (np.full((1, 3, 8, 8), 7.3) + rng.standard_normal((1, 3, 8, 8)) * 1e-7).astype(np.float32)
    table = divergence.band_table(*rows_of(x.astype(float), y.astype(float), "octave:3"), "octave:3")
    assert np.isnan(value(table, "cosine", "high")) and value(table, "cosine", "low") == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("text", ["0.25", "linear:4", "0.125,0.25,0.375", "octave:2", "split:0.5"])
def test_rebanding_equals_a_run_with_those_bands(text, rng):
    x, y = rng.standard_normal((2, 3, 5, 15, 20))
    stored, taps = rows_of(x, y, "octave:3")
    again = divergence.band_table(stored, taps, text, run_bands_text="octave:3")
    direct = divergence.band_table(*rows_of(x, y, text), text)
    pd.testing.assert_frame_equal(again, direct, rtol=1e-9)


def test_an_edge_inside_an_atom_is_refused_with_the_nearest_edges(rng):
    stored, taps = rows_of(*rng.standard_normal((2, 1, 2, 37, 46)), "octave:3")
    with pytest.raises(BandsError, match=r"edge 0\.13 .* on a 37x46 grid; nearest edges .* 0\.125 and 0\.140625"):
        divergence.band_table(stored, taps, "0.13", run_bands_text="octave:3")
    with pytest.raises(BandsError, match=r'"paper" cut through .* made with --bands paper'):
        divergence.band_table(stored, taps, "paper", run_bands_text="octave:3")


def test_bands_that_are_not_rings_work_in_their_own_run(rng):
    x, y = rng.standard_normal((2, 2, 3, 14, 18))
    table = divergence.band_table(*rows_of(x, y, "paper"), "paper")
    index = Bands.parse("paper", (14, 18)).index
    fx, fy = (np.fft.fft2(v[1], norm="ortho")[:, index == 1] for v in (x, y))
    expected = 1 - (fx * fy.conj()).real.sum() / np.sqrt((np.abs(fx) ** 2).sum() * (np.abs(fy) ** 2).sum())
    assert value(table, "cosine", "high", "p001") == pytest.approx(expected, rel=1e-9)


def test_spectra_of_the_project_give_the_same_bands(rng):
    import torch

    from freqkd_analysis.spectral import cross_spectrum

    x, y = rng.standard_normal((2, 2, 5, 13, 11))
    table = divergence.band_table(*rows_of(x, y, "octave:3"), "octave:3")
    bands = Bands.parse("octave:3", (13, 11))
    got = [v.numpy() for v in cross_spectrum(torch.from_numpy(x).float(), torch.from_numpy(y).float(), bands)]
    relative = got[3] / (got[0] + got[1])
    for k, band in enumerate(bands.names):
        assert value(table, "relative", band, "p001") == pytest.approx(relative[1, k], rel=1e-5)


def test_pixels_use_their_own_positions_and_one_channel(rng):
    stored, taps = rows_of(*rng.standard_normal((2, 2, 5, 16, 16)), "octave:3", condition="pixels")
    table = divergence.band_table(stored, taps, "octave:3")
    atoms = Bands.parse("octave:3", (16, 16)).atoms()
    low = stored[stored["pair"] == "p000"].assign(low=np.array(atoms.to_bands[:, 0]))
    low = low[low["radius"] > 0]  # brightness is left out
    expected = (low["p_diff"] * low["low"]).sum() / (16 * 16 * 14**2)
    assert value(table, "mse", "low") == pytest.approx(expected, rel=1e-12)


def test_row_order_does_not_matter():
    table = spectra_run.spectra(spectra_run.KNOWN, pairs=10, layers=2)
    shuffled = table.sample(frac=1, random_state=3).reset_index(drop=True)
    a, b = (divergence.band_table(t, spectra_run.taps(2), "octave:3") for t in (table, shuffled))
    pd.testing.assert_frame_equal(a, b, check_exact=True)


def test_mse_never_comes_alone():
    assert set(divergence.chosen(["mse"])) == {"mse", *divergence.BESIDE_MSE}
    with pytest.raises(FreqkdError, match=r'got "cosin"\. Did you mean "cosine"\?'):
        divergence.chosen(["cosin"])


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda t: t.iloc[1:], "rows are missing or count other modes"),
        (lambda t: pd.concat([t, t.iloc[:1]]), "occur twice"),
        (lambda t: t.assign(layer=np.int32(9)), "holds layer 9, which manifest.json lacks"),
        (lambda t: t.assign(radius=t["radius"] + 100), r"radius \d+ is not in 0 to \d+"),
        (lambda t: t.assign(group=t["group"].where(t["radius"] > 3, "other")), "one pair two groups"),
        (lambda t: t.iloc[:0], "holds no rows"),
    ],
)
def test_tables_that_do_not_fit_are_refused(change, says):
    table = change(spectra_run.spectra({"paired": (0.5, 0.5)}, pairs=4, layers=1))
    with pytest.raises(RunError, match=says):
        divergence.band_table(table, spectra_run.taps(1), "octave:3")


def test_controls_without_the_map_from_stored_rows(rng):
    """Against the direct way: subtract the map, then compare. With the map in, the shift looks ten times smaller."""
    content = rng.standard_normal((12, 24, 16, 16))
    wave = 8 * np.cos(2 * np.pi * np.arange(16) / 16)[:, None] * np.ones(16)
    moved = np.roll(content, 1, 3)
    parts = [
        rows_of(content + wave, moved + wave, "octave:3", "shifted:2"),
        rows_of(content + wave, content + 0.1 * moved + wave, "octave:3", "noise"),
        rows_of(content, rng.standard_normal(content.shape), "octave:3", "mean_removed"),
    ]
    spectra, taps = pd.concat([rows for rows, _ in parts], ignore_index=True), parts[0][1]
    derived = calibration.map_free(spectra)
    schema.check(derived, schema.SPECTRA, "spectra.parquet")
    assert set(derived["condition"]) == {"mean_removed_shifted:2", "mean_removed_noise"}
    direct = divergence.band_table(*rows_of(content, moved, "octave:3"), "octave:3", ["cosine"])
    got = divergence.band_table(derived, taps, "octave:3", ["cosine"])
    raw = divergence.band_table(spectra, taps, "octave:3", ["cosine"])
    for band in ("low", "mid", "high"):
        mean = [t[(t["band"] == band) & t["condition"].str.endswith(c)]["value"].mean()
                for t, c in ((got, "shifted:2"), (direct, "paired"), (raw, "shifted:2"))]  # fmt: skip
        assert mean[0] == pytest.approx(mean[1], rel=0.02)
        assert band != "low" or mean[2] < mean[1] / 10
    assert calibration.map_free(spectra[spectra["condition"] != "mean_removed"]).empty


def test_cube_holds_what_the_table_holds():
    table = divergence.band_table(
        spectra_run.spectra(spectra_run.KNOWN, pairs=6, layers=2, few=3), spectra_run.taps(2), "octave:3"
    )
    cube = divergence.cube(table.sample(frac=1, random_state=0))
    assert (cube.layers, cube.bands, cube.low, cube.high) == ((0, 1), ("low", "mid", "high"), 0, 2)
    assert list(cube.values)[:2] == ["paired", "mean_removed"] and len(cube.pairs["grey"]) == 3
    row = table[(table["condition"] == "grey") & (table["pair"] == "p002") & (table["layer"] == 1)]
    row = row[(row["band"] == "mid") & (row["measure"] == "nmse")]
    assert cube.of("grey", "nmse")[2, 1, 1] == row["value"].iloc[0]


def test_a_band_that_a_coarse_layer_cannot_hold_is_absent_there():
    """Edges per pixel: the coarse layer ends below the upper one. Its high band has no mode and no value, not zero."""
    text = "0.01,0.04/px"
    tables = [spectra_run.spectra({"paired": (0.5, 0.5)}, pairs=3, layers=1, text=text, grid=(16, 16))]
    taps = spectra_run.taps(1)
    atoms = Bands.parse(text, (8, 8), 32).atoms()
    coarse = tables[0][tables[0]["radius"] < 1]
    rows = [
        coarse.assign(layer=np.int32(1), radius=np.int32(r), modes=np.int32(atoms.modes[r]), p_rgb=1.0 * atoms.modes[r])
        for r in range(len(atoms))
    ]
    table = pd.concat([*tables, *rows], ignore_index=True)
    taps.append(taps[0] | {"layer": 1, "grid": [8, 8], "stride": 32})
    cube = divergence.cube(divergence.band_table(table, taps, text))
    assert cube.bands == ("low", "mid", "high")
    assert np.isnan(cube.of("paired", "energy_rgb")[:, 1, 2]).all()
    assert (cube.of("paired", "energy_rgb")[:, 1, :2] > 0).all()
