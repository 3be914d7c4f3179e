"""What an engine must be told before it starts. Plain values: where they come from (flags, environment, file) is
`service.settings`' business."""

from __future__ import annotations

from dataclasses import dataclass

# Memory of the page pool where nobody says how much, and no GPU.
DEFAULT_POOL_BYTES = 2 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine.

    Attributes:
        model: hub repo id, local folder, GGUF file, or `embedded`.
        gates: folder or repo id of a gate checkpoint; None: the ones `embedded` has, or none (dense only).
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, …
        backend: attention backend, `auto` or one that `trimkv_core.attention.select` knows.
        enforce_eager: no captured decode steps on a GPU, none that run ahead of the host.
        kv_memory_bytes: memory of the page pool; None: what a GPU has left, `DEFAULT_POOL_BYTES` elsewhere.
        gpu_memory_utilization: share of a GPU's memory that a pool of unsaid size may fill, weights included; above 0
            and up to 1.
        kv_dtype: of stored keys and values: `auto` (the model's) or `fp8_e4m3`.
        block_size: entries a page.
        max_num_seqs: sequences running at once.
        max_model_len: tokens of prompt and answer together; None: what the base model allows.
        prefill_chunk: prompt tokens one step computes at most (the prefill lane), and the default distance between
            eviction points.
        max_queue_requests, max_queue_tokens: bounds of the waiting queue.
        kv_budget: default M; None: the checkpoint's trained `memory_size`; 0: dense.
        kv_buffer: default buffer.
        max_kv_budget: the largest M a request may have, the default one included; None: no cap.
    """

    model: str = "embedded"
    gates: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    backend: str = "auto"
    enforce_eager: bool = False
    kv_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    kv_dtype: str = "auto"
    block_size: int = 16
    max_num_seqs: int = 64
    max_model_len: int | None = None
    prefill_chunk: int = 512
    max_queue_requests: int = 256
    max_queue_tokens: int = 1_000_000
    kv_budget: int | None = None
    kv_buffer: int = 32
    max_kv_budget: int | None = None
