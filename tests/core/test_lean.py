"""The lean step against the overlay: the same logits and the same entries, for every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.core.tiny import FAMILIES
from tests.core.tiny import load as load_tiny
from trimkv_core.attention.base import AttentionBackend, PagedStep
from trimkv_core.attention.select import select_backend
from trimkv_core.batches import Segment
from trimkv_core.budget import Geometry
from trimkv_core.lean.decoder import LeanDecoder, make_lean_decoder
from trimkv_core.lean.families import read_decoder
from trimkv_core.lean.numba_ops import NumbaOps
from trimkv_core.lean.torch_ops import TorchOps
from trimkv_core.overlay_decoder import OverlayDecoder
from trimkv_core.pages import PagePool
from trimkv_core.sequences import SequenceTable

CHUNKS = ((9, 5, 1), (1, 1, 7), (1, 1, 1), (1, 4, 1))


def run(decoder: Any, backend: AttentionBackend[Any], geometry: Geometry) -> tuple[list[Tensor], SequenceTable]:
    """Three sequences fed in company, chunks and single tokens mixed: all logits, and the table."""
    table = SequenceTable(PagePool(geometry, 400, dtype=torch.float32), 3)
    rows = [table.open(8) for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    results = []
    for chunk in CHUNKS:
        order = sorted(range(3), key=lambda index: chunk[index] != 1)
        batch = table.extend([Segment(rows[index], chunk[index]) for index in order])
        ids = torch.randint(3, 60, (batch.num_tokens,), generator=generator)
        everything = torch.arange(batch.num_tokens)
        results.append(decoder.forward(ids, batch.position, PagedStep(backend, table, batch), everything).clone())
    return results, table


def geometry_of(model: Any, block_size: int) -> Geometry:
    attention = model.get_decoder().layers[0].self_attn
    return Geometry(
        num_layers=model.config.num_hidden_layers,
        num_heads=model.config.num_key_value_heads,
        head_dim=attention.head_dim,
        block_size=block_size,
        kv_itemsize=4,
    )


@pytest.mark.parametrize("block_size", [1, 5, 16])
@pytest.mark.parametrize("ops", [TorchOps, NumbaOps])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_lean_step_is_the_overlay(tmp_path: Path, family: str, ops: Any, block_size: int) -> None:
    _, model = load_tiny(tmp_path, family)
    geometry = geometry_of(model, block_size)
    expected, reference = run(OverlayDecoder(model), select_backend("torch"), geometry)
    modules = read_decoder(model)
    assert modules is not None
    backend = select_backend("numba" if ops is NumbaOps else "torch")
    found, table = run(LeanDecoder(modules, ops(modules)), backend, geometry)
    for logits, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    for row in reference.open_rows:
        left, right = table.snapshot(row), reference.snapshot(row)
        assert torch.equal(left.position, right.position)
        for name in ("key", "value", "log_beta"):
            torch.testing.assert_close(getattr(left, name), getattr(right, name), atol=1e-4, rtol=1e-4)


def test_a_row_has_the_same_bits_alone_and_in_company(tmp_path: Path) -> None:
    _, model = load_tiny(tmp_path, "qwen3")
    decoder, backend, geometry = make_lean_decoder(model), select_backend("numba"), geometry_of(model, 5)
    assert decoder is not None
    ids = torch.randint(3, 60, (40,), generator=torch.Generator().manual_seed(1))

    def feed(company: int) -> Tensor:
        table = SequenceTable(PagePool(geometry, 4000, dtype=torch.float32), company + 1)
        rows = [table.open(8) for _ in range(company + 1)]
        lines = []
        for start, stop in ((0, 17), *((at, at + 1) for at in range(17, 40))):
            batch = table.extend([Segment(row, stop - start) for row in rows])
            # The one that is looked at lies in the middle of the batch.
            own = company // 2
            packed = torch.cat([ids[start:stop] if n == own else ids[start:stop].flip(0) for n in range(company + 1)])
            wanted = torch.arange(own * (stop - start), (own + 1) * (stop - start))
            lines.append(decoder.forward(packed, batch.position, PagedStep(backend, table, batch), wanted).clone())
        return torch.cat(lines)

    alone = feed(0)
    for company in (1, 4, 6, 15):
        assert torch.equal(feed(company), alone), company


def test_freed_weights_cannot_answer_wrongly(tmp_path: Path) -> None:
    _, model = load_tiny(tmp_path, "llama")
    assert make_lean_decoder(model, frees_weights=True) is not None
    with pytest.raises((RuntimeError, NotImplementedError)):
        model(torch.tensor([[3, 4]]))


def test_an_unknown_activation_is_left_to_the_overlay(tmp_path: Path) -> None:
    _, model = load_tiny(tmp_path, "llama")
    model.config.hidden_act = "gelu"
    assert make_lean_decoder(model) is None
