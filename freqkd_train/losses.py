"""FreqKD's loss: standardised features, split into bands, a form and a weight for each band.

    loss = sum over taps and bands of weight * form(S, T)

S and T are the student's and the teacher's part of a band, D = S - T. The teacher gets no gradient. Everything runs
in float32 (float64 when given) whatever the autocast, through `spectral.BandFilter`: forms of a band's energy need no
inverse transform, and each tap has one backward step. `FORMS` and `PRESETS` list what there is.

Shapes: B images, C channels, H x W tokens, N = H W, K bands, z (B, h, w, C) coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from freqkd_analysis.bands import Bands
from freqkd_analysis.errors import FreqkdError, RunError, first, nearest, nearest_folder
from freqkd_analysis.provenance import NUMBER, read_object
from freqkd_analysis.spectral import STANDARDIZATIONS, BandFilter, band_filter, standardize

Features = Mapping[str, Tensor] | Sequence[Tensor]
Grid = tuple[int, int]
Mapped = tuple[Tensor, Tensor, float]
"""A sum over images, its gradient at S, and the factor that makes it the term."""

_RELEASED = {"standardize": "released", "bands": "released:0.5", "forms": ("mse", "log1p_abs")}
PRESETS: Mapping[str, dict[str, Any]] = {
    "released": _RELEASED | {"weights": (1.0, 0.1)},
    "paper": {"standardize": "released", "bands": "split:0.5", "forms": ("mse", "log_of_sum"), "weights": (1.0, 0.1)},
    "uniform": {"standardize": "released", "bands": "linear:1", "forms": ("mse",), "weights": (1.0,)},
    "low_only": _RELEASED | {"weights": (1.0, 0.0)},
    "high_only": _RELEASED | {"weights": (0.0, 1.0)},
    "measured": {"standardize": "released", "forms": "mse"},
}
"""Settings by name. `measured` takes bands and weights from a run: `measured_settings`."""

ENERGY_FORMS: dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor]]] = {
    "mse": lambda e, size: (e / size, torch.full_like(e, 1 / size)),
    "log_of_sum": lambda e, size: (e.log1p(), 1 / (1 + e)),
    "log_of_mse": lambda e, size: ((e / size).log1p(), 1 / (size + e)),
}
"""Energy (B,) of a band of S - T and C H W -> value and slope: mean D^2, log(1 + sum D^2), log(1 + mean D^2).

