"""Growing and ending sequences on the device, against the sequence table."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.mirror import Mirror
from trimkv_core.kernels.allocate import add_entries, release


@pytest.mark.parametrize("block_size", [1, 5, 16])
def test_every_token_gets_the_next_place_of_every_stream(block_size: int, device: torch.device) -> None:
    mirror = Mirror(layers=2, heads=9, dim=2, block_size=block_size, rows=2, device=device, num_pages=300)
    memory = mirror.memory
    for step in range(7):
        rows = [[0, 1], [1], [memory.null_row, 0, memory.null_row]][step % 3]
        slots, first_page, position = mirror.feed(rows)
        mirror.check()
        for nth, row in enumerate(rows):
            if row == memory.null_row:
                assert slots[:, nth].tolist() == [memory.null_page * block_size] * 18
                continue
            assert int(position[nth]) == int(memory.seen[row]) - 1
            listed = int(memory.starts[row])
            for stream, pages in enumerate(mirror.pages_of(row)):
                assert int(first_page[nth, stream]) == listed
                listed += pages.numel()
                last = int(memory.lengths[row, stream]) - 1
                assert int(slots[stream, nth]) == int(pages[-1]) * block_size + last % block_size


def test_released_rows_give_every_page_back_and_start_anew(device: torch.device) -> None:
    mirror = Mirror(layers=1, heads=3, dim=2, block_size=2, rows=3, device=device, num_pages=40)
    for _ in range(5):
        mirror.feed([2, 0, 1])
    kept = torch.cat(mirror.pages_of(1)).tolist()
    release(mirror.memory, mirror.index([2, mirror.memory.null_row, 0]))
    free = mirror.memory.free[: int(mirror.memory.num_free)].tolist()
    assert sorted(free + kept) == list(range(40))
    assert mirror.memory.lengths.tolist() == [[0] * 3, [5] * 3, [0] * 3, [0] * 3]
    assert mirror.memory.seen.tolist() == [0, 5, 0, 0]


def test_what_is_not_there_is_taken_from_the_null_page_and_shows(device: torch.device) -> None:
    mirror = Mirror(layers=1, heads=3, dim=2, block_size=2, rows=1, device=device, num_pages=2)
    memory = mirror.memory
    slots = mirror.index([[0], [0], [0]])  # type: ignore[list-item]
    row = mirror.index([0])
    add_entries(memory, row, slots=slots, first_page=mirror.index([[0] * 3]), position=mirror.index([0]))  # type: ignore[list-item]
    assert int(memory.num_free) == -1
    assert sorted(slots.flatten().tolist()) == [0, 2, memory.null_page * 2]
