"""The wire: what a chat completion request may hold.

Owns types, static ranges and the sentences that a bad value earns. Knows no engine and no model: what depends on the
loaded model (context length, budgets, vocabulary) is checked by `service.api.knobs` and `service.api.sampling`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from service.api.errors import ApiError, invalid_value, missing_value, show
from trimkv_core.budget import MAX_BUFFER_SIZE, MAX_LOOKAHEAD_STEPS

logger = logging.getLogger(__name__)

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_TOKENS_LIMIT = 2**31 - 1
MAX_REPORTED_ERRORS = 4
MAX_LOGGED_FIELD_NAMES = 1000


@dataclass(frozen=True, slots=True)
class Allowed:
    """What a field takes, in the words of an error message; `item`: what each item of a list is."""

    text: str
    item: str | None = None


class Wire(BaseModel):
    """Strict: a boolean is not a number, a number is not a string, and neither NaN nor infinity is a value."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


class KvFields(Wire):
    """The memory-budget knobs. Their ranges depend on the model: see `service.api.knobs`."""

    kv_budget: Annotated[int | None, Allowed("an integer from 0 (dense) to max_model_len")] = None
    kv_buffer: Annotated[int | None, Allowed(f"an integer from 1 to {MAX_BUFFER_SIZE}")] = None
    kv_strategy: Annotated[
        Literal["fixed_budget", "threshold", "dense"] | None, Allowed("'fixed_budget', 'threshold' or 'dense'")
    ] = None
    kv_alpha_threshold: Annotated[float | None, Allowed("a number between 0 and 1, both excluded")] = None
    kv_min_tokens_per_head: Annotated[int | None, Allowed("an integer from 0 to max_model_len")] = None
    kv_sliding_window: Annotated[int | None, Allowed("an integer from 0 to max_model_len")] = None
    kv_sink_tokens: Annotated[int | None, Allowed("an integer from 0 to max_model_len")] = None
    kv_lookahead: Annotated[int | None, Allowed(f"an integer from 1 to {MAX_LOOKAHEAD_STEPS}")] = None
    kv_prefill_chunk: Annotated[
        int | None, Allowed("an integer from 0 (no eviction before the whole prompt is in) to max_model_len")
    ] = None


