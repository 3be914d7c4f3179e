"""Retention-gated attention through FlexAttention: compiled on GPUs into a kernel that never builds a T×T matrix.

Elsewhere it runs uncompiled, which is slow and takes the whole matrix, and tells whether the formulas agree. Owns the
packing of several documents into one call; knows no model.

One compiled kernel serves all layers, passes and steps of a shape. What changes from step to step therefore comes in
tensors, and every tensor has a shape that the rows alone decide: a Python number that changes, or a table as long as
the longest document, would compile anew each time, and after a few times PyTorch gives up and builds the matrix.

Letters: R rows, H KV heads, G query heads a KV head, D head dimension, T tokens a row, K evictions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from trimkv_core.overlay import LayerAttention
from trimkv_core.training.attention import Bias, Decay, EvictionBias
from trimkv_core.training.batch import Extent

# Queries and entries of a block of the sparse mask: FlexAttention's own default.
_BLOCK = 128

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class FlexLayout:
    """Where the documents of a pass lie: made once, used by every layer.

    Attributes:
        documents: row after row, in the order they lie in.
        start: int64 [R, T], where a token's document begins in its row; padding is a document of one token each.

    Args:
        documents: the same.
        rows: R.
        tokens: T.
        device: of the pass.
    """

    def __init__(self, documents: Sequence[Extent], *, rows: int, tokens: int, device: torch.device) -> None:
        start = torch.arange(tokens).repeat(rows, 1)
        for document in documents:
            start[document.row, document.start : document.stop] = document.start
        self.documents = documents
        self.start = start.to(device)
        self._masks: dict[int | None, BlockMask] = {}

    def mask(self, window: int | None) -> BlockMask:
        """What sees what under a layer's window."""
        if window not in self._masks:
            self._masks[window] = _block_mask(self.start, window)
        return self._masks[window]


def flex_documents(call: LayerAttention, layout: FlexLayout, biases: list[Bias] | None) -> Tensor:
    """Attention of all documents in one call; padding sees itself.

    Args:
        call: of one layer.
        layout: where documents lie.
        biases: one a document, all of one kind; None: none.

    Returns:
        [R, T, H·G, D].

    Raises:
        ValueError: biases of several kinds.
    """
    group = call.query.shape[1] // call.key.shape[1]
    run = cast(Callable[..., Any], _compiled() if call.query.device.type == "cuda" else flex_attention)
    output = run(
        call.query,
        call.key,
        call.value,
        score_mod=None if biases is None else _by_kv_head(_score(biases, layout), group),
        block_mask=layout.mask(call.window),
        scale=call.scale,
        enable_gqa=group != 1,
    )
    result: Tensor = output.transpose(1, 2)
    return result


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    return compiled


def _block_mask(start: Tensor, window: int | None) -> BlockMask:
    """The mask, from its blocks: `create_block_mask` would build it whole first, 17 GB at 131,072 tokens.

    Documents lie end to end, so `start` never falls along a row, and a block's corners tell all about it:

               entries          seen: the corner nearest to the diagonal is, its first query and last entry
             ┌─────────●        full: the opposite corner is, its last query and first entry
    queries  │         │
             ○─────────┘
    """
    tokens = start.shape[1]
    first = torch.arange(0, tokens, _BLOCK, device=start.device)
    last = first + (_BLOCK - 1)
    earliest, latest = start[:, first, None], start[:, last.clamp(max=tokens - 1), None]
    is_seen = (first <= last[:, None]) & (last >= earliest)
    # As `create_block_mask` has it, a block that the row's end cuts is not full.
    is_full = (last <= first[:, None]) & (first >= latest) & (last < tokens)[:, None]
    if window is not None:
        is_seen &= first[:, None] - last < window
        is_full &= last[:, None] - first < window

    def is_visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible = (key <= query) & (key >= start[row, query])
        return visible if window is None else visible & (query - key < window)

    return BlockMask.from_kv_blocks(
        *_listed(is_seen & ~is_full),
        *_listed(is_full),
        BLOCK_SIZE=_BLOCK,
        mask_mod=is_visible,
        seq_lengths=(tokens, tokens),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of entries each block of queries has, and their numbers first: int32 [R, 1, q], [R, 1, q, k]."""
    numbers = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], numbers.int()[:, None]


def _by_kv_head(score: ScoreMod, group: int) -> ScoreMod:
    return lambda logit, row, head, query, key: score(logit, row, head // group, query, key)


def _score(biases: list[Bias], layout: FlexLayout) -> ScoreMod:
    """The change to a logit, from biases laid out over whole rows."""
    decays = [bias for bias in biases if isinstance(bias, Decay)]
    tables = [bias for bias in biases if isinstance(bias, EvictionBias)]
    if len(biases) not in (len(decays), len(tables)):
        raise ValueError("documents of one call need biases of one kind")
    return _faded(decays, layout) if decays else _evicted(tables, layout)


def _faded(decays: list[Decay], layout: FlexLayout) -> ScoreMod:
    source = _laid_out([decay.log_beta for decay in decays], layout)
    shape = decays[0].shape
    if shape.is_plain:
        return lambda logit, row, head, query, key: logit + source[row, head, key] * (query - key)
    near = source.new_full(source.shape[1:2], shape.epsilon)
    bend = source.new_full(source.shape[1:2], shape.kappa - shape.epsilon)

    def faded(logit: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        score = source[row, head, key] * (query - key)
        return logit + near[head] * score + bend[head] * torch.clamp(score + 1.0, max=0.0)

    return faded


def _evicted(biases: list[EvictionBias], layout: FlexLayout) -> ScoreMod:
    start, interval = layout.start, biases[0].interval
    evictions = -(-start.shape[1] // interval)  # those of a document as long as the row
    depth = _laid_out([bias.depth for bias in biases], layout)
    reach = _laid_out(
        [torch.nn.functional.pad(bias.reach, (0, 0, 0, evictions - bias.reach.shape[1])) for bias in biases], layout
    )
    line_of = (
        torch.arange(depth.shape[1], device=depth.device)
        if reach.shape[1] > 1
        else depth.new_zeros(depth.shape[1], dtype=torch.int64)
    )
    width = depth.new_full(depth.shape[1:2], biases[0].softness)
    height = depth.new_full(depth.shape[1:2], biases[0].sharpness * biases[0].softness)

    def evicted(logit: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        eviction = (query - start[row, query]) // interval
        beyond = (depth[row, head, key] + reach[row, line_of[head], eviction, key]) / width[head]
        # softplus, written out: no overflow on either side.
        soft = torch.clamp(beyond, min=0.0) + torch.log1p(torch.exp(-torch.abs(beyond)))
        return logit - height[head] * soft

    return evicted


def _laid_out(parts: Sequence[Tensor], layout: FlexLayout) -> Tensor:
    """The documents' parts, [H, …, t] each, in their places: [R, H, …, T], 0 where there is padding; differentiable."""
    rows, tokens = layout.start.shape
    laid: list[list[Tensor]] = [[] for _ in range(rows)]
    filled = [0] * rows

    def gap(length: int) -> Tensor:
        return parts[0].new_zeros(*parts[0].shape[:-1], length)

    for document, part in zip(layout.documents, parts, strict=True):
        laid[document.row] += [gap(document.start - filled[document.row]), part]
        filled[document.row] = document.stop
    return torch.stack([torch.cat([*laid[row], gap(tokens - filled[row])], -1) for row in range(rows)])
