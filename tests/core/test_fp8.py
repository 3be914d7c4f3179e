"""Keys and values as 8-bit floats: what is stored, what comes back, and that attention sees exactly that."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimkv_core.attention.base import PagedStep
from trimkv_core.attention.select import select_backend
from trimkv_core.attention.torch import TorchBackend
from trimkv_core.attention.varlen import PackedPrefill, SdpaVarlen
from trimkv_core.batches import Segment
from trimkv_core.budget import Budget, Geometry
from trimkv_core.fp8 import FP8, choose_kv_dtype, dequantise, name_kv_dtype, quantise
from trimkv_core.pages import PagePool
from trimkv_core.sequences import SequenceSnapshot, SequenceTable

LAYERS, HEADS, GROUP, DIM = 2, 3, 2, 8
STORAGES = ("key", "value", "key_scale", "value_scale", "log_beta", "position")


def bits(tensor: Tensor) -> Tensor:
    """8-bit floats as bytes: PyTorch compares none on a CPU."""
    return tensor.view(torch.uint8) if tensor.dtype == FP8 else tensor


def rounded(states: Tensor) -> Tensor:
    return dequantise(*quantise(states), states.dtype)


def pool_of(num_pages: int = 6, *, block_size: int = 4, dtype: torch.dtype = FP8) -> PagePool:
    scale_bytes = 8 if dtype == FP8 else 0
    geometry = Geometry(LAYERS, HEADS, DIM, block_size, kv_itemsize=dtype.itemsize, scale_bytes=scale_bytes)
    return PagePool(geometry, num_pages, dtype=dtype)


def entries(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values, log β and positions of very different sizes."""
    key, value = torch.randn(2, count, DIM) * 10.0 ** torch.arange(-6, count - 6).clamp(max=6)[:, None]
    return key, value, -torch.rand(count), torch.arange(count, dtype=torch.int32)


def fill(pool: PagePool) -> Tensor:
    slots = torch.randperm(pool.num_pages * pool.geometry.block_size)
    pool.write(slots, *entries(slots.numel()))
    return slots


# ---- rounding ------------------------------------------------------------------------------------------------------


def test_what_8_bits_can_hold_is_read_back_as_it_was_written() -> None:
    torch.manual_seed(0)
    numbers = torch.randint(0, 127, (50, DIM)).to(torch.uint8)
    numbers[:, 5] = 126  # 448, so that the scale is a power of 2
    power = 2.0 ** torch.randint(-20, 20, (50, 1))
    states = numbers.view(FP8).float() * power
    stored, scale = quantise(states)
    assert torch.equal(bits(stored), numbers)
    assert torch.equal(scale, power[:, 0])
    assert torch.equal(dequantise(stored, scale, torch.float32), states)


def test_an_entry_is_within_half_a_step_of_what_was_written() -> None:
    torch.manual_seed(0)
    states = entries(40)[0]
    scale = states.abs().amax(-1, keepdim=True) / 448
    # Three bits behind the point, and steps of 2^-9 below 2^-6.
    step = torch.maximum(states.abs() / 16, scale * 2**-10)
    assert ((rounded(states) - states).abs() <= step * 1.0001).all()
    assert (rounded(states) != states).any()


def test_an_entry_of_zeros_has_a_harmless_scale() -> None:
    stored, scale = quantise(torch.zeros(2, DIM))
    assert torch.equal(scale, torch.ones(2))
    assert not bits(stored).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widening_to_16_bits_rounds_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    stored, scale = quantise(torch.randn(200, DIM))
    assert torch.equal(dequantise(stored, scale, dtype), (stored.float() * scale[:, None]).to(dtype))


def test_settings_name_the_types() -> None:
    assert choose_kv_dtype("auto", torch.bfloat16) == torch.bfloat16
    assert choose_kv_dtype("fp8_e4m3", torch.bfloat16) == FP8
    assert name_kv_dtype(FP8) == "fp8_e4m3"
    assert name_kv_dtype(torch.float32) == "float32"
    with pytest.raises(ValueError, match="kv_dtype='int8' is unknown: use auto or fp8_e4m3"):
        choose_kv_dtype("int8", torch.float32)


# ---- the pool ------------------------------------------------------------------------------------------------------