def _stop_strings(value: object) -> object:
    """A single string as a list of one; JSON lists as the tuple that the field holds."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


class SamplingFields(Wire):
    """How tokens are chosen and when the answer ends."""

    temperature: Annotated[float | None, Field(ge=0, le=2), Allowed("a number from 0 (greedy) to 2")] = None
    top_p: Annotated[float | None, Field(gt=0, le=1), Allowed("a number greater than 0, up to 1")] = None
    top_k: Annotated[
        int | None, Field(ge=-1, le=MAX_TOKENS_LIMIT), Allowed("an integer of 1 or more, or -1 or 0 for off")
    ] = None
    min_p: Annotated[float | None, Field(ge=0, le=1), Allowed("a number from 0 to 1")] = None
    seed: Annotated[int | None, Field(ge=-(2**63), le=2**63 - 1), Allowed("an integer of 64 bits")] = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2), Allowed("a number from -2 to 2")] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2), Allowed("a number from -2 to 2")] = None
    repetition_penalty: Annotated[
        float | None, Field(ge=0.01, le=100), Allowed("a number from 0.01 to 100, 1 for off")
    ] = None
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)], ...] | None,
        Field(max_length=MAX_STOP_STRINGS),
        BeforeValidator(_stop_strings),
        Allowed(
            f"a string of 1 to {MAX_STOP_CHARACTERS:,} characters, or a list of at most {MAX_STOP_STRINGS} of them",
            item=f"a string of 1 to {MAX_STOP_CHARACTERS:,} characters",
        ),
    ] = None
    stop_token_ids: Annotated[
        tuple[Annotated[int, Field(ge=0, le=MAX_TOKENS_LIMIT)], ...] | None,
        Field(max_length=MAX_STOP_TOKEN_IDS),
        Allowed(f"a list of at most {MAX_STOP_TOKEN_IDS} token ids", item="a token id, an integer of 0 or more"),
    ] = None
    include_stop_str_in_output: Annotated[bool | None, Allowed("true or false")] = None
    min_tokens: Annotated[int | None, Field(ge=0, le=MAX_TOKENS_LIMIT), Allowed("an integer of 0 or more")] = None
    ignore_eos: Annotated[bool | None, Allowed("true or false")] = None
    priority: Annotated[
        int | None, Field(ge=-(2**31), le=2**31 - 1), Allowed("an integer of 32 bits, lower goes first")
    ] = None
    user: Annotated[str | None, Field(max_length=1024), Allowed("a string of at most 1,024 characters")] = None


class FunctionCall(Wire):
    """A call of a tool in an earlier answer."""

    name: Annotated[str, Allowed("a string")]
    arguments: Annotated[str, Allowed("a string that holds a JSON object")]


def _function_if_null(value: object) -> object:
    return "function" if value is None else value


class ToolCall(Wire):
    """One entry of `tool_calls` in an earlier answer."""

    id: Annotated[str | None, Allowed("a string")] = None
    type: Annotated[Literal["function"], BeforeValidator(_function_if_null), Allowed("'function'")] = "function"
    function: Annotated[FunctionCall, Allowed("an object with name and arguments")]


class Message(Wire):
    """One message of the conversation; `content` has its text parts joined already.

    An assistant may have said nothing that is content: tool calls, a refusal, reasoning that a gateway keeps elsewhere.
    """

    role: Annotated[
        Literal["system", "developer", "user", "assistant", "tool"],
        Allowed("'system', 'developer', 'user', 'assistant' or 'tool'"),
    ]
    content: Annotated[str | None, Allowed("a string or a list of text parts")] = None
    name: Annotated[str | None, Allowed("a string")] = None
    tool_calls: Annotated[
        tuple[ToolCall, ...] | None, Allowed("a list of tool calls", item="an object with a function")
    ] = None
    tool_call_id: Annotated[str | None, Allowed("a string")] = None

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: object, info: ValidationInfo) -> object:
        if not isinstance(value, list):
            return value
        kinds = ("text", "refusal") if info.data.get("role") == "assistant" else ("text",)
        return "\n".join(_part_text(index, part, kinds) for index, part in enumerate(value))

    @model_validator(mode="after")
    def _need_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("content", "has no content: must be a string or a list of text parts")
        return self


def _part_text(index: int, part: object, kinds: tuple[str, ...]) -> str:
    """The text of a part of one of `kinds`, which stands under the kind's own name."""
    fields = part if isinstance(part, dict) else {}
    kind = fields.get("type")
    if kind not in kinds:
        raise PydanticCustomError(
            "content_part",
            "is a part of type {kind}, which this server cannot read: only parts of type {kinds} are allowed",
            {"index": index, "kind": show(kind), "kinds": " or ".join(map(repr, kinds))},
        )
    text = fields.get(kind)
    if not isinstance(text, str):
        raise PydanticCustomError(
            "content_part", "is a {kind} part whose '{kind}' is not a string", {"index": index, "kind": kind}
        )
    return text


class StreamOptions(Wire):
    """What a stream carries beside the text."""

    include_usage: Annotated[bool | None, Allowed("true or false")] = None
    continuous_usage_stats: Annotated[bool | None, Allowed("true or false")] = None


