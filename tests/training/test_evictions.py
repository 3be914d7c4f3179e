"""Evictions acted out in training drop what an eviction of the server would drop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimkv_core.budget import Budget, Scope
from trimkv_core.retention import EntryView, Look, survivors
from trimkv_core.training.evictions import EvictionRule, eviction_bias, eviction_lines, eviction_reach


def acted_out(log_beta: torch.Tensor, rule: EvictionRule, *, lines: torch.Tensor | None = None) -> torch.Tensor:
    """The biases of every entry after every eviction: [N, K, T]."""
    drawn = eviction_lines(log_beta, rule) if lines is None else lines
    bias = eviction_bias(log_beta, eviction_reach(drawn, log_beta.shape[1], rule), rule)
    return bias.at(bias.sources, 0, drawn.shape[0])


def served(log_beta: torch.Tensor, rule: EvictionRule) -> list[torch.Tensor]:
    """What stays after every eviction by the rules that serve: bool [N, T] each."""
    streams, tokens = log_beta.shape
    budget = Budget(
        memory_size=round(rule.memory_size),
        buffer_size=1,
        num_sink_tokens=rule.num_sink_tokens,
        scope=Scope.GLOBAL if rule.is_global else Scope.LOCAL,
    )
    held = torch.zeros(streams, tokens, dtype=torch.bool)
    result = [held.clone()]
    for seen in range(rule.interval, tokens, rule.interval):
        held[:, seen - rule.interval : seen] = True
        stream, position = held.nonzero(as_tuple=True)
        if budget.is_due(before=0, seen=seen, held=int(held.sum()), longest=int(held.sum(1).max()), streams=streams):
            view = EntryView(log_beta[stream, position], position.int(), torch.zeros_like(stream), stream, held.sum(1))
            keep = survivors(view, [Look(budget, seen)])
            held[stream[~keep], position[~keep]] = False
        result.append(held.clone())
    return result


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(5, 40),
    st.sampled_from([0, 3]),
    st.booleans(),
    st.integers(20, 150),
)
def test_what_lies_below_the_line_is_what_the_server_drops(
    seed: int, memory: int, sinks: int, is_global: bool, tokens: int
) -> None:
    log_beta = -(torch.rand(4, tokens, generator=torch.Generator().manual_seed(seed)) ** 4)
    rule = EvictionRule(memory_size=memory, interval=16, num_sink_tokens=sinks, is_global=is_global, softness=1e-6)
    table = acted_out(log_beta, rule)
    for nth, wanted in enumerate(served(log_beta, rule)):
        seen = nth * rule.interval
        # The entry that draws the line lies on it: κ·w·log 2 of bias.
        got = table[:, nth, :seen] > -1e-5
        assert torch.equal(got, wanted[:, :seen]), nth
        assert (table[:, nth, seen:] == 0.0).all()


def test_gradients_reach_what_was_dropped() -> None:
    log_beta = (-torch.rand(3, 100, generator=torch.Generator().manual_seed(0))).requires_grad_()
    rule = EvictionRule(memory_size=10, interval=20)
    acted_out(log_beta, rule, lines=eviction_lines(log_beta.detach(), rule)).sum().backward()
    assert log_beta.grad is not None
    assert torch.isfinite(log_beta.grad).all()
    assert (log_beta.grad[:, :60] > 0).float().mean() > 0.9


def test_a_budget_below_one_entry_keeps_one() -> None:
    """As `--eviction-spread` may draw it."""
    log_beta = -torch.rand(3, 40, generator=torch.Generator().manual_seed(0))
    rule = EvictionRule(memory_size=0.2, interval=16, is_global=False, softness=1e-6)
    table = acted_out(log_beta, rule)
    assert ((table[:, 1, :16] > -1e-5).sum(1) == 1).all()


@pytest.mark.parametrize("is_global", [True, False])
def test_all_scores_together_gain_nothing(is_global: bool) -> None:
    """Only the order of scores decides who stays, so a factor on all of them has no gradient."""
    generator = torch.Generator().manual_seed(3)
    log_beta = (-torch.rand(3, 100, generator=generator) - 0.01).requires_grad_()
    rule = EvictionRule(memory_size=10, interval=20, num_sink_tokens=2, is_global=is_global)
    table = acted_out(log_beta, rule)
    (table * torch.rand(table.shape, generator=generator)).sum().backward()
    assert log_beta.grad is not None
    assert log_beta.grad.abs().max() > 1.0
    assert (log_beta.grad * log_beta).sum().abs() < 1e-3


def test_an_entry_that_nobody_misses_is_pushed_below_the_line() -> None:
    log_beta = (-torch.rand(2, 60, generator=torch.Generator().manual_seed(4)) - 0.01).requires_grad_()
    rule = EvictionRule(memory_size=10, interval=20)
    table = acted_out(log_beta, rule)
    # Only the first stream's entries are worth keeping.
    (-table[0].sum()).backward()
    assert log_beta.grad is not None
    assert (log_beta.grad[1, :40] >= 0.0).all()
    assert (log_beta.grad[1, :40] > 0.0).any()
    assert (log_beta.grad * log_beta)[0].sum() > 0.0
