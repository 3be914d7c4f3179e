"""The retention gates: what says, once and for all, how fast an entry may be forgotten.

Owns the two gate modules and how the gates of a model share their last projection. Knows no attention and no cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GateKind(StrEnum):
    """The gate's architecture, by the name it has in a checkpoint's config."""

    RG = "rg"
    RG10 = "rg10"


@dataclass(frozen=True, slots=True, kw_only=True)
class GateShape:
    """Everything needed to build the gates of a model.

    Attributes:
        kind: see `GateKind`.
        hidden_size: width of the attention layer's input.
        intermediate_size: width of the gate's own layers.
        num_heads: H, KV heads a layer.
        num_layers: L.
        is_tied: whether the last projection and the bias are one module for all layers.
        bias_init: start value of the bias; a large one forgets nothing.
    """

    kind: GateKind
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_layers: int
    is_tied: bool
    bias_init: float = 18.0


class RetentionGate(nn.Module):
    """Base of the gates: hidden states to log β.

    The last projection, the bias and logsigmoid run in float32 whatever the model's dtype: in bfloat16 nearly all
    scores of a gate with a large bias tie.
    """

    linear1: nn.Linear
    bias: nn.Parameter

    def last_projection(self) -> nn.Linear:
        """The layer that may be shared over all layers of a model, float32."""
        raise NotImplementedError

    def features(self, first: Tensor) -> Tensor:
        """The last projection's input from the first layer's output: [..., I] both, in the model's dtype."""
        raise NotImplementedError

    def forward(self, hidden: Tensor) -> Tensor:
        """Log β of every token and KV head.

        Args:
            hidden: [..., hidden size], the attention layer's input (after the input norm).

        Returns:
            float32 [..., H], at most 0.
        """
        return self.from_first_layer(self.linear1(hidden))

    def from_first_layer(self, first: Tensor) -> Tensor:
        """As `forward`, from the output of `linear1`: [..., I]. Who has it from a larger product starts here."""
        projected = F.linear(self.features(first).float(), self.last_projection().weight.float(), self.bias.float())
        return F.logsigmoid(projected)


class SingleLayerGate(RetentionGate):
    """Gate `rg` of TrimKV (arXiv 2512.03324): linear1 · SiLU · linear2 + bias."""

    def __init__(self, shape: GateShape) -> None:
        super().__init__()
        self.linear1 = nn.Linear(shape.hidden_size, shape.intermediate_size)
        self.linear2 = nn.Linear(shape.intermediate_size, shape.num_heads, bias=False, dtype=torch.float32)
        self.bias = nn.Parameter(torch.full((shape.num_heads,), shape.bias_init, dtype=torch.float32))

    def last_projection(self) -> nn.Linear:
        return self.linear2

    def features(self, first: Tensor) -> Tensor:
        return F.silu(first)


class TwoLayerGate(RetentionGate):
    """Gate `rg10` of DBTrimKV (arXiv 2605.09649): linear1 · SiLU · linear2 · SiLU · linear3 + bias."""

    def __init__(self, shape: GateShape) -> None:
        super().__init__()
        self.linear1 = nn.Linear(shape.hidden_size, shape.intermediate_size)
        self.linear2 = nn.Linear(shape.intermediate_size, shape.intermediate_size)
        self.linear3 = nn.Linear(shape.intermediate_size, shape.num_heads, bias=False, dtype=torch.float32)
        self.bias = nn.Parameter(torch.full((shape.num_heads,), shape.bias_init, dtype=torch.float32))

    def last_projection(self) -> nn.Linear:
        return self.linear3

    def features(self, first: Tensor) -> Tensor:
        return F.silu(self.linear2(F.silu(first)))


def build_gates(shape: GateShape, *, device: torch.device | str = "cpu", dtype: torch.dtype) -> list[RetentionGate]:
    """One gate a layer, tied if the shape says so.

    Args:
        shape: see `GateShape`.
        device: where the parameters live.
        dtype: of all layers but the last projection and the bias, which are float32.
    """
    cls: type[TwoLayerGate | SingleLayerGate] = TwoLayerGate if shape.kind is GateKind.RG10 else SingleLayerGate
    gates: list[RetentionGate] = []
    for _ in range(shape.num_layers):
        gate: RetentionGate = cls(shape)
        for name, module in gate.named_children():
            is_last = module is gate.last_projection()
            getattr(gate, name).to(device=device, dtype=torch.float32 if is_last else dtype)
        gate.bias.data = gate.bias.data.to(device)
        gates.append(gate)
    if shape.is_tied:
        first = gates[0]
        name = next(name for name, module in first.named_children() if module is first.last_projection())
        for gate in gates[1:]:
            setattr(gate, name, first.last_projection())
            gate.bias = first.bias
    return gates
