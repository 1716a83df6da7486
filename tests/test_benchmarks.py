"""The benchmark's own checks on tiny shapes: it agrees before it times, and can disagree. No time is judged here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

_FOLDER = str(Path(__file__).parent.parent / "benchmarks")
sys.path.insert(0, _FOLDER)
import analysis  # noqa: E402
import rivals  # noqa: E402
import stand  # noqa: E402

sys.path.remove(_FOLDER)

from freqkd_analysis import spectrometer  # noqa: E402
from freqkd_analysis.spectrometer import Spectrometer  # noqa: E402

TINY = stand.Case("vit_tiny_patch16_224", (48, 64), "fp32", 2, 1.02, stand.FEATURE, "0,11")


@pytest.fixture(scope="module")
def network():
    return stand.networks()(TINY)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_main_block_agrees_with_complex_float64_transforms(network, dtype):
    with stand.stand(TINY._replace(dtype=dtype), network, 4) as made:
        assert stand.agreement(made) < stand.FEATURE_TOLERANCE


def test_binning_early_leaves_the_numbers(network, monkeypatch):
    """Large grids bin what waits before a block is over; here every forward does."""
    with stand.stand(TINY, network, 6) as made:
        late = made.run()
        real, calls = Spectrometer._settle, []
        monkeypatch.setattr(spectrometer, "PENDING", 0)
        monkeypatch.setattr(Spectrometer, "_settle", lambda meter: (calls.append(len(meter.norms)), real(meter)))
        early = made.run()
    assert calls == [1, 1, 1, 1, 1, 1, 0, 0]  # 3 forwards of 2 taps, then nothing left for collect
    for key, energies in late.energies.items():
        np.testing.assert_allclose(early.energies[key], energies, rtol=1e-12, atol=1e-12 * energies.max())


@pytest.mark.parametrize(("count", "inside"), [(1, 1), (2, 1), (6, 6)])
def test_taps_use_one_thread_where_there_are_few(network, monkeypatch, count, inside):
    seen = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: (seen.append(torch.get_num_threads()), real(*a, **k))[1])
    with analysis.threads(count):
        meter = Spectrometer(analysis.Bands.parse("octave:3", (4, 4)), 3)
        meter.measure(torch.ones(16, 3), torch.zeros(16, 3))
        assert torch.get_num_threads() == count
    assert set(seen) == {inside}


def test_agreement_looks_at_every_feature_condition(network, monkeypatch):
    """A fault in any one condition must show."""
    with stand.stand(TINY, network, 4) as made:
        for name in ("paired", "shuffled", "mean_removed", "mean_removed_shuffled"):
            real = made.run

            def spoilt(name=name, real=real):
                shard = real()
                shard.energies[name, 11] = shard.energies[name, 11] * 1.01
                return shard

            monkeypatch.setattr(made, "run", spoilt)
            assert stand.agreement(made) > stand.FEATURE_TOLERANCE, name
            monkeypatch.setattr(made, "run", real)


def test_a_row_with_other_numbers_fails_instead_of_being_timed(monkeypatch):
    real = stand.reference
    monkeypatch.setattr(stand, "reference", lambda *a: real(*a) * 1.001)
    rows = analysis.share_rows([TINY], 1, 4)
    assert [row["verdict"] for row in rows] == ["FAILED: other numbers"] * 2
    assert not any("median" in row for row in rows)


def test_shares_are_the_taps_over_the_rest_of_the_forward(network):
    """A clock that each reading moves on by one: 2 taps count 2, the rest of the forward what is left."""
    ticks = iter(range(10_000))
    with stand.stand(TINY, network, 4) as made, stand.watched(made.bench, lambda: float(next(ticks))) as times:
        made.run()
    # Readings: start, twice about the images, twice about each of 2 taps, end: 3 gaps of 7 belong to images and taps.
    assert times.inside == [2.0, 2.0] and times.bare == [4.0, 4.0] and times.tail == 1.0
    assert times.shares() == [0.5 + 1 / 8] * 2


def test_share_rows_name_median_bar_and_verdict():
    rows = analysis.share_rows([TINY._replace(bar=9.0)], 1, 4)
    assert [row["verdict"] for row in rows] == ["met", "met"]
    assert all(1 < row["least"] <= row["median"] <= row["most"] for row in rows)


def test_memory_counts_live_bytes_and_each_scratch_once(network):
    def work():
        first = torch.ones(2**20)  # 4 MiB, gone before the next
        del first
        return torch.ones(2**19) + 1  # 2 + 2 MiB

    assert stand.allocator_peak(work) == pytest.approx(4 * 2**20, rel=0.01)
    with stand.stand(TINY, network, 4) as made:
        tokens, channels = 12, 192
        maps = 3 * tokens * channels * 4  # two maps and the half-transformed one, shared by both taps
        basis = 4 * (3 * 3 + 4 * 4)
        select = 8 * tokens * made.bench.meters[0].atoms
        assert stand.scratch_bytes(made.bench) == maps + basis + select


def test_exactness_bars_hold(monkeypatch):
    monkeypatch.setattr(analysis, "GRIDS", ((14, 14), (5, 8), (1, 7)))
    monkeypatch.setattr(analysis, "TIES", (((14, 14), 7), ((18, 18), 9)))
    assert {row["verdict"] for row in analysis.exactness_rows()} == {"met"}


def test_a_mode_on_the_wrong_side_of_an_edge_is_counted(monkeypatch):
    bands = analysis.Bands.parse("linear:7", (14, 14))
    moved = bands.index.copy()
    moved[0, 2] += 1
    monkeypatch.setattr(analysis, "Bands", SimpleNamespace(parse=lambda *a: SimpleNamespace(index=moved)))
    assert analysis.edges_that_differ((14, 14), 7) == 1


def test_a_number_for_an_empty_band_is_counted(monkeypatch):
    assert analysis.empty_reported() == 0
    monkeypatch.setattr(analysis, "MEASURES", {"zero": lambda pa, *rest: np.zeros_like(pa)})
    assert analysis.empty_reported() == 1


@pytest.mark.parametrize("grid", [(5, 8), (6, 7)])
def test_rivals_give_the_same_numbers(grid, monkeypatch):
    monkeypatch.setattr(rivals, "installed", lambda package: False)
    rows = rivals.spectra("tiny", grid, 8, 2, 1, "octave:3")
    verdicts = {row["row"]: row["verdict"] for row in rows}
    assert [verdicts[f"tiny: {name}"] for name in ("freqkd", "rfft2, batched", "script: fft2 and masks")] == [
        "measured"
    ] * 3
    assert verdicts["tiny: xrft"] == verdicts["tiny: pysteps rapsd"] == "not installed"


def test_a_rival_with_other_numbers_is_not_timed(monkeypatch):
    def doubled(x, y, bands):
        run = rivals.ours(x, y, bands)
        return lambda: run() * 2

    monkeypatch.setattr(rivals, "SPECTRA", {"freqkd": ("", rivals.ours, ""), "doubled": ("", doubled, "")})
    wrong = rivals.spectra("tiny", (5, 8), 8, 1, 1, "octave:3")[1]
    assert wrong["verdict"] == "FAILED: other numbers" and "median" not in wrong


def test_cka_is_one_for_a_rotation_and_near_zero_for_strangers():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 1, 200, 8, generator=generator).double()
    turned = x @ torch.linalg.qr(torch.randn(8, 8, generator=generator).double()).Q
    assert rivals.cka(x, turned) == pytest.approx(1, abs=1e-9)
    assert abs(rivals.cka(x, y)) < 0.05


def test_output_is_a_table_and_one_json_line(monkeypatch, capsys):
    rows = [{"row": "share: x", "median": 1.01, "least": 1.0, "most": 1.02, "bar": 1.02, "verdict": "met", "note": ""},
            {"row": "y", "verdict": "FAILED: other numbers", "difference": 0.1}]  # fmt: skip
    monkeypatch.setattr(analysis, "measure", lambda quick, say: rows)
    assert analysis.main(["--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["rows"] == rows and told["cpu"]
    rows.pop()
    assert analysis.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| share: x | 1.0100 (1.0000..1.0200) | 1.02 | met |  |  |" in lines
    assert json.loads(lines[-1])["rows"] == rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_rows_without_a_gpu_say_so():
    assert {row["verdict"] for row in analysis.gpu_rows(True)} == {"not measured (no GPU)"}
