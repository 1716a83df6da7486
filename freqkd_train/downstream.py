"""The settings of one fine-tuning and evaluation: what is read, which head, how it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from freqkd_train import config
from freqkd_train.config import Data, Section, Training


class Targets(Section):
    """Annotated images. spec: as `annotations.load`; train, test: split names; annotations: which set, of each split.

    policy: what becomes of labels, such as `people=ignore`. allow_leak: go on, and record it, where the splits share
    sequences or frames.
    """

    spec: str = ""
    train: str = "train"
    test: str = "test"
    train_annotations: str = ""
    test_annotations: str = ""
    policy: str = ""
    allow_leak: bool = False


class Stage1(Section):
    """What the backbone was distilled on: pairs as `freqkd-analyze data list` names them, and a file of ids left out.

    It is known so that no evaluation takes those frames for unseen ones.
    """

    pairs: str = ""
    exclude: str = ""


class Head(Section):
    """What stands on the backbone.

    kind: faster_rcnn, retinanet, fcos; light, light_stretched, linear, fpn for segmentation. neck: auto, simple, fpn,
    single, of detectors alone. train: frozen, lora, full or last:K of the backbone. rate: factor on its learning rate.
    consistency: weight of the term that holds a detector's backbone to its start. channels, hidden, regions: widths of
    neck and box head, regions a training image.
    """

    kind: str = "faster_rcnn"
    neck: str = "auto"
    train: str = "full"
    rate: float | None = Field(None, gt=0)
    layer_decay: float = Field(1.0, gt=0, le=1)
    consistency: float = Field(0.1, ge=0)
    channels: int = Field(256, ge=32)
    hidden: int = Field(1024, ge=1)
    regions: int = Field(512, ge=8)


class Downstream(Section):
    """One run. method: the arm it belongs to. model, weights: the backbone, such as a distilled student.

    modality: what the network sees; `rgb` for the reference. teacher: run folder of an RGB detector, for response
    distillation. select: which epoch's weights are kept: the best on the validation part of the training split
    (`validation`; the last where nothing is held out), the `last`, or, as the FreqKD release does, the best on the
    `test` split itself.
    """

    task: Literal["detect", "segment"] = "detect"
    method: str = ""
    seed: int = Field(0, ge=0)
    model: str = ""
    weights: str = "auto"
    modality: Literal["ir", "rgb"] = "ir"
    teacher: str = ""
    select: Literal["validation", "last", "test"] = "validation"
    stage1: Stage1 = Stage1()
    targets: Targets = Targets()
    data: Data = Data(geometry="pad", holdout=0.1)
    head: Head = Head()
    training: Training = Training(epochs=12, batch=8, lr=5e-5, clip=0.1)

    @model_validator(mode="after")
    def _whole_images(self) -> Self:
        # Predictions are brought back to the image's own pixels, which a crop does not allow.
        if self.data.geometry != "pad":
            raise ValueError(f"expected data.geometry pad: whole images are judged, got {self.data.geometry}")
        if self.task == "segment" and self.teacher:
            raise ValueError("expected no teacher with task segment: response distillation is of detectors")
        return self


def read(path: Path) -> Downstream:
    """Settings from a run's config.yaml. Raises ConfigError naming the file."""
    return config.parsed(Downstream, config.tree(path), path)
