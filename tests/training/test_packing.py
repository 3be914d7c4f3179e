from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.tiny_text import chat, make_text, make_tokenizer, write_lines
from trimkv_core.training.batch import IGNORED, PAD_DOCUMENT, PackedBatch
from trimkv_core.training.data import open_data
from trimkv_core.training.documents import DataError
from trimkv_core.training.encoding import DocumentEncoder, DocumentStore
from trimkv_core.training.packing import BatchPlan, BatchStream, Piece, RowStream, build_batch

PLAN = BatchPlan(seq_len=40, batch_size=2, accumulation=1, weights=None, long_seq_len=None, long_every=1, seed=3)


def make_store(
    tmp_path: Path, *groups: list[Any], has_bos: bool = False, assistant_only: bool = False
) -> DocumentStore:
    paths = [write_lines(tmp_path / f"{nth}.jsonl", *items) for nth, items in enumerate(groups)]
    encoder = DocumentEncoder(make_tokenizer(has_bos=has_bos), learns_assistant_only=assistant_only)
    return DocumentStore(open_data([str(path) for path in paths], section_bytes=1 << 20), encoder)


def texts(*lengths: int) -> list[dict[str, str]]:
    return [{"text": make_text(length, seed)} for seed, length in enumerate(lengths)]


def same(left: PackedBatch, right: PackedBatch) -> bool:
    return all(
        torch.equal(getattr(left, field.name), getattr(right, field.name)) for field in dataclasses.fields(PackedBatch)
    )


class TestBatch:
    def test_documents_lie_end_to_end_each_with_its_own_positions(self, tmp_path: Path) -> None:
        store = make_store(tmp_path, texts(5, 4))
        batch = build_batch(store, [[Piece(0, 0, 5, True), Piece(1, 0, 4, True)]], seq_len=12)
        ids = [store.get(0).ids.tolist(), store.get(1).ids.tolist()]
        assert batch.input_ids[0].tolist() == [*ids[0], *ids[1], 0, 0, 0]
        assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]
        assert batch.document[0].tolist() == [0] * 5 + [1] * 4 + [PAD_DOCUMENT] * 3
        assert batch.labels[0].tolist() == [*ids[0][1:], IGNORED, *ids[1][1:], IGNORED, *[IGNORED] * 3]
        assert {getattr(batch, field.name).dtype for field in dataclasses.fields(batch)} == {torch.int64}

    def test_the_last_token_of_a_cut_piece_still_has_its_successor(self, tmp_path: Path) -> None:
        store = make_store(tmp_path, texts(9))
        batch = build_batch(store, [[Piece(0, 2, 6, True)]], seq_len=6)
        ids = store.get(0).ids.tolist()
        assert batch.input_ids[0].tolist() == [*ids[2:6], 0, 0]
        assert batch.labels[0].tolist() == [*ids[3:7], IGNORED, IGNORED]

    def test_every_piece_of_a_text_begins_as_texts_do_that_are_served(self, tmp_path: Path) -> None:
        store = make_store(tmp_path, texts(9), has_bos=True)
        batch = build_batch(store, [[Piece(0, 2, 6, True), Piece(0, 7, 9, True)]], seq_len=9)
        ids = store.get(0).ids.tolist()
        assert batch.input_ids[0].tolist() == [1, *ids[2:6], 1, *ids[7:9], 0]
        assert batch.labels[0].tolist() == [*ids[2:7], *ids[7:9], IGNORED, IGNORED]

    def test_only_successors_that_count_are_labels(self, tmp_path: Path) -> None:
        store = make_store(tmp_path, [chat("hi", "yes")], assistant_only=True)
        length = len(store.get(0).ids)
        batch = build_batch(store, [[Piece(0, 0, length, False)]], seq_len=length)
        labels = batch.labels[0]
        assert make_tokenizer().decode(labels[labels != IGNORED], skip_special_tokens=False) == "yes<im_end>\n"
        at = int((labels != IGNORED).nonzero()[0])
        assert int(labels[at]) == int(batch.input_ids[0, at + 1])


