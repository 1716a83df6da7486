"""The main job from options to a finished run folder: `freqkd-analyze layers`.

Set up network, taps and plan; measure the blocks that are not there yet; merge; then tables, figures and report from
the files. Everything after the merge needs no network and can be redone by its own command.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from freqkd_analysis import conditions, measure, models, plan, provenance, schema, shards, similarity
from freqkd_analysis.data import layouts
from freqkd_analysis.errors import CheckFailed, DataError, FreqkdError, RunError, nearest
from freqkd_analysis.features import find_taps, reductions
from freqkd_analysis.plan import Block, Machine, Plan, Settings

Say = Callable[[str], None]


def device_of(name: str) -> str:
    """The PyTorch device of `--device`: `auto`, `cpu`, `cuda` or `cuda:N`. Raises FreqkdError when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and process()[1] > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # one device a process
    kind = name.split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise FreqkdError(f'expected --device auto, cpu, cuda or cuda:N, got "{name}".{nearest(name, ("cpu", "cuda"))}')
    if kind == "cuda" and not torch.cuda.is_available():
        raise FreqkdError(f"--device {name}: this PyTorch sees no CUDA device. Use --device cpu; see `doctor`.")
    return name


@dataclass
class Job:
    """A run made ready: everything is checked, nothing measured, no file written."""

    settings: Settings
    plan: Plan
    bench: measure.Bench
    missing: list[str]

    def images(self, block: Block) -> int:
        """Images that a pair of this block sends through a network: the controls are many, so pairs tell no time."""
        if block.kind != "control":
            return 2
        return 2 + conditions.images_made(self.settings.conditions) + 2 * self.plan.wants("random")

    @property
    def work(self) -> int:
        """Steps of progress: images of every block."""
        return sum(self.images(block) * len(block.records) for block in self.plan.blocks)


def prepare(settings: Settings, machine: Machine, say: Say) -> Job:
    """Read the pairs, make network, taps and plan. Raises FreqkdError before anything is written."""
    missing: list[str] = []
    records = layouts.load(settings.data, on_missing=missing.extend)
    if missing:
        say(f"{len(missing)} pairs lack a file and are left out, first {missing[0]}")
    device = device_of(machine.device)
    network = models.create(settings.model, settings.weights, settings.size, settings.seed)
    if network.notice:
        say(network.notice)
    geometry = conditions.Geometry.make(settings.geometry, settings.size, _step(network))
    if geometry.size != tuple(network.size):
        weights = "auto" if network.name == models.demo.NAME and settings.model == "auto" else settings.weights
        network = models.create(network.name, weights, geometry.size, settings.seed)
        say(f"network input {geometry.size[0]}x{geometry.size[1]}: whole tokens of the {settings.size[0]}x"
            f"{settings.size[1]} asked for")  # fmt: skip
    settings = replace(settings, model=network.name)
    network.model.to(device)
    taps = find_taps(network.model, geometry.size, settings.layers)
    made = plan.make(records, settings)
    for note in made.notes:
        say(note)
    twin = None
    if "random" in settings.conditions and made.control:
        # Another draw where the network itself is random, or the twin would be the network.
        twin = models.create(network.name, "random", geometry.size, settings.seed + (not network.trained))
        twin.model.to(device)
    bench = measure.Bench(made, network, taps, geometry, layouts.resolve_conversion(records), twin, device,
                          machine.batch_size or (16 if device != "cpu" else 4), machine.workers)  # fmt: skip
    return Job(settings, made, bench, missing)


def _step(network: models.Network) -> int:
    """What the input must be a multiple of: the network's largest reduction (the patch of a plain ViT)."""
    return max(reductions(network.model), default=1)


PLACE = (f"{shards.FOLDER}/settings.json", "report.html")
"""The files that an interrupted and a finished run have."""


