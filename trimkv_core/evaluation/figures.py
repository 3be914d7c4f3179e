"""From rows to the figures a table or plot shows. Pure; knows neither.

A row's figures are its own means and, against the dense row of the same task, paired ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from trimkv_core.evaluation.conversation import QUESTIONS
from trimkv_core.evaluation.measures import Estimate, Measure, mean, ratio
from trimkv_core.evaluation.rows import Row

Join = Callable[[Sequence[Measure]], Sequence[Measure]]


@dataclass(frozen=True, slots=True)
class Column:
    """One figure of a task.

    Attributes:
        name: what heads it.
        read: the figure of a row, given the dense row's measures; None where there is none.
        digits: shown.
        best: the best of some values: `min`, `max`, or None where none is better.
    """

    name: str
    read: Callable[[Row, Row | None], Estimate | None]
    digits: int
    best: Callable[[Iterable[float]], float] | None


def columns_of(task: str, rows: Sequence[Row]) -> list[Column]:
    """The columns of a task's table."""
    if task == "text":
        sources = dict.fromkeys(measure.group for row in rows for measure in row.measure("nll"))
        return [
            Column("perplexity", _perplexity(None), 2, min),
            Column("× dense", _ratio("nll", is_log=True), 3, min),
            *(Column(source, _perplexity(source), 2, min) for source in sources),
        ]
    if task == "recall":
        return [
            Column("passkey", _mean("correct", "passkey"), 2, max),
            Column("key-value", _mean("correct", "key-value"), 2, max),
            Column("both", _mean("correct"), 2, max),
            Column("× dense", _ratio("correct"), 2, max),
        ]
    if task == "conversation":
        whole = partial(_together, size=QUESTIONS)
        return [
            Column("correct", _mean("correct", join=whole), 2, max),
            Column("× dense", _ratio("correct", join=whole), 2, max),
        ]
    return [
        Column("KL, nats", _mean("kl"), 3, min),
        Column("same likeliest token", _mean("same_best"), 3, max),
        Column("greedy tokens before the first other, share", _mean("greedy_prefix"), 2, max),
        Column("greedy all equal", _mean("greedy_exact"), 2, max),
    ]


def by_length_and_depth(row: Row) -> dict[str, float]:
    """Recall of a row, kinds together, by length (`512 tokens`) and by depth (`depth 0.1`)."""
    measures = row.measure("correct")
    lengths = sorted({measure.length for measure in measures})
    depths = sorted({measure.depth for measure in measures if measure.depth is not None})
    figures = {f"{length:,} tokens": [m for m in measures if m.length == length] for length in lengths}
    figures |= {f"depth {depth:g}": [m for m in measures if m.depth == depth] for depth in depths}
    return {name: mean(chosen, "correct").value for name, chosen in figures.items()}


def _perplexity(source: str | None) -> Callable[[Row, Row | None], Estimate | None]:
    return lambda row, dense: _of(row.measure("nll", source), lambda m: mean(m, "nll", transform=np.exp))


def _together(measures: Sequence[Measure], *, size: int) -> Sequence[Measure]:
    """Every `size` observations as one: answers of one conversation stand or fall together, so it is drawn whole."""
    return [
        replace(
            measure,
            sums=tuple(sum(measure.sums[at : at + size]) for at in range(0, len(measure.sums), size)),
            counts=tuple(sum(measure.counts[at : at + size]) for at in range(0, len(measure.counts), size)),
        )
        for measure in measures
    ]


def _apart(measures: Sequence[Measure]) -> Sequence[Measure]:
    return measures


def _mean(
    metric: str, group: str | None = None, *, join: Join = _apart
) -> Callable[[Row, Row | None], Estimate | None]:
    return lambda row, dense: _of(row.measure(metric, group), lambda m: mean(join(m), metric))


def _ratio(metric: str, *, is_log: bool = False, join: Join = _apart) -> Callable[[Row, Row | None], Estimate | None]:
    def read(row: Row, dense: Row | None) -> Estimate | None:
        if dense is None:
            return None
        try:
            return ratio(join(row.measures), join(dense.measures), metric, is_log=is_log)
        except ValueError:  # a dense row of other texts or questions, left by an earlier run
            return None

    return read


def _of(measures: Sequence[Measure], read: Callable[[Sequence[Measure]], Estimate]) -> Estimate | None:
    return read(measures) if measures else None
