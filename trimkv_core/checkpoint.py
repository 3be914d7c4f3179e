"""Gate checkpoints: a folder or hub repo with `config.json` and `trimkv_weights.pth` or `.safetensors`.

Reading and writing them, and every complaint about them. Knows no attention and no cache.
"""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save
from torch import Tensor

from trimkv_core.gates import GateKind, GateShape, RetentionGate

CONFIG_NAME = "config.json"
WEIGHT_NAMES = ("trimkv_weights.safetensors", "trimkv_weights.pth")
_KEY = "model.layers.{layer}.self_attn.retention_gate.{name}"


class CheckpointError(ValueError):
    """A gate checkpoint that cannot be used; the message lists everything that is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateConfig:
    """What a checkpoint's `config.json` says.

    Attributes:
        base_model: hub id or path of the model the gates lie over, relative paths already resolved.
        kind: gate architecture.
        intermediate_size: the gate's width.
        is_tied: whether the last projection and the bias are shared by all layers.
        is_global: whether the budget is one for all streams (DBTrimKV) or one for each (TrimKV).
        memory_size: M the gates were trained for.
        buffer_size: buffer the checkpoint asks for, None if it names none.
        num_sink_tokens: first positions that must stay.
        bias_init: start value of an untrained bias.
        raw: the whole file, so that saving loses nothing.
    """

    base_model: str
    kind: GateKind
    intermediate_size: int
    is_tied: bool
    is_global: bool
    memory_size: int | None
    buffer_size: int | None = None
    num_sink_tokens: int = 0
    bias_init: float = 18.0
    raw: dict[str, Any] = field(default_factory=dict)

    def shape(self, *, hidden_size: int, num_heads: int, num_layers: int) -> GateShape:
        """The gates' shape over a base model of these sizes."""
        return GateShape(
            kind=self.kind,
            hidden_size=hidden_size,
            intermediate_size=self.intermediate_size,
            num_heads=num_heads,
            num_layers=num_layers,
            is_tied=self.is_tied,
            bias_init=self.bias_init,
        )


def find_checkpoint(name: str, *, download_from: str = "huggingface") -> Path:
    """The folder of a checkpoint: `name` itself if it is one, else a download of the hub repo `name`.

    Raises:
        CheckpointError: `download_from` is unknown, or no such folder or repo can be had.
    """
    if download_from not in {"huggingface", "local"}:
        raise CheckpointError(f"download_from={download_from!r} is unknown: use 'huggingface' or 'local'")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if download_from == "local":
        raise CheckpointError(f"no folder {name!r}: download_from='local' needs one with {CONFIG_NAME}")
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG_NAME, *WEIGHT_NAMES]))
    except Exception as error:  # the hub client raises a dozen types, and all mean the same here
        raise CheckpointError(
            f"gates {name!r} are neither a folder nor a hub repo that can be reached: {error}"
        ) from error


def is_gate_checkpoint(folder: Path) -> bool:
    """Whether `folder` holds gates rather than a whole model."""
    config = folder / CONFIG_NAME
    if not config.is_file():
        return False
    try:
        return "retention_gate" in json.loads(config.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return False


def read_config(folder: Path) -> GateConfig:
    """Read `config.json`.

    Raises:
        CheckpointError: the file or a needed field is missing or of the wrong kind.
    """
    path = folder / CONFIG_NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {CONFIG_NAME}") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} is not a gate checkpoint's config: it holds no object")
    complaints = []
    if not isinstance(raw.get("base_model"), str):
        complaints.append("base_model: a hub id or path is needed")
    kinds = [kind.value for kind in GateKind]
    if raw.get("retention_gate") not in kinds:
        complaints.append(f"retention_gate: {raw.get('retention_gate')!r} is not one of {', '.join(kinds)}")
    size = raw.get("retention_gate_intermediate_size")
    if not isinstance(size, int) or size < 1:
        complaints.append(f"retention_gate_intermediate_size: {size!r} is not a positive number")
    for name in ("memory_size", "buffer_size", "num_sink_tokens"):
        value = raw.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            complaints.append(f"{name}: {value!r} is not a whole number of 0 or more")
    bias_init = raw.get("retention_gate_bias_init", 18.0)
    if not isinstance(bias_init, int | float):
        complaints.append(f"retention_gate_bias_init: {bias_init!r} is not a number")
    if complaints:
        raise CheckpointError(f"{path} is not a gate checkpoint's config: " + "; ".join(complaints))
    kind = GateKind(raw["retention_gate"])
    return GateConfig(
        base_model=_resolve_base(raw["base_model"], folder),
        kind=kind,
        intermediate_size=raw["retention_gate_intermediate_size"],
        is_tied=bool(raw.get("tie_retention_gate_layers", False)),
        is_global=bool(raw.get("global_capacity", kind is GateKind.RG10)),
        memory_size=raw.get("memory_size"),
        buffer_size=raw.get("buffer_size"),
        num_sink_tokens=raw.get("num_sink_tokens") or 0,
        bias_init=float(bias_init),
        raw=raw,
    )


