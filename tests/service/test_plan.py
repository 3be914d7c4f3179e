from __future__ import annotations

import json
from pathlib import Path

import pytest

from service import cli
from service.plan import PlanError, plan_row, run_plan
from trimkv_core.budget import Budget, Geometry, lane_pages
from trimkv_core.byte_ledger import CARDS

CONFIG = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 1000,
    "max_position_embeddings": 40_000,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
GATES = {
    "base_model": "x",
    "retention_gate": "rg10",
    "retention_gate_intermediate_size": 8,
    "tie_retention_gate_layers": True,
    "memory_size": 96,
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder with a config and nothing else: no weights to load, no tokenizer."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path)


def rows(text: str) -> dict[str, list[str]]:
    """Cells of the table by their first word."""
    table = text.split("\n\n")[1].splitlines()[1:-1]
    return {line.split()[0]: line.split(maxsplit=1)[1].split("  ") for line in table}


def counts(text: str, name: str) -> list[int]:
    return [int(cell.strip().split(" ")[0].replace(",", "")) for cell in rows(text)[name] if cell.strip()]


def test_a_row_is_admissions_own_arithmetic() -> None:
    geometry = Geometry(num_layers=2, num_heads=3, head_dim=4, block_size=16, kv_itemsize=2)
    budget = Budget(memory_size=64, buffer_size=32)
    row = plan_row(geometry, budget, pages=1000, contexts=(4096, 8192))
    pages = budget.ceiling_pages(geometry, total_tokens=4096)
    assert row.sequences == (1000 // pages, 1000 // pages)
    assert row.sequence_bytes == (pages * geometry.page_bytes,) * 2


def test_the_table_shows_asked_and_usual_budgets_and_dense_by_context(model: str) -> None:
    text = run_plan(["--model", model, "--memory", "1GB", "--kv-budget", "200"])
    found = rows(text)
    assert set(found) >= {"kv_budget", "64", "128", "200*", "512", "dense"}
    budgeted, dense = counts(text, "200*"), counts(text, "dense")
    assert len(budgeted) == len(dense) == 3
    assert len(set(budgeted)) == 1
    assert dense[0] > dense[1] > dense[2] > 0
    assert budgeted[2] > 50 * dense[2]
    assert "40,000 tokens" in text


def test_weights_and_a_prefill_chunk_are_subtracted_and_said(model: str) -> None:
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128 + 2 * 64 + 2 * 16
    weights = 2 * (4 * layer + 1000 * 64 + 64)
    geometry = Geometry(num_layers=4, num_heads=2, head_dim=16, block_size=16, kv_itemsize=2)
    text = run_plan(["--model", model, "--memory", "10MiB", "--kv-budget", "64", "--context", "4096"])
    assert f"weights {weights / 1024:.1f} KiB" in text
    pages = ((10 << 20) - weights) // geometry.page_bytes - lane_pages(geometry, 512)
    budget = Budget(memory_size=64)
    assert counts(text, "64*") == [pages // budget.ceiling_pages(geometry, total_tokens=4096)]


def test_gates_are_counted_and_their_trained_budget_shown(model: str, tmp_path: Path) -> None:
    gates = tmp_path / "gates"
    gates.mkdir()
    (gates / "config.json").write_text(json.dumps(GATES))
    text = run_plan(["--model", model, "--gates", str(gates), "--memory", "1GB"])
    assert "gates" in text
    assert "96+" in rows(text)


QWEN3_4B = CONFIG | {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 262_144,
}


def test_the_asked_budget_is_shown_in_megabytes_of_a_sequence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_4B))
    text = run_plan(["--model", str(tmp_path), "--memory", "80GB", "--kv-budget", "512"])
    assert "76.7 MB after an eviction, 81.5 MB at 512 + 32" in text
    assert "80GB (74.5 GiB)" in text


def test_what_was_assumed_is_said(model: str) -> None:
    arguments = ["--model", model, "--memory", "1GB"]
    text = run_plan(arguments)
    assert "--max-num-seqs sequences at once (default 64)" in text
    assert "assuming bfloat16; --dtype float32 for a CPU without bf16 hardware" in text
    assert "assuming" not in run_plan([*arguments, "--dtype", "bfloat16"])


def test_auto_is_what_a_server_would_choose_not_what_the_weights_are_stored_in(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"dtype": "float32"}))
    assert "bfloat16, up to" in run_plan(["--model", str(tmp_path), "--memory", "1GB"])


def test_the_embedded_model_is_planned_without_being_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMKV_CACHE_HOME", str(tmp_path / "cache"))
    text = run_plan(["--memory", "2GiB"])
    assert text.startswith("embedded: 30 layers x 3 KV heads x 64, bfloat16, up to 8,192 tokens")
    assert "64+" in rows(text)
    assert not (tmp_path / "cache").exists()


def test_float32_needs_more(model: str) -> None:
    arguments = ["--model", model, "--memory", "1GB", "--context", "4096"]
    assert counts(run_plan([*arguments, "--dtype", "float32"]), "dense") < counts(run_plan(arguments), "dense")


