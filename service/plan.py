"""`trimkv-serve plan`: how many sequences fit a memory, and how fast a card can decode them, before anything is loaded.

Owns the reading of a model's shape from its config alone, and the tables. The arithmetic is admission's own: a sequence
is worth its worst case in pages, beside one prefill lane; and the byte ledger's for the limits. Knows no engine.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from transformers import AutoConfig

from service.logs import format_bytes
from service.settings import Settings, parse_size
from service.settings_sources import PROGRAM
from trimkv_core.budget import MAX_BLOCK_SIZE, MAX_BUFFER_SIZE, Budget, BudgetError, Geometry, lane_pages
from trimkv_core.byte_ledger import (
    CARDS,
    ModelWeights,
    decode_bytes,
    geometry_of,
    held_at_most,
    tokens_per_second_limit,
    weigh_config,
)
from trimkv_core.checkpoint import CONFIG_NAME, GateConfig, read_config
from trimkv_core.embedded import EMBEDDED_NAME, embedded_config, embedded_gates_path
from trimkv_core.fp8 import KV_DTYPES, choose_kv_dtype, name_kv_dtype
from trimkv_core.models import locate_base
from trimkv_core.options import OneLineParser

SWEEP = (64, 128, 256, 512, 1024, 2048)
MAX_REASON_CHARACTERS = 300
CONTEXTS = (4_096, 32_768, 131_072)
BATCHES = (1, 4, 64, 256)
# What a server chooses depends on its device, of which a plan knows nothing: GPUs and new CPUs get this.
ASSUMED_DTYPE = "bfloat16"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BANDWIDTH = re.compile(r"(\d+(?:\.\d+)?)\s*(GB|TB)/s", re.IGNORECASE)


class PlanError(Exception):
    """No plan can be made; the message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What a plan needs to know of a model.

    Attributes:
        geometry: its cache.
        max_model_len: what its config allows.
        dtype: number format of weights.
        kv_dtype: of stored keys and values.
        weights: its parameters and those of its gates.
        trained_budget: M of its gates, None without.
    """

    geometry: Geometry
    max_model_len: int
    dtype: str
    kv_dtype: str
    weights: ModelWeights
    trained_budget: int | None


@dataclass(frozen=True, slots=True)
class Memory:
    """A size in bytes, and how it was typed: 80GB and 74.5 GiB are the same, and not everybody sees it."""

    size: int
    typed: str

    def __str__(self) -> str:
        return f"{self.typed} ({format_bytes(self.size)})"


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bytes a second, and whether that is what a card is sold with or what was measured and given."""

    rate: float
    card: str | None

    def __str__(self) -> str:
        amount = f"{self.rate / 1e12:g} TB/s" if self.rate >= 1e12 else f"{self.rate / 1e9:g} GB/s"
        return f"{self.card}, {amount} as published" if self.card else amount


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What is planned for; see the flags of `plan --help`."""

    model: str
    gates: str | None
    memory: Memory
    bandwidth: Bandwidth | None
    dtype: str
    kv_dtype: str
    block_size: int
    kv_budget: int | None
    kv_buffer: int
    prefill_chunk: int
    contexts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One budget: bytes a sequence needs at worst, and how many fit, at each context length. `budget` None is dense."""

    budget: int | None
    sequence_bytes: tuple[int, ...]
    sequences: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LimitRow:
    """Tokens a second at most for each of `BATCHES`; None: so many do not fit. `budget` None is dense."""

    budget: int | None
    context: int
    rates: tuple[float | None, ...]


def run_plan(arguments: Sequence[str]) -> str:
    """The table for command-line `arguments`.

    Raises:
        PlanError: the model's config cannot be read, or its weights leave no memory.
        SystemExit: `--help`, or flags that are not possible (status 2).
    """
    request = _parse(arguments)
    shape = read_shape(request)
    contexts = _contexts(request, shape.max_model_len)
    weight_bytes = shape.weights.base_bytes + shape.weights.gate_bytes
    pool_bytes = request.memory.size - weight_bytes
    lane = lane_pages(shape.geometry, request.prefill_chunk)
    pages = pool_bytes // shape.geometry.page_bytes - lane
    if pages < 1:
        raise PlanError(
            f"--memory={request.memory} is not enough: weights and gates take "
            f"{format_bytes(weight_bytes)} in {shape.dtype}, and one prefill chunk "
            f"{format_bytes(lane * shape.geometry.page_bytes)}"
        )
    budgets = _budgets(request, shape, contexts)
    rows = tuple(plan_row(shape.geometry, budget, pages=pages, contexts=contexts) for budget in budgets)
    blocks = [_render(request, shape, rows=rows, contexts=contexts)]
    if request.bandwidth is not None:
        limits = limit_rows(shape, budgets, pages=pages, contexts=contexts, bandwidth=request.bandwidth.rate)
        blocks.append(_render_limits(request, shape, request.bandwidth, limits))
    return "\n\n".join([*blocks, "\n".join(_notes(request, shape))])


