"""Rows of the GPU benchmark: what one holds, how it is guarded, and the table.

Owns the time budget and the promise that every row is there, with a number or with the reason why there is none. Knows
no model and no device.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

logger = logging.getLogger("gpu")

MAX_REASON_CHARACTERS = 200
HEADER = ("row", "measured", "limit", "share", "goal", "note")


class Status(StrEnum):
    """How a row came out."""

    MEASURED = "measured"
    FAILED = "failed"
    NOT_RUN = "not run"
    SKIPPED = "skipped"


class NotRun(Exception):
    """A row that cannot be measured here; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a row measured.

    Attributes:
        value: the number.
        unit: its unit, empty for a ratio.
        limit: what the hardware allows, in the same unit; None: there is no limit to compare with.
        share: what the goal speaks of: value over limit, or the ratio itself.
        note: what a reader must know beside it.
    """

    value: float
    unit: str
    limit: float | None = None
    share: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Goal:
    """What a row's share should be: at least or at most `bound`."""

    bound: float
    is_ceiling: bool = False

    def is_met(self, share: float) -> bool:
        """Whether `share` is on the right side."""
        return share <= self.bound if self.is_ceiling else share >= self.bound

    def __str__(self) -> str:
        return f"{'≤' if self.is_ceiling else '≥'} {self.bound:g}"


@dataclass(frozen=True, slots=True)
class Job:
    """One row to be measured: its name, what it should reach, about how long it takes, and how it is measured."""

    name: str
    goal: Goal | None
    seconds: float
    measure: Callable[[], Measured]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table; numbers are None where there are none, and then `note` says why."""

    name: str
    status: Status
    value: float | None
    unit: str
    limit: float | None
    share: float | None
    goal: str
    is_met: bool | None
    note: str
    seconds: float


class TimeBudget:
    """Seconds that all rows together may take."""

    def __init__(self, seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds = seconds
        self._start = clock()

    @property
    def left(self) -> float:
        """Seconds that remain."""
        return self._seconds - (self._clock() - self._start)


def run_jobs(jobs: Sequence[Job], budget: TimeBudget, *, clean_up: Callable[[], None]) -> list[Row]:
    """Measure all rows in order; one that raises, or no longer fits the time, is a row that says so.

    Args:
        jobs: the rows.
        budget: of time.
        clean_up: called after every row.
    """
    rows = []
    for job in jobs:
        left = budget.left
        if job.seconds > left:
            note = f"needs some {job.seconds:.0f} s, {max(left, 0):.0f} s are left of --minutes"
            rows.append(_without_number(job, Status.SKIPPED, note, 0.0))
        else:
            rows.append(_run(job))
            clean_up()
        logger.info("%s", " | ".join(cells_of(rows[-1])))
    return rows


def _run(job: Job) -> Row:
    start = time.monotonic()
    try:
        measured = job.measure()
    except NotRun as reason:
        return _without_number(job, Status.NOT_RUN, str(reason), time.monotonic() - start)
    except Exception as error:  # whatever one row trips over, the others are still wanted
        logger.warning("row %r failed", job.name, exc_info=True)
        note = f"{type(error).__name__}: {error}"
        return _without_number(job, Status.FAILED, note, time.monotonic() - start)
    is_judged = job.goal is not None and measured.share is not None
    return Row(
        name=job.name,
        status=Status.MEASURED,
        value=measured.value,
        unit=measured.unit,
        limit=measured.limit,
        share=measured.share,
        goal=str(job.goal or ""),
        is_met=job.goal.is_met(measured.share) if is_judged and job.goal and measured.share is not None else None,
        note=measured.note,
        seconds=time.monotonic() - start,
    )


def _without_number(job: Job, status: Status, note: str, seconds: float) -> Row:
    return Row(
        name=job.name,
        status=status,
        value=None,
        unit="",
        limit=None,
        share=None,
        goal=str(job.goal or ""),
        is_met=None,
        note=" ".join(note.split())[:MAX_REASON_CHARACTERS] or "no reason given",
        seconds=seconds,
    )


def render(machine: dict[str, str], rows: Sequence[Row]) -> str:
    """The table in Markdown, under a line that names the machine."""
    lines = ["; ".join(f"{name} {value}" for name, value in machine.items()), ""]
    lines += [f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in cells_of(row))} |" for row in rows]
    return "\n".join(lines)


def cells_of(row: Row) -> list[str]:
    """The cells of a row, as many as `HEADER` has."""
    if row.value is None:
        return [row.name, str(row.status), "–", "–", row.goal or "–", row.note]
    unit = f" {row.unit}" if row.unit else ""
    verdict = {None: "", True: " met", False: " missed"}[row.is_met]
    return [
        row.name,
        f"{format_number(row.value)}{unit}",
        "–" if row.limit is None else f"{format_number(row.limit)}{unit}",
        "–" if row.share is None else f"{row.share:.3f}",
        f"{row.goal}{verdict}" if row.goal else "–",
        row.note,
    ]


def format_number(value: float) -> str:
    """A number with three digits or more, as a table shows it."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
