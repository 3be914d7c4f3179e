"""Generated conversations for recall training: facts stated in or between filler, and questions about them.

    python benchmarks/gates_conversations.py --docs docs.jsonl --output FILE.jsonl --count N --seed S

One {"messages": [{"role", "content"}, ...]} a line. Five plans, in turn at random: facts buried in one long text; facts
told turn by turn with other talk in between; tables and lists of records; long lists of keys and values; quotations out
of the text itself. Every answer's value occurs word for word in what was said before. Subjects and values do not repeat
in a conversation, save where a fact is corrected: then the last word counts.

Owns the plans; facts are `gates_facts`', talk around them is `gates_talk`'s. Knows no tokenizer: lengths are estimates.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import gates_talk as talk
import gates_words as words
from gates_facts import KINDS, RESERVED, Fact, facts

SHORTEST_TOKENS, LONGEST_TOKENS = 300, 3_500
# Filler is prose with code; facts and tables are cut finer.
FILLER_CHARACTERS_PER_TOKEN = 4.3
FACT_CHARACTERS_PER_TOKEN = 2.6
Messages = list[dict[str, str]]


class Filler:
    """Paragraphs of prose out of documents, in running order from a random place or mixed."""

    def __init__(self, documents: Iterable[str]) -> None:
        self.paragraphs = [
            block
            for text in documents
            for block in text.split("\n\n")
            if 150 <= len(block) <= 900
            and re.match(r"[A-Z]", block)
            and block.endswith(".")
            and not any(wording in block.lower() for wording in RESERVED)
        ]
        if len(self.paragraphs) < 50:
            raise SystemExit("--docs: fewer than 50 paragraphs of prose; is it docs.jsonl of gates_texts.py?")

    def take(self, draw: random.Random, tokens: int) -> list[str]:
        """Paragraphs of about so many tokens; at least one."""
        room = tokens * FILLER_CHARACTERS_PER_TOKEN
        start, mixed = draw.randrange(len(self.paragraphs)), draw.random() < 0.4
        taken: list[str] = []
        while not taken or room > 300:
            start = draw.randrange(len(self.paragraphs)) if mixed else (start + 1) % len(self.paragraphs)
            taken.append(self.paragraphs[start])
            room -= len(taken[-1])
        return taken


def turn(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def ask(draw: random.Random, known: list[Fact], count: int) -> Messages:
    """Turns that ask for some of the facts, each once."""
    messages: Messages = []
    for fact in draw.sample(known, min(count, len(known))):
        question = draw.choice(talk.AGAIN) + fact.say(draw, fact.kind.questions)
        messages += turn(question, fact.answer(draw))
    return messages


def attach(draw: random.Random, text: str, questions: Messages) -> Messages:
    """The questions, the first of them at the end of the text's own message, or after an acknowledgement."""
    if draw.random() < 0.25:
        return turn(text, draw.choice(talk.NOTED)) + questions
    first = f"{text}\n\n{draw.choice(talk.CLOSINGS)}{questions[0]['content']}"
    return [{"role": "user", "content": first}, *questions[1:]]


def tokens_of(text: str) -> int:
    return round(len(text) / FACT_CHARACTERS_PER_TOKEN)


def buried(draw: random.Random, filler: Filler, tokens: int) -> Messages:
    """Facts at random depths of one long text, between paragraphs or inside them."""
    known = facts(draw, draw.choice((1, 1, 2, 3, 4, 6, 8, 12)))
    said = [fact.say(draw, fact.kind.statements) for fact in known]
    blocks = filler.take(draw, tokens - sum(map(tokens_of, said)) - 80)
    for sentence in said:
        place = draw.randrange(len(blocks) + 1)
        if place < len(blocks) and draw.random() < 0.5:
            sentences = blocks[place].split(". ")
            sentences.insert(draw.randrange(len(sentences)), sentence.removesuffix("."))
            blocks[place] = ". ".join(sentences)
        else:
            blocks.insert(place, sentence)
    opening = draw.choice(talk.OPENINGS)
    text = "\n\n".join([opening, *blocks] if opening else blocks)
    return attach(draw, text, ask(draw, known, draw.randint(1, 6)))