def claim_folder(run: Path, job: Job, resume: bool) -> None:
    """Make the run folder, or take up the run in it; its settings, pairs and weights must be the same."""
    note = run / shards.FOLDER / "settings.json"
    own = json.loads(json.dumps(asdict(job.settings)))
    del own["max_bad"]  # decides when to give up, no number
    own["ids"] = provenance.sha256_lines(record.id for record in job.plan.records)
    own["sha256"] = job.bench.network.sha256
    shards.check_place(run, resume, *PLACE)
    if resume:
        stored = json.loads(note.read_text())
        unlike = [name for name in own if stored.get(name) != own[name]]
        if unlike:
            raise RunError(f"{run} was started with {unlike[0]} = {stored.get(unlike[0])}, now {own[unlike[0]]}; "
                           "give the same options or another --out.")  # fmt: skip
        return
    schema.write_text(note, json.dumps(own, indent=1))


def process() -> tuple[int, int]:
    """(rank, world size) as torchrun sets them; (0, 1) without."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def joined(world: int):  # type: ignore[no-untyped-def]
    """A process group while several processes share a run; yields the barrier they meet at."""
    if world == 1:
        yield lambda: None
        return
    import torch.distributed as distributed

    distributed.init_process_group("gloo")
    try:
        yield distributed.barrier
    finally:
        distributed.destroy_process_group()


def measure_all(
    job: Job,
    run: Path,
    progress: measure.Progress,
    meet: Callable[[], None] = lambda: None,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Measure every block that has no shard yet: mean maps first, then the rest; blocks dealt out by `share`, which is
    (rank, processes)."""
    rank, world = share
    bad: set[str] = set()
    for kinds in (("mean",), ("main", "control")):
        mine = [block for block in job.plan.blocks if block.kind in kinds][rank::world]
        for block in mine:
            each = job.images(block)
            if shards.done(run, block.name):
                progress(each * len(block.records), "kept")
            else:
                measure.run_block(job.bench, block, run, lambda n, what, each=each: progress(each * n, what))  # type: ignore[misc]
            bad |= {skip["id"] for skip in shards.skipped(run, block.name)}
            _check_bad(job, bad)
        meet()


def _silent(step: int, what: str) -> None:
    pass


def _check_bad(job: Job, bad: Set[str]) -> None:
    if len(bad) > job.settings.max_bad:
        raise DataError(f"{len(bad)} pairs cannot be read, more than --max-bad {job.settings.max_bad}; first "
                        f"{min(bad)}. See them all: freqkd-analyze data verify {job.settings.data}")  # fmt: skip


def finish(job: Job, run: Path, began: dict[str, Any], seconds: float, machine: Machine) -> None:
    """Merge the shards into spectra.parquet and coherence.parquet and write the manifest.

    began: `started`, `commit` and `command`, as they were when the run began.
    """
    bench, names = job.bench, [block.name for block in job.plan.blocks if block.kind != "mean"]
    atoms = {layer: bands.atoms() for layer, bands in bench.bands.items()}
    lows, highs = ({layer: getattr(a, side) for layer, a in atoms.items()} for side in ("f_lo", "f_hi"))
    shards.merge(run, names, bench.taps, lows, highs, bench.modes())
    control = [block.name for block in job.plan.of_kind("control")]
    gathered = shards.gather(run, [block.name for block in job.plan.blocks])
    if control and job.settings.window != "dct":
        schema.write(shards.coherence(run, control, bench.taps, bench.bands), run / "coherence.parquet")
    wanted = [name for name in ("cka", "mmd") if getattr(job.settings, name)]
    if wanted:
        described, groups = shards.descriptors(run, control, bench.taps)
        names_of = {layer: bands.names for layer, bands in bench.bands.items()}
        rows = similarity.table(described, groups, names_of, wanted, job.settings.seed)
        schema.write(rows, run / "similarity.csv")
    how = {"device": bench.device, "workers": machine.workers, "batch_size": machine.batch_size or "auto"}
    config = asdict(job.settings) | how | {"ir_conversion": bench.conversion}
    used = [record for record in job.plan.records if record.id not in {skip["id"] for skip in gathered["skipped"]}]
    data = {"spec": job.settings.data, "n": len(used), "groups": len({r.group for r in used}),
            "control_n": len(job.plan.control), "skipped": gathered["skipped"], "missing": job.missing,
            "day": sum(r.time == "day" for r in used), "night": sum(r.time == "night" for r in used),
            "id_sha256": provenance.sha256_lines(r.id for r in used), **gathered["registration"],
            "input": bench.geometry.size, "blocks": job.plan.describe(), "notes": job.plan.notes}  # fmt: skip
    sections = {"config": config, "network": bench.network.describe(), "data": data,
                "taps": [tap.describe() | {"padded_tokens": bench.geometry.padded_tokens(tap.stride)}
                         for tap in bench.taps],
                "conditions": gathered["conditions"],
                "artefacts": gathered["artefacts"]}  # fmt: skip
    environment = provenance.environment(bench.device, torch.get_num_threads())
    made = provenance.manifest(sections, environment=environment, started=began["started"], seconds=seconds,
                               command=began["command"])  # fmt: skip
    provenance.write_manifest(run, made | {"commit": began["commit"]})


