"""What computes a lean step's layers, as the step sees it: who does it differs by device and dtype.

Letters: T tokens of the packed batch, E hidden size, D head dimension, H KV heads, G query heads a KV head, N rows, V
vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from trimkv_core.lean.families import LayerModules


class AttentionInput(NamedTuple):
    """What a layer hands to attention.

    Attributes:
        query: [T, H·G, D].
        key, value: [T, H, D].
        log_beta: float32 [T, H]; None without a gate.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    log_beta: Tensor | None


class LeanOps(Protocol):
    """Results may lie in buffers that the next layer overwrites: the step uses them at once."""

    @property
    def name(self) -> str:
        """What start-up lines call it."""

    def pack(self, layer: LayerModules) -> Any:
        """A layer's weights as the other calls take them."""

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 [T] → hidden states [T, E], a fresh tensor."""

    def before_attention(self, layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> AttentionInput:
        """Norm, projections, heads' norms, rotation, gate: hidden [T, E], cos and sin [T, rotated dimensions]."""

    def after_attention(self, layer: Any, mixed: Tensor, hidden: Tensor) -> None:
        """Add the attention's output [T, H·G·D] and the MLP to `hidden` [T, E] in place."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Last norm and vocabulary: [N, E] → [N, V]."""
