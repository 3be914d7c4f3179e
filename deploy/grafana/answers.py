"""What a Prometheus answers to a dashboard's queries, and its numbers in Grafana's units. Draws nothing."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from panels import NOTHING, Json

POINTS = 240
BYTES = 1024
BASES = {"bytes": (BYTES, ("B", "KiB", "MiB", "GiB", "TiB")), "": (1000, ("", "k", "M", "G", "T"))}
SUFFIXES = {"reqps": "/s", "ops": "/s"}


@dataclass(frozen=True, slots=True)
class Series:
    """One line: its name, and its value at each of the times (NaN where there is none)."""

    name: str
    labels: dict[str, str]
    values: np.ndarray[Any, Any]

    @property
    def newest(self) -> float:
        """The last value there is."""
        known = self.values[~np.isnan(self.values)]
        return float(known[-1]) if len(known) else math.nan

    @property
    def is_zero(self) -> bool:
        """Whether no value is another than 0."""
        return not np.any(np.nan_to_num(self.values))


@dataclass(frozen=True, slots=True)
class Source:
    """A Prometheus, and the span and Grafana's variables that it is asked with."""

    url: str
    start: float
    end: float
    rate_interval: str

    @property
    def times(self) -> np.ndarray[Any, Any]:
        """Seconds since the start."""
        return np.linspace(0, self.end - self.start, POINTS)

    def ask(self, target: Json) -> list[Series]:
        """The series of one query of a panel: over the whole span, or one value each at its end."""
        expression = target["expr"].replace("$__rate_interval", self.rate_interval)
        expression = expression.replace("$instance", ".*").replace("$job", "trimkv")
        if target["instant"]:
            found = self._get("query", query=expression, time=self.end)
            return [self._series(each, [each["value"]], target["legendFormat"]) for each in found]
        step = round((self.end - self.start) / (POINTS - 1), 3)
        found = self._get("query_range", query=expression, start=self.start, end=self.end, step=step)
        return [self._series(each, each["values"], target["legendFormat"]) for each in found]

    def _get(self, path: str, **parameters: str | float) -> list[Json]:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=60).raise_for_status().json()
        found: list[Json] = answer["data"]["result"]
        return found

    def _series(self, found: Json, samples: list[tuple[float, str]], legend: str) -> Series:
        labels = found["metric"]
        name = ", ".join(labels.values()) if legend == "__auto" else fill_in(legend, labels)
        values = np.full(POINTS, math.nan)
        for moment, value in samples:
            index = round((moment - self.start) / (self.end - self.start) * (POINTS - 1))
            values[min(index, POINTS - 1)] = float(value)
        return Series(name, labels, values)


def fill_in(legend: str, labels: dict[str, str]) -> str:
    """A legend with the values of its labels; of one that is missing, as Grafana does, nothing."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), legend).strip()


def show(value: float, unit: str) -> str:
    """A number in one of Grafana's units."""
    if math.isnan(value):
        return NOTHING
    if unit == "percentunit":
        return f"{_figures(value * 100)} %"
    if unit == "bool_yes_no":
        return "yes" if value else "no"
    if unit == "s":
        return f"{_figures(value * 1000)} ms" if 0 < value < 1 else f"{_figures(value)} s"
    base, names = BASES["bytes" if unit == "bytes" else ""]
    power = min(int(math.log(abs(value), base)), len(names) - 1) if abs(value) >= base else 0
    return f"{_figures(value / base**power)} {names[power]}{SUFFIXES.get(unit, '')}".strip()


def _figures(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
