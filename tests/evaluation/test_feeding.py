"""Reading under the regime: what is predicted, what is really evicted, and that company changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.evaluation.tiny_model import load, probe
from trimkv_core.evaluation.feeding import Reader, Regime
from trimkv_core.evaluation.gated import PagedMemory
from trimkv_core.evaluation.loading import LoadedModel
from trimkv_core.evaluation.methods import BASELINES, Case, Gates, make_memory, make_reader
from trimkv_core.evaluation.tasks import Probe, ProbeError, Span
from trimkv_core.models import TrimKVForCausalLM
from trimkv_core.overlay_decoder import OverlayDecoder

REGIME = Regime(chunk=16, buffer=4, sinks=2)
DENSE = Case("dense", None)
EVERY_METHOD = (*Gates, *BASELINES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return load(folder)


def stock_logits(folder: Path, ids: tuple[int, ...]) -> Tensor:
    plain = TrimKVForCausalLM.from_base(str(folder / "base"), dtype=torch.float32)
    with torch.no_grad():
        logits: Tensor = plain(torch.tensor([ids])).logits[0]
    return logits


def test_the_dense_reader_says_what_the_stock_model_says(model: LoadedModel, folder: Path) -> None:
    asked = probe(75)
    (result,) = make_reader(DENSE, model, REGIME).answer([asked])
    log_probs = stock_logits(folder, asked.ids).log_softmax(-1)[:-1]
    targets = torch.tensor(asked.ids[1:])
    expected = -log_probs.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(result.nll), expected, atol=1e-4, rtol=1e-4)
    assert list(result.best) == log_probs.argmax(-1).tolist()
    assert result.peak_entries == 74


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_a_budget_that_holds_everything_is_dense(model: LoadedModel, method: str) -> None:
    asked = [probe(60), probe(41, seed=1)]
    dense = make_reader(DENSE, model, REGIME).answer(asked)
    found = make_reader(Case(method, 60), model, REGIME).answer(asked)
    for left, right in zip(found, dense, strict=True):
        torch.testing.assert_close(torch.tensor(left.nll), torch.tensor(right.nll), atol=1e-4, rtol=1e-4)
        assert left.best == right.best


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_a_small_budget_is_kept_to_and_changes_what_is_said(model: LoadedModel, method: str) -> None:
    asked = probe(100)
    (dense,) = make_reader(DENSE, model, REGIME).answer([asked])
    (found,) = make_reader(Case(method, 8), model, REGIME).answer([asked])
    # Every chunk comes on top of M entries.
    assert found.peak_entries == 8 + REGIME.chunk
    assert found.nll[: REGIME.chunk] == pytest.approx(dense.nll[: REGIME.chunk], abs=1e-4)
    assert max(abs(a - b) for a, b in zip(found.nll, dense.nll, strict=True)) > 1e-2


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_company_changes_no_result(model: LoadedModel, method: str) -> None:
    # More than one forward takes, and of lengths that let single tokens and chunks meet.
    asked = [probe(tokens, seed=tokens) for tokens in (66, 34, 50, 81, 18, 90)]
    together = make_reader(Case(method, 8), model, REGIME).answer(asked)
    for one, result in zip(asked, together, strict=True):
        (alone,) = make_reader(Case(method, 8), model, REGIME).answer([one])
        torch.testing.assert_close(torch.tensor(alone.nll), torch.tensor(result.nll), atol=1e-4, rtol=1e-4)
        assert alone.best == result.best
        assert alone.peak_entries == result.peak_entries


@pytest.mark.parametrize("method", list(Gates))
def test_evicted_entries_are_gone_from_the_pages(model: LoadedModel, method: str) -> None:
    memory = make_memory(Case(method, 8), model, REGIME, 0)
    assert isinstance(memory, PagedMemory)
    held: list[Tensor] = []

    class Watched(PagedMemory):
        def settle(self, rows: Any) -> None:
            super().settle(rows)
            held.extend(self.table.lengths_of(row) for row in rows)

    memory.__class__ = Watched
    Reader(model.decoder, memory, chunk=REGIME.chunk, device=model.device).answer([probe(100)])
    # Six whole chunks, then three tokens that fit into the buffer.
    assert [int(lengths.sum()) / lengths.numel() for lengths in held] == [8] * 6 + [11]
    is_even = [bool(lengths.min() == lengths.max()) for lengths in held]
    assert is_even == [True] * 7 if method == Gates.LOCAL else not any(is_even)
    assert memory.table.pool.num_free == memory.table.pool.num_pages


def test_only_asked_positions_are_predicted_and_nothing_behind_them_is_fed(model: LoadedModel) -> None:
    whole = probe(70)
    asked = Probe(whole.ids, (Span(5, 8), Span(40, 43)))
    (everything,) = make_reader(Case("gates-global", 8), model, REGIME).answer([whole])
    (found,) = make_reader(Case("gates-global", 8), model, REGIME).answer([asked])
    expected = [everything.nll[at - 1] for at in asked.positions()]
    assert found.nll == pytest.approx(expected, abs=1e-4)
    short = Probe(whole.ids[:43], asked.spans)
    assert make_reader(Case("gates-global", 8), model, REGIME).answer([short]) == [found]


def test_the_observer_sees_the_logits_that_are_judged(model: LoadedModel) -> None:
    asked = [probe(50), probe(33, seed=2)]
    seen: dict[int, list[Tensor]] = {0: [], 1: []}

    def observe(number: int, start: int, logits: Tensor) -> None:
        assert start == sum(part.shape[0] for part in seen[number])
        seen[number].append(logits.clone())

    results = make_reader(Case("streaming-llm", 8), model, REGIME).answer(asked, observe)
    for number, (one, result) in enumerate(zip(asked, results, strict=True)):
        log_probs = torch.cat(seen[number]).log_softmax(-1)
        nll = -log_probs.gather(1, torch.tensor(one.ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(result.nll), nll, atol=1e-4, rtol=1e-4)


def test_greedy_continuations_are_the_stock_models(model: LoadedModel, folder: Path) -> None:
    prompts = [probe(37).ids, probe(20, seed=3).ids]
    found = make_reader(DENSE, model, REGIME).generate(prompts, 9)
    for prompt, continued in zip(prompts, found, strict=True):
        assert len(continued) == 9
        logits = stock_logits(folder, (*prompt, *continued))
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == list(continued)


def test_a_continuation_under_a_budget_is_teacher_forcing_of_its_own_tokens(model: LoadedModel) -> None:
    prompt = probe(40).ids
    case = Case("tova", 8)
    (continued,) = make_reader(case, model, REGIME).generate([prompt], 1)
    asked = Probe((*prompt, *continued), (Span(40, 41),))
    (result,) = make_reader(case, model, REGIME).answer([asked])
    assert result.best == continued


def test_a_whole_prompt_method_evicts_nothing_before_the_prompt_is_in(model: LoadedModel) -> None:
    asked = Probe(probe(90).ids, (Span(80, 90),))
    (whole,) = make_reader(Case("whole-prompt:snapkv", 8), model, REGIME).answer([asked])
    (chunked,) = make_reader(Case("snapkv", 8), model, REGIME).answer([asked])
    assert whole.peak_entries == 79
    assert chunked.peak_entries == 8 + REGIME.chunk
    assert whole.nll != chunked.nll


@pytest.mark.parametrize("family", ["qwen3", "mistral-window"])
def test_families_without_a_lean_step_run_through_the_overlay(tmp_path: Path, family: str) -> None:
    model = load(tmp_path, family)
    stock = TrimKVForCausalLM.from_base(str(tmp_path / "base"), gates=str(tmp_path / "gates"), dtype=torch.float32)
    asked = [probe(50), probe(34, seed=1)]
    for method in ("gates-global", "h2o"):
        lean = make_reader(Case(method, 8), model, REGIME).answer(asked)
        memory = make_memory(Case(method, 8), model, REGIME, 0)
        reader = Reader(OverlayDecoder(stock), memory, chunk=REGIME.chunk, device=model.device)
        for left, right in zip(reader.answer(asked), lean, strict=True):
            torch.testing.assert_close(torch.tensor(left.nll), torch.tensor(right.nll), atol=1e-3, rtol=1e-3)


def test_a_probe_of_one_token_is_refused(model: LoadedModel) -> None:
    with pytest.raises(ProbeError, match="nothing can be predicted"):
        make_reader(DENSE, model, REGIME).answer([Probe((5,), ())])
