"""What a user would run instead: scripts and packages for the same spectra, and packages for CKA of a whole run.

A package that is not installed is said so and left out. Answers are compared before anything is timed.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import stand
import torch
from torch import Tensor, nn

from freqkd_analysis.bands import Bands
from freqkd_analysis.spectrometer import Spectrometer

Row = dict[str, Any]
TOLERANCE = 1e-5
"""Largest difference of any band as a share of the largest: rivals run in float32."""


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@contextlib.contextmanager
def silent():  # type: ignore[no-untyped-def]
    """Progress bars and greetings of packages would break the table."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def ours(x_PCHW: Tensor, y_PCHW: Tensor, bands: Bands) -> Callable[[], np.ndarray]:
    """(P, K, 4) by the spectrometer, from maps as a transformer holds them."""
    meter = Spectrometer(bands, x_PCHW.shape[1])
    x, y = (maps.flatten(2).transpose(1, 2).contiguous() for maps in (x_PCHW, y_PCHW))
    to_bands = bands.atoms().to_bands

    def run() -> np.ndarray:
        meter.measure_pairs(x, y)
        return np.einsum("pai,ak->pki", meter.collect()["energies"], to_bands)

    return run


def rfft2_batched(x_PCHW: Tensor, y_PCHW: Tensor, bands: Bands) -> Callable[[], np.ndarray]:
    """Half-plane transforms of the batch; every column but the first and an even grid's last counts twice."""
    width = bands.grid[1]
    half = width // 2 + 1
    twice = np.full(half, 2.0)
    twice[0] = 1
    if width % 2 == 0:
        twice[-1] = 1
    weights = torch.from_numpy((bands.weights[:, :, :half] * twice).reshape(len(bands), -1).T).float()

    def run() -> np.ndarray:
        fx, fy = (torch.fft.rfft2(maps, norm="ortho") for maps in (x_PCHW, y_PCHW))
        fd = fx - fy
        parts = (fx.abs().square(), fy.abs().square(), (fx * fy.conj()).real, fd.abs().square())
        return torch.stack([part.sum(1).flatten(1) @ weights for part in parts], -1).numpy()

    return run


def script(x_PCHW: Tensor, y_PCHW: Tensor, bands: Bands) -> Callable[[], np.ndarray]:
    """One pair at a time, full complex transforms, one mask a band."""
    masks = [torch.from_numpy(bands.index == k) for k in range(len(bands))]

    def run() -> np.ndarray:
        out = []
        for x, y in zip(x_PCHW, y_PCHW, strict=True):
            fx, fy = torch.fft.fft2(x, norm="ortho"), torch.fft.fft2(y, norm="ortho")
            for mask in masks:
                a, b = fx * mask, fy * mask
                out.append([a.abs().square().sum(), b.abs().square().sum(), (a * b.conj()).real.sum(),
                            (a - b).abs().square().sum()])  # fmt: skip
        return np.array(out).reshape(len(x_PCHW), len(bands), 4)

    return run


def by_xrft(x_PCHW: Tensor, y_PCHW: Tensor, bands: Bands) -> Callable[[], np.ndarray]:
    """xrft's power and cross spectra; the sums over bands are ours."""
    import xarray
    import xrft

    index = np.fft.fftshift(bands.index).ravel()
    select = (index[:, None] == np.arange(len(bands))).astype(float)

    def run() -> np.ndarray:
        out = []
        for x, y in zip(x_PCHW.numpy(), y_PCHW.numpy(), strict=True):
            a, b, d = (xarray.DataArray(z, dims=("c", "y", "x")) for z in (x, y, x - y))
            parts = [xrft.power_spectrum(a, dim=["y", "x"]), xrft.power_spectrum(b, dim=["y", "x"]),
                     xrft.cross_spectrum(a, b, dim=["y", "x"], true_phase=True).real,
                     xrft.power_spectrum(d, dim=["y", "x"])]  # fmt: skip
            out.append(np.stack([part.sum("c").values.ravel() @ select for part in parts], -1))
        return np.stack(out)

    return run


