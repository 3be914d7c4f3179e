"""What training compares: next-token distributions of the gated model, the ungated teacher and the text.

Logits are made in blocks of tokens from the last hidden states, with their gradient at once, and dropped: at 131,072
tokens and a vocabulary of 151,936 the logits alone would be 80 GB in float32; a block of 512 is 0.3 GB.

Letters: N tokens, E hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimkv_core.training.batch import IGNORED


class LossKind(StrEnum):
    """What the gates are trained on.

    `fwkl`: KL(teacher ‖ gated). `ntp`: cross-entropy with the next token. `fwkl_ntp`: their mean, the released
    checkpoints'. `rvkl`: KL(gated ‖ teacher). `rvkl_ntp`: its mean with `ntp`.
    """

    FWKL = "fwkl"
    NTP = "ntp"
    FWKL_NTP = "fwkl_ntp"
    RVKL = "rvkl"
    RVKL_NTP = "rvkl_ntp"

    @property
    def weights(self) -> tuple[float, float, float]:
        """Weights of forward KL, reverse KL and next-token loss."""
        return {
            LossKind.FWKL: (1.0, 0.0, 0.0),
            LossKind.NTP: (0.0, 0.0, 1.0),
            LossKind.FWKL_NTP: (0.5, 0.0, 0.5),
            LossKind.RVKL: (0.0, 1.0, 0.0),
            LossKind.RVKL_NTP: (0.0, 0.5, 0.5),
        }[self]


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """Mean losses over the counted tokens, in nats.

    Attributes:
        total: the weighted sum that is trained on; has a gradient.
        kl: forward or reverse KL, whichever is trained on; 0 for `ntp`.
        ntp: next-token cross-entropy.
    """

    total: Tensor
    kl: Tensor
    ntp: Tensor


def forward_kl(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher ‖ gated) of every token: [N, V] both → float32 [N]."""
    teacher = torch.log_softmax(teacher_logits.float(), -1)
    return (teacher.exp() * (teacher - torch.log_softmax(logits.float(), -1))).sum(-1)


def reverse_kl(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(gated ‖ teacher) of every token: [N, V] both → float32 [N]."""
    return forward_kl(teacher_logits, logits)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the label of every token, 0 where it is `IGNORED`: [N, V], int64 [N] → float32 [N]."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")


def blocked_token_losses(
    hidden: Tensor,
    teacher_hidden: Tensor,
    *,
    head: Tensor,
    labels: Tensor,
    kind: LossKind,
    block: int = 512,
) -> TokenLosses:
    """The losses of many tokens without holding their logits.

    Args:
        hidden: [N, E], the gated model's last hidden states, after the last norm.
        teacher_hidden: [N, E], the ungated model's.
        head: [V, E], the frozen output projection.
        labels: int64 [N], the next token; `IGNORED` where neither loss counts.
        kind: what is trained on.
        block: tokens whose logits are held at once.

    Returns:
        means over the tokens that count; zeros without any.
    """
    counted = (labels != IGNORED).nonzero()[:, 0]
    total, kl, ntp = _BlockedLosses.apply(  # type: ignore[no-untyped-call]
        hidden[counted], teacher_hidden[counted], head, labels[counted], kind, block
    )
    return TokenLosses(total, kl.detach(), ntp.detach())


class _BlockedLosses(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - `apply` takes no keywords
        ctx: Any, hidden: Tensor, teacher_hidden: Tensor, head: Tensor, labels: Tensor, kind: LossKind, block: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        forward_weight, reverse_weight, ntp_weight = kind.weights
        grad = torch.empty_like(hidden)
        kl, ntp = hidden.new_zeros((), dtype=torch.float32), hidden.new_zeros((), dtype=torch.float32)
        count = max(hidden.shape[0], 1)
        for first in range(0, hidden.shape[0], block):
            part = slice(first, first + block)
            log_p = torch.log_softmax((hidden[part] @ head.t()).float(), -1)
            p = log_p.exp()
            ntp -= log_p.gather(1, labels[part, None]).sum()
            # The gradient of the losses' sum with respect to the logits, one term after another.
            logit_grad = p * (forward_weight + ntp_weight)
            if ntp_weight:
                logit_grad.scatter_add_(
                    1, labels[part, None], torch.full_like(labels[part, None], -ntp_weight, dtype=p.dtype)
                )
            if forward_weight or reverse_weight:
                log_q = torch.log_softmax((teacher_hidden[part] @ head.t()).float(), -1)
                if forward_weight:
                    q = log_q.exp()
                    kl += (q * log_q.sub(log_p)).sum()
                    logit_grad.sub_(q, alpha=forward_weight)
                else:
                    gap = log_p - log_q
                    divergence = (p * gap).sum(-1, keepdim=True)
                    kl += divergence.sum()
                    logit_grad += reverse_weight * p * (gap - divergence)
            grad[part] = logit_grad.to(head.dtype) @ head
        ctx.save_for_backward(grad)
        ctx.count = count
        kl, ntp = kl / count, ntp / count
        return (forward_weight + reverse_weight) * kl + ntp_weight * ntp, kl, ntp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * (grads[0] / ctx.count).to(grad.dtype), None, None, None, None, None
