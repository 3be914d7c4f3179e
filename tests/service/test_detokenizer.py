"""What streaming text promises: the pieces are the decoded whole, and no piece holds half a character."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from service.generation.detokenizer import MAX_UNDECIDED_TOKENS, IncrementalDetokenizer

FAMILY = "👩‍👩‍👧"
TEXTS = [
    "hello world, the quick brown fox",
    "naïve café ünïcode",
    "  spaces   and\nlines",
    f"{FAMILY} 漢字 €",
    "a\ufffdb",
]


def make_byte_level() -> Tokenizer:
    """A byte-level BPE as Qwen's and Llama 3's, where a character may take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ["hello world the quick brown fox naïve"] * 5,
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=["<end>", "<start>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def make_byte_fallback() -> Tokenizer:
    """A SentencePiece-like BPE as Llama 2's: spaces are ▁, unknown characters fall back to bytes."""
    pieces = ["<unk>", "<end>", "▁", "a", "b", "▁a", "▁b", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.BPE(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=[("▁", "a"), ("▁", "b")],
        byte_fallback=True,
        unk_token="<unk>",
    )
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


BYTE_LEVEL = make_byte_level()
BYTE_FALLBACK = make_byte_fallback()
SPECIAL = 0


def stream(tokenizer: Tokenizer, ids: list[int], prompt_ids: list[int] | None = None) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids=prompt_ids or [])
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


def byte_ids(data: bytes) -> list[int]:
    """One token a byte, by the letters that byte-level tokenizers write bytes with."""
    as_they_are = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in as_they_are]
    letters = {byte: chr(byte) for byte in as_they_are} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [BYTE_LEVEL.token_to_id(letters[byte]) for byte in data]


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte_level", "byte_fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_are_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() + 3), max_size=60))
def test_any_ids_stream_to_what_decode_makes_of_them(ids: list[int]) -> None:
    assert "".join(stream(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from([0x61, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0xFF, 0xEF, 0xBF, 0xBD])))
def test_broken_bytes_stream_to_what_decode_makes_of_them(data: list[int]) -> None:
    ids = byte_ids(bytes(data))
    assert "".join(stream(BYTE_LEVEL, ids)) == bytes(data).decode(errors="replace") == BYTE_LEVEL.decode(ids)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab é€😀漢", max_size=40))
def test_byte_fallback_text_streams_to_what_decode_makes_of_it(text: str) -> None:
    ids = BYTE_FALLBACK.encode(text, add_special_tokens=False).ids
    assert "".join(stream(BYTE_FALLBACK, ids)) == BYTE_FALLBACK.decode(ids)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, BYTE_FALLBACK.get_vocab_size() - 1), max_size=60))
def test_broken_byte_fallback_never_raises_and_ends(ids: list[int]) -> None:
    stream(BYTE_FALLBACK, ids)


def test_no_piece_holds_half_a_character() -> None:
    ids = byte_ids(f"a{FAMILY}é".encode())
    pieces = [piece for piece in stream(BYTE_LEVEL, ids) if piece]
    assert pieces == ["a", *FAMILY, "é"]


def test_a_whole_character_goes_out_with_the_token_that_completes_it() -> None:
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL)
    assert [detokenizer.push(token_id) for token_id in byte_ids("é€".encode())] == ["", "é", "", "", "€"]


def test_what_never_became_a_character_is_flushed_as_a_replacement() -> None:
    ids = byte_ids("x€".encode()[:-1])
    assert stream(BYTE_LEVEL, ids) == ["x", "", "", "\ufffd"]


def test_flushing_twice_says_nothing_twice() -> None:
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL)
    detokenizer.push(byte_ids(b"\xe2")[0])
    assert (detokenizer.flush(), detokenizer.flush()) == ("\ufffd", "")


def test_special_tokens_have_no_text_and_break_no_character() -> None:
    first, second = byte_ids("é".encode())
    assert stream(BYTE_LEVEL, [SPECIAL, first, SPECIAL, second, SPECIAL]) == ["", "", "", "é", "", ""]


def test_special_tokens_are_shown_when_asked_for() -> None:
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, skip_special_tokens=False)
    assert detokenizer.push(SPECIAL) == "<end>"


def test_after_a_prompt_the_first_token_keeps_its_space() -> None:
    prompt, answer = BYTE_FALLBACK.encode("a b").ids, [BYTE_FALLBACK.token_to_id("▁b")]
    assert "".join(stream(BYTE_FALLBACK, answer, prompt)) == " b"
    assert "".join(stream(BYTE_FALLBACK, answer)) == BYTE_FALLBACK.decode(answer) == "b"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=30), st.text(alphabet="ab é😀", max_size=20))
def test_a_prompts_text_is_no_part_of_the_answer(prompt_ids: list[int], answer: str) -> None:
    ids = BYTE_LEVEL.encode(answer).ids
    assert "".join(stream(BYTE_LEVEL, ids, prompt_ids)) == answer


def test_a_prompt_that_ends_within_a_character_gives_no_context() -> None:
    first, second = byte_ids("é".encode())
    assert "".join(stream(BYTE_LEVEL, [second, *byte_ids(b"a")], [first])) == "\ufffda"


def test_a_token_without_text_does_not_cost_the_next_one_its_space() -> None:
    tokenizer = make_byte_fallback()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("b", ""), tokenizer.decoder])
    ids = [tokenizer.token_to_id(piece) for piece in ("a", "b", "▁a")]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids) == "a a"


@pytest.mark.parametrize("broken", [b"\xff" * 50, b"\xc3" * 33, "\ufffd".encode() * 20])
def test_text_after_many_broken_bytes_is_whole(broken: bytes) -> None:
    data = b"a" + broken + "é€😀".encode()
    assert "".join(stream(BYTE_LEVEL, byte_ids(data))) == data.decode(errors="replace")


def test_a_model_that_repeats_the_replacement_character_is_heard() -> None:
    ids = byte_ids("\ufffd".encode()) * 3000
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL)
    heard, silent = 0, 0
    for token_id in ids:
        heard, silent = (heard + 1, 0) if detokenizer.push(token_id) else (heard, silent + 1)
        assert silent <= MAX_UNDECIDED_TOKENS
    assert heard > 500


def test_special_tokens_without_end_cost_no_more_each() -> None:
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL)
    for token_id in [*byte_ids(b"ab\xe2"), *[SPECIAL] * 100]:
        detokenizer.push(token_id)
    assert len(detokenizer._undecided) < MAX_UNDECIDED_TOKENS
