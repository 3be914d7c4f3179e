"""Packed steps through the stock model under the overlay: for families the lean step does not know, and to check it.

Letters: T tokens of the packed batch, N rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimkv_core.attention.base import LayerStep
from trimkv_core.overlay import LayerAttention, StepCache


class _PackedCache(StepCache):
    """What the model sees of a packed step: [1, T (+ padding)] tokens of many sequences."""

    def __init__(self, num_layers: int, step: LayerStep, tokens: int) -> None:
        super().__init__(num_layers)
        self._step = step
        self._tokens = tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def attend(self, layer: int, attention: LayerAttention) -> Tensor:
        tokens = self._tokens
        query, key, value = (
            states[0, :, :tokens].transpose(0, 1) for states in (attention.query, attention.key, attention.value)
        )
        mixed = self._step.layer(
            layer,
            query,
            key,
            value,
            log_beta=None if attention.log_beta is None else attention.log_beta[0, :tokens],
            scale=attention.scale,
            window=attention.window,
        )
        padding = attention.query.shape[2] - tokens
        if padding:
            mixed = torch.cat([mixed, mixed.new_zeros(padding, *mixed.shape[1:])])
        return mixed[None]


class OverlayDecoder:
    """Runs a model that the overlay is laid over.

    Args:
        model: as `TrimKVForCausalLM` returns it.
        min_rows: rows a forward is padded to.
    """

    name = "overlay"

    def __init__(self, model: Any, *, min_rows: int = 1) -> None:
        self._model = model
        self._min_rows = min_rows

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, position: Tensor, step: LayerStep, wanted: Tensor | None) -> Tensor:
        """As `LeanDecoder.forward`."""
        padding = max(self._min_rows - token_ids.numel(), 0)
        if wanted is None:
            wanted = torch.arange(token_ids.numel(), device=token_ids.device)
        count = wanted.numel()
        kept = F.pad(wanted, (0, max(self._min_rows - count, 0))) if count else wanted.new_zeros(1)
        output = self._model(
            input_ids=F.pad(token_ids, (0, padding))[None],
            position_ids=F.pad(position.long(), (0, padding))[None],
            past_key_values=_PackedCache(self._model.config.num_hidden_layers, step, token_ids.numel()),
            use_cache=True,
            logits_to_keep=kept,
        )
        logits: Tensor = output.logits[0, :count]
        return logits
