"""results/ -> the tables of RESULTS.md, each between two comments that name it. No number is typed by hand.

    python study/page.py RESULTS.md

A table stands between `<!-- table NAME -->` and `<!-- end NAME -->`; what is outside stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import differ
import trained
from outputs import main

from freqkd_analysis import schema
from freqkd_analysis.errors import FreqkdError, first, nearest

TABLES: dict[str, Callable[[], str]] = {table.__name__: table for table in (
    differ.account, differ.ratios, differ.floors, differ.script, differ.layers, differ.windows, differ.controls,
    differ.subsets, differ.displacement, differ.commands,
    trained.heldout, trained.shared, trained.arms, trained.downstream, trained.downstream_runs, trained.students,
    trained.detectors,
)}  # fmt: skip


def filled(text: str) -> str:
    """`text` with every named table written anew. Raises: FreqkdError for an unknown or unclosed name."""

    def table(found: re.Match[str]) -> str:
        name = found.group(1)
        if name not in TABLES:
            raise FreqkdError(f'no table "{name}"; known: {first(TABLES, 12)}.{nearest(name, TABLES)}')
        return f"<!-- table {name} -->\n\n{TABLES[name]()}\n\n<!-- end {name} -->"

    pattern = re.compile(r"<!-- table (\S+) -->.*?<!-- end \1 -->", re.DOTALL)
    if len(pattern.findall(text)) != text.count("<!-- table "):
        raise FreqkdError("a `<!-- table NAME -->` has no `<!-- end NAME -->`.")
    return pattern.sub(table, text)


def body(words: list[str]) -> None:
    path = Path(words[0])
    schema.write_text(path, filled(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main(body, "python study/page.py RESULTS.md")
