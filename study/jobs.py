"""Every run behind RESULTS.md as a command: analyses, distillations, downstream studies. `study/run.py` runs them.

`study/exclude.txt` names the pairs whose frames a validation list of the benchmarks holds: no student has seen them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from outputs import TEST_DATA

from freqkd_analysis.errors import FreqkdError
from freqkd_analysis.layers import PLACE as ANALYSED
from freqkd_train.arms import STUDENTS, needs_analysis
from freqkd_train.config import PLACE as DISTILLED

RUNS = Path("runs")
EXCLUDE = Path(__file__).resolve().parent / "exclude.txt"
TRAIN, ALL = RUNS / "train.csv", RUNS / "pairs.csv"
"""Pairs that no validation list holds: those in groups that are trained on; and all of them."""

VIT = ("vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_dinov2_saliency")
LITE0 = ("tf_efficientnet_lite0", "tf_efficientnet_lite0")
LITE2 = ("tf_efficientnet_lite2", "tf_efficientnet_lite2")
MNV2 = ("mobilenetv2_100", "mobilenetv2_100")
NETWORKS = {"vit": VIT, "lite0": LITE0, "lite2": LITE2, "mnv2": MNV2}
"""timm name and weights file."""

FEW = ["--conditions", "shuffled,mean_removed"]
FIRST = ("none", "mse", "cosine", "freqkd", "measured", "shuffled", "paper_loss")
LOSSES = (*FIRST, "low_only", "high_only", "mse_high", "signed_high", "precision")
CUTS = ("cutoff_10", "cutoff_25", "cutoff_75")
CONTROLLED = ("none", "mse", "freqkd", "measured", "shuffled")
WHOLE = {"vit-all": (VIT, "2,5,8,11", "168x210"), "lite0-all": (LITE0, "all", "256x320")}
"""Students distilled on all pairs, each network its own teacher: network, layers, size."""
SMALL_HEAD: dict[str, object] = {"head.channels": 64, "head.hidden": 128, "head.regions": 64}
TASKS: dict[str, tuple[str, str, dict[str, object]]] = {
    "mfnetseg": ("mfnet", "mfnet:mfnet", {"targets.test": "val"}),
    "mfnetbox": ("flir", "mfnet:mfnet", {"targets.test": "val", "targets.train_annotations": "boxes",
                                         "targets.test_annotations": "boxes", **SMALL_HEAD}),
    "flir": ("flir", "flir:flir", {"targets.allow_leak": True, **SMALL_HEAD}),
    "hituav": ("flir", "hituav:hit_uav", {"targets.test": "val", "targets.allow_leak": True, **SMALL_HEAD}),
}  # fmt: skip
"""Task -> recipe, benchmark, settings."""
EPOCHS = {
    "vit": {"mfnetseg": 4, "mfnetbox": 4, "flir": 6},
    "lite0": {"mfnetseg": 6, "mfnetbox": 4, "flir": 8, "hituav": 2},
}
TUNING: dict[str, object] = {
    "data.holdout": 0,
    "training.batch": 4,
    "training.lr": "1e-3",
    "training.clip": 1.0,
    "training.warmup": 0.05,
}


@dataclass(frozen=True)
class Job:
    """A run. words: of its command, without --out. ended: the file that it ends with. begun: the one that lets it go on
    with --resume; empty for a command that goes on by itself, or is quick."""

    name: str
    words: tuple[str, ...]
    ended: str
    begun: str = ""

    def done(self) -> bool:
        return (RUNS / self.name / self.ended).is_file()

    def command(self) -> list[str]:
        """The words that run it now."""
        folder = RUNS / self.name
        resume = ["--resume"] if self.begun and (folder / self.begun).is_file() else []
        return [sys.executable, "-m", *self.words, "--out", str(folder), *resume]


def data() -> str:
    folder = os.environ.get(TEST_DATA, "")
    if not (Path(folder) / "data" / "pairs").is_dir():
        raise FreqkdError(f"expected {TEST_DATA} to name a folder with data/pairs, data/benchmarks and weights, got "
                          f'"{folder}".')  # fmt: skip
    return folder


def weights(network: tuple[str, str]) -> str:
    return f"{data()}/weights/{network[1]}.safetensors"


def analysis(name: str, *words: str, spec: str = "") -> Job:
    begun, ended = ANALYSED
    source = ["--data", spec or f"kit:{data()}/data/pairs"]
    return Job(name, ("freqkd_analysis", "layers", *source, *words), ended, begun)


def trained(network: tuple[str, str]) -> list[str]:
    return ["--model", network[0], "--weights", weights(network)]


def analyses() -> Iterator[Job]:
    """Section 1, and the analyses that weights are measured in."""
    big, short = ["--pairs", "500", "--size", "448"], ["--conditions", "shuffled,mean_removed,shifted:4"]
    for name, network in NETWORKS.items():
        yield analysis(name, *big, *trained(network))
        for floor in ("noise", "shifted"):
            again = ("freqkd_analysis", "summarize", str(RUNS / name), "--floor", floor)
            yield Job(f"{name}-floor-{floor}", again, "verdict.json")
        yield analysis(f"{name}-random", *big, "--model", network[0], "--weights", "random", *short)
        layers = "3,7,9,10,11" if network == VIT else "all"
        settings = ["--preset", "paper", "--pairs", "200", "--sample", "stratified", "--layers", layers, *FEW]
        yield analysis(f"paper-{name}", *settings, *trained(network))
    yield analysis("demo", *big, "--model", "freqkd_demo", *short)
    small = ["--pairs", "500", "--size", "224", *trained(VIT), *FEW]
    yield analysis("vit-224", *small)
    for window in ("hann", "dct"):
        yield analysis(f"vit-224-{window}", *small, "--window", window)
    yield analysis("vit-224-pad", *small, "--geometry", "pad")
    few = ["--pairs", "400", "--control-pairs", "64"]
    for name, network in (("vit-168", VIT), ("lite2-168", LITE2)):
        more = ["--size", "168", "--conditions", "shuffled,mean_removed,noise"]
        yield analysis(name, *few, *more, *trained(network), spec=f"csv:{TRAIN}")
    for name, (network, layers, size) in WHOLE.items():
        more = [*few, *FEW, *trained(network), "--layers", layers, "--size", size]
        yield analysis(f"{name}/analyse", *more, spec=f"csv:{ALL}")


def distillation(study: str, arm: str, seed: int, measured: str, words: list[str]) -> Job:
    """Stage 1 of one arm; its folder is where `--students runs/STUDY` looks for it."""
    changes = {key: str(value).replace(" ", "") for key, value in STUDENTS[arm].items()}
    sets = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    # Stored teacher features come of other batches, and after a hundred steps their rounding shows: as it was run.
    sets += ["--cache-gb", "0" if arm == "shuffled" or study in WHOLE else "4"]
    if needs_analysis(arm):
        sets += ["--weights-from", str(RUNS / measured)]
    begun, ended = DISTILLED
    head = ("freqkd_train", "distill", "--batch-size", "8", "--seed", str(seed))
    return Job(f"{study}/distil/{arm}-{seed}", (*head, *words, *sets), ended, begun)


def teacher(network: tuple[str, str], layers: str) -> list[str]:
    return ["--teacher", network[0], "--teacher-weights", weights(network), "--layers", layers]


def student(network: tuple[str, str]) -> list[str]:
    return ["--student", network[0], "--student-weights", weights(network)]


def distillations() -> Iterator[Job]:
    """Section 2: small ones with held-out groups, all losses; larger ones on all pairs for the downstream studies."""
    held = ["--data", f"kit:{data()}/data/pairs", "--set", f"data.exclude={EXCLUDE}", "--size", "168"]
    usual, stages = ["--epochs", "3", "--lr", "5e-4"], ["--set", "student.layers=1,2,3,4"]
    from_vit = teacher(VIT, "2,5,8,11")
    grid: dict[str, tuple[str, list[str], tuple[str, ...], tuple[int, ...]]] = {
        "vit-to-vit": ("vit-168", [*held, *from_vit, *usual], LOSSES, (0,)),
        "vit-to-lite0": ("vit-168", [*held, *from_vit, *student(LITE0), *stages, *usual], (*LOSSES, *CUTS), (0,)),
        "lite2-to-lite0": ("lite2-168", [*held, *teacher(LITE2, "1,2,3,4"), *student(LITE0), *stages, *usual],
                           (*LOSSES, *CUTS), (0,)),
        "vit-to-mnv2": ("vit-168", [*held, *from_vit, *student(MNV2), *stages, *usual], FIRST, (0,)),
        "vit-to-resnet50": ("vit-168", [*held, *from_vit, "--student", "resnet50", "--student-weights", "random",
                                        *stages, "--epochs", "1", "--lr", "1e-4"], ("freqkd",), (0,)),
    }  # fmt: skip
    every = [
        "--data",
        f"csv:{ALL}",
        "--merge",
        "0.5",
        "--set",
        "data.holdout=0",
        "--set",
        "training.warmup=0.05",
        *usual,
    ]
    for name, (network, layers, size) in WHOLE.items():
        words = [*every, *teacher(network, layers), *student(network), "--size", size]
        grid[name] = (f"{name}/analyse", words, CONTROLLED, (0, 1))
    for study, (measured, words, arms, seeds) in grid.items():
        for seed in seeds:
            for arm in arms:
                yield distillation(study, arm, seed, measured, words)


def downstream() -> Iterator[Job]:
    """Section 2: the students of a study on a task."""
    for name, students, network, task, seeds in (
        *((f"vit-{task}", "vit-all", "vit", task, seeds) for task, seeds in
          (("flir", "0"), ("mfnetbox", "0"), ("mfnetseg", "0,1"))),
        *((f"lite0-{task}", "lite0-all", "lite0", task, "0,1") for task in TASKS),
    ):  # fmt: skip
        yield tuned(name, students, network, task, seeds, CONTROLLED)
    for students, network in (("vit-to-vit", "vit"), ("vit-to-lite0", "lite0"), ("lite2-to-lite0", "lite0")):
        yield tuned(f"{students}-mfnetseg", students, network, "mfnetseg", "0", LOSSES)


def tuned(name: str, students: str, network: str, task: str, seeds: str, arms: tuple[str, ...]) -> Job:
    recipe, benchmark, changes = TASKS[task]
    layout, _, folder = benchmark.partition(":")
    own: dict[str, object] = {
        "training.epochs": EPOCHS[network][task],
        "data.size": {"vit": "[168,210]", "lite0": "[256,320]"}[network],
    }
    if network == "vit":
        own["head.train"] = "frozen"
    elif task == "mfnetseg":
        own["head.kind"] = "linear"
    sets = [
        word for key, value in {**TUNING, **changes, **own}.items() for word in ("--set", f"finetune.{key}={value}")
    ]
    words = (
        "freqkd_train",
        recipe,
        "--data",
        f"{layout}:{data()}/data/benchmarks/{folder}",
        "--students",
        str(RUNS / students),
        "--seeds",
        seeds,
        "--methods",
        ",".join(arms),
        *trained(NETWORKS[network]),
        *sets,
    )
    return Job(name, words, "compare/compare.csv")


def jobs() -> list[Job]:
    """All runs; each after those that it reads."""
    return [*analyses(), *distillations(), *downstream()]
