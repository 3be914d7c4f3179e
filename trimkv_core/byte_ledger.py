"""The byte ledger: what a step must move, what a prompt must compute and what a sequence reserves.

Owns the sums behind every «share of the limit»: the bytes of a decode step as a function of model, batch and budget,
the operations of a prefill, the reservation of a sequence against its entries, and the bandwidths that cards are sold
with. Knows no pool, no kernel and no clock. Each byte counts as often as paged attention must move it, however it is
written; activations stay in the processor's caches and are left out, logits are not.

Letters: S sequences of a step, L layers, H KV heads, D head dimension, M `memory_size`, B `block_size`, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from trimkv_core.budget import Budget, Geometry
from trimkv_core.fp8 import scale_bytes_of
from trimkv_core.gates import GateShape, build_gates

# Bytes of one page number, one length, one log β and one position.
WORD = 4
# How often an eviction reads the log β and position of every entry: a radix select of 32-bit scores in three digits
# of 11 bits, and one pass that marks who stays.
SELECT_PASSES = 4


@dataclass(frozen=True, slots=True)
class Card:
    """What a card is sold with; a copy within it reaches some 90 % of the bandwidth.

    Attributes:
        bandwidth: bytes a second.
        memory: bytes.
    """

    bandwidth: float
    memory: int


# As the vendor publishes them, SXM where there are several and the name does not say.
CARDS: dict[str, Card] = {
    "B200": Card(8.0e12, 180 * 10**9),
    "H200": Card(4.8e12, 141 * 10**9),
    "H100": Card(3.35e12, 80 * 10**9),
    "H100-NVL": Card(3.9e12, 94 * 10**9),
    "H100-PCIe": Card(2.0e12, 80 * 10**9),
    "A100-80GB": Card(2.039e12, 80 * 10**9),
    "A100-40GB": Card(1.555e12, 40 * 10**9),
    "RTX-5090": Card(1.792e12, 32 * 10**9),
    "RTX-4090": Card(1.008e12, 24 * 10**9),
    "RTX-3090": Card(0.936e12, 24 * 10**9),
    "L40S": Card(0.864e12, 48 * 10**9),
    "A10": Card(0.6e12, 24 * 10**9),
    "L4": Card(0.3e12, 24 * 10**9),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWeights:
    """What a step reads of a model, and what a token multiplies.

    Attributes:
        layer_bytes: all layers and the norms, without embedding, head and gates.
        head_bytes: the language-model head; the embedding where the two are tied.
        gate_bytes: the retention gates, what they share once; 0 without.
        embedding_bytes: the embedding where it is not the head too; only rows of it are read.
        embedding_row_bytes: one row of the embedding.
        logits_row_bytes: one row of logits: V elements.
        layer_parameters, gate_parameters, head_parameters: of matrices, each multiplied once a token.
        query_width: elements of one token's queries in all layers: L times query heads times D.
    """

    layer_bytes: int
    head_bytes: int
    gate_bytes: int
    embedding_bytes: int
    embedding_row_bytes: int
    logits_row_bytes: int
    layer_parameters: int
    gate_parameters: int
    head_parameters: int
    query_width: int

    @property
    def base_bytes(self) -> int:
        """The model as it lies in memory, without its gates."""
        return self.layer_bytes + self.head_bytes + self.embedding_bytes

    @property
    def read_bytes(self) -> int:
        """What every step reads however few tokens it has."""
        return self.layer_bytes + self.head_bytes + self.gate_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBytes:
    """What one decode step of S sequences reads and writes.

    Attributes:
        sequences: S; a step makes as many tokens.
        weights: layers, norms, head and gates, read.
        embedding: S rows of the embedding, read.
        entries_read: keys and values (and their scales) of all entries held.
        entries_written: key, value, log β, position (and scales) of one entry a stream.
        tables: page lists and lengths.
        eviction: its share of a step, when it comes once every `buffer_size` steps.
        logits: written by the head, read by whoever chooses the token.
    """

    sequences: int
    weights: int
    embedding: int
    entries_read: int
    entries_written: int
    tables: int
    eviction: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return (
            self.weights
            + self.embedding
            + self.entries_read
            + self.entries_written
            + self.tables
            + self.eviction
            + self.logits
        )

    @property
    def sequence_bytes(self) -> float:
        """What one more sequence adds to a step."""
        return (self.total - self.weights) / self.sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """What admission sets aside for a sequence, and what the sequence can use of it.

    Attributes:
        pages: its ceiling in pages.
        page_bytes: those pages' keys, values, log β and positions, part-filled ones whole.
        table_bytes: its page list and the copy it is rewritten from, its slots in the free stack, its lengths.
        entry_bytes: its entries alone, at M + buffer or at its length if that is less.
    """

    pages: int
    page_bytes: int
    table_bytes: int
    entry_bytes: int

    @property
    def total(self) -> int:
        """Bytes reserved."""
        return self.page_bytes + self.table_bytes

    @property
    def overhead(self) -> float:
        """Bytes reserved over bytes of entries; 1.0 would be no slack and no tables."""
        return self.total / self.entry_bytes


# ---- models ------------------------------------------------------------------------------------------------------


def weigh_model(model: Any) -> ModelWeights:
    """Weigh a `transformers` decoder, loaded or on the meta device, with the gates its attention layers have."""
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    layers, gates = _Sum(), _Sum()
    for name, parameter in model.named_parameters():
        if parameter is embedding or parameter is head:
            continue
        (gates if ".retention_gate." in name else layers).add(parameter)
    text = model.config.get_text_config()
    return ModelWeights(
        layer_bytes=layers.num_bytes,
        head_bytes=head.nbytes,
        gate_bytes=gates.num_bytes,
        embedding_bytes=0 if embedding is head else embedding.nbytes,
        embedding_row_bytes=embedding.shape[1] * embedding.element_size(),
        logits_row_bytes=head.shape[0] * head.element_size(),
        layer_parameters=layers.matrix_elements,
        gate_parameters=gates.matrix_elements,
        head_parameters=head.numel(),
        query_width=text.num_hidden_layers * text.num_attention_heads * head_dim_of(text),
    )


def weigh_config(config: Any, *, dtype: torch.dtype, gates: GateShape | None = None) -> ModelWeights:
    """Weigh the model that a `transformers` config describes, and gates over it, without allocating either."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if gates is not None:
            built = build_gates(gates, device="meta", dtype=dtype)
            for layer, gate in zip(model.get_decoder().layers, built, strict=True):
                layer.self_attn.retention_gate = gate
    return weigh_model(model)


