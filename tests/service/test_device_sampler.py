"""Tokens chosen on the device against the sampler that waits: the same, however many logits tie."""

from __future__ import annotations

import pytest
import torch

from service.engine.interface import SamplingParams
from service.generation.device_sampler import DeviceSampler
from service.generation.sampler import CANDIDATES, Sampler, SamplingState

VOCABULARY = 3 * CANDIDATES
DEVICE = torch.device("cpu")
ROWS = [
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"temperature": 3.0, "top_k": CANDIDATES - 1},
    {"temperature": 1.5, "top_k": CANDIDATES - 6, "min_p": 0.01},
    {"temperature": 0.5, "top_k": 1},
]


def states(seed: int) -> list[SamplingState]:
    return [
        SamplingState(SamplingParams(max_tokens=9, seed=seed + index, **row), prompt_ids=(), eos_token_ids=())
        for index, row in enumerate(ROWS)
    ]


@pytest.mark.parametrize("levels", [1, 3, 40, 100_000])
def test_ties_are_settled_as_the_waiting_sampler_settles_them(levels: int) -> None:
    device = DeviceSampler(VOCABULARY, DEVICE, [8])
    sampler = Sampler(VOCABULARY, DEVICE)
    for seed in range(20):
        drawn = torch.randn(len(ROWS), VOCABULARY, generator=torch.Generator().manual_seed(seed))
        logits = torch.round(drawn * levels) / levels
        ahead, waiting = states(seed), states(seed)
        chosen = device.prepare(8, ahead)(torch.cat([logits, torch.zeros(8 - len(ROWS), VOCABULARY)]))
        assert chosen[: len(ROWS)].tolist() == sampler.sample(logits.clone(), waiting)


def test_a_row_without_a_number_is_told_apart() -> None:
    device = DeviceSampler(VOCABULARY, DEVICE, [8])
    logits = torch.zeros(8, VOCABULARY)
    logits[0] = torch.nan
    logits[1] = torch.nan
    assert (device.prepare(8, states(0))(logits)[:2] < 0).all()


def test_what_needs_the_host_is_left_to_it() -> None:
    device = DeviceSampler(VOCABULARY, DEVICE, [8])

    def can_choose(**row: float) -> bool:
        params = SamplingParams(**{"max_tokens": 9, "temperature": 1.0, "top_k": 5} | row)
        return device.can_choose(SamplingState(params, prompt_ids=(3,), eos_token_ids=(2,)))

    assert can_choose()
    assert can_choose(temperature=0.0, top_k=0)
    assert not can_choose(top_k=0)
    assert not can_choose(top_k=CANDIDATES)
    assert not can_choose(repetition_penalty=1.2)
    assert not can_choose(min_tokens=2)
