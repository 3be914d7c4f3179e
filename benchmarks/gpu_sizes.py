"""What the GPU benchmark runs, twice: the sizes of the goals, and tiny ones that pass on a CPU in seconds.

Owns every size. Knows nothing that runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Qwen3-4B-Instruct-2507; weights are random, for speed only shapes matter.
QWEN3_4B: dict[str, Any] = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 262_144,
    "tie_word_embeddings": True,
}
TINY_MODEL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of one run.

    Attributes:
        model: of its config.
        rope_theta: of its RoPE.
        gate_width: intermediate size of the gates.
        memory_size, buffer_size: of the goals' budget.
        paper_memory_size, paper_batch: of the paper's case.
        prompt_factor: prompt tokens of the decode rows over M; the more, the more unequal streams become.
        batches: sequences at once, of the goals' decode rows.
        long_batch, short_tokens, long_tokens: of the row that compares logical lengths.
        prefill_tokens, prefill_chunks: of the prefill rows.
        lane_tokens: prompt tokens of one forward when sequences are set up.
        distinct: sequences that are prefilled for a batch; the rest are copies of them.
        rounds: timed rounds of decode steps, each two buffers long; at least one is run.
        full_cache_contexts, full_cache_batches, full_cache_tokens: of `transformers`' rows.
        upstream_cases: (batch, M, prompt tokens) of the rows of `trimkv`.
        kernel_batches: sequences of the rows of kernels.
        copy_bytes, matmul_size: of the ceilings.
        seconds_factor: what a row's guessed seconds are multiplied by.
    """

    model: dict[str, Any] = field(default_factory=lambda: QWEN3_4B)
    rope_theta: float = 5e6
    gate_width: int = 512
    memory_size: int = 512
    buffer_size: int = 32
    paper_memory_size: int = 1024
    paper_batch: int = 4
    prompt_factor: int = 4
    batches: tuple[int, ...] = (1, 64, 256)
    long_batch: int = 16
    short_tokens: int = 1024
    long_tokens: int = 131_072
    prefill_tokens: int = 32_768
    prefill_chunks: tuple[int, ...] = (512, 2048)
    lane_tokens: int = 8192
    distinct: int = 16
    rounds: int = 3
    full_cache_contexts: tuple[int, ...] = (1024, 8192, 32_768)
    full_cache_batches: tuple[int, ...] = (1, 4)
    full_cache_tokens: int = 32
    upstream_cases: tuple[tuple[int, int, int], ...] = ((1, 512, 8192), (4, 1024, 32_768))
    kernel_batches: tuple[int, ...] = (1, 64)
    copy_bytes: int = 4 << 30
    matmul_size: int = 8192
    seconds_factor: float = 1.0


TINY = Sizes(
    model=TINY_MODEL,
    gate_width=8,
    memory_size=24,
    buffer_size=4,
    paper_memory_size=32,
    paper_batch=2,
    batches=(1, 3),
    long_batch=2,
    short_tokens=64,
    long_tokens=2048,
    prefill_tokens=96,
    prefill_chunks=(16, 32),
    lane_tokens=64,
    distinct=2,
    rounds=1,
    full_cache_contexts=(16, 32),
    full_cache_batches=(1, 2),
    full_cache_tokens=4,
    upstream_cases=((1, 24, 48),),
    kernel_batches=(1, 2),
    copy_bytes=1 << 20,
    matmul_size=128,
    seconds_factor=0.0,
)
