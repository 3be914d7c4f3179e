"""The sum that sizes a pool, with numbers, and the trial over a device that is not there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from service.engine import loader
from service.engine.config import DEFAULT_POOL_BYTES, EngineConfig
from service.engine.loader import LoadedEngine, StartupError, load_engine
from service.engine.memory_sizing import (
    LargestStep,
    MemoryProfile,
    MemorySizingError,
    graph_bytes,
    page_cost,
    profile_memory,
    size_pool,
    try_largest_step,
)
from tests.core.tiny import load
from tests.service.harness import Engine
from trimkv_core.attention.torch import TorchBackend
from trimkv_core.budget import Budget, Geometry, lane_pages
from trimkv_core.lean.decoder import make_lean_decoder

GIB = 1 << 30
# Qwen3-4B in bfloat16 on an H200.
GEOMETRY = Geometry(num_layers=36, num_heads=8, head_dim=128, block_size=16, kv_itemsize=2)
FP8 = replace(GEOMETRY, kv_itemsize=1, scale_bytes=8)
EAGER = LargestStep(prefill_chunk=512, max_num_seqs=64, vocab_size=151_936, itemsize=2, captured_steps=0)
CAPTURED = replace(EAGER, captured_steps=22)
PROFILE = MemoryProfile(total=140 * GIB, outside=GIB, weights=8 * GIB, activations=GIB // 4)


def test_what_is_left_of_the_share_is_the_pools() -> None:
    sampling = 32 * 64 * 151_936
    left = int(140 * GIB * 0.9) - 9 * GIB - GIB // 4 - sampling
    size = size_pool(PROFILE, GEOMETRY, EAGER, utilization=0.9)
    assert size.pages == left // page_cost(GEOMETRY, itemsize=2)
    assert "gpu_memory_utilization=0.9 of 140.00 GiB is 126.00 GiB" in size.explanation
    assert "weights 8.00 GiB" in size.explanation


@pytest.mark.parametrize(("geometry", "low", "high"), [(GEOMETRY, 1.03, 1.06), (FP8, 1.08, 1.11)])
def test_a_full_pool_leaves_room_for_the_steps_over_it(geometry: Geometry, low: float, high: float) -> None:
    cost = page_cost(geometry, itemsize=2)
    assert low < cost / geometry.page_bytes < high
    # Keys and values of one layer of everything held, and 8 bytes an entry that is scored.
    assert cost - geometry.page_bytes > 16 * (2 * 128 * 2 / 36 + 8)


def test_every_byte_taken_elsewhere_is_missing_from_the_pool() -> None:
    def pages(profile: MemoryProfile = PROFILE, step: LargestStep = EAGER, utilization: float = 0.9) -> int:
        return size_pool(profile, GEOMETRY, step, utilization=utilization).pages

    gib = GIB / page_cost(GEOMETRY, itemsize=2)
    for name in ("outside", "weights", "activations"):
        less = replace(PROFILE, **{name: getattr(PROFILE, name) + GIB})
        assert pages() - pages(less) == pytest.approx(gib, abs=1)
    assert pages(utilization=1.0) - pages() == pytest.approx(14 * gib, abs=1)
    assert pages() > pages(step=CAPTURED) > pages(step=replace(CAPTURED, captured_steps=40))


def test_captured_steps_take_nothing_where_there_are_none_and_the_largest_steps_memory_once() -> None:
    assert graph_bytes(EAGER, GEOMETRY, activations=GIB) == 0
    one, two = (graph_bytes(replace(EAGER, captured_steps=n), GEOMETRY, activations=GIB) for n in (1, 2))
    assert one > GIB
    assert two - one < GIB // 50
    assert graph_bytes(CAPTURED, GEOMETRY, activations=GIB) < 2 * GIB


def test_weights_that_do_not_fit_are_said_with_the_numbers() -> None:
    tight = replace(PROFILE, total=9 * GIB)
    with pytest.raises(MemorySizingError) as caught:
        size_pool(tight, GEOMETRY, EAGER, utilization=0.9)
    text = str(caught.value)
    for part in ("gpu_memory_utilization=0.9 of 9.00 GiB is 8.10 GiB", "weights 8.00 GiB", "1.00 GiB", "do not fit"):
        assert part in text


def test_no_room_for_one_prefill_chunk_is_said_with_what_to_change() -> None:
    tight = replace(PROFILE, total=12 * GIB)
    step = replace(EAGER, prefill_chunk=16_384)
    with pytest.raises(MemorySizingError) as caught:
        size_pool(tight, GEOMETRY, step, utilization=0.9)
    text = str(caught.value)
    lane = lane_pages(GEOMETRY, 16_384)
    for part in (f"chunk of 16384 tokens alone takes {lane}", "lower prefill_chunk", "kv_dtype=fp8_e4m3", "raise gpu"):
        assert part in text
    assert size_pool(tight, GEOMETRY, EAGER, utilization=0.9).pages > 288


def test_a_sum_below_zero_is_no_pool() -> None:
    with pytest.raises(MemorySizingError, match=r"0\.00 GiB are left, 0 pages"):
        size_pool(replace(PROFILE, activations=200 * GIB), GEOMETRY, EAGER, utilization=0.9)


# ---- the trial -----------------------------------------------------------------------------------------------------


class Device:
    """A `DeviceProbe` of a device that exists as numbers only."""

    def __init__(self, *, total: int, others: int, weights: int) -> None:
        self.total, self.others = total, others
        self.in_use = self.most = weights
        self.cached = 0

    def use(self, size: int) -> None:
        self.most = max(self.most, self.in_use + size)
        self.cached = max(self.cached, size)

    def total_and_free(self) -> tuple[int, int]:
        return self.total, self.total - self.others - self.reserved()

    def reserved(self) -> int:
        return self.in_use + self.cached

    def allocated(self) -> int:
        return self.in_use

    def peak(self) -> int:
        return self.most

    def reset_peak(self) -> None:
        self.most = self.in_use

    def release_cached(self) -> None:
        self.cached = 0


def test_a_trial_tells_weights_activations_and_others_apart() -> None:
    device = Device(total=1000, others=70, weights=300)
    device.use(600)  # while loading: not the step's

    def run() -> int:
        device.use(150 + 40)
        return 40

    found = profile_memory(device, run)
    assert found == MemoryProfile(total=1000, outside=70, weights=300, activations=150)


def test_a_step_that_does_not_fit_is_said_with_the_numbers() -> None:
    def run() -> int:
        raise torch.OutOfMemoryError

    device = Device(total=10 * GIB, others=GIB, weights=8 * GIB)
    with pytest.raises(MemorySizingError, match=r"weights take 8\.00 GiB of 10\.00 GiB, 1\.00 GiB are free.*lower"):
        profile_memory(device, run)


class Watched:
    """A decoder that says what it was fed."""

    name = "watched"

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self.shapes: list[tuple[int, int, int]] = []

    def forward(self, token_ids: Any, position: Any, step: Any, wanted: Any) -> Any:
        logits = self._decoder.forward(token_ids, position, step, wanted)
        self.shapes.append((token_ids.numel(), step.batch.num_decode, logits.shape[0]))
        return logits


@pytest.mark.parametrize("rows", [1, 4])
def test_the_trial_is_a_full_lane_beside_all_rows_that_can_decode(tmp_path: Path, rows: int) -> None:
    _, model = load(tmp_path, "qwen3")
    decoder = Watched(make_lean_decoder(model))
    geometry = Geometry(3, 2, 16, 4, kv_itemsize=4)
    step = LargestStep(prefill_chunk=9, max_num_seqs=rows, vocab_size=64, itemsize=4, captured_steps=0)
    cpu = torch.device("cpu")
    size = try_largest_step(decoder, TorchBackend(), geometry, step, dtype=torch.float32, device=cpu)
    assert decoder.shapes == [(9 + rows - 1, rows - 1, rows)]
    assert size >= geometry.streams * (3 + rows - 1) * 4 * geometry.entry_bytes


# ---- how a configuration uses it -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    load(folder, "qwen3")
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(64)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(folder / "base")
    return str(folder / "gates")


@pytest.fixture
def start(gates: str) -> Callable[..., LoadedEngine]:
    """Load the engine of a tiny model."""

    def load_it(**changes: Any) -> LoadedEngine:
        return load_engine(EngineConfig(**({"model": gates, "device": "cpu", "dtype": "float32"} | changes)))

    return load_it


def test_on_a_cpu_a_pool_of_unsaid_size_has_the_usual_one(start: Callable[..., Any]) -> None:
    info = start().info
    assert info.pool_pages == DEFAULT_POOL_BYTES // info.geometry.page_bytes
    assert start(kv_memory_bytes=1 << 20).info.pool_pages == (1 << 20) // info.geometry.page_bytes


def test_a_pool_too_small_for_a_chunk_is_refused(start: Callable[..., Any]) -> None:
    with pytest.raises(StartupError, match=r"kv_memory=100000 bytes is \d+ pages; the prefill chunk of 512 tokens"):
        start(kv_memory_bytes=100_000)


def test_8_bit_entries_are_said_at_start_up_and_served(
    start: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    loaded = start(kv_dtype="fp8_e4m3", kv_memory_bytes=1 << 20)
    assert "attention backend torch, float32 (KV fp8_e4m3) on cpu" in caplog.text
    assert loaded.info.geometry.entry_bytes == 2 * 16 + 8 + 8
    engine = Engine(EngineConfig(), loaded)
    pool = engine.core.runner.table.pool
    assert (pool.dtype, pool.num_pages) == (torch.float8_e4m3fn, loaded.info.pool_pages)
    budget = Budget(memory_size=6, buffer_size=3, prefill_chunk=8)
    answers = [engine.submit(range(3, 3 + length), budget, max_tokens=12) for length in (30, 1, 17)]
    engine.run()
    for answer in answers:
        assert len(answer.token_ids) == 12
        assert answer.snapshot is not None
        assert answer.snapshot.key.dtype == torch.float8_e4m3fn
        assert answer.snapshot.key_scale is not None
        assert answer.snapshot.key_scale.numel() == answer.snapshot.lengths.sum() <= 6 * (6 + 3)
    assert pool.num_free == pool.num_pages
    engine.core.runner.table.check_invariants()


@pytest.mark.parametrize(("field", "value"), [("backend", "numba"), ("kv_dtype", "fp4")])
def test_what_cannot_serve_8_bit_entries_is_refused_before_loading(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, field: str, value: str
) -> None:
    monkeypatch.setattr(loader, "_load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(StartupError, match="kv_dtype="):
        start(**({"kv_dtype": "fp8_e4m3"} | {field: value}))


def test_weights_that_run_out_of_memory_are_a_line_to_act_on(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(loader.TrimKVForCausalLM, "from_base", run_out)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (GIB, 8 * GIB))
    with pytest.raises(StartupError, match=r"weights of .* in float32 do not fit cpu: 1\.00 of 8\.00 GiB"):
        start()
