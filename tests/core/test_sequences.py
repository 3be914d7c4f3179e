"""Pages are never shared, lost or freed twice, whatever happens in whatever order."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.core.reference import Entry, kept
from trimkv_core.batches import Segment
from trimkv_core.budget import Budget, Geometry, Strategy
from trimkv_core.pages import PagePool, PoolExhausted
from trimkv_core.sequences import SequenceTable

LAYERS, HEADS, DIM = 2, 2, 4
STREAMS = LAYERS * HEADS


def build_table(*, block_size: int = 4, pages: int = 64, rows: int = 5, can_grow: bool = False) -> SequenceTable:
    geometry = Geometry(LAYERS, HEADS, DIM, block_size, kv_itemsize=4)
    return SequenceTable(PagePool(geometry, pages, dtype=torch.float32), rows, can_grow=can_grow)


def content(row_tag: float, layer: int, head: int, position: int) -> float:
    """A key that says whose it is, so that a misplaced entry is found out."""
    return row_tag * 1000 + layer * 100 + head * 50 + position


class Model:
    """What a table should hold, kept with plain lists."""

    def __init__(self, tag: float, budget: Budget) -> None:
        self.tag, self.budget = tag, budget
        self.entries: set[Entry] = set()
        self.seen = 0
        self.looked_at = 0


class TableMachine(RuleBasedStateMachine):
    """Admit, step, evict, abort, snapshot and restore in any order, against plain lists."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = random.Random(0)
        self.table = build_table(block_size=self.rng.choice([1, 3, 4]), pages=200)
        self.models: dict[int, Model] = {}
        self.tag = 0.0

    @rule(
        memory=st.integers(1, 6),
        buffer=st.integers(1, 4),
        strategy=st.sampled_from(["fixed", "threshold", "dense"]),
        floor=st.integers(0, 1),
    )
    @precondition(lambda self: len(self.models) < 5)
    def open(self, memory: int, buffer: int, strategy: str, floor: int) -> None:
        self.tag += 1
        budget = {
            "fixed": Budget(memory_size=memory, buffer_size=buffer, min_tokens_per_head=min(floor, memory)),
            "threshold": Budget(
                memory_size=memory, buffer_size=buffer, strategy=Strategy.THRESHOLD, alpha_threshold=0.2
            ),
            "dense": Budget.dense(),
        }[strategy]
        self.models[self.table.open(self.rng.choice([1, 8, 30]))] = Model(self.tag, budget)

    @rule(data=st.data())
    @precondition(lambda self: self.models)
    def step(self, data: st.DataObject) -> None:
        rows = [row for row in self.models if self.rng.random() < 0.7]
        segments = [Segment(row, data.draw(st.sampled_from([1, 1, 1, 2, 7]))) for row in rows]
        segments.sort(key=lambda segment: segment.tokens != 1)
        if not segments:
            return
        free = self.table.pool.num_free
        before = self.table.lengths.clone()
        try:
            batch = self.table.extend(segments)
        except PoolExhausted:
            assert self.table.pool.num_free == free
            assert torch.equal(self.table.lengths, before)
            return
        self._write(segments, batch.slots)
        due = []
        for segment in segments:
            model = self.models[segment.row]
            model.seen += segment.tokens
            if self.table.is_due(segment.row, model.budget, before=model.looked_at):
                due.append((segment.row, model.budget))
            model.looked_at = model.seen
        for eviction in self.table.evict(due):
            model = self.models[eviction.row]
            model.entries = kept(list(model.entries), model.seen, model.budget, STREAMS)
            assert eviction.held == len(model.entries)

    def _write(self, segments: list[Segment], slots: torch.Tensor) -> None:
        log_betas = torch.empty(slots.shape, dtype=torch.float32)
        keys = torch.empty(slots.shape, dtype=torch.float32)
        positions = []
        at = 0
        for segment in segments:
            model = self.models[segment.row]
            for nth in range(segment.tokens):
                position = model.seen + nth
                positions.append(position)
                for layer in range(LAYERS):
                    for head in range(HEADS):
                        log_beta = -(10.0 ** self.rng.uniform(-3, 0.5))
                        log_betas[layer, head, at] = log_beta
                        keys[layer, head, at] = content(model.tag, layer, head, position)
                        stored = float(log_betas[layer, head, at])
                        model.entries.add(Entry(layer * HEADS + head, position, stored))
                at += 1
        flat = slots.flatten()
        key = keys.flatten()[:, None].expand(-1, DIM).contiguous()
        position = torch.tensor(positions, dtype=torch.int32).expand(LAYERS, HEADS, -1).flatten()
        self.table.pool.write(flat, key, key + 0.5, log_betas.flatten(), position)

    @rule()
    @precondition(lambda self: self.models)
    def abort(self) -> None:
        row = self.rng.choice(list(self.models))
        self.table.close(row)
        del self.models[row]

    @rule()
    @precondition(lambda self: self.models)
    def snapshot_and_restore(self) -> None:
        row = self.rng.choice(list(self.models))
        snapshot = self.table.snapshot(row)
        model = self.models.pop(row)
        self.table.close(row)
        self.models[self.table.restore(snapshot)] = model

    @invariant()
    def pages_add_up(self) -> None:
        self.table.check_invariants()
        assert self.table.pool.num_free + self.table.pool.num_used == self.table.pool.num_pages
        if not self.models:
            assert self.table.pool.num_used == 0

    @invariant()
    def every_stream_holds_its_own(self) -> None:
        for row, model in self.models.items():
            assert self.table.seen(row) == model.seen
            assert self.table.held(row) == len(model.entries)
            if model.budget.memory_size is not None:
                limit = STREAMS * (model.budget.memory_size + model.budget.buffer_size)
                assert self.table.held(row) <= limit
            snapshot = self.table.snapshot(row)
            streams = torch.repeat_interleave(torch.arange(STREAMS), snapshot.lengths.long()).tolist()
            found = {
                Entry(stream, position, log_beta)
                for stream, position, log_beta in zip(
                    streams, snapshot.position.tolist(), snapshot.log_beta.tolist(), strict=True
                )
            }
            assert found == model.entries
            expected = [
                content(model.tag, stream // HEADS, stream % HEADS, position)
                for stream, position in zip(streams, snapshot.position.tolist(), strict=True)
            ]
            assert snapshot.key[:, 0].tolist() == expected
            assert (snapshot.value[:, -1] - 0.5).tolist() == expected


TestTable = TableMachine.TestCase
TestTable.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_evicting_one_sequence_leaves_others_untouched() -> None:
    table = build_table()
    budget = Budget(memory_size=2, buffer_size=1)
    rows = [table.open(20), table.open(20)]
    batch = table.extend([Segment(rows[0], 5), Segment(rows[1], 5)])
    slots = batch.slots.flatten()
    key = torch.arange(slots.numel(), dtype=torch.float32)[:, None].expand(-1, DIM)
    log_beta = -torch.rand(slots.numel()) - 0.01
    table.pool.write(slots, key, key, log_beta, batch.position.expand(LAYERS, HEADS, -1).flatten())
    before = table.snapshot(rows[1])
    (eviction,) = table.evict([(rows[0], budget)])
    assert eviction.held == STREAMS * 2
    after = table.snapshot(rows[1])
    for name in ("lengths", "key", "value", "log_beta", "position"):
        assert torch.equal(getattr(before, name), getattr(after, name))


def test_a_full_pool_refuses_and_changes_nothing() -> None:
    table = build_table(pages=4)
    row = table.open(4)
    table.extend([Segment(row, 1)])
    with pytest.raises(PoolExhausted, match="4 pages are needed and 0 of 4 are free"):
        table.extend([Segment(row, 4)])
    table.check_invariants()
    assert table.seen(row) == 1


def test_rows_and_pool_grow_where_they_may() -> None:
    table = build_table(pages=1, rows=1, can_grow=True)
    rows = [table.open(1) for _ in range(3)]
    for row in rows:
        table.extend([Segment(row, 9)])
    table.check_invariants()
    assert [table.held(row) for row in rows] == [9 * STREAMS] * 3


def test_a_restore_without_room_changes_nothing() -> None:
    table = build_table(pages=8, rows=2)
    row = table.open(4)
    table.extend([Segment(row, 4)])
    snapshot = table.snapshot(row)
    table.restore(snapshot)
    with pytest.raises(RuntimeError, match="all 2 sequence rows are in use"):
        table.restore(snapshot)
    table.close(row)
    table.extend([Segment(1 - row, 1)])
    with pytest.raises(PoolExhausted):
        table.restore(snapshot)
    table.check_invariants()


def test_page_lists_compact_before_they_grow() -> None:
    table = build_table(pages=200, rows=4)
    rows = [table.open(30) for _ in range(3)]
    for row in rows:
        table.extend([Segment(row, 9)])
    size = table.page_lists.arena.numel()
    table.close(rows[0])
    table.close(rows[2])
    table.open(60)
    assert table.page_lists.arena.numel() == size
    table.check_invariants()
