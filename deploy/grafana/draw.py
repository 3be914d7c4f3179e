"""Draws a dashboard as a picture, its panels where Grafana puts them, from what a Prometheus answers to their queries.

    python deploy/grafana/draw.py --prometheus http://127.0.0.1:9090 --dashboard overview --output overview.png

For a machine without Grafana. Needs matplotlib and httpx, which `pip install '.[test]'` brings.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import build
import httpx
import matplotlib as mpl
import numpy as np
from panels import Json

mpl.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

POINTS = 240
# Inches of one column and of one line of Grafana's grid.
COLUMN, LINE = 0.62, 0.42
BASES = {"bytes": (1024, ("B", "KiB", "MiB", "GiB", "TiB")), "": (1000, ("", "k", "M", "G", "T"))}
SMALL = 7.5


@dataclass(frozen=True, slots=True)
class Series:
    """One line: its name, and its value at each of the times (NaN where there is none)."""

    name: str
    labels: dict[str, str]
    values: np.ndarray[Any, Any]


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
        """The series of one query of a panel."""
        expression = target["expr"].replace("$__rate_interval", self.rate_interval)
        expression = expression.replace("$instance", ".*").replace("$job", "trimkv")
        step = (self.end - self.start) / (POINTS - 1)
        parameters = {"query": expression, "start": str(self.start), "end": str(self.end), "step": f"{step:.3f}"}
        answer = httpx.get(f"{self.url}/api/v1/query_range", params=parameters, timeout=60).raise_for_status().json()
        return [self._series(found, target["legendFormat"]) for found in answer["data"]["result"]]

    def _series(self, found: Json, legend: str) -> Series:
        labels = found["metric"]
        name = ", ".join(labels.values()) if legend == "__auto" else legend
        for label, value in labels.items():
            name = name.replace(f"{{{{{label}}}}}", value)
        values = np.full(POINTS, math.nan)
        for moment, value in found["values"]:
            index = round((moment - self.start) / (self.end - self.start) * (POINTS - 1))
            values[min(index, POINTS - 1)] = float(value)
        return Series(name, labels, values)


def show(value: float, unit: str) -> str:
    """A number in one of Grafana's units."""
    if math.isnan(value):
        return "–"
    if unit == "percentunit":
        return f"{value:.1%}"
    if unit == "s":
        return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"
    base, names = BASES["bytes" if unit == "bytes" else ""]
    power = min(int(math.log(abs(value), base)), len(names) - 1) if abs(value) >= base else 0
    suffix = {"reqps": "/s", "ops": "/s"}.get(unit, "")
    return f"{value / base**power:.4g} {names[power]}{suffix}".strip()


def newest(series: Series) -> float:
    """The last value there is."""
    known = series.values[~np.isnan(series.values)]
    return float(known[-1]) if len(known) else math.nan


def draw_lines(axes: Axes, panel: Json, source: Source) -> None:
    """Lines, or areas one upon the other."""
    series = [each for target in panel["targets"] for each in source.ask(target)]
    defaults = panel["fieldConfig"]["defaults"]
    if defaults["custom"]["stacking"]["mode"] == "normal":
        axes.stackplot(source.times, *(np.nan_to_num(each.values) for each in series), alpha=0.6)
    else:
        for each in series:
            axes.plot(source.times, each.values, linewidth=1)
    axes.margins(y=0.08)
    axes.set_ylim(bottom=0, top=defaults.get("max"))
    axes.yaxis.set_major_formatter(lambda value, _: show(value, defaults["unit"]))
    handles = axes.collections or axes.lines
    if len(series) <= 8:
        axes.legend(handles, [each.name for each in series], fontsize=SMALL - 1, framealpha=0.6)
    axes.set_xlabel("s", fontsize=SMALL)


def draw_number(axes: Axes, panel: Json, source: Source) -> None:
    """The newest value, on the colour of the step it has reached."""
    (target,) = panel["targets"]
    found = source.ask(target)
    value = newest(found[0]) if found else math.nan
    defaults = panel["fieldConfig"]["defaults"]
    colour = "green"
    for step in defaults["thresholds"]["steps"]:
        if step["value"] is not None and value >= step["value"]:
            colour = step["color"]
    axes.set_facecolor({"green": "#d5f0d9", "yellow": "#fdf0c2", "red": "#f8d0cf"}[colour])
    axes.text(0.5, 0.45, show(value, defaults["unit"]), ha="center", va="center", fontsize=15, transform=axes.transAxes)
    axes.set(xticks=[], yticks=[])


