"""One distillation from settings to a finished run folder.

Everything is made and checked before anything is written; then train, export the plain student, and measure on
held-out pairs what changed. Each part can be taken up again from the folder alone.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freqkd_analysis import __version__, layers, models, provenance, schema, shards, terminal
from freqkd_analysis.conditions import Geometry
from freqkd_analysis.data import layouts
from freqkd_analysis.data.records import PairRecord, stratified
from freqkd_analysis.errors import nearest
from freqkd_analysis.features import find_taps, reductions
from freqkd_analysis.models import Network
from freqkd_train import config as settings_file
from freqkd_train import distill, engine, export, heldout, metrics_file, pairs, schedule, taps, teacher_cache
from freqkd_train import student as students
from freqkd_train.config import Config, ConfigError
from freqkd_train.distill import DistillStep, Teacher

Say = Callable[[str], None]

METRICS = ("val/loss",)
"""What is measured on held-out pairs at each epoch's end."""


@dataclass
class Job:
    """A run made ready: settings resolved, networks and pairs at hand, nothing trained, nothing written."""

    config: Config
    teacher: Network
    student: Network
    origin: dict[str, Tensor]
    step: DistillStep
    source: pairs.PairSource
    train: list[PairRecord]
    held: list[PairRecord]
    geometry: Geometry
    conversion: str
    device: str
    terms: frozenset[str] = frozenset()
    """Names of the loss's terms, known once it is `ready`."""

    @property
    def paired(self) -> list[taps.Paired]:
        return self.step.match.pairs

    def fingerprint(self) -> dict[str, str]:
        """What a checkpoint must share with the run that takes it up."""
        return {
            "teacher": self.teacher.sha256 or self.teacher.source,
            "student": self.student.sha256 or self.student.source,
            "pairs": provenance.sha256_lines(record.id for record in self.train),
        }

    def parameters(self) -> dict[str, int]:
        """Numbers of parameters: of the student, trained in it, and of projectors."""
        return {"student": sum(v.numel() for v in self.origin.values()),
                "trained": sum(p.numel() for p in self.step.parameters() if p.requires_grad),
                "projectors": sum(p.numel() for p in self.step.match.parameters())}  # fmt: skip


def prepare(config: Config, say: Say) -> Job:
    """Read the pairs, make the networks, pair their taps, build the loss. Raises FreqkdError; writes nothing."""
    distill.check_name(config.loss.name)
    device = layers.device_of(config.training.device)
    missing: list[str] = []
    records = layouts.load(config.data.spec, on_missing=missing.extend)
    if missing:
        say(f"{len(missing)} pairs lack a file and are left out, first {missing[0]}")
    train, held = pairs.split(records, config.data, config.seed, say)
    teacher, student, geometry = networks(config, say)
    config = resolved(config, teacher, student, geometry)
    conversion = layouts.resolve_conversion(records)
    teacher.model.to(device)
    paired = taps.pair(find_taps(teacher.model, geometry.size, config.teacher.layers),
                       find_taps(student.model, geometry.size, config.student.layers))  # fmt: skip
    origin = {name: value.detach().clone() for name, value in student.model.state_dict().items()}
    students.adapt(student.model, config.student, config.seed)
    step = build_step(config, teacher, student, paired, device)
    source = pairs.PairSource(train, config.data, geometry, config.seed, (teacher.mean, teacher.std),
                              (student.mean, student.std), conversion)  # fmt: skip
    return Job(config, teacher, student, origin, step, source, train, held, geometry, conversion, device)


def networks(config: Config, say: Say) -> tuple[Network, Network, Geometry]:
    """Teacher and student at an input size that both take, and that geometry."""
    size = config.data.size
    name = config.student.name
    teacher = models.create(config.teacher.name, config.teacher.weights, size, config.seed)
    own = (teacher.name, "auto" if teacher.name == models.demo.NAME else config.teacher.weights)
    # The teacher's own name with no weights asked for: the student starts as the teacher does.
    weights = own[1] if not name and config.student.weights == "auto" else config.student.weights
    student = students.start(name or own[0], weights, size, config.seed)
    geometry = Geometry.make(config.data.geometry, size, math.lcm(patch(teacher), patch(student)))
    if geometry.size != tuple(size):
        say(f"network input {geometry.size[0]}x{geometry.size[1]}: whole patches of the {size[0]}x{size[1]} asked for")
        teacher = models.create(own[0], own[1], geometry.size, config.seed)
        student = students.start(name or own[0], weights, geometry.size, config.seed)
    for role, network in (("teacher", teacher), ("student", student)):
        say(f"{role}: {network.name}, weights {network.source}{_short(network.sha256)}")
    for notice in {network.notice for network in (teacher, student) if network.notice}:
        say(notice)
    return teacher, student, geometry