def geometry_of(config: Any, *, block_size: int, dtype: torch.dtype) -> Geometry:
    """The cache's shape for a `transformers` config, keys and values stored in `dtype`."""
    text = config.get_text_config()
    return Geometry(
        num_layers=text.num_hidden_layers,
        num_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=head_dim_of(text),
        block_size=block_size,
        kv_itemsize=dtype.itemsize,
        scale_bytes=scale_bytes_of(dtype),
    )


def head_dim_of(text: Any) -> int:
    """D of a text config, which may leave it to follow from the hidden size."""
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


@dataclass(slots=True)
class _Sum:
    num_bytes: int = 0
    matrix_elements: int = 0

    def add(self, parameter: torch.Tensor) -> None:
        self.num_bytes += parameter.nbytes
        if parameter.dim() == 2:
            self.matrix_elements += parameter.numel()


# ---- steps -------------------------------------------------------------------------------------------------------


def held_at_most(budget: Budget, total_tokens: int) -> int:
    """Entries a stream holds on average when a decode step finds its sequence fullest: M + buffer, or all tokens."""
    if budget.memory_size is None:
        return total_tokens
    return min(total_tokens, budget.memory_size + budget.buffer_size)


def decode_bytes(
    model: ModelWeights,
    geometry: Geometry,
    budget: Budget,
    *,
    sequences: int,
    held: float,
) -> DecodeBytes:
    """What a decode step moves.

    Args:
        model: weights.
        geometry: of the cache; says what an entry's key, value and scales weigh.
        budget: what all sequences have; says whether and how often they evict.
        sequences: S.
        held: entries a stream of a sequence holds on average, as `held_at_most` or as measured.
    """
    entries = sequences * geometry.streams * held
    stored = geometry.kv_bytes
    new = sequences * geometry.streams
    # A page list is read by attention; and as some stream takes a page nearly every step, read and written to grow.
    pages = entries / geometry.block_size
    tables = 3 * WORD * pages + 2 * WORD * new
    return DecodeBytes(
        sequences=sequences,
        weights=model.read_bytes,
        embedding=sequences * model.embedding_row_bytes,
        entries_read=round(entries * stored),
        entries_written=new * (stored + 2 * WORD),
        tables=round(tables),
        eviction=round(_eviction_bytes(geometry, budget, entries=entries, new=new, stored=stored)),
        logits=2 * sequences * model.logits_row_bytes,
    )


