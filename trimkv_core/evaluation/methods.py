"""Names of methods, and what each becomes for a model and a budget.

Owns the table behind `--methods`. Knows how memories and scores are put together, not what they do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from trimkv_core.attention.select import select_backend
from trimkv_core.budget import Budget, Scope
from trimkv_core.byte_ledger import geometry_of
from trimkv_core.evaluation.baselines import (
    TOVA,
    HeavyHitters,
    KeyDifference,
    KeyNorm,
    Method,
    MethodError,
    RandomRecent,
    SnapKV,
    StreamingLLM,
)
from trimkv_core.evaluation.feeding import LANES, Memory, Reader, Regime
from trimkv_core.evaluation.gated import BLOCK_SIZE, PagedMemory
from trimkv_core.evaluation.loading import LoadedModel
from trimkv_core.evaluation.uniform_cache import UniformMemory

DENSE = "dense"
KVPRESS = "kvpress:"
WHOLE_PROMPT = "whole-prompt:"


class Gates(StrEnum):
    """Methods that rank entries by the gates."""

    GLOBAL = "gates-global"
    LOCAL = "gates-local"


BASELINES = (
    "streaming-llm",
    "key-norm",
    "key-diff",
    "h2o",
    "observed-attention",
    "snapkv",
    "tova",
    "random-recent",
)
# Published as one cut at the end of a prompt that has been seen whole.
WHOLE_PROMPT_BASELINES = tuple(f"{WHOLE_PROMPT}{name}" for name in ("snapkv", "h2o"))
DEFAULT_METHODS = (*Gates, *BASELINES)


@dataclass(frozen=True, slots=True)
class Case:
    """A method at a budget: what a row of results is about.

    Attributes:
        method: its name.
        memory_size: M; None: dense.
    """

    method: str
    memory_size: int | None

    @property
    def sees_whole_prompt(self) -> bool:
        """Whether nothing is evicted before the prompt is in: such rows stand in a table of their own."""
        return self.method.startswith(WHOLE_PROMPT)

    @property
    def is_foreign(self) -> bool:
        """Whether another process answers."""
        return self.method.startswith(KVPRESS)

    @property
    def uses_gates(self) -> bool:
        """Whether the gates rank the entries."""
        return self.method in tuple(Gates)

    def __str__(self) -> str:
        return self.method if self.memory_size is None else f"{self.method} M={self.memory_size}"


def check_names(names: Sequence[str]) -> None:
    """Refuse methods that do not exist.

    Raises:
        MethodError: says which, and what there is.
    """
    known = (DENSE, *Gates, *BASELINES, *WHOLE_PROMPT_BASELINES)
    unknown = [
        name for name in names if name not in known and not (name.startswith(KVPRESS) and len(name) > len(KVPRESS))
    ]
    if unknown:
        raise MethodError(
            f"unknown method{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}: "
            f"use {', '.join(known)} or {KVPRESS}NAME"
        )


def baseline(name: str, regime: Regime, seed: int) -> Method:
    """The baseline called `name`.

    Raises:
        MethodError: there is none.
    """
    methods: tuple[Method, ...] = (
        StreamingLLM(regime.sinks),
        KeyNorm(regime.sinks),
        KeyDifference(regime.sinks),
        HeavyHitters(regime.sinks),
        HeavyHitters(regime.sinks, is_averaged=True),
        SnapKV(regime.sinks),
        TOVA(regime.sinks),
        RandomRecent(regime.sinks, seed),
    )
    name = name.removeprefix(WHOLE_PROMPT)
    found = next((method for method in methods if method.name == name), None)
    if found is None:
        raise MethodError(f"{name!r} is no baseline: use one of {', '.join(BASELINES)}")
    return found


def make_budget(case: Case, model: LoadedModel, regime: Regime) -> Budget:
    """The budget of a method that lives in pages.

    Raises:
        MethodError: the model has no gates.
        BudgetError: the budget is too small for its sinks.
    """
    if case.memory_size is None:
        return Budget.dense()
    if not model.has_gates:
        raise MethodError(f"{case.method} needs gates: name a checkpoint with --gates, or other --methods")
    return Budget(
        memory_size=case.memory_size,
        buffer_size=regime.buffer,
        scope=Scope.GLOBAL if case.method == Gates.GLOBAL else Scope.LOCAL,
        num_sink_tokens=model.num_sink_tokens,
        prefill_chunk=regime.chunk,
    )


def sinks_of(case: Case, model: LoadedModel, regime: Regime) -> int:
    """First positions that a case pins."""
    if case.memory_size is None:
        return 0
    if case.uses_gates:
        return model.num_sink_tokens
    return regime.sinks


def check_case(case: Case, model: LoadedModel, regime: Regime) -> None:
    """Refuse what cannot run, before anything does.

    Raises:
        MethodError: the method cannot work with that budget or this model.
        BudgetError: the budget is too small for its sinks.
    """
    if case.is_foreign:
        if case.memory_size is None or case.memory_size <= regime.sinks:
            raise MethodError(f"{case}: a budget above {regime.sinks} entries is needed")
    elif case.method in (DENSE, *Gates):
        make_budget(case, model, regime)
    else:
        if case.memory_size is None:
            raise MethodError(f"{case.method} needs a budget")
        baseline(case.method, regime, 0).check(case.memory_size)


def make_memory(case: Case, model: LoadedModel, regime: Regime, seed: int) -> Memory:
    """What remembers for a case; errors as in `check_case`."""
    geometry = geometry_of(model.config, block_size=BLOCK_SIZE, dtype=model.dtype)
    if case.method in (DENSE, *Gates):
        backend = select_backend("auto", device=model.device, dtype=model.dtype)
        budget = make_budget(case, model, regime)
        return PagedMemory(geometry, backend, budget, dtype=model.dtype, device=model.device, chunk=regime.chunk)
    if case.memory_size is None:
        raise MethodError(f"{case.method} needs a budget")
    return UniformMemory(
        geometry,
        baseline(case.method, regime, seed),
        memory_size=case.memory_size,
        buffer=regime.buffer,
        dtype=model.dtype,
        device=model.device,
    )


def make_reader(case: Case, model: LoadedModel, regime: Regime, *, seed: int = 0, lanes: int = LANES) -> Reader:
    """A reader for any case but a foreign one."""
    return Reader(
        model.decoder,
        make_memory(case, model, regime, seed),
        chunk=regime.chunk,
        device=model.device,
        lanes=lanes,
        sees_whole_prompt=case.sees_whole_prompt,
    )