def plan_row(geometry: Geometry, budget: Budget, *, pages: int, contexts: Sequence[int]) -> PlanRow:
    """How many sequences of each context length fit `pages` under `budget`."""
    needed = tuple(budget.ceiling_pages(geometry, total_tokens=context) for context in contexts)
    return PlanRow(
        budget.memory_size,
        tuple(count * geometry.page_bytes for count in needed),
        tuple(pages // count for count in needed),
    )


def limit_rows(
    shape: ModelShape, budgets: Sequence[Budget], *, pages: int, contexts: Sequence[int], bandwidth: float
) -> tuple[LimitRow, ...]:
    """How many tokens a second `bandwidth` allows: for a budget at the longest context, dense at each."""
    rows = []
    for budget in budgets:
        for context in contexts[-1:] if budget.is_bounded else contexts:
            room = pages // budget.ceiling_pages(shape.geometry, total_tokens=context)
            rates = (_limit(shape, budget, sequences=batch, context=context, bandwidth=bandwidth) for batch in BATCHES)
            fitting = tuple(rate if batch <= room else None for batch, rate in zip(BATCHES, rates, strict=True))
            rows.append(LimitRow(budget.memory_size, context, fitting))
    return tuple(rows)


def _limit(shape: ModelShape, budget: Budget, *, sequences: int, context: int, bandwidth: float) -> float:
    held = held_at_most(budget, context)
    step = decode_bytes(shape.weights, shape.geometry, budget, sequences=sequences, held=held)
    return tokens_per_second_limit(step, bandwidth)


def read_shape(request: PlanRequest) -> ModelShape:
    """The shape of the model named in `request`, from its config and a model without storage.

    Raises:
        PlanError: there is no such model, or it cannot be reached.
    """
    gates = _read_gates(request)
    try:
        config = _read_config(request.model)
    except Exception as error:  # hub, file and config errors of a dozen types: the operator can only check the name
        raise PlanError(f"--model={request.model} cannot be read: {_short(error)}") from error
    dtype = request.dtype if request.dtype != "auto" else ASSUMED_DTYPE
    text = config.get_text_config()
    kv_dtype = choose_kv_dtype(request.kv_dtype, _DTYPES[dtype])
    geometry = geometry_of(config, block_size=request.block_size, dtype=kv_dtype)
    gate_shape = None
    if gates is not None:
        gate_shape = gates.shape(
            hidden_size=text.hidden_size, num_heads=geometry.num_heads, num_layers=geometry.num_layers
        )
    return ModelShape(
        geometry=geometry,
        max_model_len=text.max_position_embeddings,
        dtype=dtype,
        kv_dtype=name_kv_dtype(kv_dtype),
        weights=weigh_config(config, dtype=_DTYPES[dtype], gates=gate_shape),
        trained_budget=gates.memory_size if gates is not None else None,
    )


def _read_config(model: str) -> Any:
    """The config of a model; the embedded one's is known, and finding its file would convert all of it."""
    if model == EMBEDDED_NAME:
        return embedded_config()
    location, extra = locate_base(model)
    return AutoConfig.from_pretrained(location, **extra)


def _read_gates(request: PlanRequest) -> GateConfig | None:
    if request.gates is None:
        return read_config(embedded_gates_path()) if request.model == EMBEDDED_NAME else None
    folder = Path(request.gates).expanduser()
    try:
        if not folder.is_dir():
            folder = Path(hf_hub_download(request.gates, CONFIG_NAME)).parent
        return read_config(folder)
    except Exception as error:  # as for the model
        raise PlanError(f"--gates={request.gates} cannot be read: {_short(error)}") from error


def _short(error: Exception) -> str:
    """The message of `error` in one line."""
    return " ".join(str(error).split())[:MAX_REASON_CHARACTERS]


def _contexts(request: PlanRequest, longest: int) -> tuple[int, ...]:
    """The context lengths asked for, none longer than the model allows."""
    return tuple(sorted({min(context, longest) for context in request.contexts or CONTEXTS}))


def _budgets(request: PlanRequest, shape: ModelShape, contexts: Sequence[int]) -> tuple[Budget, ...]:
    """The budgets of the table, smallest first, dense last."""
    asked = {size for size in (request.kv_budget, shape.trained_budget) if size}
    sizes = {size for size in SWEEP if size <= contexts[-1]} | asked
    try:
        bounded = [Budget(memory_size=size, buffer_size=request.kv_buffer) for size in sorted(sizes)]
    except BudgetError as error:
        raise PlanError(str(error)) from error
    return (*bounded, Budget.dense())


def _render(request: PlanRequest, shape: ModelShape, *, rows: Sequence[PlanRow], contexts: Sequence[int]) -> str:
    geometry = shape.geometry
    lane = lane_pages(geometry, request.prefill_chunk) * geometry.page_bytes
    stored = "" if shape.kv_dtype == shape.dtype else f" (KV {shape.kv_dtype})"
    weights = shape.weights
    pool = request.memory.size - weights.base_bytes - weights.gate_bytes
    gates = f" - gates {format_bytes(weights.gate_bytes)}" if weights.gate_bytes else ""
    headings = [f"{context:,} tokens" for context in contexts]
    lines = [
        f"{request.model}: {geometry.num_layers} layers x {geometry.num_heads} KV heads x {geometry.head_dim}, "
        f"{shape.dtype}{stored}, up to {shape.max_model_len:,} tokens; one entry {geometry.entry_bytes} bytes, "
        f"page of {geometry.block_size} entries {geometry.page_bytes:,} bytes",
        f"{request.memory} - weights {format_bytes(weights.base_bytes)}{gates} = pool "
        f"{format_bytes(pool)}, of which one prefill chunk of {request.prefill_chunk} tokens takes "
        f"{format_bytes(lane)}; not counted: activations and the runtime's own memory",
        "",
        "Concurrent sequences (bytes each at worst) by context length:",
        _line("kv_budget", headings),
    ]
    for row in rows:
        cells = [
            f"{count:,} ({format_bytes(size)})" for count, size in zip(row.sequences, row.sequence_bytes, strict=True)
        ]
        lines.append(_line(_name(request, shape, row.budget), cells))
    lines.append(f"kv_buffer {request.kv_buffer}; * as asked for, + as the gates were trained")
    return "\n".join(lines)


def _render_limits(request: PlanRequest, shape: ModelShape, bandwidth: Bandwidth, rows: Sequence[LimitRow]) -> str:
    lines = [
        f"Decode limit in tokens/s, all sequences together, by sequences at once ({bandwidth}):",
        _line("kv_budget", [str(batch) for batch in BATCHES]),
    ]
    for row in rows:
        name = _name(request, shape, row.budget)
        cells = ["-" if rate is None else f"{rate:,.0f}" for rate in row.rates]
        lines.append(_line(name, cells) + (f"  at {row.context:,} tokens" if row.budget is None else ""))
    reach = "; a copy within a card reaches some 90 % of what is published" if bandwidth.card else ""
    lines.append(f"bytes a step must move over the bandwidth{reach}; - so many do not fit the memory")
    return "\n".join(lines)


def _name(request: PlanRequest, shape: ModelShape, budget: int | None) -> str:
    """A budget as the tables call it, with its marks."""
    if budget is None:
        return "dense"
    marks = (("*", request.kv_budget), ("+", shape.trained_budget))
    return str(budget) + "".join(mark for mark, size in marks if size == budget)


def _notes(request: PlanRequest, shape: ModelShape) -> list[str]:
    """What the table leaves out: a sequence's exact entries, without the part-filled pages, and what was assumed."""
    notes = []
    budget = shape.trained_budget if request.kv_budget is None else request.kv_budget
    if budget:
        after, full = (
            entries * shape.geometry.streams * shape.geometry.entry_bytes / 1e6
            for entries in (budget, budget + request.kv_buffer)
        )
        notes.append(
            f"kv_budget {budget}: the entries of a sequence take {after:,.1f} MB after an eviction, {full:,.1f} MB at "
            f"{budget} + {request.kv_buffer}, at any length"
        )
    notes.append(
        "the server computes --max-num-seqs sequences at once (default "
        f"{Settings.model_fields['max_num_seqs'].default}), however many fit"
    )
    if request.dtype == "auto":
        notes.append(f"assuming {ASSUMED_DTYPE}; --dtype float32 for a CPU without bf16 hardware")
    return notes


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:>10}" + "".join(f"{cell:>24}" for cell in cells)