class TestRows:
    def test_an_epoch_holds_every_token_of_every_document_once(self, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setattr("trimkv_core.training.packing._POOL_TOKENS", 100)
        store = make_store(tmp_path, texts(130, 30, 77, 12, 55))
        stream = RowStream(store, range(5), seq_len=40, seed="x")
        seen: dict[int, list[int]] = {number: [] for number in range(5)}
        while stream.state.epoch == 0:
            before = stream.state
            for piece in stream.next_row():
                seen[piece.document] += range(piece.start, piece.stop)
        # What the first epoch left in the pool when the second began, at most.
        left = dict.fromkeys(range(5), 0)
        for piece in before.pool:
            left[piece.document] += piece.stop - piece.start
        for number, tokens in seen.items():
            assert len(set(tokens)) == len(tokens)
            length = len(store.get(number).ids)
            assert length - left[number] <= len(tokens) + 1 <= length + 1 + 40

    def test_texts_are_cut_to_fill_rows_where_it_is_worth_it(self, tmp_path: Path) -> None:
        store = make_store(tmp_path, texts(*range(20, 60)))
        stream = RowStream(store, range(40), seq_len=100, seed="x")
        rows = [stream.next_row() for _ in range(30)]
        lengths = [sum(piece.stop - piece.start for piece in row) for row in rows]
        assert max(lengths) <= 100
        assert min(lengths) > 100 - 16
        assert sum(lengths) / len(lengths) > 95

    def test_conversations_shorter_than_a_row_are_never_cut(self, tmp_path: Path) -> None:
        store = make_store(tmp_path, [chat("q" * (5 + nth % 30), "a") for nth in range(60)])
        stream = RowStream(store, range(60), seq_len=90, seed="x")
        for _ in range(40):
            for piece in stream.next_row():
                assert (piece.start, piece.stop) == (0, len(store.get(piece.document).ids))

    def test_a_conversation_longer_than_a_row_is_cut_into_rows(self, tmp_path: Path) -> None:
        store = make_store(tmp_path, [chat("q" * 300, "a")])
        rows = [RowStream(store, range(1), seq_len=64, seed="x").next_row() for _ in range(2)]
        assert all(piece.stop - piece.start <= 64 for row in rows for piece in row)

    def test_long_rows_take_the_longest_first(self, tmp_path: Path) -> None:
        store = make_store(tmp_path, texts(20, 30, 200, 25, 10))
        stream = RowStream(store, range(5), seq_len=120, seed="x", prefers_long=True)
        assert stream.next_row()[0][:3] == (2, 0, 120)

    def test_documents_without_two_tokens_are_an_error_not_a_search_without_end(self, tmp_path: Path) -> None:
        store = make_store(tmp_path, [{"text": "a"}, {"text": "b"}])
        with pytest.raises(DataError, match="no document has 2 tokens"):
            RowStream(store, range(2), seq_len=8, seed="x").next_row()


class TestBatches:
    @pytest.fixture
    def store(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DocumentStore:
        monkeypatch.setattr("trimkv_core.training.packing._POOL_TOKENS", 200)
        return make_store(tmp_path, texts(130, 30, 77, 12, 55), [chat("hi" * nth, "yes") for nth in range(1, 7)])

    def steps(self, stream: BatchStream, first: int, last: int) -> list[list[PackedBatch]]:
        return [stream.next_step(step) for step in range(first, last + 1)]

    def test_the_same_seed_gives_the_same_batches_and_another_others(self, store: DocumentStore) -> None:
        first, again = (self.steps(BatchStream(store, PLAN), 1, 5) for _ in range(2))
        other = self.steps(BatchStream(store, dataclasses.replace(PLAN, seed=4)), 1, 5)
        assert all(same(a[0], b[0]) for a, b in zip(first, again, strict=True))
        assert not all(same(a[0], b[0]) for a, b in zip(first, other, strict=True))

    @pytest.mark.parametrize("weights", [None, (1.0, 2.0)])
    def test_a_stream_goes_on_where_its_state_was_taken(
        self, store: DocumentStore, weights: tuple[float, ...] | None
    ) -> None:
        plan = dataclasses.replace(PLAN, weights=weights, long_seq_len=90, long_every=3, accumulation=2)
        whole = BatchStream(store, plan)
        self.steps(whole, 1, 7)
        state = whole.state
        expected = self.steps(whole, 8, 20)
        resumed = BatchStream(store, plan)
        resumed.state = state
        for left, right in zip(expected, self.steps(resumed, 8, 20), strict=True):
            assert all(same(a, b) for a, b in zip(left, right, strict=True))

    def test_processes_share_the_rows_that_one_would_have(self, store: DocumentStore) -> None:
        alone = BatchStream(store, dataclasses.replace(PLAN, batch_size=4)).next_step(1)[0]
        shares = [BatchStream(store, PLAN, rank=rank, processes=2).next_step(1)[0] for rank in range(2)]
        assert torch.equal(alone.input_ids, torch.cat([share.input_ids for share in shares]))

    def test_every_nth_step_is_one_long_row(self, store: DocumentStore) -> None:
        stream = BatchStream(store, dataclasses.replace(PLAN, long_seq_len=90, long_every=3))
        shapes = [tuple(batches[0].input_ids.shape) for batches in self.steps(stream, 1, 6)]
        assert shapes == [(2, 40), (2, 40), (1, 90)] * 2

    def test_weights_decide_how_many_rows_come_from_where(self, store: DocumentStore) -> None:
        stream = BatchStream(store, dataclasses.replace(PLAN, weights=(1.0, 3.0), batch_size=100))
        rows = stream.next_step(1)[0]
        chats = int((rows.input_ids[:, 0] == 2).sum())  # rows that begin with a turn
        assert 60 < chats < 90

    def test_looking_at_the_first_row_takes_none(self, store: DocumentStore) -> None:
        stream = BatchStream(store, PLAN)
        first = stream.first_row()
        assert torch.equal(stream.next_step(1)[0].input_ids[:1], first.input_ids)

    def test_the_largest_step_is_known(self) -> None:
        plan = dataclasses.replace(PLAN, long_seq_len=90, accumulation=3)
        assert plan.tokens(2) == 90 * 3 * 2
        assert PLAN.tokens(2) == 40 * 2 * 2
