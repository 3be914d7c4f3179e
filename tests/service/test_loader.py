"""What a configuration becomes, as far as no model is needed for it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from service.engine.config import EngineConfig
from service.engine.loader import StartupError, _default_budget


def default_memory_size(*, trained: int | None = 64, sinks: int = 4, **config: int) -> int | None:
    checkpoint = SimpleNamespace(memory_size=trained, num_sink_tokens=sinks, global_capacity=True)
    return _default_budget(EngineConfig(**config), SimpleNamespace(config=checkpoint), has_gates=True).memory_size


def test_the_operators_cap_holds_for_the_servers_default() -> None:
    assert default_memory_size() == 64
    assert default_memory_size(max_kv_budget=32) == 32
    assert default_memory_size(max_kv_budget=128) == 64
    assert default_memory_size(max_kv_budget=32, kv_budget=0) is None


def test_a_cap_below_the_sink_tokens_cannot_be_served() -> None:
    assert default_memory_size(max_kv_budget=4) == 4
    with pytest.raises(StartupError, match=r"max_kv_budget=3 .* 4 sink tokens"):
        default_memory_size(max_kv_budget=3)


def test_without_gates_a_cap_means_nothing() -> None:
    config = EngineConfig(max_kv_budget=3)
    assert not _default_budget(config, SimpleNamespace(), has_gates=False).can_evict
