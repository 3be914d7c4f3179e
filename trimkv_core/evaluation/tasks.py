"""What every method answers: a token sequence is read under the regime, and some of its tokens are predicted.

Perplexity, recall and conversations are all put together from probes and their results. Knows no model and no method.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


class ProbeError(ValueError):
    """Probes or results that contradict themselves or each other."""


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens that are predicted, each by the logits at the position before it.

    Attributes:
        start: first one, at least 1.
        stop: one past the last.
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 1 <= self.start < self.stop:
            raise ProbeError(f"span {self.start}…{self.stop}: 1 ≤ start < stop is needed")


@dataclass(frozen=True, slots=True)
class Probe:
    """One sequence, read with its own tokens as input whatever is predicted (teacher-forced).

    Attributes:
        ids: its tokens.
        spans: which of them are predicted, in order and apart.
    """

    ids: tuple[int, ...]
    spans: tuple[Span, ...]

    def __post_init__(self) -> None:
        end = 0
        for span in self.spans:
            if span.start < end or span.stop > len(self.ids):
                raise ProbeError(f"spans must be in order, apart and within {len(self.ids)} tokens: {self.spans}")
            end = span.stop

    def positions(self) -> Iterator[int]:
        """Positions of the predicted tokens."""
        for span in self.spans:
            yield from range(span.start, span.stop)

    @property
    def num_predicted(self) -> int:
        """How many tokens are predicted."""
        return sum(span.stop - span.start for span in self.spans)


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What a method made of a probe, flattened over its spans.

    Attributes:
        nll: negative log-likelihood of each predicted token, nats.
        best: the likeliest token at each predicted position.
        peak_entries: the most entries a stream held, the mean over the streams where they differ.
    """

    nll: tuple[float, ...]
    best: tuple[int, ...]
    peak_entries: float


def matches(probe: Probe, result: ProbeResult) -> list[bool]:
    """For each span, whether the likeliest token was the right one at every position.

    Raises:
        ProbeError: the result is another probe's.
    """
    if len(result.best) != probe.num_predicted:
        raise ProbeError(f"a probe of {probe.num_predicted} predicted tokens got {len(result.best)} answers")
    flags, at = [], 0
    for span in probe.spans:
        stop = at + span.stop - span.start
        flags.append(result.best[at:stop] == probe.ids[span.start : span.stop])
        at = stop
    return flags