def draw_heat(axes: Axes, panel: Json, source: Source) -> None:
    """Series as rows; cumulative buckets as their differences."""
    (target,) = panel["targets"]
    series = source.ask(target)
    if target["format"] == "heatmap":
        series.sort(key=lambda each: float(each.labels["le"]))
    grid = np.array([each.values for each in series])
    if target["format"] == "heatmap":
        grid = np.diff(grid, axis=0, prepend=0)
    mesh = axes.pcolormesh(source.times, np.arange(len(series)), grid, shading="nearest", cmap="viridis")
    axes.figure.colorbar(mesh, ax=axes, pad=0.01).ax.tick_params(labelsize=SMALL - 1)
    shown = range(0, len(series), max(1, len(series) // 10))
    axes.set_yticks(list(shown), [series[index].name for index in shown])
    axes.set_ylabel(panel["options"]["yAxis"]["axisLabel"], fontsize=SMALL)


def draw_bars(axes: Axes, panel: Json, source: Source) -> None:
    """The newest value of every series."""
    (target,) = panel["targets"]
    series = source.ask(target)
    axes.bar([each.name for each in series], [newest(each) for each in series])
    axes.tick_params(axis="x", rotation=90)


def draw_table(axes: Axes, panel: Json, source: Source) -> None:
    """A line for each instance."""
    columns = panel["transformations"][1]["options"]["renameByName"]
    hidden = panel["transformations"][1]["options"]["excludeByName"]
    units = {each["matcher"]["options"]: each["properties"][0]["value"] for each in panel["fieldConfig"]["overrides"]}
    rows: dict[str, dict[str, str]] = {}
    for target in panel["targets"]:
        column = f"Value #{target['refId']}"
        for series in source.ask(target):
            line = rows.setdefault(series.labels["instance"], {})
            if column in hidden:
                line |= {name: text for name, text in series.labels.items() if name not in ("instance", *hidden)}
            else:
                line[columns[column]] = show(newest(series), units[columns[column]])
    headings = list(dict.fromkeys(name for line in rows.values() for name in line))
    cells = [[name, *(line.get(heading, "") for heading in headings)] for name, line in sorted(rows.items())]
    axes.axis("off")
    if cells:
        shown = axes.table(cells, colLabels=["instance", *headings], loc="upper center")
        shown.auto_set_font_size(False)
        shown.set_fontsize(SMALL - 1)


DRAWN: dict[str, Callable[[Axes, Json, Source], None]] = {
    "timeseries": draw_lines,
    "stat": draw_number,
    "heatmap": draw_heat,
    "bargauge": draw_bars,
    "table": draw_table,
}


def draw(board: Json, source: Source, output: Path) -> None:
    """All panels of a dashboard into one picture."""
    places = [panel["gridPos"] for panel in board["panels"]]
    lines = max(place["y"] + place["h"] for place in places) + 2
    figure = Figure(figsize=(24 * COLUMN, lines * LINE), dpi=100)
    figure.suptitle(board["title"], fontsize=14, y=1 - 0.6 / lines)
    for panel in board["panels"]:
        place = panel["gridPos"]
        left, width = place["x"] / 24, place["w"] / 24
        top, height = (place["y"] + 2) / lines, place["h"] / lines
        if panel["type"] == "row":
            figure.text(0.01, 1 - top - 0.7 / lines, panel["title"], fontsize=11, weight="bold")
            continue
        axes = figure.add_axes((left + 0.04, 1 - top - height + 1.3 / lines, width - 0.05, height - 2.4 / lines))
        axes.set_title(panel["title"], fontsize=SMALL + 1)
        axes.tick_params(labelsize=SMALL - 1)
        DRAWN[panel["type"]](axes, panel, source)
    figure.savefig(output)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description="Draw a dashboard from a running Prometheus.")
    parser.add_argument("--prometheus", required=True, help="its URL")
    parser.add_argument("--dashboard", required=True, choices=build.DASHBOARDS, help="which one")
    parser.add_argument("--start", type=float, help="Unix seconds; an hour before the end by default")
    parser.add_argument("--end", type=float, help="Unix seconds; now by default")
    parser.add_argument("--rate-interval", default="1m", help="four scrape intervals (default: 1m)")
    parser.add_argument("--output", type=Path, required=True, help="picture to write")
    options = parser.parse_args(arguments)
    end = options.end or time.time()
    source = Source(options.prometheus, options.start or end - 3600, end, options.rate_interval)
    draw(build.DASHBOARDS[options.dashboard](), source, options.output)


if __name__ == "__main__":
    main()