Each is taken an image and then averaged over the images, so that the batch size does not matter.
"""

_SETTINGS = ("bands", "standardize", "forms", "weights", "energy", "strides")
_WEIGHTS: dict[str, Any] = {
    "bands": {"text": str, "names": [str], "f_lo": [NUMBER], "f_hi": [NUMBER]},
    "layers": [{"tap": str, "f_lo?": [NUMBER], "f_hi?": [NUMBER], "weights": {"*": ([NUMBER], type(None))},
                "energy?": ([NUMBER], type(None))}],
    "rules": {"*": str},
}  # fmt: skip


class FreqKDLoss(nn.Module):
    """The band-wise distillation loss; no parameters. `loss(students, teachers)` is {"loss", "terms"}.

    Args:
        grid: (H, W) of all taps, or one a tap as a mapping or list.
        bands: as for `Bands.parse`.
        standardize: as for `spectral.standardize`, of student and teacher each.
        forms: one of `FORMS` a band, or one for all bands.
        weights: one number a band, or a mapping or list by tap of such; a band of weight 0 is not computed.
        energy: what each band's term is divided by, laid out like `weights`: the teacher's mean energy per position
            and channel makes the bands count alike whatever their size.
        strides: input pixels per token, one number or by tap; bands in cycles per pixel need it.
    Raises: FreqkdError naming the tap and band that has no mode or no weight, and for what does not fit.

    Called with the student's and the teacher's features, lists or mappings by tap of (B, C, H, W) in any floating
    type and layout; lists have the taps "0", "1", ... `terms`: the weighted parts by "tap/band"; loss is their sum.

    Example:
        >>> loss = FreqKDLoss((8, 8), "split:0.5", "none", ("mse", "cosine"), (1, 0.5))
        >>> x = torch.ones(2, 3, 8, 8)
        >>> {name: round(float(term), 6) for name, term in loss([x], [3 * x])["terms"].items()}
        {'0/low': 4.0, '0/high': 0.0}
    """

    def __init__(self, grid: Grid | Sequence[Grid] | Mapping[str, Grid], bands: str = "released:0.5",
                 standardize: str = "released", forms: str | Sequence[str] = ("mse", "log1p_abs"),
                 weights: Any = (1.0, 0.1), energy: Any = None,
                 strides: int | Sequence[int] | Mapping[str, int] | None = None) -> None:  # fmt: skip
        super().__init__()
        if standardize not in STANDARDIZATIONS:
            raise FreqkdError(f'expected standardize {"|".join(STANDARDIZATIONS)}, got "{standardize}".'
                              f"{nearest(standardize, STANDARDIZATIONS)}")  # fmt: skip
        self.standardize = standardize
        given = {"grid": grid, "weights": weights, "energy": energy, "strides": strides}
        laid = {name: _by_tap(value, deep=name != "strides") for name, value in given.items()}
        taps = next((list(value) for value in laid.values() if isinstance(value, dict)), [_ALL])
        self.plans = {tap: _plan(tap, bands, forms, {n: _of(v, tap, n) for n, v in laid.items()}) for tap in taps}

    @classmethod
    def preset(cls, name: str, *, grid: Any, **overrides: Any) -> FreqKDLoss:
        """One of `PRESETS` with single settings replaced: bands, standardize, forms, weights, energy, strides.

        Example:
            >>> FreqKDLoss.preset("released", grid=(37, 46), band="released:0.25")
            Traceback (most recent call last):
            ...
            freqkd_analysis.errors.FreqkdError: no loss setting "band". Did you mean "bands"?
        """
        if name not in PRESETS:
            raise FreqkdError(f'no preset "{name}"; there are {", ".join(PRESETS)}.{nearest(name, PRESETS)}')
        if unknown := [key for key in overrides if key not in _SETTINGS]:
            raise FreqkdError(f'no loss setting "{unknown[0]}".{nearest(unknown[0], _SETTINGS)}')
        settings = PRESETS[name] | overrides
        if missing := {"bands", "weights"} - set(settings):
            raise FreqkdError(f"the preset {name} needs {' and '.join(sorted(missing))} of a run of the analysis; "
                              "measured_settings(RUN, ...) reads them.")  # fmt: skip
        return cls(grid, **settings)

    def forward(self, students: Features, teachers: Features) -> dict[str, Any]:
        """{"loss": scalar, "terms": {"tap/band": scalar}} of features by tap, (B, C, H, W) each."""
        ours, theirs = _named(students), _named(teachers)
        if _ALL not in self.plans and set(ours) != set(self.plans):
            raise FreqkdError(f"expected the student's taps {first(self.plans)}, got {first(ours) or 'none'}.")
        if not ours or set(ours) - set(theirs):
            missing = first(set(ours) - set(theirs)) or "any tap"
            raise FreqkdError(f"expected the teacher's features of {missing}, got {first(theirs) or 'none'}.")
        terms: dict[str, Tensor] = {}
        for tap, student in ours.items():
            plan = self.plans[_ALL if _ALL in self.plans else tap]
            values = self._terms(tap, plan, student, theirs[tap].detach())
            terms |= {f"{tap}/{name}": value for name, value in zip(plan.bands.names, values, strict=True)}
        return {"loss": sum(terms.values()), "terms": terms}

    def _terms(self, tap: str, plan: _Plan, s_BCHW: Tensor, t_BCHW: Tensor) -> Sequence[Tensor]:
        _check(tap, plan.bands.grid, s_BCHW, t_BCHW)
        dtype = s_BCHW.dtype if s_BCHW.dtype == torch.float64 else torch.float32
        if not any(plan.weights):
            return s_BCHW.new_zeros(len(plan.weights), dtype=dtype).unbind()
        with torch.autocast(s_BCHW.device.type, enabled=False):
            s, t = (x.to(dtype).flatten(2).transpose(1, 2) for x in (s_BCHW, t_BCHW))
            s, t = (standardize(x, self.standardize).contiguous() for x in (s, t))
            split = band_filter(plan.bands, dtype, s.device)
            return _Terms.apply(s, t, split, plan.forms, plan.weights).unbind()


class _Plan(NamedTuple):
    """What one tap needs; weights are divided by the energies."""

    bands: Bands
    forms: tuple[str, ...]
    weights: tuple[float, ...]


_ALL = "all taps"


def _by_tap(value: Any, deep: bool) -> Any:
    """A mapping by tap, or one value for all taps. deep: one value is itself a list."""
    if isinstance(value, Mapping):
        return dict(value)
    listed = isinstance(value, Sequence) and not (deep and not any(isinstance(v, Sequence | Mapping) for v in value))
    return {str(i): v for i, v in enumerate(value)} if listed else value


def _of(value: Any, tap: str, name: str) -> Any:
    if not isinstance(value, dict):
        return value
    if tap not in value:
        raise FreqkdError(f'no {name} for tap "{tap}"; there are {first(value)}.{nearest(tap, value)}')
    return value[tap]


def _plan(tap: str, text: str, forms: str | Sequence[str], of_tap: Mapping[str, Any]) -> _Plan:
    bands = Bands.parse(text, of_tap["grid"], of_tap["strides"])
    forms = (forms,) * len(bands) if isinstance(forms, str) else tuple(forms)
    for form in forms:
        if form not in FORMS:
            raise FreqkdError(f'expected forms {", ".join(FORMS)}, got "{form}".{nearest(form, FORMS)}')
    energy = (1.0,) * len(bands) if of_tap["energy"] is None else of_tap["energy"]
    weights = of_tap["weights"]
    for name, values in {"forms": forms, "weights": weights, "energies": energy}.items():
        if len(values) != len(bands):
            raise FreqkdError(f"expected one of {name} for each band {', '.join(bands.names)} of {tap}, got "
                              f"{len(values)}: {', '.join(map(str, values))}.")  # fmt: skip
    for band, modes, w, e in zip(bands.names, bands.modes.tolist(), weights, energy, strict=True):
        where = f'band "{band}" of {tap}'
        if w is None or math.isnan(w):
            raise FreqkdError(_null(band, tap))
        if not 0 <= w < math.inf:
            raise FreqkdError(f"expected a finite weight of at least 0 for {where}, got {w}.")
        if w and modes == 0:
            raise FreqkdError(f"{where} holds no mode on the {bands.grid[0]}x{bands.grid[1]} grid. Give it weight 0 or "
                              "choose other bands.")  # fmt: skip
        if w and (e is None or not 0 < e < math.inf):
            raise FreqkdError(f"expected the teacher's energy above 0 for {where}, got {'null' if e is None else e}.")
    return _Plan(bands, forms, tuple(w / e if w else 0.0 for w, e in zip(weights, energy, strict=True)))


def _null(band: str, tap: str) -> str:
    return f'band "{band}" of {tap} has no weight (null): nothing was measured there. Choose other bands or taps.'


def _named(features: Features) -> dict[str, Tensor]:
    return dict(features) if isinstance(features, Mapping) else {str(i): x for i, x in enumerate(features)}


def _check(tap: str, grid: Grid, s_BCHW: Tensor, t_BCHW: Tensor) -> None:
    for who, x in (("student", s_BCHW), ("teacher", t_BCHW)):
        if x.ndim != 4 or not x.is_floating_point() or tuple(x.shape[2:]) != grid:
            raise FreqkdError(f'expected real features (B, C, {grid[0]}, {grid[1]}) of the {who} at tap "{tap}", got '
                              f"{x.dtype} {tuple(x.shape)}.")  # fmt: skip
    if s_BCHW.shape != t_BCHW.shape or s_BCHW.numel() == 0:
        raise FreqkdError(f'expected student and teacher of one shape at tap "{tap}", got {tuple(s_BCHW.shape)} and '
                          f"{tuple(t_BCHW.shape)}; match channels first.")  # fmt: skip


class _Terms(torch.autograd.Function):
    """(K,) weighted terms of one tap. Saved is what the gradient needs and no more; z, rest: of S - T."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, t: Tensor, split: BandFilter, forms: Sequence[str],
                weights: Sequence[float]) -> Tensor:  # fmt: skip
        energies, ctx.maps = ([k for k, w in enumerate(weights) if w and forms[k] in kind]
                              for kind in (ENERGY_FORMS, MAP_FORMS))  # fmt: skip
        terms = s.new_zeros(len(weights), dtype=torch.float64)
        slopes, gains, grads = terms.new_zeros(len(s), len(weights)), terms.new_tensor(weights), []
        z = rest = None
        if energies:
            d = s - t
            z = split.project(d)
            e_BK = squares(z).flatten(1) @ split.pull.T
            if split.rest in energies:
                rest = split.part(d, z, split.rest)
                e_BK[:, split.rest] = squares(rest).sum(1)
            for k in energies:
                value, slope = ENERGY_FORMS[forms[k]](e_BK[:, k], s[0].numel())
                terms[k], slopes[:, k] = value.mean(), slope * (2 / len(s))
        if ctx.maps:
            zs = split.project(s)
            zt = split.project(t) if z is None else zs - z
            for k in ctx.maps:
                total, grad, factor = MAP_FORMS[forms[k]](split.part(s, zs, k), split.part(t, zt, k), s, t)
                terms[k], gains[k] = total, gains[k] * factor
                grads.append(grad)
        ctx.split = split
        ctx.save_for_backward(z, rest, slopes, gains, *grads)
        return (terms * gains).to(s.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_K: Tensor) -> tuple[Tensor | None, ...]:
        split, (z_d, rest, slopes, gains, *grads) = ctx.split, ctx.saved_tensors
        scale_K = grad_K.to(gains.dtype) * gains
        space = z = None
        if z_d is not None:
            scale_BK = slopes * scale_K
            z = z_d * (scale_BK @ split.pull).to(z_d.dtype).view(*z_d.shape[:3], 1)
            space = None if rest is None else rest * scale_BK[:, split.rest, None, None].to(rest.dtype)
        for k, grad in zip(ctx.maps, grads, strict=True):
            scale = scale_K[k].to(grad.dtype)
            pulled = split.adjoint(grad, k).mul_(scale)
            z = pulled if z is None else z.add_(pulled)
            if k == split.rest:
                space = grad * scale if space is None else space.addcmul_(grad, scale)
        return split.lift(z, space), None, None, None, None


