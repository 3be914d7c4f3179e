"""Decode attention by itself: our kernel against the bytes it must move, and FlashInfer's on the same pages.

Owns a made-up memory of ragged streams. Knows no model: only shapes.

Letters: N sequences, L layers, H KV heads, G query heads a KV head, D head dimension, B entries a page, P pages.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_report import Job, Measured, NotRun
from gpu_rows import Bench
from gpu_timing import Clock
from torch import Tensor

BLOCK_SIZE = 16
# Streams of trained gates differ some twenty-fold in length.
_LENGTH_SIGMA = 0.7
_WORKSPACE_BYTES = 128 << 20
_REPEATS = 20
# What two correct bf16 kernels may differ by, of the mean size of a result.
_TOLERANCE = 0.02


@dataclass(frozen=True, slots=True)
class Ragged:
    """Pages of ragged streams, as `PagedEntries` of `trimkv_core.kernels.memory` names them.

    Attributes:
        key, value: [P, B, D].
        key_scale, value_scale: none.
        log_beta: float32 [P, B].
        position: int32 [P, B].
        arena: int32 [P], page numbers, stream after stream.
        lengths: int32 [N, L·H].
        first_page: int64 [N, L·H], where the streams' pages begin in the arena.
        query: [L, N, H·G, D].
    """

    key: Tensor
    value: Tensor
    log_beta: Tensor
    position: Tensor
    arena: Tensor
    lengths: Tensor
    first_page: Tensor
    query: Tensor
    key_scale: None = None
    value_scale: None = None

    @property
    def moved_bytes(self) -> int:
        """Keys, values and page numbers read, queries read and results written: all layers."""
        entries = int(self.lengths.sum())
        entry_bytes = 2 * self.key.shape[-1] * self.key.element_size()
        return entries * entry_bytes + self.arena.nbytes + self.lengths.nbytes + 2 * self.query.nbytes


def make_ragged(bench: Bench, batch: int) -> Ragged:
    """Streams of a mean length of M + buffer / 2, their pages scattered over the pool."""
    model, device = bench.sizes.model, bench.device
    layers, heads, dim = model["num_hidden_layers"], model["num_key_value_heads"], model["head_dim"]
    mean = bench.sizes.memory_size + bench.sizes.buffer_size // 2
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(batch, layers * heads, generator=generator).mul(_LENGTH_SIGMA).exp()
    lengths = (spread / spread.mean() * mean).round().clamp(min=1).int()
    pages = -(-lengths.long() // BLOCK_SIZE)
    count = int(pages.sum())
    first = (pages.flatten().cumsum(0) - pages.flatten()).view_as(pages)
    shape = (count, BLOCK_SIZE, dim)
    return Ragged(
        key=torch.randn(shape, device=device, dtype=bench.dtype),
        value=torch.randn(shape, device=device, dtype=bench.dtype),
        log_beta=torch.zeros(shape[:2], device=device),
        position=torch.zeros(shape[:2], dtype=torch.int32, device=device),
        arena=torch.randperm(count, generator=generator).int().to(device),
        lengths=lengths.to(device),
        first_page=first.to(device),
        query=torch.randn(layers, batch, model["num_attention_heads"], dim, device=device, dtype=bench.dtype),
    )


def kernel_jobs(bench: Bench) -> list[Job]:
    """A row for each batch and kernel."""
    factor = bench.sizes.seconds_factor
    jobs = []
    for batch in bench.sizes.kernel_batches:
        for name, measure in (("our decode kernel", _ours), ("FlashInfer's decode kernel", _flashinfer)):
            title = f"{name}, all layers, batch {batch}, M = {bench.sizes.memory_size}"
            jobs.append(Job(title, None, 10 * factor, partial(measure, bench, batch)))
    return jobs


def _measure(bench: Bench, ragged: Ragged, run: Callable[[], object], note: str) -> Measured:
    """Bandwidth of one call for every layer: together they read far more than a cache holds."""
    replay, how = _captured(bench.device, run)
    seconds = Clock(bench.device).median(replay, repeats=_REPEATS if bench.device.type == "cuda" else 1, warm_up=1)
    rate = ragged.moved_bytes / seconds
    return Measured(
        value=rate / 1e12,
        unit="TB/s",
        limit=bench.bandwidth / 1e12,
        share=rate / bench.bandwidth,
        note=f"{seconds * 1e6:,.0f} µs for {ragged.moved_bytes / 1e6:,.0f} MB; {how}; {note}",
    )


def _captured(device: torch.device, run: Callable[[], object]) -> tuple[Callable[[], object], str]:
    """The replay of a CUDA graph of `run`, so that launches cost nothing; `run` itself where it cannot be captured."""
    if device.type != "cuda":
        return run, "no graph"
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return run, f"not captured ({type(error).__name__}), launches included"
    return graph.replay, "CUDA graph"


# ---- ours --------------------------------------------------------------------------------------------------------


def _ours(bench: Bench, batch: int) -> Measured:
    if bench.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise NotRun("needs a GPU, or TRITON_INTERPRET=1")
    from trimkv_core.kernels.decode import choose_splits, decode_attention, workspace_for

    ragged = make_ragged(bench, batch)
    layers, _, query_heads, dim = ragged.query.shape
    heads = bench.sizes.model["num_key_value_heads"]
    sms = torch.cuda.get_device_properties(bench.device).multi_processor_count if bench.device.type == "cuda" else 1
    splits = choose_splits(batch, heads, sms, -(-bench.sizes.memory_size // BLOCK_SIZE))
    workspace = workspace_for(batch, query_heads, dim, splits=splits, device=bench.device)
    out = torch.empty_like(ragged.query)
    rows = torch.arange(batch, device=bench.device)
    now = torch.zeros(batch, dtype=torch.int32, device=bench.device)

    def run() -> None:
        for layer in range(layers):
            decode_attention(
                ragged,
                rows,
                first_page=ragged.first_page,
                layer=layer,
                query=ragged.query[layer],
                out=out[layer],
                num_heads=heads,
                scale=dim**-0.5,
                window=None,
                position=now,
                splits=splits,
                workspace=workspace,
            )

    measured = _measure(bench, ragged, run, f"{splits} parts a stream")
    _check(ragged, out[0], heads)
    return measured


# ---- FlashInfer --------------------------------------------------------------------------------------------------


def _flashinfer(bench: Bench, batch: int) -> Measured:
    try:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper
    except ImportError as error:
        raise NotRun(f"FlashInfer cannot be imported: {error}") from error
    if bench.device.type != "cuda":
        raise NotRun("FlashInfer needs a GPU")
    ragged = make_ragged(bench, batch)
    layers, _, query_heads, dim = ragged.query.shape
    heads = bench.sizes.model["num_key_value_heads"]
    planned = [
        _plan(BatchDecodeWithPagedKVCacheWrapper, ragged, layer, heads=heads, group=query_heads // heads)
        for layer in range(layers)
    ]
    # One KV head a virtual sequence: [N·H, G, D] over pages [P, B, 1, D].
    pages = (ragged.key.unsqueeze(2), ragged.value.unsqueeze(2))
    queries = ragged.query.view(layers, batch * heads, query_heads // heads, dim)
    out = torch.empty_like(queries)

    def run() -> None:
        for layer, wrapper in enumerate(planned):
            wrapper.run(queries[layer], pages, out=out[layer])

    note = "planned beforehand, which a server would do every step; one KV head a virtual sequence"
    measured = _measure(bench, ragged, run, note)
    _check(ragged, out[0].view(batch, query_heads, dim), heads)
    return measured


def _plan(wrapper_class: Any, ragged: Ragged, layer: int, *, heads: int, group: int) -> Any:
    streams = slice(layer * heads, (layer + 1) * heads)
    lengths = ragged.lengths[:, streams].reshape(-1).long()
    first = ragged.first_page[:, streams].reshape(-1)
    counts = -(-lengths // BLOCK_SIZE)
    begin = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    nth = torch.arange(int(counts.sum()), device=counts.device) - torch.repeat_interleave(begin[:-1], counts)
    indices = ragged.arena[torch.repeat_interleave(first, counts) + nth]
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=counts.device)
    wrapper = wrapper_class(workspace, "NHD")
    wrapper.plan(
        begin.int(),
        indices,
        ((lengths - 1) % BLOCK_SIZE + 1).int(),
        group,
        1,
        ragged.key.shape[-1],
        BLOCK_SIZE,
        q_data_type=ragged.query.dtype,
        kv_data_type=ragged.key.dtype,
    )
    return wrapper


def _check(ragged: Ragged, out: Tensor, heads: int) -> None:
    """A fast kernel that computes something else is no result: compare one sequence's first layer.

    Raises:
        RuntimeError: it differs by more than rounding.
    """
    group = out.shape[1] // heads
    for head in range(heads):
        length, first = int(ragged.lengths[0, head]), int(ragged.first_page[0, head])
        pages = ragged.arena[first : first - (-length // BLOCK_SIZE)].long()
        key, value = (kept[pages].flatten(0, 1)[:length].float() for kept in (ragged.key, ragged.value))
        query = ragged.query[0, 0, head * group : (head + 1) * group].float()
        expected = torch.softmax(query @ key.T * query.shape[-1] ** -0.5, -1) @ value
        got = out[0, head * group : (head + 1) * group].float()
        error = float((got - expected).norm() / expected.norm())
        if not error < _TOLERANCE:
            raise RuntimeError(f"the kernel's result differs by {error:.2g} from attention in float32")
