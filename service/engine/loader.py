"""From a configuration to an engine that is ready to step: what is loaded, where, in which type, with how much memory.

Says at start-up what an operator wants to know. Knows no threads and no HTTP.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tokenizers
import torch

from service.engine.admission import AdmissionLedger
from service.engine.config import DEFAULT_POOL_BYTES, EngineConfig
from service.engine.core import EngineCore
from service.engine.interface import EngineObserver, ModelInfo
from service.engine.mailbox import Dispatcher
from service.engine.memory_sizing import (
    CudaProbe,
    LargestStep,
    MemorySizingError,
    profile_memory,
    size_pool,
    try_largest_step,
)
from service.engine.request import RequestState
from service.engine.row_padding import choose_min_rows
from service.engine.runner import AheadFactory, ModelRunner, PackedDecoder
from service.engine.scheduler import Scheduler
from service.generation.chat_format import ChatFormat
from service.generation.sampler import Sampler
from trimkv_core.attention.base import AttentionBackend
from trimkv_core.attention.select import select_backend
from trimkv_core.budget import Budget, Geometry, Scope, Strategy, lane_pages
from trimkv_core.byte_ledger import geometry_of
from trimkv_core.checkpoint import read_config
from trimkv_core.embedded import EMBEDDED_NAME
from trimkv_core.fp8 import choose_kv_dtype, name_kv_dtype
from trimkv_core.lean.decoder import LeanDecoder, make_lean_decoder
from trimkv_core.models import TrimKVForCausalLM, find_gates, names_gates
from trimkv_core.overlay import fix_rope
from trimkv_core.overlay_decoder import OverlayDecoder

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class StartupError(RuntimeError):
    """A configuration that cannot be served; the message says what to change."""


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """Everything that is ready before the first request.

    Attributes:
        info: what was loaded.
        tokenizer: for incremental detokenisation.
        ledger: for checks at the door.
    """

    info: ModelInfo
    tokenizer: tokenizers.Tokenizer
    ledger: AdmissionLedger
    _config: EngineConfig
    _decoder: PackedDecoder
    _backend: AttentionBackend[Any]
    _kv_dtype: torch.dtype
    _device: torch.device

    def build_core(
        self, dispatcher: Dispatcher, observer: EngineObserver, left_queue: Callable[[RequestState], None]
    ) -> EngineCore:
        """Allocate the pool and put the engine together."""
        config = self._config
        runner = ModelRunner(
            self._decoder,
            self._backend,
            self.info.geometry,
            num_pages=self.info.pool_pages,
            max_num_seqs=config.max_num_seqs,
            dtype=self._kv_dtype,
            device=self._device,
            ahead=self._ahead_factory(),
        )
        return EngineCore(
            runner,
            Sampler(self.info.vocab_size, self._device),
            self.ledger,
            Scheduler(self.ledger, max_num_seqs=config.max_num_seqs, prefill_chunk=config.prefill_chunk),
            dispatcher=dispatcher,
            observer=observer,
            left_queue=left_queue,
        )

    def _ahead_factory(self) -> AheadFactory | None:
        """Decode steps that stay on the device, where everything they are made of is there."""
        if not _runs_ahead(self._config, self._backend, self._decoder) or not isinstance(self._decoder, LeanDecoder):
            return None
        from service.engine.ahead import ahead_factory

        return ahead_factory(
            self._decoder, vocab_size=self.info.vocab_size, num_query_heads=self._decoder.num_query_heads
        )


def load_engine(config: EngineConfig) -> LoadedEngine:
    """Load model, gates and tokenizer, and size the pool.

    Raises:
        StartupError: the configuration does not add up.
    """
    base, gates = _names(config)
    device = _choose_device(config.device)
    if device.type == "cuda":
        # The current device belongs to a thread, and this is the engine's: streams, graphs and kernels go there.
        torch.cuda.set_device(device)
    dtype = _choose_dtype(config.dtype, device)
    try:
        kv_dtype = choose_kv_dtype(config.kv_dtype, dtype)
        backend = select_backend(config.backend, device=device, dtype=dtype, kv_dtype=kv_dtype)
    except ValueError as error:
        raise StartupError(str(error)) from error
    logger.info("loading %s%s in %s on %s", base, f" with gates {gates}" if gates else "", _name(dtype), device)
    model = _load_model(base, gates=gates, dtype=dtype, device=device)
    max_model_len = _choose_length(config.max_model_len, model.config.max_position_embeddings)
    rope_note = fix_rope(model, max_model_len)
    geometry = geometry_of(model.config, block_size=config.block_size, dtype=kv_dtype)
    budget = _default_budget(config, model, has_gates=gates is not None)
    vocab_size = model.config.vocab_size
    # The model is not run any more where the lean step has its weights.
    decoder = make_lean_decoder(model, frees_weights=True) or OverlayDecoder(model, min_rows=choose_min_rows(model))
    if config.kv_memory_bytes is None and device.type == "cuda":
        step = LargestStep(
            prefill_chunk=config.prefill_chunk,
            max_num_seqs=config.max_num_seqs,
            vocab_size=vocab_size,
            itemsize=dtype.itemsize,
            captured_steps=_count_captured(config, backend, decoder),
        )
        pages = _fill_gpu(config, step, (decoder, backend, geometry), kv_dtype=kv_dtype, device=device)
    else:
        pages = _count_pages(config, geometry)
    ledger = AdmissionLedger(geometry, pages, prefill_chunk=config.prefill_chunk)
    chat_format = ChatFormat.load(base)
    info = ModelInfo(
        model=base,
        tokenizer_path=base,
        gates=gates,
        has_gates=gates is not None,
        backend=backend.name,
        dtype=_name(dtype),
        device=str(device),
        max_model_len=max_model_len,
        vocab_size=vocab_size,
        geometry=geometry,
        budget=budget,
        trained_memory_size=model.config.memory_size if gates else None,
        eos_token_ids=_eos_token_ids(model, chat_format.tokenizer),
        sampling_defaults=_sampling_defaults(model),
        pool_pages=pages,
        pool_bytes=pages * geometry.page_bytes,
    )
    _announce(info, decoder.name, ledger, kv_dtype=name_kv_dtype(kv_dtype), rope_note=rope_note)
    return LoadedEngine(info, chat_format.backend, ledger, config, decoder, backend, kv_dtype, device)


def _load_model(base: str, *, gates: str | None, dtype: torch.dtype, device: torch.device) -> Any:
    try:
        return TrimKVForCausalLM.from_base(base, gates=gates, dtype=dtype, device_map=str(device))
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise StartupError(
            f"the weights of {base} in {_name(dtype)} do not fit {device}: {free / 2**30:.2f} of {total / 2**30:.2f} "
            "GiB were left when they ran out; use a smaller model or dtype, or end what else runs on the GPU"
        ) from error


def _count_pages(config: EngineConfig, geometry: Geometry) -> int:
    """Pages of a pool of the size that was said, or of the usual one."""
    size = DEFAULT_POOL_BYTES if config.kv_memory_bytes is None else config.kv_memory_bytes
    pages, lane = size // geometry.page_bytes, lane_pages(geometry, config.prefill_chunk)
    if pages <= lane + geometry.streams:
        raise StartupError(
            f"kv_memory={size} bytes is {pages} pages; the prefill chunk of {config.prefill_chunk} tokens alone takes "
            f"{lane}: give more memory or a smaller prefill_chunk"
        )
    return pages


def _fill_gpu(
    config: EngineConfig,
    step: LargestStep,
    parts: tuple[PackedDecoder, AttentionBackend[Any], Geometry],
    *,
    kv_dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Pages that a GPU has room for beside the loaded model."""
    decoder, backend, geometry = parts
    try:
        profile = profile_memory(
            CudaProbe(device),
            lambda: try_largest_step(decoder, backend, geometry, step, dtype=kv_dtype, device=device),
        )
        size = size_pool(profile, geometry, step, utilization=config.gpu_memory_utilization)
    except MemorySizingError as error:
        raise StartupError(str(error)) from error
    logger.info("kv_memory=auto: %s", size.explanation)
    return size.pages


