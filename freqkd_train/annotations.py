"""Images with boxes or label images for a downstream task: `load` a split of a data set under a stated policy.

Reading is in two steps. `annotation_sets` finds what a layout holds; here labels become classes, boxes are checked, and
the card says what was read, left out and changed. Readers never fail on a count: a difference from the published
figures is a warning in the card. What is not there at all is an error that names where it was looked for.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from freqkd_analysis.data import listing
from freqkd_analysis.data.layouts import LAYOUTS
from freqkd_analysis.data.records import PairRecord
from freqkd_analysis.errors import first, nearest
from freqkd_train import annotation_files
from freqkd_train.annotation_files import AnnotationError, Mark, digest, read_mask
from freqkd_train.annotation_sets import SETS, Found, Ids
from freqkd_train.downstream import Targets
from freqkd_train.metrics.boxes import EVERY_CLASS, Truth, make_truth

__all__ = ["ACTIONS", "EDGES", "MASK_LABELS", "AnnotationError", "Target", "digest", "load", "read_mask",
           "same_classes"]  # fmt: skip

ACTIONS = ("train", "ignore", "merge", "drop")
"""What may become of a label: a class; a region that is ignored for every class; objects of the first class (or of
another: merge:CLASS); nothing, so that finding it is a mistake."""
EDGES = ("keep", "clip", "drop")
"""What may become of a box partly outside its image. One wholly outside is always dropped."""
MASK_LABELS = ("unlabeled", "car", "person", "bike", "curve", "car_stop", "guardrail", "color_cone", "bump")
"""MFNet's labels 0 to 8."""


@dataclass(frozen=True)
class Target:
    """The images of a split with their boxes (`truth`) or label images (`masks`); order and length are the same."""

    name: str
    records: tuple[PairRecord, ...]
    """Both paths are the same file where there is one modality."""
    truth: Truth | None
    masks: tuple[Path, ...] | None
    classes: tuple[str, ...]
    card: dict[str, Any]
    """data_set, annotation_set, annotation_sha256, split, frames, classes, policy, box_source; counts; warnings."""
    ids: Ids = field(default_factory=Ids)

    def take(self, images: Sequence[int] | np.ndarray) -> Target:
        """Only these images, in this order; the card says how many of how many, and which (a digest of the names)."""
        records = tuple(self.records[i] for i in images)
        truth = self.truth.take(images) if self.truth else None
        masks = tuple(self.masks[i] for i in images) if self.masks else None
        names = hashlib.sha256("\n".join(record.id for record in records).encode()).hexdigest()
        subset = {"of": len(self.records), "sha256": names}
        card = {**self.card, "frames": len(records), "subset": subset, **_places(records),
                **(_counts(truth) if truth else {})}  # fmt: skip
        return replace(self, records=records, truth=truth, masks=masks, card=card)


