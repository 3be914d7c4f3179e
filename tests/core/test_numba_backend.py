"""The numba backend against the reference, and against itself: a row's answer is its own to the last bit.

Letters as in `trimkv_core.attention.numba`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numba
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimkv_core.attention.base import PagedStep
from trimkv_core.attention.numba import NumbaBackend
from trimkv_core.attention.select import select_backend
from trimkv_core.attention.torch import TorchBackend
from trimkv_core.batches import Segment
from trimkv_core.budget import Budget, Geometry
from trimkv_core.cpu.attention import BLOCK_TOKENS
from trimkv_core.pages import PagePool
from trimkv_core.sequences import SequenceTable

CPU = torch.device("cpu")
LAYERS, HEADS, SCALE = 2, 3, 0.3
# Around a tile of 6 rows, a panel of 16 entries and a task of 48 tokens.
CHUNKS = (2, 5, 6, 7, 15, 16, 17, BLOCK_TOKENS - 1, BLOCK_TOKENS, BLOCK_TOKENS + 1, 96, 97, 130)


@dataclass(frozen=True)
class Shape:
    block_size: int
    dim: int
    group: int
    dtype: torch.dtype = torch.float32

    def table(self, rows: int, *, dtype: torch.dtype | None = None, pages: int = 0) -> SequenceTable:
        """Of some rows; with no number of pages it grows."""
        dtype = dtype or self.dtype
        geometry = Geometry(LAYERS, HEADS, self.dim, self.block_size, kv_itemsize=dtype.itemsize)
        return SequenceTable(PagePool(geometry, pages or 4, dtype=dtype), rows, can_grow=not pages)


@dataclass(frozen=True)
class Fed:
    """What some tokens bring: query [L, T, H·G, D], key and value [L, T, H, D], log β [L, T, H]."""

    query: Tensor
    key: Tensor
    value: Tensor
    log_beta: Tensor

    @staticmethod
    def draw(shape: Shape, tokens: int, generator: torch.Generator) -> Fed:
        def normal(heads: int) -> Tensor:
            return torch.randn(LAYERS, tokens, heads, shape.dim, generator=generator).to(shape.dtype)

        # Streams differ by far in how fast they forget: a shared budget leaves some of them empty.
        speed = torch.logspace(-3, 2, LAYERS * HEADS).view(LAYERS, 1, HEADS)
        log_beta = -speed * (torch.rand(LAYERS, tokens, HEADS, generator=generator) + 0.1)
        return Fed(normal(HEADS * shape.group), normal(HEADS), normal(HEADS), log_beta)

    @staticmethod
    def pack(parts: Sequence[Fed]) -> Fed:
        return Fed(*(torch.cat([getattr(part, name) for part in parts], 1) for name in Fed.__dataclass_fields__))

    def cut(self, start: int, stop: int) -> Fed:
        return Fed(*(getattr(self, name)[:, start:stop] for name in Fed.__dataclass_fields__))

    def float(self) -> Fed:
        return Fed(*(getattr(self, name).float() for name in Fed.__dataclass_fields__))


def attend(
    backend: NumbaBackend | TorchBackend,
    table: SequenceTable,
    fed: Sequence[tuple[int, Fed]],
    window: int | None = None,
) -> list[Tensor]:
    """One step of rows and what they are fed, single tokens first: [L, T, H·G, D] for each."""
    tokens = [part.key.shape[1] for _, part in fed]
    segments = [Segment(row, count) for (row, _), count in zip(fed, tokens, strict=True)]
    packed = Fed.pack([part for _, part in fed])
    step: PagedStep[object] = PagedStep(backend, table, table.extend(segments))  # type: ignore[arg-type]
    layers = [
        step.layer(
            layer,
            packed.query[layer],
            packed.key[layer],
            packed.value[layer],
            log_beta=packed.log_beta[layer],
            scale=SCALE,
            window=window,
        )
        for layer in range(LAYERS)
    ]
    return list(torch.stack(layers).split(tokens, 1))


shapes = st.builds(
    Shape,
    block_size=st.sampled_from([1, 5, 16, 32]),
    dim=st.sampled_from([8, 64, 80]),
    group=st.sampled_from([1, 3, 4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)


# ---- against the reference -------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    shape=shapes,
    rounds=st.lists(st.lists(st.sampled_from([0, 1, 1, 1, *CHUNKS]), min_size=4, max_size=4), min_size=1, max_size=5),
    memory=st.integers(1, 12),
    window=st.sampled_from([None, None, 1, 4, 40]),
    seed=st.integers(0, 10_000),
)
def test_mixed_steps_over_ragged_streams_equal_the_reference(
    shape: Shape, rounds: list[list[int]], memory: int, window: int | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # The reference computes in float32 from what bfloat16 pages hold: one rounding, of the result, is left.
    table, reference = shape.table(4), shape.table(4, dtype=torch.float32)
    rows = [table.open(4) for _ in range(4)]
    assert rows == [reference.open(4) for _ in range(4)]
    budget = Budget(memory_size=memory, buffer_size=1)
    backend, tolerance = NumbaBackend(), 1e-5 if shape.dtype == torch.float32 else 2**-8
    for counts in rounds:
        fed = [(row, Fed.draw(shape, count, generator)) for row, count in zip(rows, counts, strict=True) if count]
        fed.sort(key=lambda pair: pair[1].key.shape[1] != 1)
        if not fed:
            continue
        found = attend(backend, table, fed, window)
        expected = attend(TorchBackend(), reference, [(row, part.float()) for row, part in fed], window)
        for mine, other in zip(found, expected, strict=True):
            assert mine.dtype == shape.dtype
            torch.testing.assert_close(mine.float(), other, rtol=tolerance, atol=1e-5)
        for each in (table, reference):
            each.evict([(row, budget) for row in rows if each.is_due(row, budget, before=0)])
    for row in rows:
        mine, other = table.snapshot(row), reference.snapshot(row)
        for name in ("lengths", "position", "log_beta"):
            assert torch.equal(getattr(mine, name), getattr(other, name)), name
        for name in ("key", "value"):
            assert torch.equal(getattr(mine, name).float(), getattr(other, name)), name
    table.check_invariants()


def test_the_streams_of_these_tests_are_ragged_and_some_are_empty() -> None:
    shape, table = Shape(5, 8, 1), Shape(5, 8, 1).table(1)
    row, budget = table.open(4), Budget(memory_size=6, buffer_size=1)
    attend(NumbaBackend(), table, [(row, Fed.draw(shape, 130, torch.Generator().manual_seed(0)))])
    table.evict([(row, budget)])
    lengths = table.lengths_of(row)
    assert lengths.min() == 0
    assert lengths.max() > 12


# ---- alone and in company --------------------------------------------------------------------------------------------


@dataclass
class Story:
    """What a sequence is fed, step after step: the same whoever else is there."""

    fed: Fed
    chunks: Sequence[int]
    budget: Budget
    row: int = -1
    at: int = 0
    results: list[Tensor] = field(default_factory=list)

    def take(self) -> Fed:
        """The next step's tokens."""
        chunk = self.chunks[len(self.results)]
        self.at += chunk
        return self.fed.cut(self.at - chunk, self.at)


