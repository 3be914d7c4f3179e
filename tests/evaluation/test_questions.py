"""Questions and conversations: facts where they should be, answers where they are judged, wordings of their own."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.tiny_model import CHAT, byte_tokenizer
from trimkv_core.evaluation.conversation import QUESTIONS, ConversationTask, make_conversations
from trimkv_core.evaluation.dialogue import Turn, write_dialogue
from trimkv_core.evaluation.haystack import (
    KEY_VALUES,
    NEAR_TOKENS,
    NEUTRAL,
    PASSKEYS,
    Family,
    hide,
    paragraphs_of,
)
from trimkv_core.evaluation.recall import RecallTask, make_questions
from trimkv_core.evaluation.tasks import Probe, ProbeError, ProbeResult

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TOKENIZER: Any = byte_tokenizer()


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def answers_of(probe: Probe) -> list[str]:
    return [TOKENIZER.decode(probe.ids[span.start : span.stop]).strip() for span in probe.spans]


def test_every_question_asks_for_a_fact_that_stands_in_its_text_once_evictions_have_passed_it() -> None:
    questions = make_questions(TOKENIZER, [], cases=12, lengths=(1024, 2048))
    assert [question.kind for question in questions] == ["passkey"] * 12 + ["key-value"] * 12
    for question in questions:
        text = TOKENIZER.decode(question.probe.ids)
        (value,) = answers_of(question.probe)
        assert re.fullmatch(r"[1-9]\d{4}", value)
        (span,) = question.probe.spans
        last = text[: text.rindex(value)].rindex(value)
        assert span.start - last > NEAR_TOKENS
        assert abs(len(question.probe.ids) - question.length) < 200
        assert last / question.length == pytest.approx(question.depth, abs=0.35)


def test_depths_order_the_facts() -> None:
    pieces = [f"{number:03d}" + "." * 46 for number in range(40)]
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        text = hide(pieces, [(depth, "FACT")], TOKENIZER)
        reach = 40 * 50 - NEAR_TOKENS
        assert text.index("FACT") == pytest.approx(depth * reach, abs=50)
        assert [line for line in text.split("\n") if line != "FACT"] == pieces


def test_every_length_and_depth_come_up_for_every_kind() -> None:
    questions = make_questions(TOKENIZER, [], cases=15)
    for kind in ("passkey", "key-value"):
        pairs = {(question.length, question.depth) for question in questions if question.kind == kind}
        assert len(pairs) == 15


def test_the_seed_decides_everything() -> None:
    one, again, other = (make_questions(TOKENIZER, [], cases=4, lengths=(512,), seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert {question.probe for question in one}.isdisjoint(question.probe for question in other)


def test_text_that_is_prose_is_the_filler() -> None:
    prose = [
        f"This sentence number {number} is long enough to be taken for a paragraph of prose." for number in range(9)
    ]
    found = paragraphs_of(["Title\n\n" + "\n\n".join(prose) + "\n\nx = 3\n\n" + "word " * 300 + "."])
    assert found == prose
    (question, *_) = make_questions(TOKENIZER, prose, cases=1, lengths=(1024,))
    text = TOKENIZER.decode(question.probe.ids)
    assert "This sentence number" in text
    assert not any(sentence in text for sentence in NEUTRAL)


def test_a_right_answer_is_counted_and_a_wrong_digit_is_not() -> None:
    task = RecallTask(make_questions(TOKENIZER, [], cases=2, lengths=(512,)))
    results = []
    for number, probe in enumerate(task.probes):
        best = [probe.ids[at] for at in probe.positions()]
        if number % 2:
            best[-1] += 1
        results.append(ProbeResult((0.0,) * len(best), tuple(best), 1.0))
    flags = {(measure.group, measure.depth): measure.sums for measure in task.measure(results)}
    assert sorted(flags.values()) == [(0.0,), (0.0,), (1.0,), (1.0,)]
    assert {group for group, _ in flags} == {"passkey", "key-value"}


def test_a_conversation_asks_for_what_was_told_before_the_talk() -> None:
    (talk,) = make_conversations(TOKENIZER, [], cases=1, lengths=(512,))
    text = TOKENIZER.decode(talk.probe.ids)
    values = answers_of(talk.probe)
    assert len(set(values)) == QUESTIONS
    told = text[: talk.probe.spans[0].start]
    for value in values:
        assert value in told
    # Between the last fact and the first question lies the talk.
    assert talk.probe.spans[0].start - max(told.rindex(value) for value in values) > 400
    answers = [talk.probe.ids[at] for at in talk.probe.positions()]
    task = ConversationTask([talk])
    (measure,) = task.measure([ProbeResult((0.0,) * len(answers), tuple(answers), 1.0)])
    assert measure.sums == (1.0,) * QUESTIONS


def test_turns_are_what_the_chat_template_writes() -> None:
    turns = [Turn("Hello.", "Good day."), Turn("How old?", "It is", "77"), Turn("And?", "Also", "8")]
    probe = write_dialogue(TOKENIZER, turns)
    messages = []
    for turn, answer in zip(turns, ("Good day.", "It is 77.", "Also 8"), strict=True):
        messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": answer}]
    whole = TOKENIZER.apply_chat_template(messages, tokenize=False)
    assert TOKENIZER.decode(probe.ids) + "<|end|>" == whole
    assert answers_of(probe) == ["77", "8"]
    # The space before a value is a token of its own here, and given.
    assert TOKENIZER.decode(probe.ids[: probe.spans[0].start]).endswith("It is ")


def test_a_model_without_a_chat_template_gets_plain_lines() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    probe = write_dialogue(tokenizer, [Turn("Hello.", "Good day."), Turn("How old?", "It is", "77")])
    assert tokenizer.decode(probe.ids) == "Question: Hello.\nAnswer: Good day.\nQuestion: How old?\nAnswer: It is 77"


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ProbeError, match="rewrites earlier turns"):
        write_dialogue(tokenizer, [Turn("Hello.", "Good day."), Turn("How old?", "It is", "77")])


def test_a_template_that_writes_a_last_answer_in_another_way_is_no_hindrance() -> None:
    """Qwen3's puts an empty thought before an answer that nothing follows."""
    turns = [Turn("Hello.", "Good day."), Turn("How old?", "It is", "77"), Turn("And?", "Also", "8")]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT.replace(
        "{{ m.content }}", "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"
    )
    assert write_dialogue(tokenizer, turns) == write_dialogue(TOKENIZER, turns)


@pytest.mark.parametrize("family", [*PASSKEYS, *KEY_VALUES], ids=lambda family: family.name)
def test_the_wordings_are_kept_out_of_training(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    facts = import_module("gates_facts")
    wordings = (family.fact, family.question, family.answer)
    trained = [template for kind in facts.KINDS for template in (*kind.statements, *kind.questions, *kind.answers)]
    assert trained
    # What makes the family is on the list of what training must not say, and no template of training's says it.
    reserved = [phrase for phrase in facts.RESERVED if words(phrase) <= set().union(*map(words, wordings))]
    assert reserved
    for template in trained:
        assert not any(phrase in template.lower() for phrase in reserved)
        assert template not in wordings
