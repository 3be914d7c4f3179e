"""A request's `kv_*` fields → the `Budget` it runs under.

Owns the ranges, the defaults, the contradictions and the operator's caps of the memory-budget knobs, and the names a
client knows them by. Knows no HTTP beyond the error it raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from service.api.errors import ApiError, invalid_value, missing_value
from service.engine.interface import ModelInfo
from trimkv_core.budget import MAX_BUFFER_SIZE, MAX_LOOKAHEAD_STEPS, Budget, BudgetError, Strategy

# Names of `Budget` → names on the wire.
FIELD_NAMES: Mapping[str, str] = {
    "memory_size": "kv_budget",
    "buffer_size": "kv_buffer",
    "strategy": "kv_strategy",
    "alpha_threshold": "kv_alpha_threshold",
    "min_tokens_per_head": "kv_min_tokens_per_head",
    "sliding_window_size": "kv_sliding_window",
    "num_sink_tokens": "kv_sink_tokens",
    "lookahead_steps": "kv_lookahead",
    "prefill_chunk": "kv_prefill_chunk",
}


class Knobs(Protocol):
    """The fields of a request that this module reads; None where a client said nothing."""

    @property
    def kv_budget(self) -> int | None: ...
    @property
    def kv_buffer(self) -> int | None: ...
    @property
    def kv_strategy(self) -> str | None: ...
    @property
    def kv_alpha_threshold(self) -> float | None: ...
    @property
    def kv_min_tokens_per_head(self) -> int | None: ...
    @property
    def kv_sliding_window(self) -> int | None: ...
    @property
    def kv_sink_tokens(self) -> int | None: ...
    @property
    def kv_lookahead(self) -> int | None: ...
    @property
    def kv_prefill_chunk(self) -> int | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    """What the operator allows.

    Attributes:
        max_kv_budget: the largest `kv_budget` a request may ask for; None: as long as the context.
        allow_dense: whether a request may ask to keep everything. A server without gates serves dense anyway.
    """

    max_kv_budget: int | None = None
    allow_dense: bool = True


def resolve_budget(knobs: Knobs, info: ModelInfo, caps: Caps) -> Budget:
    """The budget a request runs under: its own knobs over the server's defaults.

    Raises:
        ApiError: 400 for a knob out of range, knobs that contradict each other, or what the operator forbids.
    """
    if not info.has_gates:
        _check_dense_only(knobs)
        return _dense(info)
    _check_ranges(knobs, info, caps)
    strategy = _strategy(knobs)
    memory_size = _memory_size(knobs, info) if strategy is not Strategy.DENSE else None
    if strategy is Strategy.FIXED_BUDGET and memory_size is None:
        strategy = Strategy.DENSE
    if memory_size is None and not caps.allow_dense:
        raise _dense_not_allowed(knobs)
    if strategy is Strategy.DENSE:
        _check_nothing_to_evict_by(knobs, info)
        return _dense(info)
    default = info.budget
    try:
        return Budget(
            memory_size=memory_size,
            buffer_size=_or(knobs.kv_buffer, default.buffer_size),
            strategy=strategy,
            scope=default.scope,
            alpha_threshold=knobs.kv_alpha_threshold,
            min_tokens_per_head=_or(knobs.kv_min_tokens_per_head, default.min_tokens_per_head),
            sliding_window_size=_or(knobs.kv_sliding_window, default.sliding_window_size),
            num_sink_tokens=_or(knobs.kv_sink_tokens, default.num_sink_tokens),
            lookahead_steps=_or(knobs.kv_lookahead, default.lookahead_steps),
            prefill_chunk=_or(knobs.kv_prefill_chunk, default.prefill_chunk),
        )
    except BudgetError as error:
        raise _from_budget_error(error) from error


def _dense(info: ModelInfo) -> Budget:
    return replace(Budget.dense(), scope=info.budget.scope, prefill_chunk=info.budget.prefill_chunk)


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _check_ranges(knobs: Knobs, info: ModelInfo, caps: Caps) -> None:
    longest = info.max_model_len
    ranges: tuple[tuple[str, int | None, int, int], ...] = (
        ("kv_budget", knobs.kv_budget, 0, longest),
        ("kv_buffer", knobs.kv_buffer, 1, MAX_BUFFER_SIZE),
        ("kv_min_tokens_per_head", knobs.kv_min_tokens_per_head, 0, longest),
        ("kv_sliding_window", knobs.kv_sliding_window, 0, longest),
        ("kv_sink_tokens", knobs.kv_sink_tokens, 0, longest),
        ("kv_lookahead", knobs.kv_lookahead, 1, MAX_LOOKAHEAD_STEPS),
        ("kv_prefill_chunk", knobs.kv_prefill_chunk, 0, longest),
    )
    for field, value, low, high in ranges:
        if value is not None and not low <= value <= high:
            raise invalid_value(field, value, f"must be an integer from {low} to {high}")
    if caps.max_kv_budget is not None and knobs.kv_budget is not None and knobs.kv_budget > caps.max_kv_budget:
        raise invalid_value(
            "kv_budget", knobs.kv_budget, f"the operator of this server allows at most {caps.max_kv_budget}"
        )


def _check_dense_only(knobs: Knobs) -> None:
    """No knob of a server without gates does anything; two may say so."""
    saying_dense: Mapping[str, int | str] = {"kv_budget": 0, "kv_strategy": Strategy.DENSE.value}
    for field in FIELD_NAMES.values():
        value, dense = getattr(knobs, field), saying_dense.get(field)
        if value is not None and value != dense:
            otherwise = "" if dense is None else f", or send {dense!r}"
            raise invalid_value(
                field,
                value,
                f"this server has no retention gates and serves dense only: leave it out{otherwise}",
                code="no_retention_gates",
            )


def _check_nothing_to_evict_by(knobs: Knobs, info: ModelInfo) -> None:
    """A request that asks to keep everything asks for no rule of eviction; the server's own and 0 ask for nothing."""
    if knobs.kv_strategy != Strategy.DENSE and knobs.kv_budget != 0:
        return  # dense by the server's default, which a client need not know
    asked = "kv_strategy 'dense'" if knobs.kv_strategy == Strategy.DENSE else "kv_budget 0"
    default = info.budget
    for field, value, own in (
        ("kv_buffer", knobs.kv_buffer, default.buffer_size),
        ("kv_min_tokens_per_head", knobs.kv_min_tokens_per_head, default.min_tokens_per_head),
        ("kv_sliding_window", knobs.kv_sliding_window, default.sliding_window_size),
        ("kv_sink_tokens", knobs.kv_sink_tokens, default.num_sink_tokens),
        ("kv_lookahead", knobs.kv_lookahead, default.lookahead_steps),
    ):
        if value not in (None, 0, own):
            raise invalid_value(field, value, f"{asked} keeps everything: leave it out, or ask for a budget")