class ChatCompletionRequest(SamplingFields, KvFields):
    """The body of `POST /v1/chat/completions`. Unknown fields are kept by name, so that they can be logged."""

    model_config = ConfigDict(extra="allow")

    model: Annotated[str, Allowed("the name of a served model")]
    messages: Annotated[
        tuple[Message, ...],
        Field(min_length=1),
        Allowed("a list of at least one message", item="an object with role and content"),
    ]
    stream: Annotated[bool | None, Allowed("true or false")] = None
    stream_options: Annotated[StreamOptions | None, Allowed("an object, and only with stream=true")] = None
    max_completion_tokens: Annotated[
        int | None, Field(ge=1, le=MAX_TOKENS_LIMIT), Allowed("an integer of 1 or more")
    ] = None
    # Behind the field that wins over it, so that its validator knows.
    max_tokens: Annotated[int | None, Field(ge=1, le=MAX_TOKENS_LIMIT), Allowed("an integer of 1 or more")] = None
    parallel_tool_calls: Annotated[bool | None, Allowed("true or false")] = None

    # Known, and not served yet: only the values that change nothing pass (see `_NEUTRAL`).
    logit_bias: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    n: Any = None
    tools: Any = None
    tool_choice: Any = None
    response_format: Any = None
    chat_template_kwargs: Any = None
    continue_final_message: Any = None
    add_generation_prompt: Any = None

    @field_validator("max_tokens", mode="before")
    @classmethod
    def _yield_to_max_completion_tokens(cls, value: object, info: ValidationInfo) -> object:
        return value if info.data.get("max_completion_tokens") is None else None


class TokenizeRequest(Wire):
    """The body of `POST /tokenize`: a conversation, or a text as it is."""

    model: Annotated[str, Allowed("the name of a served model")]
    messages: Annotated[
        tuple[Message, ...] | None,
        Field(min_length=1),
        Allowed("a list of at least one message", item="an object with role and content"),
    ] = None
    prompt: Annotated[str | None, Allowed("a string")] = None
    return_token_strs: Annotated[bool | None, Allowed("true or false")] = None


@dataclass(frozen=True, slots=True)
class _Neutral:
    """The values of a field not served yet that ask for nothing."""

    accepts: Callable[[object], bool]
    text: str


_NEUTRAL: Mapping[str, _Neutral] = {
    "logit_bias": _Neutral(lambda value: value == {}, "an empty object"),
    "logprobs": _Neutral(lambda value: value is False, "false"),
    "top_logprobs": _Neutral(lambda value: value == 0 and value is not False, "0"),
    "n": _Neutral(lambda value: value == 1 and value is not True, "1"),
    "tools": _Neutral(lambda value: value == [], "an empty list"),
    "tool_choice": _Neutral(lambda value: value in ("none", "auto"), "'none' or 'auto'"),
    "response_format": _Neutral(lambda value: value == {"type": "text"}, "{'type': 'text'}"),
    "chat_template_kwargs": _Neutral(lambda value: value == {}, "an empty object"),
    "continue_final_message": _Neutral(lambda value: value is False, "false"),
    "add_generation_prompt": _Neutral(lambda value: value is True, "true"),
}


def _collect_allowed() -> dict[str, Allowed]:
    """Field name → what it takes, over all request models."""
    models = (FunctionCall, ToolCall, Message, StreamOptions, ChatCompletionRequest, TokenizeRequest)
    return {
        name: mark
        for model in models
        for name, field in model.model_fields.items()
        for mark in field.metadata
        if isinstance(mark, Allowed)
    }


_ALLOWED = _collect_allowed()
_logged_unknown_fields: set[str] = set()


def parse_chat_request(body: bytes) -> ChatCompletionRequest:
    """The request in `body`.

    Raises:
        ApiError: 400 that names the field, the value and what is allowed.
    """
    try:
        request = ChatCompletionRequest.model_validate_json(body)
    except ValidationError as error:
        raise _from_validation_error(error) from None
    _check_unknown_fields(request)
    for name, neutral in _NEUTRAL.items():
        value = getattr(request, name)
        if value is not None and not neutral.accepts(value):
            raise ApiError(
                HTTPStatus.BAD_REQUEST,
                f"{name}={show(value)} is not supported by this server yet; allowed: {neutral.text}.",
                param=name,
                code="unsupported_value",
            )
    if request.stream_options is not None and not request.stream:
        raise invalid_value("stream_options", _plain(request.stream_options), "only allowed when stream is true")
    return request


