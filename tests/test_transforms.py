"""Both images, boxes and masks move as one: coordinates are painted into each and read back from the view."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors

from freqkd_analysis.conditions import Geometry
from freqkd_analysis.errors import DataError
from freqkd_train import config, transforms
from freqkd_train.transforms import Joint, View

SIZES = [((64, 80), (64, 80)), ((64, 80), (32, 40)), ((61, 73), (47, 59)), ((90, 50), (45, 25)), ((37, 131), (37, 131))]


def painted(height: int, width: int) -> Tensor:
    """(3, H, W): relative x, relative y at pixel centres, and nothing."""
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return torch.stack([x, y, torch.zeros_like(x)])


def fitted(view: Tensor) -> np.ndarray:
    """What the painted pixels say: (2, 2) offset and slope per view px of relative x and y, away from the border."""
    inner = view[:2].double().numpy()[:, 2:-2, 2:-2]
    height, width = inner.shape[1:]
    lines = []
    for values in (inner[0].mean(0), inner[1].mean(1)):
        slope, offset = np.polyfit(np.arange(len(values)) + 2.5, values, 1)
        lines.append((offset, slope))
    assert height > 4 and width > 4
    return np.array(lines)


def seen_boxes(boxes: np.ndarray, size: tuple[int, int], lines: np.ndarray, canvas: tuple[int, int]) -> np.ndarray:
    """Boxes in image px where the painted coordinates say they lie in the view, corners in order, clamped."""
    out = np.empty_like(boxes)
    for axis, length in ((0, 1), (1, 0)):
        offset, slope = lines[axis]
        ends = (boxes[:, axis::2] / size[length] - offset) / slope
        out[:, axis::2] = np.sort(ends, axis=1).clip(0, canvas[length])
    return out


def areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


@pytest.mark.parametrize("kind, scale", [("crop", (0.3, 1.0)), ("crop", (1.0, 1.0)), ("pad", (1.0, 1.0))])
def test_a_thousand_views_hold_together(kind: str, scale: tuple[float, float], rng: np.random.Generator) -> None:
    data = config.Data(geometry=kind, scale=scale, flip=0.5)
    geometry = Geometry.make(kind, (32, 40), 8)
    kept = mirrored = 0
    for i in range(1000 if scale != (1.0, 1.0) else 250):
        size, other = SIZES[i % len(SIZES)]
        corner = rng.uniform(0, 0.8, (3, 2)) * size[::-1]
        boxes = np.concatenate([corner, corner + rng.uniform(0.05, 0.2, (3, 2)) * size[::-1]], axis=1)
        mask = torch.zeros(1, *size, dtype=torch.uint8)
        x0, y0, x1, y1 = inked = np.rint(boxes[0]).astype(int)
        mask[0, y0:y1, x0:x1] = 7
        sample = transforms.joint(painted(*size), painted(*other), torch.from_numpy(boxes), torch.arange(3), mask)
        view = transforms.draw(data, np.random.default_rng([5, i]))
        seen = transforms.apply(view, geometry, sample)
        canvas = tuple(seen.rgb.shape[1:])
        lines, infrared = fitted(seen.rgb), fitted(seen.ir)
        assert (lines[0, 1] < 0) == view.flipped
        mirrored += view.flipped
        # Infrared against visible, in px of the view, at every place but the outermost ring.
        apart = (seen.rgb[:2] - seen.ir[:2]).abs().double().numpy()[:, 1:-1, 1:-1].max((1, 2)) / abs(lines[:, 1])
        assert apart.max() < 0.5, (i, apart)
        assert np.abs(lines[:, 0] - infrared[:, 0]).max() < 0.5 * np.abs(lines[:, 1]).max()
        wanted = seen_boxes(boxes, size, lines, canvas)
        for box, label in zip(seen.boxes.numpy(), seen.labels.tolist(), strict=True):
            assert np.abs(box - wanted[label]).max() < 0.5, (i, box, wanted[label])
        kept += len(seen.labels)
        # Masks: exact but for a half px round the edge.
        edges = seen_boxes(inked[None].astype(float), size, lines, canvas)[0]
        x, y = np.arange(canvas[1]) + 0.5, np.arange(canvas[0])[:, None] + 0.5
        inside = (x > edges[0]) & (x < edges[2]) & (y > edges[1]) & (y < edges[3])
        near = np.minimum.reduce(np.broadcast_arrays(*(abs(p - e) for p, e in zip((x, y, x, y), edges, strict=True))))
        sure = near > 0.51
        assert ((seen.masks[0].numpy() == 7) == inside)[sure].all(), i
        assert set(np.unique(seen.masks.numpy())) <= {0, 7}
    assert kept > 200 and mirrored > 80


@pytest.mark.parametrize("size", [(48, 64), (77, 51), (33, 190), (224, 224)])
@pytest.mark.parametrize("kind", ["crop", "pad"])
def test_the_plain_view_is_the_analysis(kind: str, size: tuple[int, int], rng: np.random.Generator) -> None:
    rgb = rng.random((*size, 3), dtype=np.float32)
    ir = rng.random(size, dtype=np.float32)
    geometry = Geometry.make(kind, (48, 64), 16)
    sample = transforms.joint(torch.from_numpy(rgb).permute(2, 0, 1), torch.from_numpy(ir)[None])
    view = transforms.draw(config.Data(flip=0.0), rng)
    seen = transforms.apply(view, geometry, sample)
    assert view == View()
    assert torch.equal(seen.rgb.as_subclass(Tensor), geometry.view(geometry.frame(rgb)))
    assert torch.equal(seen.ir.as_subclass(Tensor), geometry.view(geometry.frame(ir))[:1])
    mirror = transforms.apply(View(flipped=True), geometry, sample)
    assert torch.equal(mirror.rgb.as_subclass(Tensor), geometry.view(geometry.frame(rgb)).flip(2))


@pytest.mark.parametrize("share", [1.0, 0.5, 0.2])
def test_a_share_is_of_the_plain_view(share: float) -> None:
    sample = transforms.joint(painted(150, 170), painted(150, 170))
    geometry = Geometry.make("crop", (64, 80), 16)
    plain = fitted(transforms.apply(View(), geometry, sample).rgb)[:, 1]
    part = transforms.apply(View(zoom=share**-0.5, at=(0.5, 0.5)), geometry, sample)
    assert np.prod(fitted(part.rgb)[:, 1]) == pytest.approx(share * np.prod(plain), rel=0.02)


def test_views_are_drawn_from_the_generator_alone() -> None:
    data = config.Data(scale=(0.25, 0.75), flip=0.3)
    views = [transforms.draw(data, np.random.default_rng([1, i])) for i in range(2000)]
    torch.manual_seed(9)
    np.random.seed(9)  # noqa: NPY002 (shows that it is not used)
    assert views == [transforms.draw(data, np.random.default_rng([1, i])) for i in range(2000)]
    shares = np.array([view.zoom**-2 for view in views])
    assert 0.25 <= shares.min() < 0.26 and 0.74 < shares.max() <= 0.75
    assert shares.mean() == pytest.approx(0.5, abs=0.01)
    assert np.mean([view.flipped for view in views]) == pytest.approx(0.3, abs=0.03)
    places = np.array([view.at for view in views])
    assert places.min() >= 0 and places.max() <= 1 and places.mean(0) == pytest.approx(0.5, abs=0.03)
    still = transforms.draw(config.Data(flip=0.3), np.random.default_rng([1, 7]))
    assert still.flipped == views[7].flipped, "the mirror must not depend on the crop's settings"


def test_boxes_are_clamped_and_slivers_dropped_with_their_labels() -> None:
    """Image 64x64 px, frame the same, view its middle 48x48: image px 8..56."""
    geometry = Geometry.make("crop", (48, 48), 16)
    boxes = torch.tensor([
        [20, 30, 40, 50],  # whole
        [0, 20, 30, 40],  # 22 of 30 columns left
        [0, 20, 10, 40],  # 2 of 10 columns left: 20 %
        [0, 20, 8.5, 40],  # half a column of 8.5: 6 %
        [60, 60, 64, 64],  # outside
        [30, 30, 30.8, 31],  # 0.8 px
    ])  # fmt: skip
    sample = transforms.joint(torch.rand(3, 64, 64), torch.rand(1, 64, 64), boxes, torch.tensor([3, 1, 4, 1, 5, 9]))
    seen = transforms.apply(View(), geometry, sample)
    assert seen.boxes.tolist() == [[12, 22, 32, 42], [0, 12, 22, 32], [0, 12, 2, 32]]
    assert seen.labels.tolist() == [3, 1, 4] and seen.boxes.canvas_size == (48, 48)
    mirror = transforms.apply(View(flipped=True), geometry, sample)
    assert mirror.boxes.tolist() == [[16, 22, 36, 42], [26, 12, 48, 32], [46, 12, 48, 32]]
    assert sample.boxes.tolist() == boxes.tolist(), "the sample itself must stay as it was"
    none = transforms.apply(View(), geometry, transforms.joint(sample.rgb, sample.ir, torch.zeros(0, 4)))
    assert tuple(none.boxes.shape) == (0, 4)


def test_a_plain_tensor_cannot_slip_in() -> None:
    rgb, ir = torch.rand(3, 8, 9), torch.rand(1, 8, 9)
    made = transforms.joint(rgb, ir, torch.zeros(1, 4), torch.zeros(1), torch.zeros(2, 8, 9))
    kinds = [type(part) for part in (made.rgb, made.ir, made.boxes, made.masks)]
    assert kinds == [tv_tensors.Image, tv_tensors.Image, tv_tensors.BoundingBoxes, tv_tensors.Mask]
    for wrong, says in [
        ((ir, ir), "rgb"),
        ((rgb, rgb[0]), "ir"),
        ((rgb, ir, torch.zeros(4)), "boxes"),
        ((rgb, ir, torch.zeros(2, 4), torch.zeros(1)), "a label for each box"),
        ((rgb, ir, None, None, torch.zeros(1, 4, 4)), "masks \\(K, 8, 9\\)"),
    ]:
        with pytest.raises(DataError, match=f"expected {says}"):
            transforms.joint(*wrong)


def test_photometry(rng: np.random.Generator) -> None:
    image = torch.from_numpy(rng.uniform(0.3, 0.6, (3, 20, 30)).astype(np.float32))

    def changed(image: Tensor = image, seed: int = 0, **settings: float) -> Tensor:
        return transforms.photometric(image, config.Photometry(**settings), np.random.default_rng(seed))

    everything = {"brightness": 0.5, "contrast": 0.9, "noise": 0.3}
    assert torch.equal(changed(**everything), changed(**everything))
    assert not torch.equal(changed(**everything), changed(**everything, seed=1))
    assert changed(**everything).min() >= 0 and changed(**everything).max() <= 1
    shifts = [changed(brightness=0.2, seed=s) - image for s in range(200)]
    assert max(float(shift.std()) for shift in shifts) < 1e-6
    amounts = np.array([float(shift.mean()) for shift in shifts])
    assert np.abs(amounts).max() <= 0.2 + 1e-6 and np.ptp(amounts) > 0.35
    stretched = [changed(contrast=0.5, seed=s) for s in range(200)]
    factors = np.array([float(one.std() / image.std()) for one in stretched])
    assert 0.5 - 1e-4 <= factors.min() < 0.55 and 1.45 < factors.max() <= 1.5 + 1e-4
    assert max(abs(float(one.mean() - image.mean())) for one in stretched) < 1e-5
    assert float((changed(noise=0.05) - image).std()) == pytest.approx(0.05, rel=0.05)
    assert changed(**everything).dtype == torch.float32
    before = image.clone()
    changed(**everything)
    assert torch.equal(image, before)


def test_a_joint_keeps_what_it_lacks() -> None:
    sample = transforms.joint(torch.rand(3, 40, 40), torch.rand(3, 40, 40))
    seen = transforms.apply(View(True, 1.5, (0.0, 1.0)), Geometry.make("crop", (16, 16), 16), sample)
    assert (seen.boxes, seen.labels, seen.masks) == (None, None, None)
    assert isinstance(seen, Joint) and tuple(seen.ir.shape) == (3, 16, 16)


def test_a_mask_is_sampled_at_the_centre_of_each_pixel() -> None:
    """Scaled to a third, view px i shows the middle one of image columns 3 i .. 3 i + 2."""
    columns = torch.arange(144, dtype=torch.uint8).expand(1, 144, 144)
    sample = transforms.joint(torch.rand(3, 144, 144), torch.rand(1, 144, 144), masks=columns)
    seen = transforms.apply(View(), Geometry.make("crop", (32, 32), 16), sample)
    assert seen.masks[0, 0].tolist() == [3 * (8 + i) + 1 for i in range(32)]
    assert seen.masks.dtype == torch.uint8
