"""Packed prefill and the flash backend against the reference backend, over ragged streams with holes.

Where flash-attn is absent a stand-in with its signatures computes in its place: that the arguments fit and mean what
they should, not what the real kernels answer.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.core import flash_stand_in
from trimkv_core.attention import varlen
from trimkv_core.attention.base import AttentionBackend
from trimkv_core.attention.flash import FlashBackend
from trimkv_core.attention.torch import TorchBackend
from trimkv_core.attention.varlen import (
    FlashAttnVarlen,
    PackedLengths,
    PackedPrefill,
    SdpaVarlen,
    TorchVarlen,
    import_flash_attn,
    select_varlen,
)
from trimkv_core.batches import Segment, StepBatch
from trimkv_core.budget import Budget, Geometry
from trimkv_core.pages import PagePool
from trimkv_core.sequences import SequenceTable

LAYERS, HEADS, GROUP, DIM = 2, 3, 2, 8
SCALE = 0.3


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The stand-in, installed."""
    module = flash_stand_in.module()
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return module


def torch_varlen_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """PyTorch 2.11's signature; it documents as many key heads as query heads."""
    assert query.shape[1] == key.shape[1] == value.shape[1]
    assert return_aux is None and window_size == (-1, 0)
    return flash_stand_in.flash_attn_varlen_func(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, softmax_scale=scale, causal=True
    )


def torch_varlen_2_13(*args: Any, **kwargs: Any) -> Tensor:
    """The installed PyTorch's signature, bound to what is asked."""
    asked = inspect.signature(varlen_attn).bind(*args, **kwargs).arguments
    assert asked.pop("enable_gqa") is True and asked.pop("window_size") == (-1, 0)
    scale = asked.pop("scale")
    return flash_stand_in.flash_attn_varlen_func(*asked.values(), softmax_scale=scale, causal=True)


torch_varlen_2_13.__signature__ = inspect.signature(varlen_attn)  # type: ignore[attr-defined]

KERNELS: dict[str, Callable[[], varlen.VarlenKernel]] = {
    "flash-attn": FlashAttnVarlen,
    "torch 2.11": lambda: TorchVarlen(torch_varlen_2_11),
    "torch 2.13": lambda: TorchVarlen(torch_varlen_2_13),
    "sdpa": SdpaVarlen,
}


@dataclass(frozen=True)
class Step:
    """A batch of random tokens over ragged streams, and a layer at which to look."""

    table: SequenceTable
    batch: StepBatch
    query: Tensor
    key: Tensor
    value: Tensor
    log_beta: Tensor

    def run(self, backend: AttentionBackend[Any], *, window: int | None) -> list[Tensor]:
        plan = backend.plan(self.table, self.batch)
        results = []
        for layer in range(LAYERS):
            backend.append(plan, layer, self.key[layer], self.value[layer], self.log_beta[layer])
            own = (self.query[layer], self.key[layer], self.value[layer])
            results.append(backend.attend(plan, layer, *own, scale=SCALE, window=window))
        return results


def ragged_step(past: dict[int, int], tokens: list[int], *, block_size: int = 4, memory: int | None = None) -> Step:
    """Sequences that saw `past` tokens and were cut to `memory`, about to be fed `tokens` (those of one first)."""
    generator = torch.Generator().manual_seed(len(past) + sum(tokens))
    geometry = Geometry(LAYERS, HEADS, DIM, block_size, kv_itemsize=4)
    table = SequenceTable(PagePool(geometry, 4, dtype=torch.float32), 1, can_grow=True)
    rows = [table.open(4) for _ in tokens]
    for index, seen in past.items():
        batch = table.extend([Segment(rows[index], seen)])
        backend = TorchBackend()
        plan = backend.plan(table, batch)
        for layer in range(LAYERS):
            shape = (seen, HEADS, DIM)
            key, value = (torch.randn(shape, generator=generator) for _ in range(2))
            # One head of each layer forgets everything: its stream is empty after the eviction.
            forget = torch.tensor([0.01, 30.0, 1.0]) if layer == 0 else torch.tensor([2.0, 0.01, 30.0])
            backend.append(plan, layer, key, value, -torch.rand(seen, HEADS, generator=generator) * forget)
    if memory is not None:
        table.evict([(rows[index], Budget(memory_size=memory, buffer_size=1)) for index in past])
    batch = table.extend([Segment(row, count) for row, count in zip(rows, tokens, strict=True)])
    total = batch.num_tokens
    return Step(
        table=table,
        batch=batch,
        query=torch.randn(LAYERS, total, HEADS * GROUP, DIM, generator=generator),
        key=torch.randn(LAYERS, total, HEADS, DIM, generator=generator),
        value=torch.randn(LAYERS, total, HEADS, DIM, generator=generator),
        log_beta=-torch.rand(LAYERS, total, HEADS, generator=generator),
    )


def poison(step: Step) -> None:
    """Make every place that holds no entry of these sequences a NaN."""
    held = torch.zeros(step.table.pool.position.numel(), dtype=torch.bool)
    for row in step.table.open_rows:
        slots, _ = step.table._slots_of(row)
        held[slots] = True
    for storage in (step.table.pool.key, step.table.pool.value):
        storage.view(-1, DIM)[~held] = float("nan")