def by_pysteps(x_PCHW: Tensor, y_PCHW: Tensor, bands: Bands) -> Callable[[], np.ndarray]:
    """pysteps' radial means of both maps and of the difference, a channel; its rings are its own, DC alone compares."""
    from pysteps.utils.spectral import rapsd

    def run() -> np.ndarray:
        out = []
        for x, y in zip(x_PCHW.numpy(), y_PCHW.numpy(), strict=True):
            sums = [sum(rapsd(channel, np.fft)[0] for channel in z) for z in (x, y, x - y)]
            out.append([sums[0], sums[1], (sums[0] + sums[1] - sums[2]) / 2, sums[2]])
        return np.array(out)[:, None]

    return run


SPECTRA: dict[str, tuple[str, Callable[..., Callable[[], np.ndarray]], str]] = {
    "freqkd": ("", ours, "pa, pb, re, pd a band"),
    "rfft2, batched": ("", rfft2_batched, "the same"),
    "script: fft2 and masks": ("", script, "the same"),
    "xrft": ("xrft", by_xrft, "the same after our sums"),
    "pysteps rapsd": ("pysteps", by_pysteps, "power only, ring means, no corners; DC compared"),
}


def spectra(name: str, grid: tuple[int, int], channels: int, pairs: int, rounds: int, bands: str) -> list[Row]:
    """One layer's spectra of `pairs` pairs: every tool checked, then all timed in turn, `rounds` times."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(stand.smooth(rng, pairs, channels, *grid)).float()
    y = 0.6 * x + 0.4 * torch.from_numpy(stand.smooth(rng, pairs, channels, *grid)).float() + 0.2
    made = Bands.parse(bands, grid)
    reference = expected(x, y, made)
    dc = np.stack([_dc(a.double().numpy(), b.double().numpy()) for a, b in zip(x, y, strict=True)])[:, None]
    rows: list[Row] = []
    ready: dict[str, Callable[[], np.ndarray]] = {}
    for tool, (package, build, gives) in SPECTRA.items():
        row: Row = {"row": f"{name}: {tool}", "note": gives}
        rows.append(row)
        if package and not installed(package):
            row["verdict"] = "not installed"
            continue
        with silent():
            run = build(x, y, made)
            got = run()
        target = dc if "DC" in gives else reference
        row["difference"] = float(np.abs(got - target).max() / np.abs(target).max())
        if row["difference"] > TOLERANCE:
            row["verdict"] = "FAILED: other numbers"
        else:
            ready[tool] = run
    seconds = interleaved(ready, rounds)
    for row, tool in zip(rows, SPECTRA, strict=True):
        if tool in seconds:
            row["ms"] = 1e3 * statistics.median(seconds[tool]) / pairs
            ratios = [a / b for a, b in zip(seconds[tool], seconds["freqkd"], strict=True)]
            row.update(median=statistics.median(ratios), least=min(ratios), most=max(ratios), verdict="measured")
    return rows


def expected(x_PCHW: Tensor, y_PCHW: Tensor, bands: Bands) -> np.ndarray:
    """(P, K, 4) of the slow float64 road, pair by pair."""
    pairs = zip(x_PCHW.double().numpy(), y_PCHW.double().numpy(), strict=True)
    return np.stack([stand.reference(x, y, bands.index, len(bands)) for x, y in pairs])


def _dc(x_CHW: np.ndarray, y_CHW: np.ndarray) -> np.ndarray:
    sums = [(z.sum((1, 2)) ** 2).sum() / z[0].size for z in (x_CHW, y_CHW, x_CHW - y_CHW)]
    return np.array([sums[0], sums[1], (sums[0] + sums[1] - sums[2]) / 2, sums[2]])


def interleaved(tools: dict[str, Callable[[], Any]], rounds: int, least: float = 0.05) -> dict[str, list[float]]:
    """CPU seconds of one call, a round; quick tools are repeated to fill `least` seconds."""
    repeats = {}
    with silent():
        for name, run in tools.items():
            start = time.process_time()
            run()
            repeats[name] = max(1, round(least / max(time.process_time() - start, 1e-6)))
        seconds: dict[str, list[float]] = {name: [] for name in tools}
        for _ in range(rounds):
            for name, run in tools.items():
                start = time.process_time()
                for _ in range(repeats[name]):
                    run()
                seconds[name].append((time.process_time() - start) / repeats[name])
    return seconds


class Side(nn.Module):
    """One half of six-channel images: packages that feed one batch to both sides then compare a pair."""

    def __init__(self, model: nn.Module, place: int) -> None:
        super().__init__()
        self.model, self.place = copy.deepcopy(model), place

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x[:, 3 * self.place : 3 * self.place + 3])


def torch_cka(model: nn.Module, images_P6HW: Tensor, names: list[str]) -> Callable[[], np.ndarray]:
    from torch_cka import CKA

    layers = [f"model.{name}" for name in names]
    made = CKA(Side(model, 0), Side(model, 1), "visible", "infrared", layers, layers)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images_P6HW), batch_size=len(images_P6HW))

    @torch.no_grad()
    def run() -> np.ndarray:
        made.compare(loader, loader)
        return made.hsic_matrix.numpy()

    return run


def ckatorch(model: nn.Module, images_P6HW: Tensor, names: list[str]) -> Callable[[], np.ndarray]:
    from ckatorch import CKA

    layers = [f"model.{name}" for name in names]
    made = CKA(Side(model, 0), Side(model, 1), layers, layers, "visible", "infrared")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images_P6HW), batch_size=len(images_P6HW))
    return lambda: made(loader, epochs=1).numpy()


def cka(x_GnD: Tensor, y_GnD: Tensor) -> float:
    """Minibatch linear CKA of n examples in each of G groups (Nguyen et al. 2021, equation 3): checks both packages."""

    def grams(z_GnD: Tensor) -> np.ndarray:
        gram = (z_GnD.double() @ z_GnD.double().transpose(1, 2)).numpy()
        return gram * (1 - np.eye(gram.shape[1]))

    def hsic(k: np.ndarray, m: np.ndarray) -> float:
        n, km = k.shape[1], k @ m
        middle = k.sum((1, 2)) * m.sum((1, 2)) / ((n - 1) * (n - 2)) - 2 * km.sum((1, 2)) / (n - 2)
        return float((np.trace(km, axis1=1, axis2=2) + middle).sum())

    k, m = grams(x_GnD), grams(y_GnD)
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


def whole_run(model: nn.Module, visible: Tensor, infrared: Tensor, names: list[str], share: float,
              rounds: int) -> list[Row]:  # fmt: skip
    """A batch through the network with every block compared, over the bare forward of both images."""
    both = torch.cat([visible, infrared])
    kept: list[Tensor] = []
    handle = model.get_submodule(names[0]).register_forward_hook(lambda m, i, out: kept.append(out))
    bare = torch.no_grad()(lambda: model(both))
    bare()
    handle.remove()
    x, y = kept[0][: len(visible)], kept[0][len(visible) :]
    # torch_cka's examples are images, ckatorch's the tokens of each image.
    known = {"torch_cka": cka(x.flatten(1)[None], y.flatten(1)[None]), "ckatorch": cka(x, y)}
    own = "pa, pb, re, pd a band; from its share row"
    rows: list[Row] = [{"row": "whole run: freqkd", "note": own, "median": 1 + share, "verdict": "measured"}]
    ready: dict[str, Callable[[], Any]] = {"bare": bare}
    for tool, build in (("torch_cka", torch_cka), ("ckatorch", ckatorch)):
        row: Row = {"row": f"whole run: {tool}", "note": "one CKA a layer pair, no bands", "tool": tool}
        rows.append(row)
        if not installed(tool):
            row["verdict"] = "not installed"
            continue
        try:
            with silent():
                run = build(model, torch.cat([visible, infrared], 1), names)
                got = run()
        except Exception as error:  # a package that fails is a finding, not the end of the table
            row["verdict"] = f"FAILED: {type(error).__name__}: {error}".splitlines()[0][:80]
            continue
        row["difference"] = float(abs(np.ravel(got)[0] - known[tool]))
        if row["difference"] > 5e-3:
            row["verdict"] = "FAILED: other numbers"
        else:
            ready[tool] = run
    seconds = interleaved(ready, rounds)
    for row in rows[1:]:
        if row.get("tool") in seconds:
            ratios = [a / b for a, b in zip(seconds[row["tool"]], seconds["bare"], strict=True)]
            row.update(median=statistics.median(ratios), least=min(ratios), most=max(ratios), verdict="measured")
    return rows
