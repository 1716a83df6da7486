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
from typing import TYPE_CHECKING, Any

from freqkd_analysis.errors import FreqkdError, first
from freqkd_analysis.provenance import plain

if TYPE_CHECKING:
    from rich.table import Table

PLAIN_SECONDS = 10.0
"""Without a terminal, one progress line in so many seconds."""


_ROWS = 100
"""Decides nothing in print, but without it rich takes no width for a terminal that calls itself dumb."""


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
        name = error.filename2 or error.filename  # of a rename, the place that the user named
        where = f" ({name})" if name else ""
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
def progress(total: int, unit: str = "images") -> Iterator[Callable[[int, str], None]]:
    """A bar of `total` steps with their rate and the time left; the callback takes steps done and what is being done.

    unit: what a step is, in the plural.
    """
    clock, done, last = time.monotonic(), 0, 0.0
    if not sys.stderr.isatty():

        def line(step: int, what: str) -> None:
            nonlocal done, last
            done += step
            passed = time.monotonic() - clock
            if passed - last >= PLAIN_SECONDS or done == total:
                last = passed
                left = (total - done) * passed / max(done, 1)
                say(f"{what}: {done}/{total} {unit}, {done / max(passed, 1e-9):.1f} a second, {left:.0f} s left")

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
               TextColumn("{task.fields[rate]}", markup=False), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(unit, total=total, rate="")

        def step(count: int, what: str) -> None:
            nonlocal done
            done += count
            rate = done / max(time.monotonic() - clock, 1e-9)
            bar.update(task, advance=count, description=what, rate=f"{unit}, {rate:.1f} a second")

        yield step


@contextlib.contextmanager
def counting(what: str, unit: str = "images") -> Iterator[Callable[[int, int], None]]:
    """Progress for work that reports (done, in all); unit as for `progress`."""
    with contextlib.ExitStack() as stack:
        step: Callable[[int, str], None] | None = None
        before = 0

        def count(done: int, total: int) -> None:
            nonlocal step, before
            if step is None:
                step = stack.enter_context(progress(total, unit))
            step(done - before, what)
            before = done

        yield count


def _line(name: str, value: Any) -> str:
    """A value for people: bytes in GB, seconds also in minutes or hours; `--json` keeps the plain number."""
    if name.endswith("_bytes"):
        return f"{name.removesuffix('_bytes')}: {value / 1e9:.3g} GB"
    if name == "seconds":
        return f"time: {duration(value)}"
    return f"{name}: {value}"


def duration(seconds: float) -> str:
    """A time in the unit that people would take.

    Example:
        >>> duration(19.1), duration(226.4), duration(8000)
        ('19 s', '3.8 min', '2.2 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


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
                print(_line(name, value))
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


def needed(table: Table) -> int:
    """Columns that a table takes with every cell whole: a number cut short is another number.

    Example:
        >>> from rich.table import Table
        >>> needed(Table("low", "high"))
        14
    """
    from rich.console import Console

    return Console(width=1000, height=_ROWS).measure(table).maximum


def print_run(run: Path) -> None:
    """The run's table on stdout (for the preset `paper` the released one too), on stderr where its files are."""
    from rich.console import Console

    from freqkd_analysis.console import console_table, released_table
    from freqkd_analysis.provenance import read_manifest

    width = Console().width if sys.stdout.isatty() else 160
    table = console_table(run)
    if needed(table) > width:
        table = console_table(run, narrow=True)
    Console(width=max(width, needed(table)), height=_ROWS).print(table)
    manifest = read_manifest(run)
    if manifest["config"].get("preset") == "paper" and "paired" in manifest.get("conditions", {"paired": {}}):
        released = released_table(run)
        Console(width=max(width, needed(released)), height=_ROWS).print(released)
    if left_out := manifest["data"].get("skipped"):
        say(f"left out, as they cannot be read: {first(one['id'] for one in left_out)}; why: report.html")
    for name in ("ratio.csv", "figures", "report.html"):
        if (run / name).exists():
            say(f"{run / name}")
