"""Detectors on a `Backbone`, and the step that trains one: `build`, `DetectionStep`, `predict`, `to_detections`.

The heads are torchvision's, with the anchors and regions of `pyramid`, and without its own normalisation and resizing.

Terms of a step beside the detector's own losses:
- `consistency`, the FreqKD release's second stage: weight * sum over taps of the mean over positions of
  1 - cos(token, token of a frozen copy of the network as it began), both fed the same image.
- `response`: from the region head of a detector trained on visible images. Soft targets on the same regions as
  Chen et al., "Learning Efficient Object Detection Models with Knowledge Distillation" (2017), with the temperature of
  Hinton et al. (2015); here without their class weights, and with L1 on box offsets in place of the bounded squares.

Shapes: B images, R regions, K classes with background first. Boxes are x1, y1, x2, y2 in px of the input.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from freqkd_analysis.errors import FreqkdError, first, nearest
from freqkd_train import ignored
from freqkd_train.metrics.boxes import Detections, make_detections
from freqkd_train.pyramid import GROUPS, POOLED, Anchors, Backbone, Regions

Target = dict[str, Tensor]
Found = dict[str, Tensor]

SCALES = {"faster_rcnn": (4.0, 8.0), "retinanet": (4.0, 4.0 * 2**0.5, 8.0), "fcos": (1.0,)}
"""Anchor sides in units of a map: what follows doubles from map to map, so every octave from 4 units on has one."""
KINDS = tuple(SCALES)
RATIOS = (0.5, 1.0, 2.0)
"""Height over width of anchors."""


class DetectionError(FreqkdError):
    """Boxes that cannot be learned, or settings of a detector that do not go together."""


class AsIs(GeneralizedRCNNTransform):
    """Images are stacked, nothing else: they come normalised and sized, and boxes go out as they were found."""

    def __init__(self) -> None:
        super().__init__(1, 1, [0.0], [1.0], size_divisible=1)

    def resize(self, image: Tensor, target: Target | None = None) -> tuple[Tensor, Target | None]:
        return image, target


class Given(nn.Module):
    """Stands for the backbone inside torchvision's detector: hands out maps that were made before."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_channels = channels
        self.maps: OrderedDict[str, Tensor] = OrderedDict()

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return self.maps


class Detector(nn.Module):
    """A backbone and torchvision's heads; made by `build`.

    In training mode `detector(images, targets)` is the dict of losses, in evaluation mode `detector(images)` a list of
    {"boxes", "scores", "labels"}. The heads run in float32 under any autocast: bfloat16 places a box to 2 px in 500.
    """

    def __init__(self, kind: str, backbone: Backbone, heads: nn.Module, settings: dict[str, Any]) -> None:
        super().__init__()
        self.kind, self.backbone, self.heads, self.settings = kind, backbone, heads, settings
        # Label of the heads' first channel. One-stage heads have no background; a channel for it would give noise.
        self.first = 0 if kind == "faster_rcnn" else 1

    def forward(self, images: Tensor, targets: list[Target] | None = None) -> Any:
        return self.judge(images, self.backbone(images), targets)

    def judge(self, images: Tensor, maps: OrderedDict[str, Tensor], targets: list[Target] | None = None) -> Any:
        """As `forward`, on maps that the backbone made of these images."""
        given: Any = self.heads.backbone
        given.maps = maps
        try:
            with torch.autocast(images.device.type, enabled=False):
                found = self.heads(list(images), _counted(targets, -self.first))
            return found if self.heads.training else _counted(found, self.first)
        finally:
            given.maps = OrderedDict()

    def describe(self) -> dict[str, Any]:
        """For a manifest and a protocol card."""
        return {"kind": self.kind, **self.settings, **self.backbone.describe()}


def _counted(items: list[dict[str, Tensor]] | None, by: int) -> list[dict[str, Tensor]] | None:
    return None if items is None else [{**one, "labels": one["labels"] + by} for one in items]


