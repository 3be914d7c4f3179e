"""`trimkv-eval` end to end on a tiny model, and what it answers to flags that cannot be."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from tests.evaluation.tiny_model import save_model
from trimkv_core.evaluation.cli import main
from trimkv_core.evaluation.rows import Row, read_rows

SMALL = ["--text-tokens", "150", "--excerpts", "1", "--recall-cases", "1", "--recall-lengths", "512"]
SMALL += ["--conversations", "1", "--agreement-tokens", "60", "--new-tokens", "5", "--chunk", "32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, with_tokenizer=True)
    for name in ("book", "manual"):
        line = f"The {name} has a sentence of some length here, and another one after it. " * 2
        (folder / f"{name}.txt").write_text("\n\n".join([line.strip()] * 4))
    return folder


def run(folder: Path, *arguments: str) -> int:
    named = ["--model", str(folder / "base"), "--gates", str(folder / "gates")]
    return main([*named, *SMALL, *arguments])


def texts(folder: Path) -> list[str]:
    return ["--text", str(folder / "book.txt"), str(folder / "manual.txt")]


def rows_of(output: Path) -> dict[tuple[str, str, int | None], Row]:
    return {(row.task, row.method, row.memory_size): row for row in read_rows(output / "results.json")}


def test_a_run_writes_results_that_another_goes_on_from(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = [*texts(folder), "--output", str(tmp_path), "--budgets", "16,dense"]
    methods = "gates-global,streaming-llm,whole-prompt:snapkv"
    assert run(folder, *arguments, "--methods", methods, "--picture", str(tmp_path / "p.html")) == 0
    rows = rows_of(tmp_path)
    names = ("text", "recall", "conversation", "agreement")
    expected = {(task, "dense", None) for task in names[:3]} | {("recall", "whole-prompt:snapkv", 16)}
    expected |= {(task, method, 16) for task in names for method in ("gates-global", "streaming-llm")}
    assert set(rows) == expected
    assert rows["text", "gates-global", 16].peak_entries == 48
    assert rows["text", "gates-global", 16].sinks == 2
    assert rows["text", "dense", None].peak_entries == 149
    assert sum(rows["text", "dense", None].measures[0].counts) == 149
    (kl, *_) = rows["agreement", "gates-global", 16].measure("kl", "book")
    assert sum(kl.sums) > 0.1
    page = (tmp_path / "results.md").read_text()
    for heading in ("Perplexity", "Passkey", "turns", "Agreement", "whole prompt"):
        assert heading in page
    assert "<!doctype html>" in (tmp_path / "p.html").read_text()
    assert str(folder) not in page + (tmp_path / "results.json").read_text()

    caplog.set_level(logging.INFO)
    caplog.clear()
    assert run(folder, *arguments, "--methods", "gates-global,key-norm", "--resume") == 0
    kept = [record.getMessage() for record in caplog.records if "kept from an earlier run" in record.getMessage()]
    assert len(kept) == 7
    again = rows_of(tmp_path)
    assert set(again) == expected | {(task, "key-norm", 16) for task in names}
    assert all(again[key] == rows[key] for key in expected)


def test_other_settings_make_rows_anew(folder: Path, tmp_path: Path) -> None:
    arguments = ["--tasks", "text", "--budgets", "16", "--output", str(tmp_path), *texts(folder)]
    assert run(folder, *arguments, "--methods", "gates-global,key-norm") == 0
    before = rows_of(tmp_path)
    assert run(folder, *arguments, "--methods", "gates-global,key-norm", "--resume", "--gate-sinks", "0") == 0
    after = rows_of(tmp_path)
    assert after["text", "gates-global", 16].fingerprint != before["text", "gates-global", 16].fingerprint
    assert after["text", "gates-global", 16].sinks == 0
    assert after["text", "key-norm", 16] == before["text", "key-norm", 16]


def test_results_of_an_earlier_run_are_not_written_over(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "results.json").write_text("hours of work")
    assert run(folder, "--tasks", "text", "--budgets", "16", "--output", str(tmp_path), *texts(folder)) == 2
    assert "results.json of an earlier run: add --resume" in caplog.text
    assert (tmp_path / "results.json").read_text() == "hours of work"


def test_rows_of_other_texts_leave_the_table_and_stay_beside_it(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two texts of one length: the first one's dense row would pass for the second's."""
    arguments = ["--tasks", "text", "--methods", "tova", "--output", str(tmp_path)]
    book, manual = (["--text", str(folder / name)] for name in ("book.txt", "manual.txt"))
    assert run(folder, *arguments, *book, "--budgets", "16,dense") == 0
    assert run(folder, *arguments, *manual, "--budgets", "20", "--resume") == 0
    assert "dense of task text holds no more" in caplog.text
    assert set(rows_of(tmp_path)) == {("text", "tova", 20)}
    assert {row.method for row in read_rows(tmp_path / "results.before.json")} == {"dense", "tova"}


