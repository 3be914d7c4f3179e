"""Documents → rows → batches, in an order that only the seed decides and that can be taken up again anywhere.

Owns where in the data a run stands. Every process of a run packs the same rows and computes those that are its own.
Knows token ids and no tokenizer, no model and no loss.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from trimkv_core.training.batch import IGNORED, PAD_DOCUMENT, PackedBatch
from trimkv_core.training.documents import DataError
from trimkv_core.training.encoding import MIN_TOKENS, DocumentStore

# Rows are drawn from a pool of pieces: large enough to mix documents and to fill rows, small enough to be tokenised
# before the first step.
_POOL_TOKENS = 1 << 18
_POOL_PIECES = 1024
# Room that is filled by cutting a text; less is left to padding.
_MIN_CUT = 16


class Piece(NamedTuple):
    """Tokens `start` to `stop` of a document."""

    document: int
    start: int
    stop: int
    is_text: bool


@dataclass(frozen=True, slots=True)
class StreamState:
    """Where a stream of rows stands: its epoch, how far in its order of documents, rows drawn, and the pool."""

    epoch: int
    cursor: int
    rows: int
    pool: tuple[Piece, ...]


class RowStream:
    """Rows of one length out of some documents, without end: a new order of the documents every epoch.

    A document longer than a row is cut into pieces. A row begins with a piece drawn from the pool and takes the largest
    that still fit; when none does, a text is cut to fill it. Conversations are never cut to fill a row.
    """

    def __init__(
        self, store: DocumentStore, members: range, *, seq_len: int, seed: str, prefers_long: bool = False
    ) -> None:
        self._store, self._members, self._seq_len, self._seed = store, members, seq_len, seed
        self._prefers_long = prefers_long
        self._prefix = len(store.prefix)
        if seq_len < self._prefix + MIN_TOKENS:
            raise DataError(f"--seq-len={seq_len} leaves no room for a text after its {self._prefix} first tokens")
        self._epoch, self._cursor, self._rows = 0, 0, 0
        self._pool: list[Piece] = []
        self._pooled = 0
        self._added = 0  # pieces, in this epoch
        self._order = self._shuffled()

    @property
    def state(self) -> StreamState:
        """To go on from here later."""
        return StreamState(self._epoch, self._cursor, self._rows, tuple(self._pool))

    @state.setter
    def state(self, state: StreamState) -> None:
        self._epoch, self._cursor, self._rows = state.epoch, state.cursor, state.rows
        self._pool = [Piece(*piece) for piece in state.pool]
        self._pooled = sum(self._length(piece) for piece in self._pool)
        self._added = 1 if state.cursor else 0
        self._order = self._shuffled()

    def next_row(self) -> list[Piece]:
        """The pieces of the next row, at most `seq_len` tokens with their prefixes."""
        self._fill_pool()
        first = random.Random(f"{self._seed} row {self._rows}").randrange(len(self._pool))
        if self._prefers_long:
            first = max(range(len(self._pool)), key=lambda at: self._length(self._pool[at]))
        self._rows += 1
        row, room = [], self._seq_len
        at: int | None = first
        while at is not None:
            piece = self._take(at)
            row.append(piece)
            room -= self._length(piece)
            at = self._largest_that_fits(room)
        if room >= self._prefix + _MIN_CUT:
            row += self._cut(room)
        return row

    def _shuffled(self) -> np.ndarray:
        # numpy's own generators promise the same numbers in every release only for PCG64's raw stream; `Random` does.
        order = list(self._members)
        random.Random(f"{self._seed} epoch {self._epoch}").shuffle(order)
        return np.array(order, dtype=np.int64)

    def _length(self, piece: Piece) -> int:
        return piece.stop - piece.start + (self._prefix if piece.is_text else 0)

    def _fill_pool(self) -> None:
        wanted = max(_POOL_TOKENS, 4 * self._seq_len)
        while self._pooled < wanted and (len(self._pool) < _POOL_PIECES or self._pooled < 2 * self._seq_len):
            if self._cursor == len(self._order):
                if self._added == 0:
                    raise DataError(f"no document has {MIN_TOKENS} tokens or more: there is nothing to train on")
                self._epoch, self._cursor, self._added = self._epoch + 1, 0, 0
                self._order = self._shuffled()
            number = int(self._order[self._cursor])
            self._cursor += 1
            document = self._store.get(number)
            room = self._seq_len - (self._prefix if document.is_text else 0)
            for start in range(0, len(document.ids), room):
                self._put(Piece(number, start, min(start + room, len(document.ids)), document.is_text))

    def _put(self, piece: Piece) -> None:
        if piece.stop - piece.start >= MIN_TOKENS:
            self._pool.append(piece)
            self._pooled += self._length(piece)
            self._added += 1

    def _take(self, at: int) -> Piece:
        piece = self._pool.pop(at)
        self._pooled -= self._length(piece)
        return piece

    def _largest_that_fits(self, room: int) -> int | None:
        best, best_length = None, 0
        for at, piece in enumerate(self._pool):
            length = self._length(piece)
            if best_length < length <= room:
                best, best_length = at, length
        return best

    def _cut(self, room: int) -> list[Piece]:
        """The beginning of the longest text of the pool, `room` tokens of it; the rest goes back."""
        texts = [at for at, piece in enumerate(self._pool) if piece.is_text]
        if not texts:
            return []
        piece = self._take(max(texts, key=lambda at: self._length(self._pool[at])))
        middle = piece.start + room - self._prefix
        self._put(piece._replace(start=middle))
        return [piece._replace(stop=middle)]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """How rows make up a step.

    Attributes:
        seq_len: tokens a row.
        batch_size: rows a process computes at once.
        accumulation: batches a process sums up.
        weights: share of rows from each group of documents; None: in proportion to their tokens.
        long_seq_len: tokens of the single row a batch has in every `long_every`-th step; None: no such steps.
        seed: of every order.
    """

    seq_len: int
    batch_size: int
    accumulation: int
    weights: tuple[float, ...] | None
    long_seq_len: int | None
    long_every: int
    seed: int

    def is_long(self, step: int) -> bool:
        """Whether step `step`, counted from 1, is one of long rows."""
        return self.long_seq_len is not None and step % self.long_every == 0

    def tokens(self, processes: int) -> int:
        """Tokens that the largest step takes at most, over all processes."""
        long = self.long_seq_len or 0
        return max(self.seq_len * self.batch_size, long) * self.accumulation * processes


class BatchStream:
    """The batches of every step of one process."""

    def __init__(self, store: DocumentStore, plan: BatchPlan, *, rank: int = 0, processes: int = 1) -> None:
        self._store, self._plan, self._rank, self._processes = store, plan, rank, processes
        everything = [range(len(store))]
        groups = everything if plan.weights is None else store.members
        self._rows = 0
        self._streams = [
            RowStream(store, members, seq_len=plan.seq_len, seed=f"{plan.seed} group {nth}")
            for nth, members in enumerate(groups)
        ]
        self._count = len(self._streams)
        if plan.long_seq_len is not None:
            self._streams += [
                RowStream(store, members, seq_len=plan.long_seq_len, seed=f"{plan.seed} long {nth}", prefers_long=True)
                for nth, members in enumerate(groups)
            ]

    @property
    def state(self) -> tuple[int, tuple[StreamState, ...]]:
        """Rows drawn so far, and the state of every stream."""
        return self._rows, tuple(stream.state for stream in self._streams)

    @state.setter
    def state(self, state: tuple[int, Sequence[StreamState]]) -> None:
        self._rows = state[0]
        for stream, its_state in zip(self._streams, state[1], strict=True):
            stream.state = its_state

    def next_step(self, step: int) -> list[PackedBatch]:
        """The batches of this process for step `step`, counted from 1; steps must be asked for one after another."""
        is_long = self._plan.is_long(step)
        rows = 1 if is_long else self._plan.batch_size
        length = self._plan.long_seq_len if is_long and self._plan.long_seq_len else self._plan.seq_len
        batches = []
        for _ in range(self._plan.accumulation):
            drawn = [[self._draw(is_long) for _ in range(rows)] for _ in range(self._processes)]
            batches.append(build_batch(self._store, drawn[self._rank], seq_len=length))
        return batches

    def first_row(self) -> PackedBatch:
        """The first row there is, of any process; the stream stays where it stands."""
        before = self.state
        row = self._draw(is_long=False)
        self.state = before
        return build_batch(self._store, [row], seq_len=self._plan.seq_len)

    def _draw(self, is_long: bool) -> list[Piece]:
        group = 0
        if self._plan.weights is not None:
            chance = random.Random(f"{self._plan.seed} draw {self._rows}")
            group = chance.choices(range(self._count), weights=self._plan.weights)[0]
        self._rows += 1
        return self._streams[group + (self._count if is_long else 0)].next_row()


def build_batch(store: DocumentStore, rows: Sequence[Sequence[Piece]], *, seq_len: int) -> PackedBatch:
    """Lay the pieces of rows end to end; what is left of a row is padding."""
    shape = (len(rows), seq_len)
    ids, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    labels, documents = np.full(shape, IGNORED, dtype=np.int64), np.full(shape, PAD_DOCUMENT, dtype=np.int64)
    for row, pieces in enumerate(rows):
        at = 0
        for number, piece in enumerate(pieces):
            encoded = store.get(piece.document)
            # One more token than the piece has, where the document goes on: the last token's successor.
            tail = encoded.ids[piece.start : piece.stop + 1].astype(np.int64)
            counts = None if encoded.counted is None else encoded.counted[piece.start : piece.stop + 1]
            if piece.is_text and len(store.prefix):
                tail = np.concatenate([store.prefix.astype(np.int64), tail])
            length = len(tail) - (len(encoded.ids) > piece.stop)
            successors = tail[1 : length + 1].copy()
            if counts is not None:
                successors[~counts[1 : length + 1]] = IGNORED
            ids[row, at : at + length] = tail[:length]
            labels[row, at : at + len(successors)] = successors
            positions[row, at : at + length] = np.arange(length)
            documents[row, at : at + length] = number
            at += length
    return PackedBatch(*(torch.from_numpy(part) for part in (ids, labels, positions, documents)))