def load(spec: str, split: str, *, annotations: str = "", policy: str = "", edges: str = "") -> Target:
    """The split of a data set with its annotations.

    Args:
        spec: layout and place, such as "kaist:/data/kaist"; `annotation_sets.SETS` lists the layouts.
        split: train, val, test, all, or (KAIST, MFNet) the name of a list; test of FLIR aligned is its validation list.
        annotations: which set: KAIST original | improved | sanitized | paired (default: improved or sanitized where it
            is there, else original), MFNet and MSRS masks | boxes | a json, FLIR xml | a json; "NAME@SHA256" (the first
            digits will do) insists on that content.
        policy: what becomes of labels, such as "people=ignore,cyclist=merge": see `ACTIONS`. Default: KAIST's person is
            counted, people, person? and cyclist are ignored; so are dog (FLIR v1) and DontCare; the rest is trained.
        edges: boxes partly outside the image: clip (default), drop, or keep (KAIST, whose protocol tests uncut ones).
    Raises: AnnotationError or DataError, one line: an unknown layout, split or label, files that are not there or
        cannot be read (with the places looked at), other content than SHA256 says, a label image with a value above 8.

    Example:
        >>> import json, tempfile
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> Image.new("L", (64, 48)).save(root / "a.png")
        >>> box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [60, 4, 9, 20]}
        >>> made = {"images": [{"id": 1, "file_name": "a.png"}], "categories": [{"id": 1, "name": "car"}]}
        >>> _ = (root / "a.json").write_text(json.dumps(made | {"annotations": [box]}))
        >>> target = load(f"coco:{root}:{root}/a.json", "train")
        >>> target.truth.box.tolist(), target.card["outside"]
        ([[60.0, 4.0, 4.0, 20.0]], {'rule': 'clip', 'partly': 1, 'wholly': 0})
    """
    layout, *arguments = spec.split(":")
    if layout not in SETS:
        raise AnnotationError(_no_layout(layout))
    read, usage = SETS[layout]
    arguments = [part for part in arguments if part]
    least, most = usage.replace("[", ":").count(":") - 2 * usage.count("["), usage.count(":")
    if not least <= len(arguments) <= most:
        raise AnnotationError(f'expected {usage}, got "{spec}".')
    if edges and edges not in EDGES:
        raise AnnotationError(f'edges "{edges}" is none of {", ".join(EDGES)}.{nearest(edges, EDGES)}')
    wanted, _, content = annotations.partition("@")
    found = read(arguments, split, wanted)
    if listing.rendered(spec):
        found = replace(found, known={})
    boxed = found.marked is not None
    target = _boxed(found, layout, policy, edges or found.edges) if boxed else _masked(found, layout)
    if not target.card["annotation_sha256"].startswith(content.lower()):
        raise AnnotationError(f"{spec}: the annotations are not those asked for: expected sha256 {content}, got "
                              f"{target.card['annotation_sha256'][:16]}; fetch them again, or drop the @.")  # fmt: skip
    return target


def of_split(wanted: Targets, which: Literal["train", "test"]) -> Target:
    """The training or the test images of a fine-tuning's settings. Raises: as `load`."""
    sets = {"train": wanted.train_annotations, "test": wanted.test_annotations}
    return load(wanted.spec, getattr(wanted, which), annotations=sets[which], policy=wanted.policy)


def same_classes(train: Target, test: Target) -> None:
    """AnnotationError naming the classes that only one side has, or the order that differs."""
    if train.classes == test.classes:
        return
    only = [(side.name, [c for c in side.classes if c not in other.classes])
            for side, other in ((train, test), (test, train))]  # fmt: skip
    told = [f"{name} alone has {first(classes, 8)}" for name, classes in only if classes]
    text = "; ".join(told) or f"{', '.join(train.classes)} and {', '.join(test.classes)} (the order differs)"
    raise AnnotationError(f"the classes do not match: {text}. Set the policy (LABEL=ignore, LABEL=drop, ...) to agree.")


def _no_layout(layout: str) -> str:
    if layout == "synthetic":
        return ("synthetic scenes need files to be annotated: `freqkd-analyze data synth FOLDER --layout kaist` writes "
                "them; then kaist:FOLDER.")  # fmt: skip
    if layout in LAYOUTS:
        return (f"{layout}: holds pairs without annotations, which a detector cannot learn from. Name annotated data, "
                "or distil alone: freqkd-train distill --data.")  # fmt: skip
    known = ", ".join(usage for _, usage in SETS.values())
    return f'no annotated layout named "{layout}".{nearest(layout, SETS)} Known: {known}.'


def _masked(found: Found, layout: str) -> Target:
    assert found.masks is not None
    pixels, made = np.zeros(annotation_files.MASK_CLASSES, np.int64), hashlib.sha256()
    for record, path in zip(found.records, found.masks, strict=True):
        labels = read_mask(path)
        pixels += np.bincount(labels.ravel(), minlength=len(pixels))
        made.update(f"{record.id} {labels.shape}\n".encode() + labels.tobytes())
    card = _card(found, layout, MASK_LABELS, "", made.hexdigest())
    card["pixels"] = dict(zip(MASK_LABELS, pixels.tolist(), strict=True))
    card["warnings"] = [*found.warnings, *_differences(found, Counter(), card["annotation_sha256"])]
    name = f"{layout}-masks-{found.split}"
    return Target(name, tuple(found.records), None, tuple(found.masks), MASK_LABELS, card)


