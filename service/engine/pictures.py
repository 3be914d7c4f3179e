"""Pictures of single caches: what each stream of a request holds, and how many streams still hold each of its tokens.

Owns the pictures of running requests for as long as they may be shown again, and the last ones of ended requests for a
minute. They are taken on the engine's thread, between two steps: a running request's waits for the device once, and
only when somebody asks; the one at the end copies whole pages on the device and waits for nothing. What a picture shows
is counted by `develop`, on any thread. Knows no text.

Letters: L layers, H KV heads, B block size, P pages, E entries.
"""

from __future__ import annotations

import itertools
import logging
import time
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from service.engine.figures import request_stats, row_of, waiting_stats
from service.engine.interface import KvDetail, RequestStats, StreamChoice, StreamPositions, TooManyPositions
from service.engine.request import RequestState
from trimkv_core.sequences import SequenceTable

logger = logging.getLogger(__name__)

# How long an ended request can be looked at.
ENDED_SECONDS = 60.0
# Ended requests within that time that are kept, and what their positions may take; the oldest ones' go first.
MAX_ENDED = 1024
MAX_ENDED_BYTES = 64 << 20
# A cache larger than this shows its lengths only: four bytes an entry are copied, and all of them are counted.
MAX_LISTED_ENTRIES = 1 << 20
# Positions one answer carries.
MAX_ANSWERED_POSITIONS = 1 << 18
# A picture younger than this is shown again, whoever asks.
MIN_AGE_SECONDS = 0.1
# Pictures take at most 1 part in this many of the engine's time: after one that took c seconds, those that exist are
# shown again for (this − 1)·c.
TIME_SHARE = 10

