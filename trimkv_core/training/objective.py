"""One training step's loss: the passes it takes, and what they are compared by.

Letters: L layers, H KV heads, R rows, T tokens a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimkv_core.training.attention import Bias, Decay
from trimkv_core.training.batch import Extent, PackedBatch, documents_of
from trimkv_core.training.capacity import capacity_overrun, join_overruns
from trimkv_core.training.evictions import EvictionRule, eviction_bias, eviction_lines, eviction_reach
from trimkv_core.training.gated_model import BiasMaker, GatedDecoder
from trimkv_core.training.losses import LossKind, TokenLosses, blocked_token_losses
from trimkv_core.training.retention_sums import retention_sums
from trimkv_core.training.shapes import DecayShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What one step minimises.

    Attributes:
        loss: see `LossKind`.
        capacity_weight: of the capacity hinge; without meaning where evictions are acted out.
        memory_size: M the hinge asks for, entries a stream.
        is_global: one budget over all streams, or one for each.
        num_sink_tokens: first positions of a document that neither fade nor are dropped.
        shape: of the decay.
        evictions: acts evictions out in place of the decay; None: the papers' recipe.
        logit_block: tokens whose logits are held at once.
    """

    loss: LossKind = LossKind.FWKL_NTP
    capacity_weight: float = 1.0
    memory_size: float = 512.0
    is_global: bool = True
    num_sink_tokens: int = 0
    shape: DecayShape = field(default_factory=DecayShape)
    evictions: EvictionRule | None = None
    logit_block: int = 512


@dataclass(frozen=True, slots=True)
class StepLoss:
    """A step's loss and its parts, all scalars; only `total` has a gradient.

    Attributes:
        total: what is minimised.
        kl, ntp: of `TokenLosses`.
        capacity: the hinge, unweighted; 0 where evictions are acted out.
        soft_size: mean retention sum at the documents' ends, entries a stream; 0 where evictions are acted out.
    """

    total: Tensor
    kl: Tensor
    ntp: Tensor
    capacity: Tensor
    soft_size: Tensor


def step_loss(decoder: GatedDecoder, batch: PackedBatch, objective: Objective) -> StepLoss:
    """One step's loss over a packed batch.

    Raises:
        ValueError: nothing in the batch counts.
    """
    documents = documents_of(batch)
    if not documents:
        raise ValueError("a batch of padding has nothing to train on")
    with torch.no_grad():
        # The lines must be known before the first layer is gated: the ungated pass draws them.
        teacher, log_beta = decoder.read(batch, documents=documents, is_gated=objective.evictions is not None)
    if objective.evictions is None:
        make_bias = _decay_maker(documents, objective)
    else:
        lines = _all_lines(log_beta, documents, objective.evictions)
        make_bias = _eviction_maker(documents, objective.evictions, lines)
    hidden, log_beta = decoder.read(batch, documents=documents, make_bias=make_bias)
    losses = blocked_token_losses(
        hidden.flatten(0, 1),
        teacher.flatten(0, 1),
        head=decoder.head,
        labels=batch.labels.flatten(),
        kind=objective.loss,
        block=objective.logit_block,
    )
    return _with_capacity(losses, log_beta, documents, objective)


def _document_log_beta(log_beta: list[Tensor], document: Extent) -> Tensor:
    """Log β of one document, float32 [L, H, T]."""
    part = slice(document.start, document.stop)
    return torch.stack([layer[document.row, part].t() for layer in log_beta])


def _all_lines(log_beta: list[Tensor], documents: list[Extent], rule: EvictionRule) -> list[Tensor]:
    """The eviction lines of every document, [K, L·H or 1]."""
    return [eviction_lines(_document_log_beta(log_beta, document).flatten(0, 1), rule) for document in documents]


def _decay_maker(documents: list[Extent], objective: Objective) -> BiasMaker:
    def make(layer: int, log_beta: Tensor) -> list[Bias]:
        return [
            Decay(_pinned(_per_head(log_beta, document), objective.num_sink_tokens), objective.shape)
            for document in documents
        ]

    return make


def _eviction_maker(documents: list[Extent], rule: EvictionRule, lines: list[Tensor]) -> BiasMaker:
    # A global budget has one line for all layers and heads, and one reach.
    reaches = [
        eviction_reach(drawn, document.stop - document.start, rule) if rule.is_global else None
        for document, drawn in zip(documents, lines, strict=True)
    ]

    def make(layer: int, log_beta: Tensor) -> list[Bias]:
        heads = log_beta.shape[-1]
        biases: list[Bias] = []
        for document, drawn, shared in zip(documents, lines, reaches, strict=True):
            per_head, reach = _per_head(log_beta, document), shared
            if reach is None:
                reach = eviction_reach(drawn[:, layer * heads : (layer + 1) * heads], per_head.shape[1], rule)
            biases.append(eviction_bias(per_head, reach, rule))
        return biases

    return make


def _per_head(log_beta: Tensor, document: Extent) -> Tensor:
    """Log β of one document in one layer, float32 [H, T], from [R, T, H]."""
    return log_beta[document.row, document.start : document.stop].t()


def _pinned(log_beta: Tensor, sinks: int) -> Tensor:
    """[…, T], with the first tokens' log β at 0."""
    if not sinks:
        return log_beta
    first = torch.arange(log_beta.shape[-1], device=log_beta.device) < sinks
    return log_beta.masked_fill(first, 0.0)


def _with_capacity(
    losses: TokenLosses, log_beta: list[Tensor], documents: list[Extent], objective: Objective
) -> StepLoss:
    zero = losses.total.new_zeros(())
    if objective.evictions is not None:
        return StepLoss(losses.total, losses.kl, losses.ntp, zero, zero)
    overruns, sizes = [], []
    with torch.autocast(log_beta[0].device.type, enabled=False):
        for document in documents:
            per_stream = _pinned(_document_log_beta(log_beta, document), objective.num_sink_tokens)
            sums = retention_sums(per_stream.flatten(0, 1), objective.shape).view_as(per_stream)
            overruns.append(capacity_overrun(sums, objective.memory_size, is_global=objective.is_global))
            sizes.append(sums.detach()[..., -1].mean())
    capacity = join_overruns(overruns).mean()
    return StepLoss(
        losses.total + objective.capacity_weight * capacity,
        losses.kl,
        losses.ntp,
        capacity.detach(),
        torch.stack(sizes).mean(),
    )
