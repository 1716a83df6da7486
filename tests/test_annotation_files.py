"""Annotation files to marks: every form, and what each says when it cannot be read (file, line, one line of text)."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from freqkd_train import annotation_files as files
from freqkd_train.annotation_files import AnnotationError, Mark

XML = """<annotation><filename>a.png</filename><size><width>{w}</width><height>40</height></size>
<object><name>car</name><difficult>{difficult}</difficult><bndbox>{box}</bndbox></object></annotation>"""
CORNERS = "<xmin>3</xmin><ymin>4.5</ymin><xmax>13</xmax><ymax>24.5</ymax>"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def wrong(read, message: str) -> None:
    with pytest.raises(AnnotationError) as caught:
        read()
    assert message in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 2


# --- bbGt ---


def test_bbgt_reads_labels_occlusion_and_ignore(tmp_path):
    text = "% bbGt version=3\n\nperson 505 212 20 50 2 0 0 0 0 0 0\npeople 1 2 3.5 4 0 0 0 0 0 1 0\ncyclist 5 6 7 8\n"
    assert files.bbgt(write(tmp_path / "a.txt", text)).marks == [
        Mark("person", 505, 212, 20, 50, 2),
        Mark("people", 1, 2, 3.5, 4, 0, True),
        Mark("cyclist", 5, 6, 7, 8),
    ]
    assert files.bbgt(write(tmp_path / "b.txt", "% bbGt version=3")).marks == []


@pytest.mark.parametrize(
    "line, message",
    [
        ("person 1 2 3", "line 2: expected a label and at least x y w h, got 4 fields"),
        ("person 1 2 x 4 0", "line 2: expected four numbers"),
        ("person 1 2 nan 4 0", "line 2: the box 1, 2, nan, 4 is not finite"),
        ("person 1 2 3 4 5", "line 2: occlusion 5, expected 0"),
    ],
)
def test_bbgt_names_the_wrong_line(tmp_path, line, message):
    path = write(tmp_path / "a.txt", f"% bbGt version=3\n{line}\n")
    wrong(lambda: files.bbgt(path), f"a.txt, {message}")


# --- VOC ---


def test_voc_reads_corners_and_kaist_s_x_y_w_h(tmp_path):
    path = write(tmp_path / "a.xml", XML.format(w=60, difficult=0, box=CORNERS))
    assert files.voc(path) == ([Mark("car", 3, 4.5, 10, 20)], (60, 40))
    path = write(tmp_path / "b.xml", XML.format(w=0, difficult=1, box="<x>3</x><y>4</y><w>10</w><h>20</h>"))
    assert files.voc(path) == ([Mark("car", 3, 4, 10, 20, 0, True)], None)


def test_voc_names_what_is_wrong(tmp_path):
    wrong(lambda: files.voc(write(tmp_path / "a.xml", "<annotation><object>")), "a.xml is no whole xml")
    path = write(tmp_path / "b.xml", XML.format(w=60, difficult=0, box="<xmin>3</xmin><ymin>4</ymin>"))
    wrong(lambda: files.voc(path), "b.xml, object 1: expected four numbers")
    path = write(tmp_path / "c.xml", "<annotation><object><name>car</name></object></annotation>")
    wrong(lambda: files.voc(path), "c.xml, object 1: expected a name and a bndbox")
    for width in ("wide", "nan", "inf"):
        path = write(tmp_path / "d.xml", XML.format(w=width, difficult=0, box=CORNERS))
        wrong(lambda at=path: files.voc(at), "d.xml: expected a width and height in px")


# --- YOLO, table ---


def test_yolo_is_in_shares_of_the_image(tmp_path):
    path = write(tmp_path / "a.txt", "1 0.5 0.25 0.1 0.2\n\n")
    ((label, *box, occlusion, ignore),) = files.yolo(path, ("a", "b"), (200, 100)).marks
    assert (label, occlusion, ignore) == ("b", 0, False) and box == pytest.approx([90, 15, 20, 20])
    wrong(
        lambda: files.yolo(write(path, "2 0.5 0.5 0.1 0.1"), ("a", "b"), (9, 9)),
        "line 1: class 2, expected 0 to 1 (a, b)",
    )
    wrong(lambda: files.yolo(write(path, "0 0.5 0.5"), ("a", "b"), (9, 9)), "line 1: expected class cx cy w h, got 3")


def test_a_table_groups_boxes_by_frame(tmp_path):
    header = "image_id,frame,label,x,y,w,h,occlusion\n"
    with gzip.open(tmp_path / "t.csv.gz", "wt") as stream:
        stream.write(header + "0,f/a,person,1,2,3,4,1\n1,f/b,people,5,6,7,8,0\n0,f/a,person?,9,9,9,9,0\n")
    found = files.table(tmp_path / "t.csv.gz")
    assert [mark.label for mark in found["f/a"].marks] == ["person", "person?"] and found["f/a"].marks[0].occlusion == 1
    wrong(lambda: files.table(write(tmp_path / "u.csv", "frame,label\n")), "expected the columns frame, label, x, y")
    wrong(
        lambda: files.table(write(tmp_path / "v.csv", header + "0,f,person,1,2,,4,0\n")), "v.csv, line 2: expected four"
    )
    (tmp_path / "w.csv.gz").write_bytes(b"no gzip")
    wrong(lambda: files.table(tmp_path / "w.csv.gz"), "w.csv.gz cannot be read (BadGzipFile)")


# --- COCO ---


def coco(path: Path, **changes) -> Path:
    content = {
        "images": [{"id": 7, "file_name": "data/a.jpg", "width": 64, "height": 48, "day_night": "night"},
                   {"id": 3, "file_name": "b.jpg"}],
        "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}],
        "annotations": [{"image_id": 7, "category_id": 18, "bbox": [1, 2, 3, 4], "iscrowd": 1},
                        {"image_id": 7, "category_id": 1, "bbox": [5, 6, 7, 8], "occlusion": 2}],
    }  # fmt: skip
    return write(path, json.dumps({k: v for k, v in {**content, **changes}.items() if v is not None}))


def test_coco_keeps_the_order_of_images_and_sorts_labels_by_id(tmp_path):
    found = files.coco(coco(tmp_path / "a.json"))
    assert found.labels == ("person", "dog") and [image.id for image in found.images] == [7, 3]
    a, b = found.images
    assert a.marked == ([Mark("dog", 1, 2, 3, 4, 0, True), Mark("person", 5, 6, 7, 8, 2)], (64, 48))
    assert (a.name, a.time, b.marked) == ("data/a.jpg", "night", ([], None))


def test_coco_accepts_hit_uav_s_names_ids_from_0_and_ids_as_text(tmp_path):
    path = coco(tmp_path / "a.json", images=[{"id": "0", "filename": "x.jpg"}], annotations=None,
                annotation=[{"image_id": 0, "category_id": "0", "bbox": [1, 2, 3, 4]}],
                categories=[{"id": 0, "name": "Person"}])  # fmt: skip
    assert files.coco(path).images[0].marked.marks == [Mark("Person", 1, 2, 3, 4)]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"images": None}, "is no COCO json (KeyError"),
        ({"images": [{"id": 1}]}, "is no COCO json (StopIteration"),
        ({"images": [{"id": 7, "file_name": "a"}] * 2}, "1 image ids occur more than once"),
        (
            {"annotations": [{"image_id": 9, "category_id": 1, "bbox": [1, 2, 3, 4]}]},
            "annotation 0: image_id 9 is none",
        ),
        ({"annotations": [{"image_id": 7, "category_id": 2, "bbox": [1, 2, 3, 4]}]}, "category_id 2 is none of"),
        ({"annotations": [{"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4, 0.5]}]}, "5 are a turned box"),
        ({"annotations": [{"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, None]}]}, "expected four numbers"),
        ({"annotations": [{"image_id": 7}]}, "annotation 0: expected image_id, category_id and bbox"),
        ({"annotations": 5}, "is no COCO json (TypeError"),
        ({"images": [{"id": 7, "file_name": "a", "width": "wide"}]}, "image a: expected a width and height in px"),
    ],
)
def test_coco_names_what_is_wrong(tmp_path, changes, message):
    wrong(lambda: files.coco(coco(tmp_path / "a.json", **changes)), message)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(AnnotationError, match="^no annotation file"):
        files.coco(tmp_path / "none.json")
    packed = bytearray(gzip.compress(bytes(range(256)) * 9))
    packed[10:16] = b"\xff" * 6
    (tmp_path / "d.json.gz").write_bytes(packed)
    wrong(lambda: files.coco(tmp_path / "d.json.gz"), "d.json.gz cannot be read (error); fetch it again")
    wrong(lambda: files.coco(write(tmp_path / "a.json", "[1, 2")), "a.json is no COCO json (JSONDecodeError")
    wrong(lambda: files.coco(write(tmp_path / "b.json", "[1, 2]")), "b.json is no COCO json (TypeError")
    (tmp_path / "c.txt").write_bytes(b"person \xff\xfe")
    wrong(lambda: files.bbgt(tmp_path / "c.txt"), "c.txt is no text in UTF-8")


# --- label images ---


def test_masks_give_indices_whatever_the_kind_of_image(tmp_path):
    labels = np.arange(54, dtype=np.uint8).reshape(6, 9) % 9
    palette = Image.fromarray(labels, "L").convert("P")
    palette.putdata(labels.ravel().tolist())
    palette.putpalette([0, 0, 0, 64, 0, 128, 64, 64, 0] + [9] * 18)
    palette.save(tmp_path / "p.png")
    Image.fromarray(labels).save(tmp_path / "l.png")
    Image.fromarray(np.repeat(labels[..., None], 3, axis=2)).save(tmp_path / "rgb.png")
    Image.fromarray(labels.astype(np.uint16)).save(tmp_path / "deep.png")
    for name in ("p", "l", "rgb", "deep"):
        read = files.read_mask(tmp_path / f"{name}.png")
        assert read.dtype == np.uint8 and (read == labels).all(), name


def test_masks_that_are_none_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 200, np.uint8)).save(tmp_path / "a.png")
    wrong(lambda: files.read_mask(tmp_path / "a.png"), "a.png holds the label 200; expected 0 to 8")
    for value, dtype in ((-1, np.int32), (264, np.int32), (1.5, np.float32), (np.nan, np.float32)):
        Image.fromarray(np.full((4, 4), value, dtype)).save(tmp_path / "e.tif")
        wrong(lambda: files.read_mask(tmp_path / "e.tif"), f"e.tif holds the label {value}; expected 0 to 8")
    Image.fromarray(np.random.default_rng(0).integers(0, 8, (4, 4, 3), np.uint8)).save(tmp_path / "b.png")
    wrong(lambda: files.read_mask(tmp_path / "b.png"), "b.png is in colour")
    wrong(lambda: files.read_mask(write(tmp_path / "c.png", "no image")), "c.png cannot be read as a label image")
    wrong(lambda: files.read_mask(tmp_path / "d.png"), "no label image")


def test_boxes_of_a_mask_join_diagonal_neighbours_and_leave_out_specks():
    labels = np.zeros((30, 40), np.uint8)
    labels[2:7, 3:8] = 2  # 25 px
    labels[7:12, 8:13] = 2  # touches the first by a corner
    labels[20:24, 30:34] = 2  # 16 px: a speck
    labels[20:30, 0:2] = 1  # another class, at the edge: 20 px
    labels[0, 39] = 8
    marks, size = files.mask_marks(labels, {2: "person", 1: "car", 3: "bike"})
    assert marks == [Mark("person", 3, 2, 10, 10), Mark("car", 0, 20, 2, 10)] and size == (40, 30)


# --- digest ---


def test_the_digest_sees_boxes_classes_and_names_but_not_order():
    rules = {"person": "train", "people": "ignore"}
    a, b = Mark("person", 1, 2, 3, 4), Mark("people", 5, 6, 7, 8, 1)
    base = files.digest({"x": [a, b], "y": []}, rules)
    assert base == files.digest({"y": [], "x": [b, a]}, rules)
    assert base == files.digest({"y": [], "x": [b._replace(label="person", ignore=True), a]}, rules)
    others = [
        {"x": [a, b]}, {"x": [a, b], "z": []}, {"x": [a], "y": [b]}, {"x": [a, b, b], "y": []},
        {"x": [a._replace(w=3.01), b], "y": []}, {"x": [a, b._replace(occlusion=0)], "y": []},
        {"x": [a, b._replace(label="person")], "y": []},
    ]  # fmt: skip
    assert len({base, *(files.digest(other, rules) for other in others)}) == 8
