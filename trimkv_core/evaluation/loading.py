"""From names to a model that can be judged: base model, gates, tokenizer and the decoder that runs them.

Knows no methods and no tasks.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from trimkv_core.checkpoint import WEIGHT_NAMES, CheckpointError, read_config
from trimkv_core.embedded import EMBEDDED_NAME
from trimkv_core.evaluation.feeding import Decoder
from trimkv_core.lean.decoder import make_lean_decoder
from trimkv_core.models import TrimKVForCausalLM, UnsupportedModelError, find_gates, locate_base, names_gates
from trimkv_core.overlay import fix_rope, gates_of
from trimkv_core.overlay_decoder import OverlayDecoder

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model, ready to read.

    Attributes:
        name: as it was asked for.
        base: of the base model, what `transformers` calls it: a folder or hub id.
        gates: their checkpoint; None without.
        gates_digest: of their weights, in hexadecimal; empty without.
        decoder: runs packed steps.
        config: the base model's.
        tokenizer: None if the model has none.
        num_sink_tokens: first positions that budgets pin for the gates.
    """

    name: str
    base: str
    gates: str | None
    gates_digest: str
    decoder: Decoder
    config: Any
    tokenizer: Any
    dtype: torch.dtype
    device: torch.device
    num_sink_tokens: int

    @property
    def has_gates(self) -> bool:
        """Whether entries can be ranked by gates."""
        return self.gates is not None


def load_model(
    name: str,
    gates: str | None = None,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    num_sink_tokens: int | None = None,
    max_tokens: int = 8192,
) -> LoadedModel:
    """Load a model with its gates.

    Args:
        name: `embedded`, hub repo id, folder or GGUF file; a folder with gates brings its base model.
        gates: of another checkpoint; None: those that belong to the model, if any.
        device: where it runs.
        dtype: of the weights; None: float32 on a CPU, bfloat16 elsewhere.
        num_sink_tokens: pinned for the gates; None: what their checkpoint says.
        max_tokens: the longest sequence, for a RoPE that depends on it.

    Raises:
        CheckpointError: of the gates.
        UnsupportedModelError: there is no such model, or it is none that can be judged.
    """
    base, gates = _names(name, gates)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    try:
        model = TrimKVForCausalLM.from_base(base, gates=gates, dtype=dtype, device_map=str(device))
    except (CheckpointError, UnsupportedModelError):
        raise
    except (OSError, ValueError) as error:  # what `transformers` says of names and files it cannot make a model of
        raise UnsupportedModelError(
            f"model {base!r} cannot be loaded: use {EMBEDDED_NAME}, a hub repo id, a folder or a GGUF file. {error}"
        ) from error
    note = fix_rope(model, max_tokens)
    if note is not None:
        logger.info("%s", note)
    sinks = model.gate_config.num_sink_tokens if model.gate_config is not None else 0
    decoder: Decoder = make_lean_decoder(model) or OverlayDecoder(model)
    logger.info("model=%s gates=%s decoder=%s dtype=%s device=%s", name, gates, decoder.name, dtype, device)
    return LoadedModel(
        name=name,
        base=locate_base(base)[0],
        gates=gates,
        gates_digest=_digest(find_gates(gates)) if gates and gates_of(model) else "",
        decoder=decoder,
        config=model.config,
        tokenizer=_load_tokenizer(base),
        dtype=dtype,
        device=device,
        num_sink_tokens=sinks if num_sink_tokens is None else num_sink_tokens,
    )


def read_dtype(name: str | None) -> torch.dtype | None:
    """A dtype by its name.

    Raises:
        ValueError: an unknown name.
    """
    if name is None:
        return None
    if name not in _DTYPES:
        raise ValueError(f"dtype {name!r} is unknown: use {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _names(name: str, gates: str | None) -> tuple[str, str | None]:
    """Base model and gates."""
    if names_gates(name):
        return (read_config(Path(name).expanduser()).base_model, name if gates is None else gates)
    if gates is None and name == EMBEDDED_NAME:
        gates = EMBEDDED_NAME
    return name, gates


def _load_tokenizer(base: str) -> Any:
    location, extra = locate_base(base)
    try:
        return AutoTokenizer.from_pretrained(location, **extra)
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.debug("no tokenizer in %s: %s", location, error)
        return None


def _digest(folder: Path) -> str:
    """Of a checkpoint's weights: results belong to what was measured, not to its name."""
    digest = hashlib.sha256()
    for weights in sorted(path for name in WEIGHT_NAMES if (path := folder / name).is_file()):
        digest.update(weights.read_bytes())
    return digest.hexdigest()
