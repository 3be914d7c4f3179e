"""What each baseline keeps, against its definition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.evaluation.tiny_model import load, probe
from trimkv_core.batches import Segment
from trimkv_core.evaluation.baselines import (
    TOVA,
    Entries,
    HeavyHitters,
    KeyDifference,
    KeyNorm,
    MethodError,
    RandomRecent,
    SnapKV,
    StreamingLLM,
    recent_attention,
)
from trimkv_core.evaluation.feeding import Regime
from trimkv_core.evaluation.loading import LoadedModel
from trimkv_core.evaluation.methods import BASELINES, Case, baseline, make_memory
from trimkv_core.evaluation.uniform_cache import UniformMemory

L, H, G, D = 2, 2, 3, 4
REGIME = Regime(chunk=16, buffer=4, sinks=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(tmp_path_factory.mktemp("model"))


def entries(n: int = 10, *, seen: int = 20, window: int = 3) -> Entries:
    """Random entries; the newest are the last `window` positions."""
    generator = torch.Generator().manual_seed(0)
    older = torch.stack(
        [torch.randperm(seen - window, generator=generator)[: n - window].sort().values for _ in range(L * H)]
    )
    newest = torch.arange(seen - window, seen).expand(L * H, window)
    return Entries(
        key=torch.randn(L, H, n, D, generator=generator),
        value=torch.randn(L, H, n, D, generator=generator),
        position=torch.cat([older, newest], 1).view(L, H, n),
        seen=seen,
        scale=0.5,
        attention=torch.rand(L, H, n, generator=generator),
        queries=torch.randn(L, H, G, window, D, generator=generator),
    )


def kept(score: Tensor, held: Entries, size: int) -> Tensor:
    """Positions of the `size` best of each stream."""
    return held.position.gather(2, score.topk(size).indices).sort(-1).values


def read(model: LoadedModel, method: str, tokens: int, *, memory_size: int = 8) -> tuple[UniformMemory, int]:
    memory = make_memory(Case(method, memory_size), model, REGIME, 0)
    assert isinstance(memory, UniformMemory)
    row, ids, fed = memory.open(tokens), probe(tokens).ids, 0
    while fed < tokens:
        size = min(REGIME.chunk, tokens - fed)
        step = memory.extend([Segment(row, size)])
        model.decoder.forward(torch.tensor(ids[fed : fed + size]), step.position, step.layers, torch.zeros(0).long())
        memory.settle([row])
        fed += size
    return memory, row


def test_streaming_keeps_sinks_and_the_newest(model: LoadedModel) -> None:
    memory, row = read(model, "streaming-llm", 64)
    position = memory.entries(row).position
    assert torch.equal(position, torch.tensor([0, 1, *range(58, 64)]).expand_as(position))


@pytest.mark.parametrize("method", BASELINES)
def test_the_cache_keeps_exactly_what_the_score_says(model: LoadedModel, method: str) -> None:
    memory, row = read(model, method, 40)
    ids = probe(80).ids
    step = memory.extend([Segment(row, 16)])
    model.decoder.forward(torch.tensor(ids[40:56]), step.position, step.layers, torch.zeros(0).long())
    before = memory.entries(row)
    assert before.position.shape[2] == 24
    score = baseline(method, REGIME, 0).score(before, 8)
    places = torch.sort(score, dim=-1, descending=True, stable=True).indices[..., :8].sort(-1).values
    wanted = {
        name: getattr(before, name).gather(2, places[..., None].expand(-1, -1, -1, before.key.shape[3])).clone()
        for name in ("key", "value")
    }
    position = before.position.gather(2, places)
    memory.settle([row])
    after = memory.entries(row)
    assert torch.equal(after.position, position)
    assert torch.equal(after.key, wanted["key"])
    assert torch.equal(after.value, wanted["value"])
    assert (position[..., :2] == torch.tensor([0, 1])).all(), "sinks are pinned for every method"


def test_key_norm_keeps_small_keys_beside_the_newest() -> None:
    held = entries()
    position = kept(KeyNorm().score(held, 6), held, 6)
    assert (position[..., 3:] == torch.arange(17, 20)).all()
    small = held.key[..., :7, :].norm(dim=-1).topk(3, largest=False).indices.sort(-1).values
    assert torch.equal(position[..., :3], held.position.gather(2, small))


def test_key_difference_drops_the_key_all_are_like() -> None:
    held = entries(5, window=1)
    key = torch.eye(D).repeat(L, H, 1, 1)
    alike = torch.cat([key, key[:, :, :1] * 7.0], 2)
    score = KeyDifference().score(Entries(**{**as_dict(held), "key": alike}), 3)
    # Two keys of one direction pull the mean towards themselves, whatever their length.
    torch.testing.assert_close(score[..., 0], score[..., 4])
    assert (score[..., 1:4] > score[..., :1]).all()


def as_dict(held: Entries) -> dict[str, object]:
    return {name: getattr(held, name) for name in Entries.__slots__}


def test_heavy_hitters_receive_all_attention_there_was(model: LoadedModel) -> None:
    memory, row = read(model, "h2o", 10)
    attention = memory.entries(row).attention
    assert attention is not None
    torch.testing.assert_close(attention.sum(-1), torch.full(attention.shape[:2], 10.0), atol=1e-4, rtol=1e-4)
    # After a cut the next chunk's attention comes on top of what those that stayed had.
    memory, row = read(model, "h2o", 16)
    before = memory.entries(row)
    assert before.attention is not None
    step = memory.extend([Segment(row, 1)])
    earlier = before.attention.clone()
    model.decoder.forward(torch.tensor([9]), step.position, step.layers, torch.zeros(0).long())
    after = memory.entries(row).attention
    assert after is not None
    torch.testing.assert_close(after.sum(-1) - earlier.sum(-1), torch.ones(after.shape[:2]), atol=1e-4, rtol=1e-4)
    assert (after[..., :-1] >= earlier - 1e-6).all()


def test_observed_attention_is_per_query_that_could_see_the_entry() -> None:
    held = entries()
    assert held.attention is not None
    score = HeavyHitters(is_averaged=True).score(held, 2)
    torch.testing.assert_close(score[..., :7], held.attention[..., :7] / (20 - held.position[..., :7]))


def test_recent_attention_is_a_causal_softmax() -> None:
    held = entries()
    weights = recent_attention(held)
    assert held.queries is not None
    for window in range(3):
        visible = 8 + window
        logits = held.queries[1, 0, 2, window] @ held.key[1, 0, :visible].t() * 0.5
        torch.testing.assert_close(weights[1, 0, 2, window, :visible], logits.softmax(-1))
        assert (weights[1, 0, 2, window, visible:] == 0).all()


def test_snapkv_keeps_its_window_and_what_the_window_attends_to() -> None:
    held = entries()
    position = kept(SnapKV(pooling=1).score(held, 6), held, 6)
    assert (position[..., 3:] == torch.arange(17, 20)).all()
    votes = recent_attention(held).mean((2, 3))[..., :7]
    assert torch.equal(position[..., :3], held.position.gather(2, votes.topk(3).indices.sort(-1).values))


def test_snapkv_smooths_over_neighbours() -> None:
    held = entries()
    flat = SnapKV(pooling=1).score(held, 6)[..., :7]
    smooth = SnapKV(pooling=3).score(held, 6)[..., :7]
    torch.testing.assert_close(smooth[..., 1:6], (flat[..., :5] + flat[..., 1:6] + flat[..., 2:7]) / 3)


def test_tova_keeps_the_same_tokens_in_all_heads_of_a_layer(model: LoadedModel) -> None:
    memory, row = read(model, "tova", 60)
    position = memory.entries(row).position
    assert (position == position[:, :1]).all()
    held = entries()
    score = TOVA().score(held, 4)
    torch.testing.assert_close(score[:, 0], recent_attention(held)[:, :, :, -1].mean((1, 2)))


def test_queries_of_the_latest_tokens_are_remembered_over_forwards(model: LoadedModel) -> None:
    memory = make_memory(Case("snapkv", 12), model, REGIME, 0)
    assert isinstance(memory, UniformMemory)
    ids = probe(12).ids
    row = memory.open(12)
    for start, stop in ((0, 9), (9, 10), (10, 12)):
        step = memory.extend([Segment(row, stop - start)])
        model.decoder.forward(torch.tensor(ids[start:stop]), step.position, step.layers, torch.zeros(0).long())
    whole = make_memory(Case("snapkv", 12), model, REGIME, 0)
    assert isinstance(whole, UniformMemory)
    other = whole.open(12)
    step = whole.extend([Segment(other, 12)])
    model.decoder.forward(torch.tensor(ids), step.position, step.layers, torch.zeros(0).long())
    parts, together = memory.entries(row).queries, whole.entries(other).queries
    assert parts is not None
    assert together is not None
    assert parts.shape[3] == 5
    torch.testing.assert_close(parts, together, atol=1e-4, rtol=1e-4)


def test_random_recent_is_a_uniform_sample_that_does_not_forget_the_old() -> None:
    n = 4000
    position = torch.arange(n).expand(L, H, n)
    held = Entries(key=torch.zeros(L, H, n, D), value=torch.zeros(L, H, n, D), position=position, seen=n, scale=1.0)
    size = 800
    found = kept(RandomRecent(4, seed=3).score(held, size), held, size)
    assert (found[..., :4] == torch.arange(4)).all()
    assert (found[..., -400:] == torch.arange(3600, 4000)).all()
    middle = found[..., 4:-400].float()
    assert (middle.mean(-1) - 1802).abs().max() < 250
    assert not torch.equal(found[0, 0], found[0, 1]), "every stream draws for itself"
    assert not torch.equal(found, kept(RandomRecent(4, seed=4).score(held, size), held, size))


@pytest.mark.parametrize("method", BASELINES)
def test_a_budget_that_sinks_would_fill_is_refused(method: str, model: LoadedModel) -> None:
    with pytest.raises(MethodError, match="use at least 4"):
        make_memory(Case(method, 3), model, REGIME, 0)


def test_streaming_scores_need_nothing_but_positions() -> None:
    held = entries(window=5)
    position = kept(StreamingLLM(0).score(held, 5), held, 5)
    assert (position == torch.arange(15, 20)).all()


def test_a_window_of_the_model_hides_older_entries(tmp_path: Path) -> None:
    """The model's own sliding window holds in a cache with gaps too: only positions count."""
    windowed = load(tmp_path, "mistral-window")
    memory, row = read(windowed, "key-norm", 40, memory_size=30)
    held = memory.entries(row)
    query = torch.randn(1, 4, held.key.shape[3])
    step = memory.extend([Segment(row, 1)])
    own = torch.randn(1, 2, held.key.shape[3])
    mixed = step.layers.layer(0, query, own, own, log_beta=None, scale=0.25, window=9)
    now = memory.entries(row)
    for head in range(2):
        seen = now.position[0, head] > 40 - 9
        weights = (query[0, 2 * head] @ now.key[0, head, seen].t() * 0.25).softmax(-1)
        torch.testing.assert_close(mixed[0, 2 * head], weights @ now.value[0, head, seen], atol=1e-5, rtol=1e-5)
