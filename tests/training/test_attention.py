"""Retention-gated attention: the blocked path and FlexAttention are the eager reference, gradients included."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from trimkv_core.overlay import LayerAttention
from trimkv_core.training import flex
from trimkv_core.training.attention import Bias, Decay, blocked_attention, eager_attention
from trimkv_core.training.batch import Extent
from trimkv_core.training.evictions import EvictionRule, eviction_bias, eviction_lines, eviction_reach
from trimkv_core.training.flex import FlexLayout, flex_documents
from trimkv_core.training.gated_model import attend_documents
from trimkv_core.training.shapes import DecayShape

CPU = torch.device("cpu")
HEADS, GROUP, DIM = 2, 3, 8
RULE = EvictionRule(memory_size=20, interval=16, num_sink_tokens=3)


def decay(log_beta: Tensor) -> Bias:
    return Decay(log_beta, DecayShape())


def sharp_decay(log_beta: Tensor) -> Bias:
    return Decay(log_beta, DecayShape(epsilon=0.15, kappa=4.0))


def evictions(log_beta: Tensor) -> Bias:
    return eviction_bias(log_beta, eviction_reach(eviction_lines(log_beta, RULE), log_beta.shape[1], RULE), RULE)


BIASES = [decay, sharp_decay, evictions]


def random_layer(tokens: int, *, rows: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(tokens)
    lead = () if rows is None else (rows,)
    query = torch.randn(*lead, HEADS * GROUP, tokens, DIM)
    key, value = torch.randn(2, *lead, HEADS, tokens, DIM)
    return query, key, value, -torch.rand(*lead, HEADS, tokens) * 0.1


def packed_layer(
    documents: list[Extent],
    make_bias: Callable[[Tensor], Bias] | None,
    *,
    rows: int,
    tokens: int,
    window: int | None = None,
    device: torch.device = CPU,
) -> tuple[LayerAttention, list[Bias] | None]:
    """A layer's call over packed documents, and their biases; with gradients where FlexAttention has them."""
    query, key, value, log_beta = (
        tensor.to(device).requires_grad_(device.type != "cpu") for tensor in random_layer(tokens, rows=rows)
    )
    call = LayerAttention(
        query=query,
        key=key,
        value=value,
        padding=None,
        log_beta=log_beta,
        scale=0.4,
        window=window,
        num_layers=1,
    )
    if make_bias is None:
        return call, None
    return call, [make_bias(log_beta[d.row, :, d.start : d.stop]) for d in documents]


@pytest.mark.parametrize("make_bias", BIASES)
@pytest.mark.parametrize("window", [None, 21])
@pytest.mark.parametrize("tokens", [5, 64, 150])
def test_blocked_attention_and_its_gradients_are_the_references(
    make_bias: Callable[[Tensor], Bias], window: int | None, tokens: int
) -> None:
    inputs = [tensor.requires_grad_() for tensor in random_layer(tokens)]
    query, key, value, log_beta = inputs
    weight = torch.randn_like(query)
    results = []
    for attend in (eager_attention, blocked_attention):
        output = attend(query, key, value, bias=make_bias(log_beta), scale=0.4, window=window)
        results.append([output, *torch.autograd.grad((output * weight).sum(), inputs)])
    for wanted, got in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert tokens == 5 or results[0][-1].abs().max() > 1e-3


def test_blocked_attention_without_a_bias_is_ordinary_attention() -> None:
    query, key, value, _ = random_layer(100)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query[None], key[None], value[None], is_causal=True, scale=0.3, enable_gqa=True
    )[0]
    torch.testing.assert_close(blocked_attention(query, key, value, bias=None, scale=0.3), wanted)


