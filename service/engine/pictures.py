"""Pictures of single caches: what each stream of a request holds, and how many streams still hold each of its tokens.

Owns the pictures of running requests for as long as they may be shown again, and the last ones of ended requests for a
minute. All of it happens on the engine's thread, between two steps. A picture of a running request waits for the device
once, and only when somebody asks; the one at the end is copied on the device and waits for nothing. Knows no text.

Letters: L layers, H KV heads, E entries.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from service.engine.figures import request_stats, row_of, waiting_stats
from service.engine.interface import KvDetail, RequestStats, StreamChoice, StreamPositions, TooManyPositions
from service.engine.request import RequestState
from trimkv_core.budget import Geometry
from trimkv_core.sequences import SequenceTable

# How long an ended request can be looked at.
ENDED_SECONDS = 60.0
# Ended requests within that time that are kept, and what their positions may take; the oldest ones' go first.
MAX_ENDED = 1024
MAX_ENDED_BYTES = 64 << 20
# A cache larger than this shows its lengths only: listing entries takes some 50 bytes each for a moment.
MAX_LISTED_ENTRIES = 1 << 20
# Positions one answer carries.
MAX_ANSWERED_POSITIONS = 1 << 18
# A picture younger than this is shown again, whoever asks.
MIN_AGE_SECONDS = 0.1
# Pictures take at most 1 part in this many of the engine's time: after one that took c seconds, those that exist are
# shown again for (this − 1)·c.
TIME_SHARE = 10


@dataclass(frozen=True, slots=True)
class _Picture:
    """A cache at one moment.

    Attributes:
        stats: its figures, without what only the device knows.
        lengths: int32 [L, H].
        positions: int32 [E], stream after stream; None where they were too many, or every stream holds every token.
        holds_all: nothing was ever evicted.
        taken_at: monotonic seconds.
    """

    stats: RequestStats
    lengths: Tensor
    positions: Tensor | None
    holds_all: bool
    taken_at: float

    @property
    def num_bytes(self) -> int:
        return 0 if self.positions is None else self.positions.numel() * self.positions.element_size()


class CachePictures:
    """Takes pictures, and keeps them for as long as they may be of use."""

    def __init__(self) -> None:
        self._running: dict[str, _Picture] = {}
        self._ended: dict[str, _Picture] = {}
        self._ended_bytes = 0
        self._not_before = 0.0

    @torch.inference_mode()
    def of_running(self, state: RequestState, table: SequenceTable, choice: StreamChoice | None) -> KvDetail:
        """A request that waits or runs; what is shown may be some tenths of a second old.

        Raises:
            TooManyPositions: the streams chosen hold more than one answer carries.
        """
        if state.row is None:
            empty = torch.zeros(table.geometry.num_layers, table.geometry.num_heads, dtype=torch.int32)
            nothing = _Picture(waiting_stats(state, table), empty, None, True, time.monotonic())
            return _detail(nothing, choice)
        started = time.monotonic()
        request_id = state.request.request_id
        picture = self._running.get(request_id)
        if picture is None or started >= max(picture.taken_at + MIN_AGE_SECONDS, self._not_before):
            picture = _with_pages(_on_host(_take(state, table)), table.geometry)
            self._running[request_id] = picture
        detail = _detail(picture, choice)
        ended = time.monotonic()
        self._not_before = max(self._not_before, ended + (TIME_SHARE - 1) * (ended - started))
        return detail

    @torch.inference_mode()
    def of_ended(self, request_id: str, choice: StreamChoice | None) -> KvDetail | None:
        """A request that has ended not long ago, as it was then; None for others.

        Raises:
            TooManyPositions: the streams chosen hold more than one answer carries.
        """
        self._drop_old()
        picture = self._ended.get(request_id)
        if picture is None:
            return None
        hosted = _on_host(picture)
        self._ended[request_id] = hosted
        return _detail(hosted, choice)

    @torch.inference_mode()
    def keep_last(self, state: RequestState, table: SequenceTable) -> None:
        """Remember a request that is about to give its row back."""
        picture = _take(state, table)
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
        for request_id, picture in list(self._ended.items()):
            if picture.taken_at >= oldest_allowed and len(self._ended) <= MAX_ENDED:
                break
            del self._ended[request_id]
            self._ended_bytes -= picture.num_bytes
        for request_id, picture in list(self._ended.items()):
            if self._ended_bytes <= MAX_ENDED_BYTES:
                break
            self._ended_bytes -= picture.num_bytes
            self._ended[request_id] = replace(picture, positions=None)


def _take(state: RequestState, table: SequenceTable) -> _Picture:
    """Waits for nothing, so what only the device knows is left at 0. A step launched ahead is in the picture."""
    row = row_of(state)
    holds_all = state.evicted_entries == 0
    is_listed = not holds_all and table.held(row) <= MAX_LISTED_ENTRIES
    return _Picture(
        stats=request_stats(state, table, layer_entries=(), pages=0),
        lengths=table.lengths_of(row),
        positions=table.stream_positions(row) if is_listed else None,
        holds_all=holds_all,
        taken_at=time.monotonic(),
    )


def _on_host(picture: _Picture) -> _Picture:
    positions = None if picture.positions is None else picture.positions.cpu()
    return replace(picture, lengths=picture.lengths.cpu(), positions=positions)


def _with_pages(picture: _Picture, geometry: Geometry) -> _Picture:
    pages = int((-(-picture.lengths // geometry.block_size)).sum())
    return replace(picture, stats=replace(picture.stats, pages_used=pages))


def _detail(picture: _Picture, choice: StreamChoice | None) -> KvDetail:
    """What a picture on the host shows."""
    lengths: list[list[int]] = picture.lengths.tolist()
    stats = replace(picture.stats, layer_entries=tuple(sum(layer) for layer in lengths))
    return KvDetail(
        request=stats,
        age_seconds=time.monotonic() - picture.taken_at,
        head_entries=tuple(tuple(layer) for layer in lengths),
        token_streams=_token_streams(picture),
        positions=None if choice is None else _positions(picture, choice),
    )


def _token_streams(picture: _Picture) -> tuple[int, ...] | None:
    seen = picture.stats.seen_tokens
    if picture.holds_all:
        return (picture.lengths.numel(),) * seen
    if picture.positions is None:
        return None
    return tuple(torch.bincount(picture.positions, minlength=seen).tolist())


def _positions(picture: _Picture, choice: StreamChoice) -> tuple[StreamPositions, ...] | None:
    if picture.positions is None and not picture.holds_all:
        return None
    layers, heads = picture.lengths.shape
    lengths = picture.lengths.flatten().tolist()
    ends = list(itertools.accumulate(lengths))
    chosen = [
        (layer, head)
        for layer in (range(layers) if choice.layer is None else (choice.layer,))
        for head in (range(heads) if choice.head is None else (choice.head,))
    ]
    asked = sum(lengths[layer * heads + head] for layer, head in chosen)
    if asked > MAX_ANSWERED_POSITIONS:
        raise TooManyPositions(f"{asked:,} positions are more than the {MAX_ANSWERED_POSITIONS:,} one answer carries")

    def held(stream: int) -> tuple[int, ...]:
        if picture.positions is None:
            return tuple(range(lengths[stream]))
        return tuple(picture.positions[ends[stream] - lengths[stream] : ends[stream]].sort().values.tolist())

    return tuple(
        StreamPositions(layer=layer, head=head, positions=held(layer * heads + head)) for layer, head in chosen
    )
