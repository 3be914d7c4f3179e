from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config

from tests.core.tiny import load
from trimkv_core.budget import Budget, Geometry, Strategy
from trimkv_core.byte_ledger import (
    CARDS,
    ModelWeights,
    decode_bytes,
    geometry_of,
    held_at_most,
    prefill_flops,
    reservation,
    step_seconds,
    tokens_per_second_limit,
    weigh_config,
    weigh_model,
)
from trimkv_core.gates import GateKind, GateShape
from trimkv_core.pages import PagePool
from trimkv_core.sequences import SequenceTable

H200_COPY = 4.3e12
QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}
GEOMETRY = Geometry(num_layers=36, num_heads=8, head_dim=128, block_size=16, kv_itemsize=2)
PAPER = Budget(memory_size=1024)
GOALS = Budget(memory_size=512)


@pytest.fixture(scope="module")
def qwen() -> ModelWeights:
    return weigh_config(Qwen3Config(**QWEN3_4B), dtype=torch.bfloat16)


def weights(**changes: Any) -> ModelWeights:
    """A model of round numbers."""
    model = ModelWeights(
        layer_bytes=1000,
        head_bytes=200,
        gate_bytes=50,
        embedding_bytes=0,
        embedding_row_bytes=8,
        logits_row_bytes=40,
        layer_parameters=500,
        gate_parameters=25,
        head_parameters=100,
        query_width=64,
    )
    return replace(model, **changes)


# ---- the figures that the goals are stated in ----------------------------------------------------------------------


def test_qwen3_4b_weighs_eight_gigabytes_and_a_sequence_adds_81_megabytes(qwen: ModelWeights) -> None:
    assert qwen.base_bytes == pytest.approx(8.0e9, rel=0.01)
    assert qwen.read_bytes == qwen.base_bytes
    step = decode_bytes(qwen, GEOMETRY, GOALS, sequences=64, held=held_at_most(GOALS, 131_072))
    assert step.entries_read / 64 == 544 * 288 * 512
    assert step.sequence_bytes == pytest.approx(81e6, rel=0.02)


def test_the_limits_of_a_card_are_those_that_the_goals_name(qwen: ModelWeights) -> None:
    one = decode_bytes(qwen, GEOMETRY, GOALS, sequences=1, held=544)
    four = decode_bytes(qwen, GEOMETRY, PAPER, sequences=4, held=1056)
    assert tokens_per_second_limit(one, H200_COPY) == pytest.approx(540, rel=0.03)
    assert tokens_per_second_limit(four, H200_COPY) == pytest.approx(2000, rel=0.02)
    assert tokens_per_second_limit(four, H200_COPY) == pytest.approx(4 / step_seconds(four, H200_COPY))