def test_8_bit_entries_with_their_scales_fit_nearly_twice_as_often(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_4B))
    arguments = ["--model", str(tmp_path), "--memory", "80GB", "--kv-budget", "512", "--bandwidth", "4.3TB/s"]
    plain, scaled = (run_plan([*arguments, *extra]) for extra in ([], ["--kv-dtype", "fp8_e4m3"]))
    assert "bfloat16 (KV fp8_e4m3), up to" in scaled
    assert "KV" not in plain.splitlines()[0].replace("KV heads", "")
    assert "one entry 520 bytes" in plain
    assert "one entry 272 bytes" in scaled
    assert counts(scaled, "512*")[0] / counts(plain, "512*")[0] == pytest.approx(520 / 272, rel=0.01)
    at_64 = [float(limits(text)["512*"][2].replace(",", "")) for text in (plain, scaled)]
    assert 1.2 < at_64[1] / at_64[0] < 520 / 272
    with pytest.raises(SystemExit):
        run_plan([*arguments, "--kv-dtype", "int4"])


@pytest.mark.parametrize(
    ("extra", "part"),
    [(["--memory", "100KiB"], "--memory="), (["--memory", "1GB", "--gates", "/nowhere"], "--gates=/nowhere")],
)
def test_what_cannot_be_planned_is_one_line(model: str, extra: list[str], part: str) -> None:
    with pytest.raises(PlanError, match=part) as caught:
        run_plan(["--model", model, *extra])
    assert "\n" not in str(caught.value)


def test_a_model_that_cannot_be_had_is_one_line_and_a_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert cli.main(["plan", "--model", "nobody/nothing", "--memory", "1GB"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("trimkv-serve: --model=nobody/nothing cannot be read")


def limits(text: str) -> dict[str, list[str]]:
    """Cells of the table of limits by their first word; dense ones by their context too."""
    block = next(block for block in text.split("\n\n") if block.startswith("Decode limit"))
    found = {}
    for line in block.splitlines()[2:-1]:
        cells, _, context = line.partition("  at ")
        name, *rates = cells.split()
        found[f"{name} {context}".strip()] = rates
    return found


def test_a_cards_bandwidth_limits_are_those_of_the_byte_ledger(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_4B))
    text = run_plan(["--model", str(tmp_path), "--memory", "141GB", "--bandwidth", "4.3 TB/s"])
    assert "(4.3 TB/s):" in text
    found = limits(text)
    assert set(found) == {"64", "128", "256", "512", "1024", "2048"} | {
        f"dense {context} tokens" for context in ("4,096", "32,768", "131,072")
    }
    one, four = float(found["512"][0]), float(found["1024"][1].replace(",", ""))
    assert one == pytest.approx(540, rel=0.03)
    assert four == pytest.approx(2000, rel=0.02)


def test_batches_that_do_not_fit_have_no_limit(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_4B))
    text = run_plan(["--model", str(tmp_path), "--card", "h100"])
    assert text.splitlines()[1].startswith("H100: 80GB (74.5 GiB)")
    assert "H100, 3.35 TB/s as published" in text
    found = limits(text)
    assert found["dense 131,072 tokens"][1:] == ["-", "-", "-"]
    assert "-" not in found["512"]
    assert counts(text, "dense")[-1] < 4


def test_what_is_given_wins_over_the_card(model: str) -> None:
    text = run_plan(["--model", model, "--card", "L4", "--memory", "1GB", "--bandwidth", "250GB/s"])
    assert "1GB (" in text
    assert "(250 GB/s):" in text
    assert "as published" not in text


def test_without_a_bandwidth_there_are_no_limits(model: str) -> None:
    assert "Decode limit" not in run_plan(["--model", model, "--memory", "1GB"])


def test_gates_are_read_in_every_step_too(model: str, tmp_path: Path) -> None:
    gates = tmp_path / "gates"
    gates.mkdir()
    (gates / "config.json").write_text(json.dumps(GATES | {"retention_gate_intermediate_size": 512}))
    arguments = ["--model", model, "--card", "H200"]
    plain, gated = (limits(run_plan([*arguments, *extra])) for extra in ([], ["--gates", str(gates)]))
    assert int(gated["512"][0].replace(",", "")) < 0.9 * int(plain["512"][0].replace(",", ""))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "give --memory, such as --memory 80GB, or --card"),
        (["--bandwidth", "1TB/s"], "give --memory"),
        (["--card", "H1000"], "'H1000' is unknown: use one of"),
        (["--card", "H100", "--bandwidth", "3.35"], "'3.35' is not a bandwidth such as 4.3TB/s"),
        (["--card", "H100", "--bandwidth", "0GB/s"], "is not a bandwidth"),
    ],
)
def test_cards_and_bandwidths_that_are_none_are_one_line(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_plan(arguments)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line


def test_an_unknown_card_is_told_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_plan(["--card", "abacus"])
    assert ", ".join(CARDS) in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--memory", "8XB"], ["--memory", "1GB", "--kv-buffer", "0"]])
def test_bad_flags_are_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_plan(arguments)
    assert caught.value.code == 2
