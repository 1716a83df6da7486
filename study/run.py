"""Do the runs behind RESULTS.md that are not there yet, one after another: most of a day on two cores.

    python study/run.py                      # all
    python study/run.py 'vit*' lite0         # those whose names match
    python study/run.py --list               # each name with what became of it, and its command

A run lies in runs/NAME. One that was interrupted goes on, and a finished one is left alone: the same call goes on where
the last one stopped. Data and weights are those of the folder that FREQKD_TEST_DATA names.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from fnmatch import fnmatch

import jobs
from jobs import ALL, EXCLUDE, TRAIN, Job

from freqkd_analysis.data import layouts, listing
from freqkd_analysis.errors import FreqkdError, nearest
from freqkd_analysis.terminal import run_app, say
from freqkd_train import config, pairs


def lists() -> None:
    """Write the lists of pairs that runs take: those outside the benchmarks' validation lists, and of these the ones in
    the groups that the small distillations train on."""
    records = layouts.load(f"kit:{jobs.data()}/data/pairs")
    settings = config.Data(holdout=0.2, exclude=str(EXCLUDE))
    away = pairs.excluded(EXCLUDE, records, say)
    listing.write_pairs(ALL, [record for record in records if record.id not in away])
    listing.write_pairs(TRAIN, pairs.split(records, settings, 0, say)[0])


def chosen(words: Sequence[str], every: Sequence[Job]) -> list[Job]:
    """The jobs whose names match one of `words`; all without words.

    Raises: FreqkdError for a word that matches none.
    """
    for word in words:
        if not any(fnmatch(job.name, word) for job in every):
            raise FreqkdError(f'no run "{word}".{nearest(word, [job.name for job in every])} `--list` tells all.')
    return [job for job in every if not words or any(fnmatch(job.name, word) for word in words)]


def main(args: list[str]) -> None:
    listed = args == ["--list"]
    todo = chosen([] if listed else args, jobs.jobs())
    if listed:
        for job in todo:
            print("done" if job.done() else "to do", job.name, shlex.join(job.command()), sep="\t")
        return
    left = [job for job in todo if not job.done()]
    say(f"{len(todo)} runs, {len(todo) - len(left)} of them there already")
    if left:
        lists()
    for number, job in enumerate(left, start=1):
        say(f"[{number}/{len(left)}] {job.name}")
        status = subprocess.run(job.command(), check=False).returncode
        if status:
            raise FreqkdError(
                f"{job.name} ended with status {status}, as told above; the same call goes on from there."
            )


if __name__ == "__main__":
    run_app(main, sys.argv[1:])
