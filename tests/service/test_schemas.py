from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

import pytest

from service.api import schemas
from service.api.errors import ApiError
from service.api.knobs import Caps, resolve_budget
from service.api.sampling import AskedTokens, OutputLimits, resolve_max_tokens, resolve_sampling
from service.api.schemas import ChatCompletionRequest, KvFields, parse_chat_request
from tests.service.scripted import DENSE_INFO, INFO
from trimkv_core.budget import Budget, Scope, Strategy

MESSAGES = [{"role": "user", "content": "hi"}]


def parse(**fields: Any) -> ChatCompletionRequest:
    return parse_chat_request(json.dumps({"model": "m", "messages": MESSAGES, **fields}).encode())


def refused(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(**fields)
    assert caught.value.status == 400
    assert caught.value.body.type == "invalid_request_error"
    return caught.value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", True),
        ("temperature", "0.5"),
        ("temperature", 10**400),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("top_k", 1.5),
        ("top_k", 10**30),
        ("min_p", 2),
        ("seed", 2**63),
        ("seed", 1.0),
        ("seed", False),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("stop", ""),
        ("stop", ["a"] * 17),
        ("stop", [1]),
        ("stop", {"a": 1}),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", 5),
        ("include_stop_str_in_output", 1),
        ("min_tokens", -1),
        ("ignore_eos", "yes"),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("max_completion_tokens", 10**25),
        ("priority", 2**31),
        ("user", 5),
        ("stream", "true"),
        ("stream_options", []),
        ("kv_budget", 1.5),
        ("kv_budget", True),
        ("kv_buffer", "32"),
        ("kv_strategy", "lru"),
        ("kv_alpha_threshold", "half"),
        ("messages", []),
        ("messages", "hi"),
        ("model", 7),
    ],
)
def test_a_bad_value_is_named_with_its_field_and_what_is_allowed(field: str, value: object) -> None:
    error = refused(**{field: value})
    assert error.body.param is not None
    assert error.body.param.split("[")[0] == field
    assert field in error.body.message
    assert "must be" in error.body.message


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(text: str) -> None:
    body = b'{"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": %s}' % text.encode()
    with pytest.raises(ApiError) as caught:
        parse_chat_request(body)
    assert caught.value.body.param == "temperature"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"5", b"\xff", b'{"model": "\\ud800"}', b"[" * 5000])
def test_a_body_that_is_no_json_object_is_a_400(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat_request(body)
    assert caught.value.status == 400


def test_digits_without_end_are_a_400() -> None:
    body = b'{"model": "m", "messages": [], "seed": ' + b"9" * 10_000 + b"}"
    with pytest.raises(ApiError) as caught:
        parse_chat_request(body)
    assert caught.value.status == 400
    assert len(caught.value.body.message) < 2000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logit_bias", {"1": 5}),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("n", 2),
        ("n", True),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("continue_final_message", True),
        ("add_generation_prompt", False),
    ],
)
def test_what_is_not_served_yet_is_said_never_ignored(field: str, value: object) -> None:
    error = refused(**{field: value})
    assert error.body.param == field
    assert "not supported by this server yet" in error.body.message


def test_values_that_ask_for_nothing_pass() -> None:
    parse(
        logit_bias={}, logprobs=False, top_logprobs=0, n=1, tools=[], tool_choice="auto",
        response_format={"type": "text"}, chat_template_kwargs={}, continue_final_message=False,
        add_generation_prompt=True, parallel_tool_calls=True,
    )  # fmt: skip


def test_null_means_absent_for_every_optional_field() -> None:
    optional = set(ChatCompletionRequest.model_fields) - {"model", "messages"}
    assert parse(**dict.fromkeys(optional)) == parse()


@pytest.mark.parametrize("missing", ["model", "messages"])
def test_a_missing_field_is_named(missing: str) -> None:
    body = {"model": "m", "messages": MESSAGES}
    del body[missing]
    with pytest.raises(ApiError) as caught:
        parse_chat_request(json.dumps(body).encode())
    assert caught.value.body.param == missing
    assert caught.value.body.code == "missing_required_parameter"


def test_an_unknown_knob_is_refused_with_the_known_ones() -> None:
    error = refused(kv_bugdet=5)
    assert error.body.param == "kv_bugdet"
    assert all(name in error.body.message for name in KvFields.model_fields)


def test_other_unknown_fields_are_accepted_and_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schemas, "_logged_unknown_fields", set())
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            parse(gateway_tag="x")
    assert [record for record in caplog.records if "gateway_tag" in record.message] == [caplog.records[0]]


