"""What the parts of a model keep and work with in a step, in bytes, for any number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Activations", "Spans"]


@dataclass(frozen=True)
class Spans:
    """Bytes by part (stem, blocks, head), gradients left out.

    Attributes:
        kept: what the part's forward pass leaves behind for its backward pass.
        forward, backward: the most that is there while the part runs, beyond what the parts below it keep (forward),
            and beyond what it and they keep (backward).
        leaving: the hidden state that leaves it; of the head 0.
    """

    kept: tuple[float, ...]
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    leaving: tuple[float, ...]


@dataclass(frozen=True)
class Activations:
    """:class:`Spans` of any number of rows: ``fixed`` plus ``per_row`` for each."""

    fixed: Spans
    per_row: Spans

    @classmethod
    def through(cls, few: Spans, less: int, many: Spans, rows: int) -> Activations:
        """The line through what was measured with ``less`` and with ``rows`` samples; from zero, where both are one."""
        lines = [_line(a, less, b, rows) for a, b in zip(_values(few), _values(many), strict=True)]
        fixed, per_row = ([line[side] for line in lines] for side in (0, 1))
        return cls(Spans(*fixed), Spans(*per_row))

    def of(self, rows: int) -> Spans:
        both = zip(_values(self.fixed), _values(self.per_row), strict=True)
        return Spans(*(tuple(f + rows * p for f, p in zip(fixed, per_row, strict=True)) for fixed, per_row in both))


def _values(spans: Spans) -> tuple[tuple[float, ...], ...]:
    return spans.kept, spans.forward, spans.backward, spans.leaving


def _line(
    few: Sequence[float], less: int, many: Sequence[float], rows: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    slopes = [max(0.0, b - a) / (rows - less) if less < rows else b / rows for a, b in zip(few, many, strict=True)]
    return tuple(max(0.0, b - rows * slope) for b, slope in zip(many, slopes, strict=True)), tuple(slopes)