def _boxed(found: Found, layout: str, policy: str, edges: str) -> Target:
    assert found.marked is not None
    rules = _rules(policy, found.rules)
    known = {label.lower(): label for label in rules}
    marks = [mark for one in found.marked for mark in one.marks]
    labels = [known.get(mark.label.lower(), mark.label) for mark in marks]
    image = np.repeat(np.arange(len(found.marked)), [len(one.marks) for one in found.marked])
    box = np.array([mark[1:5] for mark in marks], np.float64).reshape(-1, 4)
    sizes = np.array([annotation_files.image_size(record.ir) for record in found.records], np.int64).reshape(-1, 2)
    told = [f"{record.id} ({one.size[0]}x{one.size[1]}, image {w}x{h})"
            for record, one, (w, h) in zip(found.records, found.marked, sizes, strict=True)
            if one.size and one.size != (w, h)]  # fmt: skip

    box, clean, cleaning = cleaned(image, labels, box, sizes, edges)
    action = [rules.get(label, "ignore") for label in labels]
    kept = clean & np.array([a != "drop" for a in action], bool)
    classes, category, ignore = _categories(labels, action, marks, rules)
    truth = make_truth(
        [record.id for record in found.records], classes=classes, image=image[kept], category=category[kept],
        box=box[kept], ignore=ignore[kept], occlusion=np.array([mark.occlusion for mark in marks], np.int64)[kept],
        label=[marks[i].label for i in np.flatnonzero(kept)], groups=[record.group for record in found.records],
        times=[record.time for record in found.records], sizes=sizes,
    )  # fmt: skip
    content = digest({r.id: one.marks for r, one in zip(found.records, found.marked, strict=True)}, found.rules)
    card = _card(found, layout, classes, annotation_files.policy(rules), content)
    card |= {"labels": dict(Counter(labels).most_common()), **cleaning, **_counts(truth)}
    card["dropped_by_policy"] = int((clean & ~kept).sum())
    strange = sorted(set(labels) - set(rules))
    card["warnings"] = [
        *found.warnings, *_differences(found, Counter(labels), content),
        *([f"labels without a rule are ignored: {first(strange, 8)}"] if strange else []),
        *([f"{len(told)} images are not of the size the annotations tell: {first(told)}"] if told else []),
    ]  # fmt: skip
    name = f"{layout}-{found.annotation_set}-{found.split}".replace(" ", "-").replace(",", "")
    return Target(name, tuple(found.records), truth, None, classes, card, found.ids)


def _rules(policy: str, rules: Mapping[str, str]) -> dict[str, str]:
    """The rules of a set with those of "LABEL=ACTION,..." in their place."""
    made = dict(rules)
    known = {label.lower(): label for label in rules}
    for part in filter(None, (part.strip() for part in policy.split(","))):
        label, _, action = part.partition("=")
        if label.lower() not in known:
            raise AnnotationError(f'policy "{part}": no label "{label}" in this set.{nearest(label, rules)} Known: '
                                  f"{', '.join(rules)}.")  # fmt: skip
        kind, _, into = action.partition(":")
        if kind not in ACTIONS or (into and kind != "merge"):
            raise AnnotationError(f'policy "{part}": expected LABEL=ACTION with {", ".join(ACTIONS)} or merge:CLASS.'
                                  f"{nearest(kind, ACTIONS)}")  # fmt: skip
        made[known[label.lower()]] = action
    trained = [label for label, action in made.items() if action == "train"]
    if not trained:
        raise AnnotationError(f'policy "{policy}" leaves no class to train on; set one label to train.')
    for label, action in made.items():
        if action.startswith("merge:") and action[6:] not in trained:
            raise AnnotationError(f'policy "{label}={action}": no class "{action[6:]}".{nearest(action[6:], trained)} '
                                  f"Classes: {', '.join(trained)}.")  # fmt: skip
    return made


