"""Entries are written where the pool would write them."""

from __future__ import annotations

import pytest
import torch

from trimkv_core.kernels.append import append
from trimkv_core.kernels.memory import DeviceMemory

HEADS, TOKENS = 3, 11


def memory_of(dim: int, dtype: torch.dtype, device: torch.device) -> DeviceMemory:
    return DeviceMemory.empty(
        num_pages=9,
        block_size=5,
        head_dim=dim,
        num_rows=1,
        num_streams=HEADS,
        pages_per_row=9,
        dtype=dtype,
        device=device,
    )


def entries_of(dim: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Slots, keys, values, log β and positions, with strides as a model's projections leave them."""
    torch.manual_seed(dim)
    slots = torch.randperm(45, device=device)[: HEADS * TOKENS].view(HEADS, TOKENS)
    fused = torch.randn(TOKENS, 2, HEADS, dim, device=device).to(dtype)
    log_beta = -torch.rand(HEADS, TOKENS, device=device).t()
    return slots, fused[:, 0], fused[:, 1], log_beta, torch.arange(70, 70 + TOKENS, dtype=torch.int32, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("has_gates", [True, False])
def test_entries_lie_in_their_slots_and_nothing_else_changes(
    dim: int, dtype: torch.dtype, has_gates: bool, device: torch.device
) -> None:
    memory = memory_of(dim, dtype, device)
    memory.log_beta.fill_(5.0)
    slots, key, value, log_beta, position = entries_of(dim, dtype, device)
    expected = [
        storage.clone().flatten(0, 1) for storage in (memory.key, memory.value, memory.log_beta, memory.position)
    ]
    for storage, entries in zip(
        expected, (key, value, log_beta if has_gates else None, position[:, None].expand(-1, HEADS)), strict=True
    ):
        if entries is not None:
            storage[slots.flatten()] = entries.transpose(0, 1).flatten(0, 1)
    append(memory, slots, key=key, value=value, log_beta=log_beta if has_gates else None, position=position)
    for storage, wanted in zip((memory.key, memory.value, memory.log_beta, memory.position), expected, strict=True):
        assert torch.equal(storage.flatten(0, 1), wanted)


def read_back(memory: DeviceMemory, slots: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values at `slots`, multiplied by their scales, and the scales: float32 [H, T, D] and [H, T, 1]."""
    result = []
    for stored, scales in ((memory.key, memory.key_scale), (memory.value, memory.value_scale)):
        assert scales is not None
        scale = scales.flatten()[slots][..., None]
        result.append((stored.float().flatten(0, 1)[slots] * scale, scale))
    return result


@pytest.mark.parametrize("dim", [64, 80])
def test_what_8_bits_can_hold_is_read_back_as_it_was_written(dim: int, device: torch.device) -> None:
    memory = memory_of(dim, torch.float8_e4m3fn, device)
    slots, _, _, log_beta, position = entries_of(dim, torch.float32, device)
    numbers = torch.randint(0, 127, (2, TOKENS, HEADS, dim), device=device).to(torch.uint8)
    numbers[..., 5] = 126  # 448, so that the scale is a power of 2
    sign = torch.randint(0, 2, numbers.shape, device=device) * 2 - 1
    power = 2.0 ** torch.randint(-20, 20, (2, TOKENS, HEADS, 1), device=device)
    key, value = numbers.view(torch.float8_e4m3fn).float() * sign * power
    value[3] = 0.0
    append(memory, slots, key=key, value=value, log_beta=log_beta, position=position)
    for (got, scale), wanted in zip(read_back(memory, slots), (key, value), strict=True):
        assert torch.equal(got, wanted.transpose(0, 1))
        amax = wanted.transpose(0, 1).abs().amax(-1, keepdim=True)
        assert torch.equal(scale, torch.where(amax > 0, amax / 448, 1.0))


@pytest.mark.parametrize("dim", [64, 80])
def test_an_8_bit_entry_is_within_half_a_step_of_what_was_written(dim: int, device: torch.device) -> None:
    memory = memory_of(dim, torch.float8_e4m3fn, device)
    slots, key, value, log_beta, position = entries_of(dim, torch.float32, device)
    key = key * 10.0 ** torch.arange(-5, TOKENS - 5, device=device)[:, None, None]
    append(memory, slots, key=key, value=value, log_beta=log_beta, position=position)
    for (got, scale), written in zip(read_back(memory, slots), (key, value), strict=True):
        wanted = written.transpose(0, 1)
        # Three bits behind the point, and steps of 2^-9 below 2^-6.
        step = torch.maximum(wanted.abs() / 16, scale * 2**-10)
        assert ((got - wanted).abs() <= step * 1.0001).all()
