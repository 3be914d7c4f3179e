"""Numbers made with trimkv 0.1.5 (see the fixtures' README): the same logits, the same ids, the same kept positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures import UPSTREAM
from tests.parity.topleft import TopLeftBackend
from trimkv_core import PagedTrimKVCache, TrimKVCache, TrimKVQwen3ForCausalLM
from trimkv_core.overlay import attention_layers

SCENARIOS: list[dict[str, Any]] = json.loads((UPSTREAM / "scenarios.json").read_text())["scenarios"]


@pytest.fixture(scope="module")
def values() -> dict[str, torch.Tensor]:
    return load_file(UPSTREAM / "values.safetensors")


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {
        kind: TrimKVQwen3ForCausalLM.from_pretrained(str(UPSTREAM / folder), download_from="local", dtype=torch.float32)
        for kind, folder in (("paged", "gates_rg10"), ("local", "gates_rg"))
    }


def build_cache(scenario: dict[str, Any], block_size: int) -> PagedTrimKVCache | TrimKVCache:
    common = {name: scenario[name] for name in ("buffer_size", "strategy", "lookahead_steps", "sliding_window_size")}
    common |= {"memory_size": scenario.get("memory_size"), "block_size": block_size}
    if scenario["cache"] == "local":
        cache = TrimKVCache(**common)
        cache._backend = TopLeftBackend()
        return cache
    return PagedTrimKVCache(
        4,
        4,
        256,
        alpha_threshold=scenario["alpha_threshold"],
        min_tokens_per_head=scenario["min_tokens_per_head"],
        **common,
    )


def all_positions(cache: PagedTrimKVCache | TrimKVCache) -> torch.Tensor:
    return torch.cat([cache.positions(layer, head) for layer in range(4) for head in range(4)])


@pytest.mark.parametrize("kind", ["paged", "local"])
def test_log_beta_is_upstreams(kind: str, models: dict[str, Any], values: dict[str, torch.Tensor]) -> None:
    model = models[kind]
    seen: list[torch.Tensor] = []
    handles = [
        attention.retention_gate.register_forward_hook(lambda _m, _i, out: seen.append(out[0].t()))
        for attention in attention_layers(model)
    ]
    with torch.inference_mode():
        model(values["gate.input_ids"].long(), past_key_values=PagedTrimKVCache.for_model(model, memory_size=None))
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(torch.stack(seen), values[f"gate_{kind}.log_beta"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("block_size", [16, 1, 5, 256])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=[scenario["name"] for scenario in SCENARIOS])
def test_a_greedy_run_is_upstreams(
    scenario: dict[str, Any], block_size: int, models: dict[str, Any], values: dict[str, torch.Tensor]
) -> None:
    expected = {key.split(".", 1)[1]: value for key, value in values.items() if key.startswith(scenario["name"] + ".")}
    model = models[scenario["cache"]]
    cache = build_cache(scenario, block_size)
    prompt = expected["prompt"].long()[None]
    lengths, logits, generated = [], [], []
    with torch.inference_mode():
        for chunk in prompt.split(scenario["chunk"] or prompt.shape[1], dim=1):
            output = model(chunk, past_key_values=cache)
            lengths.append(cache.lengths())
        assert torch.equal(cache.lengths(), expected["prefill_lengths"])
        assert torch.equal(all_positions(cache), expected["prefill_positions"])
        for _ in range(scenario["steps"]):
            logits.append(output.logits[0, -1])
            generated.append(int(logits[-1].argmax()))
            output = model(torch.tensor([[generated[-1]]]), past_key_values=cache)
            lengths.append(cache.lengths())
            cache.check_invariants()
    assert generated == expected["generated"].tolist()
    # Logits reach 30 here, and float32 resolves 2e-6 of that: stock transformers is 1.6e-5 off these numbers too.
    largest = float(expected["logits"].abs().max())
    torch.testing.assert_close(logits[0], expected["logits"][0], atol=max(1e-5, 1e-6 * largest), rtol=0)
    torch.testing.assert_close(torch.stack(logits), expected["logits"], atol=1e-4, rtol=0)
    assert torch.equal(torch.stack(lengths), expected["lengths"])
    assert torch.equal(cache.lengths(), expected["final_lengths"])
    assert torch.equal(all_positions(cache), expected["final_positions"])


def test_the_fixtures_are_there() -> None:
    assert len(SCENARIOS) >= 12
    assert Path(UPSTREAM / "base" / "model.safetensors").is_file()