def tell(shape: Shape, chunks: Sequence[int], seed: int, memory: int = 10) -> Story:
    fed = Fed.draw(shape, sum(chunks), torch.Generator().manual_seed(seed))
    return Story(fed, chunks, Budget(memory_size=memory, buffer_size=3))


def live(shape: Shape, stories: Sequence[Story], window: int | None = None) -> None:
    """Feed stories side by side, evict each when it is due, and gather what each one sees."""
    table, backend = shape.table(len(stories)), NumbaBackend()
    for story in stories:
        story.row = table.open(4)
    for _ in range(max(len(story.chunks) for story in stories)):
        present = [story for story in stories if len(story.results) < len(story.chunks)]
        present.sort(key=lambda story: story.chunks[len(story.results)] != 1)
        results = attend(backend, table, [(story.row, story.take()) for story in present], window)
        for story, result in zip(present, results, strict=True):
            story.results.append(result)
        due = [(story.row, story.budget) for story in present]
        table.evict([(row, budget) for row, budget in due if table.is_due(row, budget, before=0)])


SCHEDULE = (130, 49, 1, 1, 1, 2, 7, 1, 1, 1, 1, 1)
ALL_SHAPES = [
    Shape(16, 64, 3),
    Shape(5, 8, 4),
    Shape(32, 80, 1),
    Shape(16, 64, 4, torch.bfloat16),
    Shape(1, 80, 3, torch.bfloat16),
]


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("shape", ALL_SHAPES, ids=str)
def test_a_row_has_the_same_bits_alone_and_in_company(shape: Shape, window: int | None) -> None:
    alone = tell(shape, SCHEDULE, seed=0)
    live(shape, [alone], window)
    for others in ([(1,) * 12], [(3, 1, 1, 1, 6, 1, 1, 97, 1, 1, 1, 1)] * 2, [(48,) * 4, (2, 1) * 6, (1, 130) * 3]):
        company = [tell(shape, chunks, seed, memory=seed) for seed, chunks in enumerate(others, 4)]
        mine = tell(shape, SCHEDULE, seed=0)
        live(shape, [*company[:1], mine, *company[1:]], window)
        for step, (found, expected) in enumerate(zip(mine.results, alone.results, strict=True)):
            assert torch.equal(found, expected), step


