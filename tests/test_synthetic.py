"""Synthetic pairs: plans, pictures, written layouts, and fields whose divergence NumPy's own transform confirms."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from freqkd_analysis.data import layouts, sensors, synthetic, writers
from freqkd_analysis.data.painter import CLASSES
from freqkd_analysis.errors import DataError

PERSON, CAR, SKY = CLASSES.index("person"), CLASSES.index("car"), CLASSES.index("sky")


@pytest.fixture(scope="module")
def street() -> list:
    """Twelve pairs of six sequences, half of them at night."""
    return [synthetic.render(r) for r in synthetic.records("pairs=12,groups=6,night=0.5")]


# --- plans ---


def test_defaults_are_500_pairs_in_50_sequences_two_fifths_at_night() -> None:
    plan = synthetic.records()
    assert len(plan) == 500
    assert len({r.group for r in plan}) == 50
    assert len({r.id for r in plan}) == 500
    assert sum(r.time == "night" for r in plan) == 200
    assert plan == synthetic.records("seed=0,pairs=500")


def test_sequences_differ_in_length_by_at_most_one_and_keep_their_light() -> None:
    plan = synthetic.records("pairs=23,groups=7,night=0.3")
    lengths = [sum(r.group == g for r in plan) for g in {r.group for r in plan}]
    assert sorted(lengths) == [3, 3, 3, 3, 3, 4, 4]
    assert all(len({r.time for r in plan if r.group == g}) == 1 for g in {r.group for r in plan})


@pytest.mark.parametrize(
    "options, message",
    [
        ("pair=3", 'Unknown synthetic option "pair=3". Did you mean "pairs"?'),
        ("night", 'Unknown synthetic option "night"'),
        ("size=320", "Cannot read the synthetic options"),
        ("shift=2", "Cannot read the synthetic options"),
        ("pairs=3,groups=4", "groups=4 is out of range"),
        ("night=1.5", "night=1.5 is out of range"),
        ("size=16x16", "size=16x16 is out of range"),
        ("shift=99:0", "shift=99:0 is out of range"),
    ],
)
def test_wrong_options_are_told_in_one_line(options: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        synthetic.records(options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_record_from_elsewhere_is_refused() -> None:
    record = writers.PairRecord("a", "a", Path("a.png"), Path("b.png"))
    with pytest.raises(DataError, match="not a synthetic one"):
        synthetic.render(record)


# --- pictures ---


def test_a_record_always_gives_the_same_bytes_whatever_was_rendered_before() -> None:
    plan = synthetic.records("pairs=4,groups=2,size=96x80,night=0.5")
    forward = [synthetic.render(r) for r in plan]
    backward = [synthetic.render(r) for r in reversed(plan)][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert a.rgb.tobytes() == b.rgb.tobytes()
        assert a.ir.tobytes() == b.ir.tobytes()
    assert len({s.rgb.tobytes() for s in forward}) == 4
    other = synthetic.render(synthetic.records("pairs=4,groups=2,size=96x80,night=0.5,seed=1")[0])
    assert other.rgb.tobytes() != forward[0].rgb.tobytes()


def test_images_have_their_stated_shape_type_and_256_levels(street: list) -> None:
    for s in street:
        assert s.rgb.shape == (256, 320, 3)
        assert s.ir.shape == s.meta["mask"].shape == (256, 320)
        for image in (s.rgb, s.ir):
            assert image.dtype == np.float32
            assert 0 <= image.min() <= image.max() <= 1
            np.testing.assert_allclose(image * 255, np.round(image * 255), atol=1e-4)
        assert 0.1 < s.ir.mean() < 0.9
        assert s.ir.std() > 0.05
        assert 0.05 < s.rgb.mean() < 0.8


def test_boxes_lie_in_the_frame_and_on_their_class(street: list) -> None:
    labels = [label for s in street for label in s.meta["labels"]]
    assert {"person", "car", "cyclist"} == set(labels)
    checked = 0
    for s in street:
        m = s.meta
        assert len(m["labels"]) == len(m["boxes"]) == len(m["visible_boxes"]) == len(m["occlusion"])
        for label, box, part, occlusion in zip(
            m["labels"], m["boxes"], m["visible_boxes"], m["occlusion"], strict=True
        ):
            x, y, w, h = box
            assert -1e-4 <= x <= x + w <= 320 + 1e-3
            assert -1e-4 <= y <= y + h <= 256 + 1e-3
            assert occlusion in (0, 1, 2)
            assert x <= part[0] + 1e-3
            assert part[0] + part[2] <= x + w + 1e-3
            if occlusion == 0 and w * h > 100:
                inside = m["mask"][int(y) : int(y + h) + 1, int(x) : int(x + w) + 1]
                assert (inside == CLASSES.index(label)).mean() > 0.25
                checked += 1
    assert checked > 20


def test_people_are_warm_at_night_and_the_sky_is_cold(street: list) -> None:
    people = []
    for s in street:
        mask = s.meta["mask"]
        if (mask == SKY).mean() > 0.05:
            assert s.ir[mask == SKY].mean() < s.ir[mask != SKY].mean() - 0.1
        if s.meta["time"] == "night" and (mask == PERSON).sum() > 60:
            people.append(s.ir[mask == PERSON].mean() - np.median(s.ir[(mask != PERSON) & (mask != SKY)]))
    assert len(people) >= 3
    assert min(people) > 0.05


def test_both_images_share_their_geometry(street: list) -> None:
    """Edges of a pair agree more than edges of images of two scenes."""

    def edges(image: np.ndarray) -> np.ndarray:
        rows, cols = np.gradient(image)
        out = np.hypot(rows, cols)
        return (out - out.mean()) / out.std()

    grey = [edges(s.rgb.mean(2)) for s in street[::2]]
    warm = [edges(s.ir) for s in street[::2]]
    own = [float((a * b).mean()) for a, b in zip(grey, warm, strict=True)]
    other = [float((a * b).mean()) for a, b in zip(grey, warm[1:] + warm[:1], strict=True)]
    assert np.mean(own) > np.mean(other) + 0.15


def amplitude_slope(image: np.ndarray) -> float:
    """Slope of log amplitude over log frequency, 4 to 80 cycles per picture width, Hann window."""
    h, w = image.shape
    window = np.hanning(h)[:, None] * np.hanning(w)
    power = np.abs(np.fft.fft2((image - image.mean()) * window)) ** 2
    radius = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.fftfreq(w)[None])
    edges = np.geomspace(4 / 320, 80 / 320, 9)
    mean = [power[(radius >= a) & (radius < b)].mean() for a, b in pairwise(edges)]
    return float(np.polyfit(np.log(np.sqrt(edges[:-1] * edges[1:])), 0.5 * np.log(mean), 1)[0])


def test_spectra_fall_as_in_nature_and_the_infrared_is_smoother(street: list) -> None:
    visible = [amplitude_slope(s.rgb.mean(2)) for s in street]
    thermal = [amplitude_slope(s.ir) for s in street]
    assert -1.6 < np.mean(visible) < -0.8
    assert np.mean(thermal) < np.mean(visible) - 0.1


def test_a_misregistration_moves_the_infrared_content_alone() -> None:
    """The displaced frame is found by brute force where it was asked to be: right and down."""
    still = synthetic.scene(3, 1, 0)
    moved = synthetic.scene(3, 1, 0, shift=(3.0, -2.0))
    assert (still.rgb != moved.rgb).mean() < 1e-3
    np.testing.assert_array_equal(still.meta["boxes"], moved.meta["boxes"])
    np.testing.assert_allclose(moved.meta["boxes_ir"][:, :2], still.meta["boxes"][:, :2] + [3, -2], atol=1e-5)
    core = moved.ir[20:-20, 20:-20]
    cost = {
        (dx, dy): np.abs(core - still.ir[20 - dy : 256 - 20 - dy, 20 - dx : 320 - 20 - dx]).mean()
        for dx in range(-5, 6)
        for dy in range(-5, 6)
    }
    assert min(cost, key=cost.get) == (3, -2)


@pytest.mark.parametrize("shift", [(0.5, 0.0), (-1.25, 2.75), (2.0, -3.0)])
def test_displacement_is_right_below_a_pixel(shift: tuple[float, float]) -> None:
    rows, cols = np.mgrid[0:60, 0:70].astype(np.float32)
    wave = lambda r, c: np.sin(0.21 * c + 0.1) + np.cos(0.17 * r)
    inner = (slice(8, 52), slice(8, 62))
    got = sensors.displaced(wave(rows, cols), shift, inner)
    np.testing.assert_allclose(got, wave(rows - shift[1], cols - shift[0])[inner], atol=2e-3)


def test_things_move_through_a_sequence_and_the_street_stays_itself() -> None:
    frames = [synthetic.scene(0, 2, k) for k in range(3)]
    assert np.mean(frames[0].meta["mask"] == frames[1].meta["mask"]) > 0.7
    assert not np.array_equal(frames[0].meta["mask"], frames[1].meta["mask"])
    assert synthetic.scene(0, 2, 3000).rgb.std() > 0.05  # the road never runs out


@pytest.mark.slow
def test_thirty_pairs_a_second_on_one_core() -> None:
    plan = synthetic.records("pairs=120,groups=12")
    synthetic.render(plan[0])
    seconds = []
    for start in range(0, 120, 30):
        begin = time.process_time()
        for record in plan[start : start + 30]:
            synthetic.render(record)
        seconds.append(time.process_time() - begin)
    assert 30 / min(seconds) >= 30


# --- layouts ---


@pytest.mark.parametrize(
    "layout, size", [("kaist", (512, 640)), ("flir", (512, 640)), ("mfnet", (480, 640)), ("folder", (256, 320))]
)
def test_a_written_set_is_read_whole_by_the_real_reader(tmp_path: Path, layout: str, size: tuple[int, int]) -> None:
    told: list[tuple[int, int]] = []
    spec = synthetic.write(tmp_path / "set", layout, "pairs=8,groups=4,night=0.5", lambda *step: told.append(step))
    found = layouts.load(spec)
    assert told == [(k, 8) for k in range(1, 9)]
    assert len(found) == 8
    pairs = [layouts.decode(r) for r in found]
    assert all(p.ir.shape == size and p.rgb.shape == (*size, 3) for p in pairs)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
    source = [synthetic.render(r) for r in synthetic.records(f"pairs=8,groups=4,night=0.5,size={size[1]}x{size[0]}")]
    for p in pairs:  # each read pair is one of the rendered ones, but for JPEG
        off = [max(np.abs(p.rgb - s.rgb).mean(), np.abs(p.ir - s.ir).mean()) for s in source]
        assert min(off) < (0.02 if layout in ("kaist", "flir") else 1e-6)
    if layout in ("kaist", "flir", "mfnet"):
        assert len({r.group for r in found}) == 4
    if layout in ("kaist", "mfnet"):
        assert sum(r.time == "night" for r in found) == 4


def test_kaist_lists_and_boxes_follow_the_published_form(tmp_path: Path) -> None:
    synthetic.write(tmp_path / "k", "kaist", "pairs=8,groups=4,night=0.5")
    listed = [line for p in (tmp_path / "k/imageSets").iterdir() for line in p.read_text().split()]
    assert len(listed) == 8
    assert len(layouts.load(f"kaist:{tmp_path / 'k'}:train-all-20")) == 4
    first = synthetic.render(synthetic.records("pairs=8,groups=4,night=0.5,size=640x512")[0]).meta
    wanted = [b for label, b in zip(first["labels"], first["boxes"], strict=True) if label != "car"]
    rows = [(tmp_path / "k/annotations" / f"{name}.txt").read_text().splitlines()[1:] for name in listed]
    corners = [[tuple(map(int, row.split()[1:3])) for row in part] for part in rows]
    assert [(round(float(x)) + 1, round(float(y)) + 1) for x, y, _, _ in wanted] in corners  # 1-based
    objects = 0
    for name in listed:
        assert int(name[-5:]) % 20 == 19
        head, *rows = (tmp_path / "k/annotations" / f"{name}.txt").read_text().splitlines()
        assert head == "% bbGt version=3"
        for row in rows:
            label, *numbers = row.split()
            x, y, w, h, occ, *visible, ignore, angle = map(int, numbers)
            assert len(numbers) == 11
            assert label in ("person", "cyclist")
            assert min(x, y) >= 1
            assert x + w - 1 <= 640 and y + h - 1 <= 512
            assert (occ == 0) == (visible == [0, 0, 0, 0])
            assert ignore == angle == 0
            objects += 1
    assert objects > 5


def test_flir_boxes_are_on_the_displaced_thermal_image(tmp_path: Path) -> None:
    synthetic.write(tmp_path / "f", "flir", "pairs=4,groups=2,shift=6:0,size=320x256")
    base = tmp_path / "f/align"
    stems = [s for n in ("align_train", "align_validation") for s in (base / f"{n}.txt").read_text().split()]
    assert len(stems) == 4
    plain = synthetic.render(synthetic.records("pairs=4,groups=2,size=320x256")[0]).meta
    cars = [b for label, b in zip(plain["labels"], plain["boxes"], strict=True) if label == "car"]
    root = ElementTree.parse(base / "Annotations" / f"{sorted(stems)[0]}.xml").getroot()
    found = [
        [int(o.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax")]
        for o in root.iter("object")
        if o.findtext("name") == "car"
    ]
    assert cars
    for x, y, w, h in cars:
        wanted = np.clip([x + 6, y, x + w + 6, y + h], 0, [319, 255, 319, 255])
        if wanted[2] - wanted[0] > 1:
            assert min(np.abs(np.array(f) - wanted).max() for f in found) <= 1


def test_mfnet_labels_and_lists_fit_the_images(tmp_path: Path) -> None:
    from PIL import Image

    synthetic.write(tmp_path / "m", "mfnet", "pairs=8,groups=8,night=0.5,size=320x240")
    lists = {p.stem: p.read_text().split() for p in (tmp_path / "m").glob("*.txt")}
    assert sorted(lists) == ["test", "test_day", "test_night", "train", "val"]
    assert len({*lists["train"], *lists["val"], *lists["test"]}) == 8
    assert lists["test"] and sorted(lists["test"]) == sorted(lists["test_day"] + lists["test_night"])
    ids: set[int] = set()
    for name in lists["train"]:
        four = np.asarray(Image.open(tmp_path / f"m/images/{name}.png"))
        labels = np.asarray(Image.open(tmp_path / f"m/labels/{name}.png"))
        assert four.shape == (240, 320, 4)
        assert labels.shape == (240, 320)
        ids |= set(np.unique(labels).tolist())
    assert {0, 1, 2} <= ids <= {0, 1, 2, 3}


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match=r"exists and is not empty; nothing was written\. Name a new folder"):
        synthetic.write(tmp_path, "folder", "pairs=1,groups=1")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(DataError, match=r'No layout "kasit" to write\. Did you mean "kaist"\?'):
        synthetic.write(tmp_path / "new", "kasit")


def test_the_folder_one_stands_in_is_filled_when_it_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`.` was rendered into a folder beside it to the last pair, then refused; of a full one nothing is rendered."""
    monkeypatch.chdir(tmp_path)
    synthetic.write(Path(), "folder", "pairs=2,groups=1,size=64x48")
    assert len(list(Path.cwd().glob("visible/*.png"))) == 2
    drawn: list[int] = []
    with pytest.raises(DataError, match="exists and is not empty"):
        synthetic.write(Path(), "folder", "pairs=2,groups=1,size=64x48", lambda done, total: drawn.append(done))
    assert drawn == []


