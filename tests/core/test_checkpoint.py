"""Gate checkpoints: read, written back the same, and every complaint in one error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.core.tiny import load, save_base, save_random_gates
from tests.fixtures import UPSTREAM
from trimkv_core import TrimKVForCausalLM, TrimKVQwen3ForCausalLM
from trimkv_core.checkpoint import CheckpointError, find_checkpoint, read_config, read_weights
from trimkv_core.gates import GateKind
from trimkv_core.models import UnsupportedModelError
from trimkv_core.overlay import gates_of

KEY = "model.layers.{}.self_attn.retention_gate.{}"


@pytest.mark.parametrize("folder", ["gates_rg10", "gates_rg"])
@pytest.mark.parametrize("use_safetensors", [False, True])
def test_a_released_checkpoint_is_written_back_the_same(folder: str, use_safetensors: bool, tmp_path: Path) -> None:
    model = TrimKVQwen3ForCausalLM.from_pretrained(str(UPSTREAM / folder), dtype=torch.float32)
    model.save_trimkv(tmp_path, use_safetensors=use_safetensors)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1, "weights are as private as the config"
    before, after = read_weights(UPSTREAM / folder), read_weights(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    old = json.loads((UPSTREAM / folder / "config.json").read_text())
    new = json.loads((tmp_path / "config.json").read_text())
    assert old.keys() <= new.keys()
    assert {name: new[name] for name in old if name != "base_model"} == {
        name: value for name, value in old.items() if name != "base_model"
    }
    again = TrimKVQwen3ForCausalLM.from_pretrained(str(tmp_path), dtype=torch.float32)
    assert again.gate_config.is_tied == model.gate_config.is_tied


def test_tied_gates_share_one_projection_and_one_bias(tmp_path: Path) -> None:
    _, model = load(tmp_path, "qwen3")
    gates = gates_of(model)
    assert len({id(gate.last_projection()) for gate in gates}) == 1
    assert len({id(gate.bias) for gate in gates}) == 1
    assert len({id(gate.linear1) for gate in gates}) == 3
    save_random_gates(tmp_path / "untied", tmp_path / "base", kind=GateKind.RG)
    untied = gates_of(TrimKVForCausalLM.from_pretrained(str(tmp_path / "untied")))
    assert len({id(gate.last_projection()) for gate in untied}) == 3


def test_the_last_projection_stays_float32_in_a_bfloat16_model(tmp_path: Path) -> None:
    load(tmp_path, "qwen3")
    model = TrimKVForCausalLM.from_pretrained(str(tmp_path / "gates"), dtype=torch.bfloat16)
    for gate in gates_of(model):
        assert gate.linear1.weight.dtype == torch.bfloat16
        assert gate.last_projection().weight.dtype == gate.bias.dtype == torch.float32
        assert gate(torch.randn(2, 32, dtype=torch.bfloat16)).dtype == torch.float32


def test_every_fault_of_the_weights_is_in_one_error(tmp_path: Path) -> None:
    load(tmp_path, "qwen3")
    weights = read_weights(tmp_path / "gates")
    del weights[KEY.format(0, "linear1.bias")]
    weights["model.layers.9.self_attn.retention_gate.bias"] = torch.zeros(2)
    weights[KEY.format(1, "linear2.weight")] = torch.zeros(8, 9)
    weights[KEY.format(2, "bias")] = weights[KEY.format(2, "bias")] + 1
    torch.save(weights, tmp_path / "gates" / "trimkv_weights.pth")
    with pytest.raises(CheckpointError) as caught:
        TrimKVForCausalLM.from_pretrained(str(tmp_path / "gates"))
    message = str(caught.value)
    assert "4 problems" in message
    assert f"missing: {KEY.format(0, 'linear1.bias')}" in message
    assert "extra: model.layers.9" in message
    assert f"misshapen: {KEY.format(1, 'linear2.weight')} is [8, 9], the model needs [8, 8]" in message
    assert f"tied copies differ: {KEY.format(2, 'bias')}" in message


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"base_model": None}, "base_model"),
        ({"retention_gate": "rg99"}, "retention_gate: 'rg99' is not one of rg, rg10"),
        ({"retention_gate_intermediate_size": 0}, "retention_gate_intermediate_size"),
        ({"memory_size": -3}, "memory_size: -3"),
    ],
)
def test_a_bad_config_says_what_is_bad(change: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    load(tmp_path, "qwen3")
    path = tmp_path / "gates" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=complaint):
        read_config(tmp_path / "gates")


def test_weights_that_run_code_are_not_loaded(tmp_path: Path) -> None:
    load(tmp_path, "qwen3")
    torch.save({"weights": print}, tmp_path / "gates" / "trimkv_weights.pth")
    with pytest.raises(CheckpointError, match="cannot be read"):
        TrimKVForCausalLM.from_pretrained(str(tmp_path / "gates"))


def test_a_missing_folder_file_or_source_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"needs one with config\.json"):
        find_checkpoint(str(tmp_path / "nothing"), download_from="local")
    with pytest.raises(CheckpointError, match="'wandb' is unknown"):
        find_checkpoint("somewhere", download_from="wandb")
    with pytest.raises(CheckpointError, match="neither a folder nor a hub repo"):
        find_checkpoint("nobody/nothing-at-all")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_config(tmp_path)
    with pytest.raises(CheckpointError, match="has neither"):
        read_weights(tmp_path)


def test_safetensors_beside_the_config_are_read(tmp_path: Path) -> None:
    load(tmp_path, "qwen3")
    pth = tmp_path / "gates" / "trimkv_weights.pth"
    save_file(torch.load(pth, weights_only=True), tmp_path / "gates" / "trimkv_weights.safetensors")
    pth.unlink()
    assert (
        load_file(tmp_path / "gates" / "trimkv_weights.safetensors").keys() == read_weights(tmp_path / "gates").keys()
    )
    TrimKVForCausalLM.from_pretrained(str(tmp_path / "gates"))


def test_an_unknown_family_is_named_with_the_known_ones(tmp_path: Path) -> None:
    save_base(tmp_path / "base", "qwen3")
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "gpt2"}))
    with pytest.raises(UnsupportedModelError, match="'gpt2': known families are qwen3"):
        TrimKVForCausalLM.from_base(str(tmp_path / "base"))


def test_fresh_gates_are_made_on_request(tmp_path: Path) -> None:
    load(tmp_path, "qwen3")
    (tmp_path / "gates" / "trimkv_weights.pth").unlink()
    model = TrimKVForCausalLM.from_pretrained(str(tmp_path / "gates"), load_trimkv_weights=False)
    assert torch.equal(gates_of(model)[0].bias, torch.full((2,), 3.0))
