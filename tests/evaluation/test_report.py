"""Result files, tables and plots: what goes in comes out, the best is bold, and whole-prompt methods stand apart."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from trimkv_core.evaluation.figures import columns_of
from trimkv_core.evaluation.measures import Measure
from trimkv_core.evaluation.report import WHOLE_PROMPT_TITLE, render, write_report
from trimkv_core.evaluation.rows import FILE_NAME, ResultFile, ResultsError, Row, read_rows

ABOUT = {"machine": {"device": "abacus"}, "versions": {"torch": "9"}, "settings": {"model": "tiny", "chunk": 64}}


def row(method: str, memory_size: int | None, *measures: Measure, task: str = "text", peak: float = 128.0) -> Row:
    return Row(
        task=task,
        method=method,
        memory_size=memory_size,
        chunk=64,
        buffer=8,
        sinks=4,
        peak_entries=peak,
        sees_whole_prompt=method.startswith("whole-prompt:"),
        seconds=1.5,
        fingerprint=f"{task} {method} {memory_size}",
        measures=measures,
    )


def text(nll: float) -> tuple[Measure, ...]:
    sums = tuple(round(256 * (nll + 0.01 * number), 6) for number in range(8))
    return (Measure("nll", "book", sums[:4], (256,) * 4, 4096), Measure("nll", "manual", sums[4:], (256,) * 4, 4096))


def recall(passkey: float, pair: float) -> tuple[Measure, ...]:
    return (
        Measure("correct", "passkey", (passkey, 1.0), (1, 1), 512, 0.1),
        Measure("correct", "key-value", (pair, 0.0), (1, 1), 1024, 0.5),
    )


ROWS = [
    row("dense", None, *text(3.0), peak=4095.0),
    row("gates-global", 64, *text(3.1)),
    row("streaming-llm", 64, *text(3.4)),
    row("dense", None, *recall(1.0, 1.0), task="recall"),
    row("gates-global", 64, *recall(1.0, 0.0), task="recall"),
    row("whole-prompt:snapkv", 64, *recall(0.0, 0.0), task="recall", peak=900.0),
]


def cells(page: str, heading: str, method: str) -> list[str]:
    section = page.split(f"## {heading}")[1].partition("\n## ")[0]
    line = next(line for line in section.splitlines() if f"| {method} |" in line)
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_rows_come_back_from_disk_as_they_were(tmp_path: Path) -> None:
    results = ResultFile(tmp_path / "new" / FILE_NAME, ABOUT)
    for one in ROWS:
        results.add(one)
    assert list(read_rows(results.path)) == ROWS
    again = ResultFile(results.path, ABOUT)
    assert again.resume() == len(ROWS)
    assert again.find("text gates-global 64") == ROWS[1]
    assert again.find("text gates-global 65") is None
    assert json.loads(results.path.read_text())["settings"] == ABOUT["settings"]


def test_a_new_row_takes_the_place_of_a_stale_one(tmp_path: Path) -> None:
    results = ResultFile(tmp_path / FILE_NAME, ABOUT)
    results.add(ROWS[1])
    results.add(replace(ROWS[1], fingerprint="other gates"))
    assert [one.fingerprint for one in read_rows(results.path)] == ["other gates"]


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 7, "rows": []}', '{"format": 1, "rows": [{}]}'])
def test_a_file_that_is_no_result_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / FILE_NAME
    path.write_text(content)
    with pytest.raises(ResultsError, match=str(path)):
        ResultFile(path, {}).resume()


def test_the_table_has_the_regime_in_every_row_and_the_best_in_bold() -> None:
    page = render(ROWS, ABOUT)
    ours = cells(page, "Perplexity", "gates-global")
    assert ours[:6] == ["64", "gates-global", "64", "8", "4", "128"]
    # exp(3.1 + 0.035), the mean over the blocks
    assert re.fullmatch(r"\*\*22\.99\*\* \(22\.\d\d–23\.\d\d\)", ours[6])
    assert ours[7].startswith("**1.105**")
    assert "**" not in "".join(cells(page, "Perplexity", "streaming-llm"))
    # A method that has a budget to itself is not the best of anything.
    assert "**" not in "".join(cells(page, "Perplexity", "dense"))
    for name in ("book", "manual", "abacus", "torch 9"):
        assert name in page
    assert "| 64 | gates-global | 64 | 8 | 4 | 128 | 1.00 | 0.00 |" in page.replace(" (0.00–1.00)", "").replace(
        "**", ""
    )


def test_whole_prompt_methods_stand_in_a_table_of_their_own() -> None:
    page = render(ROWS, ABOUT)
    before, after = page.split(f"## {WHOLE_PROMPT_TITLE}")
    assert "snapkv" not in before
    assert cells(page, WHOLE_PROMPT_TITLE, "whole-prompt:snapkv")[5] == "900"
    assert "gates-global" not in after


def test_recall_is_shown_by_length_and_depth() -> None:
    page = render(ROWS, ABOUT)
    section = page.split("By length and by depth")[1]
    assert "| 512 tokens | 1,024 tokens | depth 0.1 | depth 0.5 |" in section
    line = next(line for line in section.splitlines() if "| gates-global |" in line)
    assert line.endswith("| 1.00 | 0.00 | 1.00 | 0.00 |")


def test_the_ratio_is_left_out_where_the_dense_row_read_other_texts() -> None:
    other = replace(ROWS[0], measures=(Measure("nll", "book", (7.0,), (3,)),))
    page = render([other, ROWS[1]], ABOUT)
    assert cells(page, "Perplexity", "gates-global")[6].startswith("22.99")
    assert cells(page, "Perplexity", "gates-global")[7] == "–"


def test_plots_are_written_beside_the_table(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = ResultFile(tmp_path / FILE_NAME, ABOUT)
    for one in ROWS:
        results.add(one)
    written = write_report(results.path)
    assert [path.suffix for path in written] == [".json", ".md", ".png", ".svg"]
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "results.svg").read_text()


def test_rows_of_whole_prompts_alone_make_no_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = ResultFile(tmp_path / FILE_NAME, ABOUT)
    results.add(ROWS[-1])
    assert [path.suffix for path in write_report(results.path)] == [".json", ".md"]


def test_every_line_of_a_plot_is_named_and_none_is_drawn_like_another(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = ResultFile(tmp_path / FILE_NAME, ABOUT)
    names = [f"method-{number}" for number in range(23)]
    for name in names:
        task, measures = ("recall", recall(1.0, 0.0)) if name == names[-1] else ("text", text(3.0))
        results.add(row(name, 64, *measures, task=task))
    results.add(ROWS[0])
    write_report(results.path)
    drawn = (tmp_path / "results.svg").read_text()
    assert all(f"<!-- {name} -->" in drawn for name in (*names, "dense"))
    # The svg's lines: colour and dashes. The 11th has the colour of the first.
    lines = re.findall(r"stroke-dasharray: ([\d., ]+)", drawn)
    assert len(set(lines)) >= 2, "the second and the third ten are dashed"


def test_answers_of_one_conversation_are_drawn_together() -> None:
    """Conversations that are all right or all wrong: two observations a conversation's worth, not eight."""
    told = row(
        "tova", 64, Measure("correct", "conversation", (1.0,) * 4 + (0.0,) * 4, (1,) * 8, 512), task="conversation"
    )
    (column, _) = columns_of("conversation", [told])
    figure = column.read(told, None)
    assert figure is not None
    assert (figure.value, figure.low, figure.high) == (0.5, 0.0, 1.0)


def test_figures_join_the_rows_in_the_file(tmp_path: Path) -> None:
    results = ResultFile(tmp_path / FILE_NAME, ABOUT)
    for one in ROWS:
        results.add(one)
    write_report(results.path)
    assert list(read_rows(results.path)) == ROWS
    figures = {
        (one["task"], one["method"]): one for one in json.loads(results.path.read_text(encoding="utf-8"))["figures"]
    }
    value, low, high = figures["text", "gates-global"]["× dense"]
    assert value == pytest.approx(math.exp(0.1), abs=1e-5)
    assert low <= value <= high
    assert figures["recall", "dense"]["both"][0] == 0.75