def build(
    kind: str,
    backbone: Backbone,
    classes: int,
    *,
    ratios: Sequence[float] = RATIOS,
    hidden: int = 1024,
    regions: int = 512,
    score: float = 0.01,
    nms: float = 0.5,
    detections: int = 100,
    seed: int = 0,
) -> Detector:
    """A detector of torchvision on a backbone.

    Args:
        kind: faster_rcnn, retinanet or fcos. classes: to find, without background; labels count from 1.
        ratios: height over width of anchors; FCOS has none. hidden: width of the region head, regions: sampled an
            image to train it (Faster R-CNN); on a CPU most of the time goes to them.
        score: least score that is given out; low, since rates at many false alarms need the doubtful ones too.
        nms: overlap above which the lower score goes, within a class. detections: most an image.
        seed: of the heads' first weights.
    Raises: DetectionError for an unknown kind or settings out of range.

    Example:
        >>> import timm
        >>> network = timm.create_model("resnet10t", num_classes=0).eval()
        >>> detector = build("fcos", Backbone(network, (64, 64), channels=32), classes=2).eval()
        >>> sorted(predict(detector, torch.zeros(1, 3, 64, 64))[0])
        ['boxes', 'labels', 'scores']
    """
    if kind not in KINDS:
        raise DetectionError(f'no detector "{kind}".{nearest(kind, KINDS)} Expected one of {", ".join(KINDS)}.')
    least = min(classes, hidden, regions, detections)
    if least < 1 or not 0 <= score < 1 or not 0 < nms <= 1 or min(ratios, default=0) <= 0:
        raise DetectionError("expected classes, hidden, regions and detections of at least 1, 0 <= score < 1, "
                             f"0 < nms <= 1 and ratios above 0, got {classes}, {hidden}, {regions}, {detections}, "
                             f"{score}, {nms}, {tuple(ratios)}.")  # fmt: skip
    anchors = anchors_for(kind, backbone, ratios)
    given = Given(backbone.out_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        common = {"score_thresh": score, "nms_thresh": nms, "detections_per_img": detections}
        if kind == "faster_rcnn":
            heads: Any = FasterRCNN(
                given, rpn_anchor_generator=anchors, box_roi_pool=Regions(backbone.strides, backbone.units),
                box_head=TwoMLPHead(backbone.out_channels * POOLED**2, hidden),
                box_predictor=FastRCNNPredictor(hidden, classes + 1), box_batch_size_per_image=regions,
                **{f"box_{k}": v for k, v in common.items()},
            )  # fmt: skip
        elif kind == "retinanet":
            head = RetinaNetHead(backbone.out_channels, anchors.num_anchors_per_location()[0], classes,
                                 norm_layer=partial(nn.GroupNorm, GROUPS))  # fmt: skip
            heads = RetinaNet(given, classes, anchor_generator=anchors, head=head, **common)
        else:
            heads = FCOS(given, classes, anchor_generator=anchors, **common)
    heads.transform = AsIs()
    settings = {"classes": classes, "anchors": [list(sizes) for sizes in anchors.sizes], "ratios": list(ratios),
                "hidden": hidden, "regions": regions, "score": score, "nms": nms, "detections": detections}  # fmt: skip
    return Detector(kind, backbone, ignored.spare(heads), settings)


def anchors_for(kind: str, backbone: Backbone, ratios: Sequence[float] = RATIOS) -> Anchors:
    """Anchors of each map by its unit; FCOS has one a cell, a square of the unit but never less than the cell."""
    sizes = [[scale * unit for scale in SCALES[kind]] for unit in backbone.units]
    if kind == "fcos":
        sizes = [[max(side[0], stride)] for side, stride in zip(sizes, backbone.strides, strict=True)]
        ratios = (1.0,)
    return Anchors(backbone.strides, sizes, ratios)


@dataclass(frozen=True)
class Response:
    """Weights of the response term. temperature: T of the soft targets. logits, boxes: of its two parts. score: least
    probability of an object, to the teacher, for its box to be taught."""

    temperature: float = 2.0
    logits: float = 0.5
    boxes: float = 0.5
    score: float = 0.5


def response_loss(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], settings: Response) -> Tensor:
    """What a region head differs in from the teacher's on the same regions, lower is nearer, 0 for equal outputs.

    logits * T^2 * mean over regions of KL(teacher || student) of the class probabilities at temperature T, plus
    boxes * mean |difference| of the box offsets of the teacher's best class, over regions where it sees an object.

    Args: student, teacher: (R, K) logits and (R, 4 K) offsets each.

    Example:
        >>> same = (torch.randn(5, 3), torch.randn(5, 12))
        >>> float(response_loss(same, same, Response()))
        0.0
    """
    (logits, offsets), (told, boxes) = student, (x.detach() for x in teacher)
    t = settings.temperature
    divergence = functional.kl_div(functional.log_softmax(logits / t, dim=1), functional.log_softmax(told / t, dim=1),
                                   reduction="none", log_target=True).sum(1)  # fmt: skip
    objects = told.softmax(1)[:, 1:]
    best, seen = objects.argmax(1), objects.sum(1) >= settings.score
    apart = (offsets - boxes).unflatten(1, (-1, 4)).abs().mean(2)
    taught = apart[torch.arange(len(apart), device=apart.device), best + 1]
    mean = taught[seen].sum() / seen.sum().clamp_min(1)
    return settings.logits * t**2 * divergence.sum() / max(len(divergence), 1) + settings.boxes * mean


