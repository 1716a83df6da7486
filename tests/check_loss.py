"""One suite that every distillation loss passes: `check_loss(make)`; it fails by an AssertionError that says where.

A loss is called with student and teacher features, lists or mappings by tap of (B, C, H, W), and returns
{"loss": scalar, "terms": {name: scalar}}. Losses that draw random numbers are called from the same seed each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from freqkd_analysis.errors import FreqkdError

Grid = tuple[int, int]
Make = Callable[[Mapping[str, Grid], Mapping[str, int]], nn.Module]
Maps = dict[str, Tensor]
Reference = Callable[[np.ndarray, np.ndarray, str], float]

GRIDS: tuple[Grid, ...] = ((14, 14), (13, 17), (7, 7), (8, 5), (1, 7))
SCALES = (1e-6, 1.0, 1e6)
SEED = 7
TAPS = ("0", "1")
"""Names that a list has too."""


class Errors(NamedTuple):
    """Largest relative errors over grids and scales: of float32 against float64, of float64 against `reference`."""

    value: float
    gradient: float
    reference: float
    slope: float


def check_loss(make: Make, *, reference: Reference | None = None, sign_blind: bool = False, self_zero: bool = True,
               match: bool = True, least: int = 1, batch: int = 4, channels: int = 6, grids: Sequence[Grid] = GRIDS,
               scales: Sequence[float] = SCALES, bar: float = 1e-5) -> Errors:  # fmt: skip
    """Run the whole suite.

    Args:
        make: (grid by tap, channels by tap) -> a loss.
        reference: the float64 loss of student, teacher (B, C, H, W) and the tap's name, weight included.
        sign_blind: whether the teacher's negative costs nothing. self_zero: whether the teacher itself does.
        match: whether shapes must be one; otherwise only the numbers of images. least: images it needs.
        scales: of the features, where float32 and float64 agree; finite it must be at all `SCALES`.
        bar: relative error of float32 values; gradients, as vectors, may have ten times as much.
    """
    errors = [_numbers(_made(make, grid, channels), grid, scale, batch, channels, reference, bar)
              for grid in grids for scale in scales]  # fmt: skip
    for grid in grids:
        loss = _made(make, grid, channels)
        draw = lambda seed, images=batch, grid=grid: maps(seed, grid, images, channels)
        _calls(loss, draw)
        _directions(loss, draw)
        _precisions(loss, draw)
        _same_and_opposite(loss, draw, sign_blind, self_zero)
        _near(loss, draw)
        _extremes(loss, draw, grid)
        _non_finite(loss, draw)
        _few(loss, draw, least)
    _refusals(_made(make, grids[0], channels), grids[0], batch, channels, match)
    return Errors(*(max(part) for part in zip(*errors, strict=True)))


def maps(seed: int, grid: Grid, images: int, channels: int) -> Maps:
    """(B, C, H, W) float64 a tap with a mean, more energy in low frequencies and unlike channels; of order 1."""
    rng = np.random.default_rng(seed)
    out = {}
    for tap in TAPS:
        x = rng.standard_normal((images, channels, *grid))
        x = x + 0.7 * np.roll(x, 1, -1) + 0.5 * np.roll(x, 1, -2) + 0.5 * rng.standard_normal((images, channels, 1, 1))
        out[tap] = torch.from_numpy(x * np.linspace(0.5, 1.5, channels)[:, None, None])
    return out


def run(loss: nn.Module, students: Any, teachers: Any, autocast: bool = False) -> dict[str, Any]:
    torch.manual_seed(SEED)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return loss(students, teachers)


def plain(loss: nn.Module, students: Any, teachers: Any) -> float:
    """The value; without grad, as parameters of the loss would ask for one."""
    with torch.no_grad():
        return float(run(loss, students, teachers)["loss"])


def pulled(loss: nn.Module, students: Maps, teachers: Maps, autocast: bool = False) -> tuple[Tensor, Tensor]:
    """Value, and gradient at all student features as one float64 vector. The backward step is outside autocast."""
    leaves = {tap: x.detach().clone().requires_grad_() for tap, x in students.items()}
    value = run(loss, leaves, teachers, autocast)["loss"]
    if not value.requires_grad:
        return value, torch.zeros(sum(x.numel() for x in leaves.values()), dtype=torch.float64)
    grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    flat = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves.values(), strict=True)]
    return value.detach(), torch.cat([g.double().flatten() for g in flat])


def each(x: Maps, change: Callable[[Tensor], Tensor]) -> Maps:
    return {tap: change(maps_) for tap, maps_ in x.items()}


def _made(make: Make, grid: Grid, channels: int) -> nn.Module:
    torch.manual_seed(0)
    return make(dict.fromkeys(TAPS, grid), dict.fromkeys(TAPS, channels))


def _float(x: Maps) -> Maps:
    return each(x, lambda maps_: maps_.float())


def _finite(value: Tensor, gradient: Tensor, what: str) -> None:
    assert value.isfinite(), f"{what}: loss {value}"
    assert gradient.isfinite().all(), f"{what}: gradient not finite"


# Numbers ---------------------------------------------------------------------------------------------------------


def _numbers(loss: nn.Module, grid: Grid, scale: float, batch: int, channels: int,
             reference: Reference | None, bar: float) -> Errors:  # fmt: skip
    """float32 against float64, and float64 against the reference: value, and slope along two directions."""
    x, y = (_float(each(maps(seed, grid, batch, channels), lambda v: v * scale)) for seed in (0, 1))
    x64, y64 = each(x, Tensor.double), each(y, Tensor.double)
    value, gradient = pulled(loss, x64, y64)
    single, pull = pulled(loss, x, y)
    where = f"{grid[0]}x{grid[1]}, scale {scale:g}"
    assert value.dtype == torch.float64 and single.dtype == torch.float32, where
    _finite(single, pull, where)
    found = [_off(float(single), float(value)), _off(pull, gradient), 0.0, 0.0]
    assert found[0] <= bar and found[1] <= 10 * bar, f"{where}: float32 off by {found[0]:.2g}, gradient {found[1]:.2g}"
    if reference is not None:
        want = lambda s: sum(reference(s[tap].numpy(), y64[tap].numpy(), tap) for tap in TAPS)
        found[2] = _off(float(value), want(x64))
        assert found[2] < 1e-9, f"{where}: {float(value)!r}, expected {want(x64)!r}"
        rng = np.random.default_rng(5)
        length, size = float(gradient.norm()), np.sqrt(gradient.numel())
        for way in (gradient.numpy() / length, rng.standard_normal(len(gradient)) / size):
            step = 1e-7 * scale * size * way  # short: few kinks of a ReLU on the way
            slope = (want(_moved(x64, step)) - want(_moved(x64, -step))) / 2
            along = float(gradient.numpy() @ step)
            # Across the gradient the slope is small: what counts is its error against the steepest one. Where the
            # loss hardly moves, the difference of its two values is rounding.
            steepest, off = length * np.linalg.norm(step), abs(along - slope)
            found[3] = max(found[3], off / steepest)
            assert off < 1e-6 * steepest + 1e-14 * abs(float(value)), f"{where}: slope off by {off / steepest:.2g}"
    return Errors(*found)


def _off(a: Any, b: Any) -> float:
    """|a - b| / |b|."""
    a, b = (torch.as_tensor(v, dtype=torch.float64) for v in (a, b))
    return float((a - b).norm() / b.norm()) if b.norm() > 0 else float((a - b).norm())


def _moved(x: Maps, step: np.ndarray) -> Maps:
    parts = np.split(step, len(x))
    return {tap: v + torch.from_numpy(p).view_as(v) for (tap, v), p in zip(x.items(), parts, strict=True)}


# Calls -----------------------------------------------------------------------------------------------------------


def _calls(loss: nn.Module, draw: Callable[..., Maps]) -> None:
    x, y = _float(draw(0)), _float(draw(1))
    before = each(x, Tensor.clone), each(y, Tensor.clone)
    with torch.no_grad():
        named, listed = run(loss, x, y), run(loss, list(x.values()), list(y.values()))
    for part in (named["loss"], *named["terms"].values()):
        assert isinstance(part, Tensor) and part.shape == ()
    assert set(named) >= {"loss", "terms"} and named["terms"]
    assert float(named["loss"]) == pytest.approx(sum(map(float, named["terms"].values())), rel=1e-6, abs=0)
    assert {k: float(v) for k, v in named["terms"].items()} == {k: float(v) for k, v in listed["terms"].items()}
    assert float(named["loss"]) == float(listed["loss"])
    assert all(any(k.split("/")[0] == tap for k in named["terms"]) for tap in TAPS)
    for kept, maps_ in zip(before, (x, y), strict=True):
        assert all(torch.equal(kept[tap], maps_[tap]) for tap in TAPS), "the features were changed"


def _directions(loss: nn.Module, draw: Callable[..., Maps]) -> None:
    """The student comes first and alone is pulled; a step against the gradient lowers the loss."""
    x, y = (each(_float(draw(seed)), lambda v: v.clone().requires_grad_()) for seed in (0, 1))
    value = run(loss, x, y)["loss"]
    value.backward()
    assert all(v.grad is None for v in y.values()), "the teacher got a gradient"
    assert any(v.grad is not None and v.grad.abs().sum() > 0 for v in x.values()), "the student got no gradient"
    x64, y64 = draw(0), draw(1)
    start, gradient = pulled(loss, x64, y64)
    down = -1e-4 * gradient / gradient.norm()
    after, _ = pulled(loss, _moved(x64, down.numpy()), y64)
    assert after < start


def _precisions(loss: nn.Module, draw: Callable[..., Maps]) -> None:
    """Autocast changes no bit; half types are their values in float32, and get gradients of their own type."""
    x, y = _float(draw(0)), _float(draw(1))
    value, gradient = pulled(loss, x, y)
    under, pull = pulled(loss, x, y, autocast=True)
    assert under.dtype == torch.float32 and torch.equal(under, value) and torch.equal(pull, gradient)
    for half in (torch.bfloat16, torch.float16):
        xh, yh = (each(v, lambda u, half=half: u.to(half)) for v in (x, y))
        want, steep = pulled(loss, _float(xh), _float(yh))
        got, pull = pulled(loss, xh, yh, autocast=True)
        assert got.dtype == torch.float32 and torch.equal(got, want)
        fits = steep.abs() < torch.finfo(half).max
        torch.testing.assert_close(pull[fits], steep.to(half).double()[fits], rtol=1e-2, atol=1e-6)
        # Rounding moves each number by at most half a unit in the last place: the loss by no more than they add up to.
        moved = sum((a.double() - b.double()).norm() for v, w in ((x, xh), (y, yh))
                    for a, b in ((v[tap], w[tap]) for tap in TAPS))  # fmt: skip
        assert abs(float(got - value)) <= 4 * float(gradient.norm() * moved) + 0.05 * abs(float(value))


def _same_and_opposite(loss: nn.Module, draw: Callable[..., Maps], sign_blind: bool, self_zero: bool) -> None:
    x, y = _float(draw(0)), _float(draw(1))
    usual, steep = pulled(loss, x, y)
    assert float(usual) > 0
    same, none = pulled(loss, y, y)
    _finite(same, none, "student = teacher")
    if self_zero:
        assert abs(float(same)) <= 1e-6 * float(usual), f"student = teacher costs {float(same)}"
        assert float(none.norm()) <= 1e-5 * float(steep.norm()), f"student = teacher is pulled by {float(none.norm())}"
    opposite = abs(plain(loss, each(y, torch.neg), y))
    limit = 1e-5 * float(usual)
    assert (opposite <= limit) == sign_blind, f"student = -teacher costs {opposite}, two others {float(usual)}"


def _near(loss: nn.Module, draw: Callable[..., Maps]) -> None:
    """Where the student is the teacher but for a hundredth, float32 still pulls the right way."""
    y = _float(draw(1))
    x = {tap: v + 0.01 * draw(0)[tap].float() for tap, v in y.items()}
    _, gradient = pulled(loss, each(x, Tensor.double), each(y, Tensor.double))
    off = _off(pulled(loss, x, y)[1], gradient)
    assert off < 1e-3, f"near the teacher the gradient is off by {off:.2g}"


def _extremes(loss: nn.Module, draw: Callable[..., Maps], grid: Grid) -> None:
    """Zero maps on either side, constant maps, and one frequency that holds all energy but 1e-10."""
    x, y = _float(draw(0)), _float(draw(1))
    zero = each(x, torch.zeros_like)
    for name, s, t in (("student 0", zero, y), ("teacher 0", x, zero), ("both 0", zero, zero)):
        _finite(*pulled(loss, s, t), name)
    for size in SCALES:
        for name, s, t in (("student", size, 1), ("teacher", 1, size), ("both", size, size)):
            s, t = each(x, lambda v, s=s: v * s), each(y, lambda v, t=t: v * t)
            _finite(*pulled(loss, s, t), f"{name} of {size:g}")
        flat = each(x, lambda v, size=size: torch.full_like(v, size))
        for name, s, t in (("constant student", flat, y), ("constant teacher", x, flat), ("both", flat, flat)):
            _finite(*pulled(loss, s, t), f"{name} of {size:g}")
    rows, columns = (torch.arange(n)[:, None] for n in grid)
    waves = {"mean": torch.ones(grid), "lowest": torch.cos(2 * torch.pi * columns.T / grid[1]).expand(grid),
             "highest": (-1.0) ** (rows + columns.T)}  # fmt: skip
    for name, wave in waves.items():
        s, t = (each(v, lambda u, wave=wave: wave + 1e-5 * u) for v in (x, y))
        _finite(*pulled(loss, s, t), f"all energy in {name}")


def _non_finite(loss: nn.Module, draw: Callable[..., Maps]) -> None:
    """One bad number on either side, at a place the other side has or lacks features, is not hidden."""
    for bad in (float("nan"), float("inf"), -float("inf")):
        for side in (0, 1):
            for other_zero in (False, True):
                both = [_float(draw(0)), _float(draw(1))]
                if other_zero:
                    both[1 - side] = each(both[1 - side], torch.zeros_like)
                both[side]["1"][-1, -1, -1, -1] = bad
                value = plain(loss, *both)
                assert not math.isfinite(value), f"{bad} of the {('student', 'teacher')[side]} gave {value}"


def _few(loss: nn.Module, draw: Callable[..., Maps], least: int) -> None:
    """As few images as it needs work, and hide nothing; fewer are refused."""
    x, y = _float(draw(0, least)), _float(draw(1, least))
    _finite(*pulled(loss, x, y), f"{least} images")
    bad = each(x, lambda v: v * float("nan"))
    assert not math.isfinite(plain(loss, bad, y)) and not math.isfinite(plain(loss, x, bad))
    if least > 1:
        with pytest.raises(FreqkdError, match=str(least)):
            run(loss, draw(0, least - 1), draw(1, least - 1))


# Refusals --------------------------------------------------------------------------------------------------------


def _refusals(loss: nn.Module, grid: Grid, batch: int, channels: int, match: bool) -> None:
    """One line each; a mismatch names both shapes, a missing tap its name."""
    x, y = maps(0, grid, batch, channels), maps(1, grid, batch, channels)
    unlike = [maps(1, grid, batch + 1, channels)]
    if match:
        unlike += [maps(1, grid, batch, channels + 1), maps(1, (grid[0], grid[1] + 1), batch, channels)]
    for other in unlike:
        for s, t in ((x, other), (other, x)):
            with pytest.raises(FreqkdError) as error:
                run(loss, s, t)
            words = str(error.value)
            assert "\n" not in words and _shape(t if s is x else s) in words, words
            assert _shape(x) in words or f"{grid[0]}, {grid[1]})" in words, words
    for s, t, named in (({**x, "2": x["0"]}, y, "2"), (x, {"0": y["0"]}, "1"), (x, {}, "0"), ({}, y, "")):
        with pytest.raises(FreqkdError) as error:
            run(loss, s, t)
        assert "\n" not in str(error.value) and named in str(error.value)
    for change in (lambda v: v[0], lambda v: v.long(), lambda v: v[:0]):
        for s, t in ((each(x, change), y), (x, each(y, change)), (each(x, change), each(y, change))):
            with pytest.raises(FreqkdError):
                run(loss, s, t)


def _shape(x: Maps) -> str:
    return str(tuple(x["0"].shape))
