"""What a user may see go wrong: one line each, with what was expected, what came, and the next step.

Everything raised for a user derives from `FreqkdError`; the command line prints its text and exits with
its `exit_code`, without a traceback. Errors of our own making stay plain `assert`s.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class FreqkdError(ValueError):
    """Wrong use or unusable input. Exit code 2."""

    exit_code = 2


class BandsError(FreqkdError):
    """A band specification that cannot be read, or a band that a grid cannot hold."""


class DataError(FreqkdError):
    """A data set, list or image that cannot be read as asked."""


class NetworkError(FreqkdError):
    """An unknown network or layer, or weights that do not fit it."""


class RunError(FreqkdError):
    """A run folder or table that is missing, taken, or of another schema."""


class NonFiniteError(FreqkdError):
    """NaN or infinity in features; the text names layer and pair."""


class CheckFailed(FreqkdError):
    """A check ran to its end and found something wrong. Exit code 1."""

    exit_code = 1


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """The closest of `known` as a ready phrase, or an empty string when nothing is close.

    cutoff: difflib's share of letters in common, 0 to 1, from which a name is close.

    Example:
        >>> nearest("resnet5O", ["resnet50", "vit_small"])
        ' Did you mean "resnet50"?'
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f' Did you mean "{close[0]}"?' if close else ""


def nearest_folder(path: Path) -> str:
    """The folder beside a missing one whose name is closest, as a ready phrase, or an empty string.

    Closer than `nearest` asks for: among the many short names beside a path, half of the letters are seldom meant.

    Example:
        >>> nearest_folder(Path("/nope")), nearest_folder(Path("/no/such/folder"))
        ('', '')
    """
    beside = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    return nearest(path.name, beside, 0.75)


def first(names: Iterable[str], n: int = 3) -> str:
    """The first `n` names and how many follow, for a one-line message.

    Example:
        >>> first(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
    """
    names = list(names)
    rest = len(names) - n
    return ", ".join(names[:n]) + (f" and {rest} more" if rest > 0 else "")
