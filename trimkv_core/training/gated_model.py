"""A frozen decoder with gates in training, and the passes over it: ungated and gated.

Owns the hooks that hand attention what a pass needs, through the same overlay that serves. Knows no loss, no
optimiser and no cache.

Letters: L layers, H KV heads, G query heads a KV head, D head dimension, R rows, T tokens a row, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from trimkv_core.checkpoint import GateConfig
from trimkv_core.gates import RetentionGate
from trimkv_core.overlay import LayerAttention, attention_layers, gates_of
from trimkv_core.training.attention import Bias, blocked_attention, eager_attention
from trimkv_core.training.batch import Extent, PackedBatch, documents_of
from trimkv_core.training.flex import FlexLayout, flex_documents

ATTENTIONS = ("auto", "eager", "blocked", "flex")


# From a layer's number and its log β [R, T, H], the biases of every document.
BiasMaker = Callable[[int, Tensor], list[Bias]]


class _Pass:
    """One pass over the model; the overlay calls `attend` for every layer.

    Attributes:
        is_gated: whether log β is made.
        log_beta: of every layer so far, float32 [R, T, H].
    """

    def __init__(
        self,
        batch: PackedBatch,
        documents: list[Extent],
        *,
        attention: str,
        make_bias: BiasMaker | None,
        is_gated: bool,
    ) -> None:
        self.is_gated = is_gated
        self.log_beta: dict[int, Tensor] = {}
        self._documents, self._attention, self._make_bias = documents, attention, make_bias
        rows, tokens = batch.input_ids.shape
        device = batch.input_ids.device
        self._layout = FlexLayout(documents, rows=rows, tokens=tokens, device=device) if attention == "flex" else None

    def attend(self, layer: int, call: LayerAttention) -> Tensor:
        """As `StepCache.attend`: [R, T, H·G, D]. In the value's dtype: rotation leaves autocast in float32."""
        dtype = call.value.dtype
        if call.query.dtype != dtype:
            call = replace(call, query=call.query.to(dtype), key=call.key.to(dtype))
        with torch.autocast(call.query.device.type, enabled=False):
            return self._attend(layer, call)

    def _attend(self, layer: int, call: LayerAttention) -> Tensor:
        biases: list[Bias] | None = None
        if call.log_beta is not None:
            # A layer that is computed anew for the backward pass has been seen before.
            self.log_beta.setdefault(layer, call.log_beta)
            if self._make_bias is not None:
                biases = self._make_bias(layer, call.log_beta)
        if self._layout is not None:
            return flex_documents(call, self._layout, biases)
        return attend_documents(call, self._documents, biases, is_eager=self._attention == "eager")


def attend_documents(
    call: LayerAttention, documents: list[Extent], biases: list[Bias] | None, *, is_eager: bool = False
) -> Tensor:
    """Attention of every document by itself: [R, T, H·G, D]; padding gets zeros."""
    result = []
    attend = eager_attention if is_eager else blocked_attention
    for nth, document in enumerate(documents):
        part = slice(document.start, document.stop)
        query, key, value = (tensor[document.row, :, part] for tensor in (call.query, call.key, call.value))
        if biases is None and call.window is None:
            output = nn.functional.scaled_dot_product_attention(
                query[None], key[None], value[None], is_causal=True, scale=call.scale, enable_gqa=True
            )[0]
        else:
            bias = None if biases is None else biases[nth]
            output = attend(query, key, value, bias=bias, scale=call.scale, window=call.window)
        result.append(output.transpose(0, 1))
    if len(documents) == 1 and call.query.shape[0] == 1 and result[0].shape[0] == call.query.shape[2]:
        return result[0][None]
    return _lay_out(result, documents, call.query)


def _lay_out(parts: list[Tensor], documents: list[Extent], query: Tensor) -> Tensor:
    rows, heads, tokens, dim = query.shape
    index = torch.cat([torch.arange(d.start, d.stop, device=query.device) + d.row * tokens for d in documents])
    flat = query.new_zeros(rows * tokens, heads, dim).index_copy(0, index, torch.cat(parts))
    return flat.view(rows, tokens, heads, dim)


