"""The shared suite passes FreqKD's presets and forms, and finds each fault that a loss could have."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from check_loss import check_loss
from torch import Tensor, nn

from freqkd_analysis.errors import FreqkdError
from freqkd_train.losses import FORMS, PRESETS, FreqKDLoss

MAIN = ((13, 17), (8, 5))
"""For the forms: the presets have the squares already, and on one row of tokens a band may hold no mode."""
LOGS = ("log1p_abs", "signed_log")


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "measured"])
def test_every_preset_of_freqkd_passes(name):
    check_loss(lambda grids, channels: FreqKDLoss.preset(name, grid=grids), sign_blind=name == "high_only")


@pytest.mark.parametrize("how", ["none", "released"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_freqkd_passes(form, how):
    make = lambda grids, channels: FreqKDLoss(grids, "octave:3", how, form, (1.0, 0.5, 0.1))
    # The slope of log(1 + |x|) changes over |x| of order 1: in maps of size 1e6 float32 does not hold that place.
    scales = (1e-6, 1.0) if how == "none" and form in LOGS else (1e-6, 1.0, 1e6)
    check_loss(make, sign_blind=form == "log1p_abs", grids=MAIN, scales=scales)


# Planted faults --------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """Mean squared difference, right in all respects, through a product so that autocast has something to round."""

    def forward(self, students, teachers):
        ours, theirs = self.named(students), self.named(teachers)
        if not ours or not set(ours) <= set(theirs):
            raise FreqkdError(f"expected {', '.join(sorted(set(ours) - set(theirs))) or 'taps'}.")
        terms = {tap: self.term(*self.checked(s, theirs[tap])) for tap, s in ours.items()}
        return {"loss": sum(terms.values()), "terms": terms}

    def named(self, x):
        return x if isinstance(x, dict) else {str(i): v for i, v in enumerate(x)}

    def checked(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        real = s.is_floating_point() and t.is_floating_point()
        if s.shape != t.shape or s.ndim != 4 or not real or not s.numel():
            raise FreqkdError(f"expected one shape, got {tuple(s.shape)} and {tuple(t.shape)}.")
        dtype = s.dtype if s.dtype == torch.float64 else torch.float32
        return s.to(dtype), t.to(dtype).detach()

    def term(self, s: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.formula(s, t)

    def formula(self, s: Tensor, t: Tensor) -> Tensor:
        d = (s - t).flatten()
        return d @ d / len(d)


def exact(s, t, tap):
    return ((s - t) ** 2).mean()


class Attached(Toy):
    def checked(self, s, t):
        super().checked(s, t)
        return s.float() if s.dtype != torch.float64 else s, t.float() if t.dtype != torch.float64 else t


class Swapped(Toy):
    def forward(self, students, teachers):
        return super().forward(teachers, students)


class Rounded(Toy):
    def term(self, s, t):
        return self.formula(s, t)


class Single(Toy):
    def checked(self, s, t):
        return tuple(x.float() for x in super().checked(s, t))


class Unweighted(Toy):
    def forward(self, students, teachers):
        out = super().forward(students, teachers)
        return {"loss": 0.5 * out["loss"], "terms": out["terms"]}


class Positional(Toy):
    def named(self, x):
        return super().named(x if isinstance(x, dict) else x[::-1])


class Broadcast(Toy):
    def checked(self, s, t):
        return (s.to(torch.promote_types(s.dtype, torch.float32)), t.to(torch.promote_types(t.dtype, torch.float32)))

    def formula(self, s, t):
        n = min(len(s), len(t))
        return super().formula(s[:n], t[:n].detach())


class Empty(Toy):
    """The mean of nothing is NaN; the refusals of the rest stay."""

    def checked(self, s, t):
        return super().checked(s, t) if len(s) or len(t) else (s.float(), t.float())


class Untold(Toy):
    def forward(self, students, teachers):
        ours, theirs = self.named(students), self.named(teachers)
        terms = {tap: self.term(*self.checked(s, theirs[tap])) for tap, s in ours.items()}
        return {"loss": sum(terms.values()), "terms": terms}


class Nameless(Toy):
    def forward(self, students, teachers):
        out = super().forward(students, teachers)
        return {"loss": out["loss"], "terms": {f"tap {name}": term for name, term in out["terms"].items()}}


class Vectors(Toy):
    def formula(self, s, t):
        return super().formula(s, t)[None]


class Reworded(Toy):
    """Refuses what it must in words that help nobody."""

    def __init__(self, bad: str) -> None:
        super().__init__()
        self.bad = bad

    def forward(self, students, teachers):
        try:
            return super().forward(students, teachers)
        except FreqkdError as error:
            raise FreqkdError("it does not fit" if self.bad in str(error) else str(error)) from error


class Unpulled(Toy):
    def checked(self, s, t):
        ours, theirs = super().checked(s, t)
        return ours if s.dtype == ours.dtype else ours.detach(), theirs


class InPlace(Toy):
    """A second call finds what the first has left, and gives the same."""

    def checked(self, s, t):
        s, t = super().checked(s, t)
        for x in (s, t):
            x.detach().copy_(torch.where(x.isfinite(), x.detach().clamp(-2, 2), x.detach()))
        return s, t


def fault(formula: Callable[[Tensor, Tensor], Tensor]) -> type[Toy]:
    return type("Faulty", (Toy,), {"formula": lambda self, s, t: formula(s, t)})


FAULTS = {
    "a gradient for the teacher": Attached,
    "the teacher first": Swapped,
    "half precision under autocast": Rounded,
    "float32 for float64": Single,
    "terms that do not add up": Unweighted,
    "lists in another order": Positional,
    "shapes cut to fit": Broadcast,
    "the mean of no images": Empty,
    "KeyError for a missing tap": Untold,
    "features changed in place": InPlace,
    "terms that name no tap": Nameless,
    "terms that are no scalars": Vectors,
    "a mismatch without shapes": lambda: Reworded("one shape"),
    "a missing tap without a name": lambda: Reworded("expected 1"),
    "no gradient for half types": Unpulled,
    "NaN as 0": fault(lambda s, t: (s - t).nan_to_num(0, 0, 0).square().mean()),
    "infinity as 0": fault(lambda s, t: (s - t).nan_to_num(float("nan"), 0, 0).square().mean()),
    "a root without a slope at 0": fault(lambda s, t: (s - t).square().mean(1).sqrt().mean()),
    "out of float32's range": fault(lambda s, t: (s - t).pow(8).mean()),
    "a length that underflows": fault(lambda s, t: (s - t).square().mean() / (s - t).pow(4).mean()),
    "digits lost to an offset": fault(lambda s, t: ((s + 1e4) - (t + 1e4)).square().mean()),
    "digits of tiny maps lost": fault(lambda s, t: ((s + 1) - (t + 1)).square().mean()),
    "no direction for a zero token": fault(lambda s, t: 1 - ((s * t).sum(1) / (s.norm(dim=1) * t.norm(dim=1))).mean()),
    "a pull on the teacher's equal": fault(lambda s, t: (s - t).square().mean() + 1e-3 * (s - s.detach()).mean()),
    "a constant": fault(lambda s, t: (s - t).square().mean() + 1e-3),
    "blindness to sign": fault(lambda s, t: (s.abs() - t.abs()).square().mean()),
    "the wrong sign": fault(lambda s, t: -(s - t).square().mean()),
    "a pull the wrong way": fault(lambda s, t: 2 * (s.detach() - t).square().mean() - (s - t).square().mean()),
    "no gradient": fault(lambda s, t: (s.detach() - t).square().mean() + 0 * s.sum()),
    "two images or more": fault(lambda s, t: (s - t).square().sum() / (len(s) - 1)),
}


def test_a_loss_without_fault_passes():
    errors = check_loss(lambda grids, channels: Toy(), reference=exact)
    assert errors.value < 1e-6 and errors.gradient < 1e-6 and errors.reference < 1e-12 and errors.slope < 1e-7


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found(name):
    with pytest.raises((AssertionError, KeyError, pytest.fail.Exception)):
        check_loss(lambda grids, channels: FAULTS[name](), grids=[(8, 5)])


def test_digits_lost_near_the_teacher_are_found():
    """Too few to matter between unlike maps of order 1."""
    lossy = fault(lambda s, t: ((s + 1500) - (t + 1500)).square().mean())
    with pytest.raises(AssertionError, match="near the teacher"):
        check_loss(lambda grids, channels: lossy(), grids=[(8, 5)], scales=(1.0,))


@pytest.mark.parametrize(
    "formula",
    [
        lambda s, t: (s - t).square().mean() + 1e-3 * (s.detach() - t).square().mean(),
        lambda s, t: (s - t).square().mean() * 1.001,
        lambda s, t: (s - t).square().mean() + (s - s.detach()).mean(),
        lambda s, t: ((s - t) * (s - t).detach()).mean(),
        lambda s, t: (s - t)[:, :, :-1].square().mean(),
    ],
)
def test_a_formula_or_gradient_that_is_not_the_references_is_found(formula):
    with pytest.raises(AssertionError, match="expected|slope"):
        check_loss(lambda grids, channels: fault(formula)(), reference=exact, grids=[(8, 5)])
