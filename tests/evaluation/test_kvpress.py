"""kvpress's baselines: what the worker removes, what it predicts then, and what the client says when it cannot be had.

The worker runs here on tiny models and with scores made in the test; only the last tests start a Python with kvpress.
"""

from __future__ import annotations

import os
import sys
import time
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.core.tiny import SIZES
from trimkv_core.evaluation.kvpress_client import (
    KVPRESS_METHODS,
    KvpressError,
    exchange,
    kvpress_versions,
    results_of,
    run_kvpress,
)
from trimkv_core.evaluation.kvpress_worker import (
    Method,
    Regime,
    best_of_each_head,
    chunk_mask,
    ratio_for,
    read,
    right_aligned,
    snapkv_window,
)
from trimkv_core.evaluation.tasks import Probe, ProbeResult, Span

REGIME = Regime(memory_size=10, chunk=8, buffer=3, sinks=2)
PYTHON_VARIABLE = "TRIMKV_KVPRESS_PYTHON"
needs_kvpress = pytest.mark.skipif(
    PYTHON_VARIABLE not in os.environ, reason=f"set {PYTHON_VARIABLE} to a Python that has kvpress 0.5.5"
)


class Recency:
    """A press that prefers what came last."""

    def score(self, module: Any, hidden: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any) -> Tensor:
        return torch.arange(keys.shape[2], dtype=torch.float32).expand(keys.shape[:3])


class Observed:
    """What kvpress's observed attention does with the attention it gets; keeps what it said."""

    def __init__(self) -> None:
        self.said: list[Tensor] = []

    def score(self, module: Any, hidden: Tensor, keys: Tensor, values: Tensor, attentions: Tensor, _: Any) -> Tensor:
        sums = attentions.sum(2) / torch.arange(keys.shape[2], 0, -1)
        self.said.append(sums.view(keys.shape[0], keys.shape[1], -1, keys.shape[2]).mean(2))
        return self.said[-1]


class FirstKeyEntry:
    """Scores that depend on nothing but the entry itself; refuses filling, whose keys the test makes recognisable."""

    def score(self, module: Any, hidden: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any) -> Tensor:
        return keys[..., 0]


def model(attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, attn_implementation=attention)
    return LlamaForCausalLM(config).eval()


def tokens(length: int, sequences: int = 1) -> Tensor:
    return torch.randint(3, SIZES["vocab_size"], (sequences, length), generator=torch.Generator().manual_seed(1))


def everything(ids: Tensor) -> list[list[int]]:
    return [list(range(1, ids.shape[1]))] * ids.shape[0]


@torch.inference_mode()
def masked_nll(network: Any, ids: Tensor, seen: Tensor) -> Tensor:
    """Negative log-likelihoods [tokens - 1] of one forward over a sequence, its queries seeing what `seen` says."""
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    logits = network(ids, attention_mask=mask[None, None]).logits[0]
    return torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")


def adaptive_by_head(scores: Tensor, kept: int) -> Tensor:
    """The best of a layer's heads together, as AdaKV without its safeguard."""
    flat = scores.flatten(1)
    best = flat.topk(kept * scores.shape[1], dim=-1).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, best, True).view_as(scores)


def test_a_memory_as_long_as_the_text_predicts_what_the_dense_model_predicts() -> None:
    ids = tokens(37)
    roomy = Regime(memory_size=37, chunk=8, buffer=3, sinks=2)
    answer = read(model(), Method(Recency()), roomy, ids=ids, predicted=everything(ids))[0]
    dense = masked_nll(model(), ids, torch.ones(37, 37, dtype=torch.bool).tril())
    torch.testing.assert_close(torch.tensor(answer["nll"]), dense, atol=1e-5, rtol=1e-5)
    assert answer["peak_entries"] == 37


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_recency_with_sinks_is_one_forward_under_that_mask(attention: str) -> None:
    ids = tokens(61)
    answer = read(model(attention), Method(Recency()), REGIME, ids=ids, predicted=everything(ids))[0]
    query, key = torch.arange(61)[:, None], torch.arange(61)
    # The first eviction is due after two chunks (8 < 10 + 3), then after each.
    began = query // REGIME.chunk * REGIME.chunk
    recent = (key >= began - (REGIME.memory_size - REGIME.sinks)) | (began <= 8)
    seen = (key <= query) & ((key < REGIME.sinks) | recent)
    expected = masked_nll(model(), ids, seen)
    torch.testing.assert_close(torch.tensor(answer["nll"]), expected, atol=1e-4, rtol=1e-4)
    dense = masked_nll(model(), ids, key <= query)
    assert (expected - dense).abs().max() > 0.01  # else nothing was removed that mattered
    assert answer["peak_entries"] == REGIME.memory_size + REGIME.chunk