def test_what_is_wrong_with_a_picture_is_said_before_anything_is_measured(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = [*texts(folder), "--output", str(tmp_path / "out"), "--budgets", "16", "--picture", str(tmp_path / "p")]
    assert run(folder, *arguments, "--picture-tokens", "12") == 2
    assert "held whole" in caplog.text
    assert run(folder, *arguments, "--chunk", "1", "--picture-tokens", "300") == 2
    assert "lower --picture-tokens" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_short_text_needs_no_word_on_a_task_that_is_not_asked_for(folder: Path, tmp_path: Path) -> None:
    arguments = ["--tasks", "text", "--budgets", "dense", "--output", str(tmp_path), *texts(folder)]
    assert run(folder, *arguments, "--text-tokens", "40") == 0


def test_a_method_that_holds_everything_agrees_with_dense(folder: Path, tmp_path: Path) -> None:
    arguments = ["--tasks", "agreement", "--budgets", "100", "--output", str(tmp_path), *texts(folder)]
    assert run(folder, *arguments, "--methods", "gates-local,tova") == 0
    for row in rows_of(tmp_path).values():
        values = {measure.metric: sum(measure.sums) / sum(measure.counts) for measure in row.measures}
        assert abs(values["kl"]) < 1e-4
        assert values["same_best"] == 1.0
        assert values["greedy_prefix"] == values["greedy_exact"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--methods", "gates-globe", "--output", "x"], "unknown method gates-globe: use dense, gates-global"),
        (["--tasks", "text", "--output", "x"], "need --text"),
        ([], "say where results go"),
        (["--picture", "p.html"], "--picture needs a text"),
        (["--device", "abacus", "--tasks", "recall", "--output", "x"], "--device 'abacus' is none"),
        (["--device", "meta", "--tasks", "recall", "--output", "x"], "--device 'meta' is not supported"),
        (["--device", "cuda:99", "--tasks", "recall", "--output", "x"], "--device 'cuda:99' is not there"),
        (["--text", "absent.txt", "--output", "x"], "absent.txt cannot be read: No such file"),
        (["--tasks", "recall", "--budgets", "2", "--methods", "tova", "--output", "x"], "use at least 8"),
        (["--tasks", "recall", "--budgets", "1", "--methods", "gates-global", "--output", "x"], "num_sink_tokens=2"),
        (["--tasks", "recall", "--methods", "kvpress:tova", "--budgets", "9", "--output", "x"], "--kvpress-python"),
        (["--tasks", "recall", "--methods", "kvpress:luck", "--budgets", "9", "--output", "x"], "kvpress has no luck"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_is_written(
    folder: Path,
    arguments: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(folder, *arguments) == 2
    assert complaint in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--budgets", "16,some"], "'some' is no budget"),
        (["--budgets", "0"], "'0' is no budget"),
        (["--tasks", "text,chess"], "unknown chess"),
        (["--recall-lengths", "20"], "at least 256"),
        (["--chunk", "0"], "0 is below 1"),
        (["--chunk", "many"], "'many' is no whole number"),
        (["--methods", ","], "an empty list"),
    ],
)
def test_malformed_flags_are_refused(
    folder: Path, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(folder, *arguments, "--output", "x")
    assert exit_.value.code == 2
    assert complaint in capsys.readouterr().err


def test_a_text_shorter_than_an_excerpt_is_named(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(folder, *texts(folder), "--output", str(tmp_path), "--text-tokens", "9000") == 2
    assert "text 'book' has" in caplog.text
    assert "--text-tokens" in caplog.text


def test_gates_are_asked_for_where_there_are_none(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["--model", str(folder / "base"), "--methods", "gates-local", "--budgets", "16"]
    assert main([*arguments, "--tasks", "recall", "--output", str(tmp_path)]) == 2
    assert "gates-local needs gates: name a checkpoint with --gates" in caplog.text


@pytest.mark.parametrize("config", [None, '{"model_type": "abacus"}'])
def test_a_model_that_is_none_is_named(tmp_path: Path, config: str | None, caplog: pytest.LogCaptureFixture) -> None:
    model = tmp_path / "model"
    if config is not None:
        model.mkdir()
        (model / "config.json").write_text(config)
    assert main(["--model", str(model), "--tasks", "recall", "--output", str(tmp_path / "out")]) == 1
    assert f"model {str(model)!r} cannot be loaded: use embedded, a hub repo id" in caplog.text


def test_a_folder_of_gates_brings_its_model(folder: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(folder / "gates"), "--methods", "gates-global", "--budgets", "16", *SMALL]
    assert main([*arguments, "--tasks", "recall", "--output", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "results.json").read_text())["settings"]["gates"] == "gates"