def squares(x: Tensor) -> Tensor:
    """Sums of squares over the last axis in float64; one long float32 sum would lose weak bands."""
    return torch.linalg.vector_norm(x, dim=-1).double().square()


def _log1p_abs(s: Tensor, t: Tensor, *whole: Tensor) -> Mapped:
    """mean (log1p|S| - log1p|T|)^2: blind to the sign. log((1 + a) / (1 + b)) = 2 atanh((a - b) / (2 + a + b))."""
    a, b = s.abs(), t.abs_()
    half = a - b
    below = a.add_(1).add(b).add_(1)
    half = _half_log(half.div_(below), lambda: (a.log() - b.add_(1).log_()).mul_(0.5))
    return squares(half).sum(), s.sign_().mul_(half).div_(a), 4 / s.numel()


def _signed_log(s: Tensor, t: Tensor, *whole: Tensor) -> Mapped:
    """mean (g(S) - g(T))^2, g(x) = sign(x) log1p|x|: the same with the product a b where the signs differ."""
    a, across = s.abs(), (s * t).neg_().clamp_(min=0)
    below = t.abs().add_(a).add_(2).add_(across)
    half = s - t
    signed = lambda x: x.abs().add_(1).log_().copysign_(x)
    half = _half_log(half.add_(across.copysign_(half)).div_(below), lambda: (signed(s) - signed(t)).mul_(0.5))
    return squares(half).sum(), half.div(a.add_(1)), 4 / s.numel()


