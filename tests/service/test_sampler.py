"""What sampling promises: the right tokens survive, and a row never notices its neighbours."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.engine.interface import SamplingParams
from service.generation import sampler as sampler_module
from service.generation.sampler import CANDIDATES, Sampler, SamplingState

CPU = torch.device("cpu")
EOS = 2


def make_state(prompt_ids: Sequence[int] = (5,), **params: object) -> SamplingState:
    sampling = dataclasses.replace(SamplingParams(max_tokens=1000), **params)  # type: ignore[arg-type]
    return SamplingState(sampling, prompt_ids=prompt_ids, eos_token_ids=(EOS,))


def make_sampler(logits: Tensor) -> Sampler:
    return Sampler(logits.shape[-1], CPU)


def random_logits(rows: int, vocab: int, *, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def kept_tokens(logits: Tensor, **params: object) -> set[int]:
    """Every token that can come out of `logits` [V], found with evenly spread random numbers."""
    state = make_state(temperature=1.0, **params)
    found = set()
    for number in range(400):
        state.draw = lambda number=number: (number + 0.5) / 400  # type: ignore[method-assign, misc]
        found.update(make_sampler(logits).sample(logits[None].clone(), [state]))
    return found


def survivors(logits: Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float) -> dict[int, float]:
    """The definition, in plain Python: token → probability."""
    scaled = [value / temperature for value in logits.tolist()]
    best = max(scaled)
    weights = [math.exp(value - best) for value in scaled]
    ranked = sorted(range(len(weights)), key=lambda token: (-logits[token].item(), token))
    if 0 < top_k < len(ranked):
        ranked = ranked[:top_k]
    mass = sum(weights[token] for token in ranked)
    kept, reached = [], 0.0
    for token in ranked:
        if reached >= top_p * mass and top_p < 1.0:
            break
        kept.append(token)
        reached += weights[token]
    kept = [token for token in kept if weights[token] >= min_p]
    total = sum(weights[token] for token in kept)
    return {token: weights[token] / total for token in kept}


def draw_by_definition(kept: dict[int, float], number: float) -> int:
    reached = 0.0
    for token in sorted(kept):
        reached += kept[token]
        if reached > number:
            return token
    raise AssertionError("a number in [0, 1) always falls on a token")


@pytest.mark.parametrize("vocab", [50, 1000])
@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, 40, 255, 256, 257, 600]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.001, 0.2, 1.0]),
    scale=st.sampled_from([0.0, 0.1, 1.0, 10.0]),
)
def test_a_draw_is_the_definitions_draw(
    vocab: int, seed: int, temperature: float, top_k: int, top_p: float, min_p: float, scale: float
) -> None:
    logits = random_logits(1, vocab, seed=seed, scale=scale)
    state = make_state(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    number = random.Random(seed).random()
    kept = survivors(logits[0], temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    [token] = make_sampler(logits).sample(logits.clone(), [state])
    # Within the rounding of float32 weights the neighbour is right as well.
    assert token in {draw_by_definition(kept, min(max(number + nudge, 0.0), 0.999999)) for nudge in (-1e-6, 0.0, 1e-6)}


def mixed_states() -> list[SamplingState]:
    return [
        make_state(temperature=0.0),
        make_state(seed=1),
        make_state(seed=2, temperature=0.7, top_p=0.9),
        make_state(seed=3, top_k=20, min_p=0.05),
        make_state(seed=4, temperature=1.5, top_p=0.999),
        make_state(seed=5, top_k=CANDIDATES + 44, top_p=0.8),
        make_state(seed=6, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.3, top_k=9),
        make_state(seed=7, min_tokens=3, min_p=0.1),
        make_state(temperature=0.0, repetition_penalty=1.2),
        make_state(seed=8, top_p=0.95, top_k=50, frequency_penalty=-0.4),
    ]


@pytest.mark.parametrize("is_row_by_row", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_seeded_request_gets_the_same_ids_alone_and_in_company(is_row_by_row: bool, dtype: torch.dtype) -> None:
    vocab, steps = 3000, 12
    sampler = Sampler(vocab, CPU)
    sampler._is_row_by_row = is_row_by_row  # as on a GPU
    together = mixed_states()
    steps_logits = [random_logits(len(together), vocab, seed=step, scale=2.0).to(dtype) for step in range(steps)]
    in_company = [sampler.sample(logits.clone(), together) for logits in steps_logits]
    for row, state in enumerate(mixed_states()):
        alone = [sampler.sample(logits[row : row + 1].clone(), [state])[0] for logits in steps_logits]
        assert alone == [tokens[row] for tokens in in_company]


def test_a_row_draws_one_number_a_token_whatever_the_filters() -> None:
    logits = random_logits(1, 2000, scale=0.5)
    for params in ({}, {"top_p": 0.99}, {"top_k": 5}, {"top_k": 900}, {"min_p": 0.1}):
        state = make_state(seed=9, **params)
        make_sampler(logits).sample(logits.clone(), [state])
        numbers = random.Random(9)
        numbers.random()
        assert state.draw() == numbers.random()


def test_seeds_differ_and_a_missing_seed_is_fresh_entropy() -> None:
    logits = torch.zeros(1, 1000)

    def ids(seed: int | None) -> list[int]:
        state = make_state(seed=seed)
        return [make_sampler(logits).sample(logits, [state])[0] for _ in range(8)]

    assert ids(7) == ids(7)
    assert len({tuple(ids(seed)) for seed in (7, -7, 8, None, None)}) == 5


def test_top_p_finds_the_same_set_by_candidates_and_among_all(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(4, 5000, scale=4.0).to(torch.bfloat16).float()  # bfloat16 makes ties

    def ids(candidates: int) -> list[list[int]]:
        monkeypatch.setattr(sampler_module, "CANDIDATES", candidates)
        states = [make_state(seed=row, top_p=top_p) for row, top_p in enumerate((0.5, 0.9, 0.99, 0.9999))]
        sampler = make_sampler(logits)
        return [sampler.sample(logits.clone(), states) for _ in range(50)]

    assert ids(1) == ids(40) == ids(5000)


def test_only_rows_that_keep_more_than_the_candidates_pay_for_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Tensor] = []
    among_all = sampler_module.draw_among_all
    monkeypatch.setattr(
        sampler_module, "draw_among_all", lambda logits, *a, **k: rows.append(logits) or among_all(logits, *a, **k)
    )
    logits = torch.stack([torch.zeros(2000), random_logits(1, 2000, scale=8.0)[0]])
    make_sampler(logits).sample(logits, [make_state(top_p=0.9), make_state(top_p=0.9)])
    assert len(rows) == 1
    assert torch.equal(rows[0][0], logits[0])


def test_top_p_keeps_the_fewest_tokens_that_reach_it_and_the_lower_ids_of_equals() -> None:
    assert kept_tokens(torch.zeros(8), top_p=0.5) == {0, 1, 2, 3}
    assert kept_tokens(torch.zeros(8), top_p=0.51) == {0, 1, 2, 3, 4}
    assert kept_tokens(torch.zeros(1000), top_p=0.3) == set(range(300))
    assert kept_tokens(torch.tensor([0.6, 0.1, 0.3]).log(), top_p=0.59) == {0}
    assert kept_tokens(torch.tensor([0.6, 0.1, 0.3]).log(), top_p=0.61) == {0, 2}


def test_top_k_keeps_exactly_k_tokens_and_the_lower_ids_of_equals() -> None:
    assert kept_tokens(torch.tensor([0.0, 1.0, 1.0, 1.0]), top_k=2) == {1, 2}
    assert kept_tokens(torch.zeros(1000), top_k=30) == set(range(30))
    assert kept_tokens(torch.zeros(1000), top_k=300) == set(range(300))
    assert kept_tokens(torch.zeros(5), top_k=9) == set(range(5))


def test_top_p_counts_what_top_k_left() -> None:
    # Of the best two, 0.4 and 0.3, the best alone has 0.57.
    logits = torch.tensor([0.3, 0.4, 0.2, 0.1]).log()
    assert kept_tokens(logits, top_k=2, top_p=0.55) == {1}
    assert kept_tokens(logits, top_p=0.55) == {0, 1}


def test_min_p_is_relative_to_the_best_token_after_temperature() -> None:
    probabilities = torch.tensor([0.5, 0.26, 0.24])
    state_kept = kept_tokens(probabilities.log(), min_p=0.5)
    assert state_kept == {0, 1}
    logits = probabilities.log()[None]
    hot = make_state(temperature=4.0, min_p=0.5, seed=0)
    assert {make_sampler(logits).sample(logits.clone(), [hot])[0] for _ in range(100)} == {0, 1, 2}


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    state = make_state(seed=11)
    counts = Counter(make_sampler(logits).sample(logits.clone(), [state])[0] for _ in range(4000))
    for token, probability in enumerate((0.5, 0.25, 0.125, 0.125)):
        assert abs(counts[token] / 4000 - probability) < 0.03


@pytest.mark.parametrize("number", [0.0, 0.5, math.nextafter(1.0, 0.0)])
@pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 500}])
def test_a_token_without_probability_is_never_drawn(number: float, params: dict[str, object]) -> None:
    logits = torch.full((1, 1000), float("-inf"))
    logits[0, 400:403] = torch.tensor([1.0, 1.1, 0.9])
    state = make_state(temperature=1.0, **params)
    state.draw = lambda: number  # type: ignore[method-assign]
    assert make_sampler(logits).sample(logits, [state])[0] in (400, 401, 402)


def test_greedy_takes_the_first_of_the_best() -> None:
    logits = torch.zeros(2, 100)
    logits[0, [70, 30]] = 5.0
    logits[1, 99] = 1.0
    assert make_sampler(logits).sample(logits, [make_state(temperature=0.0)] * 2) == [30, 99]


def test_greedy_rows_alone_are_not_copied_or_changed() -> None:
    logits = random_logits(3, 100)
    before = logits.clone()
    make_sampler(logits).sample(logits, [make_state(temperature=0.0) for _ in range(3)])
    assert torch.equal(logits, before)


def penalised(
    logits: list[float], prompt_ids: Sequence[int], generated: Sequence[int], **params: object
) -> list[float]:
    """The logits after the penalties, as greedy sampling sees them."""
    values = torch.tensor([logits])
    sampler = make_sampler(values)
    state = make_state(prompt_ids, temperature=0.0, **params)
    for token in generated:
        state.advance(token)
    sampler.sample(values, [state])
    return [round(value, 5) for value in values[0].tolist()]


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_prompt_and_answer() -> None:
    assert penalised([2.0, -2.0, 3.0, -3.0, 4.0], [0, 1, 0], [2, 2], repetition_penalty=2.0) == [1, -4, 1.5, -3, 4]


def test_presence_and_frequency_penalties_count_generated_tokens_only() -> None:
    changed = penalised([1.0, 1.0, 1.0], [0, 0], [1, 2, 2], presence_penalty=0.5, frequency_penalty=0.25)
    assert changed == [1.0, 0.25, 0.0]
    both = penalised([1.0, 1.0, 1.0], [0], [1], repetition_penalty=2.0, presence_penalty=0.5)
    assert both == [0.5, 0.0, 1.0]


def test_the_repetition_penalty_comes_before_the_others() -> None:
    assert penalised([4.0, 0.0], [], [0], repetition_penalty=2.0, presence_penalty=1.0) == [1.0, 0.0]


def test_penalties_stay_in_their_row() -> None:
    logits = torch.ones(3, 10)
    states = [make_state(temperature=0.0), make_state([3, 4], temperature=0.0, repetition_penalty=2.0), make_state()]
    make_sampler(logits).sample(logits, states)
    assert torch.equal(logits[[0, 2]], torch.ones(2, 10))
    assert logits[1].tolist() == [1, 1, 1, 0.5, 0.5, 1, 1, 1, 1, 1]


def test_counts_of_a_long_answer_are_exact() -> None:
    state = make_state(range(100), repetition_penalty=1.1)
    tokens = [token % 300 for token in range(1000)]
    for token in tokens:
        state.advance(token)
    assert state.counts is not None
    counted = dict(zip(state.counts.ids.tolist(), state.counts.times.tolist(), strict=True))
    assert counted == {**dict.fromkeys(range(100), 0), **Counter(tokens)}


def test_requests_without_penalties_count_nothing() -> None:
    assert make_state(range(1000)).counts is None


def test_end_tokens_cannot_come_before_min_tokens() -> None:
    logits = torch.zeros(1, 10)
    logits[0, [EOS, 7]] = torch.tensor([9.0, 8.0])
    state = make_state(temperature=0.0, min_tokens=2, stop_token_ids=(7,))
    tokens = [make_sampler(logits).sample(logits.clone(), [state])[0] for _ in range(3)]
    assert tokens == [0, 0, EOS]


def test_ignored_end_tokens_are_not_kept_from_coming() -> None:
    logits = torch.zeros(1, 10)
    logits[0, [EOS, 7]] = torch.tensor([8.0, 9.0])
    state = make_state(temperature=0.0, min_tokens=2, stop_token_ids=(7,), ignore_eos=True)
    assert make_sampler(logits).sample(logits, [state]) == [EOS]


@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"top_k": 3}, {"top_k": 500}, {"min_p": 0.5}], ids=str
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None], ids=str)
def test_a_row_without_finite_logits_is_an_error_that_names_it(params: dict[str, object], bad: float | None) -> None:
    logits = random_logits(3, 1000)
    if bad is None:
        logits[1] = float("-inf")
    else:
        logits[1, 500] = bad
    states = [make_state(**params) for _ in range(3)]
    tokens = make_sampler(logits).sample(logits, states)
    assert [token is None for token in tokens] == [False, True, False]
    assert [state.generated for state in states] == [1, 0, 1]


def test_a_shape_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="need"):
        Sampler(10, CPU).sample(torch.zeros(2, 10), [make_state()])
    with pytest.raises(ValueError, match="need"):
        Sampler(10, CPU).sample(torch.zeros(1, 11), [make_state()])
    assert Sampler(10, CPU).sample(torch.zeros(0, 10), []) == []
