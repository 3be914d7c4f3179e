"""When an answer ends, and which of its text may go out before.

Owns the text held back because it may become a stop string. Knows no sampling and no HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from service.engine.interface import FinishReason, SamplingParams
from service.generation.detokenizer import IncrementalDetokenizer


@dataclass(frozen=True, slots=True)
class Step:
    """What one token does to an answer.

    Attributes:
        text: released now; it is never taken back.
        finish_reason: why the answer ends with this token, None while it goes on.
    """

    text: str
    finish_reason: FinishReason | None


class AnswerStream:
    """The text of one answer, token by token, up to its end.

    - The model's end tokens (unless `ignore_eos`) and `stop_token_ids` end it with STOP; their own text is dropped.
    - Stop strings end it with STOP. The one that is complete first wins, of those complete at the same character the
      longest; so the answer is the same however its text is split over tokens. Text that may become a stop string is
      held back until it cannot. With `include_stop_str_in_output` the answer ends behind the stop string, and nothing
      needs holding.
    - None of them counts before `min_tokens` are generated: a stop string that is complete by then is plain text, one
      that a later token completes counts, wherever it began (as vLLM).
    - `max_tokens` ends it with LENGTH, unless the same token ends it with STOP.

    Whatever the end, text held back that is no stop string goes out with it. A token costs time in proportion to its
    text and the number of stop strings.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        *,
        eos_token_ids: Sequence[int],
        prompt_ids: Sequence[int] = (),
    ) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids=prompt_ids)
        self._params = params
        self._stop_ids = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else eos_token_ids)
        self._stops = [_StopString(stop) for stop in params.stop if stop]
        self._held = ""
        self._generated = 0

    def push(self, token_id: int) -> Step:
        """Take the next token. Not to be called again after a step with a finish reason."""
        self._generated += 1
        may_stop = self._generated > self._params.min_tokens
        if may_stop and token_id in self._stop_ids:
            return self._end(self._detokenizer.flush(), FinishReason.STOP)
        text = self._detokenizer.push(token_id)
        if self._generated >= self._params.max_tokens:
            return self._end(text + self._detokenizer.flush(), FinishReason.LENGTH)
        answer = self._find_stop(text)
        if answer is not None:
            return Step(answer, FinishReason.STOP)
        text = self._held + text
        cut = len(text) - self._undecided_characters()
        self._held = text[cut:]
        return Step(text[:cut], None)

    def _end(self, text: str, reason: FinishReason) -> Step:
        answer = self._find_stop(text)
        return Step(self._held + text, reason) if answer is None else Step(answer, FinishReason.STOP)

    def _find_stop(self, text: str) -> str | None:
        """The last text of the answer if `text` completes a stop string, else None."""
        if not self._stops:
            return None
        may_stop = self._generated > self._params.min_tokens
        for end, character in enumerate(text, start=1):
            complete = [stop.length for stop in self._stops if stop.advance(character)]
            if complete and may_stop:
                dropped = 0 if self._params.include_stop_str_in_output else max(complete)
                return (self._held + text)[: len(self._held) + end - dropped]
        return None

    def _undecided_characters(self) -> int:
        if self._params.include_stop_str_in_output:
            return 0
        return max((stop.matched for stop in self._stops), default=0)


class _StopString:
    """How much of a stop string the text ends with, followed character by character (Knuth, Morris, Pratt).

    `matched` is the length of the longest proper prefix of the stop string that the text ends with.
    """

    def __init__(self, stop: str) -> None:
        self.length = len(stop)
        self.matched = 0
        self._stop = stop
        # fallback[i]: the longest proper prefix of stop[:i] that is also its end.
        self._fallback = [0, 0]
        for character in stop[1:]:
            self._fallback.append(self._extend(self._fallback[-1], character))

    def advance(self, character: str) -> bool:
        """Go on by one character; whether the stop string is complete with it."""
        matched = self._extend(self.matched, character)
        is_complete = matched == self.length
        self.matched = self._fallback[matched] if is_complete else matched
        return is_complete

    def _extend(self, matched: int, character: str) -> int:
        while matched and self._stop[matched] != character:
            matched = self._fallback[matched]
        return matched + 1 if self._stop[matched] == character else 0
