"""Documents → token ids and which of them are learnt from, by the model's own tokenizer and chat template.

Owns the tokenizer and a memory of what it made. Knows no rows and no batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError
from tokenizers import Tokenizer

from trimkv_core.training.data import Source
from trimkv_core.training.documents import DataError, Document

MIN_TOKENS = 2
"""What a document needs to teach anything: a token and its successor."""

# Tokens that stay in memory once made, at 5 bytes each at most; others are made again when their turn comes.
_REMEMBERED_TOKENS = 1 << 27

Ids = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A document as tokens.

    Attributes:
        ids: int32 [n].
        counted: bool [n], whether a token is learnt as somebody's successor; None: all are.
        is_text: whether it may be cut anywhere, and begins as a text does; a conversation may only be cut where it is
            longer than a row.
    """

    ids: Ids
    counted: Flags | None
    is_text: bool


class DocumentEncoder:
    """Encodes documents.

    Attributes:
        prefix: what the tokenizer puts before a text, such as a beginning-of-sequence token: every piece of a text
            begins with it, as every text does that is served.
    """

    def __init__(self, tokenizer: Any, *, learns_assistant_only: bool) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise DataError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no fast backend ({type(tokenizer).__name__}): "
                "convert it to a tokenizer.json"
            )
        backend.no_truncation()
        backend.no_padding()
        self._tokenizer, self._backend = tokenizer, backend
        self._learns_assistant_only = learns_assistant_only
        bare, dressed = backend.encode("a", add_special_tokens=False).ids, backend.encode("a").ids
        length = next((n for n in range(len(dressed)) if dressed[n : n + len(bare)] == bare), 0)
        self.prefix: Ids = np.array(dressed[:length], dtype=np.int32)

    def encode(self, document: Document) -> Encoded:
        """The tokens of a document, without `prefix`.

        Raises:
            DataError: the chat template is missing, refuses the conversation, or does not show which turns are the
                assistant's where only these are learnt.
        """
        if document.text is not None:
            return Encoded(_int32(self._backend.encode(document.text, add_special_tokens=False).ids), None, True)
        if not self._tokenizer.chat_template:
            raise DataError(
                f"{document.where} is a conversation, and the tokenizer of {self._tokenizer.name_or_path!r} has no "
                'chat template: train on {"text": ...}'
            )
        messages = [{"role": message.role, "content": message.content} for message in document.messages]
        if self._learns_assistant_only and "{% generation" in str(self._tokenizer.chat_template).replace("{%-", "{%"):
            return self._encode_marked(messages, document.where)
        text = self._render(messages, document.where)
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids = _int32(encoding.ids)
        if not self._learns_assistant_only:
            return Encoded(ids, None, False)
        begins = np.array([begin for begin, _ in encoding.offsets], dtype=np.int64)
        counted = np.zeros(len(ids), dtype=np.bool_)
        for begin, end in self._assistant_spans(messages, text, document.where):
            counted |= (begins >= begin) & (begins < end)
        return Encoded(ids, counted, False)

    def _render(self, messages: Sequence[dict[str, str]], where: str, *, prompts: bool = False) -> str:
        try:
            text = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=prompts, tokenize=False)
        except (TemplateError, TypeError, ValueError, RecursionError) as error:
            reason = str(error) or type(error).__name__
            raise DataError(f"{where}: the chat template cannot render the conversation: {reason}") from error
        return str(text)

    def _assistant_spans(self, messages: list[dict[str, str]], text: str, where: str) -> list[tuple[int, int]]:
        """Characters of `text` that are the assistant's: what a turn adds to the prompt for it."""
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:index], where, prompts=True) if index else ""
            turns = self._render(messages[: index + 1], where)
            if not (turns.startswith(prompt) and text.startswith(turns)):
                raise DataError(
                    f"{where}: the chat template writes message {index + 1} differently once others follow it, so the "
                    "assistant's turns cannot be told apart: train with --chat-loss all"
                )
            spans.append((len(prompt), len(turns)))
        return spans

    def _encode_marked(self, messages: list[dict[str, str]], where: str) -> Encoded:
        """By the template's own mark of what the assistant generates."""
        try:
            made = self._tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except (TemplateError, TypeError, ValueError, RecursionError) as error:
            raise DataError(f"{where}: the chat template cannot render the conversation: {error}") from error
        return Encoded(_int32(made["input_ids"]), np.array(made["assistant_masks"], dtype=np.bool_), False)


class DocumentStore:
    """All documents of a run by one number each, encoded when they are first asked for.

    Attributes:
        members: the numbers of the documents behind each `--data`.
        too_short: numbers of the documents met so far that have fewer than `MIN_TOKENS`.
    """

    def __init__(self, sources: Sequence[Sequence[Source]], encoder: DocumentEncoder) -> None:
        self._encoder = encoder
        self._places: list[tuple[Source, int]] = []
        self._memory: dict[int, Encoded] = {}
        self._remembered = 0
        self.members: list[range] = []
        self.too_short: set[int] = set()
        for group in sources:
            first = len(self._places)
            self._places += [(source, index) for source in group for index in range(len(source))]
            self.members.append(range(first, len(self._places)))

    @property
    def prefix(self) -> Ids:
        """See `DocumentEncoder`."""
        return self._encoder.prefix

    def __len__(self) -> int:
        return len(self._places)

    def get(self, number: int) -> Encoded:
        """One document's tokens; fewer than `MIN_TOKENS` are noted in `too_short`."""
        found = self._memory.get(number)
        if found is None:
            source, index = self._places[number]
            found = self._encoder.encode(source.read(index))
            if len(found.ids) < MIN_TOKENS:
                self.too_short.add(number)
            if self._remembered + len(found.ids) <= _REMEMBERED_TOKENS:
                self._memory[number] = found
                self._remembered += len(found.ids)
        return found

    def check_enough(self, tokens: int) -> None:
        """Raise `DataError` where all documents together have fewer than `tokens`; stops looking once they have."""
        found = 0
        for number in range(len(self)):
            count = len(self.get(number).ids)
            found += count if count >= MIN_TOKENS else 0
            if found >= tokens:
                return
        raise DataError(
            f"the data hold {found} tokens in {len(self)} documents ({len(self.too_short)} of them shorter than "
            f"{MIN_TOKENS} tokens and left out), and one step takes {tokens}: add data, or lower --seq-len, "
            "--batch-size or --gradient-accumulation-steps"
        )


def _int32(ids: Sequence[int]) -> Ids:
    return np.asarray(ids, dtype=np.int32)
