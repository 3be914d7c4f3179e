"""Losses in blocks are the losses of the whole, and trimkv 0.1.5's."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures import UPSTREAM
from trimkv_core.training.batch import IGNORED
from trimkv_core.training.losses import LossKind, blocked_token_losses, forward_kl, next_token_loss, reverse_kl


def test_losses_are_upstreams() -> None:
    values = load_file(UPSTREAM / "values.safetensors")
    gated, teacher = values["training.gated_logits"], values["training.teacher_logits"]
    labels = values["training.labels"].long()
    kl = forward_kl(gated.flatten(0, 1), teacher.flatten(0, 1)).view_as(labels)[labels != IGNORED].mean()
    torch.testing.assert_close(kl[None], values["training.fwkl"], rtol=1e-5, atol=1e-6)
    shifted = labels[:, 1:].flatten()
    ntp = next_token_loss(gated[:, :-1].flatten(0, 1), shifted)[shifted != IGNORED].mean()
    torch.testing.assert_close(ntp[None], values["training.ntp"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", list(LossKind))
def test_blocked_losses_and_their_gradient_are_the_wholes(kind: LossKind) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(37, 6, generator=generator).requires_grad_()
    teacher = torch.randn(37, 6, generator=generator)
    head = torch.randn(50, 6, generator=generator)
    labels = torch.randint(0, 50, (37,), generator=generator)
    labels[:5] = IGNORED
    got = blocked_token_losses(hidden, teacher, head=head, labels=labels, kind=kind, block=8)

    counted = labels != IGNORED
    logits, teacher_logits = hidden[counted] @ head.t(), teacher[counted] @ head.t()
    forward, reverse, weight = kind.weights
    kl = forward * forward_kl(logits, teacher_logits).mean() + reverse * reverse_kl(logits, teacher_logits).mean()
    ntp = next_token_loss(logits, labels[counted]).mean()
    wanted = kl + weight * ntp
    torch.testing.assert_close(got.total, wanted)
    torch.testing.assert_close(got.ntp, ntp.detach())
    (3.0 * got.total).backward()
    (wanted_grad,) = torch.autograd.grad(3.0 * wanted, hidden)
    torch.testing.assert_close(hidden.grad, wanted_grad, rtol=1e-4, atol=1e-5)


def test_nothing_that_counts_is_no_loss() -> None:
    hidden = torch.randn(4, 6, requires_grad=True)
    labels = torch.full((4,), IGNORED)
    losses = blocked_token_losses(
        hidden, hidden.detach(), head=torch.randn(9, 6), labels=labels, kind=LossKind.FWKL_NTP
    )
    losses.total.backward()
    assert losses.total == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()
