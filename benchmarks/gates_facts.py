"""Invented facts for recall training: twenty-two kinds, each with its own words to state it, ask for it and answer.

Owns the templates and the facts made of them; the values are `gates_words`'. Knows no conversation.
`RESERVED` lists wordings kept for evaluation, which may occur in no template and in no filler.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import gates_words as words
from gates_words import Draw, split

RESERVED = split(
    "the pass key is|special magic number|the grass is green|the sky is blue|access token|locker|registry record|beacon"
    "|the vault in|facts are hidden in it|i will remember that|i have noted it|thank you, i have read it",
    "|",
)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fact; in its templates {s} is whose or what, and {v} what is to be recalled.

    Attributes:
        label: the name of the value, as a table's column heads it.
    """

    label: str
    subject: Draw
    value: Draw
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact with its value."""

    kind: Kind
    subject: str
    value: str

    def say(self, draw: random.Random, templates: tuple[str, ...]) -> str:
        template = draw.choice(templates)
        text = template.format(s=self.subject, v=self.value)
        # Names of settings and libraries keep their case.
        is_name = "_" in self.subject or self.subject.startswith("lib")
        return text[0].upper() + text[1:] if template.startswith("{s}") and not is_name else text

    def answer(self, draw: random.Random) -> str:
        return self.value if draw.random() < 0.5 else self.say(draw, self.kind.answers)


def facts(draw: random.Random, count: int, *, kind: Kind | None = None) -> list[Fact]:
    """Facts of no repeated subject and no value within another's; of one given kind, or of a few."""
    kinds = [kind] if kind else draw.sample(KINDS, min(len(KINDS), draw.randint(1, max(1, count))))
    made: list[Fact] = []
    while len(made) < count:
        chosen = draw.choice(kinds)
        new = Fact(chosen, chosen.subject(draw), chosen.value(draw))
        if not any(new.subject == old.subject or new.value in old.value or old.value in new.value for old in made):
            made.append(new)
    return made


def _kind(label: str, subject: Draw, value: Draw, *templates: str) -> Kind:
    """A kind with its statements, questions and answers, each of them one text with bars between."""
    statements, questions, answers = (split(text, "|") for text in templates)
    return Kind(label, subject, value, statements, questions, answers)