def _half_log(ratio: Tensor, plain: Callable[[], Tensor]) -> Tensor:
    """atanh of the ratio: exact for small and for near values, and 12 times faster than log1p on a CPU.

    Beyond 0.9, where 1 - ratio has lost digits, `plain` replaces it; on a CPU one look tells whether that occurs.
    """
    if ratio.device.type == "cpu":
        low, high = torch.aminmax(ratio)
        if low >= -0.9 and high <= 0.9:
            return ratio.atanh_()
    return torch.where(ratio.abs() <= 0.9, ratio.atanh(), plain())


def _cosine(s: Tensor, t: Tensor, *whole: Tensor) -> Mapped:
    """mean over images of 1 - R / sqrt(Pa Pb) = |S / |S| - T / |T||^2 / 2: blind to gain, 0 to 2.

    A part below rounding of its whole map (32 eps in amplitude) counts as 0: the term is then 1 without a gradient,
    and 0 where both are.
    """
    tiny = 32 * torch.finfo(s.dtype).eps
    ps, pt, ws, wt = (squares(x).sum(1) for x in (s, t, *whole))
    there_s, there_t = ps > tiny**2 * ws, pt > tiny**2 * wt
    both = there_s & there_t
    scale_s, scale_t = (torch.where(both, p, 1).rsqrt()[:, None, None].to(s.dtype) for p in (ps, pt))
    unit = s * scale_s
    gap = unit - t * scale_t
    value = squares(gap).sum(1) / 2
    grad = torch.addcmul(gap, unit, value[:, None, None].to(s.dtype), value=-1).mul_(scale_s)
    value = torch.where(both, value, (there_s ^ there_t).to(value.dtype)) + 0 * (ps + pt)  # NaN stays
    return value.sum(), grad.masked_fill_(~both[:, None, None], 0), 1 / len(s)


MAP_FORMS: dict[str, Callable[..., Mapped]] = {"log1p_abs": _log1p_abs, "signed_log": _signed_log, "cosine": _cosine}
"""Parts S and T of a band in space, (B, N, C), free to overwrite, and the whole maps -> `Mapped`."""

FORMS = (*ENERGY_FORMS, *MAP_FORMS)


