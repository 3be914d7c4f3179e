"""How close a method stays to the dense model: divergence of next-token distributions, and greedy continuations.

The dense model reads and continues the same tokens first; its distributions are kept in half precision on the host,
whose rounding moves a token's divergence by some 1e-4 nats either way, and a mean over 1,000 tokens by less than 1e-5.
Knows no methods.

Letters: T predicted tokens, n of them at once, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimkv_core.evaluation.feeding import Answerer, Reader
from trimkv_core.evaluation.measures import Measure
from trimkv_core.evaluation.perplexity import BLOCK_TOKENS, Excerpt
from trimkv_core.evaluation.tasks import Probe, ProbeResult, Span


@dataclass(frozen=True, slots=True)
class _Reference:
    """What the dense model said.

    Attributes:
        log_probs: float16 [T, V] a probe.
        results: of the probes.
        continued: greedy tokens a prompt.
    """

    log_probs: list[Tensor]
    results: list[ProbeResult]
    continued: list[tuple[int, ...]]


class AgreementTask:
    """Agreement with the dense model on the starts of excerpts.

    Args:
        excerpts: the first of every source is used.
        tokens: of it that are read, and prompt a greedy continuation.
        new_tokens: of the continuation.
        make_dense: the dense reader; called once, when it is needed.
    """

    name = "agreement"

    def __init__(
        self, excerpts: Sequence[Excerpt], *, tokens: int, new_tokens: int, make_dense: Callable[[], Reader]
    ) -> None:
        first = {excerpt.source: excerpt.ids[:tokens] for excerpt in reversed(excerpts)}
        self.sources = tuple(reversed(first))
        self.new_tokens = new_tokens
        self.probes = tuple(Probe(first[source], (Span(1, len(first[source])),)) for source in self.sources)
        self._make_dense = make_dense
        self._reference: _Reference | None = None

    def run(self, answerer: Answerer) -> tuple[list[Measure], float]:
        """Measures and peak entries: `same_best` for anyone, `kl`, `greedy_prefix` and `greedy_exact` for readers."""
        reference = self._dense()
        if not isinstance(answerer, Reader):
            results = answerer.answer(self.probes)
            return self._same_best(results, reference), _peak(results)
        divergence: list[list[float]] = [[] for _ in self.probes]

        def compare(number: int, start: int, logits: Tensor) -> None:
            dense = reference.log_probs[number][start : start + logits.shape[0]].to(logits.device).float()
            found = torch.log_softmax(logits, -1)
            divergence[number].extend((dense.exp() * (dense - found)).sum(-1).tolist())

        results = answerer.answer(self.probes, compare)
        measures = [_in_blocks("kl", source, values) for source, values in zip(self.sources, divergence, strict=True)]
        measures += self._same_best(results, reference)
        continued = answerer.generate([probe.ids for probe in self.probes], self.new_tokens)
        measures += self._greedy(continued, reference)
        return measures, _peak(results)

    def _dense(self) -> _Reference:
        if self._reference is None:
            reader = self._make_dense()
            parts: list[list[Tensor]] = [[] for _ in self.probes]

            def keep(number: int, start: int, logits: Tensor) -> None:
                parts[number].append(torch.log_softmax(logits, -1).half().cpu())

            results = reader.answer(self.probes, keep)
            continued = reader.generate([probe.ids for probe in self.probes], self.new_tokens)
            self._reference = _Reference([torch.cat(part) for part in parts], results, continued)
        return self._reference

    def _same_best(self, results: Sequence[ProbeResult], reference: _Reference) -> list[Measure]:
        pairs = zip(self.sources, results, reference.results, strict=True)
        return [
            _in_blocks("same_best", source, [float(a == b) for a, b in zip(found.best, dense.best, strict=True)])
            for source, found, dense in pairs
        ]

    def _greedy(self, continued: Sequence[tuple[int, ...]], reference: _Reference) -> list[Measure]:
        prefixes = [
            next((n for n, (a, b) in enumerate(zip(found, dense, strict=True)) if a != b), len(dense))
            for found, dense in zip(continued, reference.continued, strict=True)
        ]
        exact = tuple(float(prefix == self.new_tokens) for prefix in prefixes)
        return [
            Measure("greedy_prefix", "all", tuple(map(float, prefixes)), (self.new_tokens,) * len(prefixes)),
            Measure("greedy_exact", "all", exact, (1,) * len(exact)),
        ]


def _in_blocks(metric: str, source: str, values: Sequence[float]) -> Measure:
    blocks = [values[at : at + BLOCK_TOKENS] for at in range(0, len(values), BLOCK_TOKENS)]
    return Measure(metric, source, tuple(map(sum, blocks)), tuple(map(len, blocks)), len(values) + 1)


def _peak(results: Sequence[ProbeResult]) -> float:
    return max(result.peak_entries for result in results)
