"""The distillation step: teacher and student features of one batch, matched, and the loss between them.

The step is the module that the loop trains. The teacher is reached through a plain callable, so that it is no part of
the module: not in its parameters, its checkpoints, its training mode, or under DDP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from freqkd_analysis import plan, provenance
from freqkd_analysis.bands import Bands
from freqkd_analysis.errors import FreqkdError, RunError, nearest
from freqkd_analysis.features import Tap, read_taps
from freqkd_train import config
from freqkd_train.baselines import BASELINES, BaselineLoss
from freqkd_train.losses import PRESETS, FreqKDLoss, gradient_shares, measured_settings
from freqkd_train.taps import Match, Paired

Batch = Mapping[str, Any]
Features = dict[str, Tensor]
NONE = "none"
"""The loss that trains nothing: the student stays as it started."""

LOSSES = (*PRESETS, *BASELINES, NONE)


class Teacher:
    """The frozen teacher: {tap: (B, C, H, W)} of a batch's teacher images, without gradients, in evaluation mode."""

    def __init__(self, model: nn.Module, taps_: Sequence[Tap], norm: bool = False) -> None:
        self.model, self.taps, self.norm = model.eval().requires_grad_(False), list(taps_), norm

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Features:
        return self.images(batch["teacher"])

    @torch.no_grad()
    def images(self, images: Tensor) -> Features:
        self.model.to(images.device)
        return read_taps(self.model, self.taps, images, self.norm)


