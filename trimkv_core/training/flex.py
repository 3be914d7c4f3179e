"""Retention-gated attention through FlexAttention: compiled on GPUs into a kernel that never builds the T×T biases.

Elsewhere it runs uncompiled, which is slow and takes the whole matrix, and tells whether the formulas agree. Owns the
packing of several documents into one call; knows no model.

Letters: R rows, H KV heads, G query heads a KV head, D head dimension, T tokens a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from trimkv_core.overlay import LayerAttention
from trimkv_core.training.attention import Bias, Decay, EvictionBias


class Span(Protocol):
    """Where a document lies: see `gated_model.Document`."""

    @property
    def row(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    return compiled


def flex_documents(call: LayerAttention, documents: Sequence[Span], biases: list[Bias] | None) -> Tensor:
    """Attention of all documents in one call; padding sees itself.

    Args:
        call: of one layer.
        documents: where documents lie.
        biases: one a document, all of one kind; None: none.

    Returns:
        [R, T, H·G, D].
    """
    rows, query_heads, tokens, _ = call.query.shape
    heads = call.key.shape[1]
    device = call.query.device
    number = torch.full((rows, tokens), -1, device=device)
    position = torch.zeros_like(number)
    for nth, document in enumerate(documents):
        part = slice(document.start, document.stop)
        number[document.row, part] = nth
        position[document.row, part] = torch.arange(document.stop - document.start, device=device)
    window = call.window

    def mask(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible = (query >= key) & (number[row, query] == number[row, key])
        return visible if window is None else visible & (query - key < window)

    score = None if biases is None else _score(biases, documents, (rows, heads, tokens), position)
    block_mask = create_block_mask(mask, rows, None, tokens, tokens, device=device)
    run = cast(Callable[..., Any], _compiled() if device.type == "cuda" else flex_attention)
    output = run(
        call.query,
        call.key,
        call.value,
        score_mod=None if score is None else _by_kv_head(score, query_heads // heads),
        block_mask=block_mask,
        scale=call.scale,
        enable_gqa=query_heads != heads,
    )
    result: Tensor = output.transpose(1, 2)
    return result


ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def _by_kv_head(score: ScoreMod, group: int) -> ScoreMod:
    return lambda logit, row, head, query, key: score(logit, row, head // group, query, key)


def _score(biases: list[Bias], documents: Sequence[Span], shape: tuple[int, int, int], position: Tensor) -> ScoreMod:
    """The change to a logit, from biases laid out over whole rows."""
    rows, heads, tokens = shape
    if all(isinstance(bias, Decay) for bias in biases):
        source = biases[0].source.new_zeros(rows, heads, tokens)
        for bias, document in zip(biases, documents, strict=True):
            source = _placed(source, bias.source, document)
        decay = biases[0].shape  # type: ignore[union-attr]

        def faded(logit: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            score = source[row, head, key] * (query - key)
            if decay.is_plain:
                return logit + score
            bend = torch.clamp(score + 1.0, max=0.0)
            return logit + decay.epsilon * score + (decay.kappa - decay.epsilon) * bend

        return faded
    tables = [bias for bias in biases if isinstance(bias, EvictionBias)]
    if len(tables) != len(biases):
        raise ValueError("documents of one call need biases of one kind")
    interval = tables[0].interval
    evictions = max(table.table.shape[1] for table in tables)
    laid = tables[0].table.new_zeros(rows, heads, evictions, tokens)
    for bias, document in zip(tables, documents, strict=True):
        padded = torch.nn.functional.pad(bias.table, (0, 0, 0, evictions - bias.table.shape[1]))
        laid = _placed(laid, padded, document)

    def evicted(logit: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return logit + laid[row, head, position[row, query] // interval, key]

    return evicted


def _placed(whole: Tensor, part: Tensor, document: Span) -> Tensor:
    """`whole` [R, H, …, T] with a document's `part` [H, …, t] in its place; differentiable."""
    result = whole.clone()
    result[document.row, ..., document.start : document.stop] = part
    return result
