"""Retention-gated attention: the blocked path and FlexAttention are the eager reference, gradients included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trimkv_core.overlay import LayerAttention
from trimkv_core.training.attention import Bias, Decay, EvictionBias, blocked_attention, eager_attention
from trimkv_core.training.evictions import EvictionRule, eviction_lines, eviction_table
from trimkv_core.training.flex import flex_documents
from trimkv_core.training.gated_model import Document, attend_documents
from trimkv_core.training.shapes import DecayShape

HEADS, GROUP, DIM = 2, 3, 8
RULE = EvictionRule(memory_size=20, interval=16, num_sink_tokens=3)


def decay(log_beta: Tensor) -> Bias:
    return Decay(log_beta, DecayShape())


def sharp_decay(log_beta: Tensor) -> Bias:
    return Decay(log_beta, DecayShape(epsilon=0.15, kappa=4.0))


def evictions(log_beta: Tensor) -> Bias:
    return EvictionBias(eviction_table(log_beta, eviction_lines(log_beta.detach(), RULE), RULE), RULE.interval)


BIASES = [decay, sharp_decay, evictions]


def random_layer(tokens: int, *, rows: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(tokens)
    lead = () if rows is None else (rows,)
    query = torch.randn(*lead, HEADS * GROUP, tokens, DIM)
    key, value = torch.randn(2, *lead, HEADS, tokens, DIM)
    return query, key, value, -torch.rand(*lead, HEADS, tokens) * 0.1


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
    query, key, value, log_beta = random_layer(128, rows=2)
    documents = [Document(0, 0, 50), Document(0, 50, 128), Document(1, 0, 100)]
    call = LayerAttention(
        query=query,
        key=key,
        value=value,
        padding=None,
        log_beta=log_beta.transpose(1, 2),
        scale=0.4,
        window=window,
        num_layers=1,
    )
    biases = None if make_bias is None else [make_bias(log_beta[d.row, :, d.start : d.stop]) for d in documents]
    wanted = attend_documents(call, documents, biases, is_eager=True)
    with torch.no_grad():
        got = flex_documents(call, documents, biases)
    for document in documents:
        part = (document.row, slice(document.start, document.stop))
        torch.testing.assert_close(got[part], wanted[part], rtol=1e-4, atol=1e-5)


def test_documents_of_a_row_do_not_see_each_other() -> None:
    query, key, value, log_beta = random_layer(90, rows=1)
    documents = [Document(0, 0, 40), Document(0, 40, 90)]

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