def gradient_shares(loss: Callable[..., Mapping[str, Any]], students: Features, teachers: Features) -> dict[str, float]:
    """How much each term pulls: the norm of its gradient at the student's features over the sum of these norms.

    Args: loss: any with the call form of `FreqKDLoss`.
    Returns: {term: 0 to 1}, summing to 1; all 0 where no term has a gradient.

    Example:
        >>> loss = FreqKDLoss((4, 4), "split:0.5", "none", "mse", (1, 1))
        >>> gradient_shares(loss, [torch.ones(1, 2, 4, 4)], [torch.zeros(1, 2, 4, 4)])
        {'0/low': 1.0, '0/high': 0.0}
    """
    leaves = {tap: x.detach().clone().requires_grad_() for tap, x in _named(students).items()}
    inputs = list(leaves.values())
    norms = {}
    with torch.enable_grad():
        for name, term in loss(leaves if isinstance(students, Mapping) else inputs, teachers)["terms"].items():
            parts = (
                torch.autograd.grad(term, inputs, retain_graph=True, allow_unused=True) if term.requires_grad else ()
            )
            norms[name] = math.hypot(*(float(part.double().norm()) for part in parts if part is not None))
    total = sum(norms.values())
    return {name: norm / total if total else 0.0 for name, norm in norms.items()}


def measured_settings(run: Path, taps: Mapping[str, tuple[Grid, int]], rule: str = "shared", normalize: str = "none",
                      bands: str = "") -> dict[str, Any]:  # fmt: skip
    """Bands, weights and energies that the analysis measured, as settings of `FreqKDLoss` for these taps.

    Args:
        run: its folder, with band_weights.json.
        taps: the loss's taps: grid and input pixels per token.
        rule: `shared` or `precision`, as `rules` in the file says.
        normalize: `band` also returns the teacher's energies, `none` leaves them out.
        bands: text of the bands, the file's own when empty; their edges must be the file's.
    Raises: FreqkdError naming the tap, and the band or the edges, that the file does not have or that do not match.
    """
    path, again = run / "band_weights.json", "write it again: freqkd-analyze summarize RUN."
    if not path.is_file():
        what = f"no band_weights.json in {run}." if run.is_dir() else f"no run folder {run}.{nearest_folder(run)}"
        raise RunError(f"{what} Expected the folder of a finished `freqkd-analyze layers` run.")
    content = read_object(path, _WEIGHTS, again)
    text, layers = bands or content["bands"]["text"], {entry["tap"]: entry for entry in content["layers"]}
    if normalize not in ("none", "band"):
        raise FreqkdError(f'expected normalize none|band, got "{normalize}".')
    weights, energy = dict[str, list[Any]](), dict[str, list[Any]]()
    for tap, (grid, stride) in taps.items():
        if tap not in layers:
            raise RunError(f'{path} has no tap "{tap}", only {first(layers)}.{nearest(tap, layers)} Measure these '
                              "layers of this network, or choose teacher.layers among them.")  # fmt: skip
        entry, parsed = layers[tap], Bands.parse(text, grid, stride)
        _same_edges(path, tap, parsed, entry if "f_lo" in entry else content["bands"])
        found = entry["weights"].get(rule)
        if found is None:
            why = content["rules"].get(rule) or f"known: {', '.join(content['rules'])}"
            raise RunError(f'{path} has no weights by the rule "{rule}" for tap "{tap}" ({why}).')
        weights[tap], energy[tap] = found, entry.get("energy") or []
        for values in (weights[tap], *([energy[tap]] if normalize == "band" else [])):
            if len(values) != len(parsed):
                raise RunError(f'{path}: expected {len(parsed)} numbers for tap "{tap}", got {len(values)}; {again}')
        if None in found:
            raise RunError(f"{path}: {_null(parsed.names[found.index(None)], tap)}")
    return {"bands": text, "weights": weights} | ({"energy": energy} if normalize == "band" else {})


def _same_edges(path: Path, tap: str, bands: Bands, stored: Mapping[str, Any]) -> None:
    for name, edges in (("f_lo", bands.f_lo.tolist()), ("f_hi", bands.f_hi.tolist())):
        kept = stored[name]
        if len(kept) != len(edges) or any(b is None or abs(a - b) > 1e-6 for a, b in zip(edges, kept, strict=True)):
            got, there = (" ".join("null" if v is None else f"{v:.6g}" for v in values) for values in (edges, kept))
            raise RunError(f'bands "{bands.text}" of tap "{tap}" have {name} {got} cycles per token, {path} has '
                           f"{there}; measure with these bands at this input size.")  # fmt: skip