def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthetic.write(tmp_path / "set", "folder", "pairs=3,groups=1,size=64x48", stop)
    assert list(tmp_path.iterdir()) == []


# --- known answers: NumPy's complex transform and float edges are the other road ---


def band_sums(x: np.ndarray, y: np.ndarray, edges: list[float]) -> list[tuple[float, float, float, float, int]]:
    """Per band pa, pb, re, pd, modes of (..., H, W) arrays, orthonormal."""
    h, w = x.shape[-2:]
    a, b = (np.fft.fft2(v.astype(np.float64), norm="ortho") for v in (x, y))
    radius = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.fftfreq(w)[None])
    out = []
    for low, high in zip([0.0, *edges], [*edges, 1.0], strict=True):
        m = (radius >= low - 1e-12) & (radius < high - 1e-12)
        p, q = a[..., m], b[..., m]
        sums = ((np.abs(p) ** 2).sum(), (np.abs(q) ** 2).sum(), (p * q.conj()).real.sum(), (np.abs(p - q) ** 2).sum())
        out.append((*map(float, sums), int(m.sum())))
    return out


@pytest.mark.parametrize("grid", [(16, 16), (15, 9), (13, 13), (37, 46)])
def test_known_fields_have_their_coherence(grid: tuple[int, int]) -> None:
    g, n, channels = (0.9, 0.4, -0.3), 24, 48
    x, y = (v.numpy() for v in synthetic.known_fields(grid, g, "octave:3", channels, seed=5, n=n))
    assert x.shape == (n, channels, *grid)
    for g_b, (pa, pb, re, pd, m) in zip(g, band_sums(x, y, [0.125, 0.25]), strict=True):
        draws = m * channels * n
        error = 5 / np.sqrt(draws)  # five standard errors: each estimate's is at most 1 / sqrt(draws)
        assert abs(1 - re / np.sqrt(pa * pb) - (1 - g_b)) < error
        assert abs(pd / (pa + pb) - (1 - g_b)) < error
        assert abs(pd / draws - 2 * (1 - g_b)) < 4 * error
        assert abs(pa / draws - 1) < 2 * error


