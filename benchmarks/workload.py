"""What is measured and how: the cells of the benchmark, their prompts, and rates out of timelines.

Owns the definitions, so that every system is measured by the same ones. Knows no server and no model.

- prefill tokens/s: streams start at once (this service: up to four of them) and stop at their first token; prompt
  tokens over the time until the last of them has it.
  A stream that is alone need not stop.
- time to first token: of a run in which all streams start at once and go on to their last token.
- decode tokens/s: of the same run, tokens over time while all streams are decoding: from the last stream's first token
  to the first stream's last.
- decode step: of the engine alone, with equal prompts in the cache; steps over as many tokens as the buffer has, so
  that every sequence is evicted once in them, and their mean. Median of several such windows.
- prefill chunk: of the engine alone, the second of a prompt of two: behind M entries a stream, evicted after it, its
  last row through the head. Median of several.
- bare matmuls: the products of the same rows with all the model's weights, in torch alone; the head for every row of a
  decode step and for one row of a chunk.
- many streams: decode tokens/s as above of streams with short prompts, of the engine alone and through HTTP.

Numbers of this service that take no more than seconds are measured several times; the table has the median.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

TICK = 1e-9
# Windows whose median is a decode step's time.
WINDOWS = 3
# A run no longer than this is repeated: one of several seconds is disturbed easily, and cheap to have again.
SHORT_SECONDS = 10.0
SHORT_RUNS = 3
_WORD_LETTERS = range(4, 9)

Measured = TypeVar("Measured")


@dataclass(frozen=True, slots=True)
class Cell:
    """One size of the problem.

    Attributes:
        concurrency: streams that start at once.
        prompt_tokens: tokens of every prompt, the chat template's included.
        new_tokens: tokens every stream generates.
    """

    concurrency: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt twice: for the chat endpoint, and as the token ids that its template makes of it."""

    messages: tuple[dict[str, str], ...]
    ids: tuple[int, ...]


@dataclass(slots=True)
class Timeline:
    """When a stream had how many tokens: seconds since the start of the run, rising."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def note(self, seconds: float, tokens: int) -> None:
        """The stream has `tokens` tokens now; nothing is noted when that is not news."""
        if tokens > (self.tokens[-1] if self.tokens else 0):
            self.seconds.append(seconds)
            self.tokens.append(tokens)

    def tokens_at(self, seconds: float) -> int:
        """How many tokens the stream had by then."""
        return max((count for at, count in zip(self.seconds, self.tokens, strict=True) if at <= seconds), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one system did with one cell.

    Attributes:
        first: timelines of the run that stops at the first token.
        full: timelines of the run that goes on; empty when there was no time for it.
        kv_bytes: most bytes its caches held at once, None where nobody knows.
        cap_seconds: limit that cut a run short; None: nothing was cut.
    """

    first: Sequence[Timeline]
    full: Sequence[Timeline]
    kv_bytes: int | None
    cap_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table; None where a number could not be had. `runs`: of how many it is the median."""

    system: str
    concurrency: int
    prompt_tokens: int
    new_tokens: int
    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None
    first_token_seconds_mean: float | None
    first_token_seconds_last: float | None
    kv_bytes: int | None
    note: str
    runs: int = 1


def repeat_while_short(measure: Callable[[], Measured]) -> list[Measured]:
    """What `measure` says, several times over if the first time was short."""
    start = time.monotonic()
    measured = [measure()]
    if time.monotonic() - start <= SHORT_SECONDS:
        measured += [measure() for _ in range(SHORT_RUNS - 1)]
    return measured


def median_row(rows: Sequence[Row]) -> Row:
    """One line out of several runs of it: the median of every rate and time, of those runs that have one."""
    medians: dict[str, Any] = {"runs": len(rows)}
    for name in Row.__slots__:
        if name.startswith(("prefill_", "decode_", "first_")):
            values = [value for row in rows if (value := getattr(row, name)) is not None]
            medians[name] = statistics.median(values) if values else None
    return replace(rows[0], **medians)


def summarise(system: str, cell: Cell, outcome: Outcome) -> Row:
    """The line of the table for what `system` did."""
    firsts = [line.seconds[0] for line in outcome.full if line.seconds]
    has_all = len(firsts) == cell.concurrency
    return Row(
        system=system,
        concurrency=cell.concurrency,
        prompt_tokens=cell.prompt_tokens,
        new_tokens=cell.new_tokens,
        prefill_tokens_per_second=prefill_rate(cell, outcome.first),
        decode_tokens_per_second=decode_rate(cell, outcome.full),
        first_token_seconds_mean=sum(firsts) / len(firsts) if has_all else None,
        first_token_seconds_last=max(firsts) if has_all else None,
        kv_bytes=outcome.kv_bytes,
        note=_note(cell, outcome),
    )


def prefill_rate(cell: Cell, lines: Sequence[Timeline]) -> float | None:
    """Prompt tokens over the time to the last first token; of those streams that had one before a cap."""
    ends = [line.seconds[0] for line in lines if line.seconds]
    return len(ends) * cell.prompt_tokens / max(ends) if ends else None


def decode_rate(cell: Cell, lines: Sequence[Timeline]) -> float | None:
    """Tokens over time while all streams decode; None when they never all did."""
    if len(lines) != cell.concurrency or not all(line.seconds for line in lines):
        return None
    begin = max(line.seconds[0] for line in lines)
    end = min(line.seconds[-1] for line in lines)
    if end - begin < TICK:
        return None
    return sum(line.tokens_at(end) - line.tokens_at(begin) for line in lines) / (end - begin)


def _note(cell: Cell, outcome: Outcome) -> str:
    if outcome.cap_seconds is None:
        return ""
    started = sum(bool(line.seconds) for line in outcome.first)
    made = sum(line.tokens[-1] for line in outcome.full if line.tokens)
    return (
        f"cut after {outcome.cap_seconds:.0f} s a run: {started} of {cell.concurrency} first tokens, "
        f"{made:,} of {cell.concurrency * cell.new_tokens:,} tokens"
    )


def make_prompts(tokenizer: Any, cell: Cell, *, seed: int) -> list[Prompt]:
    """Prompts of exactly `cell.prompt_tokens` tokens out of random words, different from the first word on."""
    words = _single_token_words(tokenizer)
    return [
        _make_prompt(tokenizer, cell.prompt_tokens, words, random.Random(f"{seed}/{index}"))
        for index in range(cell.concurrency)
    ]


def _single_token_words(tokenizer: Any) -> list[str]:
    """English-looking words that are one token each, behind a space."""
    found = [text[1:] for text in tokenizer.get_vocab() if text.startswith("Ġ") and text[1:].isascii()]
    return sorted(word for word in found if word.isalpha() and word.islower() and len(word) in _WORD_LETTERS)


def _make_prompt(tokenizer: Any, length: int, words: Sequence[str], chance: random.Random) -> Prompt:
    count = length
    drawn = chance.choices(words, k=length)
    while count > 0:
        # A system message of its own, since the template's would be a beginning that all prompts share.
        messages = (
            {"role": "system", "content": " ".join(drawn[:4])},
            {"role": "user", "content": " ".join(drawn[4:count])},
        )
        ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)["input_ids"]
        if len(ids) == length:
            return Prompt(messages, tuple(ids))
        count -= len(ids) - length
        if count > len(drawn):
            drawn += chance.choices(words, k=count - len(drawn))
    raise ValueError(f"a prompt of {length} tokens is shorter than the chat template")
