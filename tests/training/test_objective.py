"""A step's loss: trimkv 0.1.5's gated model, what gets gradients, and what packing must not change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.core.tiny import load
from tests.fixtures import UPSTREAM
from trimkv_core import TrimKVQwen3ForCausalLM
from trimkv_core.overlay import attention_layers
from trimkv_core.training.attention import Bias, Decay
from trimkv_core.training.batch import IGNORED, PackedBatch, documents_of
from trimkv_core.training.evictions import EvictionRule
from trimkv_core.training.gated_model import GatedDecoder, prepare_gates
from trimkv_core.training.losses import LossKind
from trimkv_core.training.objective import Objective, step_loss
from trimkv_core.training.shapes import DecayShape


def gated_model(folder: Path, family: str) -> Any:
    return load(folder, family)[1]


def pack(*rows: list[torch.Tensor], tokens: int) -> PackedBatch:
    """Documents laid end to end, one list a row."""
    batch = PackedBatch(
        input_ids=torch.zeros(len(rows), tokens, dtype=torch.long),
        labels=torch.full((len(rows), tokens), IGNORED),
        position_ids=torch.zeros(len(rows), tokens, dtype=torch.long),
        document=torch.full((len(rows), tokens), -1),
    )
    for row, documents in enumerate(rows):
        start = 0
        for number, ids in enumerate(documents):
            part = slice(start, start + len(ids))
            batch.input_ids[row, part] = ids
            batch.labels[row, start : start + len(ids) - 1] = ids[1:]
            batch.position_ids[row, part] = torch.arange(len(ids))
            batch.document[row, part] = number
            start += len(ids)
    return batch


def random_documents(*lengths: int, vocabulary: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(3, vocabulary, (length,), generator=generator) for length in lengths]


@pytest.fixture(scope="module")
def upstream() -> Any:
    return TrimKVQwen3ForCausalLM.from_pretrained(
        str(UPSTREAM / "gates_rg10"), download_from="local", dtype=torch.float32
    )


@pytest.mark.parametrize("attention", ["eager", "blocked"])
def test_gated_logits_are_upstreams(upstream: Any, attention: str) -> None:
    values = load_file(UPSTREAM / "values.safetensors")
    ids = values["training.input_ids"].long()
    batch = pack([ids[0]], [ids[1]], tokens=48)
    decoder = GatedDecoder(upstream, attention=attention)

    def plain(layer: int, log_beta: torch.Tensor) -> list[Bias]:
        return [Decay(row.t(), DecayShape()) for row in log_beta]

    with torch.no_grad():
        teacher, _ = decoder.read(batch, is_gated=False)
        hidden, log_beta = decoder.read(batch, make_bias=plain)
    torch.testing.assert_close(teacher @ decoder.head.t(), values["training.teacher_logits"], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(hidden @ decoder.head.t(), values["training.gated_logits"], rtol=1e-5, atol=2e-5)
    stacked = torch.stack([layer.transpose(1, 2) for layer in log_beta], 1)
    torch.testing.assert_close(stacked, values["training.log_beta"], rtol=1e-5, atol=1e-5)


OBJECTIVES = [
    Objective(loss=LossKind.FWKL_NTP, memory_size=4),
    Objective(loss=LossKind.RVKL, memory_size=4, shape=DecayShape(epsilon=0.2, kappa=3.0), num_sink_tokens=2),
    Objective(loss=LossKind.FWKL_NTP, evictions=EvictionRule(memory_size=4, interval=8, num_sink_tokens=2)),
    Objective(loss=LossKind.NTP, memory_size=4, is_global=False),
]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("family", ["qwen3", "phi3", "mistral-window"])
def test_only_gates_get_gradients_and_all_of_them(objective: Objective, family: str, tmp_path: Path) -> None:
    model = gated_model(tmp_path, family)
    decoder = GatedDecoder(model)
    step_loss(decoder, pack(random_documents(30, 20), tokens=56), objective).total.backward()
    gates = {id(parameter) for parameter in decoder.trainable()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in gates), name
    grads = [parameter.grad for parameter in decoder.trainable()]
    assert all(grad is not None and torch.isfinite(grad).all() and grad.any() for grad in grads)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_packing_and_padding_do_not_change_a_documents_loss(objective: Objective, tmp_path: Path) -> None:
    decoder = GatedDecoder(gated_model(tmp_path, "llama"))
    first, second = random_documents(33, 33)
    alone = [step_loss(decoder, pack([ids], tokens=33), objective) for ids in (first, second)]
    together = step_loss(decoder, pack([first, second], tokens=70), objective)
    apart = step_loss(decoder, pack([first], [second], tokens=40), objective)
    for losses in (together, apart):
        torch.testing.assert_close(losses.kl, (alone[0].kl + alone[1].kl) / 2, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(losses.ntp, (alone[0].ntp + alone[1].ntp) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_blocked_and_eager_attention_give_one_loss(objective: Objective, tmp_path: Path) -> None:
    model = gated_model(tmp_path, "qwen3")
    batch = pack(random_documents(70, 31), tokens=101)
    totals = [step_loss(GatedDecoder(model, attention=name), batch, objective).total for name in ("eager", "blocked")]
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-5, atol=1e-6)


def test_recomputed_layers_give_the_same_gradients(tmp_path: Path) -> None:
    model = gated_model(tmp_path, "qwen3")
    batch = pack(random_documents(40), tokens=40)
    grads = []
    for recomputes in (False, True):
        decoder = GatedDecoder(model, recomputes_layers=recomputes)
        model.zero_grad()
        step_loss(decoder, batch, OBJECTIVES[0]).total.backward()
        grads.append([parameter.grad.clone() for parameter in decoder.trainable() if parameter.grad is not None])
        decoder.remove()
    assert len(grads[0]) == len(decoder.trainable())
    for wanted, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted)


def test_an_eviction_budget_that_holds_everything_changes_nothing(tmp_path: Path) -> None:
    decoder = GatedDecoder(gated_model(tmp_path, "llama"))
    batch = pack(random_documents(40), tokens=40)
    objective = replace(OBJECTIVES[2], evictions=EvictionRule(memory_size=40, interval=8))
    assert step_loss(decoder, batch, objective).kl.abs() < 1e-6


def test_scaled_inputs_reach_every_gate_with_the_same_strength(tmp_path: Path) -> None:
    model = gated_model(tmp_path, "llama")
    config = model.gate_config
    batch = pack(random_documents(40), tokens=40)
    prepare_gates(model, config, scales_inputs=True, calibration=batch)
    decoder = GatedDecoder(model)
    seen: list[torch.Tensor] = []
    for attention in attention_layers(model):
        attention.retention_gate.linear1.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    with torch.no_grad():
        decoder.read(batch)
    for attention, hidden in zip(attention_layers(model), seen, strict=True):
        gate = attention.retention_gate
        bound = 1.0 / gate.linear1.in_features**0.5
        assert gate.linear1.weight.detach().abs().max() * hidden.square().mean().sqrt() == pytest.approx(bound, rel=0.1)


def test_documents_end_where_their_number_changes() -> None:
    batch = pack(random_documents(3, 4), random_documents(5), tokens=8)
    spans = [(found.row, found.start, found.stop) for found in documents_of(batch)]
    assert spans == [(0, 0, 3), (0, 3, 7), (1, 0, 5)]
