"""Evicting on the device keeps what the sequence table keeps, in the same places."""

from __future__ import annotations

import math

import pytest
import torch

from tests.kernels.mirror import Mirror
from trimkv_core.budget import Budget, Scope
from trimkv_core.kernels.allocate import release
from trimkv_core.kernels.evict import evict
from trimkv_core.sequences import SequenceSnapshot


def evict_both(mirror: Mirror, rows: list[int], budgets: list[Budget]) -> None:
    """Evict rows in the table and on the device, padded there with the null row."""
    padded = [*rows, mirror.memory.null_row]

    def each(field: str) -> torch.Tensor:
        return mirror.index([getattr(budget, field) for budget in [*budgets, budgets[0]]])

    is_global = budgets[0].scope is Scope.GLOBAL
    held = evict(
        mirror.memory,
        mirror.index(padded),
        memory_size=each("memory_size"),
        sinks=each("num_sink_tokens"),
        window=each("sliding_window_size"),
        buffer=None if is_global else each("buffer_size"),
        is_global=is_global,
        max_entries=int(mirror.memory.lengths.sum(1).max()) + 3,
    )
    evictions = mirror.table.evict(
        [(mirror.table_rows[row], budget) for row, budget in zip(rows, budgets, strict=True)]
    )
    assert held.tolist() == [*(eviction.held for eviction in evictions), 0]


@pytest.mark.parametrize(("scope", "block_size"), [("global", 1), ("global", 5), ("local", 4)])
def test_a_sequence_keeps_the_same_entries_as_in_the_table(scope: str, block_size: int, device: torch.device) -> None:
    mirror = Mirror(layers=1, heads=3, dim=4, block_size=block_size, rows=2, device=device, num_pages=120)
    budgets = [
        Budget(memory_size=6, buffer_size=4, scope=Scope(scope), num_sink_tokens=1, sliding_window_size=2),
        Budget(memory_size=3, buffer_size=5, scope=Scope(scope)),
    ]
    evictions = [0, 0]
    for step in range(30):
        rows = [[0, 1], [1], [0]][step % 3]
        mirror.feed([*rows, mirror.memory.null_row])
        due = [row for row in rows if mirror.table.is_due(mirror.table_rows[row], budgets[row], before=0)]
        if due:
            evict_both(mirror, due, [budgets[row] for row in due])
            for row in due:
                evictions[row] += 1
            mirror.check()
    assert min(evictions) > 1
    release(mirror.memory, mirror.index([0, mirror.memory.null_row]))
    free = mirror.memory.free[: int(mirror.memory.num_free)].tolist()
    assert sorted([*free, *torch.cat(mirror.pages_of(1)).tolist()]) == list(range(120))
    assert mirror.memory.lengths[0].tolist() == [0] * 3
    assert int(mirror.memory.seen[0]) == 0


def as_bytes(entries: torch.Tensor) -> torch.Tensor:
    """[E, bytes of an entry], the same memory."""
    return entries.reshape(entries.shape[0], math.prod(entries.shape[1:])).view(torch.uint8)


