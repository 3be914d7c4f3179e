"""Recall over turns: facts told early, other talk between, questions later, several in one conversation.

Knows no methods.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimkv_core.evaluation.dialogue import Turn, write_dialogue
from trimkv_core.evaluation.haystack import KEY_VALUES, PASSKEYS, Family, Filler, draw_facts
from trimkv_core.evaluation.measures import Measure
from trimkv_core.evaluation.tasks import Probe, ProbeResult, matches

QUESTIONS = 4
_REQUESTS = (
    "Here is a paragraph I am working on. No need to comment on it.",
    "Please read this as well, I may come back to it.",
    "This one is for my own notes.",
    "And here is some background.",
)
_REPLIES = ("Thank you, I have read it.", "Understood.", "Noted.", "All right.")
_NOTED = ("I will remember that.", "Good, I have noted it.", "Thanks, I will keep it in mind.")


@dataclass(frozen=True, slots=True)
class Conversation:
    """One conversation.

    Attributes:
        length: tokens between the facts and the questions, about.
        probe: with one span a question.
    """

    length: int
    probe: Probe


def make_conversations(
    tokenizer: Any, paragraphs: Sequence[str], *, cases: int, seed: int = 0, lengths: Sequence[int] = (512, 1024)
) -> tuple[Conversation, ...]:
    """`cases` conversations, lengths in turn; arguments as in `make_questions`."""
    rng = random.Random(f"{seed} conversation")
    filler = Filler(paragraphs, tokenizer, rng)
    return tuple(
        Conversation(length, write_dialogue(tokenizer, _turns(filler, length, rng)))
        for length in (lengths[number % len(lengths)] for number in range(cases))
    )


def _turns(filler: Filler, length: int, rng: random.Random) -> list[Turn]:
    families: list[Family] = [rng.choice(PASSKEYS), *rng.sample(KEY_VALUES, QUESTIONS - 1)]
    rng.shuffle(families)
    facts = [draw_facts(family, 1, rng)[0] for family in families]
    told = [Turn(f"Please remember this for later. {fact.statement}", rng.choice(_NOTED)) for fact in facts]
    between = [
        Turn(f"{rng.choice(_REQUESTS)}\n\n{chr(10).join(filler.take(length // 4))}", rng.choice(_REPLIES))
        for _ in range(4)
    ]
    asked = [Turn(fact.question, fact.answer_start, fact.value) for fact in rng.sample(facts, len(facts))]
    return [*told, *between, *asked]


class ConversationTask:
    """Exact match of every answer, one observation a question."""

    name = "conversation"

    def __init__(self, conversations: Sequence[Conversation]) -> None:
        self.conversations = tuple(conversations)
        self.probes = tuple(conversation.probe for conversation in self.conversations)

    def measure(self, results: Sequence[ProbeResult]) -> list[Measure]:
        """`correct` by length."""
        flags: dict[int, list[float]] = {}
        for conversation, result in zip(self.conversations, results, strict=True):
            found = flags.setdefault(conversation.length, [])
            found += [float(flag) for flag in matches(conversation.probe, result)]
        return [
            Measure("correct", "conversation", tuple(found), (1,) * len(found), length)
            for length, found in flags.items()
        ]
