"""`from_pretrained`: a stock `transformers` model with retention gates laid over it.

Owns how a name becomes a loaded model: hub ids, folders, GGUF files, gate checkpoints and the embedded model. Knows no
pages.
"""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any, Self

import torch
from transformers import (
    AutoConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralForCausalLM,
    Phi3ForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.utils import is_flash_attn_2_available

from trimkv_core.checkpoint import (
    GateConfig,
    find_checkpoint,
    is_gate_checkpoint,
    load_gates,
    read_config,
    read_weights,
    save_gates,
)
from trimkv_core.embedded import EMBEDDED_NAME, embedded_gates_path, embedded_model_path
from trimkv_core.gates import build_gates
from trimkv_core.overlay import ATTENTION_NAME, attention_layers, gates_of, lay_over, register_attention

logger = logging.getLogger(__name__)

# What this `transformers` calls the cache (5.24 renamed it); both names are taken here without a warning.
_CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


_warned_about: set[str] = set()


class UnsupportedModelError(ValueError):
    """A model family the overlay does not know."""


class TrimKVMixin:
    """Loads and saves gates beside a stock decoder; put before a `transformers` class.

    Attributes:
        gate_config: what the gate checkpoint says; None without gates.
    """

    gate_config: GateConfig | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        load_trimkv_weights: bool = True,
        download_from: str = "huggingface",
        use_cache: bool = True,
        device_map: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Load gates and, under them, the base model they name.

        Args:
            path: gate checkpoint: folder, hub repo id, or `embedded`.
            dtype, torch_dtype: of the base model; None: as it is stored.
            load_trimkv_weights: False starts with fresh gates.
            download_from: `huggingface`, or `local` for a folder only.
            use_cache, device_map, kwargs: as in `transformers`.

        Raises:
            CheckpointError: the gates cannot be used; lists everything that is wrong.
        """
        folder = find_gates(path, download_from=download_from)
        config = read_config(folder)
        base = str(embedded_model_path()) if path == EMBEDDED_NAME else config.base_model
        model: Any = cls.from_base(
            base,
            dtype=dtype if dtype is not None else torch_dtype,
            device_map=device_map,
            use_cache=use_cache,
            **kwargs,
        )
        model.add_gates(config, folder if load_trimkv_weights else None)
        return model  # type: ignore[no-any-return]

    @classmethod
    def from_base(cls, name: str, *, dtype: torch.dtype | str | None = None, **kwargs: Any) -> Self:
        """Load a base model without gates: served dense. `name`: folder, hub repo id, GGUF file or `embedded`."""
        register_attention()
        use_cache = kwargs.pop("use_cache", True)
        asked = kwargs.pop("attn_implementation", None)
        location, extra = locate_base(name)
        model: Any = super().from_pretrained(  # type: ignore[misc]
            location, dtype=dtype, attn_implementation=ATTENTION_NAME, **extra, **kwargs
        )
        devices = {str(parameter.device) for parameter in model.parameters()}
        if len(devices) > 1:
            raise ValueError(f"the model lies on {', '.join(sorted(devices))}: one page pool serves one device")
        model.config.use_cache = use_cache
        model.config.base_model = name
        lay_over(model)
        # A hook and no `forward` of our own: `generate` reads the signature of the stock one.
        model.register_forward_pre_hook(_before_forward, with_kwargs=True)
        if asked is not None:
            _note_attention(asked)
        return model.eval()  # type: ignore[no-any-return]

    def add_gates(self, config: GateConfig, folder: Path | None) -> None:
        """Give every layer its gate, with the weights in `folder`, or fresh ones for None."""
        model: Any = self
        base = model.config
        shape = config.shape(
            hidden_size=base.hidden_size, num_heads=base.num_key_value_heads, num_layers=base.num_hidden_layers
        )
        gates = build_gates(shape, device=model.device, dtype=model.dtype)
        if folder is not None:
            load_gates(gates, read_weights(folder), is_tied=config.is_tied)
        for attention, gate in zip(attention_layers(model), gates, strict=True):
            attention.retention_gate = gate.eval()
        self.gate_config = config
        base.retention_gate = config.kind.value
        base.retention_gate_intermediate_size = config.intermediate_size
        base.tie_retention_gate_layers = config.is_tied
        base.global_capacity = config.is_global
        base.memory_size = config.memory_size
        base.buffer_size = config.buffer_size
        base.num_sink_tokens = config.num_sink_tokens

    def save_trimkv(self, folder: str | Path, *, use_safetensors: bool = False) -> None:
        """Write the gates as a checkpoint that `from_pretrained` reads."""
        if self.gate_config is None:
            raise ValueError("this model has no gates to save")
        save_gates(gates_of(self), self.gate_config, Path(folder), use_safetensors=use_safetensors)


class TrimKVQwen3ForCausalLM(TrimKVMixin, Qwen3ForCausalLM):
    """Qwen3 with retention gates."""


class TrimKVQwen2ForCausalLM(TrimKVMixin, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5 with retention gates."""


class TrimKVLlamaForCausalLM(TrimKVMixin, LlamaForCausalLM):
    """Llama (and SmolLM2) with retention gates."""


class TrimKVMistralForCausalLM(TrimKVMixin, MistralForCausalLM):
    """Mistral with retention gates."""


class TrimKVPhi3ForCausalLM(TrimKVMixin, Phi3ForCausalLM):
    """Phi-3 with retention gates."""


FAMILIES: dict[str, type[TrimKVMixin]] = {
    "qwen3": TrimKVQwen3ForCausalLM,
    "qwen2": TrimKVQwen2ForCausalLM,
    "llama": TrimKVLlamaForCausalLM,
    "mistral": TrimKVMistralForCausalLM,
    "phi3": TrimKVPhi3ForCausalLM,
}


class TrimKVForCausalLM:
    """Picks the family from the base model's config."""

    @staticmethod
    def from_pretrained(path: str, *, download_from: str = "huggingface", **kwargs: Any) -> Any:
        """A `TrimKV…ForCausalLM` of the right family; arguments as in `TrimKVMixin.from_pretrained`."""
        if path == EMBEDDED_NAME:
            base = EMBEDDED_NAME
        else:
            base = read_config(find_checkpoint(path, download_from=download_from)).base_model
        return family_of(base).from_pretrained(path, download_from=download_from, **kwargs)

    @staticmethod
    def from_base(name: str, *, gates: str | None = None, **kwargs: Any) -> Any:
        """A base model with the gates of a checkpoint laid over it, whatever base that names; without gates: dense."""
        model: Any = family_of(name).from_base(name, **kwargs)
        if gates is not None:
            folder = find_gates(gates)
            model.add_gates(read_config(folder), folder)
        return model


def _before_forward(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Take both names of the cache, and answer a changed `config._attn_implementation` with our attention."""
    if _CACHE_ARGUMENT == "cache" and "past_key_values" in kwargs:
        kwargs["cache"] = kwargs.pop("past_key_values")
    asked = model.config._attn_implementation
    if asked != ATTENTION_NAME:
        model.config._attn_implementation = ATTENTION_NAME
        _note_attention(asked)
    return args, kwargs


def _note_attention(asked: str) -> None:
    if asked in _warned_about or asked == ATTENTION_NAME:
        return
    _warned_about.add(asked)
    is_missing = asked.startswith("flash") and not is_flash_attn_2_available()
    note = ", and flash-attn is not installed" if is_missing else ""
    logger.warning("attention %r was asked for%s: paged attention runs in its place", asked, note)


def family_of(name: str) -> type[TrimKVMixin]:
    """The class for a base model.

    Raises:
        UnsupportedModelError: a family the overlay does not know.
    """
    location, extra = locate_base(name)
    model_type = AutoConfig.from_pretrained(location, **extra).model_type
    if model_type not in FAMILIES:
        raise UnsupportedModelError(f"model {name!r} is a {model_type!r}: known families are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def locate_base(name: str) -> tuple[str, dict[str, str]]:
    """What `transformers` calls a model: a location and, for a GGUF file, its name in it."""
    if name == EMBEDDED_NAME:
        return str(embedded_model_path()), {}
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    return (str(path) if path.exists() else name), {}


def find_gates(name: str, *, download_from: str = "huggingface") -> Path:
    """The folder of a gate checkpoint: folder, hub repo id, or `embedded`."""
    return embedded_gates_path() if name == EMBEDDED_NAME else find_checkpoint(name, download_from=download_from)


def names_gates(name: str) -> bool:
    """Whether `name` is a local gate checkpoint rather than a whole model."""
    return is_gate_checkpoint(Path(name).expanduser())
