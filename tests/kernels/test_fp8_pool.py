"""The pool rounds keys and values as the append kernel does."""

from __future__ import annotations

import torch

from tests.kernels.test_append import entries_of, memory_of
from trimkv_core.budget import Geometry
from trimkv_core.fp8 import FP8
from trimkv_core.kernels.append import append
from trimkv_core.pages import PagePool


def test_pool_and_kernel_store_the_same_numbers(device: torch.device) -> None:
    memory = memory_of(64, FP8, device)
    pool = PagePool(Geometry(1, 3, 64, 5, kv_itemsize=1, scale_bytes=8), 9, dtype=FP8, device=device)
    slots, key, value, log_beta, position = entries_of(64, torch.bfloat16, device)
    # Every size, and an entry of zeros.
    key = (key.float() * 10.0 ** torch.arange(-5, key.shape[0] - 5, device=device)[:, None, None]).bfloat16()
    value = value.clone()
    value[3] = 0
    append(memory, slots, key=key, value=value, log_beta=log_beta, position=position)
    by_head = (states.transpose(0, 1).flatten(0, 1) for states in (key, value, log_beta))
    pool.write(slots.flatten(), *by_head, position.repeat(3))
    for name in ("key_scale", "value_scale", "log_beta", "position"):
        torch.testing.assert_close(getattr(memory, name), getattr(pool, name), rtol=3e-7, atol=0)
    for name in ("key", "value"):
        # A GPU divides to two units in the last place: a number halfway between two may go the other way.
        ours, theirs = (getattr(owner, name).view(torch.uint8).int() for owner in (pool, memory))
        assert ((ours - theirs).abs() <= 1).all()
        assert (ours == theirs).float().mean() > 0.999