def filled(
    lengths: list[int], log_beta: torch.Tensor, *, seen: int, dtype: torch.dtype, device: torch.device
) -> Mirror:
    """One row whose streams hold `lengths` entries, scored as given, in both; the device memory's pages in disorder."""
    mirror = Mirror(
        layers=1, heads=len(lengths), dim=4, block_size=4, rows=1, device=device, num_pages=300, dtype=dtype
    )
    total = sum(lengths)
    position = torch.cat([torch.randperm(seen, dtype=torch.int32, device=device)[:length] for length in lengths])
    key, value = torch.randn(2, total, 4, device=device).to(mirror.table.pool.dtype)
    counts = torch.tensor(lengths, dtype=torch.int32, device=device)
    snapshot = SequenceSnapshot(counts, key, value, log_beta, position, seen=seen, peak=total)
    mirror.table.close(mirror.table_rows[0])
    mirror.table_rows[0] = mirror.table.restore(snapshot)
    memory, pages = mirror.memory, int((-(-counts // 4)).sum())
    order = torch.randperm(memory.null_page, dtype=torch.int32, device=device)
    memory.free.copy_(order.flip(0))
    memory.num_free.fill_(memory.null_page - pages)
    memory.arena[:pages] = order[:pages]
    memory.lengths[0] = counts
    memory.seen[0] = seen
    start = 0
    for stream_pages, length in zip(mirror.pages_of(0), lengths, strict=True):
        place = torch.arange(length, device=device)
        slots = stream_pages[place // 4] * 4 + place % 4
        own = slice(start, start + length)
        for name in ("key", "value", "log_beta", "position"):
            storage = getattr(memory, name).flatten(0, 1)
            # Bytes, because PyTorch does not index 8-bit floats on the CPU.
            entries = getattr(snapshot, name)[own].to(storage.dtype)
            as_bytes(storage)[slots] = as_bytes(entries)
        start += length
    return mirror


@pytest.mark.parametrize("memory_size", [1, 90, 270, 400])
@pytest.mark.parametrize("kind", ["spread", "ties", "zeros"])
def test_ragged_rows_are_cut_at_the_same_entry(kind: str, memory_size: int, device: torch.device) -> None:
    torch.manual_seed(memory_size)
    lengths = [300, 0, 513, 7, 256]
    log_beta = {
        # Over forty binary orders of magnitude, so that every digit of a score decides somewhere.
        "spread": -torch.rand(1076, device=device) * 2.0 ** -torch.randint(0, 40, (1076,), device=device),
        "ties": -torch.randint(0, 2, (1076,), device=device).float() / 64,
        "zeros": torch.where(torch.rand(1076, device=device) < 0.5, 0.0, -0.0),
    }[kind]
    mirror = filled(lengths, log_beta, seen=600, dtype=torch.float32, device=device)
    evict_both(mirror, [0], [Budget(memory_size=memory_size, num_sink_tokens=memory_size // 90)])
    mirror.check()


def test_streams_by_themselves_are_cut_at_the_same_entry(device: torch.device) -> None:
    torch.manual_seed(3)
    log_beta = -torch.rand(560, device=device) * 2.0 ** -torch.randint(0, 40, (560,), device=device)
    mirror = filled([300, 0, 53, 52, 155], log_beta, seen=600, dtype=torch.bfloat16, device=device)
    # 53 entries are due, 52 are not.
    evict_both(mirror, [0], [Budget(memory_size=45, buffer_size=8, scope=Scope.LOCAL, sliding_window_size=4)])
    assert mirror.memory.lengths[0].tolist() == [45, 0, 45, 52, 45]
    mirror.check()


def test_scales_move_with_their_entries(device: torch.device) -> None:
    mirror = filled([40, 60], -torch.rand(100, device=device), seen=64, dtype=torch.float8_e4m3fn, device=device)
    memory = mirror.memory
    assert memory.key_scale is not None
    assert memory.value_scale is not None
    memory.key_scale.copy_(memory.position + 1)
    memory.value_scale.copy_(memory.position + 1000)
    number = mirror.index([9])
    nothing = mirror.index([0])
    evict(memory, mirror.index([0]), memory_size=number, sinks=nothing, window=nothing, is_global=True, max_entries=100)
    assert int(memory.lengths[0].sum()) == 18
    for pages, length in zip(mirror.pages_of(0), memory.lengths[0].tolist(), strict=True):
        position = memory.position[pages].flatten()[:length]
        assert torch.equal(memory.key_scale[pages].flatten()[:length], (position + 1).float())
        assert torch.equal(memory.value_scale[pages].flatten()[:length], (position + 1000).float())


def test_local_budgets_need_a_buffer(device: torch.device) -> None:
    mirror = Mirror(layers=1, heads=1, dim=4, block_size=4, rows=1, device=device)
    one = mirror.index([1])
    with pytest.raises(ValueError, match="buffer"):
        evict(mirror.memory, mirror.index([0]), memory_size=one, sinks=one, window=one, is_global=False, max_entries=1)
