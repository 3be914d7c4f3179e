"""How large a pool a GPU has room for: the sum, and the trial of the largest step that it needs.

    | others, CUDA itself | weights | largest step | captured steps | pool, what a full pool needs | left free |
    |<------------------------------- utilization x total ---------------------------------------->|

What a captured step takes cannot be known before the pool is there, so it is estimated: see `graph_bytes`. Knows no
settings' sources and no requests.

Letters: L layers, H KV heads, D head dimension, B entries a page, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from service.engine.runner import PackedDecoder
from trimkv_core.attention.base import AttentionBackend, PagedStep
from trimkv_core.batches import Segment
from trimkv_core.budget import Geometry, lane_pages
from trimkv_core.pages import PagePool
from trimkv_core.sequences import SequenceTable

# Of a row of logits while its token is chosen: float32 copies, what is sorted, its indices.
_SAMPLING_BYTES = 32
# What the driver keeps for a layer of a captured step: a dozen kernels and their parameters, rounded up.
_GRAPH_LAYER_BYTES = 256 << 10
# Of an entry while all of a row are scored: its key and who moves where.
_EVICTION_BYTES = 8
# Of an entry while prefill gathers a layer: its stream, place, page and slot, int64, and what is between them.
_INDEX_BYTES = 40


class MemorySizingError(RuntimeError):
    """No pool fits; the message says what takes how much and what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LargestStep:
    """What a step may be at most, and who computes it.

    Attributes:
        prefill_chunk: prompt tokens.
        max_num_seqs: rows that decode beside them, and rows of logits.
        vocab_size: V.
        itemsize: bytes of an element of activations.
        captured_steps: decode steps that will be captured; 0: none.
    """

    prefill_chunk: int
    max_num_seqs: int
    vocab_size: int
    itemsize: int
    captured_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryProfile:
    """Bytes of a GPU, after a model was loaded and its largest step tried.

    Attributes:
        total: of the device.
        outside: taken by other processes and by the runtime, beyond PyTorch's own allocator.
        weights: held when nothing runs.
        activations: what the largest step took beyond them.
    """

    total: int
    outside: int
    weights: int
    activations: int


@dataclass(frozen=True, slots=True)
class PoolSize:
    """What `size_pool` found: pages, and the sum in words."""

    pages: int
    explanation: str


class DeviceProbe(Protocol):
    """What can be asked of a device's memory; all in bytes."""

    def total_and_free(self) -> tuple[int, int]:
        """What there is, and what no process holds."""

    def reserved(self) -> int:
        """Held by PyTorch's allocator, in use or not."""

    def allocated(self) -> int:
        """In use now."""

    def peak(self) -> int:
        """The most that was in use since `reset_peak`, all work done."""

    def reset_peak(self) -> None:
        """Measure the peak from now on."""

    def release_cached(self) -> None:
        """Give the device back what is not in use."""


