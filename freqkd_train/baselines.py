"""Other people's feature losses, one function each, on one tap; `BASELINES` lists them with weight and source.

Student and teacher are (B, C, H, W) of one shape, unless a baseline's entry says that it needs no match; the scalar is
to be minimised. `BaselineLoss` raises half types to float32 outside autocast and keeps float64, and gives the teacher
no gradient. The published weights assume features that are not normalised: compare losses at matched gradient, not at
printed weights. Equal features cost 0 but for `mgd`, whose generator must learn that; opposite ones cost 0 where the
loss is blind to sign: `at`, `rkd`, `sp` and `cka`. Where a formula divides by a length of 0 the quotient counts as 0.

Shapes: B images, C channels, H x W tokens, N = H W.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from freqkd_analysis.errors import FreqkdError, first, nearest
from freqkd_analysis.features import module_keys
from freqkd_analysis.spectral import real_basis, real_numbers

Features = Mapping[str, Tensor] | Sequence[Tensor]
LEAST_CKA = 4
"""Images that the debiased CKA needs."""


def mse(s_BCHW: Tensor, t_BCHW: Tensor) -> Tensor:
    """Mean squared difference over everything; 0 upwards, in squared feature units. Weight 1; FitNet's 100.

    Source of `fitnet`: Romero et al. 2015, which learns a projector before it; its weight is RepDistiller's.

    Example:
        >>> float(mse(torch.ones(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)))
        1.0
    """
    return (s_BCHW - t_BCHW).square().mean()


def cosine(s_BCHW: Tensor, t_BCHW: Tensor) -> Tensor:
    """Mean over positions of 1 - cos over channels, 0 to 2; blind to each token's length. A zero token counts 1, two 0.

    Weight 1. No single source: the usual token-wise loss.

    Example:
        >>> round(float(cosine(torch.ones(1, 2, 3, 3), -torch.ones(1, 2, 3, 3))), 5)
        2.0
    """
    return _half_gap(_unit(s_BCHW, 1), _unit(t_BCHW, 1)).mean()


def at(s_BCHW: Tensor, t_BCHW: Tensor) -> Tensor:
    """Attention transfer: mean squared difference of unit-length maps of mean_C F^2; blind to sign and gain.

    0 to 2 / N. Takes any channel numbers, on one grid. Source: Zagoruyko and Komodakis 2017, p = 2; weight 1000 as in
    RepDistiller.

    Example:
        >>> x = torch.rand(2, 3, 4, 4)
        >>> float(at(x, -2 * x)) < 1e-12
        True
    """
    s, t = (_unit(_scaled(x).square().mean(1).flatten(1), 1) for x in (s_BCHW, t_BCHW))
    return (s - t).square().mean()


def cwd(s_BCHW: Tensor, t_BCHW: Tensor, tau: float = 1.0) -> Tensor:
    """Channel-wise distillation: tau^2 / (B C) sum KL(p_T, p_S), p = softmax over positions of F / tau.

    0 upwards; blind to an offset of a channel, not to gain; values below 1e-6 are rounding in float32. Source: Shu et
    al. 2021; tau 1 and weight 10 are mmrazor's for detectors.

    Example:
        >>> x = torch.rand(2, 3, 4, 4)
        >>> abs(float(cwd(x + 5, x))) < 1e-6
        True
    """
    s, t = (functional.log_softmax(x.flatten(2) / tau, dim=2) for x in (s_BCHW, t_BCHW))
    return tau**2 * functional.kl_div(s, t, reduction="sum", log_target=True) / (s.shape[0] * s.shape[1])


def pkd(s_BCHW: Tensor, t_BCHW: Tensor) -> Tensor:
    """Half the mean squared difference after each channel is standardised over batch and positions.

    Divided by the standard deviation (of the population; mmrazor takes the sample's) + 1e-6, in feature units. Then
    1 - Pearson correlation, averaged over channels, 0 to 2; a constant channel counts 1/2. Source: Cao et al. 2022;
    weight 6 as for two-stage detectors.

    Example:
        >>> x = torch.rand(2, 3, 4, 4)
        >>> float(pkd(3 * x + 1, x)) < 1e-8
        True
    """
    return (_standard(s_BCHW) - _standard(t_BCHW)).square().mean() / 2


def _standard(x: Tensor) -> Tensor:
    for _ in range(2):  # the mean of equal numbers is not always that number; what one step leaves, the next removes
        x = x - x.mean((0, 2, 3), keepdim=True)
    return x / (_root(x.square().mean((0, 2, 3), keepdim=True)) + 1e-6)


def rkd(s_BCHW: Tensor, t_BCHW: Tensor, distance: float = 25.0, angle: float = 50.0) -> Tensor:
    """Relations of the images of a batch, each a mean over positions: smooth-L1 of pairwise distances over their mean,
    and of the cosines of all triplets' angles.

    0 upwards; blind to sign, gain and offset. Takes any channel numbers and grids; 0 for one image or two. Source: Park
    et al. 2019; both weights and the means over all B^2 and B^3 entries are RepDistiller's (on flattened features).

    Example:
        >>> x = torch.rand(3, 4, 2, 2)
        >>> float(rkd(2 * x, x)) < 1e-8
        True
    """
    s, t = s_BCHW.mean((2, 3)), t_BCHW.mean((2, 3))
    if len(s) < 2:
        return (s.sum() + t.sum()) * 0
    (ds, cs), (dt, ct) = (_relations(_scaled(x)) for x in (s, t))
    return distance * functional.smooth_l1_loss(ds, dt) + angle * functional.smooth_l1_loss(cs, ct)


def _relations(x_BC: Tensor) -> tuple[Tensor, Tensor]:
    """(B, B) distances over the mean of those between two images; (B, B, B) cosines at j of i and k."""
    gaps = x_BC[None] - x_BC[:, None]
    lengths = _root(gaps.square().sum(2))
    between = len(x_BC) * (len(x_BC) - 1)
    unit = _unit(gaps, 2)
    return lengths / _or_one(lengths.sum() / between), unit @ unit.transpose(1, 2)


def sp(s_BCHW: Tensor, t_BCHW: Tensor) -> Tensor:
    """Similarity preserving: sum (G_S - G_T)^2 / B^2, G the batch's Gram matrix of whole maps with unit rows.

    0 to 4 / B; blind to sign and gain of the batch; 0 for one image. Takes any channel numbers and grids. Source: Tung
    and Mori 2019; weight 3000 as in RepDistiller.

    Example:
        >>> x = torch.rand(3, 4, 2, 2)
        >>> float(sp(-x, x)) < 1e-10
        True
    """
    grams = [_unit(x @ x.T, 1) for x in (_scaled(s_BCHW).flatten(1), _scaled(t_BCHW).flatten(1))]
    return (grams[0] - grams[1]).square().sum() / len(s_BCHW) ** 2


class Generator(nn.Module):
    """MGD: student positions masked at random (the same in all channels), the teacher regenerated by two 3x3
    convolutions, squared error summed and divided by the batch; 0 upwards, in squared feature units.

    The mask comes from torch's global generator, which the loop seeds a step. Source: Yang et al. 2022; the mask's
    share 0.65 and weight 2e-5 are those of its detectors.

    Example:
        >>> Generator(2)(torch.ones(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)).shape
        torch.Size([])
    """

    def __init__(self, channels: int, masked: float = 0.65) -> None:
        super().__init__()
        self.channels, self.masked = channels, masked
        self.layers = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(),
                                    nn.Conv2d(channels, channels, 3, padding=1))  # fmt: skip

    def forward(self, s_BCHW: Tensor, t_BCHW: Tensor) -> Tensor:
        if s_BCHW.shape[1] != self.channels:
            raise FreqkdError(f"mgd: expected {self.channels} channels, got {tuple(s_BCHW.shape)}.")
        kept = torch.rand(len(s_BCHW), 1, *s_BCHW.shape[2:], device=s_BCHW.device) >= self.masked
        # In the features' precision, whatever the parameters'.
        weights = {name: p.to(s_BCHW.dtype) for name, p in self.layers.named_parameters()}
        made: Tensor = torch.func.functional_call(self.layers, weights, (s_BCHW * kept,))
        return (made - t_BCHW).square().sum() / len(s_BCHW)


def freekd(s_BCHW: Tensor, t_BCHW: Tensor, levels: int = 3) -> Tensor:
    """FreeKD-like: sum over levels and the bands cH, cV, cD of the mean L1 of Haar coefficients; the low band is free.

    0 upwards, in feature units. Sides are padded by their last row or column to a multiple of 2^levels. Source: Zhang
    et al. 2024, weight 1 as in its code; without its learned frequency prompts and relational weight, so not FreeKD.

    Example:
        >>> float(freekd(torch.ones(1, 2, 8, 8), torch.zeros(1, 2, 8, 8)))
        0.0
    """
    height, width = s_BCHW.shape[2:]
    rest = functional.pad(s_BCHW - t_BCHW, (0, -width % 2**levels, 0, -height % 2**levels), mode="replicate")
    total = s_BCHW.new_zeros(())
    for _ in range(levels):
        a, b, c, d = (rest[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1))
        for band in (a + b - c - d, a - b + c - d, a - b - c + d):
            total = total + (band / 2).abs().mean()
        rest = (a + b + c + d) / 2
    return total


def fdcmkd(s_BCHW: Tensor, t_BCHW: Tensor) -> Tensor:
    """FD-CMKD: bands of the embedding (mean over positions) along its channels, not of space; their order is arbitrary.

    Of its real transform along C, low holds frequencies 1 to C // 4, high the rest, DC neither. Each band, back in the
    embedding, is centred and made unit length; low: MSE, high: MSE of sign(x) log(1 + |x|). A band below rounding of
    the embedding (32 eps in amplitude) counts as 0. 0 to 8 / C; blind to gain. Source: arXiv 2511.19887, weights 1
    and 1 as in its code.

    Example:
        >>> x = torch.rand(2, 8, 3, 3)
        >>> float(fdcmkd(2 * x, x)) < 1e-8
        True
    """
    (sl, sh), (tl, th) = (_embedding_parts(x.mean((2, 3))) for x in (s_BCHW, t_BCHW))
    return (sl - tl).square().mean() + (_signed_log(sh) - _signed_log(th)).square().mean()


def _embedding_parts(x_BC: Tensor) -> list[Tensor]:
    x = _scaled(x_BC)
    least = 32 * torch.finfo(x.dtype).eps * x.detach().norm(dim=1, keepdim=True)
    parts = []
    for band_CC in _embedding_bands(x.shape[1], x.dtype, x.device):
        part = x @ band_CC
        part = part - part.mean(1, keepdim=True)
        parts.append(_unit(part.masked_fill(part.detach().norm(dim=1, keepdim=True) <= least, 0), 1))
    return parts


@lru_cache(maxsize=16)
def _embedding_bands(channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(C, C) projectors on low and high frequencies."""
    basis, number = torch.from_numpy(real_basis(channels)), torch.from_numpy(real_numbers(channels))
    low, high = basis[(number >= 1) & (number <= channels // 4)], basis[number > channels // 4]
    return (low.T @ low).to(device, dtype), (high.T @ high).to(device, dtype)


def _signed_log(x: Tensor) -> Tensor:
    return x.sign() * torch.log1p(x.abs())


def cka(s_BCHW: Tensor, t_BCHW: Tensor) -> Tensor:
    """1 - debiased linear CKA over the images of a batch, each a mean over positions. Takes any channels and grids.

    0 to 2: 1 for unrelated features, and, without a gradient, where one side does not vary. Blind to sign, gain,
    offset and rotation. Source: Song et al. 2012 (HSIC_1), Nguyen et al. 2021; weight 1 is ours.

    Raises: FreqkdError for fewer than four images.

    Example:
        >>> x = torch.rand(6, 3, 2, 2)
        >>> abs(float(cka(2 * x, x))) < 1e-5
        True
    """
    if len(s_BCHW) < LEAST_CKA:
        raise FreqkdError(f"the loss cka needs batches of at least {LEAST_CKA} images, got {len(s_BCHW)}; set "
                          "training.batch, or training.accumulate 1.")  # fmt: skip
    k, m = (_gram(x.mean((2, 3))) for x in (s_BCHW, t_BCHW))
    norm = _root(_hsic(k, k)) * _root(_hsic(m, m))
    return 1 - torch.where(norm == 0, 0, _hsic(k, m) / _or_one(norm))


def _gram(x_BC: Tensor) -> Tensor:
    """Of centred rows: that does not change the debiased estimate, but keeps its terms small. Diagonal 0."""
    x = x_BC - x_BC.mean(0)
    alike = x.detach().abs().amax() <= 16 * torch.finfo(x.dtype).eps * x_BC.detach().abs().amax()
    x = _scaled(x.masked_fill(alike, 0))  # CKA does not see it, and float32 stays in range
    return (x @ x.T) * (1 - torch.eye(len(x), dtype=x.dtype, device=x.device))


def _hsic(k: Tensor, m: Tensor) -> Tensor:
    n = len(k)
    sums = k.sum() * m.sum() / ((n - 1) * (n - 2))
    return ((k * m).sum() + sums - 2 / (n - 2) * (k.sum(0) * m.sum(0)).sum()) / (n * (n - 3))


def _unit(x: Tensor, dim: int) -> Tensor:
    """Unit length along `dim`; zero stays zero, with a zero gradient."""
    # Divided by its largest value first: squares of tiny or huge features leave float32.
    x = x / _or_one(x.detach().abs().amax(dim, keepdim=True))
    return x / _or_one(_root(x.square().sum(dim, keepdim=True)))


def _scaled(x: Tensor) -> Tensor:
    """The batch over its largest value, a constant: for losses that do not see it."""
    return x / _or_one(x.detach().abs().amax())


def _or_one(x: Tensor) -> Tensor:
    return torch.where(x == 0, torch.ones_like(x), x)


def _root(x: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0; what rounding has put below 0 counts as 0, NaN stays."""
    above = x > 0
    return torch.where(above, torch.where(above, x, 1).sqrt(), x * 0)


def _half_gap(s: Tensor, t: Tensor) -> Tensor:
    """|s - t|^2 / 2 of unit tokens: 1 - cos without cancellation. Where one is zero 1, where both are 0."""
    gap = (s - t).square().sum(1) / 2
    alone = ((s == 0).all(1) ^ (t == 0).all(1)) & ~gap.isnan()
    return torch.where(alone, torch.ones_like(gap), gap)


@dataclass(frozen=True)
class Baseline:
    """One entry: how to compute it, its published weight and where both come from.

    function: (student, teacher) -> scalar, or the class of a module with that call, one a tap, made from its channels.
    assumes: what the weight takes for granted of the features. projector: the student gets a learned 1x1 projector even
    at equal width. needs_match: student and teacher must have one shape. batch: couples the images of a batch, so that
    its parts (accumulation, processes) change it.
    """

    function: Callable[..., Any]
    weight: float
    source: str
    assumes: str
    projector: bool = False
    needs_match: bool = True
    batch: bool = False


_RAW, _ANY = "features not normalised", "nothing: blind to gain"
BASELINES: dict[str, Baseline] = {
    "mse": Baseline(mse, 1.0, "uniform feature matching", _RAW),
    "cosine": Baseline(cosine, 1.0, "token-wise cosine, weight 1", _ANY),
    "fitnet": Baseline(mse, 100.0, "Romero et al. 2015; weight of RepDistiller", _RAW, projector=True),
    "at": Baseline(at, 1000.0, "Zagoruyko and Komodakis 2017; weight of RepDistiller", _ANY, needs_match=False),
    "cwd": Baseline(cwd, 10.0, "Shu et al. 2021; detection setting of mmrazor, tau 1", _RAW),
    "pkd": Baseline(pkd, 6.0, "Cao et al. 2022; two-stage detectors", _ANY, batch=True),
    "rkd": Baseline(rkd, 1.0, "Park et al. 2019; 25 distance + 50 angle", _ANY, needs_match=False, batch=True),
    "sp": Baseline(sp, 3000.0, "Tung and Mori 2019; weight of RepDistiller", _ANY, needs_match=False, batch=True),
    "mgd": Baseline(Generator, 2e-5, "Yang et al. 2022; mask 0.65", _RAW),
    "freekd": Baseline(freekd, 1.0, "after FreeKD, Zhang et al. 2024; without prompts", _RAW),
    "fdcmkd": Baseline(fdcmkd, 1.0, "FD-CMKD, arXiv 2511.19887; along the embedding", _ANY),
    "cka": Baseline(cka, 1.0, "1 - debiased linear CKA (Song et al. 2012)", _ANY, needs_match=False, batch=True),
}
"""Every baseline in reading order."""


class BaselineLoss(nn.Module):
    """One baseline over all taps: {"loss", "terms"}, terms weighted by "tap", loss their sum.

    Args:
        name: of `BASELINES`. weight: instead of the published one. channels: of the teacher by tap; `mgd` needs them.
    Called with the student's and the teacher's features, lists or mappings by tap.
    Raises: FreqkdError for an unknown name, a missing tap, or shapes that do not match.

    Example:
        >>> loss = BaselineLoss("mse", weight=0.5)
        >>> float(loss([torch.ones(1, 2, 3, 3)], [torch.zeros(1, 2, 3, 3)])["terms"]["0"])
        0.5
    """

    def __init__(self, name: str, weight: float | None = None, channels: Mapping[str, int] | None = None) -> None:
        super().__init__()
        if name not in BASELINES:
            raise FreqkdError(f'no baseline "{name}".{nearest(name, BASELINES)} There are {", ".join(BASELINES)}.')
        self.name, self.entry = name, BASELINES[name]
        self.weight = self.entry.weight if weight is None else weight
        self.generators, self.keys = nn.ModuleDict(), module_keys(channels or ())
        if isinstance(self.entry.function, type):
            if not channels:
                raise FreqkdError(f"the loss {name} needs the teacher's channels by tap for its generators.")
            self.generators.update({self.keys[tap]: self.entry.function(count) for tap, count in channels.items()})

    def forward(self, students: Features, teachers: Features) -> dict[str, Any]:
        """{"loss": scalar, "terms": {"tap": scalar}}."""
        ours, theirs = (dict(x) if isinstance(x, Mapping) else {str(i): v for i, v in enumerate(x)}
                        for x in (students, teachers))  # fmt: skip
        if not ours or set(ours) - set(theirs):
            missing = first(sorted(set(ours) - set(theirs))) or "any tap"
            raise FreqkdError(f"expected the teacher's features of {missing}, got {first(theirs) or 'none'}.")
        terms = {tap: self.weight * self._one(tap, s, theirs[tap].detach()) for tap, s in ours.items()}
        return {"loss": sum(terms.values()), "terms": terms}

    def _one(self, tap: str, s: Tensor, t: Tensor) -> Tensor:
        self._check(tap, s, t)
        dtype = s.dtype if s.dtype == torch.float64 else torch.float32
        function = self.generators[self.keys[tap]] if self.generators else self.entry.function
        with torch.autocast(s.device.type, enabled=False):
            value: Tensor = function(s.to(dtype), t.to(dtype))
            return value

    def _check(self, tap: str, s: Tensor, t: Tensor) -> None:
        if self.generators and tap not in self.keys:
            raise FreqkdError(f'the loss {self.name} has no generator for tap "{tap}", only {first(self.keys)}.')
        for who, x in (("student", s), ("teacher", t)):
            if x.ndim != 4 or not x.is_floating_point() or x.numel() == 0:
                raise FreqkdError(f'expected real features (B, C, H, W) of the {who} at tap "{tap}", got {x.dtype} of '
                                  f"{tuple(x.shape)}.")  # fmt: skip
        same = {"at": (0, 2, 3)}.get(self.name, (0, 1, 2, 3) if self.entry.needs_match else (0,))
        if any(s.shape[i] != t.shape[i] for i in same):
            raise FreqkdError(f'{self.name}: student and teacher do not match at tap "{tap}": {tuple(s.shape)} and '
                              f"{tuple(t.shape)}; match them first.")  # fmt: skip
