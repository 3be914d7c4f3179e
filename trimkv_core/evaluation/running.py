"""Every method at every budget on every task, row after row.

Owns the order, the fingerprints that say whether a row still holds, and the log lines of progress. Knows no flags.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Protocol

from trimkv_core.evaluation.agreement import AgreementTask
from trimkv_core.evaluation.feeding import Answerer, Regime
from trimkv_core.evaluation.loading import LoadedModel
from trimkv_core.evaluation.measures import Measure
from trimkv_core.evaluation.methods import DENSE, WHOLE_PROMPT, Case, sinks_of
from trimkv_core.evaluation.rows import ResultFile, Row
from trimkv_core.evaluation.tasks import Probe, ProbeResult

logger = logging.getLogger(__name__)


class ProbeTask(Protocol):
    """A task that anyone who answers probes can do."""

    @property
    def name(self) -> str:
        """What rows call it."""

    @property
    def probes(self) -> tuple[Probe, ...]:
        """What is asked."""

    def measure(self, results: Sequence[ProbeResult]) -> list[Measure]:
        """What the answers say."""


Task = ProbeTask | AgreementTask


def order_cases(methods: Sequence[str], budgets: Sequence[int | None]) -> list[Case]:
    """Dense first, where it is asked for, then budget after budget; every case once."""
    sizes = [size for size in dict.fromkeys(budgets) if size is not None]
    wants_dense = None in budgets or DENSE in methods
    names = [name for name in dict.fromkeys(methods) if name != DENSE]
    cases = [Case(DENSE, None)] if wants_dense else []
    return cases + [Case(name, size) for size in sizes for name in names]


def run_all(
    tasks: Sequence[Task],
    cases: Iterable[Case],
    model: LoadedModel,
    results: ResultFile,
    *,
    regime: Regime,
    seed: int,
    make_answerer: Callable[[Case], Answerer],
) -> None:
    """Measure every case on every task, but rows that `results` holds already."""
    for case in cases:
        for task in tasks:
            if not _makes_sense(task, case):
                continue
            fingerprint = fingerprint_of(task, case, model, regime, seed)
            if results.find(fingerprint) is not None:
                logger.info("%s %s: kept from an earlier run", case, task.name)
                continue
            begin = time.perf_counter()
            measures, peak = _run(task, make_answerer(case))
            seconds = time.perf_counter() - begin
            results.add(
                Row(
                    task=task.name,
                    method=case.method,
                    memory_size=case.memory_size,
                    chunk=regime.chunk,
                    buffer=regime.buffer,
                    sinks=sinks_of(case, model, regime),
                    peak_entries=peak,
                    sees_whole_prompt=case.sees_whole_prompt,
                    seconds=round(seconds, 1),
                    fingerprint=fingerprint,
                    measures=tuple(measures),
                )
            )
            logger.info("%s %s: %s, peak %.0f entries, %.0f s", case, task.name, _brief(measures), peak, seconds)


def stale_rows(
    tasks: Sequence[Task], model: LoadedModel, rows: Iterable[Row], *, regime: Regime, seed: int
) -> list[Row]:
    """Rows of these tasks that were measured on other probes, gates or settings: they may not stand beside new ones."""
    named = {task.name: task for task in tasks}
    return [
        row
        for row in rows
        if row.task in named
        and row.fingerprint != fingerprint_of(named[row.task], Case(row.method, row.memory_size), model, regime, seed)
    ]


def _makes_sense(task: Task, case: Case) -> bool:
    """Dense agrees with itself, and only a question has a whole prompt before it."""
    if task.name == AgreementTask.name:
        return case.method != DENSE and not case.sees_whole_prompt
    return task.name == "recall" or not case.method.startswith(WHOLE_PROMPT)


def _run(task: Task, answerer: Answerer) -> tuple[list[Measure], float]:
    if isinstance(task, AgreementTask):
        return task.run(answerer)
    answers = answerer.answer(task.probes)
    return task.measure(answers), max(answer.peak_entries for answer in answers)


def _brief(measures: Sequence[Measure]) -> str:
    totals: dict[str, tuple[float, int]] = {}
    for measure in measures:
        total, count = totals.get(measure.metric, (0.0, 0))
        totals[measure.metric] = (total + sum(measure.sums), count + sum(measure.counts))
    return ", ".join(f"{metric} {total / count:.4f}" for metric, (total, count) in totals.items())


def fingerprint_of(task: Task, case: Case, model: LoadedModel, regime: Regime, seed: int) -> str:
    """A digest of everything a row's measures depend on."""
    probes = hashlib.sha256()
    for probe in task.probes:
        probes.update(json.dumps([probe.ids, [(span.start, span.stop) for span in probe.spans]]).encode())
    parts = {
        "task": task.name,
        "probes": probes.hexdigest(),
        "new_tokens": task.new_tokens if isinstance(task, AgreementTask) else 0,
        "method": case.method,
        "memory_size": case.memory_size,
        "base": model.base,
        "dtype": str(model.dtype),
        "gates": model.gates_digest if case.uses_gates else "",
        "sinks": sinks_of(case, model, regime),
        "regime": asdict(regime),
        "seed": seed if case.method == "random-recent" else 0,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