def _short(digest: str) -> str:
    return f" (sha256 {digest[:12]})" if digest else ""


def patch(network: Network) -> int:
    """What the input must be a multiple of: the patch of a plain ViT; 1 for networks that pad or resize themselves."""
    steps = reductions(network.model)
    return steps[0] if len(steps) == 1 else 1


def resolved(config: Config, teacher: Network, student: Network, geometry: Geometry) -> Config:
    """The settings with every automatic choice made, so that the file replays the run."""
    merge = config.student.merge
    if merge is None:
        merge = 0.5 if student.trained else 1.0
    if not student.trained and merge != 1:
        raise ConfigError(f"student.merge {merge} would mix in random weights; a student from random weights needs "
                          "student.merge 1 (--merge 1).")  # fmt: skip
    if config.student.merge is None or config.student.adapt == "auto":
        config = config.updated({"student.merge": merge, "student.adapt": students.way(student.model, config.student)})
    same = not config.student.name and config.student.weights == "auto"
    return config.updated({
        "teacher.name": teacher.name, "student.name": student.name,
        "student.weights": config.teacher.weights if same else config.student.weights,
        "data.size": list(geometry.size) if geometry.kind == "crop" else list(config.data.size),
    })  # fmt: skip


def build_step(
    config: Config, teacher: Network, student: Network, paired: list[taps.Paired], device: str
) -> DistillStep:
    """The module that the loop trains; what its loss does not reach is frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        match = taps.Match(paired, **distill.matching(config.loss.name))
        loss = distill.objective(config.loss, paired) if config.loss.name != distill.NONE else torch.nn.Identity()
    reader = Teacher(teacher.model, [t for t, _ in paired], config.teacher.norm)
    return DistillStep(student.model, match, loss, reader).to(device)


def ready(job: Job, say: Say) -> None:
    """Freeze what the loss does not reach, and match its gradient when asked: needs one batch."""
    config = job.config
    batch = first_batch(job)
    trained = [p for p in job.step.parameters() if p.requires_grad]
    if not trained:
        raise ConfigError(f"nothing to train with student.adapt {config.student.adapt}: no projector is needed here. "
                          "Use lora, full or last:K.")  # fmt: skip
    job.step.eval()  # no dropout, and no batch statistics moved, before the first step
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        out = job.step(batch)
        job.terms = frozenset(out["terms"])
        students.freeze_unused(job.step, out["loss"])
        if config.loss.match_gradient:
            reference = distill.objective(distill.reference(config.loss), job.paired).to(job.device)
            scale = job.step.match_gradient(reference, batch)
            say(f"loss scaled by {scale:.4g}: as long a gradient as {config.loss.match_gradient} at the first step")


def check(job: Job) -> None:
    """What would stop the run later stops it before anything is written. Raises FreqkdError."""
    settings = job.config.training
    if job.config.loss.name != distill.NONE:
        schedule.steps_per_epoch(len(job.train), settings.batch)
        metrics_file.check_trackers(settings.track)
    if job.held and settings.best not in METRICS:
        raise ConfigError(f'training.best "{settings.best}" is no metric of the held-out pairs.'
                          f"{nearest(settings.best, METRICS)} There are {', '.join(METRICS)}.")  # fmt: skip
    room = settings.cache_gb
    needed = teacher_cache.size_bytes([t for t, _ in job.paired], len(job.train)) / 1e9
    if room and needed > room:
        raise ConfigError(f"the teacher's features of {len(job.train)} pairs take {needed:.2g} GB, more than "
                          f"training.cache_gb {room:g}; allow more, or take fewer teacher.layers.")  # fmt: skip


def store_teacher(job: Job, say: Say) -> None:
    """With training.cache_gb, compute the teacher's features of the training pairs once, and read them from then on.

    Raises: CacheError when several processes would have to build them at once.
    """
    if not job.config.training.cache_gb or job.config.loss.name == distill.NONE:
        return
    computed, data = job.step.teacher, job.config.data
    assert isinstance(computed, Teacher)
    ids = [record.id for record in job.train]
    key = {"weights": job.teacher.sha256 or job.teacher.source, "network": job.teacher.name,
           "norm": job.config.teacher.norm, "size": job.geometry.size, "content": job.geometry.content,
           "geometry": job.geometry.kind, "mean": job.teacher.mean, "std": job.teacher.std,
           "input": data.teacher_input, "conversion": job.conversion,
           "data": teacher_cache.data_digest(job.train)}  # fmt: skip
    cache = teacher_cache.TeacherCache.under(teacher_cache.ROOT, key, computed.taps, ids)
    records = {record.id: record for record in job.train}

    def run(names: list[str], flipped: bool) -> Mapping[str, Tensor]:
        batch = job.source.plain([records[name] for name in names], flipped)
        return computed.images(batch["teacher"].to(job.device))

    if layers.process()[1] > 1:
        cache.read(ids[:1], False)  # says so when it is not there: two processes must not write it
    else:
        with terminal.counting("teacher's features", "pairs") as count:
            cache.build(run, count, say)

    def read(batch: Mapping[str, Any]) -> dict[str, Tensor]:
        if not records.keys() >= set(batch["ids"]):  # held-out pairs are not stored
            return computed(batch)
        return {tap: value.to(job.device) for tap, value in cache.read(batch["ids"], batch["flipped"]).items()}

    job.step.teacher = read


def first_batch(job: Job) -> dict[str, Any]:
    """What the first step sees at once."""
    count = min(micro(job.config), len(job.train))
    keys = [(0, int(i)) for i in engine.order(job.config.seed, 0, len(job.train))[:count]]
    return dict(schedule.on_device(job.source.batch(keys), job.device))


def validator(job: Job) -> Callable[[], dict[str, float]] | None:
    """The loss on held-out pairs, without augmentation; None when none are held out."""
    if not job.held:
        return None
    # A shorter last batch is another loss where the images of a batch are coupled.
    whole = micro(job.config) if distill.coupled(job.config.loss.name) else 1

    def evaluate() -> dict[str, float]:
        total, count = 0.0, 0
        job.step.eval()
        with torch.no_grad():
            for batch in job.source.evaluation_batches(job.held, micro(job.config)):
                size = len(batch["ids"])
                if size < min(whole, len(job.held)):
                    continue
                total += size * float(job.step(schedule.on_device(batch, job.device))["loss"])
                count += size
        job.step.train()
        return {"val/loss": total / count}

    return evaluate


def micro(config: Config) -> int:
    """Pairs a forward."""
    return max(1, config.training.batch // config.training.accumulate)


def run(config: Config, out: Path, resume: bool, say: Say, command: Sequence[str]) -> dict[str, Any]:
    """The whole job; returns what to print: run, steps, metrics, student, and the change on held-out pairs."""
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    commit = provenance.commit()
    first = layers.process()[0] == 0
    say = say if first else _silent
    if first:
        shards.check_place(out, resume, *settings_file.PLACE)  # before networks and pairs are read
    job = prepare(config, say)
    if config.loss.name != distill.NONE:
        ready(job, say)
    check(job)
    if first:
        settings_file.claim(out, job.config, resume, engine.MACHINE)
    store_teacher(job, say)
    outcome = train(job, out, resume, say)
    if not first:
        return {}
    state = students.merged(job.step.student, job.origin, float(job.config.student.merge or 0))
    export.save(job.step.student, state, out)
    loading = export.loading_lines(job.student.name, job.geometry.size, export.fixed_size(job.step.student))
    change = measure_change(job, state, out, command, say)
    sections = {
        "config": job.config.model_dump(mode="json"),
        "teacher": job.teacher.describe(), "student": job.student.describe(),
        "data": {"spec": job.config.data.spec, "train": len(job.train), "held": len(job.held),
                 "train_groups": len({r.group for r in job.train}), "held_groups": len({r.group for r in job.held}),
                 "train_ids": provenance.sha256_lines(r.id for r in job.train),
                 "held_ids": provenance.sha256_lines(r.id for r in job.held)},
        "taps": taps.describe(job.paired), "parameters": job.parameters(),
        "outcome": outcome, "heldout": change,
        "loading": loading,
        "student_sha256": provenance.sha256_file(out / export.STUDENT),
    }  # fmt: skip
    manifest = {"freqkd": __version__, "started": started, "commit": commit, "command": list(command),
                "seconds": round(time.monotonic() - clock, 1),
                "environment": provenance.environment(job.device, torch.get_num_threads())} | sections  # fmt: skip
    export.write_card(out, manifest)
    # Last: a run folder with a manifest is a finished one.
    schema.write_text(out / "manifest.json", json.dumps(provenance.plain(manifest), indent=1) + "\n")
    return {"run": str(out), "student": str(out / export.STUDENT), **outcome, "heldout": change}


def _silent(text: str) -> None:
    pass


def train(job: Job, out: Path, resume: bool, say: Say) -> dict[str, Any]:
    """The loop, unless the loss is `none`: then the student stays as it started."""
    if job.config.loss.name == distill.NONE or job.config.training.epochs == 0:
        say("nothing to train: the student stays as it started")
        return {"steps": 0, "metrics": {}, "best": None, "seconds": 0.0}
    done = engine.fit(job.step, job.source, job.config.training, job.config.seed, out, evaluate=validator(job),
                      resume=resume, say=say, expected=job.terms, fingerprint=job.fingerprint())  # fmt: skip
    return {"steps": done.steps, "metrics": done.last, "best": done.best, "seconds": round(done.seconds, 1)}


def measure_change(job: Job, state: Mapping[str, Tensor], out: Path, command: Sequence[str],
                   say: Say) -> list[dict[str, Any]]:  # fmt: skip
    """Held-out divergence of teacher(RGB) to student(IR), before and after; empty without held-out pairs."""
    if len(job.held) < 2:
        say("no held-out pairs: nothing is measured on them")
        return []
    config = job.config

    chosen = stratified(job.train, heldout.FIT_PAIRS, config.seed)
    seen = config.data.model_copy(update={"teacher_input": "rgb", "pairing": "paired"})
    source = pairs.PairSource(chosen, seen, job.geometry, config.seed, (job.teacher.mean, job.teacher.std),
                              (job.student.mean, job.student.std), job.conversion)  # fmt: skip

    def fit() -> Iterator[Mapping[str, Any]]:
        return source.evaluation_batches(chosen, micro(config))

    question = heldout.Question(job.teacher, job.paired, job.held, job.geometry, job.conversion, config.data.spec,
                                config.teacher.layers, config.teacher.norm, config.seed, job.device, fit)  # fmt: skip
    before = standing(job, job.origin, job.student.source)
    after = standing(job, state, f"{job.student.source}, distilled")
    return heldout.told(heldout.evaluate(question, before, after, out / "heldout", command))


def standing(job: Job, state: Mapping[str, Tensor], source: str) -> Network:
    """The student's plain network in this state, on the job's device."""
    blank = models.create(job.student.name, "random", job.geometry.size)
    blank.model.load_state_dict(dict(state))
    blank.model.to(job.device).eval()
    return replace(blank, source=source, trained=True, mean=job.student.mean, std=job.student.std)


def dry_run(job: Job, say: Say) -> dict[str, Any]:
    """Parameters, pairing, memory, disk and time from a few steps; nothing is written."""
    found: dict[str, Any] = {"pairs": len(job.train), "held_out": len(job.held),
                             "teacher": job.teacher.name, "student": job.student.name,
                             "adapt": job.config.student.adapt, "loss": job.config.loss.name,
                             "input": list(job.geometry.size), "parameters": job.parameters(),
                             "taps": taps.describe(job.paired)}  # fmt: skip
    if job.config.loss.name == distill.NONE:
        return found
    ready(job, say)
    trial = engine.trial(job.step, job.source, job.config.training, job.config.seed)
    kept = job.config.training.keep + (job.config.training.best != "" and bool(job.held))
    disk = kept * trial["checkpoint_bytes"] + 4 * job.parameters()["student"]
    return found | {"parameters": job.parameters(), **trial, "disk_bytes": disk}
