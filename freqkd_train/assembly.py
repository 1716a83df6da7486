"""A backbone with its head, made from settings or read back from a finished fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from freqkd_analysis import models, provenance
from freqkd_analysis.conditions import Geometry
from freqkd_analysis.data import layouts
from freqkd_analysis.errors import RunError
from freqkd_analysis.features import reductions
from freqkd_analysis.models import Network
from freqkd_train import annotations as annotated
from freqkd_train import config, detection, segmentation, student
from freqkd_train.downstream import Downstream
from freqkd_train.pyramid import Backbone
from freqkd_train.targets import TargetSource

WEIGHTS = "model.safetensors"


@dataclass
class Built:
    """A model made ready: network, step to train, and how its images are made."""

    settings: Downstream
    network: Network
    step: nn.Module
    geometry: Geometry
    device: str
    classes: tuple[str, ...]


def build(settings: Downstream, classes: Sequence[str], device: str) -> Built:
    """Backbone and head for these classes. Raises FreqkdError for names or sizes that do not fit."""
    size, seed = settings.data.size, settings.seed
    step_px = max(reductions(models.architecture(settings.model)), default=1)
    geometry = Geometry.make(settings.data.geometry, size, step_px)
    network = models.create(settings.model, settings.weights, geometry.size, seed)
    head = settings.head
    backbone = Backbone(network.model, geometry.size, neck=head.neck, train=head.train, rate=head.rate,
                        layer_decay=head.layer_decay, channels=head.channels, seed=seed)  # fmt: skip
    if settings.task == "segment":
        made = segmentation.build(head.kind, backbone, len(classes), content=geometry.content, seed=seed)
        step: nn.Module = segmentation.SegmentationStep(made)
    else:
        detector = detection.build(head.kind, backbone, len(classes), hidden=head.hidden, regions=head.regions,
                                   seed=seed)  # fmt: skip
        teacher = None
        if settings.teacher:
            teacher = loaded(Path(settings.teacher), device).step.detector
        step = detection.DetectionStep(detector, head.consistency, teacher)  # type: ignore[arg-type]
    return Built(settings, network, step.to(device), geometry, device, tuple(classes))


def loaded(run: Path, device: str) -> Built:
    """The model of a finished run. Raises RunError for a folder that is none."""
    path = run / "manifest.json"
    if not path.is_file() or not (run / WEIGHTS).is_file():
        raise RunError(f"{run} is no finished fine-tuning; expected a folder with manifest.json and {WEIGHTS}.")
    shape = {"classes": [str], "config": dict}
    manifest = provenance.read_object(path, shape, "expected the folder of a fine-tuning.")
    settings = config.parsed(Downstream, manifest["config"], path)
    built = build(settings.model_copy(update={"weights": "random", "teacher": ""}), manifest["classes"], device)
    try:
        built.step.load_state_dict(load_file(run / WEIGHTS))
    except (SafetensorError, RuntimeError):
        raise RunError(f"{run / WEIGHTS} is damaged, or of other settings than {path}; fine-tune again.") from None
    return built


def save(built: Built, run: Path) -> None:
    """The model's weights in its run folder, whole or not at all."""
    student.write(built.step.state_dict(), run / WEIGHTS)


def save_backbone(run: Path, path: Path) -> str:
    """The network of a finished run alone, as plain timm weights; its name.

    Raises: RunError as `loaded`.
    """
    built = loaded(run, "cpu")
    whole = getattr(built.step, "detector", None) or built.step.segmenter
    student.write(student.plain(whole.backbone.network), path)  # type: ignore[arg-type,union-attr]
    return built.settings.model


def source(built: Built, target: annotated.Target, modality: str, with_rgb: bool = False) -> TargetSource:
    """Batches of a target as this model sees them."""
    stats = (built.network.mean, built.network.std)
    conversion = layouts.resolve_conversion(target.records)
    return TargetSource(target, built.settings.data, built.geometry, built.settings.seed, stats, conversion, modality,
                        stats if with_rgb else None)  # fmt: skip