def test_known_fields_depend_on_the_seed_alone() -> None:
    a, b, c = (synthetic.known_fields((7, 5), (0.5, 0.5), "0.25", 2, seed=s, n=1) for s in (1, 1, 2))
    assert (a[1] == b[1]).all()
    assert not (a[1] == c[1]).all()
    with pytest.raises(DataError, match="Expected 2 coherences"):
        synthetic.known_fields((7, 5), (0.5,), "0.25", 2, seed=0, n=1)
    with pytest.raises(DataError, match=r"in -1\.\.1"):
        synthetic.known_fields((7, 5), (0.5, 1.5), "0.25", 2, seed=0, n=1)


@pytest.mark.parametrize(
    "size, shift, shared, n",
    [
        ((64, 48), (0.0, 0.0), 0.0, 128),
        ((45, 31), (1.5, -0.75), 0.0, 256),
        ((48, 40), (2.5, 1.0), 0.02, 256),
        ((8, 6), (0.5, 0.0), 0.04, 4096),  # so small that the Nyquist column, which half a pixel kills, counts
    ],
)
def test_known_images_give_the_answer_they_carry(
    size: tuple[int, int], shift: tuple[float, float], shared: float, n: int
) -> None:
    pairs = synthetic.known_image_pairs(
        (0.95, 0.6, 0.9), n=n, size=size, shift=shift, shared_map=shared, contrast=0.06, seed=3
    )
    x, y = np.stack([p.rgb[..., 1] for p in pairs]), np.stack([p.ir for p in pairs])
    expected = pairs[0].meta["expected"]
    as_is = [1 - re / np.sqrt(pa * pb) for pa, pb, re, *_ in band_sums(x, y, [0.125, 0.25])]
    centred = band_sums(x - x.mean(0), y - y.mean(0), [0.125, 0.25])
    clean = [1 - re / np.sqrt(pa * pb) for pa, pb, re, *_ in centred]
    error = 5 / np.sqrt([n * m for *_, m in centred])
    assert (np.abs(np.array(as_is) - expected["cosine"]) < error).all()
    assert (np.abs(np.array(clean) - expected["cosine_mean_removed"]) < error).all()
    if not any(shift):
        np.testing.assert_allclose(expected["cosine_mean_removed"], [0.05, 0.4, 0.1], atol=1e-12)
    assert expected["cosine"][0] < 0.04  # mid-grey is shared: the low band alone is not what was prescribed


def test_known_images_are_pairs_like_any_other() -> None:
    pairs = synthetic.known_image_pairs((0.9, 0.5, 0.1), n=10, groups=3)
    assert [p.group for p in pairs].count("k000") in (3, 4)
    assert len({p.id for p in pairs}) == 10
    assert all(p.rgb.dtype == p.ir.dtype == np.float32 for p in pairs)
    assert all((p.rgb[..., :1] == p.rgb).all() for p in pairs)
    moved = synthetic.known_image_pairs((1.0, 1.0, 1.0), n=1, groups=1, shift=(2.0, -1.0))[0]
    np.testing.assert_allclose(moved.ir, np.roll(moved.rgb[..., 0], (-1, 2), (0, 1)), atol=1e-5)
    with pytest.raises(DataError, match="leave the grey range"):
        synthetic.known_image_pairs((0.9, 0.5, 0.1), contrast=0.2)