def test_text_parts_are_joined_and_other_parts_named() -> None:
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse(messages=[{"role": "user", "content": content}]).messages[0].content == "a\nb"
    content[1] = {"type": "image_url", "image_url": {"url": "http://x/y.png"}}
    error = refused(messages=[*MESSAGES, {"role": "user", "content": content}])
    assert error.body.param == "messages[1].content[1]"
    assert "image_url" in error.body.message


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "robot", "content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}, "messages[0].content[0]"),
        ({"role": "assistant", "content": [{"type": "refusal", "text": "no"}]}, "messages[0].content[0]"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ("hi", "messages[0]"),
    ],
)
def test_a_bad_message_is_located(message: object, param: str) -> None:
    assert refused(messages=[message]).body.param == param


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"messages": ["hi"]},
            "messages[0]='hi' is not possible: must be an object with role and content.",
        ),
        (
            {"messages": [{"role": "user"}]},
            "messages[0].content has no content: must be a string or a list of text parts.",
        ),
        ({"messages": []}, "messages=[] is not possible: must be a list of at least one message."),
        (
            {"stop_token_ids": [-1]},
            "stop_token_ids[0]=-1 is not possible: must be a token id, an integer of 0 or more.",
        ),
    ],
)
def test_a_bad_item_is_told_what_an_item_is_and_the_list_is_not_blamed(fields: dict[str, Any], message: str) -> None:
    assert refused(**fields).body.message == message


@pytest.mark.parametrize(
    "fields",
    [{"refusal": "no"}, {"reasoning": "hm"}, {"reasoning_content": "hm"}, {"tool_calls": []}, {"content": None}],
)
def test_an_assistant_that_said_nothing_is_part_of_a_history(fields: dict[str, Any]) -> None:
    assert parse(messages=[{"role": "assistant"} | fields, *MESSAGES]).messages[0].content is None


def test_a_refusal_part_of_an_assistant_is_text() -> None:
    content = [{"type": "text", "text": "well"}, {"type": "refusal", "refusal": "no"}]
    assert parse(messages=[{"role": "assistant", "content": content}]).messages[0].content == "well\nno"


def test_a_tool_call_of_null_type_is_a_functions() -> None:
    call = {"id": "1", "type": None, "function": {"name": "f", "arguments": "{}"}}
    (message,) = parse(messages=[{"role": "assistant", "tool_calls": [call]}]).messages
    assert message.tool_calls is not None
    assert message.tool_calls[0].type == "function"
    call["type"] = "custom"
    assert (
        refused(messages=[{"role": "assistant", "tool_calls": [call]}]).body.param == "messages[0].tool_calls[0].type"
    )


@pytest.mark.parametrize("ignored", [0, "many", True, 10**25])
def test_max_tokens_is_not_looked_at_beside_max_completion_tokens(ignored: object) -> None:
    fields = parse(max_tokens=ignored, max_completion_tokens=5)
    assert (fields.max_tokens, fields.max_completion_tokens) == (None, 5)
    assert refused(max_tokens=ignored, max_completion_tokens=None).body.param == "max_tokens"


@pytest.mark.parametrize(
    ("field", "allowed"),
    [
        ("kv_budget", "an integer from 0 (dense) to max_model_len"),
        ("kv_buffer", "an integer from 1 to 4096"),
        ("kv_lookahead", "an integer from 1 to 1024"),
        ("kv_sink_tokens", "an integer from 0 to max_model_len"),
    ],
)
def test_a_knob_of_the_wrong_type_is_told_its_range(field: str, allowed: str) -> None:
    assert refused(**{field: "many"}).body.message == f"{field}='many' is not possible: must be {allowed}."


def test_history_fields_of_gateways_are_tolerated() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    parse(
        messages=[
            {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "reasoning_content": "…"},
            {"role": "tool", "content": "5", "tool_call_id": "1", "name": "f"},
            {"role": "user", "content": "x", "name": "Ada", "reasoning": "?"},
        ]
    )


def test_stream_options_need_a_stream() -> None:
    assert refused(stream_options={"include_usage": True}).body.param == "stream_options"
    parse(stream=True, stream_options={"include_usage": True, "include_obfuscation": False})


# ---- knobs ---------------------------------------------------------------------------------------------------------


def budget(info: Any = INFO, caps: Caps | None = None, **knobs: Any) -> Budget:
    return resolve_budget(KvFields(**knobs), info, caps or Caps())


