"""What a user of `transformers` sees: `generate`, plain forwards, padded batches, and the model card's quick start."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.core import flash_stand_in
from tests.core.tiny import FAMILIES, load, save_base, save_random_gates
from trimkv_core import PagedTrimKVCache, TrimKVCache, TrimKVForCausalLM, TrimKVQwen3ForCausalLM
from trimkv_core.budget import BudgetError

PROMPT = torch.arange(3, 40)[None] % 61 + 3


def generate(model: Any, prompt: torch.Tensor = PROMPT, **kwargs: Any) -> list[list[int]]:
    arguments = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0} | kwargs
    result: list[list[int]] = model.generate(prompt, **arguments)[:, prompt.shape[1] :].tolist()
    return result


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return load(tmp_path_factory.mktemp("qwen3"), "qwen3")


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_budget_that_holds_everything_changes_nothing(family: str, tmp_path: Path) -> None:
    plain, model = load(tmp_path, family)
    for memory_size in (None, 200):
        cache = PagedTrimKVCache.for_model(model, memory_size=memory_size)
        assert generate(model, past_key_values=cache) == generate(plain)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_forgets_and_stays_under_its_ceiling(family: str, tmp_path: Path) -> None:
    _, model = load(tmp_path, family)
    answers = []
    for block_size in (1, 16, 256):
        cache = PagedTrimKVCache.for_model(model, memory_size=8, buffer_size=3, block_size=block_size)
        answers.append(generate(model, past_key_values=cache))
        assert int(cache.lengths().sum()) < 6 * (8 + 3)
        assert cache.seen_tokens() == PROMPT.shape[1] + 23
        cache.check_invariants()
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("chunk", [1, 5, 37])
@pytest.mark.parametrize("family", ["qwen3", "mistral-window"])
def test_what_is_kept_does_not_depend_on_the_page_size_in_chunked_prefill(
    family: str, chunk: int, tmp_path: Path
) -> None:
    _, model = load(tmp_path, family)
    seen = []
    for block_size in (2, 16):
        cache = PagedTrimKVCache.for_model(model, memory_size=6, buffer_size=2, block_size=block_size)
        with torch.inference_mode():
            for part in PROMPT.split(chunk, dim=1):
                logits = model(part, past_key_values=cache).logits
        seen.append((logits[0, -1], [cache.positions(layer, head) for layer in range(3) for head in range(2)]))
    torch.testing.assert_close(seen[0][0], seen[1][0])
    assert all(torch.equal(a, b) for a, b in zip(seen[0][1], seen[1][1], strict=True))


@pytest.mark.parametrize("strategy", ["fixed_budget", "threshold"])
@pytest.mark.parametrize("scope", ["global", "local"])
def test_a_padded_row_keeps_what_it_keeps_alone(strategy: str, scope: str, qwen3: tuple[Any, Any]) -> None:
    _, model = qwen3

    def cache() -> PagedTrimKVCache:
        extra: dict[str, Any] = {"alpha_threshold": 0.05, "strategy": strategy} if strategy == "threshold" else {}
        return PagedTrimKVCache.for_model(
            model, memory_size=8, buffer_size=3, scope=scope, num_sink_tokens=2, sliding_window_size=2, **extra
        )

    prompts = [PROMPT[:, :37], PROMPT[:, 5:17], PROMPT[:, :1]]
    width = max(prompt.shape[1] for prompt in prompts)
    ids = torch.cat([torch.nn.functional.pad(prompt, (width - prompt.shape[1], 0)) for prompt in prompts])
    mask = torch.cat(
        [torch.nn.functional.pad(torch.ones_like(prompt), (width - prompt.shape[1], 0)) for prompt in prompts]
    )
    together = cache()
    answers = generate(model, ids, attention_mask=mask, past_key_values=together)
    for index, prompt in enumerate(prompts):
        alone = cache()
        assert generate(model, prompt, past_key_values=alone) == [answers[index]]
        assert torch.equal(alone.lengths(), together.lengths(index))
        for layer in range(3):
            for head in range(2):
                assert torch.equal(alone.positions(layer, head), together.positions(layer, head, index))


def test_a_padded_batch_may_be_prefilled_in_chunks(qwen3: tuple[Any, Any]) -> None:
    _, model = qwen3
    ids = torch.cat([PROMPT[:, :30], torch.nn.functional.pad(PROMPT[:, :8], (22, 0))])
    mask = torch.cat([torch.ones(1, 30), torch.nn.functional.pad(torch.ones(1, 8), (22, 0))]).long()
    together = PagedTrimKVCache.for_model(model, memory_size=6, buffer_size=2)
    with torch.inference_mode():
        for start in range(0, 30, 10):
            stop = start + 10
            positions = (mask[:, :stop].cumsum(1) - 1).clamp(min=0)[:, start:stop]
            logits = model(
                ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions, past_key_values=together
            ).logits
        alone = PagedTrimKVCache.for_model(model, memory_size=6, buffer_size=2)
        expected = model(PROMPT[:, :8], past_key_values=alone).logits
    torch.testing.assert_close(logits[1, -1], expected[0, -1])
    assert together.seen_tokens(1) == 8


def test_a_chunk_of_nothing_but_padding_is_no_step(qwen3: tuple[Any, Any]) -> None:
    _, model = qwen3
    ids = torch.nn.functional.pad(PROMPT[:, :9], (16, 0))
    mask = torch.nn.functional.pad(torch.ones(1, 9), (16, 0)).long()
    padded = PagedTrimKVCache.for_model(model, memory_size=6, buffer_size=2)
    alone = PagedTrimKVCache.for_model(model, memory_size=6, buffer_size=2)
    with torch.inference_mode():
        for start, stop in ((0, 8), (8, 16), (16, 25)):
            positions = (mask[:, :stop].cumsum(1) - 1).clamp(min=0)[:, start:stop]
            logits = model(
                ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions, past_key_values=padded
            ).logits
        expected = model(PROMPT[:, :9], past_key_values=alone).logits
    torch.testing.assert_close(logits[0, -1], expected[0, -1])
    assert torch.equal(padded.lengths(), alone.lengths())


def test_a_threshold_without_a_ceiling_keeps_the_checkpoints_sinks(tmp_path: Path) -> None:
    save_base(tmp_path / "base", "qwen3")
    save_random_gates(tmp_path / "gates", tmp_path / "base", num_sink_tokens=3)
    model = TrimKVForCausalLM.from_pretrained(str(tmp_path / "gates"), dtype=torch.float32)
    cache = PagedTrimKVCache.for_model(model, memory_size=None, strategy="threshold", alpha_threshold=0.9)
    generate(model, past_key_values=cache)
    for layer in range(3):
        for head in range(2):
            assert cache.positions(layer, head)[:3].tolist() == [0, 1, 2]


def test_flash_attention_may_be_asked_for_at_load(tmp_path: Path) -> None:
    load(tmp_path, "qwen3")
    model = TrimKVForCausalLM.from_pretrained(str(tmp_path / "gates"), attn_implementation="flash_attention_2")
    assert generate(model, past_key_values=PagedTrimKVCache.for_model(model, memory_size=8))


def test_a_prefill_in_inference_mode_may_be_followed_by_generate(qwen3: tuple[Any, Any]) -> None:
    plain, model = qwen3
    cache = PagedTrimKVCache.for_model(model, memory_size=None)
    with torch.inference_mode():
        model(PROMPT[:, :20], past_key_values=cache)
    assert generate(model, past_key_values=cache) == generate(plain)


def test_a_forward_with_gradients_leaves_no_graph_in_the_pool(qwen3: tuple[Any, Any]) -> None:
    _, model = qwen3
    cache = PagedTrimKVCache.for_model(model, memory_size=6, buffer_size=2)
    for token in PROMPT[0, :12]:
        model(token[None, None], past_key_values=cache)
    pool = cache._open_table().pool
    assert not any(storage.requires_grad for storage in (pool.key, pool.value, pool.log_beta))


def test_beam_search_moves_whole_sequences(qwen3: tuple[Any, Any]) -> None:
    plain, model = qwen3
    cache = PagedTrimKVCache.for_model(model, memory_size=None)
    assert generate(model, num_beams=3, past_key_values=cache) == generate(plain, num_beams=3)
    cache.check_invariants()


def test_sampling_and_several_answers_work(qwen3: tuple[Any, Any]) -> None:
    _, model = qwen3
    cache = PagedTrimKVCache.for_model(model, memory_size=8, buffer_size=2)
    torch.manual_seed(0)
    answers = generate(model, do_sample=True, num_return_sequences=3, past_key_values=cache)
    assert len(answers) == 3
    assert cache.batch_size == 3


def test_a_second_turn_goes_on_where_the_first_ended(qwen3: tuple[Any, Any]) -> None:
    plain, model = qwen3
    cache = PagedTrimKVCache.for_model(model, memory_size=None)
    first = model.generate(PROMPT, max_new_tokens=5, do_sample=False, pad_token_id=0, past_key_values=cache)
    longer = torch.cat([first, PROMPT[:, :6]], 1)
    assert generate(model, longer, past_key_values=cache) == generate(plain, longer)


def test_without_a_cache_the_model_is_the_plain_one(qwen3: tuple[Any, Any]) -> None:
    plain, model = qwen3
    with torch.inference_mode():
        torch.testing.assert_close(model(PROMPT, use_cache=False).logits, plain(PROMPT).logits)
    assert generate(model) == generate(plain)
    mask = torch.ones_like(PROMPT)
    mask[:, :4] = 0
    assert generate(model, attention_mask=mask) == generate(plain, attention_mask=mask)


def test_the_model_cards_quick_start_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimkv_core.models._warned_about", set())
    load(tmp_path, "qwen3")
    model = TrimKVQwen3ForCausalLM.from_pretrained(
        str(tmp_path / "gates"),
        torch_dtype=torch.bfloat16,
        load_trimkv_weights=True,
        download_from="local",
        use_cache=True,
        device_map="cpu",
    )
    assert model.dtype == torch.bfloat16
    assert Path(model.config.base_model) == (tmp_path / "base").resolve()
    model.config._attn_implementation = "flash_attention_2"
    past_key_values = PagedTrimKVCache(
        num_layers=model.config.num_hidden_layers,
        num_heads=model.config.num_key_value_heads,
        max_seq_len=32768,
        memory_size=8,
        num_blocks_ratio=1.0,
        buffer_size=4,
        strategy="fixed_budget",
        device="cpu",
    )
    with caplog.at_level(logging.WARNING):
        answers = generate(model, past_key_values=past_key_values)
        model.config._attn_implementation = "flash_attention_2"
        generate(model, past_key_values=TrimKVCache(memory_size=8, buffer_size=4, device="cpu"))
    assert len(answers[0]) == 24
    assert int(past_key_values.lengths().sum()) < 6 * 12
    assert sum("flash_attention_2" in record.message for record in caplog.records) == 1


def test_a_model_without_gates_refuses_a_budget(tmp_path: Path) -> None:
    save_base(tmp_path / "base", "llama")
    model = TrimKVForCausalLM.from_base(str(tmp_path / "base"))
    with pytest.raises(BudgetError, match="without gates"):
        PagedTrimKVCache.for_model(model, memory_size=8)
    with pytest.raises(BudgetError, match="without gates"):
        generate(model, past_key_values=PagedTrimKVCache(3, 2, memory_size=8))
    assert generate(model, past_key_values=PagedTrimKVCache.for_model(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_layers": 4, "num_heads": 2}, "num_layers=4 does not fit the model, which has 3"),
        ({"num_layers": 3, "num_heads": 4}, "num_heads=4 does not fit the model, which has 2"),
        ({"num_layers": 3, "num_heads": 2, "device": "meta"}, "device='meta' does not fit"),
        ({"num_layers": 3, "num_heads": 2, "dtype": torch.float16}, "dtype=torch.float16 does not fit"),
    ],
)
def test_a_cache_for_another_model_is_refused(arguments: dict[str, Any], message: str, qwen3: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        generate(qwen3[1], past_key_values=PagedTrimKVCache(**arguments))


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"strategy": "lru"}, "strategy"),
        ({"block_size": 257}, "block_size"),
        ({"memory_size": 4, "num_sink_tokens": 5}, "memory_size"),
    ],
)
def test_a_bad_argument_is_named(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(BudgetError) as caught:
        PagedTrimKVCache(3, 2, **arguments)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("block_size", "dtype", "name"),
    [(256, torch.bfloat16, "flash"), (16, torch.bfloat16, "triton"), (256, torch.float32, "triton")],
)
def test_a_cache_on_a_gpu_takes_kernels_and_flash_attn_for_its_large_pages(
    monkeypatch: pytest.MonkeyPatch, block_size: int, dtype: torch.dtype, name: str
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setitem(sys.modules, "flash_attn", flash_stand_in)
    cache = PagedTrimKVCache(num_layers=2, num_heads=2, max_seq_len=64, memory_size=4, block_size=block_size)
    gpu_pool: Any = SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
    assert cache._choose_backend(gpu_pool).name == name
    cpu_pool: Any = SimpleNamespace(device=torch.device("cpu"), dtype=dtype)
    assert cache._choose_backend(cpu_pool).name == "torch"
