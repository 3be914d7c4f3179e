"""Attention over pages equals a softmax written out."""

from __future__ import annotations

import pytest
import torch

from trimkv_core.attention.base import PagedStep
from trimkv_core.attention.torch import TorchBackend
from trimkv_core.attention.triton import TritonBackend
from trimkv_core.batches import Segment
from trimkv_core.budget import Budget, Geometry
from trimkv_core.kernels.decode import choose_splits, decode_attention, workspace_for
from trimkv_core.kernels.memory import DeviceMemory
from trimkv_core.pages import PagePool
from trimkv_core.sequences import SequenceTable

LAYERS, HEADS = 2, 2
# Streams of two rows: none, one entry, parts of a tile, several tiles.
LENGTHS = [[130, 0, 1, 64], [5, 17, 65, 200]]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def memory_of(dim: int, block_size: int, dtype: torch.dtype, device: torch.device) -> DeviceMemory:
    """Two rows of random entries on pages in disorder; what belongs to nobody is NaN."""
    torch.manual_seed(dim + block_size)
    memory = DeviceMemory.empty(
        num_pages=500,
        block_size=block_size,
        head_dim=dim,
        num_rows=2,
        num_streams=LAYERS * HEADS,
        pages_per_row=500,
        dtype=dtype,
        device=device,
    )
    pages = torch.randperm(500, dtype=torch.int32, device=device)
    entries = torch.randn(2, *memory.key.shape, device=device)
    is_held = torch.zeros(501, block_size, dtype=torch.bool, device=device)
    memory.lengths[:2] = torch.tensor(LENGTHS, device=device)
    for row, lengths in enumerate(LENGTHS):
        listed = int(memory.starts[row])
        for length in lengths:
            count = -(-length // block_size)
            memory.arena[listed : listed + count], pages = pages[:count], pages[count:]
            of_stream = memory.arena[listed : listed + count].long()
            is_held[of_stream] = (torch.arange(count * block_size, device=device) < length).view(count, block_size)
            listed += count
    entries[:, ~is_held] = float("nan")
    memory.key.copy_(entries[0])
    memory.value.copy_(entries[1])
    memory.position.copy_(torch.randint(0, 300, memory.position.shape, device=device))
    if memory.key_scale is not None and memory.value_scale is not None:
        memory.key_scale.uniform_(0.5, 2.0)
        memory.value_scale.uniform_(0.5, 2.0)
    return memory


def first_pages(memory: DeviceMemory, rows: list[int]) -> torch.Tensor:
    pages = -(-memory.lengths[rows] // memory.block_size)
    return (memory.starts[rows][:, None] + pages.cumsum(1) - pages).int()


def written_out(
    memory: DeviceMemory, row: int, layer: int, query: torch.Tensor, *, scale: float, after: int | None
) -> torch.Tensor:
    """[H·G, D] for one row, in float64."""
    result = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    group = query.shape[0] // HEADS
    first = first_pages(memory, [row])[0]
    for head in range(HEADS):
        stream = layer * HEADS + head
        place = torch.arange(int(memory.lengths[row, stream]), device=query.device)
        page = memory.arena[int(first[stream]) + place // memory.block_size].long()
        at = (page, place % memory.block_size)
        key, value = memory.key.double()[at], memory.value.double()[at]
        if memory.key_scale is not None and memory.value_scale is not None:
            key, value = key * memory.key_scale[at][:, None], value * memory.value_scale[at][:, None]
        if after is not None:
            is_seen = memory.position[at] > after
            key, value = key[is_seen], value[is_seen]
        if key.shape[0]:
            own = slice(head * group, (head + 1) * group)
            result[own] = torch.softmax(query[own].double() @ key.t() * scale, 1) @ value
    return result


@pytest.mark.parametrize(
    ("block_size", "dim", "group", "dtype", "splits", "window"),
    [
        (16, 64, 4, torch.bfloat16, 1, None),
        (16, 64, 4, torch.float32, 2, 60),
        (16, 80, 2, torch.float16, 4, None),
        (5, 80, 1, torch.float32, 1, 60),
        (5, 96, 3, torch.float32, 2, None),
        (1, 64, 1, torch.bfloat16, 2, None),
        (1, 8, 17, torch.float32, 1, 3),
    ],
)
def test_attention_equals_a_softmax_written_out(
    block_size: int, dim: int, group: int, dtype: torch.dtype, splits: int, window: int | None, device: torch.device
) -> None:
    check(memory_of(dim, block_size, dtype, device), group, dtype, splits=splits, window=window)


@pytest.mark.parametrize(("group", "splits"), [(4, 1), (1, 2)])
def test_8_bit_entries_are_multiplied_by_their_scales(group: int, splits: int, device: torch.device) -> None:
    check(memory_of(64, 16, torch.float8_e4m3fn, device), group, torch.float16, splits=splits, window=None)


def check(memory: DeviceMemory, group: int, dtype: torch.dtype, *, splits: int, window: int | None) -> None:
    device = memory.key.device
    rows = [1, memory.null_row, 0]
    # Strides as a fused projection leaves them.
    fused = torch.randn(3, HEADS * group + 2, memory.head_dim, device=device).to(dtype)
    query, out = fused[:, : HEADS * group], torch.full_like(fused, 9.0)[:, : HEADS * group]
    position = torch.tensor([299, 0, 150], dtype=torch.int32, device=device)
    for layer in range(LAYERS):
        decode_attention(
            memory,
            torch.tensor(rows, dtype=torch.int32, device=device),
            first_page=first_pages(memory, rows),
            layer=layer,
            query=query,
            out=out,
            num_heads=HEADS,
            scale=0.3,
            window=window,
            position=position,
            splits=splits,
            workspace=workspace_for(*query.shape, splits=splits, device=device),
        )
        assert not out[1].any()
        for nth in (0, 2):
            after = None if window is None else int(position[nth]) - window
            expected = written_out(memory, rows[nth], layer, query[nth], scale=0.3, after=after)
            torch.testing.assert_close(out[nth].double(), expected, rtol=0.0, atol=TOLERANCE[dtype])


def test_split_streams_need_a_workspace(device: torch.device) -> None:
    memory = memory_of(8, 16, torch.float32, device)
    query = torch.zeros(1, HEADS, 8, device=device)
    row = torch.zeros(1, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="workspace"):
        decode_attention(
            memory,
            row,
            first_page=first_pages(memory, [0]),
            layer=0,
            query=query,
            out=query,
            num_heads=HEADS,
            scale=1.0,
            window=None,
            position=row,
            splits=2,
            workspace=None,
        )


def test_few_rows_are_split_to_fill_the_device_and_many_are_not() -> None:
    assert choose_splits(1, 8, 132, 1000) == 64
    assert choose_splits(1, 8, 132, 33) == 4
    assert choose_splits(16, 8, 132, 1000) == 4
    assert choose_splits(256, 8, 132, 1000) == 1
    assert choose_splits(1, 8, 132, 0) == 1
    for rows in range(1, 70):
        splits = choose_splits(rows, 8, 132, 10_000)
        assert splits.bit_count() == 1
        assert splits == 1 or rows * 8 * splits <= 4 * 132


@pytest.mark.parametrize("window", [None, 3])
def test_the_backend_equals_the_reference_backend(window: int | None, device: torch.device) -> None:
    torch.manual_seed(1)
    geometry = Geometry(LAYERS, HEADS, 16, 4, kv_itemsize=4)
    tables = [SequenceTable(PagePool(geometry, 100, dtype=torch.float32, device=device), 3) for _ in range(2)]
    backends = (TritonBackend(), TorchBackend())
    for table in tables:
        assert [table.open(8) for _ in range(3)] == [0, 1, 2]
    budget = Budget(memory_size=3, buffer_size=2)
    for tokens in ([0, 7, 3], [1, 1, 1], [1, 5, 1], [0, 1, 1], [2, 0, 0], [1, 1, 1]):
        segments = [Segment(row, count) for row, count in enumerate(tokens) if count]
        segments.sort(key=lambda segment: segment.tokens != 1)
        total = sum(tokens)
        query, key, value = (torch.randn(total, LAYERS, heads, 16, device=device) for heads in (4, HEADS, HEADS))
        log_beta = -torch.rand(total, LAYERS, HEADS, device=device)
        results = []
        for backend, table in zip(backends, tables, strict=True):
            step: PagedStep[object] = PagedStep(backend, table, table.extend(segments))  # type: ignore[arg-type]
            layers = [
                step.layer(
                    at, query[:, at], key[:, at], value[:, at], log_beta=log_beta[:, at], scale=0.3, window=window
                )
                for at in range(LAYERS)
            ]
            results.append(torch.stack(layers))
            table.evict([(s.row, budget) for s in segments if table.is_due(s.row, budget, before=0)])
            table.check_invariants()
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=2e-6)
    for row in range(3):
        snapshots = [table.snapshot(row) for table in tables]
        for name in ("lengths", "key", "value", "log_beta", "position"):
            assert torch.equal(getattr(snapshots[0], name), getattr(snapshots[1], name))
