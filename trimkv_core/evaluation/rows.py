"""Rows of results and the file they are kept in: one JSON, written after every row, so that a killed run can go on.

Owns the file's shape. Knows nothing of how rows come about or look.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trimkv_core.evaluation.measures import Measure

FORMAT = 1
FILE_NAME = "results.json"


class ResultsError(ValueError):
    """A result file that cannot be gone on with; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one method at one budget made of one task.

    Attributes:
        task: its name.
        method: its name.
        memory_size: M; None: dense.
        chunk, buffer, sinks: the regime it was measured under; sinks: those the method pinned.
        peak_entries: the most entries a stream held (the mean over streams), in any sequence.
        sees_whole_prompt: nothing was evicted before the prompt was in.
        seconds: it took.
        fingerprint: of everything the measures depend on.
        measures: what was observed.
    """

    task: str
    method: str
    memory_size: int | None
    chunk: int
    buffer: int
    sinks: int
    peak_entries: float
    sees_whole_prompt: bool
    seconds: float
    fingerprint: str
    measures: tuple[Measure, ...]

    def measure(self, metric: str, group: str | None = None) -> tuple[Measure, ...]:
        """The measures of a metric, of one group or of all."""
        return tuple(m for m in self.measures if m.metric == metric and group in (None, m.group))


class ResultFile:
    """The rows of a run on disk.

    Args:
        path: of the JSON file.
        about: machine, versions and settings, kept beside the rows.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        self._about = dict(about)
        self.rows: list[Row] = []

    def resume(self) -> int:
        """Take over the rows of an earlier run, if there was one; how many.

        Raises:
            ResultsError: the file is of another format, or none of ours.
        """
        if not self.path.is_file():
            return 0
        self.rows = list(read_rows(self.path))
        return len(self.rows)

    def forget(self, stale: Collection[Row]) -> None:
        """Leave rows out from now on; the file as it was stays beside, as `results.before.json`."""
        if stale:
            shutil.copyfile(self.path, self.path.with_suffix(".before.json"))
            self.rows = [row for row in self.rows if row not in stale]

    def find(self, fingerprint: str) -> Row | None:
        """The row of that fingerprint."""
        return next((row for row in self.rows if row.fingerprint == fingerprint), None)

    def add(self, row: Row) -> None:
        """Keep a row, in place of one that has become stale, and write the file."""
        key = (row.task, row.method, row.memory_size)
        self.rows = [other for other in self.rows if (other.task, other.method, other.memory_size) != key]
        self.rows.append(row)
        self.save()

    def save(self) -> None:
        """Write the file; a reader finds the old one or the new one, never half of it."""
        content = {"format": FORMAT, **self._about, "rows": [_to_json(row) for row in self.rows]}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)


def read_rows(path: Path) -> Iterable[Row]:
    """The rows of a result file.

    Raises:
        ResultsError: the file is of another format, or none of ours.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ResultsError(
                f"{path} has format {content['format']}, this version writes {FORMAT}: name another folder"
            )
        return [_from_json(raw) for raw in content["rows"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ResultsError(f"{path} is not a result file: {error!r}; remove it or name another folder") from error


def _to_json(row: Row) -> dict[str, Any]:
    raw = asdict(row)
    for measure in raw["measures"]:
        measure["sums"] = [round(value, 6) for value in measure["sums"]]
    return raw


def _from_json(raw: dict[str, Any]) -> Row:
    measures = tuple(
        Measure(**{**measure, "sums": tuple(measure["sums"]), "counts": tuple(measure["counts"])})
        for measure in raw["measures"]
    )
    return Row(**{**raw, "measures": measures})
