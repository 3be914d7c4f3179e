"""flash-attn 2.8 in plain PyTorch: the real signatures, the real complaints, the same numbers, slowly.

The parameters are those of flash-attn 2.8.3, in its order and with its defaults. What the project never asks for
raises.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor


def module() -> types.ModuleType:
    """What `import flash_attn` would bring."""
    result = types.ModuleType("flash_attn")
    result.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    result.flash_attn_with_kvcache = flash_attn_with_kvcache  # type: ignore[attr-defined]
    return result


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """q [total_q, Hq, D], k and v [total_k, Hk, D] → [total_q, Hq, D]."""
    _refuse(dropout_p, window_size != (-1, -1), softcap, alibi_slopes is not None, return_attn_probs)
    _refuse(block_table is not None)
    _check_heads(q, k, v)
    for cumulative, packed, longest in ((cu_seqlens_q, q, max_seqlen_q), (cu_seqlens_k, k, max_seqlen_k)):
        _check(cumulative.dtype == torch.int32 and cumulative.is_contiguous(), "cumulative lengths: int32, contiguous")
        _check(int(cumulative[-1]) == packed.shape[0], "cumulative lengths end with the number of rows")
        _check(type(longest) is int and int(cumulative.diff().max()) == longest, "the maximum is the host's")
    _check(cu_seqlens_q.shape == cu_seqlens_k.shape, "as many sequences of queries as of keys")
    out = torch.empty_like(q)
    for index in range(cu_seqlens_q.numel() - 1):
        queries = slice(int(cu_seqlens_q[index]), int(cu_seqlens_q[index + 1]))
        keys = slice(int(cu_seqlens_k[index]), int(cu_seqlens_k[index + 1]))
        out[queries] = _attend(q[queries], k[keys], v[keys], scale=softmax_scale, causal=causal)
    return out


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    """q [batch, tokens, Hq, D], caches [blocks, block, Hk, D] → [batch, tokens, Hq, D]."""
    _refuse(*(part is not None for part in (k, v, rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad)))
    _refuse(window_size != (-1, -1), softcap, alibi_slopes is not None, return_softmax_lse)
    _check_heads(q, k_cache, v_cache)
    if block_table is None or not isinstance(cache_seqlens, Tensor):
        raise NotImplementedError("the stand-in reads pages only")
    _check(k_cache.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256")
    _check(block_table.dtype == torch.int32 and block_table.stride(-1) == 1, "block_table: int32, contiguous rows")
    _check(cache_seqlens.dtype == torch.int32 and cache_seqlens.is_contiguous(), "cache_seqlens: int32, contiguous")
    _check(block_table.shape[0] == q.shape[0] == cache_seqlens.shape[0], "one table row and length a sequence")
    out = torch.empty_like(q)
    for index in range(q.shape[0]):
        length = int(cache_seqlens[index])
        pages = block_table[index, : -(-length // k_cache.shape[1])].long()
        key, value = (cache[pages].flatten(0, 1)[:length] for cache in (k_cache, v_cache))
        out[index] = _attend(q[index], key, value, scale=softmax_scale, causal=causal)
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, causal: bool) -> Tensor:
    """One sequence; causal is aligned to the bottom right, and a query that sees nothing gets zero."""
    queries, keys, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for head in range(q.shape[1]):
        for query in range(queries):
            visible = keys - queries + query + 1 if causal else keys
            if visible <= 0:
                continue
            logits = k[:visible, head // group].float() @ q[query, head].float()
            weights = torch.softmax(logits * (q.shape[-1] ** -0.5 if scale is None else scale), 0)
            out[query, head] = (weights @ v[:visible, head // group].float()).to(q.dtype)
    return out


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    _check(q.dtype == k.dtype == v.dtype, "one dtype")
    _check(k.shape == v.shape, "keys and values of one shape")
    _check(q.shape[-1] == k.shape[-1] and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256, "head_size: 8, 16 … 256")
    _check(q.shape[-2] % k.shape[-2] == 0, "Number of heads in key/value must divide number of heads in query")
    _check(all(part.stride(-1) == 1 for part in (q, k, v)), "Input tensor must have contiguous last dimension")


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(message)


def _refuse(*asked: Any) -> None:
    if any(asked):
        raise NotImplementedError("the stand-in does not compute this")
