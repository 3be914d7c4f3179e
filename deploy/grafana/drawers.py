"""Draws panels of each kind into axes, as Grafana shows them. Knows no layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from answers import BYTES, Series, Source, show
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, MaxNLocator
from panels import NOTHING, Json

# Inches: space that `draw` leaves on the left and under the axes, for ticks and for the legend.
PADDING, LEFT, TICKS, LEGEND = 0.1, 0.6, 0.24, 0.2
TEXT, SMALL = 8.0, 7.0
EDGE, INK, FAINT = "#d9dce1", "#24292f", "#6a737d"
COLOURS = ("#3274d9", "#e0752d", "#37872d", "#b8860b", "#8f3bb8", "#c4162a", "#1f8a9e", "#705da0")
GROUNDS = {"green": "#d3efd8", "yellow": "#fbeab5", "red": "#f6cac9"}
HEADROOM = 1.12
# Bars and rows of a heat map that are named: more would cover each other.
MOST_NAMES = 10


def draw_lines(axes: Axes, panel: Json, source: Source) -> None:
    """Lines, or areas one upon the other."""
    series = [each for target in panel["targets"] for each in source.ask(target)]
    defaults = panel["fieldConfig"]["defaults"]
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(series))]
    if defaults["custom"]["stacking"]["mode"] == "normal":
        known = [np.nan_to_num(each.values) for each in series]
        axes.stackplot(source.times, known, colors=colours, alpha=0.55, linewidth=0)
    else:
        for each, colour in zip(series, colours, strict=True):
            axes.plot(source.times, each.values, linewidth=1.4, color=colour)
    set_number_axis(axes, defaults["unit"], largest=defaults.get("max"))
    set_time_axis(axes, source)
    write_legend(axes, [(each, colour) for each, colour in zip(series, colours, strict=True)])


def draw_number(axes: Axes, panel: Json, source: Source) -> None:
    """The value at the end, on the colour of the step it has reached."""
    (target,) = panel["targets"]
    found = source.ask(target)
    defaults = panel["fieldConfig"]["defaults"]
    text, colour = NOTHING, "green"
    if found:
        text = show(found[0].newest, defaults["unit"])
        for step in defaults["thresholds"]["steps"]:
            if step["value"] is not None and found[0].newest >= step["value"]:
                colour = step["color"]
    axes.set_facecolor(GROUNDS[colour])
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=17, color=INK, transform=axes.transAxes)
    axes.set(xticks=[], yticks=[])


def draw_heat(axes: Axes, panel: Json, source: Source) -> None:
    """Series as rows; cumulative buckets as their differences."""
    (target,) = panel["targets"]
    series = source.ask(target)
    if not series:
        return
    if target["format"] == "heatmap":
        series.sort(key=lambda each: float(each.labels["le"]))
    grid = np.array([each.values for each in series])
    if target["format"] == "heatmap":
        grid = np.diff(grid, axis=0, prepend=0)
    mesh = axes.pcolormesh(source.times, np.arange(len(series)), grid, shading="nearest", cmap="viridis")
    scale = axes.inset_axes((1.015, 0, 0.02, 1))
    bar = axes.figure.colorbar(mesh, cax=scale)
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(4)
    bar.formatter = lambda value, _: show(value, panel["options"]["cellValues"]["unit"])  # type: ignore[assignment]
    bar.update_ticks()
    scale.tick_params(labelsize=SMALL, length=0, labelcolor=FAINT)
    shown = range(0, len(series), -(-len(series) // MOST_NAMES))
    axes.set_yticks(list(shown), [short(series[index].name) for index in shown])
    axes.grid(visible=False)
    axes.set_ylabel(panel["options"]["yAxis"]["axisLabel"], fontsize=TEXT, color=FAINT)
    set_time_axis(axes, source)


def draw_bars(axes: Axes, panel: Json, source: Source) -> None:
    """The value of every series at the end."""
    (target,) = panel["targets"]
    series = source.ask(target)
    axes.bar(range(len(series)), [each.newest for each in series], color=COLOURS[0], alpha=0.75)
    shown = range(0, len(series), -(-len(series) // (2 * MOST_NAMES)) or 1)
    axes.set_xticks(list(shown), [series[index].name for index in shown])
    axes.grid(visible=False, axis="x")
    set_number_axis(axes, panel["fieldConfig"]["defaults"]["unit"])


def draw_table(axes: Axes, panel: Json, source: Source) -> None:
    """A line for each engine."""
    join, shape = (each["options"] for each in panel["transformations"])
    key, names = join["byField"], shape["renameByName"]
    units = {each["matcher"]["options"]: each["properties"][0]["value"] for each in panel["fieldConfig"]["overrides"]}
    lines: dict[str, dict[str, str]] = {}
    for target in panel["targets"]:
        heading = names.get(f"Value #{target['refId']}")
        for series in source.ask(target):
            line = lines.setdefault(series.labels[key].strip(), {})
            line |= {label: text for label, text in series.labels.items() if label not in (key, "__name__")}
            if heading is not None:
                line[heading] = show(series.newest, units[heading])
    order = {names.get(name, name): place for name, place in shape["indexByName"].items()}
    headings = sorted({heading for line in lines.values() for heading in line}, key=order.__getitem__)
    cells = [[names[key], *headings]]
    cells += [[name, *(line.get(heading, "") for heading in headings)] for name, line in sorted(lines.items())]
    axes.axis("off")
    widths = np.array([max(len(row[column]) for row in cells) + 2 for column in range(len(headings) + 1)])
    starts = np.concatenate(([0], np.cumsum(widths)[:-1])) / widths.sum()
    axes.set(xlim=(0, 1), ylim=(max(len(cells), 5), 0))
    for number, row in enumerate(cells):
        for start, text in zip(starts, row, strict=True):
            colour = INK if number else FAINT
            axes.text(start, number + 0.5, text, fontsize=TEXT, va="center", color=colour)
        axes.axhline(number + 1, color=EDGE, linewidth=0.7)


def set_number_axis(axes: Axes, unit: str, *, largest: float | None = None) -> None:
    """From 0 to what is drawn, or to `largest`; a few round numbers in the panel's unit."""
    top = largest or axes.dataLim.y1 * HEADROOM
    if not top > 0 or not np.isfinite(top):
        top = 1
    axes.set_ylim(0, top)
    scale = BYTES ** int(math.log(top, BYTES)) if unit == "bytes" else 1
    rounded = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(0, top / scale)
    axes.yaxis.set_major_locator(FixedLocator([value * scale for value in rounded if value * scale <= top]))
    axes.yaxis.set_major_formatter(lambda value, _: show(value, unit))


