"""Cells and tables of RESULTS.md that more than one of its sections writes."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import Any


def markdown(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table.

    Example:
        >>> print(markdown(["run", "n"], [["vit", 500]]))
        | run | n |
        |---|---|
        | vit | 500 |
    """
    head = list(head)
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    joined = ["|" + "|".join(line) + "|" if i == 1 else "| " + " | ".join(line) + " |" for i, line in enumerate(lines)]
    return "\n".join(joined)


def commit(text: str | None) -> str:
    """Ten digits of a commit, `+changes` where files differed from it."""
    head, _, changed = (text or "").partition("+")
    return f"`{head[:10]}`{'+' + changed if changed else ''}" if head else "not recorded"


def options(words: Iterable[str]) -> list[str]:
    """A command cut before every option, each piece one text.

    Example:
        >>> options(["tool", "run", "--size", "168", "--flag", "--out", "a b"])
        ['tool run', '--size 168', '--flag', "--out 'a b'"]
    """
    pieces: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            pieces.append([])
        pieces[-1].append(word)
    return [shlex.join(piece) for piece in pieces]