KINDS = (
    _kind(
        "door code", words.room, words.digits,
        "The door code of {s} is {v}.|To get into {s}, type {v} on the keypad.|{s} opens with the code {v}."
        "|Keypad code for {s}: {v}.",
        "What is the door code of {s}?|Which code opens {s}?|What do I type on the keypad of {s}?",
        "The door code of {s} is {v}.|It is {v}.",
    ),
    _kind(
        "extension", words.person, words.digits,
        "{s} can be reached at extension {v}.|The extension of {s} is {v}.|Dial {v} to speak to {s}.",
        "What is {s}'s extension?|Which number do I dial for {s}?|How do I reach {s} by phone?",
        "Dial {v}.|{s} has extension {v}.",
    ),
    _kind(
        "city", words.person, words.city,
        "{s} lives in {v}.|The home town of {s} is {v}.|{s} moved to {v} last year.",
        "Where does {s} live?|In which city is {s} at home?|Which town did {s} move to?",
        "{s} lives in {v}.|In {v}.",
    ),
    _kind(
        "price", lambda draw: f"the {words.thing(draw)}", words.price,
        "{s} costs {v}.|The price of {s} is {v}.|They sell {s} for {v}.|We paid {v} for {s}.",
        "How much does {s} cost?|What is the price of {s}?|How much was paid for {s}?",
        "{s} costs {v}.|{v} was the price.",
    ),
    _kind(
        "appointment", lambda draw: f"{draw.choice(words.FIRST)}'s {draw.choice(words.VISITS)}", words.moment,
        "The appointment with {s} is on {v}.|We see {s} on {v}.|{s} expects us on {v}.",
        "When is the appointment with {s}?|On what day and at what time do we see {s}?|When does {s} expect us?",
        "On {v}.|The appointment is on {v}.",
    ),
    _kind(
        "stock", lambda draw: f"{draw.choice(words.ADJECTIVES)} {draw.choice(words.WARES)}", words.digits,
        "There are {v} {s} in stock.|The warehouse holds {v} {s}.|Inventory count for {s}: {v}.",
        "How many {s} are in stock?|What is the inventory count for {s}?|How many {s} does the warehouse hold?",
        "There are {v} {s} in stock.|{v} of them.",
    ),
    _kind(
        "password", lambda draw: f"the {words.word(draw)} account", words.password,
        "The password of {s} is {v} .|Log in to {s} with the password {v} .|{s} was given the password {v} .",
        "What is the password of {s}?|How do I log in to {s}? Give the password.|Which password belongs to {s}?",
        "The password is {v} .|{v}",
    ),
    _kind(
        "birthday", words.person, words.date,
        "{s} was born on {v}.|{s}'s birthday is {v}.|We celebrate {s} on {v}.",
        "When is {s}'s birthday?|On which date was {s} born?|On what date do we celebrate {s}?",
        "{s}'s birthday is {v}.|On {v}.",
    ),
    _kind(
        "gate", words.flight, words.place,
        "{s} leaves from gate {v}.|Boarding for {s} is at gate {v}.|Go to gate {v} for {s}.",
        "From which gate does {s} leave?|Where is boarding for {s}?|Which gate is {s} at?",
        "{s} leaves from gate {v}.|Gate {v}.",
    ),
    _kind(
        "owner", lambda draw: f"project {words.title(draw)}", words.person,
        "{s} is led by {v}.|The person responsible for {s} is {v}.|{v} took over {s} this spring.",
        "Who leads {s}?|Who is responsible for {s}?|Who took over {s}?",
        "{s} is led by {v}.|{v} does.",
    ),
    _kind(
        "colour", lambda draw: f"{draw.choice(words.FIRST)}'s {draw.choice(words.NOUNS)}", words.colour,
        "{s} is {v}.|The colour of {s} is {v}.|Somebody painted {s} {v}.",
        "What colour is {s}?|In which colour was {s} painted?|Which colour does {s} have?",
        "{s} is {v}.|It is {v}.",
    ),
    _kind(
        "address", lambda draw: f"the {words.word(draw)} server", words.address,
        "{s} has the address {v}.|The IP address of {s} is {v}.|{s} listens on {v}.",
        "What is the IP address of {s}?|On which address does {s} listen?|At which address is {s}?",
        "{s} has the address {v}.|{v}",
    ),
    _kind(
        "pet", words.person, words.name,
        "{s} has a dog called {v}.|The pet of {s} goes by the name of {v}.|{s} named the puppy {v}.",
        "What is {s}'s dog called?|What is the name of {s}'s pet?|How did {s} name the puppy?",
        "The dog is called {v}.|{v} is its name.",
    ),
    _kind(
        "order", words.person, words.code,
        "The order number of {s} is {v}.|{s} placed the order {v}.|Invoice {v} went to {s}.",
        "What is the order number of {s}?|Which order did {s} place?|Which invoice went to {s}?",
        "{s} has order number {v}.|Number {v}.",
    ),
    _kind(
        "plate", words.vehicle, words.code,
        "{s} has the number plate {v}.|The plate on {s} reads {v}.|{s} is registered as {v}.",
        "What is the number plate of {s}?|What does the plate on {s} read?|How is {s} registered?",
        "The plate reads {v}.|{v}",
    ),
    _kind(
        "shelf", lambda draw: f'the book "{words.title(draw)}"', words.place,
        "{s} stands on shelf {v}.|You find {s} on shelf {v}.|Shelf {v} holds {s}.",
        "On which shelf is {s}?|Where do I find {s}?|Which shelf holds {s}?",
        "{s} is on shelf {v}.|On shelf {v}.",
    ),
    _kind(
        "dish", words.person, lambda draw: f"{draw.choice(words.ADJECTIVES)} {draw.choice(words.DISHES)}",
        "{s} ordered the {v}.|For dinner {s} wants the {v}.|{s} always eats the {v}.",
        "What did {s} order?|What does {s} want for dinner?|What does {s} always eat?",
        "The {v}.|{s} has the {v}.",
    ),
    _kind(
        "setting", words.setting, words.digits,
        "Set {s} to {v} in the configuration.|{s} = {v}|The value of {s} must be {v}.|We run with {s} at {v}.",
        "What is {s} set to?|Which value does {s} have?|What should {s} be?",
        "{s} is set to {v}.|{v}",
    ),
    _kind(
        "distance", lambda draw: f"{words.city(draw)} to {words.city(draw)}", words.kilometres,
        "From {s} it is {v}.|The road from {s} is {v} long.|Driving from {s} means {v}.",
        "How far is it from {s}?|How long is the road from {s}?|What distance is it from {s}?",
        "It is {v}.|{v}",
    ),
    _kind(
        "version", lambda draw: f"lib{words.word(draw)}", words.release,
        "We pinned {s} to version {v}.|The current release of {s} is {v}.|{s} {v} fixed the crash.",
        "Which version of {s} is it?|What is the current release of {s}?|To which version is {s} pinned?",
        "Version {v}.|{s} is at version {v}.",
    ),
    _kind(
        "watchword", lambda draw: f"the {draw.choice(words.NOUNS)} club of {words.city(draw)}", words.phrase,
        'The watchword of {s} is "{v}".|Members of {s} greet with "{v}".|Say "{v}" at the door of {s}.',
        "What is the watchword of {s}?|With which words do members of {s} greet?|What do I say at the door of {s}?",
        '"{v}".|The watchword is "{v}".',
    ),
    _kind(
        "job", words.person, lambda draw: f"{draw.choice(words.ADJECTIVES)}-{draw.choice(words.NOUNS)} inspector",
        "{s} works as a {v}.|By trade {s} is a {v}.|{s} was hired as a {v}.",
        "What does {s} work as?|What is {s}'s trade?|As what was {s} hired?",
        "{s} works as a {v}.|As a {v}.",
    ),
)  # fmt: skip
