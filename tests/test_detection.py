"""Detectors and the step that trains one: terms, what learns, and boxes in the pixels they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special
import timm
import torch
from torch import Tensor, nn

from freqkd_analysis import models
from freqkd_analysis.data import synthetic
from freqkd_train import checkpoint, detection, engine
from freqkd_train.config import Student, Training
from freqkd_train.detection import KINDS, AsIs, DetectionError, DetectionStep, Detector, build, predict, to_detections
from freqkd_train.metrics.boxes import make_truth
from freqkd_train.metrics.coco import average_precision
from freqkd_train.pyramid import Backbone

SIZE = (75, 101)


def detector(kind: str = "faster_rcnn", *, train: str = "full", seed: int = 0, classes: int = 2, **options: Any) -> Any:
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=0, zero_init_last=False).eval()
    backbone = Backbone(network, SIZE, channels=32, train=train, seed=seed)
    return build(kind, backbone, classes, **{"hidden": 32, "regions": 64, "seed": seed, **options})


def plain(train: str = "full", **options: Any) -> Detector:
    """On a small vision transformer with patches of 14."""
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", img_size=(56, 70), patch_size=14, depth=5, embed_dim=48,
                                num_heads=3, num_classes=0).eval()  # fmt: skip
    backbone = Backbone(network, (56, 70), channels=32, train=train, lora=Student(rank=2))
    return build("faster_rcnn", backbone, 2, hidden=32, regions=64, **options)


def batch(size: tuple[int, int] = SIZE, counts: tuple[int, ...] = (2, 1), seed: int = 0) -> dict[str, Any]:
    """Noise with boxes, so many in each image."""
    draw = torch.Generator().manual_seed(seed)
    targets = []
    for count in counts:
        corner = torch.rand(count, 2, generator=draw) * 20 + 2
        boxes = torch.cat([corner, corner + 10 + 20 * torch.rand(count, 2, generator=draw)], dim=1)
        targets.append({"boxes": boxes, "labels": torch.randint(1, 3, (count,), generator=draw)})
    images = torch.randn(len(counts), 3, *size, generator=draw)
    return {"ids": [f"i{n}" for n in range(len(counts))], "images": images, "targets": targets}


def reached(step: nn.Module) -> set[str]:
    return {name for name, p in step.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}


# The step


@pytest.mark.parametrize("kind", KINDS)
def test_terms_sum_to_the_loss_and_reach_all_that_learns(kind: str) -> None:
    step = DetectionStep(detector(kind)).train()
    out = step(batch())
    assert float(out["loss"].detach()) == pytest.approx(sum(float(v.detach()) for v in out["terms"].values()), rel=1e-6)
    assert {
        "faster_rcnn": {"classifier", "box_reg", "objectness", "rpn_box_reg", "consistency"},
        "retinanet": {"classification", "bbox_regression", "consistency"},
        "fcos": {"classification", "bbox_regression", "bbox_ctrness", "consistency"},
    }[kind] == set(out["terms"])
    out["loss"].backward()
    parts = {name.split(".")[1] + "." + name.split(".")[2] for name in reached(step)}
    assert {"backbone.network", "backbone.neck"} <= parts and any(part.startswith("heads") for part in parts)
    assert all(p.grad is not None for p in step.parameters() if p.requires_grad), "a hole under DDP"
    assert step.rates() == {"detector.backbone.network.": 0.1}


def test_a_frozen_backbone_gets_no_gradient_and_no_consistency() -> None:
    step = DetectionStep(detector(train="frozen")).train()
    out = step(batch())
    out["loss"].backward()
    assert "consistency" not in out["terms"] and step.rates() == {}
    assert not any(name.startswith("detector.backbone.network") for name in reached(step))
    assert any(name.startswith("detector.backbone.neck") for name in reached(step))


@pytest.mark.parametrize("kind", KINDS)
def test_loss_falls_on_one_image(kind: str) -> None:
    step = DetectionStep(detector(kind))
    optimiser, losses, one = torch.optim.AdamW(step.parameters(), lr=2e-3), [], batch(counts=(2,))
    for _ in range(12):
        step.train()
        torch.manual_seed(0)
        loss = step(one)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.75 * losses[0], losses


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [(0,), (0, 0), (0, 3)])
def test_images_without_boxes(kind: str, counts: tuple[int, ...]) -> None:
    step = DetectionStep(detector(kind)).train()
    out = step(batch(counts=counts))
    out["loss"].backward()
    assert torch.isfinite(out["loss"])
    assert all(torch.isfinite(p.grad).all() for p in step.parameters() if p.grad is not None)


def test_the_same_seed_gives_the_same_step() -> None:
    values = []
    for seed in (1, 1, 2):
        step = DetectionStep(detector(seed=seed)).train()
        torch.manual_seed(5)
        out = step(batch())
        out["loss"].backward()
        values.append((float(out["loss"].detach()), step.detector.heads.rpn.head.cls_logits.weight.grad.clone()))
    assert values[0][0] == values[1][0] and torch.equal(values[0][1], values[1][1])
    assert values[0][0] != values[2][0]


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_moves_a_loss_a_little_and_boxes_stay_float32(kind: str) -> None:
    step = DetectionStep(detector(kind)).train()
    torch.manual_seed(0)
    exact = step(batch())["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        rough = step(batch())
        found = predict(step, batch()["images"])
    rough["loss"].backward()
    assert {value.dtype for value in rough["terms"].values()} == {torch.float32}
    assert all(one["boxes"].dtype == torch.float32 for one in found)
    assert exact.item() != rough["loss"].item() == pytest.approx(exact.item(), rel=0.1)


def test_the_loop_trains_it_and_keeps_the_copies_out_of_its_files(tmp_path: Path) -> None:
    class Same:
        def __len__(self) -> int:
            return 4

        def batch(self, keys: list[tuple[int, int]]) -> dict[str, Any]:
            made = batch(counts=(1,) * len(keys), seed=keys[0][1])
            return made | {"teacher": made["images"]}

    step = DetectionStep(detector(), teacher=detector(seed=9, train="frozen"))
    held = {k: [p.clone() for p in v.parameters()] for k, v in step.held.items()}
    settings = Training(epochs=1, batch=2, accumulate=2, lr=1e-3, device="cpu")
    outcome = engine.fit(step, Same(), settings, 0, tmp_path, say=lambda text: None, expected=frozenset({"response"}))
    assert outcome.steps == 2
    state = checkpoint.load(checkpoint.folder_of(tmp_path) / "step-00000002.pt")["module"]
    assert all(name.startswith("detector.") for name in state)
    for name, module in step.held.items():
        assert all(torch.equal(a, b) for a, b in zip(held[name], module.parameters(), strict=True)), name
        assert not any(p.requires_grad or p.grad is not None for p in module.parameters())


# Consistency


def test_consistency_is_zero_at_the_start_and_grows_with_training() -> None:
    step = DetectionStep(plain("lora"), consistency=0.1).train()
    one = batch((56, 70))
    assert float(step(one)["terms"]["consistency"].detach()) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for name, p in step.named_parameters():
            if ".lora_B" in name:
                p.normal_()
    changed = step(one)["terms"]["consistency"]
    images = one["images"]
    with torch.no_grad():
        now, then = step.detector.backbone.read(images), step.held["start"].read(images)
    assert len(now) == 5
    wanted = 0.0
    for tap, x in now.items():
        a, b = x.double().numpy(), then[tap].double().numpy()
        cosine = (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))
        wanted += 0.1 * (1 - cosine).mean()
    assert wanted > 1e-3 and float(changed.detach()) == pytest.approx(wanted, rel=1e-4)


def test_consistency_ignores_length_and_gives_the_start_no_gradient() -> None:
    x, y = torch.randn(2, 6, 3, 4, requires_grad=True), torch.randn(2, 6, 3, 4, requires_grad=True)
    assert float(detection.consistency_loss({"a": x}, {"a": 3 * x}).detach()) == pytest.approx(0, abs=1e-6)
    assert float(detection.consistency_loss({"a": x, "b": x}, {"a": -x, "b": -x}).detach()) == pytest.approx(
        4, abs=1e-5
    )
    detection.consistency_loss({"a": x}, {"a": y}).backward()
    assert x.grad is not None and y.grad is None
    tiny = torch.zeros(1, 6, 2, 2, requires_grad=True)
    detection.consistency_loss({"a": tiny}, {"a": torch.zeros(1, 6, 2, 2)}).backward()
    assert torch.isfinite(tiny.grad).all()


def test_the_frozen_copy_moves_along() -> None:
    step = DetectionStep(detector(), teacher=detector(train="frozen")).double().train()
    assert {p.dtype for module in step.held.values() for p in module.parameters()} == {torch.float64}
    assert not any(module.training for held in step.held.values() for module in held.modules())


# Response


def test_response_against_a_sum_by_hand() -> None:
    rng = np.random.default_rng(0)
    s, t = rng.standard_normal((2, 7, 4)) * 3
    a, b = rng.standard_normal((2, 7, 16))
    settings = detection.Response(temperature=3.0, logits=0.7, boxes=0.2, score=0.6)
    as_tensors = [torch.from_numpy(x) for x in (s, a, t, b)]
    got = float(detection.response_loss((as_tensors[0], as_tensors[1]), (as_tensors[2], as_tensors[3]), settings))
    p, q = scipy.special.softmax(t / 3, 1), scipy.special.softmax(s / 3, 1)
    divergence = np.mean([scipy.special.rel_entr(p[i], q[i]).sum() for i in range(7)])
    distances = []
    for i, row in enumerate(scipy.special.softmax(t, 1)):
        if 1 - row[0] >= 0.6:
            best = 1 + int(np.argmax(row[1:]))
            distances.append(np.abs(a[i, 4 * best : 4 * best + 4] - b[i, 4 * best : 4 * best + 4]).mean())
    assert 0 < len(distances) < 7
    assert got == pytest.approx(0.7 * 9 * divergence + 0.2 * np.mean(distances), rel=1e-12)


def test_response_without_regions_or_objects_is_finite() -> None:
    none = (torch.zeros(0, 3), torch.zeros(0, 12))
    assert float(detection.response_loss(none, none, detection.Response())) == 0
    student = (torch.zeros(2, 3, requires_grad=True), torch.ones(2, 12, requires_grad=True))
    background = (torch.tensor([[9.0, 0, 0]] * 2), torch.zeros(2, 12))
    detection.response_loss(student, background, detection.Response()).backward()
    assert student[0].grad.abs().sum() > 0 and student[1].grad.abs().sum() == 0


def test_a_student_equal_to_its_teacher_differs_in_nothing() -> None:
    """Which also says that both read the same regions: other regions would give other outputs."""
    one = batch()
    same = DetectionStep(detector(train="frozen"), teacher=detector(train="frozen"))
    other = DetectionStep(detector(train="frozen"), teacher=detector(train="frozen", seed=4))
    values = [float(step.train()(one | {"teacher": one["images"]})["terms"]["response"].detach())
              for step in (same, other)]  # fmt: skip
    assert values[0] == pytest.approx(0, abs=1e-7) and values[1] > 1e-4
    moved = same(one | {"teacher": one["images"] + 1})["terms"]["response"]
    assert float(moved.detach()) > 1e-5


# Images as they come, boxes as they are


def test_nothing_but_stacking_happens_to_images() -> None:
    images = torch.randn(2, 3, 75, 101) * 50
    targets = [{"boxes": torch.tensor([[1.0, 2, 30, 40]]), "labels": torch.tensor([1])}] * 2
    for training in (True, False):
        stacked, same = AsIs().train(training)(list(images), targets)
        assert torch.equal(stacked.tensors, images) and stacked.image_sizes == [(75, 101)] * 2
        assert torch.equal(same[0]["boxes"], targets[0]["boxes"])
    for kind in KINDS:
        assert isinstance(detector(kind).heads.transform, AsIs)


class OneCell(nn.Module):
    """The head of FCOS that sees one object: at a place among all cells, with distances to its sides in cell sides."""

    def __init__(self, place: int, channel: int, distances: tuple[float, ...]) -> None:
        super().__init__()
        self.place, self.channel, self.distances = place, channel, distances

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        cells = sum(x.shape[2] * x.shape[3] for x in maps)
        logits, boxes = torch.full((1, cells, 2), -30.0), torch.ones(1, cells, 4)
        logits[0, self.place, self.channel], boxes[0, self.place] = 4.0, torch.tensor(self.distances)
        return {"cls_logits": logits, "bbox_regression": boxes, "bbox_ctrness": torch.full((1, cells, 1), 30.0)}


def test_a_planted_object_comes_out_in_native_pixels() -> None:
    """Row 3, column 5 of the second map: stride 8, behind the 24 x 32 cells of the first."""
    made = detector("fcos", train="frozen").eval()
    made.heads.head = OneCell(24 * 32 + 3 * 16 + 5, 1, (1.0, 0.5, 2.0, 1.5))
    found = predict(made, torch.zeros(1, 3, *SIZE))
    x, y = 5.5 * 8, 3.5 * 8
    wanted = np.array([x - 8, y - 4, x + 16, y + 12])
    np.testing.assert_allclose(found[0]["boxes"].numpy(), [wanted], atol=1e-4)
    assert found[0]["labels"].tolist() == [2]
    assert found[0]["scores"].tolist() == pytest.approx([float(np.sqrt(scipy.special.expit(4.0)))], abs=1e-5)
    native = lambda boxes, number: boxes * torch.tensor([640 / 101, 480 / 75] * 2)
    got = to_detections(found, [11], native)
    np.testing.assert_allclose(got.box, [[36 * 640 / 101, 24 * 6.4, 24 * 640 / 101, 16 * 6.4]], rtol=1e-5)
    assert got.image.tolist() == [11] and got.category.tolist() == [1]


def test_found_boxes_without_area_are_dropped() -> None:
    found = {"boxes": torch.tensor([[0.0, 0, 5, 5], [90, 10, 99, 20]]), "scores": torch.tensor([0.25, 0.9]),
             "labels": torch.tensor([1, 2])}  # fmt: skip
    empty = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.long)}
    got = to_detections([empty, found], [0, 1], lambda boxes, number: boxes.clamp(max=80))
    assert got.image.tolist() == [1] and got.score.tolist() == [0.25] and got.box.tolist() == [[0, 0, 5, 5]]
    assert to_detections([empty], [0]).box.shape == (0, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_predict_gives_known_labels_and_leaves_the_modes(kind: str) -> None:
    step = DetectionStep(detector(kind, score=0.0, detections=7)).train()
    modes = [module.training for module in step.modules()]
    images = batch()["images"]
    found = predict(step, images)
    assert [module.training for module in step.modules()] == modes
    for one in found:
        assert 0 < len(one["boxes"]) <= 7 and set(one["labels"].tolist()) <= {1, 2}
        assert (one["boxes"] >= 0).all() and (one["boxes"] <= torch.tensor([101.0, 75, 101, 75])).all()
        assert not one["boxes"].requires_grad and one["scores"].diff().le(0).all()
    alone = [predict(step, image[None])[0]["boxes"] for image in images]
    for a, b in zip(found, alone, strict=True):
        torch.testing.assert_close(a["boxes"], b, atol=1e-3, rtol=1e-4)


def test_losses_can_be_had_in_evaluation_mode_for_held_out_images() -> None:
    step = DetectionStep(detector()).eval()
    with torch.no_grad():
        assert torch.isfinite(step(batch())["loss"])
    assert not any(module.training for module in step.modules())


# Wrong use


def test_wrong_use_is_told_in_a_line() -> None:
    def trained(**change: Any) -> Any:
        one = batch(counts=(2, 1))
        one["targets"][1] = one["targets"][1] | {k: torch.tensor(v) for k, v in change.items()}
        return DetectionStep(detector(train="frozen"))(one)

    wrong: list[tuple[Any, str]] = [
        (lambda: detector("fastercnn"), 'no detector "fastercnn". Did you mean "faster_rcnn"?'),
        (lambda: detector(classes=0), "classes, hidden, regions and detections of at least 1"),
        (lambda: detector(score=1.0), "0 <= score < 1"),
        (lambda: trained(boxes=[[5.0, 5, 5, 9]]), r"i1: expected finite boxes .* got \[5.0, 5.0, 5.0, 9.0\]"),
        (lambda: trained(boxes=[[5.0, 5, float("nan"), 9]]), "i1: expected finite boxes"),
        (lambda: trained(labels=[3]), r"i1: expected a label of 1 to 2 for each of 1 boxes, got \[3\]"),
        (lambda: trained(labels=[0]), "i1: expected a label of 1 to 2"),
        (lambda: trained(labels=[1, 1]), "i1: expected a label of 1 to 2"),
        (lambda: DetectionStep(detector("fcos"), teacher=detector()), "the student is fcos"),
        (lambda: DetectionStep(detector(), teacher=detector("retinanet")), "the teacher is retinanet"),
        (lambda: DetectionStep(detector(), teacher=detector(classes=3)), "the teacher is of 3 classes"),
        (lambda: DetectionStep(detector(), teacher=plain()), r"the teacher is of \(56, 70\) px"),
    ]
    for call, text in wrong:
        with pytest.raises(DetectionError, match=text.replace("?", r"\?")) as told:
            call()
        assert "\n" not in str(told.value)


# It learns


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_overfits_eight_images_to_ap50_above_090() -> None:
    """Trained against untrained, on infrared scenes of 160 x 128 px with cars, persons and cyclists."""
    images, targets, truth = scenes(8)
    network = models.create("freqkd_demo", "auto", (128, 160)).model
    backbone = Backbone(network, (128, 160), channels=64, train="full", rate=1.0)
    step = DetectionStep(build("faster_rcnn", backbone, 3, hidden=256, regions=256), consistency=0.0)
    ap50 = lambda: average_precision(truth, to_detections(predict(step, images), range(8)))["ap50"]
    before, steps = ap50(), 240
    optimiser = torch.optim.AdamW(step.parameters(), lr=1e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps, pct_start=0.1)
    for i in range(steps):
        step.train()
        half = range(4 * (i % 2), 4 * (i % 2) + 4)
        one = {"ids": [str(n) for n in half], "images": images[list(half)], "targets": [targets[n] for n in half]}
        optimiser.zero_grad()
        step(one)["loss"].backward()
        nn.utils.clip_grad_norm_(step.parameters(), 5.0)
        optimiser.step()
        rate.step()
    assert before < 0.05
    assert ap50() > 0.9


def scenes(count: int) -> tuple[Tensor, list[dict[str, Tensor]], Any]:
    """Infrared images with their boxes of 6 px and more, as a batch and as a truth."""
    images, targets, number, category, xywh = [], [], [], [], []
    for record in synthetic.records("pairs=40,groups=40,size=160x128"):
        sample = synthetic.render(record)
        names = [["car", "person", "cyclist"].index(label) for label in sample.meta["labels"]]
        boxes = torch.as_tensor(np.asarray(sample.meta["boxes_ir"])).reshape(-1, 4)
        corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        corners = torch.minimum(corners.clamp_min(0), torch.tensor([160.0, 128, 160, 128]))
        kept = (corners[:, 2:] - corners[:, :2] >= 6).all(1)
        if not kept.any() or len(images) == count:
            continue
        found, labels = corners[kept], torch.tensor(names)[kept]
        number += [len(images)] * len(found)
        category += labels.tolist()
        xywh += torch.cat([found[:, :2], found[:, 2:] - found[:, :2]], 1).tolist()
        images.append((torch.from_numpy(sample.ir).float() - 0.45) / 0.22)
        targets.append({"boxes": found, "labels": labels + 1})
    truth = make_truth([str(n) for n in range(count)], classes=["car", "person", "cyclist"], image=number,
                       category=category, box=xywh)  # fmt: skip
    return torch.stack(images)[:, None].expand(-1, 3, -1, -1), targets, truth
