"""The real server with the real small model, over real HTTP, through the official client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.service.live import Live, serving, wait_for

STREAMS = 90
QUESTION = [{"role": "user", "content": "Name three colours and say in one sentence what each reminds you of."}]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving("--kv-memory", "1GiB", "--dtype", "float32") as server:
        yield server


def ask(live: Live, *, messages: Any = None, **fields: Any) -> Any:
    extra = {name: fields.pop(name) for name in list(fields) if name.startswith("kv_") or name in OURS}
    arguments: dict[str, Any] = {"temperature": 0, "max_tokens": 40} | fields
    return live.client.chat.completions.create(
        model="embedded", messages=messages or QUESTION, extra_body=extra, **arguments
    )


OURS = ("ignore_eos", "min_tokens", "top_k", "min_p", "repetition_penalty", "include_stop_str_in_output")


def kv_of(usage: Any) -> dict[str, int]:
    result: dict[str, int] = usage.model_extra["kv"]
    return result


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "embedded", "messages": QUESTION, "temperature": 0} | fields


def is_idle(live: Live) -> bool:
    pool = live.kv()
    return not pool["requests"] and pool["pool"]["pages_used"] == 0


def test_a_person_chats_over_sse(live: Live) -> None:
    question = [{"role": "user", "content": "What is the capital of France? Tell me about it."}]
    stream = ask(
        live, messages=question, stream=True, stream_options={"include_usage": True}, kv_budget=64, max_tokens=60
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len(text.split()) > 5
    assert "Paris" in text
    usage = chunks[-1].usage
    assert not chunks[-1].choices
    kv = kv_of(usage)
    assert kv["budget_entries"] == 64 * STREAMS
    fed = usage.prompt_tokens + usage.completion_tokens - 1
    assert kv["retained_entries"] + kv["evicted_entries"] == fed * STREAMS
    assert len(chunks) >= usage.completion_tokens // 2


def test_streamed_and_whole_answers_are_the_same(live: Live) -> None:
    whole = ask(live, kv_budget=32)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in ask(live, kv_budget=32, stream=True))
    assert whole.choices[0].message.content == streamed


async def test_two_budgets_at_once_are_each_kept(live: Live) -> None:
    prompt = [{"role": "user", "content": "Tell me about rivers. " * 60}]

    async def one(budget: int) -> Any:
        return await live.async_client.chat.completions.create(
            model="embedded",
            messages=prompt,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=40,
            extra_body={"kv_budget": budget, "kv_buffer": 8, "kv_prefill_chunk": 64, "ignore_eos": True},
        )

    small, large = await asyncio.gather(one(16), one(128))
    for answer, budget in ((small, 16), (large, 128)):
        kv = kv_of(answer.usage)
        assert kv["budget_entries"] == budget * STREAMS
        assert kv["retained_entries"] < (budget + 8) * STREAMS
        assert kv["peak_entries"] <= (budget + 8 + 64) * STREAMS
        assert kv["evictions"] > 0
    alone = await one(16)
    assert alone.choices[0].message.content == small.choices[0].message.content
    assert kv_of(alone.usage) == kv_of(small.usage)


async def test_32_concurrent_requests_are_answered_as_if_alone(live: Live) -> None:
    questions = [f"What is {number} plus {number}? Answer with a number." for number in range(32)]

    async def one(number: int) -> str:
        answer = await live.async_client.chat.completions.create(
            model="embedded",
            messages=[{"role": "user", "content": questions[number]}],
            temperature=0,
            max_tokens=12,
            extra_body={"kv_budget": 8 + number, "kv_buffer": 4},
        )
        return answer.choices[0].message.content or ""

    together = await asyncio.gather(*(one(number) for number in range(32)))
    assert all(together)
    for number in (0, 17, 31):
        assert await one(number) == together[number]
    wait_for(lambda: is_idle(live), "an empty pool")


@pytest.mark.parametrize("is_streaming", [True, False])
async def test_a_client_that_goes_away_frees_its_pages_and_nobody_elses(live: Live, is_streaming: bool) -> None:
    staying = asyncio.create_task(
        live.async_client.chat.completions.create(
            model="embedded",
            messages=QUESTION,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=60,
            extra_body={"ignore_eos": True, "kv_budget": 32},
        )
    )
    async with httpx.AsyncClient(timeout=300) as client:
        leaving = asyncio.create_task(
            client.post(
                f"{live.url}/v1/chat/completions",
                json=body(max_tokens=4000, ignore_eos=True, stream=is_streaming, kv_budget=16),
            )
        )
        await asyncio.to_thread(wait_for, lambda: len(live.kv()["requests"]) == 2, "two running requests")
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
    await asyncio.to_thread(wait_for, lambda: len(live.kv()["requests"]) < 2, "the abort")
    answer = await staying
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 60
    await asyncio.to_thread(wait_for, lambda: is_idle(live), "an empty pool")


def test_a_stop_string_ends_the_answer_and_none_of_it_goes_out(live: Live) -> None:
    free = ask(live).choices[0].message.content
    stop = free[20:26]
    cut = free[: free.index(stop)]
    whole = ask(live, stop=[stop])
    assert whole.choices[0].message.content == cut
    assert whole.choices[0].finish_reason == "stop"
    streamed = [chunk.choices[0] for chunk in ask(live, stop=stop, stream=True)]
    assert "".join(choice.delta.content or "" for choice in streamed) == cut
    assert streamed[-1].finish_reason == "stop"
    kept = ask(live, stop=[stop], include_stop_str_in_output=True)
    assert kept.choices[0].message.content == cut + stop


def test_characters_split_over_tokens_arrive_whole(live: Live) -> None:
    messages = [{"role": "user", "content": "Repeat exactly this line and nothing else: 日本語 🌈🦊 žluťoučký κόσμε"}]
    chunks = list(ask(live, messages=messages, stream=True, max_tokens=60, kv_budget=0))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    text = "".join(pieces)
    assert any(ord(character) > 0x2000 for character in text), text
    assert "�" not in text
    assert text == ask(live, messages=messages, max_tokens=60, kv_budget=0).choices[0].message.content


def test_a_seed_repeats_and_sampling_varies(live: Live) -> None:
    def sampled(seed: int) -> str:
        answer = ask(live, temperature=1.2, seed=seed, top_p=0.95, max_tokens=24)
        return str(answer.choices[0].message.content)

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_a_6000_token_prompt_stays_under_its_ceiling(live: Live) -> None:
    sentence = "The ferry crosses the wide river at noon and comes back before the evening bell rings twice. "
    messages = [{"role": "user", "content": sentence * 350 + "What crosses the river?"}]
    answer = ask(live, messages=messages, kv_budget=64, max_tokens=24)
    kv = kv_of(answer.usage)
    assert answer.usage.prompt_tokens >= 6000
    assert kv["peak_entries"] <= (64 + 32 + 512) * STREAMS
    assert kv["retained_entries"] < (64 + 32) * STREAMS
    assert kv["dense_bytes"] > 50 * kv["bytes"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"kv_budget": -1}, "kv_budget"),
        ({"kv_budget": 9000}, "kv_budget"),
        ({"kv_budget": 8, "kv_sink_tokens": 9}, "kv_budget"),
        ({"kv_buffer": 0}, "kv_buffer"),
        ({"kv_alpha_threshold": 0.5}, "kv_alpha_threshold"),
        ({"kv_strategy": "threshold"}, "kv_alpha_threshold"),
        ({"kv_strategy": "lru"}, "kv_strategy"),
        ({"kv_buget": 64}, "kv_buget"),
        ({"kv_lookahead": 1025}, "kv_lookahead"),
    ],
)
def test_a_bad_knob_is_a_400_that_names_it(live: Live, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(live, **fields)
    assert caught.value.param == param
    assert param in caught.value.message


def test_a_request_that_can_never_fit_is_refused_with_the_numbers(live: Live) -> None:
    messages = [{"role": "user", "content": "word " * 7000}]
    with serving("--kv-memory", "80MB", "--prefill-chunk", "64") as small:
        with pytest.raises(openai.BadRequestError, match=r"need \d+ pages; the pool has \d+"):
            ask(small, messages=messages, kv_budget=0)
        assert ask(small, kv_budget=16, max_tokens=3).usage.completion_tokens == 3


def test_a_full_queue_is_a_503_and_nothing_admitted_suffers() -> None:
    with serving("--max-num-seqs", "1", "--max-queue-requests", "2", "--kv-memory", "200MB") as small:
        url = f"{small.url}/v1/chat/completions"

        async def flood() -> list[httpx.Response]:
            async with httpx.AsyncClient(timeout=300) as client:
                return list(
                    await asyncio.gather(
                        *(client.post(url, json=body(max_tokens=25, ignore_eos=True)) for _ in range(12))
                    )
                )

        answers = asyncio.run(flood())
        refused = [answer for answer in answers if answer.status_code == 503]
        served = [answer for answer in answers if answer.status_code == 200]
        assert refused
        assert len(served) + len(refused) == 12
        for answer in refused:
            assert int(answer.headers["Retry-After"]) >= 1
            assert answer.json()["error"]["message"].startswith("the queue is full")
        assert all(answer.json()["usage"]["completion_tokens"] == 25 for answer in served)
        assert 'trimkv_admission_rejections_total{reason="queue_requests"}' in small.metrics()
        assert small.stop() == 0


def test_metrics_tell_of_what_happened(live: Live) -> None:
    ask(live, kv_budget=16, max_tokens=40, ignore_eos=True)
    values = {
        line.split(" ")[0]: float(line.split(" ")[1])
        for line in live.metrics().splitlines()
        if line and not line.startswith("#")
    }
    assert values["trimkv_generation_tokens_total"] >= 40
    assert values["trimkv_prompt_tokens_total"] > 0
    assert values['trimkv_kv_evictions_total{strategy="fixed_budget"}'] > 0
    assert values["trimkv_kv_evicted_entries_total"] > 0
    assert values["trimkv_time_to_first_token_seconds_count"] > 0
    assert values["trimkv_inter_token_latency_seconds_count"] > 0
    assert values['trimkv_kv_pages{state="used"}'] + values['trimkv_kv_pages{state="free"}'] > 0
    assert values["trimkv_request_kv_retained_ratio_count"] > 0


def test_start_up_says_what_an_operator_wants_to_know(live: Live) -> None:
    said = "".join(live.lines)
    for words in ("lean numba step", "backend numba", "float32", "pages", "GiB", "at M = 64"):
        assert words in said


def test_a_stream_is_not_compressed_or_buffered(live: Live) -> None:
    with httpx.stream(
        "POST",
        f"{live.url}/v1/chat/completions",
        json=body(stream=True, max_tokens=4),
        headers={"Accept-Encoding": "gzip", "X-Request-Id": "mine-1"},
        timeout=120,
    ) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-cache, no-transform"
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.headers["x-request-id"] == "mine-1"
        assert "content-encoding" not in answer.headers
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert json.loads(events[0])["object"] == "chat.completion.chunk"