STEPS: dict[str, tuple[dict[int, int], list[int], int | None]] = {
    "one fresh segment": ({}, [5], None),
    "one segment behind a dense past": ({0: 9}, [6], None),
    "empty and long streams": ({0: 12, 1: 17}, [4, 7], 3),
    "fresh and old together": ({0: 11, 2: 8}, [3, 2, 5], 2),
    "decodes beside chunks": ({0: 10, 1: 6, 2: 13}, [1, 1, 4, 3], 3),
}


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", STEPS)
def test_packed_prefill_equals_the_reference_backend(
    name: str, kernel: str, window: int | None, flash_attn: types.ModuleType
) -> None:
    past, tokens, memory = STEPS[name]
    step = ragged_step(past, tokens, memory=memory)
    if memory is not None:
        assert (step.batch.lengths_before[[*past]] == 0).any(), "no empty stream: the step tests too little"
    poison(step)
    expected = step.run(TorchBackend(), window=window)
    prefill = PackedPrefill(KERNELS[kernel]())
    plan = prefill.plan(step.table, step.batch)
    assert plan is not None
    first = step.batch.num_decode
    for layer in range(LAYERS):
        mixed = prefill.attend(plan, layer, step.query[layer, first:], scale=SCALE, window=window)
        torch.testing.assert_close(mixed, expected[layer][first:], atol=1e-5, rtol=1e-4)


def test_a_batch_of_decodes_alone_has_no_prefill_plan() -> None:
    step = ragged_step({0: 3}, [1])
    assert PackedPrefill(SdpaVarlen()).plan(step.table, step.batch) is None
    assert PackedPrefill.figures(step.batch) is None


FLASH_STEPS: dict[str, tuple[dict[int, int], list[int], int | None]] = {
    "decodes, several pages": ({0: 300, 1: 520}, [1, 1], 200),
    "decodes beside chunks": ({0: 300, 2: 290}, [1, 1, 3, 2], 100),
    "chunks alone": ({1: 270}, [2, 3], 90),
}


@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("name", FLASH_STEPS)
def test_the_flash_backend_equals_the_reference_backend(
    name: str, window: int | None, flash_attn: types.ModuleType
) -> None:
    past, tokens, memory = FLASH_STEPS[name]
    step = ragged_step(past, tokens, block_size=256, memory=memory)
    expected = step.run(TorchBackend(), window=window)
    written = [storage.clone() for storage in (step.table.pool.key, step.table.pool.log_beta)]
    for storage in (step.table.pool.key, step.table.pool.value, step.table.pool.log_beta):
        storage.view(-1, *storage.shape[2:])[step.batch.slots.flatten()] = 0
    poison(step)
    actual = step.run(FlashBackend(), window=window)
    for layer in range(LAYERS):
        torch.testing.assert_close(actual[layer], expected[layer], atol=1e-5, rtol=1e-4)
    slots = step.batch.slots.flatten()
    for before, after in zip(written, (step.table.pool.key, step.table.pool.log_beta), strict=True):
        own = after.view(-1, *after.shape[2:])[slots]
        torch.testing.assert_close(own, before.view(-1, *before.shape[2:])[slots], atol=0, rtol=0)