def test_a_pool_stores_rounded_entries_with_their_scales() -> None:
    pool = pool_of()
    slots = torch.tensor([3, 9, 17, 22])
    key, value, log_beta, position = entries(4)
    pool.write(slots, key, value, log_beta, position)
    found = pool.load(slots)
    for stored, scale, states in ((found.key, found.key_scale, key), (found.value, found.value_scale, value)):
        assert scale is not None
        assert torch.equal(dequantise(stored, scale, torch.float32), rounded(states))
    assert torch.equal(found.log_beta, log_beta)
    assert torch.equal(found.position, position)
    others = torch.tensor([slot for slot in range(24) if slot not in slots.tolist()])
    assert not bits(pool.load(others).key).any()


def test_bfloat16_states_are_rounded_once() -> None:
    pool, slots = pool_of(), torch.arange(5)
    key, value, log_beta, position = entries(5)
    pool.write(slots, key.bfloat16(), value.bfloat16(), log_beta, position)
    stored, scale = quantise(key.bfloat16().float())
    assert torch.equal(bits(pool.load(slots).key), bits(stored))
    found = pool.load(slots).key_scale
    assert found is not None
    assert torch.equal(found, scale)


def test_moving_growing_and_storing_again_keep_every_bit() -> None:
    pool = pool_of()
    slots = fill(pool)
    source, target = slots[:5], slots[10:15]
    before = pool.load(source)
    pool.move(source, target)
    pool.grow(9)
    pool.store(torch.arange(28, 33), pool.load(target))
    for where in (source, target, torch.arange(28, 33)):
        after = pool.load(where)
        for name in STORAGES:
            assert torch.equal(bits(getattr(after, name)), bits(getattr(before, name))), name


@pytest.mark.parametrize("dtype", [FP8, torch.bfloat16, torch.float32])
def test_a_pool_takes_the_bytes_its_geometry_says(dtype: torch.dtype) -> None:
    pool = pool_of(6, dtype=dtype)
    geometry = pool.geometry
    # The null page, and a word a page for the free stack; page lists are not the pool's.
    assert pool.num_bytes == 7 * geometry.block_size * geometry.entry_bytes + 6 * 4
    assert geometry.page_bytes == geometry.block_size * geometry.entry_bytes + 12


def test_scrubbed_pages_and_a_reset_pool_hold_nothing_that_is_no_number() -> None:
    pool = pool_of()
    fill(pool)
    pool.write(
        torch.arange(8), torch.full((8, DIM), torch.inf), torch.full((8, DIM), torch.nan), None, torch.arange(8).int()
    )
    pool.scrub(torch.tensor([0, 1], dtype=torch.int32))
    found = pool.load(torch.arange(8))
    for stored, scale in ((found.key, found.key_scale), (found.value, found.value_scale)):
        assert scale is not None
        assert not dequantise(stored, scale, torch.float32).any()
    pool.reset()
    assert all(not bits(getattr(pool, name)).any() for name in STORAGES)


# ---- sequences and attention ---------------------------------------------------------------------------------------


