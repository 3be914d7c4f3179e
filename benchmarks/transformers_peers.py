"""What `transformers` does with the same prompts: a static batch, and its continuous batching. Run as a child process.

Owns both runs and their caps. Reads a job from a JSON file, writes timelines to another. Knows no server and no table.

The static batch is the ideal for equal lengths: one forward a step for all rows, no padding, no mask, logits for the
last position only, prompts prefilled in groups of `prefill_rows` into one dense cache.
Continuous batching is the engine under `generate_batch`, with requests streamed so that a run that is cut short still
says what it got.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from workload import Timeline

WARM_UP_TOKENS = 32
PAGE_TOKENS = 256
_NO_END = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run of one system.

    Attributes:
        system: `static` or `continuous`.
        model_path: folder of the model.
        dtype: `float32`, `bfloat16` or `float16`.
        threads: of torch.
        prompts: token ids, all of one length.
        new_tokens: tokens every stream generates.
        cap_seconds: when a continuous run is cut short.
        prefill_rows: prompts the static batch prefills at once.
        batch_tokens: tokens a step of continuous batching takes at most.
    """

    system: str
    model_path: str
    dtype: str
    threads: int
    prompts: list[list[int]]
    new_tokens: int
    cap_seconds: float
    prefill_rows: int
    batch_tokens: int


@dataclass(frozen=True, slots=True)
class Result:
    """Timelines of the streams, bytes their caches held at most, and whether the run was cut short."""

    timelines: list[Timeline]
    kv_bytes: int
    is_cut: bool


def run_static(model: Any, job: Job) -> Result:
    """Prefill all rows, then one forward a token for all of them."""
    prompts = torch.tensor(job.prompts)
    line = Timeline()
    start = time.monotonic()
    cache, last = _prefill(model, prompts, job.prefill_rows)
    line.note(time.monotonic() - start, 1)
    for made in range(2, job.new_tokens + 1):
        last = _forward(model, last, cache)
        line.note(time.monotonic() - start, made)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return Result([line] * len(job.prompts), held, False)


def _prefill(model: Any, prompts: Tensor, rows: int) -> tuple[DynamicCache, Tensor]:
    """One cache for all prompts, and their first tokens [S, 1]; in groups, which fit the processor's caches better."""
    whole, firsts = DynamicCache(config=model.config), []
    groups: list[DynamicCache] = []
    for group in torch.split(prompts, rows):
        cache = DynamicCache(config=model.config)
        firsts.append(_forward(model, group, cache))
        groups.append(cache)
    if len(groups) == 1:
        return groups[0], firsts[0]
    for index in range(model.config.num_hidden_layers):
        layers = [cache.layers[index] for cache in groups]
        whole.update(torch.cat([layer.keys for layer in layers]), torch.cat([layer.values for layer in layers]), index)
        for layer in layers:
            layer.keys = layer.values = None
    return whole, torch.cat(firsts)


def _forward(model: Any, ids: Tensor, cache: DynamicCache) -> Tensor:
    """The most likely next token of every row: [S, 1]."""
    is_renamed = "cache" in inspect.signature(type(model.model).forward).parameters
    out = model(ids, **{"cache" if is_renamed else "past_key_values": cache}, use_cache=True, logits_to_keep=1)
    tokens: Tensor = out.logits[:, -1:].argmax(-1)
    return tokens


def run_continuous(model: Any, job: Job) -> Result:
    """All requests at once into a continuous-batching manager."""
    total = len(job.prompts[0]) + job.new_tokens
    config = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS,
        num_blocks=len(job.prompts) * (-(-total // PAGE_TOKENS) + 1),
        max_batch_tokens=job.batch_tokens,
        max_requests_per_batch=len(job.prompts),
    )
    generation = GenerationConfig(do_sample=False, max_new_tokens=job.new_tokens, eos_token_id=_NO_END)
    lines: dict[str, Timeline] = {}
    held, finished = 0, 0
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=config, block=True, timeout=5
    ) as manager:
        start = time.monotonic()
        # Not `add_requests`: it takes the end token from the model where the generation config says there is none.
        for ids in job.prompts:
            lines[manager.add_request(ids, max_new_tokens=job.new_tokens, streaming=True)] = Timeline()
        while finished < len(lines) and time.monotonic() - start < job.cap_seconds:
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("continuous batching stopped by itself")
                continue
            if result.error is not None:
                raise RuntimeError(f"continuous batching failed: {result.error}")
            lines[result.request_id].note(time.monotonic() - start, len(result.generated_tokens))
            held = max(held, _held_bytes(manager))
            finished += result.is_finished()
    return Result(list(lines.values()), held, finished < len(lines))


def _held_bytes(manager: Any) -> int:
    """Bytes of the pages that continuous batching has given out."""
    processor = getattr(manager, "batch_processor", None)
    if processor is None:
        return 0
    cache = processor.cache
    return int(cache.num_sectors * cache.bytes_per_sector - cache.compute_free_capacity(relative=False))


def run(job: Job) -> Result:
    """Load the model, warm it up, run."""
    torch.set_num_threads(job.threads)
    # `transformers` gives continuous batching its own paged attention for this name.
    model = AutoModelForCausalLM.from_pretrained(
        job.model_path, dtype=getattr(torch, job.dtype), attn_implementation="sdpa"
    ).eval()
    with torch.inference_mode():
        _prefill(model, torch.tensor(job.prompts)[:, :WARM_UP_TOKENS], job.prefill_rows)
        return run_static(model, job) if job.system == "static" else run_continuous(model, job)


def main(arguments: Sequence[str]) -> None:
    """`transformers_peers.py JOB.json RESULT.json`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("job", type=Path)
    parser.add_argument("result", type=Path)
    paths = parser.parse_args(arguments)
    job = Job(**json.loads(paths.job.read_text(encoding="utf-8")))
    paths.result.write_text(json.dumps(asdict(run(job))), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
