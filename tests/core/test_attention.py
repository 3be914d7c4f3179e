"""The reference backend against a softmax written out, over ragged streams of every kind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimkv_core.attention.base import PagedStep
from trimkv_core.attention.select import select_backend
from trimkv_core.attention.torch import TorchBackend
from trimkv_core.batches import Segment
from trimkv_core.budget import Budget, Geometry
from trimkv_core.pages import PagePool
from trimkv_core.sequences import SequenceTable

LAYERS, HEADS, GROUP, DIM = 2, 3, 2, 8


class Story:
    """Every key and value a sequence was ever fed, so that what is held can be attended to the slow way."""

    def __init__(self) -> None:
        self.key = torch.empty(0, LAYERS, HEADS, DIM)
        self.value = torch.empty(0, LAYERS, HEADS, DIM)


def expected(table: SequenceTable, story: Story, row: int, layer: int, query: torch.Tensor, window: int | None):  # type: ignore[no-untyped-def]
    """[T, H·G, D] for the sequence's newest T tokens."""
    tokens, seen = query.shape[0], table.seen(row)
    result = torch.zeros_like(query)
    for head in range(HEADS):
        held = table.positions_of(row, layer, head)
        for token in range(tokens):
            at = seen - tokens + token
            visible = held[held <= at]
            if window is not None:
                visible = visible[visible > at - window]
            key = story.key[visible.long(), layer, head]
            value = story.value[visible.long(), layer, head]
            for group in range(GROUP):
                q = query[token, head * GROUP + group]
                result[token, head * GROUP + group] = torch.softmax(key @ q * 0.3, 0) @ value
    return result


@settings(max_examples=40, deadline=None)
@given(
    block_size=st.sampled_from([1, 3, 16]),
    rounds=st.lists(st.lists(st.sampled_from([0, 1, 1, 2, 9]), min_size=3, max_size=3), min_size=1, max_size=5),
    memory=st.integers(1, 6),
    window=st.sampled_from([None, 4]),
    seed=st.integers(0, 1000),
)
def test_ragged_decodes_and_chunks_equal_the_written_out_softmax(
    block_size: int, rounds: list[list[int]], memory: int, window: int | None, seed: int
) -> None:
    torch.manual_seed(seed)
    geometry = Geometry(LAYERS, HEADS, DIM, block_size, kv_itemsize=4)
    table = SequenceTable(PagePool(geometry, 4, dtype=torch.float32), 3, can_grow=True)
    budget = Budget(memory_size=memory, buffer_size=2)
    rows = [table.open(4) for _ in range(3)]
    stories = {row: Story() for row in rows}
    for counts in rounds:
        segments = [Segment(row, tokens) for row, tokens in zip(rows, counts, strict=True) if tokens]
        segments.sort(key=lambda segment: segment.tokens != 1)
        if not segments:
            continue
        step = PagedStep(TorchBackend(), table, table.extend(segments))
        total = step.batch.num_tokens
        key, value = torch.randn(total, LAYERS, HEADS, DIM), torch.randn(total, LAYERS, HEADS, DIM)
        log_beta = -torch.rand(total, LAYERS, HEADS) - 0.01
        query = torch.randn(total, LAYERS, HEADS * GROUP, DIM)
        start = 0
        for segment in segments:
            story, part = stories[segment.row], slice(start, start + segment.tokens)
            story.key, story.value = torch.cat([story.key, key[part]]), torch.cat([story.value, value[part]])
            start += segment.tokens
        for layer in range(LAYERS):
            mixed = step.layer(
                layer,
                query[:, layer],
                key[:, layer],
                value[:, layer],
                log_beta=log_beta[:, layer],
                scale=0.3,
                window=window,
            )
            start = 0
            for segment in segments:
                part = slice(start, start + segment.tokens)
                slow = expected(table, stories[segment.row], segment.row, layer, query[part, layer], window)
                torch.testing.assert_close(mixed[part], slow, atol=1e-5, rtol=1e-4)
                start += segment.tokens
        table.evict([(row, budget) for row in rows if table.is_due(row, budget, before=0)])


def test_an_unknown_backend_is_named_with_the_known_ones() -> None:
    assert select_backend().name == "torch"
    with pytest.raises(ValueError, match="backend='tpu' is unknown: use 'auto' or one of torch"):
        select_backend("tpu")
