"""Results as Markdown tables and a plot, from the JSON file alone.

Owns how numbers look. Knows no model and no clock.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimkv_core.evaluation.figures import Column, by_length_and_depth, columns_of
from trimkv_core.evaluation.measures import Estimate
from trimkv_core.evaluation.methods import DENSE
from trimkv_core.evaluation.rows import Row, read_rows

logger = logging.getLogger(__name__)

_TITLES = {
    "text": "Perplexity on long texts",
    "recall": "Passkey and key-value recall",
    "conversation": "Recall over turns of a conversation",
    "agreement": "Agreement with the dense model",
}
_NO_SPREAD = (
    "Where all answers are right, or all wrong, resampling has no spread and no interval is shown; of n answers, a "
    "true share up to 3/n away would still look like that."
)
_NOTES = {
    "text": "Every token but an excerpt's first is predicted; intervals: 95 %, bootstrap over blocks of 256 tokens, "
    "the ratio paired.",
    "recall": "Share of answers whose every token is the likeliest one, teacher-forced; intervals: 95 %, bootstrap "
    f"over questions. {_NO_SPREAD}",
    "conversation": "Share of answers whose every token is the likeliest one, teacher-forced, four questions a "
    f"conversation; intervals: 95 %, bootstrap over conversations. {_NO_SPREAD}",
    "agreement": "Mean divergence of next-token distributions from the dense model's, and greedy continuations; "
    "intervals: 95 %, bootstrap over blocks of 256 tokens, and over continuations.",
}
WHOLE_PROMPT_TITLE = "Methods that see the whole prompt before they evict"


def write_report(results: Path) -> list[Path]:
    """Write the tables, and the plot where `matplotlib` is installed, beside a result file; the files written.

    The figures of the tables go into the result file, too, as `figures`.
    """
    content = json.loads(results.read_text(encoding="utf-8"))
    rows = list(read_rows(results))
    content["figures"] = summarise(rows)
    results.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    table = results.with_suffix(".md")
    table.write_text(render(rows, content), encoding="utf-8")
    try:
        from trimkv_core.evaluation.plot import write_plots
    except ModuleNotFoundError as error:
        logger.warning("no plot: %s; install matplotlib, or this package with its extra `train`", error)
        return [results, table]
    return [results, table, *write_plots(rows, results)]


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every row's figures, each as value and interval: null where there is none."""
    result = []
    for task in _TITLES:
        of_task = [row for row in rows if row.task == task]
        dense = next((row for row in of_task if row.method == DENSE), None)
        for row in _in_order(of_task):
            figures = {column.name: column.read(row, dense) for column in columns_of(task, of_task)}
            shown = {
                name: [_number(value) for value in (figure.value, figure.low, figure.high)]
                for name, figure in figures.items()
                if figure is not None
            }
            result.append({"task": task, "method": row.method, "memory_size": row.memory_size, **shown})
    return result


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)


def render(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """The Markdown page."""
    settings = about.get("settings", {})
    parts = [
        f"# What eviction costs: {settings.get('model', '')}",
        "",
        _line(about.get("machine", {}), about.get("versions", {}), {"date": about.get("date", "")}),
        "",
        _line(settings),
        "",
        "Fed alike for every method: `chunk` tokens, then an eviction point; `buffer` entries over the budget start "
        "an eviction; `sinks` first positions are pinned; `peak` entries a stream (mean over streams) were really "
        "reached. Best of a budget in bold.",
    ]
    chunked = [row for row in rows if not row.sees_whole_prompt]
    for task, title in _TITLES.items():
        of_task = [row for row in chunked if row.task == task]
        if of_task:
            parts += ["", f"## {title}", "", _NOTES[task], "", *_table(of_task, of_task, columns_of(task, of_task))]
            if task == "recall":
                parts += ["", "By length and by depth, both kinds together:", "", *_detail(of_task)]
    whole = [row for row in rows if row.sees_whole_prompt]
    if whole:
        dense = [row for row in chunked if row.task == "recall"]
        note = "One cut at the end of a prompt that was seen whole; not to be compared with the tables above."
        parts += ["", f"## {WHOLE_PROMPT_TITLE}", "", note, "", *_table(whole, dense, columns_of("recall", whole))]
    return "\n".join(parts) + "\n"


def _table(rows: Sequence[Row], dense_among: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    dense = next((row for row in dense_among if row.method == DENSE), None)
    figures = {id(row): [column.read(row, dense) for column in columns] for row in rows}
    shown = [n for n, _ in enumerate(columns) if any(figures[id(row)][n] is not None for row in rows)]
    header = ["budget", "method", "chunk", "buffer", "sinks", "peak", *(columns[n].name for n in shown)]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for row in _in_order(rows):
        rivals = [other for other in rows if other.memory_size == row.memory_size]
        cells = _regime_cells(row)
        for n in shown:
            figure = figures[id(row)][n]
            others = [found.value for other in rivals if (found := figures[id(other)][n]) is not None]
            cells.append(_cell(figure, columns[n], others))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _detail(rows: Sequence[Row]) -> list[str]:
    """Recall by length and depth."""
    figures = {id(row): by_length_and_depth(row) for row in rows}
    names = list(dict.fromkeys(name for row in rows for name in figures[id(row)]))
    header = ["budget", "method", "chunk", "buffer", "sinks", "peak", *names]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for row in _in_order(rows):
        values = (figures[id(row)].get(name) for name in names)
        cells = _regime_cells(row) + ["–" if value is None else f"{value:.2f}" for value in values]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _in_order(rows: Sequence[Row]) -> list[Row]:
    """Dense first, then by budget; methods as they were run."""
    return sorted(rows, key=lambda row: row.memory_size or 0)


def _regime_cells(row: Row) -> list[str]:
    size = DENSE if row.memory_size is None else str(row.memory_size)
    return [size, row.method, str(row.chunk), str(row.buffer), str(row.sinks), f"{row.peak_entries:,.0f}"]


def _cell(figure: Estimate | None, column: Column, rivals: Sequence[float]) -> str:
    if figure is None or math.isnan(figure.value):
        return "–"
    digits = column.digits
    text = f"{figure.value:.{digits}f}"
    shown = {f"{value:.{digits}f}" for value in rivals}
    if column.best is not None and len(shown) > 1 and text == f"{column.best(rivals):.{digits}f}":
        text = f"**{text}**"
    if math.isnan(figure.low) or figure.low == figure.high:
        return text
    return f"{text} ({figure.low:.{digits}f}–{figure.high:.{digits}f})"


def _line(*parts: dict[str, Any]) -> str:
    return "; ".join(f"{name} {_plain(value)}" for part in parts for name, value in part.items())


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} ({found})" for name, found in value.items()) or "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