class Pair:
    """The same sequences over 8-bit pages and over float32 pages that are fed rounded entries."""

    def __init__(self, *, block_size: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.tables = [
            SequenceTable(pool_of(4, block_size=block_size, dtype=dtype), 3, can_grow=True)
            for dtype in (FP8, torch.float32)
        ]
        self.rows = [self.tables[0].open(4) for _ in range(3)]
        assert [self.tables[1].open(4) for _ in range(3)] == self.rows

    def feed(self, counts: list[int], *, window: int | None, with_packed: bool) -> list[tuple[Tensor, Tensor]]:
        """What both attend to, layer after layer."""
        segments = [Segment(row, tokens) for row, tokens in zip(self.rows, counts, strict=True) if tokens]
        segments.sort(key=lambda segment: segment.tokens != 1)
        if not segments:
            return []
        batches = [table.extend(segments) for table in self.tables]
        steps = [PagedStep(TorchBackend(), table, batch) for table, batch in zip(self.tables, batches, strict=True)]
        total, decodes = batches[0].num_tokens, batches[0].num_decode
        results = []
        for layer in range(LAYERS):
            query = torch.randn(total, HEADS * GROUP, DIM)
            key, value = torch.randn(2, total, HEADS, DIM)
            log_beta = -torch.rand(total, HEADS) - 0.01
            mixed = [
                step.layer(layer, query, own_key, own_value, log_beta=log_beta, scale=0.3, window=window)
                for step, own_key, own_value in zip(steps, (key, rounded(key)), (value, rounded(value)), strict=True)
            ]
            results.append((mixed[0], mixed[1]))
            if with_packed and decodes < len(segments):
                prefill = PackedPrefill(SdpaVarlen())
                plan = prefill.plan(self.tables[0], batches[0])
                assert plan is not None
                packed = prefill.attend(plan, layer, query[decodes:], scale=0.3, window=window)
                results.append((packed, mixed[1][decodes:]))
        return results


@settings(max_examples=30, deadline=None)
@given(
    block_size=st.sampled_from([1, 3, 16]),
    rounds=st.lists(st.lists(st.sampled_from([0, 1, 1, 2, 9]), min_size=3, max_size=3), min_size=1, max_size=5),
    memory=st.integers(1, 6),
    window=st.sampled_from([None, 4]),
    seed=st.integers(0, 1000),
)
def test_attention_sees_exactly_the_rounded_entries_chunk_or_decode(
    block_size: int, rounds: list[list[int]], memory: int, window: int | None, seed: int
) -> None:
    pair = Pair(block_size=block_size, seed=seed)
    budget = Budget(memory_size=memory, buffer_size=2)
    for counts in rounds:
        for found, wanted in pair.feed(counts, window=window, with_packed=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
        for table in pair.tables:
            table.evict([(row, budget) for row in pair.rows if table.is_due(row, budget, before=0)])
            table.check_invariants()
    for row in pair.rows:
        left, right = (table.snapshot(row) for table in pair.tables)
        assert torch.equal(left.position, right.position)


def test_a_restored_sequence_has_the_bits_of_the_one_that_was_copied() -> None:
    pair = Pair(block_size=3, seed=1)
    pair.feed([9, 1, 5], window=None, with_packed=False)
    table, row = pair.tables[0], pair.rows[0]
    before = table.snapshot(row)
    table.close(row)
    # Others' entries now lie where it was.
    pair.rows = pair.rows[1:]
    pair.tables[0].extend([Segment(pair.rows[0], 1), Segment(pair.rows[1], 7)])
    after = table.snapshot(table.restore(before))
    for name in (field.name for field in fields(SequenceSnapshot) if field.name not in {"seen", "peak"}):
        assert torch.equal(bits(getattr(after, name)), bits(getattr(before, name))), name
    assert (after.seen, after.peak) == (before.seen, before.peak)


def test_a_prefill_kernel_is_chosen_by_the_queries() -> None:
    pair = Pair(block_size=4, seed=0)
    prefill = PackedPrefill()
    plan = prefill.plan(pair.tables[0], pair.tables[0].extend([Segment(pair.rows[0], 5)]))
    assert plan is not None
    mixed = prefill.attend(plan, 0, torch.randn(5, HEADS * GROUP, DIM), scale=0.3, window=None)
    assert mixed.dtype == torch.float32
    assert isinstance(prefill.kernel, SdpaVarlen)


# ---- backends ------------------------------------------------------------------------------------------------------


def test_auto_picks_a_backend_that_reads_8_bit_entries() -> None:
    cpu = torch.device("cpu")
    assert select_backend(device=cpu, dtype=torch.float32, kv_dtype=FP8).name == "torch"
    assert select_backend(device=cpu, dtype=torch.bfloat16, kv_dtype=FP8).name == "torch"


@pytest.mark.parametrize("name", ["numba", "flash"])
def test_a_backend_that_cannot_names_field_and_alternatives(name: str) -> None:
    with pytest.raises(ValueError, match=rf"kv_dtype='fp8_e4m3' .* backend='{name}': use backend 'triton' .* 'auto'"):
        select_backend(name, kv_dtype=FP8)


def test_a_gpu_that_cannot_convert_is_served_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda:0")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert select_backend(device=gpu, dtype=torch.bfloat16, kv_dtype=FP8).name == "torch"
    with pytest.raises(ValueError, match=r"backend='triton' on cuda:0, .* below 8\.9: use backend 'torch'"):
        select_backend("triton", device=gpu, dtype=torch.bfloat16, kv_dtype=FP8)
