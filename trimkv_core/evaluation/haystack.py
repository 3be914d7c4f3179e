"""Long prompts with facts hidden in them: filler, facts and questions. Templates and values of its own.

The wordings here are kept for judging: no training data may use them. Knows no model beyond a tokenizer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# A fact that lies closer to the question has not been through an eviction.
NEAR_TOKENS = 128
_MIN_PARAGRAPH, _MAX_PARAGRAPH = 60, 600

# Plain statements about nothing in particular, for runs without texts of their own.
NEUTRAL = (
    "The morning bus was late again, and nobody at the stop seemed to mind.",
    "A row of poplars runs along the canal, planted when the lock was widened.",
    "Bread keeps better in a linen bag than in a plastic one, the baker says.",
    "Most of the houses in the lane were painted white a long time ago.",
    "The river freezes only in hard winters, and then from the banks inwards.",
    "Two clerks share the desk by the window and take turns with the telephone.",
    "Wool shrinks when it is washed hot, which every family learns once.",
    "The library closes early on Fridays so that the floors can be waxed.",
    "Older maps show the road on the other side of the hill.",
    "In the afternoon the wind turned and brought the smell of cut grass.",
    "The choir meets in the school hall because the church has no heating.",
    "A good knife is sharpened often and lightly, not seldom and hard.",
    "The ferry carries bicycles for free outside the summer months.",
    "Some of the apples had fallen before anyone thought of picking them.",
    "Her brother repairs clocks and is seldom on time himself.",
    "The market moved to the station square while the old one was paved.",
    "Fog hangs over the fields until about ten and then lifts within minutes.",
    "The second edition corrects a few dates and adds an index of places.",
    "Nobody remembers who donated the bench or what was carved on its back.",
    "Rain is measured there with a copper funnel that stands on the roof.",
)

_ADJECTIVES = (
    "amber", "silent", "northern", "copper", "velvet", "hollow", "crimson", "gentle", "frozen", "golden", "rapid",
    "distant", "broken", "emerald", "hidden", "lunar", "marble", "paper", "quiet", "rusty", "silver", "stormy",
    "tiny", "wooden",
)  # fmt: skip
_NOUNS = (
    "falcon", "harbor", "lantern", "meadow", "anchor", "bridge", "canyon", "dolphin", "engine", "forest", "garden",
    "hammer", "island", "jacket", "kettle", "ladder", "mirror", "needle", "orchard", "pillow", "rocket", "saddle",
    "temple", "violin",
)  # fmt: skip
_CITIES = (
    "Lisbon", "Oslo", "Nairobi", "Lima", "Kyoto", "Prague", "Quito", "Dublin", "Ankara", "Hanoi", "Riga", "Havana",
    "Tunis", "Bogota", "Vienna", "Jakarta",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Family:
    """One wording of a fact and its question.

    Attributes:
        kind: `passkey` or `key-value`.
        name: of the wording.
        fact: with {key} and {value}.
        question: with {key}.
        answer: what the answer begins with; the value follows.
        keys: what {key} may be; empty without one.
    """

    kind: str
    name: str
    fact: str
    question: str
    answer: str
    keys: tuple[str, ...] = ()


_PAIRS = tuple(f"{adjective} {noun}" for adjective in _ADJECTIVES for noun in _NOUNS)

PASSKEYS = (
    Family(
        "passkey",
        "pass key",
        "The pass key is {value}. Remember it. {value} is the pass key.",
        "What is the pass key?",
        "The pass key is",
    ),
    Family(
        "passkey",
        "special magic number",
        "The special magic number is {value}. Keep the special magic number {value} in mind.",
        "What is the special magic number?",
        "The special magic number is",
    ),
)
KEY_VALUES = (
    Family(
        "key-value",
        "locker",
        "In the locker labelled {key} lies the number {value}.",
        "Which number lies in the locker labelled {key}?",
        "In the locker labelled {key} lies the number",
        _PAIRS,
    ),
    Family(
        "key-value",
        "access token",
        "The access token for {key} is {value}.",
        "What is the access token for {key}?",
        "The access token for {key} is",
        _PAIRS,
    ),
    Family(
        "key-value",
        "registry record",
        "Registry record: {key} is filed under {value}.",
        "Under what is {key} filed in the registry?",
        "In the registry, {key} is filed under",
        _PAIRS,
    ),
    Family(
        "key-value",
        "beacon",
        "The beacon at {key} sends the code {value}.",
        "Which code does the beacon at {key} send?",
        "The beacon at {key} sends the code",
        _CITIES,
    ),
    Family(
        "key-value",
        "vault",
        "The vault in {key} has the combination {value}.",
        "What is the combination of the vault in {key}?",
        "The vault in {key} has the combination",
        _CITIES,
    ),
)


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact of a family: `key` is empty where it has none."""

    family: Family
    key: str
    value: str

    @property
    def statement(self) -> str:
        return self.family.fact.format(key=self.key, value=self.value)

    @property
    def question(self) -> str:
        return self.family.question.format(key=self.key)

    @property
    def answer_start(self) -> str:
        return self.family.answer.format(key=self.key)