@pytest.mark.parametrize("shape", ALL_SHAPES, ids=str)
def test_a_prompt_has_the_same_bits_in_one_chunk_and_in_several(shape: Shape) -> None:
    # A chunk of one token is decoded, in another order of sums; all others keep theirs.
    results = []
    for chunks in ((131,), (48, 83), (2, 7, 122), (50, 31, 48, 2)):
        story = tell(shape, chunks, seed=1, memory=1000)
        live(shape, [story])
        results.append(torch.cat(story.results, 1))
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.fixture
def torch_threads() -> Iterator[None]:
    """Give torch and this thread's kernels their number of threads back."""
    before = torch.get_num_threads(), numba.get_num_threads()
    yield
    torch.set_num_threads(before[0])
    numba.set_num_threads(before[1])


@pytest.mark.parametrize("shape", ALL_SHAPES, ids=str)
def test_the_number_of_threads_changes_no_bit(shape: Shape, torch_threads: None) -> None:
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one processor")
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        stories = [tell(shape, SCHEDULE, seed) for seed in range(3)]
        live(shape, stories)
        assert numba.get_num_threads() == count
        results.append([torch.cat(story.results, 1) for story in stories])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


# ---- what is no number stays where it is -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("shape", ALL_SHAPES, ids=str)
def test_a_sequence_that_is_no_number_spoils_no_other(shape: Shape, name: str) -> None:
    clean = [tell(shape, SCHEDULE, seed) for seed in range(3)]
    live(shape, clean)
    mixed = [tell(shape, SCHEDULE, seed) for seed in range(3)]
    getattr(mixed[1].fed, name)[:] = float("nan")
    live(shape, mixed)
    assert torch.cat(mixed[1].results, 1).isnan().all()
    for at in (0, 2):
        assert torch.equal(torch.cat(mixed[at].results, 1), torch.cat(clean[at].results, 1))


@pytest.mark.parametrize("shape", ALL_SHAPES, ids=str)
@pytest.mark.parametrize("chunks", [(1,) * 9, (9,), (3, 1, 1, 4)])
def test_what_others_left_in_pages_and_scratch_is_never_read(shape: Shape, chunks: tuple[int, ...]) -> None:
    fresh = tell(shape, chunks, seed=3, memory=100)
    live(shape, [fresh])
    # Just as many pages as either sequence needs, full of what is no number, and a scratch that has seen it.
    table, backend = shape.table(1, pages=LAYERS * HEADS * (-(-130 // shape.block_size) + 1)), NumbaBackend()
    spoiler = table.open(4)
    spoiled = Fed.draw(shape, 130, torch.Generator().manual_seed(0))
    spoiled.key[:], spoiled.value[:] = float("nan"), float("nan")
    attend(backend, table, [(spoiler, spoiled)])
    table.close(spoiler)
    table.pool.key.fill_(float("nan"))
    table.pool.value.fill_(float("nan"))
    row, story = table.open(4), tell(shape, chunks, seed=3)
    for expected in fresh.results:
        (found,) = attend(backend, table, [(row, story.take())])
        story.results.append(found)
        assert torch.equal(found, expected)
    assert table.pool.key.isnan().any()


# ---- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "chosen"), [(torch.float32, "numba"), (torch.bfloat16, "numba"), (torch.float16, "torch")]
)
def test_on_a_cpu_auto_takes_numba_for_the_types_it_serves(dtype: torch.dtype, chosen: str) -> None:
    assert select_backend("auto", device=CPU, dtype=dtype).name == chosen


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.float16), ("cpu", torch.float64), ("cuda", torch.float32), ("cpu", None)]
)
def test_numba_asked_for_what_it_does_not_serve_says_so(device: str, dtype: torch.dtype | None) -> None:
    with pytest.raises(ValueError, match="'numba' serves float32 and bfloat16 on CPUs"):
        select_backend("numba", device=torch.device(device), dtype=dtype)


def test_pages_of_another_type_are_refused_before_anything_is_written() -> None:
    shape = Shape(4, 8, 1, torch.float16)
    table = shape.table(1)
    fed = Fed.draw(shape, 3, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"serves float32 and bfloat16 on CPUs, not torch\.float16"):
        attend(NumbaBackend(), table, [(table.open(4), fed)])


@pytest.mark.parametrize(("pages", "keys"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_keys_of_another_type_than_the_pages_are_refused(pages: torch.dtype, keys: torch.dtype) -> None:
    table = Shape(4, 8, 1, pages).table(1)
    fed = Fed.draw(Shape(4, 8, 1, keys), 3, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"pages of torch.* cannot take torch"):
        attend(NumbaBackend(), table, [(table.open(4), fed)])


def test_a_forward_with_gradients_is_told_how_to_run() -> None:
    shape = Shape(4, 8, 1)
    table, fed = shape.table(1), Fed.draw(shape, 3, torch.Generator().manual_seed(0))
    fed.key.requires_grad_()
    with pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        attend(NumbaBackend(), table, [(table.open(4), fed)])
