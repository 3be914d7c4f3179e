"""An ended request in the words of OpenTelemetry's conventions for generative AI: names, units and buckets.

As https://github.com/open-telemetry/semantic-conventions-genai has them; what the cache did is under `trimkv.kv.`. Owns
what is said of a request and what never is: no prompt, no answer, no stop string, and in metrics no id. Knows no SDK.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from service.engine.interface import FinishedRequest, FinishReason

PROVIDER = "trimkv"

DURATION = "gen_ai.server.request.duration"
TIME_TO_FIRST_TOKEN = "gen_ai.server.time_to_first_token"
TIME_PER_OUTPUT_TOKEN = "gen_ai.server.time_per_output_token"
# Seconds.
BUCKETS: Mapping[str, tuple[float, ...]] = {
    DURATION: (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92),
    TIME_TO_FIRST_TOKEN: (
        0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    ),
    TIME_PER_OUTPUT_TOKEN: (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
}  # fmt: skip
DESCRIPTIONS: Mapping[str, str] = {
    DURATION: "From arrival to the last token.",
    TIME_TO_FIRST_TOKEN: "From arrival to the first token.",
    TIME_PER_OUTPUT_TOKEN: "Mean time of a token after the first.",
}

Attribute = str | int | float | tuple[str, ...]


class Phase(NamedTuple):
    """A part of a request's time, in nanoseconds of the wall clock."""

    name: str
    start: int
    end: int


def is_success(request: FinishedRequest) -> bool:
    """Whether an answer came to its end; others carry an `error.type`."""
    return request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)


def span_name(request: FinishedRequest) -> str:
    """`{operation} {model}`."""
    return f"{_operation(request)} {request.origin.model or ''}".rstrip()


def measurements(request: FinishedRequest) -> dict[str, float]:
    """Seconds by metric, of those that a request has: of one that failed or was left, only how long it took."""
    found = {DURATION: request.e2e_latency}
    if is_success(request):
        if request.time_to_first_token is not None:
            found[TIME_TO_FIRST_TOKEN] = request.time_to_first_token
        if request.decode_time is not None and request.completion_tokens > 1:
            found[TIME_PER_OUTPUT_TOKEN] = request.decode_time / (request.completion_tokens - 1)
    return found


def labels(request: FinishedRequest) -> dict[str, Attribute]:
    """What metrics and spans share: never a request id."""
    found: dict[str, Attribute] = {
        "gen_ai.operation.name": _operation(request),
        "gen_ai.provider.name": PROVIDER,
    }
    if request.origin.model is not None:
        found |= {"gen_ai.request.model": request.origin.model, "gen_ai.response.model": request.origin.model}
    if not is_success(request):
        found["error.type"] = request.abort_reason.value if request.abort_reason else "engine_error"
    return found


def span_attributes(request: FinishedRequest) -> dict[str, Attribute]:
    """All that a span says of a request."""
    found = labels(request) | {
        "gen_ai.response.id": request.request_id,
        "gen_ai.response.finish_reasons": (request.finish_reason.value,),
        "gen_ai.usage.input_tokens": request.prompt_tokens,
        "gen_ai.usage.output_tokens": request.completion_tokens,
    }
    http_request_id, sampling, kv = request.origin.http_request_id, request.sampling, request.kv
    optional: dict[str, Attribute | None] = {
        "gen_ai.request.stream": request.origin.is_streaming or None,
        "http.response.header.x-request-id": (http_request_id,) if http_request_id else None,
        "trimkv.kv.budget": request.budget_entries_per_stream,
    }
    if sampling is not None:
        optional |= {
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": float(sampling.top_k) if sampling.top_k else None,
            "gen_ai.request.presence_penalty": sampling.presence_penalty or None,
            "gen_ai.request.frequency_penalty": sampling.frequency_penalty or None,
            "gen_ai.request.seed": sampling.seed,
        }
    if kv is not None:
        optional |= {
            "trimkv.kv.retained_entries": kv.retained_entries,
            "trimkv.kv.evicted_entries": kv.evicted_entries,
            "trimkv.kv.evictions": kv.evictions,
            "trimkv.kv.peak_bytes": kv.peak_bytes,
            "trimkv.kv.dense_bytes": kv.dense_bytes,
        }
    return found | {name: value for name, value in optional.items() if value is not None}


def phases(request: FinishedRequest, *, start: int) -> list[Phase]:
    """Queue, prefill and decode, one after another from `start` on, as far as the request came."""
    found: list[Phase] = []
    for name, seconds in (
        ("queue", request.queue_time),
        ("prefill", request.prefill_time),
        ("decode", request.decode_time),
    ):
        if seconds is None:
            break
        end = start + nanoseconds(seconds)
        found.append(Phase(name, start, end))
        start = end
    return found


def nanoseconds(seconds: float) -> int:
    """As OpenTelemetry counts time."""
    return int(seconds * 1e9)


def _operation(request: FinishedRequest) -> str:
    return "chat" if request.request_id.startswith("chat") else "text_completion"
