"""Chat turns as token ids, with the places of the answers that are judged.

Owns the way from turns to a probe: the tokenizer's chat template, or plain lines for a model without one. Knows no
tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimkv_core.evaluation.tasks import Probe, ProbeError, Span


@dataclass(frozen=True, slots=True)
class Turn:
    """A user's message and its answer.

    Attributes:
        user: the message.
        answer: the answer up to what is judged, or all of it.
        judged: what has to follow; empty if nothing is judged.
    """

    user: str
    answer: str
    judged: str = ""


def write_dialogue(tokenizer: Any, turns: Sequence[Turn]) -> Probe:
    """The probe of a conversation whose judged words are predicted.

    The judged words are tokenised apart, as a model writes them after what stands before: with a leading space.

    Raises:
        ProbeError: the chat template rewrites turns once others follow, so that answers have no place of their own.
    """
    # A chat template writes its own beginning.
    ids: list[int] = [] if getattr(tokenizer, "chat_template", None) else list(tokenizer("")["input_ids"])
    spans = []
    written = ""
    messages: list[dict[str, str]] = []
    for number, turn in enumerate(turns):
        messages.append({"role": "user", "content": turn.user})
        rendered = _open(tokenizer, messages) + turn.answer
        # Looked at when the next question is there: Qwen3's template, say, puts an empty thought before a last answer
        # and takes it out again then.
        if not rendered.startswith(written):
            raise ProbeError(f"the chat template rewrites earlier turns (turn {number}): answers cannot be placed")
        ids += _encode(tokenizer, rendered[len(written) :])
        if turn.judged:
            judged = _encode(tokenizer, " " + turn.judged)
            # A space that is a token of its own is no part of what has to be known.
            given = next((n for n, token in enumerate(judged) if tokenizer.decode([token]).strip()), 0)
            spans.append(Span(len(ids) + given, len(ids) + len(judged)))
            ids += judged
        answer = f"{turn.answer} {turn.judged}." if turn.judged else turn.answer
        messages.append({"role": "assistant", "content": answer})
        written = rendered + (f" {turn.judged}" if turn.judged else "")
    return Probe(tuple(ids), tuple(spans))


def _open(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    """A conversation as text, up to where the next answer begins."""
    if getattr(tokenizer, "chat_template", None):
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return text
    names = {"user": "Question", "assistant": "Answer"}
    lines = [f"{names[message['role']]}: {message['content']}\n" for message in messages]
    # A space before the answer would become a token of its own.
    return "".join(lines) + "Answer: "


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
