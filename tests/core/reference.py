"""The eviction rules of DESIGN.md once more, entry by entry and slowly, to check the vectorised ones against."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trimkv_core.budget import Budget, Scope, Strategy


@dataclass(frozen=True)
class Entry:
    stream: int
    position: int
    log_beta: float


def score(entry: Entry, seen: int, budget: Budget) -> float:
    if entry.position < budget.num_sink_tokens or entry.position >= seen - budget.sliding_window_size:
        return math.inf
    age = seen + 1 - entry.position
    steps = budget.lookahead_steps
    if steps == 1:
        return entry.log_beta * age
    return math.log(sum(math.exp(entry.log_beta * (age + 1 + step)) for step in range(steps)))


def kept(entries: list[Entry], seen: int, budget: Budget, streams: int) -> set[Entry]:
    """What a due sequence keeps; scores are taken to be distinct."""
    ranked = sorted(entries, key=lambda entry: -score(entry, seen, budget))
    floor = budget.min_tokens_per_head

    def best_of(candidates: list[Entry], stream: int, count: int) -> list[Entry]:
        return [entry for entry in candidates if entry.stream == stream][:count]

    left = list(ranked)
    if budget.strategy is Strategy.THRESHOLD:
        assert budget.alpha_threshold is not None
        floors = {entry for stream in range(streams) for entry in best_of(ranked, stream, floor)}
        limit = math.log(budget.alpha_threshold)
        left = [entry for entry in ranked if score(entry, seen, budget) >= limit or entry in floors]
    if budget.memory_size is None:
        return set(left)
    if budget.scope is Scope.LOCAL:
        slack = 0 if budget.strategy is Strategy.THRESHOLD else budget.buffer_size
        result: set[Entry] = set()
        for stream in range(streams):
            held = sum(entry.stream == stream for entry in entries)
            count = budget.memory_size if held >= budget.memory_size + slack else held
            result |= set(best_of(left, stream, count))
        return result
    if len(left) <= streams * budget.memory_size:
        return set(left)
    best = left[: streams * (budget.memory_size - floor)]
    return {
        entry
        for stream in range(streams)
        for entry in best_of(left, stream, sum(other.stream == stream for other in best) + floor)
    }