def knob_error(info: Any = INFO, caps: Caps | None = None, **knobs: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        budget(info, caps, **knobs)
    assert caught.value.status == 400
    return caught.value


def test_without_knobs_the_servers_budget_holds() -> None:
    assert budget() == INFO.budget


def test_every_knob_reaches_the_budget() -> None:
    local = replace(INFO, budget=replace(INFO.budget, scope=Scope.LOCAL))
    assert budget(
        local, kv_budget=100, kv_buffer=8, kv_strategy="threshold", kv_alpha_threshold=0.25, kv_min_tokens_per_head=3,
        kv_sliding_window=5, kv_sink_tokens=1, kv_lookahead=16, kv_prefill_chunk=0,
    ) == Budget(
        memory_size=100, buffer_size=8, strategy=Strategy.THRESHOLD, scope=Scope.LOCAL, alpha_threshold=0.25,
        min_tokens_per_head=3, sliding_window_size=5, num_sink_tokens=1, lookahead_steps=16, prefill_chunk=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    "knobs", [{"kv_budget": 0}, {"kv_strategy": "dense"}, {"kv_budget": 0, "kv_strategy": "fixed_budget"}]
)
def test_three_ways_to_ask_for_dense(knobs: dict[str, Any]) -> None:
    assert budget(**knobs).strategy is Strategy.DENSE
    assert "does not allow" in knob_error(caps=Caps(allow_dense=False), **knobs).body.message


def test_threshold_without_a_budget_has_no_ceiling_and_counts_as_dense_for_the_operator() -> None:
    knobs = {"kv_budget": 0, "kv_strategy": "threshold", "kv_alpha_threshold": 0.5}
    asked = budget(**knobs)
    assert asked.strategy is Strategy.THRESHOLD
    assert asked.memory_size is None
    knob_error(caps=Caps(allow_dense=False), **knobs)


@pytest.mark.parametrize(
    ("knobs", "param"),
    [
        ({"kv_budget": -1}, "kv_budget"),
        ({"kv_budget": 1001}, "kv_budget"),
        ({"kv_budget": 10**5000}, "kv_budget"),
        ({"kv_buffer": 0}, "kv_buffer"),
        ({"kv_buffer": 4097}, "kv_buffer"),
        ({"kv_lookahead": 0}, "kv_lookahead"),
        ({"kv_lookahead": 1025}, "kv_lookahead"),
        ({"kv_prefill_chunk": -1}, "kv_prefill_chunk"),
        ({"kv_sink_tokens": -1}, "kv_sink_tokens"),
        ({"kv_sliding_window": 5000}, "kv_sliding_window"),
        ({"kv_min_tokens_per_head": -3}, "kv_min_tokens_per_head"),
        ({"kv_strategy": "dense", "kv_budget": 5}, "kv_budget"),
        ({"kv_strategy": "threshold"}, "kv_alpha_threshold"),
        ({"kv_strategy": "threshold", "kv_alpha_threshold": 1.0}, "kv_alpha_threshold"),
        ({"kv_strategy": "threshold", "kv_alpha_threshold": 0.0}, "kv_alpha_threshold"),
        ({"kv_strategy": "fixed_budget", "kv_alpha_threshold": 0.5}, "kv_alpha_threshold"),
        ({"kv_alpha_threshold": 0.5}, "kv_alpha_threshold"),
        ({"kv_strategy": "dense", "kv_alpha_threshold": 0.5}, "kv_alpha_threshold"),
    ],
)
def test_knobs_out_of_range_or_at_odds_are_named(knobs: dict[str, Any], param: str) -> None:
    error = knob_error(**knobs)
    assert error.body.param == param
    assert param in error.body.message


def test_pins_beyond_the_budget_name_all_of_them() -> None:
    message = knob_error(kv_budget=10, kv_sliding_window=5, kv_min_tokens_per_head=2).body.message
    for part in ("kv_budget=10", "kv_sink_tokens=4", "kv_sliding_window=5", "kv_min_tokens_per_head=2"):
        assert part in message
    assert knob_error(kv_budget=3).body.param == "kv_budget"


def test_a_server_without_gates_takes_what_asks_for_dense() -> None:
    for knobs in ({}, {"kv_budget": 0}, {"kv_strategy": "dense"}, {"kv_budget": 0, "kv_strategy": "dense"}):
        assert budget(DENSE_INFO, caps=Caps(allow_dense=False), **knobs).strategy is Strategy.DENSE


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("kv_budget", 64),
        ("kv_budget", 10**9),
        ("kv_budget", -1),
        ("kv_buffer", 32),
        ("kv_buffer", 0),
        ("kv_strategy", "threshold"),
        ("kv_strategy", "fixed_budget"),
        ("kv_alpha_threshold", 0.5),
        ("kv_min_tokens_per_head", 0),
        ("kv_sliding_window", 1),
        ("kv_sink_tokens", 4),
        ("kv_lookahead", 1),
        ("kv_prefill_chunk", 512),
    ],
)
def test_a_server_without_gates_says_so_to_every_knob_whatever_its_range(knob: str, value: object) -> None:
    error = knob_error(DENSE_INFO, **{knob: value})
    assert (error.body.param, error.body.code) == (knob, "no_retention_gates")
    assert "no retention gates and serves dense only" in error.body.message


