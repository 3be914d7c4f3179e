"""`POST /v1/chat/completions`: from the body to an answer, streamed or whole.

Owns the order of things: body, model, knobs, a place in the queue, tokenising, limits, submission, answer. Knows
neither how a prompt is rendered nor how the engine works.
"""

from __future__ import annotations

import functools
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus

import anyio
import anyio.to_thread
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from service.api.answers import (
    AnswerMessage,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChunkChoice,
    Delta,
    KvUsageBody,
    Usage,
)
from service.api.context import ApiContext
from service.api.edge import CLIENT_CLOSED_REQUEST, http_request_id, read_body
from service.api.errors import ApiError, from_submit_error, show
from service.api.knobs import Caps, resolve_budget
from service.api.sampling import AskedTokens, OutputLimits, resolve_max_tokens, resolve_sampling
from service.api.schemas import ChatCompletionRequest, Message, parse_chat_request
from service.api.sse import EventStream
from service.engine.interface import (
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    RejectionReason,
    RequestOrigin,
    SubmitError,
    TextDelta,
)
from service.generation.chat_format import ChatFormat, ChatFormatError, ChatMessage, Role
from service.logs import log_content

logger = logging.getLogger(__name__)

# The endpoint reads its body itself: FastAPI would answer in its own words, and with a 422.
_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ChatCompletionRequest"}}},
    }
}
# W3C Trace Context: who else follows this request.
TRACE_HEADERS = ("traceparent", "tracestate")
# The answer's id before its first token is there, so that `GET /v1/kv/{id}` can watch the prompt being read.
ID_HEADER = "X-Trimkv-Id"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer on its way: who it is, and its events."""

    id: str
    model: str
    created: int
    events: AsyncIterator[Event]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamStyle:
    """Which usage a stream carries: `include` at the end, `continuous` in every chunk."""

    include: bool
    continuous: bool


def chat_router(context: ApiContext) -> APIRouter:
    """The route of chat completions."""
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/chat/completions", response_model=ChatCompletion, openapi_extra=_BODY)
    async def create_chat_completion(request: Request) -> Response:
        arrival = time.monotonic()
        chat_format = context.chat_format
        assert chat_format is not None, "the edge lets no POST through before the service is ready"
        body = await read_body(request, max_bytes=context.settings.max_body_bytes)
        fields = parse_chat_request(body)
        answer = await _submit(context, fields, chat_format, arrival=arrival, origin=_origin(request, fields))
        logger.debug("accepted id=%s", answer.id)
        abort = functools.partial(context.engine.abort, answer.id)  # an ended answer is not harmed by it
        if fields.stream:
            return EventStream(
                stream_chunks(answer, _style(fields)),
                on_close=abort,
                keepalive_seconds=context.settings.keepalive_seconds,
                headers={ID_HEADER: answer.id},
            )
        try:
            return await _answer_whole(request, answer)
        finally:
            abort()

    return router


async def _submit(
    context: ApiContext,
    fields: ChatCompletionRequest,
    chat_format: ChatFormat,
    *,
    arrival: float,
    origin: RequestOrigin,
) -> Answer:
    """Check `fields` against the model, and hand the request to the engine.

    Raises:
        ApiError: an unknown model, a value out of range, a prompt too long.
        SubmitError: the engine does not take it.
    """
    settings, engine = context.settings, context.engine
    info = engine.info
    check_served(context, fields.model)
    budget = resolve_budget(fields, info, Caps(max_kv_budget=settings.max_kv_budget, allow_dense=settings.allow_dense))
    with engine.reserve() as slot:
        prompt_ids = await anyio.to_thread.run_sync(
            encode_messages, chat_format, fields.messages, limiter=context.tokeniser_limiter, abandon_on_cancel=True
        )
        asked = _asked_tokens(fields)
        max_tokens = resolve_max_tokens(
            asked,
            prompt_tokens=len(prompt_ids),
            budget=budget,
            info=info,
            limits=OutputLimits(
                default_max_tokens=settings.default_max_tokens, max_output_tokens=settings.max_output_tokens
            ),
        )
        sampling = resolve_sampling(fields, info, max_tokens=max_tokens, max_tokens_field=asked.field)
        request = GenerationRequest(
            request_id=f"chatcmpl-{uuid.uuid4().hex}",
            prompt_ids=prompt_ids,
            sampling=sampling,
            budget=budget,
            priority=fields.priority or 0,
            arrival=arrival,
            origin=origin,
        )
        events = engine.submit(request, slot)
    if settings.log_content:
        messages = [message.model_dump(exclude_none=True) for message in fields.messages]
        events = log_content(events, request_id=request.request_id, messages=messages)
    return Answer(id=request.request_id, model=fields.model, created=int(time.time()), events=events)


def check_served(context: ApiContext, model: str) -> None:
    """Whether a request may call the model so.

    Raises:
        ApiError: 404 with the names it may.
    """
    if model not in context.served_names:
        raise ApiError(
            HTTPStatus.NOT_FOUND,
            f"The model {show(model)} does not exist; this server has {', '.join(context.served_names)}.",
            param="model",
            code="model_not_found",
        )


def _origin(request: Request, fields: ChatCompletionRequest) -> RequestOrigin:
    return RequestOrigin(
        http_request_id=http_request_id(request),
        model=fields.model,
        is_streaming=bool(fields.stream),
        trace_headers={name: request.headers[name] for name in TRACE_HEADERS if name in request.headers},
    )


def _asked_tokens(fields: ChatCompletionRequest) -> AskedTokens:
    min_tokens = fields.min_tokens or 0
    if fields.max_completion_tokens is not None:
        return AskedTokens(field="max_completion_tokens", value=fields.max_completion_tokens, min_tokens=min_tokens)
    return AskedTokens(field="max_tokens", value=fields.max_tokens, min_tokens=min_tokens)


def encode_messages(chat_format: ChatFormat, messages: Sequence[Message]) -> list[int]:
    """The prompt of `messages`.

    Raises:
        ApiError: the model's template does not take them.
    """
    conversation = [
        ChatMessage(
            role=Role(message.role),
            content=message.content,
            name=message.name,
            tool_calls=message.tool_calls or (),
            tool_call_id=message.tool_call_id,
        )
        for message in messages
    ]
    try:
        return chat_format.encode_chat(conversation)
    except ChatFormatError as error:
        raise ApiError(HTTPStatus.BAD_REQUEST, error.message, param=error.field, code="invalid_value") from error


def _style(fields: ChatCompletionRequest) -> StreamStyle:
    options = fields.stream_options
    include = bool(options and options.include_usage)
    return StreamStyle(include=include, continuous=include and bool(options and options.continuous_usage_stats))


async def _answer_whole(request: Request, answer: Answer) -> Response:
    """Wait for the end of `answer`, or for the client to leave."""
    whole: ChatCompletion | ApiError | None = None
    async with anyio.create_task_group() as tasks:

        async def watch_client() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            tasks.cancel_scope.cancel()

        tasks.start_soon(watch_client)
        whole = await _collect(answer)
        tasks.cancel_scope.cancel()
    if whole is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    headers = {ID_HEADER: answer.id}
    if isinstance(whole, ApiError):  # not raised: a request that reached the engine was not refused at the door
        return whole.response(headers)
    return JSONResponse(whole.model_dump(), headers=headers)


async def _collect(answer: Answer) -> ChatCompletion | ApiError:
    text: list[str] = []
    async for event in answer.events:
        failure = _failed_end(event)
        if failure is not None:
            return failure
        assert not isinstance(event, Failed)
        text.append(event.text)
        if isinstance(event, Finished):
            choice = Choice(message=AnswerMessage(content="".join(text)), finish_reason=event.finish_reason)
            return ChatCompletion(
                id=answer.id, created=answer.created, model=answer.model, choices=(choice,), usage=_usage(event)
            )
    return _no_end()


async def stream_chunks(answer: Answer, style: StreamStyle) -> AsyncIterator[str]:
    """The data of the events of a streamed `answer`: chunks, the usage chunk if asked for, or an error."""
    chunks = _ChunkMaker(answer, style)
    is_first = True
    async for event in answer.events:
        failure = _failed_end(event)
        if failure is not None:
            yield failure.envelope().model_dump_json()
            return
        assert not isinstance(event, Failed)
        if is_first:
            yield chunks.delta(event, Delta(role="assistant", content=""))
            is_first = False
        if event.text or (style.continuous and isinstance(event, TextDelta)):
            yield chunks.text(event)
        if isinstance(event, Finished):
            yield chunks.delta(event, Delta(), finish_reason=event.finish_reason)
            if style.include:
                yield chunks.usage(event)
            return
    yield _no_end().envelope().model_dump_json()


# Stands where an event's text goes in an answer's chunks; no id and no model's name holds it.
_PLACE = "\x00text\x00"


class _ChunkMaker:
    """Chunks of one answer as JSON. With usage asked for, every chunk has the field: null, or the tokens so far."""

    def __init__(self, answer: Answer, style: StreamStyle) -> None:
        self._answer = answer
        self._style = style
        self._around: tuple[str, str] | None = None

    def text(self, event: TextDelta | Finished) -> str:
        """A chunk of text. Most of an answer's events are these, and only their text differs."""
        if self._style.continuous:
            return self.delta(event, Delta(content=event.text))
        if self._around is None:
            before, after = self.delta(event, Delta(content=_PLACE)).split(json.dumps(_PLACE))
            self._around = (before, after)
        return f"{self._around[0]}{json.dumps(event.text, ensure_ascii=False)}{self._around[1]}"

    def delta(self, event: TextDelta | Finished, delta: Delta, *, finish_reason: str | None = None) -> str:
        choice = ChunkChoice(index=0, delta=delta, logprobs=None, finish_reason=finish_reason)
        if not self._style.include:
            return self._chunk((choice,)).model_dump_json(exclude_unset=True)
        usage = _tokens(event) if self._style.continuous else None
        return self._chunk((choice,)).model_copy(update={"usage": usage}).model_dump_json(exclude_unset=True)

    def usage(self, event: Finished) -> str:
        return self._chunk(()).model_copy(update={"usage": _usage(event)}).model_dump_json(exclude_unset=True)

    def _chunk(self, choices: tuple[ChunkChoice, ...]) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self._answer.id,
            object="chat.completion.chunk",
            created=self._answer.created,
            model=self._answer.model,
            choices=choices,
        )


def _tokens(event: TextDelta | Finished) -> Usage:
    return Usage(
        prompt_tokens=event.prompt_tokens,
        completion_tokens=event.completion_tokens,
        total_tokens=event.prompt_tokens + event.completion_tokens,
    )


def _usage(event: Finished) -> Usage:
    return _tokens(event).model_copy(update={"kv": KvUsageBody.model_validate(event.kv)})


def _failed_end(event: Event) -> ApiError | None:
    """The error behind an end that is no answer: a failure, or a server that gave up while the client still listens."""
    if isinstance(event, Failed):
        return _engine_error(event.message)
    if not isinstance(event, Finished) or event.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
        return None
    if event.finish_reason is FinishReason.ABORT:
        return from_submit_error(
            SubmitError(RejectionReason.DRAINING, "The server shut down before this answer ended.")
        )
    return _no_end()


def _no_end() -> ApiError:
    return _engine_error("The engine stopped before this answer ended.")


def _engine_error(message: str) -> ApiError:
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, message, code="engine_error")
