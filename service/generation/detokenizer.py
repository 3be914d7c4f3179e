"""Token ids → text, one token at a time and without half characters.

Owns the few ids that the next character depends on. Knows no stop strings and no sampling.

`tokenizers.decoders.DecodeStream` is not used: it raises when a byte-fallback run turns invalid, does not give out what
it holds at the end, and says nothing for as long as a model repeats U+FFFD, at a cost that grows with the square.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
# How many ids give the next one its context: a leading space, or the bytes of the character it goes on with.
CONTEXT_TOKENS = 8
# A character has four bytes: after this many ids without a whole one, the bytes are really invalid.
MAX_UNDECIDED_TOKENS = 16


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
        # window = ids of the text last released (the context) + ids since:   [ context | undecided ]
        #                                                                               ^ boundary
        self._window = list(prompt_ids[-CONTEXT_TOKENS:])
        self._text = self._decode(self._window)
        if self._text.endswith(REPLACEMENT):
            self._window, self._text = [], ""
        self._boundary = len(self._window)
        self._released = len(self._text)

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, empty while a character is incomplete."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text == self._text and self._is_skipped(token_id):
            self._window.pop()
            return ""
        self._text = text
        if text.endswith(REPLACEMENT):
            is_hopeless = len(self._window) - self._boundary >= MAX_UNDECIDED_TOKENS
            return self._release_hopeless() if is_hopeless else ""
        if len(text) <= self._released:
            return ""
        piece = text[self._released :]
        self._window = self._window[self._boundary :]
        self._boundary = len(self._window)
        self._text = self._decode(self._window)
        self._released = len(self._text)
        return piece

    def flush(self) -> str:
        """What is still held, with U+FFFD for bytes that never became a character."""
        piece = self._text[self._released :]
        self._released = len(self._text)
        return piece

    def _release_hopeless(self) -> str:
        """All but the last character: only its bytes may still belong to a valid one."""
        piece = self._text[self._released : -1]
        self._window = self._window[-CONTEXT_TOKENS:]
        self._boundary = len(self._window)
        self._text = self._decode(self._window)
        self._released = len(self._text) - 1
        return piece

    def _is_skipped(self, token_id: int) -> bool:
        """Whether `token_id` has no text anywhere: a special token, or an id that the tokenizer does not have."""
        if self._tokenizer.id_to_token(token_id) is None:
            return True
        return self._decode([token_id]) != self._tokenizer.decode([token_id], skip_special_tokens=False)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)