@pytest.mark.parametrize("dense", [{"kv_budget": 0}, {"kv_strategy": "dense"}])
@pytest.mark.parametrize(
    "knobs",
    [
        {"kv_min_tokens_per_head": 2},
        {"kv_sliding_window": 5},
        {"kv_sink_tokens": 1},
        {"kv_lookahead": 16},
        {"kv_buffer": 8},
    ],
)
def test_dense_contradicts_every_rule_of_eviction(dense: dict[str, Any], knobs: dict[str, Any]) -> None:
    assert knob_error(**dense, **knobs).body.param == next(iter(knobs))


def test_dense_goes_with_the_servers_own_rules_and_any_chunk() -> None:
    assert not budget(
        kv_budget=0, kv_buffer=32, kv_min_tokens_per_head=0, kv_sliding_window=0, kv_sink_tokens=4, kv_lookahead=1,
        kv_prefill_chunk=7,
    ).can_evict  # fmt: skip
    assert not budget(kv_budget=0, kv_sink_tokens=0).can_evict


def test_a_missing_threshold_is_missing() -> None:
    error = knob_error(kv_strategy="threshold").body
    assert error.message.startswith("kv_alpha_threshold is missing: ")
    assert error.code == "missing_required_parameter"


def test_the_operators_cap_holds() -> None:
    caps = Caps(max_kv_budget=32)
    assert knob_error(caps=caps, kv_budget=33).body.param == "kv_budget"
    assert budget(caps=caps, kv_budget=32).memory_size == 32


# ---- limits and sampling -------------------------------------------------------------------------------------------


def max_tokens(
    value: int | None, prompt: int, *, dense: bool = False, cap: int | None = None, min_tokens: int = 0
) -> int:
    return resolve_max_tokens(
        AskedTokens(field="max_tokens", value=value, min_tokens=min_tokens),
        prompt_tokens=prompt,
        budget=Budget.dense() if dense else INFO.budget,
        info=INFO,
        limits=OutputLimits(default_max_tokens=100, max_output_tokens=cap),
    )


def test_without_a_limit_the_context_is_filled_under_a_budget_only() -> None:
    assert max_tokens(None, 10) == 990
    assert max_tokens(None, 10, cap=50) == 50
    assert max_tokens(None, 10, dense=True) == 100
    assert max_tokens(None, 950, dense=True) == 50


def test_a_dense_answer_without_a_limit_has_room_for_its_min_tokens() -> None:
    assert max_tokens(None, 10, dense=True, min_tokens=300) == 300
    assert max_tokens(None, 10, dense=True, min_tokens=50) == 100
    assert max_tokens(None, 950, dense=True, min_tokens=300) == 50


def test_prompt_and_answer_must_fit_and_the_error_names_all_three() -> None:
    assert max_tokens(990, 10) == 990
    with pytest.raises(ApiError) as caught:
        max_tokens(991, 10)
    assert caught.value.body.code == "context_length_exceeded"
    assert all(part in caught.value.body.message for part in ("10 tokens", "max_tokens=991", "max_model_len=1000"))
    with pytest.raises(ApiError) as caught:
        max_tokens(None, 1000)
    assert caught.value.body.code == "context_length_exceeded"
    with pytest.raises(ApiError):
        max_tokens(51, 10, cap=50)


def test_sampling_defaults_come_from_the_model_then_from_openai() -> None:
    sampling = resolve_sampling(parse(), INFO, max_tokens=5, max_tokens_field="max_tokens")
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.repetition_penalty) == (0.5, 20, 1.0, 1.0)
    fields = parse(temperature=1e-9, top_k=-1, stop="END", stop_token_ids=[5], repetition_penalty=1.5)
    sampling = resolve_sampling(fields, INFO, max_tokens=5, max_tokens_field="max_tokens")
    assert (sampling.temperature, sampling.top_k, sampling.repetition_penalty) == (0.0, 0, 1.5)
    assert (sampling.stop, sampling.stop_token_ids) == (("END",), (5,))


@pytest.mark.parametrize(("field", "value"), [("min_tokens", 6), ("stop_token_ids", [300])])
def test_values_the_model_cannot_meet_are_refused(field: str, value: object) -> None:
    with pytest.raises(ApiError) as caught:
        resolve_sampling(parse(**{field: value}), INFO, max_tokens=5, max_tokens_field="max_tokens")
    assert caught.value.body.param == field