def parse_tokenize_request(body: bytes) -> TokenizeRequest:
    """The request in `body`, which has either messages or a prompt.

    Raises:
        ApiError: 400 that names the field, the value and what is allowed.
    """
    try:
        request = TokenizeRequest.model_validate_json(body)
    except ValidationError as error:
        raise _from_validation_error(error) from None
    if (request.messages is None) == (request.prompt is None):
        raise missing_value("messages", "either messages or a prompt")
    return request


def _check_unknown_fields(request: ChatCompletionRequest) -> None:
    for name in request.model_extra or {}:
        if name.startswith("kv_"):
            raise ApiError(
                HTTPStatus.BAD_REQUEST,
                f"{show(name)} is no knob of this server; it knows {', '.join(KvFields.model_fields)}.",
                param=name[:MAX_STOP_CHARACTERS],
                code="unknown_parameter",
            )
        if name not in _logged_unknown_fields and len(_logged_unknown_fields) < MAX_LOGGED_FIELD_NAMES:
            _logged_unknown_fields.add(name)
            logger.info("ignoring unknown request field %s (said once)", show(name))


def _from_validation_error(error: ValidationError) -> ApiError:
    details = error.errors(include_url=False)
    if details[0]["type"] == "json_invalid":
        reason = details[0]["ctx"]["error"]
        return ApiError(HTTPStatus.BAD_REQUEST, f"The body is not valid JSON: {reason}.", code="invalid_json")
    if not details[0]["loc"]:
        return ApiError(HTTPStatus.BAD_REQUEST, "The body must be a JSON object.", code="invalid_json")
    details = [detail for detail in details if not _is_aftermath(detail, details)]
    sentences = dict.fromkeys(_sentence(detail) for detail in details)
    message = " ".join(f"{sentence}." for sentence in list(sentences)[:MAX_REPORTED_ERRORS])
    code = "missing_required_parameter" if details[0]["type"] == "missing" else "invalid_value"
    return ApiError(HTTPStatus.BAD_REQUEST, message, param=_param(details[0]), code=code)


def _is_aftermath(detail: ErrorDetails, details: Sequence[ErrorDetails]) -> bool:
    """Whether a list only counts as too short because its items are bad, which is said of them already."""
    depth = len(detail["loc"])
    return detail["type"] == "too_short" and any(
        len(other["loc"]) > depth and other["loc"][:depth] == detail["loc"] for other in details
    )


def _sentence(detail: ErrorDetails) -> str:
    param = _param(detail)
    if detail["type"] in ("content", "content_part"):
        return f"{param} {detail['msg']}"
    allowed = _allowed(detail)
    if detail["type"] == "missing":
        return f"{param} is missing: must be {allowed}"
    return f"{param}={show(detail['input'])} is not possible: must be {allowed}"


def _allowed(detail: ErrorDetails) -> str:
    """What the innermost known field of a location takes, or its item where the location ends in one."""
    marks = [_ALLOWED[part] for part in detail["loc"] if isinstance(part, str) and part in _ALLOWED]
    if not marks:
        return detail["msg"]
    return (isinstance(detail["loc"][-1], int) and marks[-1].item) or marks[-1].text


def _param(detail: ErrorDetails) -> str:
    """`messages[0].content[1]` for the location of an error."""
    param = ""
    for part in detail["loc"]:
        if isinstance(part, int):
            param += f"[{part}]"
        else:
            param += f".{part}" if param else part
    if detail["type"] == "content":
        param += ".content"
    if detail["type"] == "content_part":
        param += f"[{detail['ctx']['index']}]"
    return param


def _plain(model: BaseModel) -> object:
    return json.loads(model.model_dump_json(exclude_none=True))