def _runs_ahead(config: EngineConfig, backend: AttentionBackend[Any], decoder: PackedDecoder) -> bool:
    return not config.enforce_eager and backend.name == "triton" and isinstance(decoder, LeanDecoder)


def _count_captured(config: EngineConfig, backend: AttentionBackend[Any], decoder: PackedDecoder) -> int:
    """Decode steps that will be captured: of every batch size, one that is greedy and one that draws."""
    if not _runs_ahead(config, backend, decoder):
        return 0
    from trimkv_core.decode_program import batch_sizes

    return 2 * len(batch_sizes(config.max_num_seqs))


def _names(config: EngineConfig) -> tuple[str, str | None]:
    """Base model and gates: the embedded model has its own, and a gate checkpoint as the model names its base."""
    if config.model == EMBEDDED_NAME:
        return EMBEDDED_NAME, config.gates or EMBEDDED_NAME
    if names_gates(config.model):
        return read_config(find_gates(config.model)).base_model, config.gates or config.model
    return config.model, config.gates


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise StartupError(f"device={name!r} is unknown: use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise StartupError(f"device={name!r}: this PyTorch sees no GPU; use cpu")
    return device


def _choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 on GPUs and on CPUs that multiply it in hardware, else float32."""
    if name != "auto":
        if name not in _DTYPES:
            raise StartupError(f"dtype={name!r} is unknown: use auto, {', '.join(_DTYPES)}")
        return _DTYPES[name]
    return torch.bfloat16 if device.type != "cpu" or _cpu_multiplies_bfloat16() else torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def _choose_length(asked: int | None, allowed: int) -> int:
    if asked is not None and asked > allowed:
        raise StartupError(f"max_model_len={asked} exceeds the model's max_position_embeddings={allowed}")
    return asked or allowed


def _default_budget(config: EngineConfig, model: Any, *, has_gates: bool) -> Budget:
    if not has_gates:
        if config.kv_budget:
            raise StartupError(f"kv_budget={config.kv_budget}: a model without gates is served dense; give gates or 0")
        return Budget.dense()
    cap, sinks = config.max_kv_budget, model.config.num_sink_tokens
    if cap is not None and cap < sinks:
        raise StartupError(
            f"max_kv_budget={cap} is smaller than the {sinks} sink tokens that the gates keep in every stream: "
            f"allow {sinks} or more"
        )
    memory = model.config.memory_size if config.kv_budget is None else config.kv_budget
    if memory and cap is not None:
        memory = min(memory, cap)
    # A server that is dense by default still has defaults for the requests that name a budget.
    return Budget(
        memory_size=memory or None,
        strategy=Strategy.FIXED_BUDGET if memory else Strategy.DENSE,
        buffer_size=config.kv_buffer,
        scope=Scope.GLOBAL if model.config.global_capacity else Scope.LOCAL,
        num_sink_tokens=sinks,
        prefill_chunk=config.prefill_chunk,
    )


def _eos_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    found = model.generation_config.eos_token_id
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list) else (found,)


def _sampling_defaults(model: Any) -> dict[str, float]:
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    values = {name: getattr(model.generation_config, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _announce(info: ModelInfo, decoder: str, ledger: AdmissionLedger, *, kv_dtype: str, rope_note: str | None) -> None:
    geometry = info.geometry
    logger.info(
        "model %s, gates %s, %s step, attention backend %s, %s (KV %s) on %s, context %d tokens",
        info.model,
        info.gates or "none (dense only)",
        decoder,
        info.backend,
        info.dtype,
        kv_dtype,
        info.device,
        info.max_model_len,
    )
    if rope_note:
        logger.info("%s", rope_note)
    if info.backend == "numba":
        from trimkv_core.cpu.threads import threading_note

        note = threading_note()
        if note is not None:
            logger.warning("%s", note)
    logger.info(
        "pool: %d pages of %d entries, %.2f GiB; %d layers x %d KV heads, %d bytes an entry",
        info.pool_pages,
        geometry.block_size,
        info.pool_bytes / 2**30,
        geometry.num_layers,
        geometry.num_heads,
        geometry.entry_bytes,
    )
    pages = info.budget.ceiling_pages(geometry, total_tokens=info.max_model_len)
    label = "dense" if info.budget.memory_size is None else f"at M = {info.budget.memory_size}"
    logger.info(
        "room for %d sequences of any length up to %d tokens %s",
        (ledger.capacity - ledger.lane) // pages,
        info.max_model_len,
        label,
    )
