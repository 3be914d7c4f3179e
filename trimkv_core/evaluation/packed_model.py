"""Packed steps through the stock model under the overlay, for families the lean step does not know.

Letters: T tokens of the packed batch, N rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimkv_core.attention.base import LayerStep
from trimkv_core.overlay import LayerAttention, StepCache


class _PackedCache(StepCache):
    """What the model sees of a packed step: [1, T] tokens of many sequences."""

    def __init__(self, num_layers: int, step: LayerStep) -> None:
        super().__init__(num_layers)
        self._step = step

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def attend(self, layer: int, attention: LayerAttention) -> Tensor:
        mixed = self._step.layer(
            layer,
            *(states[0].transpose(0, 1) for states in (attention.query, attention.key, attention.value)),
            log_beta=None if attention.log_beta is None else attention.log_beta[0],
            scale=attention.scale,
            window=attention.window,
        )
        return mixed[None]


class PackedModel:
    """Runs a model that the overlay is laid over; as `LeanDecoder`."""

    name = "overlay"

    def __init__(self, model: Any) -> None:
        self._model = model

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, position: Tensor, step: LayerStep, wanted: Tensor | None) -> Tensor:
        """As `LeanDecoder.forward`."""
        if wanted is None:
            wanted = torch.arange(token_ids.numel(), device=token_ids.device)
        count = wanted.numel()
        output = self._model(
            input_ids=token_ids[None],
            position_ids=position.long()[None],
            past_key_values=_PackedCache(self._model.config.num_hidden_layers, step),
            use_cache=True,
            # A stock model takes no empty list of rows.
            logits_to_keep=wanted if count else wanted.new_zeros(1),
        )
        logits: Tensor = output.logits[0, :count]
        return logits