def _parse(arguments: Sequence[str]) -> PlanRequest:
    parser = OneLineParser(
        prog=f"{PROGRAM} plan",
        description="How many concurrent sequences fit a memory, under several budgets and dense, and how many tokens "
        "a second a card's bandwidth allows them. Loads no weights.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", default=EMBEDDED_NAME, help="repo id, folder, GGUF file or 'embedded' (%(default)s)")
    parser.add_argument("--gates", help="gate checkpoint, to count its parameters and show its trained budget")
    parser.add_argument(
        "--memory", type=_memory, help="of the whole device, such as 80GB or 16GiB; needed where --card names none"
    )
    parser.add_argument("--card", type=_card, metavar="CARD", help=f"memory and bandwidth of {', '.join(CARDS)}")
    parser.add_argument(
        "--bandwidth", type=_bandwidth, help="of the device's memory, as measured, such as 4.3TB/s (the card's)"
    )
    parser.add_argument("--kv-budget", type=_whole(0, 2**31 - 1), help="a budget to show beside the usual ones")
    parser.add_argument("--kv-buffer", type=_whole(1, MAX_BUFFER_SIZE), default=32, help="entries (%(default)s)")
    parser.add_argument("--dtype", choices=("auto", *_DTYPES), default="auto", help="weights and cache (bfloat16)")
    parser.add_argument(
        "--kv-dtype", choices=("auto", *KV_DTYPES), default="auto", help="stored keys and values (as --dtype)"
    )
    parser.add_argument("--block-size", type=_whole(1, MAX_BLOCK_SIZE), default=16, help="entries a page (%(default)s)")
    parser.add_argument("--prefill-chunk", type=_whole(1, 65536), default=512, help="tokens (%(default)s)")
    parser.add_argument(
        "--context",
        type=_whole(1, 2**31 - 1),
        action="append",
        metavar="TOKENS",
        help="prompt and answer together; may be given more than once (4096, 32768, 131072, as far as the model goes)",
    )
    given = parser.parse_args(arguments)
    memory, bandwidth = given.memory, given.bandwidth
    if given.card is not None:
        card = CARDS[given.card]
        memory = memory or Memory(card.memory, f"{given.card}: {card.memory // 10**9}GB")
        bandwidth = bandwidth or Bandwidth(card.bandwidth, given.card)
    if memory is None:
        parser.error("give --memory, such as --memory 80GB, or --card, such as --card H100")
    return PlanRequest(
        model=given.model,
        gates=given.gates,
        memory=memory,
        bandwidth=bandwidth,
        dtype=given.dtype,
        kv_dtype=given.kv_dtype,
        block_size=given.block_size,
        kv_budget=given.kv_budget,
        kv_buffer=given.kv_buffer,
        prefill_chunk=given.prefill_chunk,
        contexts=tuple(given.context or ()),
    )


def _memory(text: str) -> Memory:
    try:
        return Memory(int(str(parse_size(text))), text.strip())
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _card(text: str) -> str:
    name = next((name for name in CARDS if name.lower() == text.strip().lower()), None)
    if name is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is unknown: use one of {', '.join(CARDS)}, or --memory and --bandwidth of your own"
        )
    return name


def _bandwidth(text: str) -> Bandwidth:
    match = _BANDWIDTH.fullmatch(text.strip())
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a bandwidth such as 4.3TB/s or 864GB/s")
    return Bandwidth(float(match[1]) * (1e12 if match[2].upper() == "TB" else 1e9), None)


def _whole(low: int, high: int) -> Any:
    """A type for argparse: an integer of this range."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not possible: must be an integer from {low} to {high}")
        return int(text)

    return parse