def set_time_axis(axes: Axes, source: Source) -> None:
    """Minutes and seconds since the start."""
    axes.set_xlim(0, source.end - source.start)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 1.5, 2, 3, 6, 10]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{int(value) // 60}:{int(value) % 60:02d}")


def write_legend(axes: Axes, series: Sequence[tuple[Series, str]]) -> None:
    """Names under the panel, in one line; where many lines lie at 0, those are only counted."""
    zeros = [each for each, _ in series if each.is_zero]
    is_long = len(series) > 4
    named = [(each.name, colour) for each, colour in series if not (is_long and each.is_zero)]
    if is_long and zeros:
        named.append((f"{len(zeros)} more at 0", FAINT))
    place = 0.0
    width = axes.get_window_extent().width
    for name, colour in named:
        written = axes.annotate(
            f"— {name}",
            (place / width, 0),
            ((PADDING - LEFT) * 72, -(TICKS + LEGEND / 2) * 72),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=SMALL,
            color=colour,
            va="center",
        )
        place += written.get_window_extent().width + SMALL


def short(name: str) -> str:
    """`16384.0`, a bucket's bound, as `16384`."""
    return name.removesuffix(".0")


DRAWN: dict[str, Callable[[Axes, Json, Source], None]] = {
    "timeseries": draw_lines,
    "stat": draw_number,
    "heatmap": draw_heat,
    "bargauge": draw_bars,
    "table": draw_table,
}
