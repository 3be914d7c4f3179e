"""The public `trimkv` 0.1.5 decoding a random model: run as a process of its own, under the `transformers` it pins.

Reads a job from a JSON file and writes one number and what it ran on to another. flash-attn cannot be had everywhere:
a stand-in for its two functions that `trimkv` calls is put where it is looked for, built on PyTorch's own
variable-length attention, which is FlashAttention-2 as well. Knows nothing of this project.

Letters: N virtual sequences (one a KV head), G query heads a KV head, T tokens, D head dimension, B entries a page.
"""

from __future__ import annotations

import importlib.machinery
import inspect
import json
import statistics
import sys
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WARM_UP_STEPS = 4
_CAUSAL = (-1, 0)


# ---- flash-attn's functions --------------------------------------------------------------------------------------


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_query: Tensor,
    cu_key: Tensor,
    *,
    longest: tuple[int, int],
    scale: float,
) -> Tensor:
    """Causal attention of packed sequences: [T, G, D] over [E, 1, D]."""
    if query.device.type == "cpu":
        return _varlen_by_loop(query, key, value, cu_query, cu_key, scale=scale)
    attend = _varlen_attn()
    known = inspect.signature(attend).parameters
    options: dict[str, Any] = {"window_size": _CAUSAL} if "window_size" in known else {"is_causal": True}
    if "scale" in known:
        options["scale"] = scale
    else:
        query = query * (scale * query.shape[-1] ** 0.5)
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    else:
        key, value = (states.expand(-1, query.shape[1], -1).contiguous() for states in (key, value))
    result: Tensor = attend(query, key, value, cu_query, cu_key, *longest, **options)
    return result


def _varlen_attn() -> Any:
    """PyTorch's packed attention; its arguments differ from release to release."""
    return import_module("torch.nn.attention.varlen").varlen_attn


def _varlen_by_loop(
    query: Tensor, key: Tensor, value: Tensor, cu_query: Tensor, cu_key: Tensor, *, scale: float
) -> Tensor:
    """The same on a CPU, for tests of the control flow."""
    parts = []
    for nth in range(cu_query.numel() - 1):
        q = query[cu_query[nth] : cu_query[nth + 1]].transpose(0, 1)
        k, v = (states[cu_key[nth] : cu_key[nth + 1], 0].expand(q.shape[0], -1, -1) for states in (key, value))
        tokens, keys = q.shape[1], k.shape[1]
        mask = torch.ones(tokens, keys, dtype=torch.bool).tril(keys - tokens)
        parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(0, 1))
    return torch.cat(parts)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    block_table: Tensor,
    softmax_scale: float,
    causal: bool,
) -> Tensor:
    """Attention of [N, T, G, D] over pages [P, B, 1, D]: pages are gathered, since PyTorch's attention reads none.

    So each layer copies what flash-attn would read in place, and waits for the host once more.
    """
    sequences, tokens, heads, dim = q.shape
    block = k_cache.shape[1]
    lengths = cache_seqlens.long()
    total, longest = (int(figure) for figure in torch.stack([lengths.sum(), lengths.amax()]).tolist())
    cu_key = F.pad(lengths.cumsum(0), (1, 0)).int()
    index = torch.repeat_interleave(torch.arange(sequences, device=q.device), lengths, output_size=total)
    nth = torch.arange(total, device=q.device) - cu_key.long()[index]
    slot = block_table[index, nth // block].long() * block + nth % block
    key, value = (pages.reshape(-1, 1, dim)[slot] for pages in (k_cache, v_cache))
    if tokens == 1:
        # One token sees all that is held: its query heads are as good as that many tokens of one head, unmasked, and
        # no key has to be repeated.
        return _one_token(q, key, value, cu_key, longest=longest, scale=softmax_scale)
    cu_query = torch.arange(0, sequences * tokens + 1, tokens, dtype=torch.int32, device=q.device)
    packed = q.reshape(sequences * tokens, heads, dim)
    mixed = _varlen(packed, key, value, cu_query, cu_key, longest=(tokens, longest), scale=softmax_scale)
    return mixed.view_as(q)


def _one_token(q: Tensor, key: Tensor, value: Tensor, cu_key: Tensor, *, longest: int, scale: float) -> Tensor:
    sequences, _, heads, dim = q.shape
    if q.device.type == "cpu":
        cu_query = torch.arange(sequences + 1, dtype=torch.int32)
        return _varlen_by_loop(q[:, 0], key, value, cu_query, cu_key, scale=scale)[:, None]
    attend = _varlen_attn()
    known = inspect.signature(attend).parameters
    cu_query = torch.arange(0, sequences * heads + 1, heads, dtype=torch.int32, device=q.device)
    query = q.reshape(sequences * heads, 1, dim)
    options: dict[str, Any] = {}
    if "scale" in known:
        options["scale"] = scale
    else:
        query = query * (scale * dim**0.5)
    result: Tensor = attend(query, key, value, cu_query, cu_key, heads, longest, **options)
    return result.view_as(q)


def flash_attn_varlen_func(*args: Any, **kwargs: Any) -> Tensor:
    """Not called with a paged cache."""
    raise NotImplementedError("the stand-in for flash-attn serves PagedTrimKVCache only")


def install_stand_in() -> None:
    """Make `import flash_attn` find this module's functions."""
    for name in ("flash_attn", "flash_attn.flash_attn_interface"):
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=name == "flash_attn")
        module.__dict__.update(
            flash_attn_with_kvcache=flash_attn_with_kvcache, flash_attn_varlen_func=flash_attn_varlen_func
        )
        sys.modules[name] = module


