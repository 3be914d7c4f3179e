"""Writing one layer's entries into their slots, in one launch, quantised where the pages are 8-bit floats.

Knows slots, not streams: where an entry goes was settled by whoever made room for it.

Letters: T tokens, H KV heads, D head dimension, B entries a page, P pages.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from trimkv_core.kernels.memory import PagedEntries

# The largest number float8_e4m3fn has.
FP8_MAX = tl.constexpr(448.0)
_TOKEN_TILE = 8


@triton.jit
def _quantise(entry):
    """Numbers of float8_e4m3fn's range and what to multiply them by again: [TOKENS, D], [TOKENS]."""
    scale = tl.max(tl.abs(entry), 1) / FP8_MAX
    scale = tl.where(scale > 0.0, scale, 1.0)
    return entry / scale[:, None], scale


# One kernel for chunks of every length.
@triton.jit(do_not_specialize=["num_tokens", "slots_by_head"])
def _append(
    slots,
    slots_by_head,
    slots_by_token,
    key,
    key_by_token,
    key_by_head,
    key_by_dim,
    value,
    value_by_token,
    value_by_head,
    value_by_dim,
    log_beta,
    beta_by_token,
    beta_by_head,
    position,
    to_key,
    to_value,
    to_key_scale,
    to_value_scale,
    to_log_beta,
    to_position,
    num_tokens,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    HAS_LOG_BETA: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    head = tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < num_tokens
    slot = tl.load(slots + head * slots_by_head + token * slots_by_token, mask=is_token, other=0).to(tl.int64)
    dim = tl.arange(0, D_PADDED)
    is_element = is_token[:, None] & (dim < D)[None, :]
    of_token = token.to(tl.int64)[:, None]
    new_key = tl.load(
        key + of_token * key_by_token + head * key_by_head + dim[None, :] * key_by_dim, mask=is_element, other=0.0
    )
    new_value = tl.load(
        value + of_token * value_by_token + head * value_by_head + dim[None, :] * value_by_dim,
        mask=is_element,
        other=0.0,
    )
    if HAS_SCALES:
        new_key, key_scale = _quantise(new_key.to(tl.float32))
        new_value, value_scale = _quantise(new_value.to(tl.float32))
        tl.store(to_key_scale + slot, key_scale, mask=is_token)
        tl.store(to_value_scale + slot, value_scale, mask=is_token)
    to = slot[:, None] * D + dim[None, :]
    tl.store(to_key + to, new_key.to(to_key.dtype.element_ty), mask=is_element)
    tl.store(to_value + to, new_value.to(to_value.dtype.element_ty), mask=is_element)
    if HAS_LOG_BETA:
        new_beta = tl.load(log_beta + token * beta_by_token + head * beta_by_head, mask=is_token, other=0.0)
        tl.store(to_log_beta + slot, new_beta, mask=is_token)
    tl.store(to_position + slot, tl.load(position + token, mask=is_token, other=0), mask=is_token)


def append(
    memory: PagedEntries, slots: Tensor, *, key: Tensor, value: Tensor, log_beta: Tensor | None, position: Tensor
) -> None:
    """Write the entries of one layer; strides are free.

    Args:
        memory: where to. With scales, an entry is stored as float8_e4m3fn of itself over amax / 448.
        slots: int32 or int64 [H, T], page · B + place in the page.
        key, value: [T, H, D].
        log_beta: float32 [T, H]; None leaves what is there.
        position: int32 [T].
    """
    tokens, heads, dim = key.shape
    beta_strides = (0, 0) if log_beta is None else log_beta.stride()
    _append[(triton.cdiv(tokens, _TOKEN_TILE), heads)](
        slots,
        *slots.stride(),
        key,
        *key.stride(),
        value,
        *value.stride(),
        memory.log_beta if log_beta is None else log_beta,
        *beta_strides,
        position,
        memory.key,
        memory.value,
        memory.log_beta if memory.key_scale is None else memory.key_scale,
        memory.log_beta if memory.value_scale is None else memory.value_scale,
        memory.log_beta,
        memory.position,
        tokens,
        D=dim,
        D_PADDED=triton.next_power_of_2(dim),
        HAS_LOG_BETA=log_beta is not None,
        HAS_SCALES=memory.key_scale is not None,
        TOKENS=_TOKEN_TILE,
    )