@pytest.mark.parametrize("make_bias", [None, *BIASES])
@pytest.mark.parametrize("window", [None, 21])
@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
def test_flex_attention_over_packed_documents_is_the_reference(
    make_bias: Callable[[Tensor], Bias] | None, window: int | None
) -> None:
    """Forward only: PyTorch has no backward of FlexAttention on CPUs."""
    documents = [Extent(0, 0, 50), Extent(0, 50, 150), Extent(1, 0, 100)]
    call, biases = packed_layer(documents, make_bias, rows=2, tokens=150, window=window)
    wanted = attend_documents(call, documents, biases, is_eager=True)
    with torch.no_grad():
        got = flex_documents(call, FlexLayout(documents, rows=2, tokens=150, device=CPU), biases)
    for document in documents:
        part = (document.row, slice(document.start, document.stop))
        torch.testing.assert_close(got[part], wanted[part], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch has no backward of FlexAttention on CPUs")
@pytest.mark.parametrize("make_bias", BIASES)
@pytest.mark.parametrize("window", [None, 21])
def test_flex_attentions_gradients_on_a_gpu_are_the_references(
    make_bias: Callable[[Tensor], Bias], window: int | None
) -> None:
    device = torch.device("cuda")
    documents = [Extent(0, 0, 90), Extent(0, 90, 300), Extent(1, 0, 256)]
    results = []
    for is_flex in (False, True):
        call, biases = packed_layer(documents, make_bias, rows=2, tokens=300, window=window, device=device)
        if is_flex:
            output = flex_documents(call, FlexLayout(documents, rows=2, tokens=300, device=device), biases)
        else:
            output = attend_documents(call, documents, biases, is_eager=True)
        weight = torch.linspace(-1, 1, output.numel(), device=device).view_as(output)
        counted = sum((output * weight)[d.row, d.start : d.stop].sum() for d in documents)
        results.append(torch.autograd.grad(counted, [call.query, call.key, call.value, call.log_beta]))
    for wanted, got in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("window", [None, 21, 200, 300])
@pytest.mark.parametrize("tokens", [100, 640, 700])
def test_the_sparse_mask_is_the_one_that_the_whole_mask_gives(tokens: int, window: int | None) -> None:
    spans = [Extent(0, 0, tokens // 7), Extent(0, tokens // 7, tokens), Extent(1, 0, 90), Extent(2, 0, tokens)]
    layout = FlexLayout(spans, rows=3, tokens=tokens, device=CPU)
    got = layout.mask(window)
    wanted = create_block_mask(got.mask_mod, 3, None, tokens, tokens, device="cpu")
    assert torch.equal(got.to_dense(), wanted.to_dense())
    assert got.seq_lengths == wanted.seq_lengths
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices"):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name
        assert getattr(got, name).dtype == getattr(wanted, name).dtype


@pytest.mark.parametrize("kind", ["none", "decay", "evictions"])
def test_new_documents_and_a_new_decay_compile_nothing_anew(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each recompilation takes seconds on a GPU, and after eight PyTorch would build the whole matrix."""
    torch.compiler.reset()
    counter = CompileCounter()
    monkeypatch.setattr(flex, "flex_attention", torch.compile(flex_attention, backend=counter, dynamic=False))
    for nth, cut in enumerate([40, 100, 17]):
        documents = [Extent(0, 0, cut), Extent(0, cut, 150 - nth)]

        def make_bias(log_beta: Tensor, nth: int = nth) -> Bias:
            return (
                Decay(log_beta, DecayShape(epsilon=0.15, kappa=4.0 + nth)) if kind == "decay" else evictions(log_beta)
            )

        with torch.no_grad():
            call, biases = packed_layer(documents, None if kind == "none" else make_bias, rows=1, tokens=150)
            flex_documents(call, FlexLayout(documents, rows=1, tokens=150, device=CPU), biases)
        assert counter.frame_count == 1


def test_a_bias_is_not_kept_where_checkpointing_drops_what_is_saved() -> None:
    query, key, value, log_beta = random_layer(100)
    held: list[weakref.ref[Tensor]] = []

    def attend(log_beta: Tensor) -> Tensor:
        bias = evictions(log_beta)
        held.append(weakref.ref(bias.sources[0]))
        return blocked_attention(query, key, value, bias=bias, scale=0.4)

    output = checkpoint(attend, log_beta.requires_grad_(), use_reentrant=False)
    assert held[0]() is None
    output.sum().backward()
    assert len(held) == 2


def test_documents_of_a_row_do_not_see_each_other() -> None:
    query, key, value, log_beta = random_layer(90, rows=1)
    documents = [Extent(0, 0, 40), Extent(0, 40, 90)]

    def attend(keys: Tensor) -> Tensor:
        call = LayerAttention(
            query=query, key=keys, value=value, padding=None, log_beta=None, scale=0.4, window=None, num_layers=1
        )
        return attend_documents(call, documents, [decay(log_beta[0, :, d.start : d.stop]) for d in documents])

    changed = key.clone()
    changed[:, :, :40] += 1.0
    before, after = attend(key), attend(changed)
    assert torch.equal(before[:, 40:], after[:, 40:])
    assert not torch.allclose(before[:, :40], after[:, :40])