def draw_facts(family: Family, count: int, rng: random.Random) -> list[Fact]:
    """Facts with different keys and values: five digits, none of them leading zeros."""
    values = rng.sample(range(10_000, 100_000), count)
    keys = rng.sample(family.keys, count) if family.keys else [""] * count
    return [Fact(family, key, str(value)) for key, value in zip(keys, values, strict=True)]


def paragraphs_of(texts: Sequence[str]) -> list[str]:
    """Filler: the paragraphs of texts that look like prose, on one line each; the built-in sentences if none do."""
    found = []
    for text in texts:
        for block in re.split(r"\n\s*\n", text):
            line = " ".join(block.split())
            if _MIN_PARAGRAPH <= len(line) <= _MAX_PARAGRAPH and line.endswith((".", "!", "?")):
                found.append(line)
    return found


class Filler:
    """Draws filler in random order, without end.

    Args:
        paragraphs: to draw from; empty: neutral sentences.
        tokenizer: counts their tokens.
        rng: the only source of chance.
    """

    def __init__(self, paragraphs: Sequence[str], tokenizer: Any, rng: random.Random) -> None:
        self._pieces = list(paragraphs) or list(NEUTRAL)
        self._tokenizer, self._rng = tokenizer, rng
        self._left: list[str] = []

    def take(self, tokens: int) -> list[str]:
        """Pieces of about `tokens` tokens together, at least one."""
        pieces: list[str] = []
        total = 0
        while not pieces or total < tokens:
            if not self._left:
                self._left = self._rng.sample(self._pieces, len(self._pieces))
            piece = self._left.pop()
            size = count_tokens(self._tokenizer, piece) + 1
            if pieces and total + size > tokens + size // 2:
                break
            pieces.append(piece)
            total += size
        return pieces


def hide(pieces: Sequence[str], facts: Sequence[tuple[float, str]], tokenizer: Any) -> str:
    """A haystack: every fact at its depth, counted in tokens over the part that is not near the end.

    Args:
        pieces: filler.
        facts: depth from 0 to 1 and statement.
        tokenizer: counts tokens.
    """
    sizes = [count_tokens(tokenizer, piece) + 1 for piece in pieces]
    reach = max(sum(sizes) - NEAR_TOKENS, 0)
    result: list[str] = []
    waiting = sorted(facts)
    passed = 0
    for piece, size in zip(pieces, sizes, strict=True):
        while waiting and waiting[0][0] * reach <= passed + size / 2:
            result.append(waiting.pop(0)[1])
        result.append(piece)
        passed += size
    result += [statement for _, statement in waiting]
    return "\n".join(result)


def count_tokens(tokenizer: Any, text: str) -> int:
    """Tokens of a text by itself."""
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])
