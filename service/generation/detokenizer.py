"""Token ids → text, one token at a time and without half characters.

The tokenizers library's own stream decoder does the work. This module owns what that leaves open: what is held when an
answer ends, bytes that never become a character (the stream waits for them for ever), and byte-fallback runs that turn
invalid (it raises). Knows no stop strings and no sampling.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

REPLACEMENT = "\ufffd"
# How many ids of a prompt give the first token its context: whether a space before it is the text's own.
CONTEXT_TOKENS = 8
# A character has four bytes: after this many ids without a whole one, the bytes are really invalid.
MAX_UNDECIDED_TOKENS = 16
_MAX_PARTIAL_TOKENS = 3


class IncrementalDetokenizer:
    """The text of an answer as it grows.

    With `prompt_ids`, all pieces and `flush` together are what the answer adds to the prompt in
    `tokenizer.decode(prompt_ids + ids)`: a first token that begins with a space keeps it, also where the decoder strips
    the space at the start of a text (SentencePiece). Without, they are `tokenizer.decode(ids)`. The one exception is a
    byte-fallback decoder, which takes a valid character back when invalid bytes follow it: what was said stays said.

    A prompt that ends within a character gives no context, nor does one whose last `CONTEXT_TOKENS` have no text.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        context = list(prompt_ids[-CONTEXT_TOKENS:])
        self._context = [] if self._decode(context).endswith(REPLACEMENT) else context
        self._undecided: list[int] = []
        self._stream = self._open_stream()

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, empty while a character is incomplete."""
        self._undecided.append(token_id)
        try:
            piece = self._stream.step(self._tokenizer, token_id)
        except Exception:  # the library raises no narrower type
            return self._release()
        if piece:
            self._context, self._undecided = self._undecided, []
            return piece
        return self._release() if len(self._undecided) >= MAX_UNDECIDED_TOKENS else ""

    def flush(self) -> str:
        """What is still held, with U+FFFD for bytes that never became a character."""
        piece = self._text_after_context(self._undecided)
        self._undecided = []
        return piece

    def _release(self) -> str:
        """Say what is held but for the bytes of a last, still possible character, and start a new stream with those."""
        text = self._text_after_context(self._undecided)
        tail = self._partial_character(text)
        if tail:
            text = text.removesuffix(REPLACEMENT)
        self._undecided = tail
        self._stream = self._open_stream()
        for token_id in tail:
            self._stream.step(self._tokenizer, token_id)
        return text

    def _partial_character(self, text: str) -> list[int]:
        """The last held ids that together are one incomplete character, if they are no more than a character has."""
        if not text.endswith(REPLACEMENT):
            return []
        for count in range(_MAX_PARTIAL_TOKENS, 0, -1):
            tail = self._undecided[-count:]
            before = self._text_after_context(self._undecided[:-count])
            if self._decode(tail) == REPLACEMENT and before + REPLACEMENT == text:
                return tail
        return []

    def _text_after_context(self, ids: list[int]) -> str:
        context = self._decode(self._context)
        text = self._decode(self._context + ids)
        return text[len(context) :] if text.startswith(context) else self._decode(ids)

    def _open_stream(self) -> DecodeStream:
        return DecodeStream(ids=self._context, skip_special_tokens=self._skip_special_tokens)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)