def _resolve_base(base_model: str, folder: Path) -> str:
    """A path beside the checkpoint wins over one in the working directory; anything else is a hub id."""
    beside = folder / base_model
    return str(beside.resolve()) if beside.exists() else base_model


def _name_base(base_model: str, folder: Path) -> str:
    """A base in a folder is named from the checkpoint's, so that both can move together."""
    if not Path(base_model).exists():
        return base_model
    return os.path.relpath(Path(base_model).resolve(), folder.resolve())


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the gate weights.

    Raises:
        CheckpointError: no weight file, or one that cannot be read safely.
    """
    for name in WEIGHT_NAMES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            if path.suffix == ".safetensors":
                return load_file(path)
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
            raise CheckpointError(f"{path} does not hold a dictionary of tensors")
        return loaded
    raise CheckpointError(f"{folder} has neither {' nor '.join(WEIGHT_NAMES)}")


def load_gates(gates: list[RetentionGate], weights: dict[str, Tensor], *, is_tied: bool) -> None:
    """Copy a checkpoint's weights into the gates of a model, one gate a layer.

    Raises:
        CheckpointError: lists every missing, extra and misshapen key, and tied copies that differ. Nothing is copied
        then.
    """
    wanted = {
        _KEY.format(layer=layer, name=name): tensor
        for layer, gate in enumerate(gates)
        for name, tensor in gate.state_dict().items()
    }
    complaints = [f"missing: {key}" for key in wanted if key not in weights]
    complaints += [f"extra: {key}" for key in weights if key not in wanted]
    complaints += [
        f"misshapen: {key} is {list(weights[key].shape)}, the model needs {list(tensor.shape)}"
        for key, tensor in wanted.items()
        if key in weights and weights[key].shape != tensor.shape
    ]
    if is_tied:
        complaints += _differing_copies(gates, weights)
    if complaints:
        raise CheckpointError(f"{len(complaints)} problems with the gate weights:\n  " + "\n  ".join(complaints))
    with torch.no_grad():
        for key, tensor in wanted.items():
            tensor.copy_(weights[key])


def _differing_copies(gates: list[RetentionGate], weights: dict[str, Tensor]) -> list[str]:
    first = gates[0]
    last = next(name for name, module in first.named_children() if module is first.last_projection())
    complaints = []
    for name in (f"{last}.weight", "bias"):
        reference = weights.get(_KEY.format(layer=0, name=name))
        for layer in range(1, len(gates)):
            copy = weights.get(_KEY.format(layer=layer, name=name))
            if reference is not None and copy is not None and not torch.equal(reference, copy):
                complaints.append(f"tied copies differ: {_KEY.format(layer=layer, name=name)} from layer 0's")
    return complaints


def save_gates(gates: list[RetentionGate], config: GateConfig, folder: Path, *, use_safetensors: bool = False) -> None:
    """Write the checkpoint format back: a copy of tied weights for every layer, as released checkpoints have them."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        _KEY.format(layer=layer, name=name): tensor.detach().cpu().clone().contiguous()
        for layer, gate in enumerate(gates)
        for name, tensor in gate.state_dict().items()
    }
    if use_safetensors:
        # safetensors' own writing leaves a file that its user alone can read.
        (folder / WEIGHT_NAMES[0]).write_bytes(save(weights))
    else:
        torch.save(weights, folder / WEIGHT_NAMES[1])
    raw = dict(config.raw)
    raw |= {
        "base_model": _name_base(config.base_model, folder),
        "retention_gate": config.kind.value,
        "retention_gate_intermediate_size": config.intermediate_size,
        "tie_retention_gate_layers": config.is_tied,
        "global_capacity": config.is_global,
        "memory_size": config.memory_size,
        "num_sink_tokens": config.num_sink_tokens,
        "retention_gate_bias_init": config.bias_init,
        "trainable_params": raw.get("trainable_params", "self_attn.retention_gate"),
    }
    (folder / CONFIG_NAME).write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")