def test_a_batch_predicts_what_its_sequences_predict_alone() -> None:
    ids = tokens(45, sequences=3)
    predicted = [[1, 9, 44], [17], [16, 24]]
    method = Method(FirstKeyEntry(), choose=adaptive_by_head)
    together = read(model(), method, REGIME, ids=ids, predicted=predicted)
    for row, answer in enumerate(together):
        alone = read(model(), method, REGIME, ids=ids[row : row + 1], predicted=predicted[row : row + 1])[0]
        assert answer["nll"] == pytest.approx(alone["nll"], abs=1e-4)
        assert answer["best"] == alone["best"]
        assert len(answer["best"]) == len(predicted[row])


def test_heads_of_different_lengths_see_their_own_entries_and_nothing_else() -> None:
    """Against an attention of the test's own over lists of entries a head, in a model of one layer."""
    torch.manual_seed(0)
    config = LlamaConfig(**(SIZES | {"num_hidden_layers": 1}), attn_implementation="sdpa")
    network = LlamaForCausalLM(config).eval()
    ids = tokens(45)
    with torch.inference_mode():
        keys = network.model.layers[0].self_attn.k_proj(
            network.model.layers[0].input_layernorm(network.model.embed_tokens(ids))
        )
        cos, sin = network.model.rotary_emb(keys, torch.arange(45)[None])
        keys = keys.view(1, 45, 2, -1).transpose(1, 2)
        half = keys.shape[-1] // 2
        first = keys[..., 0] * cos[:, None, :, 0] - keys[..., half] * sin[:, None, :, 0]  # after rotation, [1, 2, 45]
    held: list[list[int]] = [[], []]
    seen = torch.zeros(2, 45, 45, dtype=torch.bool)
    for start in range(0, 45, REGIME.chunk):
        stop = min(start + REGIME.chunk, 45)
        for head in range(2):
            for query in range(start, stop):
                seen[head, query, [*held[head], *range(start, query + 1)]] = True
            held[head] += range(start, stop)
        if len(held[0]) + len(held[1]) >= 2 * (REGIME.memory_size + REGIME.buffer):
            pairs = [
                (at >= REGIME.sinks, -float(first[0, head, at]), head, at) for head in range(2) for at in held[head]
            ]
            stay = {(head, at) for _, _, head, at in sorted(pairs)[: 2 * REGIME.memory_size]}
            held = [[at for at in held[head] if (head, at) in stay] for head in range(2)]
    assert len(held[0]) != len(held[1])
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.inference_mode():
        logits = network(ids, attention_mask=mask.repeat_interleave(2, dim=0)[None]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    method = Method(FirstKeyEntry(), choose=adaptive_by_head)
    answer = read(network, method, REGIME, ids=ids, predicted=everything(ids))[0]
    torch.testing.assert_close(torch.tensor(answer["nll"]), expected, atol=1e-4, rtol=1e-4)
    assert answer["peak_entries"] == REGIME.memory_size + REGIME.chunk


def test_observed_attention_is_the_mean_over_every_query_since_an_entry_came() -> None:
    ids = tokens(16)
    press = Observed()
    read(model("eager"), Method(press, observed="mean"), REGIME, ids=ids, predicted=everything(ids))
    with torch.inference_mode():
        attentions = model("eager")(ids, output_attentions=True).attentions
    for said, attention in zip(press.said, attentions, strict=True):
        mean = attention.sum(2) / torch.arange(16, 0, -1)
        torch.testing.assert_close(said, mean.view(1, 2, 2, 16).mean(2), atol=1e-5, rtol=1e-4)


def test_observed_sums_follow_their_entries_through_evictions() -> None:
    ids = tokens(40)
    press = Observed()
    read(model("eager"), Method(press, observed="sum"), REGIME, ids=ids, predicted=everything(ids))
    last = press.said[-1]
    # 10 entries stayed of 32, then came 8 queries: all that they gave is held by these 18 or was removed with an entry.
    assert last.shape == (1, 2, 18)
    # A sink's sum holds what the first chunks gave it, the newest entry's only what its own query gave.
    assert (last[0, :, 0] > last[0, :, -1]).all()
    assert (last[..., -1] <= 1).all()


def test_mask_shows_entries_at_the_right_end_and_the_chunk_up_to_the_query() -> None:
    mask = chunk_mask(torch.tensor([[1, 3]]), 3, 2, groups=2, dtype=torch.float32)
    assert mask.shape == (1, 4, 2, 5)
    short = [[False, False, True, True, False], [False, False, True, True, True]]
    full = [[True, True, True, True, False], [True, True, True, True, True]]
    assert (mask[0] == 0).tolist() == [short, short, full, full]


def test_kept_entries_move_to_the_right_end_in_their_order() -> None:
    keep = torch.tensor([[[True, False, True, True], [False, True, False, False]]])
    index, counts = right_aligned(keep)
    assert counts.tolist() == [[3, 1]]
    assert index[0, 0].tolist() == [0, 2, 3]
    assert index[0, 1, -1] == 1


def test_the_best_of_each_head_are_as_many_as_asked() -> None:
    scores = torch.tensor([[[0.3, 0.1, float("inf"), 0.2], [float("-inf"), 5.0, 4.0, 6.0]]])
    assert best_of_each_head(scores, 2).tolist() == [[[True, False, True, False], [False, True, False, True]]]


def test_ratio_keeps_exactly_what_is_asked_of_every_length() -> None:
    for columns in range(2, 700):
        for kept in (1, columns // 3, columns - 1):
            assert int(columns * (1 - ratio_for(kept, columns))) == kept or kept == 0


def test_snapkv_window_leaves_half_the_choice() -> None:
    sizes = {16: 4, 64: 8, 128: 16, 512: 64, 2048: 64}
    assert {size: snapkv_window(Regime(size, 64, 8, 4)) for size in sizes} == sizes
    assert snapkv_window(Regime(6, 64, 8, 4)) == 1


def test_a_model_with_windows_of_its_own_is_refused() -> None:
    network = model()
    network.model.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match="full attention in every layer"):
        read(network, Method(Recency()), REGIME, ids=tokens(9), predicted=[[1]])


PROBE = Probe(ids=(5, 6, 7, 8), spans=(Span(1, 3),))
CALL: dict[str, Any] = {"chunk": 8, "buffer": 2, "sinks": 1, "timeout_s": 60.0}


def test_a_python_without_the_packages_is_told_what_to_install(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    python = tmp_path / "bare" / "bin" / "python"
    with pytest.raises(
        KvpressError, match=r"has no torch, transformers, kvpress; .*pip install torch kvpress==0\.5\.5"
    ):
        run_kvpress(python, tmp_path, "knorm", 16, [PROBE], **CALL)


def test_no_python_at_all_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(KvpressError, match="no Python that can be started"):
        kvpress_versions(tmp_path / "python")
    with pytest.raises(KvpressError, match="no Python that can be started"):
        kvpress_versions(Path("/bin/false"))


@pytest.mark.parametrize(
    ("method", "memory_size", "changes", "message"),
    [
        ("knrom", 16, {}, "method='knrom' is unknown"),
        ("knorm", 16, {"sinks": 16}, "0 ≤ sinks < memory_size"),
        ("knorm", 16, {"chunk": 0}, "chunk and batch ≥ 1"),
        ("knorm", 16, {"buffer": -1}, "buffer ≥ 0"),
    ],
)
def test_arguments_out_of_range_are_named(method: str, memory_size: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(KvpressError, match=message):
        run_kvpress(Path(sys.executable), Path(), method, memory_size, [PROBE], **(CALL | changes))


def test_a_request_goes_out_and_its_reply_comes_back() -> None:
    echo = "import json, sys; json.dump({'got': json.load(open(sys.argv[1]))}, open(sys.argv[2], 'w'))"
    request = {"text": "é ≤ 64", "spans": [[1, 3]]}
    assert exchange([sys.executable, "-I", "-c", echo], request, timeout_s=60) == {"got": request}


def test_a_process_that_fails_is_quoted() -> None:
    failing = "import sys; sys.exit('out of memory on page 7')"
    with pytest.raises(KvpressError, match="ended with 1 and no answer: out of memory on page 7"):
        exchange([sys.executable, "-I", "-c", failing], {}, timeout_s=60)


def test_a_process_that_hangs_is_ended_in_time() -> None:
    hanging = "import time; print('reading', flush=True); time.sleep(60)"
    began = time.monotonic()
    with pytest.raises(KvpressError, match=r"longer than timeout_s=1.5; .* said last: reading"):
        exchange([sys.executable, "-I", "-c", hanging], {}, timeout_s=1.5)
    assert time.monotonic() - began < 30


def test_the_worker_says_what_went_wrong(tmp_path: Path) -> None:
    """The real worker, in this Python: an unknown method or no kvpress, it answers in words and not with a crash."""
    from trimkv_core.evaluation import kvpress_worker

    command = [sys.executable, "-I", str(Path(kvpress_worker.__file__))]
    regime = {"memory_size": 16, "chunk": 8, "buffer": 2, "sinks": 1}
    request = {"model_folder": str(tmp_path), "method": "none of them", "regime": regime, "batch": 1, "probes": []}
    request |= {"device": "cpu", "threads": 1}
    with pytest.raises(KvpressError, match=r"worker failed: (ModuleNotFoundError|ValueError).*Traceback"):
        exchange(command, request, timeout_s=120)


def test_answers_become_results_and_wrong_ones_are_refused() -> None:
    entry = {"nll": [0.5, 1], "best": [6, 9], "peak_entries": 12.0}
    assert results_of({"results": [entry]}, [PROBE]) == [ProbeResult((0.5, 1.0), (6, 9), 12.0)]
    for wrong in ([], [entry, entry], [entry | {"best": [6]}], [{"nll": [0.5]}], 7):
        with pytest.raises(KvpressError):
            results_of({"results": wrong}, [PROBE])
    with pytest.raises(KvpressError, match="is not one"):
        results_of([entry], [PROBE])


def test_no_probes_need_no_kvpress(tmp_path: Path) -> None:
    assert run_kvpress(tmp_path / "nowhere", tmp_path, "knorm", 16, [], **CALL) == []


@needs_kvpress
@pytest.mark.parametrize("method", KVPRESS_METHODS)
def test_every_method_answers_within_its_memory(method: str, tmp_path: Path) -> None:
    network = model()
    network.save_pretrained(tmp_path)
    ids = tokens(200, sequences=3)
    probes = [Probe(tuple(row), (Span(1, 200),)) for row in ids.tolist()] + [Probe(tuple(ids[0, :50].tolist()), ())]
    python = Path(os.environ[PYTHON_VARIABLE])
    results = run_kvpress(python, tmp_path, method, 24, probes, chunk=32, buffer=8, sinks=4, timeout_s=300, batch=2)
    # 24 and a chunk; the last one is cut to 24 after 32 tokens and reads 18 more.
    assert [result.peak_entries for result in results] == [56, 56, 56, 42]
    dense = run_kvpress(python, tmp_path, method, 200, probes, chunk=32, buffer=8, sinks=4, timeout_s=300)
    expected = masked_nll(network, ids[:1], torch.ones(200, 200, dtype=torch.bool).tril())
    assert dense[0].nll == pytest.approx(expected.tolist(), abs=1e-3)
    assert results[0].nll != pytest.approx(expected.tolist(), abs=1e-3)
