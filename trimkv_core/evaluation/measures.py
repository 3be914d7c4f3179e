"""What was observed, and what it says with which certainty: means, ratios and bootstrap confidence intervals.

Pure functions over numbers. Knows no methods and no tasks.

Letters: B observations (blocks of text, or cases), R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
CONFIDENCE = 0.95

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Measure:
    """Observations of one kind that one method at one budget made.

    Attributes:
        metric: what was observed, such as `nll`, `correct`.
        group: where: a text's name, a kind of question.
        length: tokens of the sequences; 0 where they differ.
        depth: of what was asked for, 0 (start) to 1; None where there is none.
        sums: of each observation, over its tokens.
        counts: tokens of each observation.
    """

    metric: str
    group: str
    sums: tuple[float, ...]
    counts: tuple[int, ...]
    length: int = 0
    depth: float | None = None


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with a confidence interval of 95 %."""

    value: float
    low: float
    high: float


def pooled(measures: Sequence[Measure], metric: str) -> tuple[Floats, Floats]:
    """Sums and counts of all observations of a metric, in order: float64 [B] each."""
    chosen = [measure for measure in measures if measure.metric == metric]
    sums = [value for measure in chosen for value in measure.sums]
    counts = [float(value) for measure in chosen for value in measure.counts]
    return np.array(sums), np.array(counts)


def mean(measures: Sequence[Measure], metric: str, *, transform: Callable[[Floats], Floats] | None = None) -> Estimate:
    """The mean over all tokens of a metric, `transform`ed (for perplexity: `np.exp`)."""
    sums, counts = pooled(measures, metric)
    return estimate([sums, counts], lambda s, c: _identity_or(transform)(s / c))


def ratio(measures: Sequence[Measure], dense: Sequence[Measure], metric: str, *, is_log: bool = False) -> Estimate:
    """A method's mean over the dense one's; observations are paired.

    Args:
        measures, dense: of the same probes.
        metric: which.
        is_log: the metric is a logarithm: the ratio is that of the exponentials.

    Raises:
        ValueError: not the same observations.
    """
    sums, counts = pooled(measures, metric)
    dense_sums, dense_counts = pooled(dense, metric)
    if counts.shape != dense_counts.shape or not np.array_equal(counts, dense_counts):
        raise ValueError(f"{metric}: {counts.size} observations cannot be paired with {dense_counts.size}")
    if is_log:
        return estimate([sums, dense_sums, counts], lambda s, d, c: np.exp((s - d) / c))
    return estimate([sums, dense_sums], lambda s, d: s / np.where(d > 0, d, np.nan))


def estimate(columns: Sequence[Floats], statistic: Callable[..., Floats], *, seed: int = 0) -> Estimate:
    """A statistic of column sums, and its percentile bootstrap interval over the observations.

    Args:
        columns: float64 [B] each; an observation is one row of all of them.
        statistic: of the columns' sums, each float64 [R] (or [1]).
        seed: of the resampling.

    Raises:
        ValueError: no observations.
    """
    size = columns[0].size
    if size == 0:
        raise ValueError("no observations")
    value = float(statistic(*(column.sum(keepdims=True) for column in columns))[0])
    draws = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), RESAMPLES).astype(np.float64)
    spread = statistic(*(draws @ column for column in columns))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(spread, [tail, 1 - tail]) if not np.isnan(spread).all() else (np.nan, np.nan)
    return Estimate(value, float(low), float(high))


def _identity_or(transform: Callable[[Floats], Floats] | None) -> Callable[[Floats], Floats]:
    return transform if transform is not None else lambda values: values
