"""Settings → what a run works with: the model with its gates, the stream of batches, the optimiser.

Owns how these are put together. Knows no loop and writes nothing.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoTokenizer

from trimkv_core.checkpoint import GateConfig, load_gates, read_config, read_weights
from trimkv_core.gates import GateKind, GateShape
from trimkv_core.models import TrimKVForCausalLM, find_gates, locate_base, names_gates
from trimkv_core.options import SettingsError
from trimkv_core.overlay import fix_rope, gates_of
from trimkv_core.training.data import SourceRecord, open_data
from trimkv_core.training.encoding import DocumentEncoder, DocumentStore
from trimkv_core.training.gated_model import GatedDecoder, prepare_gates
from trimkv_core.training.packing import BatchPlan, BatchStream
from trimkv_core.training.settings import TrainSettings

logger = logging.getLogger(__name__)

# Texts are served in sections of this many bytes, or of this many for each token of a row if that is more.
_SECTION_BYTES = 128 << 10
_SECTION_BYTES_A_TOKEN = 16


@dataclass(frozen=True, slots=True)
class TrainingData:
    """The data of a run.

    Attributes:
        records: what its sources were.
        store: its documents.
        stream: the batches of this process.
    """

    records: list[SourceRecord]
    store: DocumentStore
    stream: BatchStream


def open_training_data(settings: TrainSettings, *, rank: int, processes: int) -> TrainingData:
    """Find and check the data, and line up the batches of process `rank` of `processes`.

    Raises:
        SettingsError: `model` names gates, not a model.
        DataError: data that cannot be trained on, or fewer tokens than a step takes.
    """
    if names_gates(settings.model):
        raise SettingsError(
            f"--model={settings.model} is a gate checkpoint: name its base model, and it with --gates to start from it"
        )
    plan = BatchPlan(
        seq_len=settings.seq_len,
        batch_size=settings.batch_size,
        accumulation=settings.gradient_accumulation_steps,
        weights=settings.data_weights,
        long_seq_len=settings.long_seq_len,
        long_every=settings.long_every,
        seed=settings.seed,
    )
    longest = max(settings.seq_len, settings.long_seq_len or 0)
    sources = open_data(settings.data, section_bytes=max(_SECTION_BYTES, _SECTION_BYTES_A_TOKEN * longest))
    location, extra = locate_base(settings.model)
    encoder = DocumentEncoder(
        AutoTokenizer.from_pretrained(location, **extra), learns_assistant_only=settings.chat_loss == "assistant"
    )
    store = DocumentStore(sources, encoder)
    store.check_enough(plan.tokens(processes))
    stream = BatchStream(store, plan, rank=rank, processes=processes)
    return TrainingData([source.record for group in sources for source in group], store, stream)


def gate_config(settings: TrainSettings) -> GateConfig:
    """What the checkpoint's `config.json` will say of its gates.

    Raises:
        CheckpointError: `gates` names none that can be read.
    """
    about_the_run: dict[str, Any] = {
        "base_loss": settings.loss,
        "retention_weight": settings.capacity_weight,
        "max_seq_len": max(settings.seq_len, settings.long_seq_len or 0),
    }
    if settings.gates is not None:
        start = read_config(find_gates(settings.gates))
        return replace(
            start,
            base_model=settings.model,
            is_global=start.is_global if settings.global_capacity is None else settings.global_capacity,
            memory_size=settings.memory_size,
            num_sink_tokens=settings.num_sink_tokens,
            raw={**start.raw, **about_the_run},
        )
    kind = GateKind(settings.retention_gate)
    is_paper_kind = kind is GateKind.RG10
    return GateConfig(
        base_model=settings.model,
        kind=kind,
        intermediate_size=settings.retention_gate_intermediate_size,
        is_tied=is_paper_kind if settings.tie_retention_gate_layers is None else settings.tie_retention_gate_layers,
        is_global=is_paper_kind if settings.global_capacity is None else settings.global_capacity,
        memory_size=settings.memory_size,
        num_sink_tokens=settings.num_sink_tokens,
        bias_init=settings.bias_init,
        raw=about_the_run,
    )


def load_decoder(settings: TrainSettings, config: GateConfig, data: TrainingData, device: torch.device) -> GatedDecoder:
    """The frozen model on `device` with the gates that training starts from, in float32.

    Raises:
        CheckpointError: the gates to start from do not fit.
        UnsupportedModelError: a model family that is not known.
        SettingsError: an attention that cannot be trained on this device.
    """
    if settings.attention == "flex" and device.type != "cuda":
        raise SettingsError(
            f"--attention=flex is not possible on {device.type}: PyTorch has no backward pass of FlexAttention there; "
            "use auto, blocked or eager"
        )
    asked = settings.dtype
    dtype: Any = "auto" if asked == "auto" else getattr(torch, asked)
    if asked == "auto" and device.type == "cpu":
        dtype = torch.float32
    model = TrimKVForCausalLM.from_base(settings.model, dtype=dtype).to(device)
    longest, known = max(settings.seq_len, settings.long_seq_len or 0), model.config.max_position_embeddings
    if longest > known:
        logger.warning("rows of %d tokens are longer than the %d that %s knows", longest, known, settings.model)
    if note := fix_rope(model, longest):
        logger.info(note)
    torch.manual_seed(settings.seed)  # the same fresh gates in every process
    calibration = data.stream.first_row().to(device) if settings.scale_inputs else None
    prepare_gates(model, config, scales_inputs=settings.scale_inputs, calibration=calibration)
    if settings.gates is not None:
        load_gates(gates_of(model), read_weights(find_gates(settings.gates)), is_tied=config.is_tied)
    return GatedDecoder(model, attention=settings.attention, recomputes_layers=settings.gradient_checkpointing)


def gate_shape(config: GateConfig, decoder: GatedDecoder) -> GateShape:
    """The gates' shape over the loaded model."""
    base = decoder.model.config
    return config.shape(
        hidden_size=base.hidden_size, num_heads=base.num_key_value_heads, num_layers=base.num_hidden_layers
    )


def make_optimizer(settings: TrainSettings, decoder: GatedDecoder) -> torch.optim.Optimizer:
    """AdamW over the gates; biases do not decay."""
    parameters = decoder.trainable()
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate)