def _strategy(knobs: Knobs) -> Strategy:
    """The strategy asked for; contradictions between it, the budget and α end here."""
    asked = None if knobs.kv_strategy is None else Strategy(knobs.kv_strategy)
    if asked is Strategy.DENSE and knobs.kv_budget:
        raise invalid_value(
            "kv_budget", knobs.kv_budget, "kv_strategy 'dense' keeps everything: leave it out, or send 0"
        )
    alpha = knobs.kv_alpha_threshold
    if asked is Strategy.THRESHOLD:
        if alpha is None:
            raise missing_value(
                "kv_alpha_threshold", "kv_strategy 'threshold' needs a number between 0 and 1, both excluded"
            )
        if not 0.0 < alpha < 1.0:
            raise invalid_value("kv_alpha_threshold", alpha, "must be a number between 0 and 1, both excluded")
    elif alpha is not None:
        used = asked or Strategy.FIXED_BUDGET
        raise invalid_value(
            "kv_alpha_threshold", alpha, f"only kv_strategy 'threshold' takes one, and this request has '{used}'"
        )
    return asked or Strategy.FIXED_BUDGET


def _memory_size(knobs: Knobs, info: ModelInfo) -> int | None:
    """M, or None for no ceiling."""
    return info.budget.memory_size if knobs.kv_budget is None else knobs.kv_budget or None


def _dense_not_allowed(knobs: Knobs) -> ApiError:
    why = "the operator of this server does not allow requests without a budget"
    if knobs.kv_strategy == Strategy.DENSE:
        return invalid_value("kv_strategy", knobs.kv_strategy, f"{why}: use 'fixed_budget' or 'threshold'")
    if knobs.kv_budget is None:
        return missing_value("kv_budget", f"{why}, and has no default: send 1 or more")
    return invalid_value("kv_budget", knobs.kv_budget, f"{why}: send 1 or more")


def _from_budget_error(error: BudgetError) -> ApiError:
    """The same complaint in the names that a client knows."""
    allowed = error.allowed
    for inside, outside in FIELD_NAMES.items():
        allowed = allowed.replace(inside, outside)
    return invalid_value(FIELD_NAMES.get(error.field, error.field), error.value, allowed)