def told(draw: random.Random, filler: Filler, tokens: int) -> Messages:
    """Facts told turn by turn, with other talk in between; some are corrected later, some asked for at once."""
    known = facts(draw, draw.randint(1, 6))
    messages: Messages = []
    gap = max(40, (tokens - 60 * len(known)) // (len(known) + 1))
    for place, fact in enumerate(known):
        messages += turn(draw.choice(talk.REMEMBER) + fact.say(draw, fact.kind.statements), draw.choice(talk.NOTED))
        messages += chat(draw, filler, gap)
        if draw.random() < 0.2:
            known[place] = Fact(fact.kind, fact.subject, facts(draw, 1, kind=fact.kind)[0].value)
            text = draw.choice(talk.CORRECTIONS) + known[place].say(draw, fact.kind.statements)
            messages += turn(text, draw.choice(talk.NOTED))
        if draw.random() < 0.3:
            messages += ask(draw, known[: place + 1], 1)
    return messages + chat(draw, filler, gap) + ask(draw, known, draw.randint(1, 4))


def chat(draw: random.Random, filler: Filler, tokens: int) -> Messages:
    """Small talk, sums, and something to read, of about so many tokens."""
    messages: Messages = []
    small_talk = draw.sample(talk.TALK, len(talk.TALK))
    while tokens > 30:
        if tokens > 120 and draw.random() < 0.6:
            part = min(tokens - 20, draw.randint(100, 700))
            text = draw.choice(talk.READ).format("\n\n".join(filler.take(draw, part)))
            messages += turn(text, draw.choice(talk.READ_ANSWERS))
            tokens -= part + 20
        elif draw.random() < 0.4 or not small_talk:
            left, right = draw.randrange(2, 90), draw.randrange(2, 90)
            messages += turn(f"What is {left} plus {right}?", f"{left + right}")
            tokens -= 30
        else:
            messages += turn(*small_talk.pop())
            tokens -= 40
    return messages


def written(draw: random.Random, labels: list[str], rows: list[list[str]]) -> str:
    """Records as a table, as CSV, as JSON lines or as a list."""
    match draw.choice(("table", "csv", "json", "list")):
        case "table":
            lines = [f"| {' | '.join(row)} |" for row in (labels, ["---"] * len(labels), *rows)]
        case "csv":
            lines = [",".join(row) for row in (labels, *rows)]
        case "json":
            lines = [json.dumps(dict(zip(labels, row, strict=True)), ensure_ascii=False) for row in rows]
        case _:
            cells = ([f"{label}: {cell}" for label, cell in zip(labels, row, strict=True)][1:] for row in rows)
            lines = [f"- {row[0]}: {'; '.join(part)}" for row, part in zip(rows, cells, strict=True)]
    return "\n".join(lines)


def table(draw: random.Random, filler: Filler, tokens: int) -> Messages:
    """Records of people with several columns, before, after or amid filler; look-ups of cells."""
    columns = draw.sample([kind for kind in KINDS if kind.subject is words.person], draw.randint(2, 4))
    count = draw.randint(3, max(3, min(24, tokens // (20 * len(columns)))))
    people = [fact.subject for fact in facts(draw, count, kind=columns[0])]
    values = [[fact.value for fact in facts(draw, count, kind=kind)] for kind in columns]
    rows = [[person, *cells] for person, *cells in zip(people, *values, strict=True)]
    text = written(draw, ["name", *(kind.label for kind in columns)], rows)
    left = tokens - tokens_of(text) - 80
    blocks = filler.take(draw, left) if left > 60 else []
    blocks.insert(draw.choice((0, 0, len(blocks), draw.randint(0, len(blocks)))), text)
    cells = [Fact(kind, row[0], cell) for row in rows for kind, cell in zip(columns, row[1:], strict=True)]
    return attach(draw, "\n\n".join(blocks), ask(draw, cells, draw.randint(1, 8)))


def pairs(draw: random.Random, filler: Filler, tokens: int) -> Messages:
    """A long list of keys and values in one of several notations, in one piece or strewn over filler."""
    make_key = draw.choice((words.word, words.code, words.identifier, words.dotted))
    make_value = draw.choice((words.digits, words.code, words.password, words.phrase, words.thing, words.word))
    count = draw.randint(4, max(4, min(60, tokens // 30)))
    known = {make_key(draw): make_value(draw) for _ in range(count)}
    notation = draw.choice(talk.NOTATIONS)
    lines = [notation.format(*item) for item in known.items()]
    left = tokens - sum(map(tokens_of, lines)) - 80
    blocks = filler.take(draw, left) if left > 60 else []
    for block in lines if blocks and draw.random() < 0.5 else ["\n".join(lines)]:
        blocks.insert(draw.randint(0, len(blocks)), block)
    way, messages = draw.choice(talk.LOOK_UPS), Messages()
    for key in draw.sample(list(known), min(len(known), draw.randint(1, 10))):
        messages += turn(way.format(key), known[key])
    return attach(draw, "\n\n".join(blocks), messages)


def quoted(draw: random.Random, filler: Filler, tokens: int) -> Messages:
    """The text itself as the facts: how sentences of it go on."""
    blocks = filler.take(draw, tokens - 120)
    messages: Messages = []
    for block in draw.sample(blocks, min(len(blocks), draw.randint(1, 3))):
        sentence = re.split(r"[.:]\s", block)[0].split()[:36]
        cut = max(4, len(sentence) // 2)
        begin, rest = " ".join(sentence[:cut]), " ".join(sentence[cut:])
        if rest and block.startswith(f"{begin} {rest}"):
            messages += turn(draw.choice(talk.CONTINUE).format(begin), rest)
    return attach(draw, "\n\n".join(blocks), messages) if messages else buried(draw, filler, tokens)


Plan = Callable[[random.Random, Filler, int], Messages]
# Each plan with its share in hundredths.
PLANS: dict[Plan, int] = {buried: 34, told: 26, pairs: 18, table: 14, quoted: 8}


def conversation(draw: random.Random, filler: Filler) -> Messages:
    """One conversation of a random plan and length."""
    plan = draw.choices(list(PLANS), list(PLANS.values()))[0]
    # Questions and answers come on top of the text.
    messages = plan(draw, filler, draw.randint(SHORTEST_TOKENS, LONGEST_TOKENS - 300))
    if draw.random() < 0.15:
        messages.insert(0, {"role": "system", "content": draw.choice(talk.SYSTEMS)})
    return messages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, required=True, help="docs.jsonl of gates_texts.py, for filler")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--count", type=int, default=6_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with options.docs.open() as lines:
        filler = Filler(json.loads(line)["text"] for line in lines)
    draw = random.Random(options.seed)
    made = [conversation(draw, filler) for _ in range(options.count)]
    rows = (json.dumps({"messages": messages}, ensure_ascii=False) for messages in made)
    options.output.write_text("".join(f"{row}\n" for row in rows))
    characters = sum(len(message["content"]) for messages in made for message in messages)
    print(f"{len(made)} conversations, {sum(map(len, made))} messages, {characters:,} characters: {options.output}")


if __name__ == "__main__":
    main()
