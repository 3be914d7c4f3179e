"""What is trained on, and how it is written in JSON: texts and conversations.

Owns what a document is and every complaint about one that is not. Knows no files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAPES = '"text" (a string) or "messages" (a list of {"role": ..., "content": ...})'


class DataError(ValueError):
    """Data that cannot be trained on; the message names the file, the place, what was found and what is allowed."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Document:
    """One text or one conversation.

    Attributes:
        where: the file and the place in it, for complaints.
        text: None for a conversation.
        messages: empty for a text.
    """

    where: str
    text: str | None
    messages: tuple[Message, ...] = ()


def parse_line(line: bytes, where: str) -> Document:
    """The document of a line of JSON."""
    try:
        return parse_document(json.loads(line.decode("utf-8-sig")), where)
    except UnicodeDecodeError as error:
        raise DataError(not_utf8(where, error)) from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise DataError(f"{where} is not JSON that can be read: it is nested too deeply") from None


def parse_document(item: object, where: str) -> Document:
    """The document of a JSON value."""
    if not isinstance(item, dict):
        raise DataError(f"{where} holds {named(item)}: it must hold an object with {SHAPES}")
    text, messages = item.get("text"), item.get("messages")
    if (text is None) == (messages is None):
        keys = ", ".join(f'"{key}"' for key in list(item)[:8]) or "nothing"
        raise DataError(f"{where} holds {keys}: it must hold either {SHAPES}")
    if messages is not None:
        return Document(where, None, tuple(_parse_messages(messages, where)))
    if not isinstance(text, str):
        raise DataError(f'{where} has {named(text)} as its "text": it must be a string')
    if not _is_encodable(text):
        raise DataError(f'{where} holds half of a surrogate pair in its "text": it must be characters')
    return Document(where, text)


def _parse_messages(messages: object, where: str) -> Iterator[Message]:
    if not isinstance(messages, list) or not messages:
        found = named(messages) if messages != [] else "an empty list"
        raise DataError(f'{where} has {found} as its "messages": it must be a list of one or more messages')
    for number, message in enumerate(messages, start=1):
        place = f"{where}, message {number}"
        if not isinstance(message, dict):
            raise DataError(f'{place} is {named(message)}: it must be an object with "role" and "content"')
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise DataError(f"{place} has the role {role!r}: allowed are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise DataError(f'{place} has {named(content)} as its "content": it must be a string')
        if not _is_encodable(content):
            raise DataError(f'{place} holds half of a surrogate pair in its "content": it must be characters')
        yield Message(role, content)


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def named(value: object) -> str:
    """A JSON value in the words of a complaint."""
    if value is None:
        return "nothing"
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number"}
    return names.get(type(value), "a number")


def not_utf8(where: str, error: UnicodeDecodeError) -> str:
    """The complaint about bytes that are no text."""
    byte = error.object[error.start]
    return f"{where} is not UTF-8: it holds the byte 0x{byte:02x} where a character must begin or go on"