def tables_and_report(run: Path, say: Say = lambda text: None) -> dict[str, Any]:
    """Everything that follows from spectra.parquet: tables, figures, report, methods. Returns the verdict."""
    from freqkd_analysis.figures import write_figures
    from freqkd_analysis.methods_text import write_methods
    from freqkd_analysis.report import write_report
    from freqkd_analysis.summary import summarize

    say("tables")
    verdict = summarize(run)
    say("figures and report")
    write_figures(run)
    write_methods(run)
    write_report(run)
    return verdict


def run(settings: Settings, machine: Machine, out: Path, resume: bool, say: Say,
        progress: Callable[[int], contextlib.AbstractContextManager[measure.Progress]],
        command: Sequence[str]) -> dict[str, Any] | None:  # fmt: skip
    """The whole job. Returns the verdict, or None in a process that is not the first."""
    clock, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    began = {"started": started, "commit": provenance.commit(), "command": list(command)}  # not those of the end
    rank, world = process()
    with joined(world) as meet:
        if rank == 0:
            shards.check_place(out, resume, *PLACE)  # before the minutes that a network and its pairs may take
        job = prepare(settings, machine, say if rank == 0 else lambda text: None)
        if rank == 0:
            claim_folder(out, job, resume)
        meet()
        with progress(job.work) if rank == 0 else contextlib.nullcontext(_silent) as step:
            measure_all(job, out, step, meet, (rank, world))
        if rank != 0:
            return None
        finish(job, out, began, time.monotonic() - clock, machine)
    verdict = tables_and_report(out, say)
    shutil.rmtree(out / shards.FOLDER)
    return verdict


def dry_run(job: Job) -> dict[str, Any]:
    """Time, memory and disk from one batch, without writing."""
    bench, block = job.bench, job.plan.of_kind("main")[0]
    few = replace(block, records=block.records[: bench.batch])
    shard = shards.Shard()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    plain = replace(job.plan, blocks=tuple(b for b in job.plan.blocks if b.kind == "main"))
    trial = replace(bench, plan=plain, meters={})
    for _ in range(2):  # the first pays for cold caches
        clock = time.monotonic()
        shard = measure.main_block(trial, few, Path(), lambda n, text: None)
        seconds = time.monotonic() - clock
    if not shard.pairs["paired"]:
        raise CheckFailed(f"no pair of the first batch could be read: {shard.skipped[0]['reason']}")
    made = conditions.images_made(job.settings.conditions)
    each = seconds / (2 * len(few.records))
    state = sum(4 * meter.z[0].nelement() * 4 for meter in bench.meters.values())
    rows = sum(int((meter.modes > 0).sum()) for meter in bench.meters.values())
    per_pair = 4 * job.plan.describe()["main"] + (made + 3) * job.plan.describe()["control"]
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    memory = torch.cuda.max_memory_allocated() if bench.device != "cpu" else peak
    return {"pairs": len(job.plan.records), "groups": len({r.group for r in job.plan.records}), "images": job.work,
            "network": bench.network.name, "weights": bench.network.source, "input": list(bench.geometry.size),
            "layers": [{"layer": t.layer, "tap": t.tap, "grid": list(t.grid), "stride": t.stride,
                        "channels": t.channels, "modes": bench.bands[t.layer].modes.tolist()} for t in bench.taps],
            "seconds": round(job.work * each, 1), "memory_bytes": int(memory + state),
            "disk_bytes": int(rows * per_pair * 40), "batch_size": bench.batch, "device": bench.device}  # fmt: skip