Integers = npt.NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class CachePicture:
    """A cache at one moment.

    Attributes:
        stats: its figures, without what only the device knows: layers' entries and pages.
        lengths: int32 [L, H].
        pages: int32 [≥ P, B], positions page by page, stream after stream; behind a stream's end and behind all pages
            they mean nothing. None where they were too many, or every stream holds every token.
        holds_all: nothing was ever evicted.
        taken_at: monotonic seconds.
    """

    stats: RequestStats
    lengths: Tensor
    pages: Tensor | None
    block_size: int
    holds_all: bool
    taken_at: float

    @property
    def num_bytes(self) -> int:
        """What it takes for as long as it is kept."""
        return 0 if self.pages is None else self.pages.numel() * self.pages.element_size()

    def to_host(self) -> CachePicture:
        """The same, where anybody can read it; waits for the device."""
        return replace(self, lengths=self.lengths.cpu(), pages=None if self.pages is None else self.pages.cpu())

    def develop(self, choice: StreamChoice | None) -> KvDetail:
        """What a picture on the host shows.

        Raises:
            TooManyPositions: the streams chosen hold more than one answer carries.
        """
        # NumPy, since it stays on this thread: torch would take all cores from the engine.
        lengths: Integers = self.lengths.numpy()
        streams = None if self.pages is None else _streams(lengths.ravel(), self.pages.numpy(), self.block_size)
        pages = 0 if self.stats.phase == "ended" else int((-(-lengths // self.block_size)).sum())
        return KvDetail(
            request=replace(self.stats, layer_entries=tuple(lengths.sum(1).tolist()), pages_used=pages),
            age_seconds=time.monotonic() - self.taken_at,
            head_entries=tuple(tuple(layer) for layer in lengths.tolist()),
            token_streams=self._token_streams(streams),
            positions=None if choice is None else self._positions(streams, choice),
        )

    def _token_streams(self, streams: Integers | None) -> tuple[int, ...] | None:
        seen = self.stats.seen_tokens
        if self.holds_all:
            return (self.lengths.numel(),) * seen
        return None if streams is None else tuple(np.bincount(streams, minlength=seen).tolist())

    def _positions(self, streams: Integers | None, choice: StreamChoice) -> tuple[StreamPositions, ...] | None:
        if streams is None and not self.holds_all:
            return None
        layers, heads = self.lengths.shape
        lengths: list[int] = self.lengths.flatten().tolist()
        ends = list(itertools.accumulate(lengths))
        chosen = [
            (layer, head)
            for layer in (range(layers) if choice.layer is None else (choice.layer,))
            for head in (range(heads) if choice.head is None else (choice.head,))
        ]
        asked = sum(lengths[layer * heads + head] for layer, head in chosen)
        if asked > MAX_ANSWERED_POSITIONS:
            raise TooManyPositions(
                f"{asked:,} positions are more than the {MAX_ANSWERED_POSITIONS:,} one answer carries"
            )

        def held(stream: int) -> tuple[int, ...]:
            if streams is None:
                return tuple(range(lengths[stream]))
            return tuple(np.sort(streams[ends[stream] - lengths[stream] : ends[stream]]).tolist())

        return tuple(
            StreamPositions(layer=layer, head=head, positions=held(layer * heads + head)) for layer, head in chosen
        )


class CachePictures:
    """Takes pictures, and keeps them for as long as they may be of use."""

    def __init__(self) -> None:
        self._running: dict[str, CachePicture] = {}
        self._ended: dict[str, CachePicture] = {}
        self._ended_bytes = 0
        self._not_before = 0.0

    @torch.inference_mode()
    def of_running(self, state: RequestState, table: SequenceTable) -> CachePicture:
        """A request that waits or runs; what is shown may be some tenths of a second old."""
        if state.row is None:
            geometry = table.geometry
            empty = torch.zeros(geometry.num_layers, geometry.num_heads, dtype=torch.int32)
            stats = waiting_stats(state, table)
            return CachePicture(stats, empty, None, geometry.block_size, True, time.monotonic())
        started = time.monotonic()
        request_id = state.request.request_id
        picture = self._running.get(request_id)
        if picture is None or started >= max(picture.taken_at + MIN_AGE_SECONDS, self._not_before):
            picture = _take(state, table).to_host()
            self._running[request_id] = picture
            ended = time.monotonic()
            self._not_before = max(self._not_before, ended + (TIME_SHARE - 1) * (ended - started))
        return picture

    @torch.inference_mode()
    def of_ended(self, request_id: str) -> CachePicture | None:
        """A request that has ended not long ago, as it was then; None for others."""
        self._drop_old()
        picture = self._ended.get(request_id)
        if picture is not None:
            picture = self._ended[request_id] = picture.to_host()
        return picture

    @torch.inference_mode()
    def keep_last(self, state: RequestState, table: SequenceTable) -> None:
        """Remember a request that is about to give its row back."""
        try:
            picture = _take(state, table)
        except torch.OutOfMemoryError:
            # A picture is worth no request.
            logger.warning(
                "no memory to remember the cache of %s; GET /v1/kv will not know it", state.request.request_id
            )
            return
        picture = replace(picture, stats=replace(picture.stats, phase="ended", pages_reserved=0))
        self._ended[state.request.request_id] = picture
        self._ended_bytes += picture.num_bytes
        self._drop_old()

    def forget(self, request_id: str) -> None:
        """A request runs no longer; what `keep_last` was told stays."""
        self._running.pop(request_id, None)

    def _drop_old(self) -> None:
        oldest_allowed = time.monotonic() - ENDED_SECONDS
        # Insertion order is the order of endings.
        while self._ended:
            request_id, picture = next(iter(self._ended.items()))
            if picture.taken_at >= oldest_allowed and len(self._ended) <= MAX_ENDED:
                break
            del self._ended[request_id]
            self._ended_bytes -= picture.num_bytes
        if self._ended_bytes <= MAX_ENDED_BYTES:
            return
        for request_id, picture in self._ended.items():
            if picture.pages is None:
                continue
            self._ended_bytes -= picture.num_bytes
            self._ended[request_id] = replace(picture, pages=None)
            if self._ended_bytes <= MAX_ENDED_BYTES:
                break


def _take(state: RequestState, table: SequenceTable) -> CachePicture:
    """Waits for nothing, so what only the device knows is left at 0. A step launched ahead is in the picture."""
    row = row_of(state)
    holds_all = state.evicted_entries == 0
    is_listed = not holds_all and table.held(row) <= MAX_LISTED_ENTRIES
    return CachePicture(
        stats=request_stats(state, table, layer_entries=(), pages=0),
        lengths=table.lengths_of(row),
        pages=table.page_positions(row) if is_listed else None,
        block_size=table.geometry.block_size,
        holds_all=holds_all,
        taken_at=time.monotonic(),
    )


def _streams(lengths: Integers, pages: Integers, block_size: int) -> Integers:
    """Positions of all entries, [E], stream after stream: `pages` [≥ P, B] without what lies behind streams' ends."""
    counts = -(-lengths // block_size)
    nth = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    filled = np.repeat(lengths, counts) - nth * block_size
    held: Integers = pages[: nth.size][np.arange(block_size) < filled[:, None]]
    return held
