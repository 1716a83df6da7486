"""The protocol card: what a figure was measured on and how. Figures with unlike cards are not to be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from freqkd_analysis.errors import FreqkdError


class CardError(FreqkdError):
    """Results under different protocols, or a card that cannot be read."""


@dataclass(frozen=True)
class Card:
    """Every choice that moves a figure.

    Example:
        >>> card = Card("kaist", "improved", "ab12", "test", 2252, "Reasonable", ("person",), metric="miss rate")
        >>> Card.read(card.as_dict()) == card
        True
    """

    data_set: str
    annotation_set: str
    annotation_sha256: str
    split: str
    frames: int
    """Images counted, those without boxes or detections too."""
    ignore_rule: str
    classes: tuple[str, ...]
    policy: str = ""
    """What became of labels that are no plain class (person?, people, cyclist)."""
    box_source: str = ""
    """The image the annotated boxes were drawn on: infrared, visible, both; empty when the file does not say."""
    max_detections: tuple[int, ...] = ()
    """Detections used for an image (and class), a number for each metric."""
    thresholds: tuple[float, ...] = ()
    """Overlaps at which a detection counts as right."""
    metric: str = ""
    """Names and variants of the metrics."""

    def as_dict(self) -> dict[str, Any]:
        """Plain types, as they stand in a result file."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def read(cls, content: Mapping[str, Any], where: str = "the result") -> Card:
        """The card in a result file; CardError when fields are missing or unknown."""
        names = {field.name for field in fields(cls)}
        if not isinstance(content, Mapping) or set(content) != names:
            missing = sorted(names - set(content)) if isinstance(content, Mapping) else sorted(names)
            raise CardError(
                f"{where} holds no whole protocol card (missing: {', '.join(missing) or 'nothing'}); "
                "was it written by another version? Evaluate again."
            )
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
        }
        return cls(**values)


_SETTLED = ("data_set", "annotation_set", "split", "box_source")
"""Names of annotations whose content the digest tells: a file and a folder of the same boxes go by two names."""


def differences(a: Card, b: Card) -> dict[str, tuple[Any, Any]]:
    """Fields that differ: name -> (in a, in b). What annotations are called is no difference where their digests agree.

    Example:
        >>> a = Card("kaist", "improved", "ab12", "test", 2252, "Reasonable", ("person",))
        >>> differences(a, Card("kaist", "improved", "ab12", "test", 2252, "all boxes", ("person",)))
        {'ignore_rule': ('Reasonable', 'all boxes')}
    """
    of_a, of_b = a.as_dict(), b.as_dict()
    settled = _SETTLED if a.annotation_sha256 and a.annotation_sha256 == b.annotation_sha256 else ()
    return {name: (of_a[name], of_b[name]) for name in of_a if of_a[name] != of_b[name] and name not in settled}


def require_alike(cards: Sequence[Card], names: Sequence[str], force: bool = False) -> str:
    """An empty text when all cards agree with the first; otherwise CardError, or with `force` the differences as text.

    Args:
        names: what to call each result in the message.
    """
    lines = []
    for card, name in zip(cards[1:], names[1:], strict=True):
        for field, (one, other) in differences(cards[0], card).items():
            lines.append(f"{field}: {one!r} in {names[0]}, {other!r} in {name}")
    if lines and not force:
        raise CardError(f"results under different protocols: {'; '.join(lines)}. --force compares them all the same.")
    return "\n".join(lines)
