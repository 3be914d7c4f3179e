"""Retention sums and the capacity hinge: the numbers of trimkv 0.1.5, and the gradients of their definition."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures import UPSTREAM
from trimkv_core.training.capacity import capacity_overrun, join_overruns
from trimkv_core.training.retention_sums import retention_sums
from trimkv_core.training.shapes import DecayShape

SHAPES = [DecayShape(), DecayShape(epsilon=0.15, kappa=6.0)]


def defined(log_beta: torch.Tensor, shape: DecayShape) -> torch.Tensor:
    """The sums as their definition has them, the whole matrix at once."""
    at = torch.arange(log_beta.shape[1], dtype=log_beta.dtype)
    age = at[:, None] - at
    return (shape.bias(log_beta[:, None] * age.clamp(min=0)).exp() * (age >= 0)).sum(-1)


def test_sums_are_upstreams() -> None:
    values = load_file(UPSTREAM / "values.safetensors")
    log_beta = values["training.log_beta"].flatten(0, 2)
    got = retention_sums(log_beta).view_as(values["training.retention_sums"])
    torch.testing.assert_close(got, values["training.retention_sums"], rtol=1e-5, atol=1e-5)


def test_capacity_is_upstreams() -> None:
    values = load_file(UPSTREAM / "values.safetensors")
    sums = values["training.retention_sums"]
    shared = join_overruns([capacity_overrun(row, 8, is_global=True) for row in sums]).mean()
    torch.testing.assert_close(shared[None], values["training.capacity_global_1_m8"], rtol=1e-5, atol=1e-6)
    local = capacity_overrun(sums[0], 8, is_global=False).mean()
    torch.testing.assert_close(local[None], values["training.capacity_global_0_m8"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 128, 300])
def test_sums_and_gradients_in_chunks_are_the_definitions(shape: DecayShape, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    log_beta = (-(torch.rand(3, tokens, generator=generator) ** 3)).requires_grad_()
    weight = torch.randn(3, tokens, generator=generator)
    wanted, got = defined(log_beta, shape), retention_sums(log_beta, shape)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    wanted_grad, got_grad = (torch.autograd.grad((sums * weight).sum(), log_beta)[0] for sums in (wanted, got))
    torch.testing.assert_close(got_grad, wanted_grad, rtol=1e-4, atol=1e-3)


def test_a_document_that_fits_its_budget_costs_nothing() -> None:
    sums = torch.full((2, 3, 10), 4.0)
    assert capacity_overrun(sums, 4.0, is_global=True).mean() == 0.0
    assert capacity_overrun(sums, 3.9, is_global=True).mean() > 0.0