def _eviction_bytes(geometry: Geometry, budget: Budget, *, entries: float, new: int, stored: int) -> float:
    """An eviction's bytes over the steps between two: passes over the scores, holes filled, page lists rewritten."""
    if not budget.can_evict:
        return 0.0
    select = SELECT_PASSES * 2 * WORD * entries
    lists = 2 * WORD * entries / geometry.block_size
    # As many entries go as have come, and a hole is filled by reading and writing an entry: at most one hole for each.
    moved = 2 * (stored + 2 * WORD) * new
    return (select + lists) / budget.buffer_size + moved


def step_seconds(step: DecodeBytes, bandwidth: float) -> float:
    """The shortest a step can take at `bandwidth` bytes a second."""
    return step.total / bandwidth


def tokens_per_second_limit(step: DecodeBytes, bandwidth: float) -> float:
    """Tokens a second of all sequences together that `bandwidth` bytes a second allow."""
    return step.sequences / step_seconds(step, bandwidth)


# ---- prefill -----------------------------------------------------------------------------------------------------


def prefill_flops(model: ModelWeights, budget: Budget, *, prompt_tokens: int) -> float:
    """Operations that the prompt of one sequence takes: two a parameter and token, and attention over what is held.

    Counted are the causal half of a chunk's attention over itself and the head for the last token only. What a
    `threshold` drops is not known beforehand: it counts as if it dropped nothing but what its ceiling says.
    """
    matrices = 2.0 * prompt_tokens * (model.layer_parameters + model.gate_parameters) + 2.0 * model.head_parameters
    chunk = budget.prefill_chunk or prompt_tokens
    pairs, held = 0.0, 0  # of a query and a key; entries of a stream on average
    for start in range(0, prompt_tokens, chunk):
        tokens = min(chunk, prompt_tokens - start)
        pairs += tokens * held + tokens * (tokens + 1) / 2
        held += tokens
        if budget.memory_size is not None and held >= budget.memory_size + budget.buffer_size:
            held = budget.memory_size
    # A query and a key cost 2·D operations, weighting the value as many again.
    return matrices + 4.0 * model.query_width * pairs


# ---- memory ------------------------------------------------------------------------------------------------------


def reservation(geometry: Geometry, budget: Budget, *, total_tokens: int) -> Reservation:
    """What a sequence of at most `total_tokens` reserves, beside the prefill lane that all sequences share."""
    pages = budget.ceiling_pages(geometry, total_tokens=total_tokens)
    entry_bytes = geometry.entry_bytes
    return Reservation(
        pages=pages,
        page_bytes=pages * geometry.block_size * entry_bytes,
        # The list, the copy it is rewritten from and the free stack: a word a page each; a length a stream.
        table_bytes=3 * WORD * pages + WORD * geometry.streams,
        entry_bytes=held_at_most(budget, total_tokens) * geometry.streams * entry_bytes,
    )
