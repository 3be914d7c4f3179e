"""Probes, their results, and the statistics made of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trimkv_core.evaluation.measures import Measure, estimate, mean, ratio
from trimkv_core.evaluation.tasks import Probe, ProbeError, ProbeResult, Span, matches


def test_a_span_without_a_position_before_it_is_refused() -> None:
    for start, stop in ((0, 2), (3, 3)):
        with pytest.raises(ProbeError, match="1 ≤ start < stop"):
            Span(start, stop)


def test_spans_that_overlap_or_leave_the_sequence_are_refused() -> None:
    for spans in ((Span(1, 4), Span(3, 5)), (Span(4, 9),), (Span(5, 6), Span(1, 2))):
        with pytest.raises(ProbeError, match="in order, apart and within 8"):
            Probe(tuple(range(8)), spans)


def test_matches_are_whole_spans() -> None:
    probe = Probe((5, 6, 7, 8, 9, 10), (Span(1, 3), Span(4, 6)))
    assert list(probe.positions()) == [1, 2, 4, 5]
    assert matches(probe, ProbeResult((0.0,) * 4, (6, 7, 9, 11), 1.0)) == [True, False]
    assert matches(probe, ProbeResult((0.0,) * 4, (6, 0, 9, 10), 1.0)) == [False, True]
    with pytest.raises(ProbeError, match="got 3 answers"):
        matches(probe, ProbeResult((0.0,) * 3, (6, 7, 9), 1.0))


def test_perplexity_is_the_exponential_of_the_mean_over_tokens() -> None:
    measures = [
        Measure("nll", "a", (20.0, 5.0), (10, 5)),
        Measure("nll", "b", (3.0,), (1,)),
        Measure("kl", "a", (9.0,), (1,)),
    ]
    found = mean(measures, "nll", transform=np.exp)
    assert found.value == pytest.approx(math.exp(28 / 16))
    assert found.low < found.value < found.high


def test_the_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        values = rng.normal(2.0, 1.0, 60)
        found = estimate([values, np.ones(60)], lambda s, c: s / c)
        assert found.value == pytest.approx(values.mean())
        covered += found.low <= 2.0 <= found.high
    assert 88 <= covered <= 100


def test_a_paired_ratio_is_narrower_than_what_both_vary_by() -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(300.0, 80.0, 40)
    dense = [Measure("nll", "a", tuple(base), (100,) * 40)]
    worse = [Measure("nll", "a", tuple(base + 10.0 + rng.normal(0, 0.5, 40)), (100,) * 40)]
    found = ratio(worse, dense, "nll", is_log=True)
    assert found.value == pytest.approx(math.exp(0.1), rel=0.01)
    assert found.high - found.low < 0.01
    alone = mean(dense, "nll", transform=np.exp)
    assert alone.high - alone.low > 1.0


def test_other_observations_are_not_paired() -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        ratio([Measure("nll", "a", (1.0,), (2,))], [Measure("nll", "a", (1.0,), (3,))], "nll")


def test_a_ratio_to_nothing_is_no_number() -> None:
    found = ratio([Measure("correct", "a", (1.0,), (1,))], [Measure("correct", "a", (0.0,), (1,))], "correct")
    assert math.isnan(found.value)
