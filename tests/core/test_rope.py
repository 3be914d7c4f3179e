"""A RoPE that would follow the longest sequence of a batch is fixed at load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.core.test_cache import generate
from tests.core.tiny import load
from trimkv_core import PagedTrimKVCache
from trimkv_core.overlay import fix_rope

LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 32,
}


def frequencies(model: Any, tokens: int) -> torch.Tensor:
    cos, _ = model.model.rotary_emb(torch.zeros(1, tokens, 32), torch.arange(tokens)[None])
    result: torch.Tensor = cos[0, 3]
    return result


def test_longrope_no_longer_depends_on_the_batch(tmp_path: Path) -> None:
    for length, is_long in ((16, False), (400, True)):
        plain, model = load(
            tmp_path / str(length), "phi3", rope_parameters=LONGROPE, original_max_position_embeddings=32
        )
        note = fix_rope(model, length)
        assert note is not None
        assert str(length) in note
        assert torch.equal(frequencies(model, 8), frequencies(model, 100))
        reference = frequencies(plain, 100 if is_long else 8)
        torch.testing.assert_close(frequencies(model, 8), reference)


def test_a_plain_rope_is_left_alone(tmp_path: Path) -> None:
    plain, model = load(tmp_path, "qwen3")
    assert fix_rope(model, 100) is None
    cache = PagedTrimKVCache.for_model(model, memory_size=None)
    assert generate(model, past_key_values=cache) == generate(plain)
