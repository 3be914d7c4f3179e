"""One optimiser step: losses and gradients over a process's batches, averaged over processes, checked and applied.

Owns the optimiser and the gradients. Knows no data beyond the batches it is given, no files and no steps but this one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from trimkv_core.training.batch import PAD_DOCUMENT, PackedBatch
from trimkv_core.training.gated_model import GatedDecoder
from trimkv_core.training.objective import Objective, step_loss

# Steps in a row that fp16 may skip while its gradient scaler looks for a scale.
_SKIPPED_STEPS = 20
_PARTS = ("loss", "kl", "ntp", "capacity", "soft_size")


class DivergedError(ArithmeticError):
    """A loss or a gradient is no finite number; the message says which. Parameters are as before the step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one step came to, over all batches and processes; the losses as in `StepLoss`.

    Attributes:
        tokens: trained on, padding left out.
        gradient_norm: before it was cut.
    """

    loss: float
    kl: float
    ntp: float
    capacity: float
    soft_size: float
    tokens: int
    gradient_norm: float


class Stepper:
    """Makes the steps of one process."""

    def __init__(
        self,
        accelerator: Accelerator,
        decoder: GatedDecoder,
        optimizer: torch.optim.Optimizer,
        *,
        max_grad_norm: float,
    ) -> None:
        self._accelerator, self._decoder, self._max_grad_norm = accelerator, decoder, max_grad_norm
        self._parameters = decoder.trainable()
        self._optimizer: Any = accelerator.prepare_optimizer(optimizer)
        self._skipped = 0

    @property
    def optimizer_state(self) -> dict[str, Any]:
        """The optimiser's `state_dict`."""
        state: dict[str, Any] = self._optimizer.state_dict()
        return state

    @property
    def scaler_state(self) -> dict[str, Any]:
        """The gradient scaler's `state_dict`; empty without one."""
        scaler = self._accelerator.scaler
        return {} if scaler is None else dict(scaler.state_dict())

    def restore(self, optimizer_state: dict[str, Any], scaler_state: dict[str, Any]) -> None:
        """Go on from the states of an earlier stepper."""
        self._optimizer.load_state_dict(optimizer_state)
        if self._accelerator.scaler is not None and scaler_state:
            self._accelerator.scaler.load_state_dict(scaler_state)

    def make(self, batches: Sequence[PackedBatch], objective: Objective, *, learning_rate: float) -> Figures:
        """Make one step.

        Raises:
            DivergedError: nothing was changed then.
        """
        accelerator = self._accelerator
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        sums = torch.zeros(len(_PARTS), device=accelerator.device)
        for batch in batches:
            with accelerator.autocast():
                loss = step_loss(self._decoder, batch.to(accelerator.device), objective)
            accelerator.backward(loss.total)
            parts = (loss.total.detach(), loss.kl, loss.ntp, loss.capacity, loss.soft_size)
            sums += torch.stack([part.float() for part in parts])
        tokens = sum(int((batch.document != PAD_DOCUMENT).sum()) for batch in batches)
        means = sums / (len(batches) * accelerator.num_processes)
        values: list[float] = self.total(torch.cat([means, sums.new_tensor([float(tokens)])])).tolist()
        try:
            _check_losses(values)
            norm = self._cut_gradients()
            self._optimizer.step()
        finally:
            self._optimizer.zero_grad()
        loss_value, kl, ntp, capacity, soft_size, all_tokens = values
        return Figures(
            loss=loss_value,
            kl=kl,
            ntp=ntp,
            capacity=capacity,
            soft_size=soft_size,
            tokens=round(all_tokens),
            gradient_norm=norm,
        )

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        if self._accelerator.num_processes == 1:
            return tensor
        total: Tensor = self._accelerator.reduce(tensor, reduction="sum")
        return total

    def _cut_gradients(self) -> float:
        """Average gradients over processes and cut them; returns their norm before."""
        processes = self._accelerator.num_processes
        for parameter in self._parameters:
            if parameter.grad is None:  # a gate that nothing read: other processes may still have one
                parameter.grad = torch.zeros_like(parameter)
        if processes > 1:
            # One exchange, not one a parameter.
            flat = self.total(torch.cat([p.grad.flatten() for p in self._parameters if p.grad is not None])) / processes
            parts = flat.split([parameter.numel() for parameter in self._parameters])
            for parameter, part in zip(self._parameters, parts, strict=True):
                parameter.grad = part.view_as(parameter)
        self._accelerator.unscale_gradients(self._optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm))
        if math.isfinite(norm):
            self._skipped = 0
            return norm
        self._skipped += 1
        if self._accelerator.scaler is not None and self._skipped <= _SKIPPED_STEPS:
            return norm  # the scaler skips the step, and looks for a smaller scale
        layers = [
            str(layer)
            for layer, gate in enumerate(self._decoder.gates)
            if any(p.grad is not None and not bool(torch.isfinite(p.grad).all()) for p in gate.parameters())
        ]
        raise DivergedError(f"the gradient is not finite (norm {norm:g}, in the gates of layers {', '.join(layers)})")


def _check_losses(values: Sequence[float]) -> None:
    named = list(zip(_PARTS, values, strict=False))
    bad = [name for name, value in named if not math.isfinite(value)]
    if bad:
        shown = ", ".join(f"{name}={value:g}" for name, value in named)
        raise DivergedError(f"{', '.join(bad)} not finite ({shown})")
