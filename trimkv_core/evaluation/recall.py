"""Passkey and key-value recall by depth and length: one question about a long prompt, one answer.

Knows no methods. Depth is counted up to 128 tokens before the question, so that every fact has been through an
eviction.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimkv_core.evaluation.dialogue import Turn, write_dialogue
from trimkv_core.evaluation.haystack import KEY_VALUES, PASSKEYS, Fact, Family, Filler, count_tokens, draw_facts, hide
from trimkv_core.evaluation.measures import Measure
from trimkv_core.evaluation.tasks import Probe, ProbeResult, matches

LENGTHS = (512, 1024, 2048)
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
# Facts beside the one that is asked for: of other kinds, but in every other question one is of its own kind.
OTHERS = 2
_INTRODUCTION = "Read the following text. Some facts are hidden in it, and I will ask you about one of them.\n\n"


@dataclass(frozen=True, slots=True)
class Question:
    """One case.

    Attributes:
        kind: `passkey` or `key-value`.
        length: tokens asked for; depth: of the fact, 0 to 1.
        probe: the conversation.
    """

    kind: str
    length: int
    depth: float
    probe: Probe


def make_questions(
    tokenizer: Any,
    paragraphs: Sequence[str],
    *,
    cases: int,
    seed: int = 0,
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
) -> tuple[Question, ...]:
    """`cases` questions a kind, lengths and depths in turn so that every pair of them comes up equally often.

    Args:
        tokenizer: with or without a chat template.
        paragraphs: filler; empty: built-in sentences.
        cases: questions a kind.
        seed: of values, keys, filler and wordings.
        lengths: tokens of the whole prompt, about.
        depths: of the fact that is asked for.
    """
    questions = []
    for families in (PASSKEYS, KEY_VALUES):
        rng = random.Random(f"{seed} {families[0].kind}")
        filler = Filler(paragraphs, tokenizer, rng)
        for number in range(cases):
            length = lengths[number % len(lengths)]
            depth = depths[number // len(lengths) % len(depths)]
            # Wordings turn with all of the above, not in step with one of them.
            family = families[(number + number // len(lengths)) % len(families)]
            facts = _draw(family, rng, has_rival=number % 2 == 1)
            probe = _ask(tokenizer, filler, facts, length=length, depth=depth, rng=rng)
            questions.append(Question(family.kind, length, depth, probe))
    return tuple(questions)


def _draw(family: Family, rng: random.Random, *, has_rival: bool) -> list[Fact]:
    """The fact that is asked for, and others that could be mistaken for it; a pass key stands alone."""
    if not family.keys:
        return draw_facts(family, 1, rng)
    facts = draw_facts(family, 2 if has_rival else 1, rng)
    kinds = rng.sample([other for other in KEY_VALUES if other is not family], OTHERS + 1 - len(facts))
    return facts + [draw_facts(kind, 1, rng)[0] for kind in kinds]


def _ask(tokenizer: Any, filler: Filler, facts: list[Fact], *, length: int, depth: float, rng: random.Random) -> Probe:
    asked, others = facts[0], facts[1:]
    turn = Turn("", asked.answer_start, asked.value)
    fixed = _INTRODUCTION + "\n".join(fact.statement for fact in facts) + asked.question + turn.answer
    room = max(length - count_tokens(tokenizer, fixed) - 40, 1)
    hidden = [(depth, asked.statement), *((rng.random(), other.statement) for other in others)]
    text = hide(filler.take(room), hidden, tokenizer)
    return write_dialogue(tokenizer, [Turn(f"{_INTRODUCTION}{text}\n\n{asked.question}", turn.answer, turn.judged)])


class RecallTask:
    """Exact match of the answers, one observation a question."""

    name = "recall"

    def __init__(self, questions: Sequence[Question]) -> None:
        self.questions = tuple(questions)
        self.probes = tuple(question.probe for question in self.questions)

    def measure(self, results: Sequence[ProbeResult]) -> list[Measure]:
        """`correct` by kind, length and depth."""
        flags: dict[tuple[str, int, float], list[float]] = {}
        for question, result in zip(self.questions, results, strict=True):
            key = (question.kind, question.length, question.depth)
            flags.setdefault(key, []).append(float(matches(question.probe, result)[0]))
        return [
            Measure("correct", kind, tuple(found), (1,) * len(found), length, depth)
            for (kind, length, depth), found in flags.items()
        ]