class DistillStep(nn.Module):
    """`step(batch)` is {"loss", "terms"}: what the loop minimises, and its weighted parts by "tap/band".

    Args:
        student: timm network, made trainable by `student.adapt`.
        match: brings its features to the teacher's shape.
        loss: (students, teachers) -> {"loss", "terms"}.
        teacher: batch -> {tap: (B, C, H, W)}; a `Teacher`, or a cache's reader.
    """

    scale: Tensor

    def __init__(self, student: nn.Module, match: Match, loss: nn.Module, teacher: Callable[[Batch], Features]) -> None:
        super().__init__()
        self.student, self.match, self.loss, self.teacher = student, match, loss, teacher
        self.register_buffer("scale", torch.ones(()))

    def train(self, mode: bool = True) -> DistillStep:
        """Frozen parts stay in evaluation mode: their batch statistics and dropout belong to the start."""
        super().train(mode)
        for module in self.student.modules():
            if not any(p.requires_grad for p in module.parameters()):
                module.training = False
        return self

    def features(self, batch: Batch) -> tuple[Features, Features]:
        """The student's features, matched, and the teacher's."""
        teachers = self.teacher(batch)
        wanted = [tap for _, tap in self.match.pairs]
        return self.match(read_taps(self.student, wanted, batch["student"])), teachers

    def forward(self, batch: Batch) -> dict[str, Any]:
        out = self.loss(*self.features(batch))
        return {"loss": out["loss"] * self.scale, "terms": {k: v * self.scale for k, v in out["terms"].items()}}

    def shares(self, batch: Batch) -> dict[str, float]:
        """Each term's share of the gradient at the student's features; the shares add up to 1."""
        with torch.no_grad():
            students, teachers = self.features(batch)
        return gradient_shares(self.loss, students, teachers)

    @torch.no_grad()
    def match_gradient(self, reference: nn.Module, batch: Batch) -> float:
        """Scale the loss so that its gradient at the trained parameters is as long as `reference`'s on this batch."""
        with torch.enable_grad():
            students, teachers = self.features(batch)
            lengths = [self._length(loss(students, teachers)["loss"]) for loss in (reference, self.loss)]
        if min(lengths) == 0:
            raise FreqkdError("loss.match_gradient: a loss has no gradient at the first step, so there is nothing to "
                              "match; drop it or choose another loss.")  # fmt: skip
        self.scale.fill_(lengths[0] / lengths[1])
        return float(self.scale)

    def _length(self, loss: Tensor) -> float:
        trained = [p for p in self.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
        squares = [g.double().square().sum() for g in gradients if g is not None]
        return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def check_name(name: str) -> None:
    """Raises FreqkdError with the nearest when no loss has this name.

    Example:
        >>> check_name("relased")
        Traceback (most recent call last):
        ...
        freqkd_analysis.errors.FreqkdError: no loss "relased". Did you mean "released"? See freqkd-train config losses.
    """
    if name not in LOSSES:
        raise FreqkdError(f'no loss "{name}".{nearest(name, LOSSES)} See freqkd-train config losses.')


def coupled(name: str) -> bool:
    """Whether the loss compares the images of a batch with each other."""
    return name in BASELINES and BASELINES[name].batch


def matching(name: str) -> dict[str, Any]:
    """How the loss wants its features matched: arguments of `taps.Match`."""
    check_name(name)
    found = BASELINES.get(name)
    if found is None:
        return {"project": "unlike", "resize": True}
    if not found.needs_match:
        return {"project": "none", "resize": name == "at"}
    return {"project": "all" if found.projector else "unlike", "resize": True}


def objective(settings: config.Loss, pairs: Sequence[Paired]) -> nn.Module:
    """The loss that the settings name, for these taps; grids and channels are the teacher's.

    Raises: FreqkdError for an unknown name, settings the loss has no use for, or weights of a run that do not fit.
    """
    check_name(settings.name)
    teachers = [teacher for teacher, _ in pairs]
    given = {key: getattr(settings, key) for key in ("bands", "standardize", "forms", "weights")}
    given = {key: value for key, value in given.items() if value}
    if settings.name in BASELINES:
        if given:
            raise FreqkdError(f"loss.{next(iter(given))} belongs to the FreqKD presets {', '.join(PRESETS)}; the loss "
                              f"{settings.name} has no use for it.")  # fmt: skip
        return BaselineLoss(settings.name, settings.weight, {t.tap: t.channels for t in teachers})
    places = {t.tap: (t.grid, t.stride) for t in teachers}
    if settings.name == "measured":
        run = Path(settings.weights_from)
        given = measured_settings(run, places, settings.rule, settings.normalize, **_only(given, "bands")) | given
        if settings.normalize == "band":
            _check_energies(run, str((PRESETS["measured"] | given)["standardize"]))
    loss = FreqKDLoss.preset(settings.name, grid={tap: grid for tap, (grid, _) in places.items()},
                             strides={tap: stride for tap, (_, stride) in places.items()}, **given)  # fmt: skip
    return loss if settings.weight is None else Weighted(loss, settings.weight)


def check_loss(settings: config.Loss, size: tuple[int, int]) -> None:
    """Build the loss on stand-in taps, before there is a network, a pair or a run to take weights from.

    Args: size: of the network's input, px. As a grid it holds every mode that any tap does, so that nothing is refused
        here which a tap could have.
    Raises: FreqkdError for an unknown name, and for bands, forms and weights that do not go together.

    Example:
        >>> check_loss(config.Loss(name="uniform", bands="released:0.25"), (64, 64))
        Traceback (most recent call last):
        ...
        freqkd_analysis.errors.FreqkdError: expected one of forms for each band low, high of every tap, got 1: mse.
    """
    if settings.name == NONE:
        return
    # These are full on any grid, and slow to deal on a large one.
    if settings.bands.partition(":")[0] in ("random", "equal-modes"):
        size = (min(size[0], 64), min(size[1], 64))
    if settings.name == "measured":  # its weights come later, one a band
        text = settings.bands or plan.Settings.bands
        count = len(Bands.parse(text, size, 1))
        settings = settings.model_copy(update={
            "name": "released", "bands": text, "forms": settings.forms or ("mse",) * count,
            "weights": settings.weights or (1.0,) * count})  # fmt: skip
    tap = Tap(0, "every tap", 1.0, size, 1, 8, "nchw")
    objective(settings, [(tap, tap)])
    if settings.match_gradient:
        check_loss(reference(settings), size)


def reference(settings: config.Loss) -> config.Loss:
    """The loss whose gradient is matched: another name, with nothing of this one's but its run."""
    return settings.model_copy(update={"name": settings.match_gradient, "match_gradient": "", "bands": "",
                                       "standardize": "", "forms": (), "weights": (), "weight": None})  # fmt: skip


def _check_energies(run: Path, standardize: str) -> None:
    """RunError unless the run measured its energies on features standardised as the loss does it."""
    measured = provenance.read_manifest(run)["config"].get("standardize", "none")
    if measured != standardize:
        raise RunError(f"{run} measured its energies with --standardize {measured}, the loss has {standardize}; for "
                       f"--normalize band measure with --standardize {standardize}, or set loss.standardize "
                       f"{measured}.")  # fmt: skip


def _only(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {name: values[name]} if name in values else {}


class Weighted(nn.Module):
    """Another loss times a constant."""

    def __init__(self, loss: nn.Module, weight: float) -> None:
        super().__init__()
        self.loss, self.weight = loss, weight

    def forward(self, students: Features, teachers: Features) -> dict[str, Any]:
        out = self.loss(students, teachers)
        return {"loss": self.weight * out["loss"], "terms": {k: self.weight * v for k, v in out["terms"].items()}}
