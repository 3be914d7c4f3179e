"""The GPU's retention sums are the ones made in blocks."""

from __future__ import annotations

import pytest
import torch

from trimkv_core.kernels.retention_sums import pull_retentions, sum_retentions
from trimkv_core.training.retention_sums import retention_sums
from trimkv_core.training.shapes import DecayShape


@pytest.mark.parametrize("shape", [DecayShape(), DecayShape(epsilon=0.15, kappa=6.0)])
@pytest.mark.parametrize("tokens", [5, 300])
def test_sums_and_gradients_are_the_cpus(shape: DecayShape, tokens: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(tokens)
    log_beta = (-(torch.rand(2, tokens, generator=generator) ** 3)).requires_grad_()
    grad = torch.randn(2, tokens, generator=generator)
    wanted = retention_sums(log_beta, shape)
    (wanted_grad,) = torch.autograd.grad(wanted, log_beta, grad)
    on_device = log_beta.detach().to(device)
    got = sum_retentions(on_device, epsilon=shape.epsilon, kappa=shape.kappa)
    torch.testing.assert_close(got.cpu(), wanted.detach(), rtol=1e-5, atol=1e-4)
    got_grad = pull_retentions(on_device, grad.to(device), epsilon=shape.epsilon, kappa=shape.kappa)
    torch.testing.assert_close(got_grad.cpu(), wanted_grad, rtol=1e-4, atol=1e-2)