def test_a_sequence_of_any_length_reserves_at_most_six_percent_more_than_its_entries() -> None:
    reserved = reservation(GEOMETRY, GOALS, total_tokens=131_072)
    assert reserved.entry_bytes == 544 * 288 * 520
    assert reserved.pages == GOALS.ceiling_pages(GEOMETRY, total_tokens=131_072)
    assert 1.0 < reserved.overhead <= 1.06
    # What a table as wide as the context would cost by itself.
    assert 0.11 * reserved.entry_bytes < 288 * (131_072 // 16) * 4


def test_larger_pages_cost_what_the_design_says_they_do() -> None:
    wide = replace(GEOMETRY, block_size=256)
    assert reservation(wide, GOALS, total_tokens=131_072).overhead == pytest.approx(1.47, abs=0.02)


def test_the_reservation_is_what_pool_and_page_lists_really_take() -> None:
    geometry = Geometry(num_layers=2, num_heads=3, head_dim=8, block_size=4, kv_itemsize=4)
    budget = Budget(memory_size=10, buffer_size=6)
    reserved = reservation(geometry, budget, total_tokens=1000)
    pool = PagePool(geometry, reserved.pages, dtype=torch.float32)
    table = SequenceTable(pool, 1)
    table.open(reserved.pages)
    lists = table.page_lists.arena.nbytes
    null_page = geometry.block_size * geometry.entry_bytes
    assert reserved.page_bytes + 4 * reserved.pages + null_page == pool.num_bytes
    assert reserved.table_bytes == 2 * lists + 4 * reserved.pages + table.lengths.nbytes


# ---- what a step moves ---------------------------------------------------------------------------------------------


def test_weights_are_read_once_a_step_and_everything_else_once_a_sequence() -> None:
    geometry = Geometry(num_layers=2, num_heads=2, head_dim=4, block_size=4, kv_itemsize=2)
    one, ten = (decode_bytes(weights(), geometry, GOALS, sequences=count, held=20) for count in (1, 10))
    assert one.weights == ten.weights == 1250
    for field in ("embedding", "entries_read", "entries_written", "tables", "logits"):
        assert getattr(ten, field) == 10 * getattr(one, field)
    assert one.entries_read == 4 * 20 * (2 * 4 * 2)
    assert one.entries_written == 4 * geometry.entry_bytes
    assert one.embedding == 8
    assert one.logits == 80
    assert ten.sequence_bytes == (ten.total - 1250) / 10
    parts = (one.weights, one.embedding, one.entries_read, one.entries_written, one.tables, one.eviction, one.logits)
    assert one.total == sum(parts)


def test_only_who_can_evict_pays_for_it_and_less_the_longer_the_buffer() -> None:
    def eviction(budget: Budget) -> int:
        return decode_bytes(weights(), GEOMETRY, budget, sequences=1, held=544).eviction

    assert eviction(Budget.dense()) == 0
    assert eviction(Budget(memory_size=512, buffer_size=64)) < eviction(GOALS)
    assert eviction(Budget(memory_size=None, strategy=Strategy.THRESHOLD, alpha_threshold=0.5)) > 0
    step = decode_bytes(weights(), GEOMETRY, GOALS, sequences=1, held=544)
    assert step.eviction < 0.01 * step.entries_read


def test_eight_bit_entries_halve_what_is_read_and_their_scales_are_counted() -> None:
    full = decode_bytes(weights(), GEOMETRY, GOALS, sequences=2, held=100)
    small = replace(GEOMETRY, kv_itemsize=1)
    half = decode_bytes(weights(), small, GOALS, sequences=2, held=100)
    scaled = decode_bytes(weights(), replace(small, scale_bytes=8), GOALS, sequences=2, held=100)
    assert 2 * half.entries_read == full.entries_read
    assert scaled.entries_read - half.entries_read == 2 * 288 * 100 * 8
    assert scaled.entries_written - half.entries_written == 2 * 288 * 8


def test_a_dense_sequence_holds_all_it_has_seen() -> None:
    assert held_at_most(Budget.dense(), 8192) == 8192
    assert held_at_most(GOALS, 8192) == 544
    assert held_at_most(GOALS, 100) == 100
    assert reservation(GEOMETRY, Budget.dense(), total_tokens=32_768).entry_bytes == pytest.approx(4.9e9, rel=0.01)


# ---- prefill -------------------------------------------------------------------------------------------------------


def test_a_prompt_costs_two_operations_a_parameter_and_token_and_its_attention() -> None:
    matrices = 2 * 10 * 525 + 2 * 100
    pairs = sum(range(1, 11))
    assert prefill_flops(weights(), Budget.dense(), prompt_tokens=10) == matrices + 4 * 64 * pairs


def test_attention_of_a_chunk_sees_what_was_kept_before_it() -> None:
    budget = Budget(memory_size=4, buffer_size=2, prefill_chunk=3)
    matrices = 2 * 10 * 525 + 2 * 100
    # Chunks of 3, 3, 3, 1 find 0, 3, then 4 entries: 6 after the second chunk reach M + buffer, 7 after the third.
    pairs = (0 + 6) + (3 * 3 + 6) + (3 * 4 + 6) + (1 * 4 + 1)
    assert prefill_flops(weights(), budget, prompt_tokens=10) == matrices + 4 * 64 * pairs
    whole = Budget(memory_size=4, buffer_size=2)
    assert prefill_flops(weights(), whole, prompt_tokens=10) == prefill_flops(
        weights(), Budget.dense(), prompt_tokens=10
    )


def test_a_budget_makes_a_long_prompt_linear(qwen: ModelWeights) -> None:
    budget = Budget(memory_size=512, prefill_chunk=512)
    short, long = (prefill_flops(qwen, budget, prompt_tokens=count) for count in (16_384, 131_072))
    assert long / short == pytest.approx(8, rel=0.01)
    assert prefill_flops(qwen, Budget.dense(), prompt_tokens=131_072) > 4 * long


# ---- models --------------------------------------------------------------------------------------------------------


def test_a_loaded_model_and_its_config_weigh_the_same(tmp_path: Path) -> None:
    _, model = load(tmp_path, "qwen3", tie_word_embeddings=True)
    loaded = weigh_model(model)
    shape = GateShape(kind=GateKind.RG10, hidden_size=32, intermediate_size=8, num_heads=2, num_layers=3, is_tied=True)
    assert weigh_config(model.config, dtype=torch.float32, gates=shape) == loaded
    assert loaded.base_bytes + loaded.gate_bytes == sum(parameter.nbytes for parameter in model.parameters())
    # Tied: two layers and their biases for each, one last projection and bias for all.
    assert loaded.gate_bytes == 4 * (3 * (32 * 8 + 8 + 8 * 8 + 8) + 8 * 2 + 2)
    assert loaded.gate_parameters == 3 * (32 * 8 + 8 * 8) + 8 * 2
    assert loaded.query_width == 3 * 4 * 16


def test_an_untied_embedding_lies_in_memory_and_only_its_rows_are_read() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    model = weigh_config(config, dtype=torch.float32)
    assert model.embedding_bytes == model.head_bytes == 64 * 32 * 4
    assert model.read_bytes == model.base_bytes - model.embedding_bytes
    tied = weigh_config(
        LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True),
        dtype=torch.float32,
    )
    assert tied.embedding_bytes == 0
    assert tied.read_bytes == model.read_bytes
    assert geometry_of(config, block_size=16, dtype=torch.float32).head_dim == 8


def test_cards_are_named_with_their_memory_and_bandwidth() -> None:
    assert CARDS["H200"].bandwidth == 4.8e12
    assert CARDS["H100"].memory == 80 * 10**9
    assert all(card.bandwidth > 1e11 and card.memory > 1e10 for card in CARDS.values())
