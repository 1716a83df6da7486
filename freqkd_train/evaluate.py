"""A fine-tuned model on a test split: predictions and metrics as files, the protocol's card inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from freqkd_analysis import layers, provenance, schema
from freqkd_analysis.data import layouts
from freqkd_analysis.errors import RunError
from freqkd_train import annotations as annotated
from freqkd_train import assembly, leaks, predictions, score, score_figures
from freqkd_train.annotations import Target
from freqkd_train.metrics import miou
from freqkd_train.metrics.card import Card

METRICS, SHEET = "metrics.json", "detections.png"


def run(folder: Path, out: Path, *, spec: str = "", split: str = "", annotation_set: str = "", protocol: str = "",
        device: str = "auto", draw: int = 0, allow_leak: bool = False) -> dict[str, Any]:  # fmt: skip
    """Evaluate the model of `folder` on its own test split, or on another.

    Args: draw: images on the contact sheet of detections, 0 for none. allow_leak: go on where other data than the
        run's own share frames with its training images.
    Returns: the content of metrics.json: figures in percent, method, seed, and the card.
    Raises: RunError for a folder of another kind; AnnotationError for the data; FreqkdError when classes do not match.
    """
    built = assembly.loaded(folder, layers.device_of(device))
    segments = built.settings.task == "segment"
    if segments and (draw or protocol):
        raise RunError(f"{folder} segments: --draw and --protocol are for boxes; leave them out.")
    protocol = score.checked(protocol)
    given = {"spec": spec, "test": split, "test_annotations": annotation_set}
    wanted = built.settings.targets.model_copy(update={key: value for key, value in given.items() if value})
    target = annotated.of_split(wanted, "test")
    if tuple(target.classes) != built.classes:
        raise RunError(f"the model of {folder} knows {', '.join(built.classes)}; {target.name} has "
                       f"{', '.join(target.classes)}.")  # fmt: skip
    head = {"run": str(folder), "method": built.settings.method, "seed": built.settings.seed,
            "task": built.settings.task, "target": {"spec": wanted.spec, "split": wanted.test,
            "annotations": wanted.test_annotations, "policy": wanted.policy}}  # fmt: skip
    if spec or split:
        head["leak"] = _leak(built, target, allow_leak)
    found = _segmented(built, target, out) if segments else _detected(
        built, target, out, protocol or default_protocol(target), draw)  # fmt: skip
    content = provenance.plain(head | found)
    schema.write_text(out / METRICS, json.dumps(content, indent=1) + "\n")
    return content


def _leak(built: assembly.Built, target: Target, allow: bool) -> dict[str, Any]:
    """What other test images share with those of either stage of training."""
    before = built.settings.stage1
    found = {"finetune": leaks.check(annotated.of_split(built.settings.targets, "train"), target, allow)}
    if before.pairs:
        found["distil"] = leaks.of_pairs(before.pairs, layouts.load(before.pairs), before.exclude, target, allow)
    return found


def default_protocol(target: Target) -> str:
    """`kaist` for KAIST's test annotations, else `coco`."""
    return "kaist" if target.name.startswith("kaist") else "coco"


def card_of(target: Target, protocol: str) -> Card:
    """The protocol's card of a target with boxes."""
    card = target.card
    assert target.truth is not None
    return score.make_card(target.truth, protocol, data_set=str(card["data_set"]),
                           annotation_set=str(card["annotation_set"]),
                           annotation_sha256=str(card["annotation_sha256"]), split=str(card["split"]),
                           policy=str(card["policy"]),
                           box_source=str(card.get("box_source", "")))  # fmt: skip


def _detected(built: assembly.Built, target: Target, out: Path, protocol: str, draw: int) -> dict[str, Any]:
    predictions.write(out, target, predictions.boxes(built, target, built.settings.training.batch))
    truth, name = target.truth, f"{built.settings.method}-{built.settings.seed}"
    assert truth is not None
    run_ = score.Run(name, predictions.read(out, target))
    if draw:
        conversion = assembly.source(built, target, built.settings.modality).conversion
        shown = built.settings.modality

        def picture(number: int) -> np.ndarray:
            both = layouts.decode(target.records[number], conversion)
            return both.rgb if shown == "rgb" else both.ir

        score_figures.contact_sheet(truth, run_.detections, picture, out / SHEET, draw)
    score_figures.write_figures(truth, [run_], protocol, out / "figures")
    return {"protocol": protocol} | score.report(truth, run_, card_of(target, protocol), protocol)


def _segmented(built: assembly.Built, target: Target, out: Path) -> dict[str, Any]:
    confusions = predictions.confusions(built, target, built.settings.training.batch)
    predictions.write_confusions(out, confusions)
    known = {key: target.card[key] for key in ("data_set", "annotation_set", "annotation_sha256", "split", "frames")}
    card = Card(**known, ignore_rule="none: unlabelled is a class", classes=tuple(target.classes),
                box_source=str(target.card.get("box_source", "")), metric="mIoU from one confusion matrix")  # fmt: skip
    figures = miou.scores(confusions, [record.time for record in target.records], classes=target.classes)
    return {"protocol": "miou", "units": "percent", "card": card.as_dict(), "figures": score.percent(figures)}
