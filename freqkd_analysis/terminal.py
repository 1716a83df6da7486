"""What a command shows: talk and progress on stderr, data on stdout. Plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from freqkd_analysis.errors import FreqkdError
from freqkd_analysis.provenance import plain

PLAIN_SECONDS = 10.0
"""Without a terminal, one progress line in so many seconds."""


def say(text: str) -> None:
    """Talk to the user on stderr; stdout is for data."""
    print(text, file=sys.stderr, flush=True)


def run_app(app: Callable[..., Any], arguments: list[str] | None) -> None:
    """A command line to its end: errors of use become one line and their exit status; SIGTERM ends as Ctrl-C does."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        app(args=arguments)
    except FreqkdError as error:
        say(f"Error: {error}")
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        say(f"Error: {error.strerror or error}{where}. What was there before is whole.")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        say("stopped")
        raise SystemExit(130) from None


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def fresh_folder(resume: bool) -> Path:
    """runs/TIME-layers, or with `resume` the newest unfinished run there."""
    from freqkd_analysis.shards import unfinished

    if resume:
        return unfinished(Path("runs"))
    return Path("runs") / f"{datetime.now():%Y-%m-%d-%H%M%S}-layers"


@contextlib.contextmanager
def progress(total: int, kept: int = 0) -> Iterator[Callable[[int, str], None]]:
    """A bar of `total` pairs with pairs/s and time left; the callback takes pairs done and what is being done."""
    clock, done, last = time.monotonic(), 0, 0.0
    if not sys.stderr.isatty():

        def line(step: int, what: str) -> None:
            nonlocal done, last
            done += step
            passed = time.monotonic() - clock
            if passed - last >= PLAIN_SECONDS or done == total:
                last = passed
                left = (total - done) * passed / max(done, 1)
                say(f"{what}: {done}/{total}, {done / max(passed, 1e-9):.1f} pairs/s, {left:.0f} s left")

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
               TextColumn("{task.fields[rate]}", markup=False), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("pairs", total=total, rate="")

        def step(count: int, what: str) -> None:
            nonlocal done
            done += count
            rate = done / max(time.monotonic() - clock, 1e-9)
            bar.update(task, advance=count, description=what, rate=f"{rate:.1f} pairs/s")

        yield step


@contextlib.contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Progress for work that reports (done, in all)."""
    with contextlib.ExitStack() as stack:
        step: Callable[[int, str], None] | None = None
        before = 0

        def count(done: int, total: int) -> None:
            nonlocal step, before
            if step is None:
                step = stack.enter_context(progress(total))
            step(done - before, what)
            before = done

        yield count


def show(content: Any, as_json: bool) -> None:
    """Rows as a table, a mapping as lines; as JSON when asked."""
    if as_json:
        print(json.dumps(plain(content)))
        return
    if isinstance(content, dict):
        for name, value in content.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                print(f"{name}:")
                show(value, False)
            else:
                print(f"{name}: {value}")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in content[0] if content else ():
        table.add_column(Text(str(name)))
    for row in content:
        table.add_row(*(Text(f"{value:.4g}" if isinstance(value, float) else str(value)) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def print_run(run: Path) -> None:
    """The run's table on stdout (for the preset `paper` the released one too), on stderr where its files are."""
    from rich.console import Console

    from freqkd_analysis.console import console_table, released_table
    from freqkd_analysis.provenance import read_manifest

    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(console_table(run))
    manifest = read_manifest(run)
    if manifest["config"].get("preset") == "paper" and "paired" in manifest.get("conditions", {"paired": {}}):
        console.print(released_table(run))
    for name in ("ratio.csv", "figures", "report.html"):
        if (run / name).exists():
            say(f"{run / name}")
