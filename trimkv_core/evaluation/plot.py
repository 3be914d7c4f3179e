"""Quality over budget as a plot: a line a method, with error bars, the dense model as a level.

The one module that imports matplotlib (extra `train`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.ticker
from matplotlib.figure import Figure

from trimkv_core.evaluation.figures import columns_of
from trimkv_core.evaluation.measures import Estimate
from trimkv_core.evaluation.methods import DENSE, Gates
from trimkv_core.evaluation.rows import Row

# Told apart without colour too: ten markers, and other lines for the next ten.
_GATES_COLOUR = "#0072b2"
_COLOURS = (
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
    "#5b5b5b",
    "#8a6d3b",
    "#7b3294",
    "#1b7837",
    "#a6761d",
)
_MARKERS = "sD^vP*X<>d"
_LINES = ("-", "--", ":")
# Octaves over which the methods of one budget are spread, side by side, or error bars would cover each other.
_SPREAD = 0.3
_PANELS = (
    ("text", "× dense", "perplexity, times dense", True),
    ("recall", "both", "recall", False),
    ("conversation", "correct", "recall over turns", False),
)


def write_plots(rows: Sequence[Row], results: Path) -> list[Path]:
    """Write `results` with .png and .svg; nothing where no row has a budget."""
    chosen = [row for row in rows if not row.sees_whole_prompt]
    panels = [panel for panel in _PANELS if any(row.task == panel[0] and row.memory_size for row in chosen)]
    if not panels:
        return []
    figure = Figure(figsize=(5.2 * len(panels), 4.4), layout="constrained")
    methods = list(dict.fromkeys(row.method for row in chosen if row.memory_size is not None))
    for number, (task, column, label, is_log) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        _draw(axes, [row for row in chosen if row.task == task], column, methods)
        axes.set_xlabel("entries a stream (budget)")
        axes.set_ylabel(label)
        axes.set_yscale("log" if is_log else "linear")
        if is_log:
            axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%.2g"))
            axes.yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%.2g"))
        axes.grid(True, alpha=0.3)
    # A method may be in some panels only.
    drawn = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in figure.axes]
    named = {label: handle for pairs in drawn for handle, label in pairs}
    order = [label for label in (*methods, DENSE) if label in named]
    handles = [named[label] for label in order]
    figure.legend(handles, order, loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    paths = [results.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in paths:
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def _draw(axes: Any, rows: Sequence[Row], name: str, methods: Sequence[str]) -> None:
    dense = next((row for row in rows if row.method == DENSE), None)
    read = next(column.read for column in columns_of(rows[0].task, rows) if column.name == name)
    budgets = sorted({row.memory_size for row in rows if row.memory_size is not None})
    for number, method in enumerate(methods):
        points: list[tuple[int, Estimate]] = []
        for row in rows:
            figure = read(row, dense) if row.method == method and row.memory_size is not None else None
            if figure is not None and row.memory_size is not None:
                points.append((row.memory_size, figure))
        if not points:
            continue
        points.sort(key=lambda point: point[0])
        values = [figure.value for _, figure in points]
        below = [max(figure.value - figure.low, 0.0) for _, figure in points]
        above = [max(figure.high - figure.value, 0.0) for _, figure in points]
        shift = 2 ** (_SPREAD * (number / max(len(methods) - 1, 1) - 0.5))
        axes.errorbar(
            [size * shift for size, _ in points],
            values,
            yerr=[below, above],
            label=method,
            **_style(method, number),
            markersize=5,
            capsize=2,
        )
    level = None if dense is None else read(dense, dense)
    if level is not None:
        axes.axhline(level.value, color="black", linestyle="--", linewidth=1, label=DENSE)
    axes.set_xscale("log", base=2)
    axes.set_xlim(budgets[0] / 1.4, budgets[-1] * 1.4)
    axes.set_xticks(budgets, [str(size) for size in budgets])


def _style(method: str, number: int) -> dict[str, Any]:
    """How a method is drawn; the gates thick and in one colour, filled for the global budget, open for local ones."""
    if method in tuple(Gates):
        is_global = method == Gates.GLOBAL
        face = _GATES_COLOUR if is_global else "white"
        return {
            "color": _GATES_COLOUR,
            "marker": "o",
            "markerfacecolor": face,
            "linestyle": "-" if is_global else "--",
            "linewidth": 2.4,
        }
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _LINES[number // len(_MARKERS) % len(_LINES)],
        "linewidth": 1.2,
    }
