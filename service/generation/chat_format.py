"""Messages → the token ids of a prompt, by the model's own tokenizer and chat template.

Owns the loaded tokenizer and what OpenAI's messages need before a template reads them. Knows no HTTP and no engine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any, Protocol, cast

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trimkv_core.models import locate_base


class Role(StrEnum):
    """Who speaks."""

    SYSTEM = "system"
    DEVELOPER = "developer"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class FunctionCall(Protocol):
    """A function's name and its arguments, a JSON object as a string."""

    @property
    def name(self) -> str: ...

    @property
    def arguments(self) -> str: ...


class ToolCall(Protocol):
    """One tool call of an earlier answer."""

    @property
    def id(self) -> str | None: ...

    @property
    def type(self) -> str: ...

    @property
    def function(self) -> FunctionCall: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One message; `content` is None where an assistant said nothing that is text."""

    role: Role
    content: str | None
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


class ChatFormatError(Exception):
    """Messages that the model's chat template cannot render; `field` names the place, as `messages[1].content`."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.message = message


class TokenizerError(Exception):
    """A tokenizer that this service cannot work with."""


class ChatFormat:
    """A tokenizer with its chat template.

    Safe to use from many threads at once, without a lock: a template is compiled once and rendering keeps no state; the
    Rust tokenizer only fails ("Already borrowed") when one thread changes its truncation, padding or special-token
    settings while another encodes, and after `__init__` nobody does. That is also why the text goes straight to
    `backend`: calling the `transformers` tokenizer may change those settings.

    Attributes:
        tokenizer: as `transformers` loads it.
        backend: the Rust tokenizer inside; it neither truncates nor pads.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise TokenizerError(
                f"{tokenizer.name_or_path!r} has a tokenizer without a fast backend ({type(tokenizer).__name__}): "
                "convert it to a tokenizer.json."
            )
        backend.no_truncation()  # some repositories ship settings from training
        backend.no_padding()
        self.tokenizer = tokenizer
        self.backend = backend

    @classmethod
    @cache
    def load(cls, tokenizer_path: str) -> ChatFormat:
        """The chat format of a folder, hub repository, GGUF file or `embedded`; loaded once a process.

        Raises:
            OSError: nothing to load there, as `transformers` says it.
            TokenizerError: a tokenizer without a fast backend.
        """
        location, extra = locate_base(tokenizer_path)
        return cls(AutoTokenizer.from_pretrained(location, **extra))

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """The prompt of `messages`, up to where the assistant begins to answer.

        Raises:
            ChatFormatError: the tokenizer has no chat template, the template refuses the conversation, or the arguments
                of a tool call are no JSON object.
        """
        if not self.tokenizer.chat_template:
            raise ChatFormatError(
                "messages",
                f"The model's tokenizer ({self.tokenizer.name_or_path!r}) has no chat template, so it only completes "
                "raw prompts: use /v1/completions, or serve a chat model.",
            )
        conversation = _template_messages(messages)
        try:
            # Beside its own errors, a template lets through what operators and filters raise on values not for them.
            prompt = cast(
                str, self.tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
            )
        except (TemplateError, TypeError, ValueError, RecursionError) as error:
            reason = str(error) or type(error).__name__
            raise ChatFormatError("messages", f"The chat template cannot render these messages: {reason}") from error
        return self._encode(prompt)

    def _encode(self, prompt: str) -> list[int]:
        try:
            # The template writes the special tokens itself.
            return self.backend.encode(prompt, add_special_tokens=False).ids
        except TypeError as error:  # what the Rust side says of a string that has no UTF-8
            raise ChatFormatError(
                "messages", "The messages hold half of a surrogate pair (\\ud800 to \\udfff), which is no character."
            ) from error


def _template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """`messages` as a template reads them: developer messages stand behind the text of the first system message, which
    is made where there is none."""
    developer = [message.content or "" for message in messages if message.role == Role.DEVELOPER]
    plain = [
        _template_message(index, message) for index, message in enumerate(messages) if message.role != Role.DEVELOPER
    ]
    if developer:
        system = next((message for message in plain if message["role"] == Role.SYSTEM), None)
        if system is None:
            plain.insert(0, {"role": Role.SYSTEM.value, "content": "\n\n".join(developer)})
        else:
            system["content"] = "\n\n".join([system["content"], *developer])
    return plain


def _template_message(index: int, message: ChatMessage) -> dict[str, Any]:
    # Templates join and test `content` as a string: no text is the empty one, never a missing key.
    fields: dict[str, Any] = {"role": str(message.role), "content": message.content or ""}
    if message.name is not None:
        fields["name"] = message.name
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        fields["tool_calls"] = [
            _template_tool_call(f"messages[{index}].tool_calls[{number}]", call)
            for number, call in enumerate(message.tool_calls)
        ]
    return fields


def _template_tool_call(field: str, call: ToolCall) -> dict[str, Any]:
    arguments = _parse_arguments(f"{field}.function.arguments", call.function.arguments)
    fields: dict[str, Any] = {"type": call.type, "function": {"name": call.function.name, "arguments": arguments}}
    if call.id is not None:
        fields["id"] = call.id
    return fields


def _parse_arguments(field: str, arguments: str) -> dict[str, Any]:
    """The JSON object in `arguments`; clients write none at all as an empty string too."""
    if not arguments.strip():
        return {}
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError) as error:
        raise ChatFormatError(
            field, f"{field} is not valid JSON ({error}): must be a string that holds a JSON object."
        ) from error
    if not isinstance(value, dict):
        raise ChatFormatError(
            field, f"{field} holds a JSON {type(value).__name__}: must be a string that holds a JSON object."
        )
    return value