# ---- the run -----------------------------------------------------------------------------------------------------


def build(job: dict[str, Any]) -> Any:
    """`trimkv`'s Qwen3 with random weights and gates."""
    qwen3: Any = import_module("trimkv.models.qwen3")
    config = qwen3.TrimKVQwen3Config(
        **job["model"],
        retention_gate="rg10",
        retention_gate_intermediate_size=job["gate_width"],
        memory_size=job["memory_size"],
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, job["dtype"]))
    with torch.device(job["device"]):
        model = qwen3.TrimKVQwen3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.config._attn_implementation = "flash_attention_2"
    model.generation_config.eos_token_id = None
    return model.eval()


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Prefill the prompts whole, as `generate` does, then time decode steps over whole buffers."""
    model = build(job)
    device, batch = torch.device(job["device"]), job["batch"]
    steps = WARM_UP_STEPS + job["new_tokens"]
    cache = import_module("trimkv.cache_utils").PagedTrimKVCache(
        num_layers=model.config.num_hidden_layers,
        num_heads=model.config.num_key_value_heads,
        max_seq_len=job["prompt_tokens"] + steps,
        memory_size=job["memory_size"],
        buffer_size=job["buffer_size"],
        strategy="fixed_budget",
        device=job["device"],
    )
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, model.config.vocab_size, (batch, job["prompt_tokens"]), generator=generator)
    with torch.inference_mode():
        ids = _next(model, prompt.to(device), cache)
        for _ in range(WARM_UP_STEPS):
            ids = _next(model, ids, cache)
        seconds = []
        for _ in range(job["new_tokens"]):
            start = _now(device)
            ids = _next(model, ids, cache)
            seconds.append(_now(device) - start)
    return {
        "step_seconds": statistics.fmean(seconds),
        "median_step_seconds": statistics.median(seconds),
        "attention": "gathered pages, a loop on the CPU" if device.type == "cpu" else "its pages gathered each layer",
        "transformers": _version(),
    }


def _next(model: Any, ids: Tensor, cache: Any) -> Tensor:
    out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    tokens: Tensor = out.logits[:, -1:].argmax(-1)
    return tokens


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _version() -> str:
    return str(import_module("transformers").__version__)


def main(job_path: Path, result_path: Path) -> None:
    """`gpu_upstream.py JOB.json RESULT.json`."""
    install_stand_in()
    result = run(json.loads(job_path.read_text(encoding="utf-8")))
    result_path.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