class HostReads(TorchDispatchMode):
    """Counts what would make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        self.count += name in {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"}
        # Without its output's size the device must be asked for it.
        self.count += name == "repeat_interleave" and kwargs.get("output_size") is None
        # Indexing by bool is a `nonzero` in disguise.
        if name == "index":
            self.count += any(part is not None and part.dtype == torch.bool for part in args[1])
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", ["packed", "flash"])
@pytest.mark.parametrize("window", [None, 150])
def test_the_host_waits_once_a_step_and_never_in_a_layer(
    name: str, window: int | None, flash_attn: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = ragged_step({0: 20, 2: 30}, [1, 3, 2], block_size=256, memory=10)
    # The kernel itself is not looked at: the stand-in reads lengths on the host.
    monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", lambda q, k, v, **_: torch.zeros_like(q))
    monkeypatch.setattr(flash_attn, "flash_attn_with_kvcache", lambda q, k, v, **_: torch.zeros_like(q))
    reads = HostReads()
    tolist = torch.Tensor.tolist

    def counted_tolist(self: Tensor) -> Any:
        reads.count += 1
        return tolist(self)

    monkeypatch.setattr(torch.Tensor, "tolist", counted_tolist)
    with reads:
        if name == "packed":
            prefill = PackedPrefill(FlashAttnVarlen())
            packed = prefill.plan(step.table, step.batch)
            assert packed is not None
        else:
            backend = FlashBackend()
            plan = backend.plan(step.table, step.batch)
        assert reads.count == 1
        for layer in range(LAYERS):
            if name == "packed":
                prefill.attend(packed, layer, step.query[layer, 1:], scale=SCALE, window=window)
            else:
                backend.append(plan, layer, step.key[layer], step.value[layer], step.log_beta[layer])
                backend.attend(
                    plan, layer, step.query[layer], step.key[layer], step.value[layer], scale=SCALE, window=window
                )
        assert reads.count == 1


def test_the_padded_path_does_not_ask_the_device_either() -> None:
    lengths = PackedLengths(torch.tensor([0, 2, 5]).int(), torch.tensor([0, 4, 7]).int(), 3, 4)
    with HostReads() as reads:
        SdpaVarlen()(torch.randn(5, 2, 8), torch.randn(7, 1, 8), torch.randn(7, 1, 8), lengths=lengths, scale=1.0)
    assert reads.count == 0


@pytest.mark.parametrize("function", [flash_stand_in.flash_attn_varlen_func, flash_stand_in.flash_attn_with_kvcache])
def test_the_stand_in_has_the_real_parameters(function: Callable[..., Any]) -> None:
    real = pytest.importorskip("flash_attn", exc_type=ImportError)
    own, other = (inspect.signature(each).parameters for each in (function, getattr(real, function.__name__)))
    assert [(part.name, part.default) for part in own.values()] == [
        (part.name, part.default) for part in other.values()
    ]


def test_no_number_in_one_sequence_spreads_to_a_shorter_one_beside_it() -> None:
    lengths = PackedLengths(torch.tensor([0, 3, 5]).int(), torch.tensor([0, 4, 7]).int(), 3, 4)
    key, value = torch.randn(7, 1, 8), torch.randn(7, 1, 8)
    key[0], value[0] = float("nan"), float("inf")
    mixed = SdpaVarlen()(torch.randn(5, 2, 8), key, value, lengths=lengths, scale=1.0)
    assert mixed[:3].isnan().all()
    assert mixed[3:].isfinite().all()


def test_causal_is_aligned_to_the_bottom_right() -> None:
    """Two queries over five keys: the first sees four. Values are one-hot, so that weights can be read off."""
    values = torch.eye(8)[:5][:, None]
    cumulative = [torch.tensor([0, count], dtype=torch.int32) for count in (2, 5)]
    lengths = PackedLengths(*cumulative, 2, 5)
    query, key = torch.zeros(2, 1, 8), torch.zeros(5, 1, 8)
    seen = torch.tensor([[0.25, 0.25, 0.25, 0.25, 0.0], [0.2] * 5])
    for mixed in (
        SdpaVarlen()(query, key, values, lengths=lengths, scale=1.0),
        flash_stand_in.flash_attn_varlen_func(query, key, values, *cumulative, 2, 5, causal=True),
    ):
        torch.testing.assert_close(mixed[:, 0, :5], seen)


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """A GPU by what PyTorch says of it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "capability", "name"),
    [
        ("cuda", torch.bfloat16, 128, (9, 0), "flash-attn"),
        ("cuda", torch.float16, 64, (8, 0), "flash-attn"),
        ("cuda", torch.float32, 128, (9, 0), "sdpa"),
        ("cuda", torch.bfloat16, 100, (9, 0), "sdpa"),
        ("cuda", torch.bfloat16, 512, (9, 0), "sdpa"),
        ("cuda", torch.float16, 128, (7, 5), "sdpa"),
        ("cpu", torch.bfloat16, 128, (9, 0), "sdpa"),
    ],
)
def test_the_kernel_is_picked_by_what_it_can_compute(
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    capability: tuple[int, int],
    name: str,
    flash_attn: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_gpu(monkeypatch, capability)
    assert select_varlen(torch.device(device), dtype, head_dim).name == name


@pytest.mark.parametrize("error", [None, ImportError("undefined symbol")])
def test_without_flash_attn_pytorchs_own_kernel_is_picked(
    error: ImportError | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend_gpu(monkeypatch, (9, 0))
    if error is None:
        # What the import system takes for an absent module.
        monkeypatch.setitem(sys.modules, "flash_attn", None)
    else:
        monkeypatch.setattr(varlen.importlib, "import_module", _fail_for("flash_attn", error))
    assert import_flash_attn() is None
    assert ("cannot be imported: undefined symbol" in caplog.text) == (error is not None)
    assert select_varlen(torch.device("cuda"), torch.bfloat16, 128).name == "torch varlen"
    with pytest.raises(ImportError, match="flash-attn is not installed: run `pip install flash-attn"):
        FlashBackend()


def test_a_pytorch_whose_kernel_takes_no_window_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (9, 0))
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", lambda query, is_causal=False: query)
    assert select_varlen(torch.device("cuda"), torch.bfloat16, 128).name == "sdpa"


def test_a_later_generation_of_flash_attn_without_these_functions_is_not_taken_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    assert import_flash_attn() is None


def test_small_pages_are_refused_with_what_to_change(flash_attn: types.ModuleType) -> None:
    step = ragged_step({}, [3], block_size=16)
    with pytest.raises(ValueError, match=r"block_size=16 is not possible with backend 'flash'.*set block_size=256"):
        FlashBackend().plan(step.table, step.batch)


def _fail_for(name: str, error: ImportError) -> Callable[[str], types.ModuleType]:
    real = varlen.importlib.import_module

    def import_module(asked: str) -> types.ModuleType:
        if asked == name:
            raise error
        return real(asked)

    return import_module
