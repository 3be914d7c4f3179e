"""What the end of an answer promises: it is where the rules say, and no text goes out that should not have."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from service.engine.interface import FinishReason, SamplingParams
from service.generation.stopping import AnswerStream, Step

EOS, OTHER_END, STOP, LENGTH = 0, 1, FinishReason.STOP, FinishReason.LENGTH
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def make_tokenizer(words: Sequence[str]) -> Tokenizer:
    """Byte-level; every byte and every one of `words` (ASCII without spaces) is a token."""
    pieces = list(dict.fromkeys(["<end>", "<stop>", *BYTES, *words]))
    tokenizer = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]))
    tokenizer.add_special_tokens(["<end>", "<stop>"])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def run(pieces: Sequence[str | int], **params: object) -> list[Step]:
    """The steps of an answer whose tokens have the texts `pieces`, up to its end; a number is a token id."""
    tokenizer = make_tokenizer([piece for piece in pieces if isinstance(piece, str)])
    sampling = dataclasses.replace(SamplingParams(max_tokens=10_000), **params)  # type: ignore[arg-type]
    answer = AnswerStream(tokenizer, sampling, eos_token_ids=(EOS,))
    steps = []
    for piece in pieces:
        steps.append(answer.push(piece if isinstance(piece, int) else tokenizer.token_to_id(piece)))
        if steps[-1].finish_reason is not None:
            break
    return steps


def texts(steps: Sequence[Step]) -> list[str]:
    return [step.text for step in steps]


def outcome(steps: Sequence[Step]) -> tuple[str, FinishReason | None]:
    return "".join(texts(steps)), steps[-1].finish_reason


def cut_at_stop(text: str, stops: Sequence[str], *, include: bool) -> str | None:
    """The definition: the text before (or up to) the stop string that is complete first, the longest of several."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[:end] if include else text[: end - max(map(len, complete))]
    return None


@settings(max_examples=1000, deadline=None)
@given(
    pieces=st.lists(st.text(alphabet="abc", min_size=1, max_size=5), min_size=1, max_size=12),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=6), max_size=4),
    include=st.booleans(),
)
@example(pieces=["aab", "aabaaa"], stops=["aabaaa"], include=False)
@example(pieces=["abcd"], stops=["abcd", "bc"], include=False)
def test_the_streamed_text_is_the_text_cut_at_the_first_stop_however_it_is_split(
    pieces: list[str], stops: list[str], include: bool
) -> None:
    text = "".join(pieces)
    steps = run(pieces, stop=tuple(stops), include_stop_str_in_output=include, max_tokens=len(pieces))
    expected = cut_at_stop(text, stops, include=include)
    assert outcome(steps) == ((text, LENGTH) if expected is None else (expected, STOP))


@settings(max_examples=500, deadline=None)
@given(
    pieces=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=12),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=6), min_size=1, max_size=3),
)
def test_no_more_text_is_held_back_than_may_become_a_stop(pieces: list[str], stops: list[str]) -> None:
    released, so_far = "", ""
    for piece, step in zip(pieces, run(pieces, stop=tuple(stops)), strict=False):
        released, so_far = released + step.text, so_far + piece
        if step.finish_reason is None:
            held = so_far[len(released) :]
            assert so_far == released + held
            assert held == max(
                (so_far[-n:] for stop in stops for n in range(1, len(stop)) if so_far[-n:] == stop[:n]),
                key=len,
                default="",
            )


def test_a_stop_string_over_several_tokens_is_held_back_and_dropped() -> None:
    steps = run(["ab", "xE", "N", "D", "never"], stop=("END",))
    assert texts(steps) == ["ab", "x", "", ""]
    assert steps[-1].finish_reason is STOP


def test_text_held_back_goes_out_once_it_cannot_become_a_stop() -> None:
    assert texts(run(["xE", "N", "x", "EN", "EN", "q"], stop=("END",))) == ["x", "", "ENx", "", "EN", "ENq"]


def test_the_stop_string_that_is_complete_first_wins() -> None:
    assert (
        outcome(run(["abcd"], stop=("abcd", "bc"))) == outcome(run(["a", "b", "c"], stop=("abcd", "bc"))) == ("a", STOP)
    )


