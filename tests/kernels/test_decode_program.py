"""Decode steps that stay on the device against the reference table and backend: the same tokens, the same entries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.core.tiny import load as load_tiny
from trimkv_core.attention.base import PagedStep
from trimkv_core.attention.select import select_backend
from trimkv_core.batches import Segment
from trimkv_core.budget import Budget, Scope, Strategy
from trimkv_core.byte_ledger import geometry_of
from trimkv_core.decode_program import DecodePrograms, batch_sizes
from trimkv_core.device_sequences import DeviceSequenceTable
from trimkv_core.fp8 import FP8
from trimkv_core.lean.decoder import LeanDecoder
from trimkv_core.lean.families import read_decoder
from trimkv_core.lean.torch_ops import TorchOps
from trimkv_core.lean.triton_ops import TritonOps
from trimkv_core.pages import PagePool
from trimkv_core.sequences import SequenceTable

BUDGETS = (
    Budget(memory_size=5, buffer_size=2, num_sink_tokens=1),
    Budget.dense(),
    Budget(memory_size=4, buffer_size=3, scope=Scope.LOCAL, sliding_window_size=1),
    # Not plain: cut by the reference rules on the device.
    Budget(memory_size=6, buffer_size=2, strategy=Strategy.THRESHOLD, alpha_threshold=0.3),
)
PROMPTS = (7, 3, 11, 6)
STEPS = 9


def choose(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


class Drive:
    """Sequences fed by hand, cut when they are due."""

    def __init__(self, decoder: LeanDecoder, table: SequenceTable, backend: Any) -> None:
        self.decoder, self.table, self.backend = decoder, table, backend
        self.rows: list[int] = []
        self.before = [0] * len(PROMPTS)

    def prefill(self, prompts: list[torch.Tensor]) -> list[int]:
        self.rows = [self.table.open(100) for _ in prompts]
        return self.forward(prompts)

    def forward(self, tokens: list[torch.Tensor]) -> list[int]:
        segments = [Segment(row, len(ids)) for row, ids in zip(self.rows, tokens, strict=True)]
        batch = self.table.extend(segments)
        device = self.table.pool.device
        wanted = torch.tensor([len(ids) for ids in tokens], device=device).cumsum(0) - 1
        step = PagedStep(self.backend, self.table, batch)
        logits = self.decoder.forward(torch.cat(tokens).to(device), batch.position, step, wanted)
        self.cut()
        chosen: list[int] = choose(logits).tolist()
        return chosen

    def cut(self) -> None:
        due = []
        for index, (row, budget) in enumerate(zip(self.rows, BUDGETS, strict=True)):
            if self.table.is_due(row, budget, before=self.before[index]):
                due.append((row, budget))
            self.before[index] = self.table.seen(row)
        self.table.evict(due)


@pytest.mark.parametrize("ops", [TorchOps, TritonOps])
@pytest.mark.parametrize("model", ["qwen3/4", "qwen3/1", "phi3/4", "phi3/1", "qwen2-window/5", "qwen3/4/fp8"])
def test_steps_on_the_device_are_the_reference(tmp_path: Path, model: str, ops: Any, device: torch.device) -> None:
    family, block_size, *fp8 = model.split("/")
    _, loaded = load_tiny(tmp_path, family)
    loaded.to(device)
    kv_dtype = FP8 if fp8 else torch.float32
    geometry = geometry_of(loaded.config, block_size=int(block_size), dtype=kv_dtype)
    modules = read_decoder(loaded)
    assert modules is not None
    prompts = [torch.randint(3, 60, (n,), generator=torch.Generator().manual_seed(n)) for n in PROMPTS]

    def pool() -> PagePool:
        return PagePool(geometry, 400, dtype=kv_dtype, device=device)

    plain = Drive(LeanDecoder(modules, TorchOps(modules)), SequenceTable(pool(), 4), select_backend("torch"))
    tokens = [plain.prefill(prompts)]
    for _ in range(STEPS):
        tokens.append(plain.forward([torch.tensor([token]) for token in tokens[-1]]))

    decoder, table = LeanDecoder(modules, ops(modules)), DeviceSequenceTable(pool(), 5)
    ahead = Drive(decoder, table, select_backend("triton"))
    found = [ahead.prefill(prompts)]
    programs = DecodePrograms(decoder, table, max_rows=6, num_query_heads=modules.num_query_heads)
    if device.type == "cuda":
        programs.capture(lambda _size: (choose,))
    programs.set_last_tokens(ahead.rows, found[0])
    pending = []
    for _ in range(STEPS):  # nobody reads a token before the last step
        pending.append(programs.run(ahead.rows, choose))
        ahead.cut()
    found += [step.wait() for step in pending]
    assert found == tokens
    table.check_invariants()
    for left, right in zip(ahead.rows, plain.rows, strict=True):
        assert table.held(left) == plain.table.held(right)
        assert table.pages(left) == plain.table.pages(right)
        ours, theirs = table.snapshot(left), plain.table.snapshot(right)
        assert torch.equal(ours.lengths, theirs.lengths)
        for layer in range(geometry.num_layers):
            for head in range(geometry.num_heads):
                assert torch.equal(table.positions_of(left, layer, head), plain.table.positions_of(right, layer, head))
    for row in ahead.rows:
        table.close(row)
    assert table.pool.num_used == 0
    table.check_invariants()


def test_batch_sizes_grow_with_the_batch() -> None:
    assert batch_sizes(1) == (1,)
    assert batch_sizes(6) == (1, 2, 4, 6)
    assert batch_sizes(100)[-3:] == (64, 96, 100)
    assert all(size <= 256 for size in batch_sizes(256))
