"""The wire: what an answer looks like, whole and in chunks. Types only, with the field order clients are used to."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class KvUsageBody(BaseModel):
    """What the cache of an answer really did; see `service.engine.interface.KVUsage`."""

    model_config = ConfigDict(from_attributes=True)

    budget_entries: int | None
    retained_entries: int
    evicted_entries: int
    peak_entries: int
    evictions: int
    bytes: int
    peak_bytes: int
    dense_bytes: int


class Usage(BaseModel):
    """Tokens of an answer, and its cache once it has ended."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    kv: KvUsageBody | None = None


class AnswerMessage(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """The one answer."""

    index: int = 0
    message: AnswerMessage
    logprobs: None = None
    finish_reason: str


class ChatCompletion(BaseModel):
    """The whole answer at once."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: tuple[Choice, ...]
    usage: Usage


class Delta(BaseModel):
    """What a chunk adds; only what is set goes out."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """The one answer's share of a chunk."""

    index: int
    delta: Delta
    logprobs: None
    finish_reason: str | None


class ChatCompletionChunk(BaseModel):
    """One piece of a streamed answer; only what is set goes out."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: tuple[ChunkChoice, ...]
    usage: Usage | None = None