def cleaned(
    image: np.ndarray, labels: list[str], box: np.ndarray, sizes: np.ndarray, edges: str
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Boxes (M, 4) with `edges` applied, which of them stay (M,), and the counts of what was wrong."""
    limit = sizes[image]
    empty = (box[:, 2:] <= 0).any(axis=1)
    far = box[:, :2] + box[:, 2:]
    wholly = ~empty & ((far <= 0) | (box[:, :2] >= limit)).any(axis=1)
    partly = ~empty & ~wholly & ((box[:, :2] < 0) | (far > limit)).any(axis=1)
    codes = np.unique(np.array(labels, dtype=str), return_inverse=True)[1]
    rows = np.column_stack([image, codes, box]) if len(box) else np.zeros((0, 6))
    again = np.ones(len(box), bool)
    again[np.unique(rows, axis=0, return_index=True)[1]] = False
    again &= ~empty
    if edges == "clip":
        near, far = np.clip(box[:, :2], 0, limit), np.clip(far, 0, limit)
        box = np.where(partly[:, None], np.concatenate([near, far - near], axis=1), box)
    stay = ~empty & ~wholly & ~again & ~(partly & (edges == "drop"))
    counts = {"boxes_read": len(box), "zero_size": int(empty.sum()), "duplicates": int(again.sum()),
              "outside": {"rule": edges, "partly": int(partly.sum()), "wholly": int(wholly.sum())}}  # fmt: skip
    return box, stay, counts


def _categories(
    labels: list[str], action: list[str], marks: list[Mark], rules: Mapping[str, str]
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Classes, class number of each box, and whether it is a region to ignore (for every class if by policy)."""
    classes = tuple(label for label, what in rules.items() if what == "train")
    # With one class, "every class" is that one: a plain number is easier to read.
    every = EVERY_CLASS if len(classes) > 1 else 0
    number = {}
    for label, what in rules.items():
        into = label if what == "train" else (what[6:] or classes[0]) if what.startswith("merge") else ""
        number[label] = classes.index(into) if into else every
    category = np.array([number.get(label, every) for label in labels], np.int64)
    ignore = np.array([what == "ignore" or mark.ignore for what, mark in zip(action, marks, strict=True)], bool)
    return classes, category, ignore


def _counts(truth: Truth) -> dict[str, Any]:
    per_class = np.bincount(truth.category[~truth.ignore], minlength=len(truth.classes))
    return {
        "boxes": int((~truth.ignore).sum()),
        "boxes_of_class": dict(zip(truth.classes, per_class.tolist(), strict=True)),
        "ignore_regions": int(truth.ignore.sum()),
        "frames_without_boxes": len(truth.names) - len(np.unique(truth.image[~truth.ignore])),
    }


def _card(found: Found, layout: str, classes: Sequence[str], policy: str, content: str) -> dict[str, Any]:
    """What every target tells; the first eight are fields of `metrics.card.Card`."""
    return {
        "data_set": layout,
        "annotation_set": found.annotation_set,
        "annotation_sha256": content,
        "split": found.split,
        "frames": len(found.records),
        "classes": list(classes),
        "policy": policy,
        "box_source": found.box_source,
        "groups_are": "sequences" if found.sequences else "blocks of numbers",
        **_places(found.records),
    }


def _places(records: Sequence[PairRecord]) -> dict[str, Any]:
    times = Counter(record.time or "unknown" for record in records)
    return {"groups": len({record.group for record in records}), "light": dict(sorted(times.items()))}


def _differences(found: Found, labels: Mapping[str, int], content: str) -> list[str]:
    """Where a set is not as published; boxes are compared only when all frames are there."""
    frames = found.known.get("frames", 0)
    told = [f"{len(found.records)} frames, published {frames}"] if frames and frames != len(found.records) else []
    if told:
        return told
    wrong = [f"{label} {labels.get(label, 0)} (published {n})"
             for label, n in found.known.get("labels", {}).items() if labels.get(label, 0) != n]  # fmt: skip
    if wrong:
        told.append(f"boxes differ from the published counts: {first(wrong, 5)}")
    sha256 = found.known.get("sha256", content)
    if sha256 != content:
        told.append(f"the boxes are not those of the {found.annotation_set} set: sha256 {content[:16]}, known "
                    f"{sha256[:16]}")  # fmt: skip
    return told