def consistency_loss(features: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
    """Sum over taps of the mean over images and positions of 1 - cos over channels, in float32; 0 to 2 a tap.

    Args: features, start: {tap: (B, C, H, W)}, of the network and of its frozen copy.

    Example:
        >>> x = torch.randn(2, 8, 3, 5)
        >>> round(float(consistency_loss({"a": x, "b": x}, {"a": 2 * x, "b": -x})), 5)
        2.0
    """
    parts = [1 - functional.cosine_similarity(x.float(), start[tap].detach().float(), dim=1).mean()
             for tap, x in features.items()]  # fmt: skip
    return torch.stack(parts).sum()


class DetectionStep(nn.Module):
    """`step(batch)` is {"loss", "terms"}: the detector's losses, consistency and response, all weighted.

    Args:
        detector: from `build`.
        consistency: weight of the term, 0 for none. There is no such term where the network is frozen: it could not
            depart from its start.
        teacher: a Faster R-CNN of the same classes, trained on visible images, for the response term; batches then
            hold its images, of the same size and view, as batch["teacher"].
        response: weights of that term.

    The frozen copy and the teacher are no submodules: they are in no checkpoint, have no training mode, and are never
    trained; they follow the step to its device.
    Raises: DetectionError for a teacher or a student that is no Faster R-CNN, or of other classes.
    """

    def __init__(self, detector: Detector, consistency: float = 0.1, teacher: Detector | None = None,
                 response: Response | None = None) -> None:  # fmt: skip
        super().__init__()
        self.detector, self.weight, self.response = detector, consistency, response or Response()
        if teacher is not None:
            _check_teacher(detector, teacher)
        start = copy.deepcopy(detector.backbone) if consistency and detector.backbone.trained else None
        self.held = {"start": _frozen(start), "teacher": _frozen(teacher)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DetectionStep:
        for module in self.held.values():
            if module is not None:
                module._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def rates(self) -> dict[str, float]:
        """Factor on the learning rate by prefix of a parameter's name in this step; the longest prefix holds, 1 without
        one."""
        return {f"detector.backbone.{prefix}": factor for prefix, factor in self.detector.backbone.rates().items()}

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Args: batch: {"ids", "images": (B, 3, H, W) normalised, "targets": list of {"boxes": (n, 4), "labels": (n,)
        from 1}}, n of 0 allowed, "ignored" (m, 4) beside them, and "teacher" images where there is one.
        Raises: DetectionError naming the image of a box that has no area, is not finite, or of an unknown class."""
        images = batch["images"]
        targets = [{key: value.to(images.device, torch.int64 if key == "labels" else torch.float32)
                    for key, value in target.items()} for target in batch["targets"]]  # fmt: skip
        _check_targets(batch["ids"], targets, self.detector.settings["classes"])
        features = self.detector.backbone.read(images)
        maps = self.detector.backbone.maps(features)
        with _Watched(self.detector) as watched:
            self.detector.heads.train()  # which is how they give losses; there is nothing in them that learns by it
            losses = self.detector.judge(images, maps, targets)
            self.detector.heads.train(self.training)
        terms = {name.removeprefix("loss_"): value for name, value in losses.items()}
        if self.held["start"] is not None:
            with torch.no_grad():
                start = self.held["start"].read(images)
            terms["consistency"] = self.weight * consistency_loss(features, start)
        if self.held["teacher"] is not None:
            told = self._teacher_says(batch["teacher"], watched.regions)
            terms["response"] = response_loss(watched.outputs, told, self.response)
        return {"loss": torch.stack(list(terms.values())).sum(), "terms": terms}

    @torch.no_grad()
    def _teacher_says(self, images: Tensor, regions: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits and offsets of the teacher's region head on the student's regions."""
        teacher: Any = self.held["teacher"]
        maps, heads = teacher.backbone(images), teacher.heads.roi_heads
        with torch.autocast(images.device.type, enabled=False):
            pooled = heads.box_roi_pool(maps, regions, [tuple(images.shape[2:])] * len(images))
            return heads.box_predictor(heads.box_head(pooled))


class _Watched:
    """Within it, what the region head of a Faster R-CNN last read and gave out: regions, (logits, offsets)."""

    def __init__(self, detector: Detector) -> None:
        self.heads = getattr(detector.heads, "roi_heads", None)
        self.regions: list[Tensor] = []
        self.outputs: Any = None

    def __enter__(self) -> _Watched:
        self.handles = []
        if self.heads is not None:
            self.handles = [self.heads.box_roi_pool.register_forward_hook(self._read),
                            self.heads.box_predictor.register_forward_hook(self._said)]  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _read(self, _module: nn.Module, inputs: Any, _output: Any) -> None:
        self.regions = inputs[1]

    def _said(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self.outputs = output


def _frozen(module: Any) -> Any:
    return None if module is None else module.requires_grad_(False).eval()


def _check_teacher(student: Detector, teacher: Detector) -> None:
    for role, kind in (("student", student.kind), ("teacher", teacher.kind)):
        if kind != "faster_rcnn":
            raise DetectionError(f"response distillation compares region heads: it needs faster_rcnn, the {role} is "
                                 f"{kind}.")  # fmt: skip
    for what, mine, its in (("classes", student.settings["classes"], teacher.settings["classes"]),
                            ("px", student.backbone.size, teacher.backbone.size)):  # fmt: skip
        if mine != its:
            raise DetectionError(f"the teacher is of {its} {what}, the student of {mine}; they must be alike.")


def _check_targets(ids: Sequence[str], targets: Sequence[Target], classes: int) -> None:
    """torchvision stops with an assertion, or trains a class that is none."""
    for name, target in zip(ids, targets, strict=True):
        boxes, labels = target["boxes"], target["labels"]
        if not (torch.isfinite(boxes).all() and (boxes[:, 2:] > boxes[:, :2]).all()):
            raise DetectionError(f"{name}: expected finite boxes x1, y1, x2, y2 with an area, got "
                                 f"{first([str(row) for row in boxes.tolist()], 2)}.")  # fmt: skip
        if len(labels) != len(boxes) or (len(labels) and not 1 <= int(labels.min()) <= int(labels.max()) <= classes):
            raise DetectionError(f"{name}: expected a label of 1 to {classes} for each of {len(boxes)} boxes, got "
                                 f"{labels.tolist()[:5]}.")  # fmt: skip


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> list[Found]:
    """What a detector, or a step's, finds: for each image {"boxes" (n, 4), "scores" (n,), "labels" (n,) from 1}, best
    score first, in px of the input. Evaluation mode for the time of the call.

    Args: images: (B, 3, H, W), normalised, on the model's device.
    """
    detector = getattr(model, "detector", model)
    modes = [(module, module.training) for module in detector.modules()]
    detector.eval()
    try:
        return [{key: one[key] for key in ("boxes", "scores", "labels")} for one in detector(images)]
    finally:
        for module, training in modes:
            module.training = training


def to_detections(
    outputs: Sequence[Found], images: Sequence[int], native: Callable[[Tensor, int], Tensor] | None = None
) -> Detections:
    """Found boxes as `Detections`: x, y, w, h in px of the images themselves, classes from 0.

    Args:
        outputs: of `predict`, one an image. images: their numbers in the truth.
        native: (boxes x1, y1, x2, y2 in px of the input, image number) to px of the image, such as
            `TargetSource.native`; without it the input's px are kept. What it leaves without an area is dropped.

    Example:
        >>> found = {"boxes": torch.tensor([[2.0, 4, 6, 10]]), "scores": torch.tensor([0.5]),
        ...          "labels": torch.tensor([1])}
        >>> made = to_detections([found], [7], lambda boxes, number: boxes * 2)
        >>> made.image.tolist(), made.category.tolist(), made.box.tolist()
        ([7], [0], [[4.0, 8.0, 8.0, 12.0]])
    """
    rows: dict[str, list[Any]] = {"image": [], "category": [], "box": [], "score": []}
    for found, number in zip(outputs, images, strict=True):
        boxes = found["boxes"].detach().double().cpu()
        boxes = boxes if native is None else native(boxes, number)
        xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
        kept = (xywh[:, 2:] > 0).all(1)
        rows["image"] += [number] * int(kept.sum())
        rows["category"] += (found["labels"].cpu()[kept] - 1).tolist()
        rows["box"] += xywh[kept].tolist()
        rows["score"] += found["scores"].double().cpu()[kept].tolist()
    return make_detections(**rows)