def test_an_included_stop_string_stays_and_what_follows_it_goes() -> None:
    steps = run(["xE", "NDy", "z"], stop=("END",), include_stop_str_in_output=True)
    assert texts(steps) == ["xE", "ND"]
    assert steps[-1].finish_reason is STOP


@pytest.mark.parametrize("end", [EOS, OTHER_END])
def test_end_tokens_stop_without_their_own_text(end: int) -> None:
    tokens = ["ab", end, "never"]
    assert outcome(run(tokens, stop_token_ids=(OTHER_END,))) == ("ab", STOP)


def test_the_text_of_an_ordinary_stop_token_is_dropped() -> None:
    tokenizer = make_tokenizer([])
    stop_id = tokenizer.token_to_id("b")
    assert outcome(run(["a", "b"], stop_token_ids=(stop_id,), include_stop_str_in_output=True)) == ("a", STOP)


def test_ignored_end_tokens_do_not_stop_but_stop_token_ids_do() -> None:
    assert outcome(run(["a", EOS, "b", OTHER_END], ignore_eos=True, stop_token_ids=(OTHER_END,))) == ("ab", STOP)
    assert outcome(run(["a", EOS, "b"], ignore_eos=True, stop_token_ids=(EOS,))) == ("a", STOP)


def test_the_end_releases_what_was_held_back() -> None:
    assert outcome(run(["aE", "N", EOS], stop=("END",))) == ("aEN", STOP)
    assert outcome(run(["aE", "N"], stop=("END",), max_tokens=2)) == ("aEN", LENGTH)


def test_half_a_character_is_released_at_the_end_as_a_replacement() -> None:
    half = make_tokenizer([]).token_to_id("â")  # 0xE2
    assert outcome(run(["a", half], max_tokens=2)) == ("a\ufffd", LENGTH)
    assert outcome(run(["a", half, EOS])) == ("a\ufffd", STOP)


def test_a_stop_on_the_last_token_is_a_stop() -> None:
    assert outcome(run(["aEN", "D"], stop=("END",), max_tokens=2)) == ("a", STOP)
    assert outcome(run(["a", EOS], max_tokens=2)) == ("a", STOP)
    assert outcome(run(["a", "b"], max_tokens=2)) == ("ab", LENGTH)


def test_nothing_stops_before_min_tokens_are_generated() -> None:
    assert outcome(run(["a", EOS, "END", "b", "END"], stop=("END",), min_tokens=3)) == ("aENDb", STOP)
    assert outcome(run(["a", EOS, "b", EOS], min_tokens=2)) == ("ab", STOP)


def test_a_stop_string_begun_before_min_tokens_counts_when_a_later_token_completes_it() -> None:
    assert outcome(run(["aE", "N", "Db"], stop=("END",), min_tokens=2)) == ("a", STOP)


def test_a_stop_string_may_begin_in_one_that_came_too_early() -> None:
    assert outcome(run(["aa", "a"], stop=("aa",), min_tokens=1)) == ("a", STOP)


def test_the_first_token_after_a_prompt_keeps_its_space() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"▁a": 0, "▁b": 1}, merges=[]))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    params = SamplingParams(max_tokens=5)
    assert AnswerStream(tokenizer, params, eos_token_ids=(), prompt_ids=[0]).push(1).text == " b"
    assert AnswerStream(tokenizer, params, eos_token_ids=()).push(1).text == "b"


def test_a_character_split_over_tokens_can_complete_a_stop_string() -> None:
    tokens = ["a", *(make_tokenizer([]).token_to_id(letter) for letter in "Ã©")]  # 0xC3 0xA9
    assert outcome(run(tokens, stop=("é",))) == ("a", STOP)


def test_an_empty_stop_string_is_none() -> None:
    assert outcome(run(["a", EOS], stop=("",))) == ("a", STOP)


def test_a_token_costs_the_same_early_and_late_even_with_hostile_stop_strings() -> None:
    tokenizer = make_tokenizer(["a"])
    params = SamplingParams(max_tokens=10**6, stop=tuple("a" * (1000 + n) + "b" for n in range(16)))
    answer = AnswerStream(tokenizer, params, eos_token_ids=(EOS,))
    token_id = tokenizer.token_to_id("a")
    started = time.perf_counter()
    for _ in range(20_000):
        answer.push(token_id)
    assert time.perf_counter() - started < 5
