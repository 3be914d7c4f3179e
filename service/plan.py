"""`trimkv-serve plan`: how many sequences fit a memory, before anything is loaded.

Owns the reading of a model's shape from its config alone, and the table. The arithmetic is admission's own: a sequence
is worth its worst case in pages, beside one prefill lane. Knows no engine.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from transformers import AutoConfig, AutoModelForCausalLM

from service.logs import format_bytes
from service.settings import PROGRAM, OneLineParser, Settings, parse_size
from trimkv_core.budget import MAX_BLOCK_SIZE, MAX_BUFFER_SIZE, Budget, BudgetError, Geometry, lane_pages
from trimkv_core.checkpoint import CONFIG_NAME, GateConfig, read_config
from trimkv_core.embedded import EMBEDDED_NAME, embedded_config, embedded_gates_path
from trimkv_core.gates import build_gates
from trimkv_core.models import locate_base

SWEEP = (64, 128, 256, 512, 1024, 2048)
MAX_REASON_CHARACTERS = 300
CONTEXTS = (4_096, 32_768, 131_072)
# What a server chooses depends on its device, of which a plan knows nothing: GPUs and new CPUs get this.
ASSUMED_DTYPE = "bfloat16"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class PlanError(Exception):
    """No plan can be made; the message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What a plan needs to know of a model.

    Attributes:
        geometry: its cache.
        max_model_len: what its config allows.
        dtype: number format of weights and cache.
        weight_bytes: all its parameters, tied ones once.
        gate_bytes: its gates', 0 without.
        trained_budget: M of its gates, None without.
    """

    geometry: Geometry
    max_model_len: int
    dtype: str
    weight_bytes: int
    gate_bytes: int
    trained_budget: int | None


@dataclass(frozen=True, slots=True)
class Memory:
    """A size in bytes, and how it was typed: 80GB and 74.5 GiB are the same, and not everybody sees it."""

    size: int
    typed: str

    def __str__(self) -> str:
        return f"{self.typed} ({format_bytes(self.size)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What is planned for; see the flags of `plan --help`."""

    model: str
    gates: str | None
    memory: Memory
    dtype: str
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


def run_plan(arguments: Sequence[str]) -> str:
    """The table for command-line `arguments`.

    Raises:
        PlanError: the model's config cannot be read, or its weights leave no memory.
        SystemExit: `--help`, or flags that are not possible (status 2).
    """
    request = _parse(arguments)
    shape = read_shape(request)
    contexts = _contexts(request, shape.max_model_len)
    pool_bytes = request.memory.size - shape.weight_bytes - shape.gate_bytes
    lane = lane_pages(shape.geometry, request.prefill_chunk)
    pages = pool_bytes // shape.geometry.page_bytes - lane
    if pages < 1:
        raise PlanError(
            f"--memory={request.memory} is not enough: weights and gates take "
            f"{format_bytes(shape.weight_bytes + shape.gate_bytes)} in {shape.dtype}, and one prefill chunk "
            f"{format_bytes(lane * shape.geometry.page_bytes)}"
        )
    rows = tuple(
        plan_row(shape.geometry, budget, pages=pages, contexts=contexts)
        for budget in _budgets(request, shape, contexts)
    )
    return _render(request, shape, rows=rows, contexts=contexts)


def plan_row(geometry: Geometry, budget: Budget, *, pages: int, contexts: Sequence[int]) -> PlanRow:
    """How many sequences of each context length fit `pages` under `budget`."""
    needed = tuple(budget.ceiling_pages(geometry, total_tokens=context) for context in contexts)
    return PlanRow(
        budget.memory_size,
        tuple(count * geometry.page_bytes for count in needed),
        tuple(pages // count for count in needed),
    )


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
    heads = text.num_attention_heads
    geometry = Geometry(
        num_layers=text.num_hidden_layers,
        num_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        block_size=request.block_size,
        kv_itemsize=_DTYPES[dtype].itemsize,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=_DTYPES[dtype])
    return ModelShape(
        geometry=geometry,
        max_model_len=text.max_position_embeddings,
        dtype=dtype,
        weight_bytes=_parameter_bytes(model),
        gate_bytes=_gate_bytes(gates, text, geometry, dtype=_DTYPES[dtype]) if gates is not None else 0,
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


def _gate_bytes(gates: GateConfig, text: Any, geometry: Geometry, *, dtype: torch.dtype) -> int:
    shape = gates.shape(hidden_size=text.hidden_size, num_heads=geometry.num_heads, num_layers=geometry.num_layers)
    return _parameter_bytes(torch.nn.ModuleList(build_gates(shape, dtype=dtype)))


def _parameter_bytes(module: torch.nn.Module) -> int:
    """Bytes of all parameters; `parameters()` names a tied one once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


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
    pool = request.memory.size - shape.weight_bytes - shape.gate_bytes
    gates = f" - gates {format_bytes(shape.gate_bytes)}" if shape.gate_bytes else ""
    headings = [f"{context:,} tokens" for context in contexts]
    lines = [
        f"{request.model}: {geometry.num_layers} layers x {geometry.num_heads} KV heads x {geometry.head_dim}, "
        f"{shape.dtype}, up to {shape.max_model_len:,} tokens; one entry {geometry.entry_bytes} bytes, "
        f"page of {geometry.block_size} entries {geometry.page_bytes:,} bytes",
        f"{request.memory} - weights {format_bytes(shape.weight_bytes)}{gates} = pool "
        f"{format_bytes(pool)}, of which one prefill chunk of {request.prefill_chunk} tokens takes "
        f"{format_bytes(lane)}; not counted: activations and the runtime's own memory",
        "",
        "Concurrent sequences (bytes each at worst) by context length:",
        _line("kv_budget", headings),
    ]
    for row in rows:
        name = "dense" if row.budget is None else str(row.budget)
        marks = "".join(
            mark
            for mark, size in (("*", request.kv_budget), ("+", shape.trained_budget))
            if size and size == row.budget
        )
        cells = [
            f"{count:,} ({format_bytes(size)})" for count, size in zip(row.sequences, row.sequence_bytes, strict=True)
        ]
        lines.append(_line(name + marks, cells))
    lines.append(f"kv_buffer {request.kv_buffer}; * as asked for, + as the gates were trained")
    return "\n".join([*lines, "", *_notes(request, shape)])


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
        description="How many concurrent sequences fit a memory, under several budgets and dense. Loads no weights.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", default=EMBEDDED_NAME, help="repo id, folder, GGUF file or 'embedded' (%(default)s)")
    parser.add_argument("--gates", help="gate checkpoint, to count its parameters and show its trained budget")
    parser.add_argument("--memory", type=_memory, required=True, help="of the whole device, such as 80GB or 16GiB")
    parser.add_argument("--kv-budget", type=_whole(0, 2**31 - 1), help="a budget to show beside the usual ones")
    parser.add_argument("--kv-buffer", type=_whole(1, MAX_BUFFER_SIZE), default=32, help="entries (%(default)s)")
    parser.add_argument("--dtype", choices=("auto", *_DTYPES), default="auto", help="weights and cache (bfloat16)")
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
    return PlanRequest(
        model=given.model,
        gates=given.gates,
        memory=given.memory,
        dtype=given.dtype,
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


def _whole(low: int, high: int) -> Any:
    """A type for argparse: an integer of this range."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not possible: must be an integer from {low} to {high}")
        return int(text)

    return parse