class CudaProbe:
    """A `DeviceProbe` of an NVIDIA GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def total_and_free(self) -> tuple[int, int]:
        free, total = torch.cuda.mem_get_info(self._device)
        return total, free

    def reserved(self) -> int:
        return torch.cuda.memory_reserved(self._device)

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def release_cached(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()


# ---- the sum -----------------------------------------------------------------------------------------------------


def page_cost(geometry: Geometry, *, itemsize: int) -> int:
    """Bytes a page takes, with what a step needs for each page in use.

    Prefill gathers the keys and values of one layer at a time, at worst of all sequences there are; an eviction scores
    all entries of its rows. Both grow with the pool, so no step of a full one is too large.
    """
    dim = geometry.head_dim
    gathered = 2 * dim * itemsize + _INDEX_BYTES
    if geometry.scale_bytes:
        # One of the two as it is stored, beside what it is widened to.
        gathered += dim * geometry.kv_itemsize
    scratch = geometry.block_size * (gathered / geometry.num_layers + _EVICTION_BYTES)
    return geometry.page_bytes + int(scratch) + 1


def graph_bytes(step: LargestStep, geometry: Geometry, *, activations: int) -> int:
    """What captured decode steps keep for good: an estimate from above.

    They share one memory, as large as the largest of them needs: no more than the step that was tried, which had as
    many rows and a prefill chunk. Each has its slots and page lists, and what the driver keeps for each kernel.
    """
    if not step.captured_steps:
        return 0
    own = _GRAPH_LAYER_BYTES * geometry.num_layers + 8 * geometry.streams * step.max_num_seqs
    return activations + _sampling_bytes(step) + step.captured_steps * own


def size_pool(profile: MemoryProfile, geometry: Geometry, step: LargestStep, *, utilization: float) -> PoolSize:
    """Pages that fit `utilization` of a GPU beside everything else.

    Raises:
        MemorySizingError: the weights do not fit, or not one prefill chunk beside them.
    """
    allowed = int(profile.total * utilization)
    graphs = graph_bytes(step, geometry, activations=profile.activations)
    largest = profile.activations + _sampling_bytes(step)
    share = f"gpu_memory_utilization={utilization:g} of {_gib(profile.total)} is {_gib(allowed)}"
    held = f"others and the runtime take {_gib(profile.outside)}, weights {_gib(profile.weights)}"
    if profile.outside + profile.weights >= allowed:
        raise MemorySizingError(
            f"{share}; {held}: the weights do not fit; use a smaller model or dtype, end what else runs on the GPU, or "
            "raise gpu_memory_utilization"
        )
    left = allowed - profile.outside - profile.weights - largest - graphs
    pages = max(left, 0) // page_cost(geometry, itemsize=step.itemsize)
    lane = lane_pages(geometry, step.prefill_chunk)
    needs = f"the largest step {_gib(largest)}, captured steps {_gib(graphs)}"
    if pages <= lane + geometry.streams:
        raise MemorySizingError(
            f"{share}; {held}, {needs}: {max(left, 0) / 2**30:.2f} GiB are left, {pages} pages, and the prefill chunk "
            f"of {step.prefill_chunk} tokens alone takes {lane}; lower prefill_chunk or max_num_seqs, set "
            "enforce_eager or kv_dtype=fp8_e4m3, or raise gpu_memory_utilization"
        )
    return PoolSize(pages, f"{share}; {held}, {needs}, the pool {_gib(pages * geometry.page_bytes)}")


def _sampling_bytes(step: LargestStep) -> int:
    return _SAMPLING_BYTES * step.max_num_seqs * step.vocab_size


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


# ---- the trial ---------------------------------------------------------------------------------------------------


def profile_memory(probe: DeviceProbe, run: Callable[[], int]) -> MemoryProfile:
    """Measure what a step takes.

    Args:
        probe: of the device that holds the weights and nothing else of ours.
        run: computes the step; returns the bytes of what it needed and a server would not.

    Raises:
        MemorySizingError: the step does not fit beside the weights.
    """
    probe.release_cached()
    weights = probe.allocated()
    probe.reset_peak()
    try:
        scratch = run()
    except torch.OutOfMemoryError as error:
        total, free = probe.total_and_free()
        raise MemorySizingError(
            f"weights take {_gib(weights)} of {_gib(total)}, {_gib(free)} are free, and the largest step does not fit "
            "beside them: lower prefill_chunk or max_num_seqs, or use a smaller model or dtype"
        ) from error
    activations = max(probe.peak() - weights - scratch, 0)
    probe.release_cached()
    total, free = probe.total_and_free()
    outside = max(total - free - probe.reserved(), 0)
    return MemoryProfile(total=total, outside=outside, weights=weights, activations=activations)


@torch.inference_mode()
def try_largest_step(
    decoder: PackedDecoder,
    backend: AttentionBackend[Any],
    geometry: Geometry,
    step: LargestStep,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Compute a full prefill lane beside as many decoding rows as there can be, over a pool just large enough.

    Args:
        decoder: computes it.
        backend: writes and reads pages.
        geometry: of the pool.
        step: how large.
        dtype, device: of the pool.

    Returns:
        Bytes of the pool.
    """
    tokens = [*[1] * (step.max_num_seqs - 1), step.prefill_chunk]
    pages = geometry.streams * sum(-(-count // geometry.block_size) for count in tokens)
    pool = PagePool(geometry, pages, dtype=dtype, device=device)
    table = SequenceTable(pool, len(tokens))
    batch = table.extend([Segment(table.open(geometry.streams), count) for count in tokens])
    last = torch.tensor(tokens, device=device).cumsum(0) - 1
    ids = torch.zeros(batch.num_tokens, dtype=torch.int64, device=device)
    decoder.forward(ids, batch.position, PagedStep(backend, table, batch), last)
    return pool.num_bytes
