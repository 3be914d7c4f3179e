from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.reference import Entry, kept, score
from trimkv_core.budget import Budget, BudgetError, Scope, Strategy
from trimkv_core.retention import EntryView, Look, log_retention_ahead, rank_within, scores, survivors

STREAMS = 6


@st.composite
def budgets(draw: st.DrawFn) -> Budget:
    strategy = draw(st.sampled_from([Strategy.FIXED_BUDGET, Strategy.THRESHOLD]))
    memory = draw(st.integers(1, 12)) if strategy is Strategy.FIXED_BUDGET or draw(st.booleans()) else None
    room = memory if memory is not None else 9
    sinks = draw(st.integers(0, min(3, room)))
    window = draw(st.integers(0, min(3, room - sinks)))
    floor = draw(st.integers(0, min(3, room - sinks - window)))
    return Budget(
        memory_size=memory,
        buffer_size=draw(st.integers(1, 8)),
        strategy=strategy,
        scope=draw(st.sampled_from(list(Scope))),
        alpha_threshold=draw(st.floats(0.01, 0.9)) if strategy is Strategy.THRESHOLD else None,
        num_sink_tokens=sinks,
        sliding_window_size=window,
        min_tokens_per_head=floor,
        lookahead_steps=draw(st.sampled_from([1, 2, 8])),
    )


def random_entries(rng: random.Random, seen: int) -> list[Entry]:
    """Streams of unequal lengths, some empty, in which no two scores are equal."""
    entries = []
    for stream in range(STREAMS):
        count = rng.choice([0, seen // 3, seen])
        for position in sorted(rng.sample(range(seen), count)):
            entries.append(Entry(stream, position, -(10.0 ** rng.uniform(-4, 0.3))))
    return entries


def view_of(sequences: list[list[Entry]]) -> EntryView:
    flat = [(index, entry) for index, entries in enumerate(sequences) for entry in entries]
    stream = torch.tensor([index * STREAMS + entry.stream for index, entry in flat], dtype=torch.int64)
    return EntryView(
        log_beta=torch.tensor([entry.log_beta for _, entry in flat], dtype=torch.float32),
        position=torch.tensor([entry.position for _, entry in flat], dtype=torch.int32),
        sequence=torch.tensor([index for index, _ in flat], dtype=torch.int64),
        stream=stream,
        lengths=torch.bincount(stream, minlength=len(sequences) * STREAMS),
    )


def has_near_ties(entries: list[Entry], look: Look) -> bool:
    values = sorted(score(entry, look.seen, look.budget) for entry in entries)
    values = [value for value in values if value != float("inf")]
    alpha = look.budget.alpha_threshold
    gaps = [abs(a - b) / max(1.0, abs(a)) for a, b in itertools.pairwise(values)]
    if alpha is not None:
        gaps += [abs(value - torch.log(torch.tensor(alpha)).item()) for value in values]
    return any(gap < 1e-5 for gap in gaps)


@settings(max_examples=300, deadline=None)
@given(st.lists(budgets(), min_size=1, max_size=4), st.integers(0, 2**32))
def test_sequences_of_any_rules_judged_together_keep_what_the_slow_rules_keep(rules: list[Budget], seed: int) -> None:
    rng = random.Random(seed)
    looks = [Look(budget, rng.randint(1, 40)) for budget in rules]
    sequences = [random_entries(rng, look.seen) for look in looks]
    if any(has_near_ties(entries, look) for entries, look in zip(sequences, looks, strict=True)):
        return
    keep = survivors(view_of(sequences), looks).tolist()
    at = 0
    for entries, look in zip(sequences, looks, strict=True):
        mine = {entry for entry, stays in zip(entries, keep[at : at + len(entries)], strict=True) if stays}
        assert mine == kept(entries, look.seen, look.budget, STREAMS)
        at += len(entries)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=60), st.integers(1, 5), st.randoms())
def test_ranks_order_floats_within_their_group(values: list[float], groups: int, rng: random.Random) -> None:
    group = [rng.randrange(groups) for _ in values]
    rank = rank_within(torch.tensor(values, dtype=torch.float32), torch.tensor(group)).tolist()
    for number in set(group):
        members = [index for index in range(len(values)) if group[index] == number]
        assert sorted(rank[index] for index in members) == list(range(len(members)))
        for a in members:
            for b in members:
                if values[a] > values[b]:
                    assert rank[a] < rank[b]


def test_looking_ahead_tends_to_the_number_of_steps_where_nothing_is_forgotten() -> None:
    log_beta = torch.tensor([-1e-30, -0.0, -1e-12, -1e-6])
    ahead = log_retention_ahead(log_beta, torch.ones(4), torch.full((4,), 8.0))
    torch.testing.assert_close(ahead, torch.full((4,), 8.0).log(), atol=2e-5, rtol=0)


def test_pins_score_infinite() -> None:
    budget = Budget(memory_size=8, num_sink_tokens=2, sliding_window_size=3)
    view = view_of([[Entry(0, position, -0.5) for position in range(10)]])
    pinned = scores(view, [Look(budget, seen=10)]).isinf().tolist()
    assert [position for position in range(10) if pinned[position]] == [0, 1, 7, 8, 9]


def test_pins_beyond_the_budget_are_refused_with_all_three_named() -> None:
    with pytest.raises(BudgetError, match=r"num_sink_tokens=4.*sliding_window_size=3.*min_tokens_per_head=2"):
        Budget(memory_size=8, num_sink_tokens=4, sliding_window_size=3, min_tokens_per_head=2)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"memory_size": 0}, "memory_size"),
        ({"memory_size": 4, "buffer_size": 0}, "buffer_size"),
        ({"memory_size": 4, "lookahead_steps": 1025}, "lookahead_steps"),
        ({"memory_size": 4, "alpha_threshold": 0.5}, "alpha_threshold"),
        ({"memory_size": 4, "strategy": Strategy.THRESHOLD}, "alpha_threshold"),
        ({"memory_size": 4, "strategy": Strategy.THRESHOLD, "alpha_threshold": 1.0}, "alpha_threshold"),
        ({"memory_size": 4, "strategy": Strategy.DENSE}, "memory_size"),
        ({"memory_size": 4, "sliding_window_size": -1}, "sliding_window_size"),
    ],
)
def test_a_budget_out_of_range_names_its_field(fields: dict[str, object], field: str) -> None:
    with pytest.raises(BudgetError) as caught:
        Budget(**fields)  # type: ignore[arg-type]
    assert caught.value.field == field