class GatedDecoder(nn.Module):
    """A loaded decoder whose gates are trained and whose backbone is frozen.

    Attributes:
        model: as `TrimKVForCausalLM.from_base` returns it, with gates.
        gates: one a layer.

    Args:
        model: the same.
        attention: `eager`, `blocked`, `flex`, or `auto`: `flex` on GPUs, else `blocked`.
        recomputes_layers: keep only each layer's input for the backward pass (gradient checkpointing).

    Raises:
        ValueError: no such attention, or a model without gates.
    """

    def __init__(self, model: PreTrainedModel, *, attention: str = "auto", recomputes_layers: bool = False) -> None:
        super().__init__()
        if attention not in ATTENTIONS:
            raise ValueError(f"attention={attention!r} is unknown: use one of {', '.join(ATTENTIONS)}")
        self.model = model
        self.gates: list[RetentionGate] = gates_of(model)
        if not self.gates:
            raise ValueError("this model has no gates to train: give it some first (add_gates)")
        self._attention = attention
        self._pass: _Pass | None = None
        model.requires_grad_(False)
        for gate in self.gates:
            gate.requires_grad_(True)
        self._handles = [
            module.register_forward_pre_hook(self._before_attention, with_kwargs=True)
            for module in attention_layers(model)
        ]
        if recomputes_layers:
            for layer in model.get_decoder().layers:
                layer.forward = self._recomputing(layer.forward)
        self._recomputes = recomputes_layers

    def remove(self) -> None:
        """Take the hooks off the model again."""
        for handle in self._handles:
            handle.remove()
        if self._recomputes:
            for layer in self.model.get_decoder().layers:
                del layer.forward  # the class's own comes back

    @property
    def head(self) -> Tensor:
        """The frozen output projection, [V, E]."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    def trainable(self) -> list[nn.Parameter]:
        """The gates' parameters, tied ones once."""
        return list({id(p): p for gate in self.gates for p in gate.parameters()}.values())

    def read(
        self,
        batch: PackedBatch,
        *,
        documents: list[Extent] | None = None,
        make_bias: BiasMaker | None = None,
        is_gated: bool = True,
    ) -> tuple[Tensor, list[Tensor]]:
        """One pass.

        Args:
            batch: see `PackedBatch`.
            documents: its documents, where they are known already: finding them waits for a GPU.
            make_bias: None: attention as it is without gates.
            is_gated: whether log β is made at all.

        Returns:
            last hidden states [R, T, E]; log β of every layer, float32 [R, T, H].
        """
        step = _Pass(
            batch,
            documents_of(batch) if documents is None else documents,
            attention=self._resolve(batch.input_ids.device),
            make_bias=make_bias,
            is_gated=is_gated,
        )
        self._pass = step
        try:
            output = self.model.get_decoder()(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
            )
        finally:
            self._pass = None
        log_beta = [step.log_beta[layer] for layer in sorted(step.log_beta)]
        return output.last_hidden_state, log_beta

    def _recomputing(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            step = self._pass
            if step is None or not torch.is_grad_enabled():
                return forward(*args, **kwargs)

            def again(*args: Any, **kwargs: Any) -> Any:
                # The backward pass comes when the pass itself is over.
                before, self._pass = self._pass, step
                try:
                    return forward(*args, **kwargs)
                finally:
                    self._pass = before

            return checkpoint(again, *args, use_reentrant=False, **kwargs)

        return run

    def _resolve(self, device: torch.device) -> str:
        if self._attention != "auto":
            return self._attention
        return "flex" if device.type == "cuda" else "blocked"

    def _before_attention(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        step = self._pass
        if step is None:
            return args, kwargs
        hidden: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        gate = module.retention_gate
        assert isinstance(gate, RetentionGate)
        log_beta = None
        if step.is_gated:
            # Whatever the precision of the rest: in fewer bits nearly all scores tie. With a gradient even where the
            # model has none: eviction lines, drawn in the ungated pass, move with the scores.
            with torch.autocast(hidden.device.type, enabled=False), torch.enable_grad():
                log_beta = gate(hidden.to(gate.linear1.weight.dtype))
        return args, {**kwargs, "trimkv_cache": step, "log_beta": log_beta}


def prepare_gates(model: Any, config: GateConfig, *, scales_inputs: bool, calibration: PackedBatch | None) -> None:
    """Give a base model fresh gates in float32, ready to train.

    Args:
        model: as `TrimKVForCausalLM.from_base` returns it.
        config: the gates' shape and where they start.
        scales_inputs: divide each first layer's initial weights by the root mean square of its input, which normalised
            hidden states of 0.05 to 0.4 ask for; the paper's start does not.
        calibration: tokens that the root mean square is measured on; needed to scale.
    """
    model.add_gates(config, None)
    for gate in gates_of(model):
        gate.float()
    if not scales_inputs:
        return
    if calibration is None:
        raise ValueError("scales_inputs needs tokens to measure on")
    decoder = GatedDecoder(model)
    squares: list[Tensor] = []
    handles = [
        gate.linear1.register_forward_pre_hook(lambda _, args: squares.append(args[0].float().square().mean()))
        for gate in decoder.gates
    ]
    with torch.no_grad():
        decoder.read(calibration)
        for gate, square in zip(decoder.gates, squares, strict=True):
            gate.linear1.weight /= square.sqrt().clamp(min=1e-3)
    for handle in handles:
        handle.remove()
    decoder.remove()
