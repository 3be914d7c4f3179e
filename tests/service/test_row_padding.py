from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from service.engine.row_padding import find_stable_rows


def test_from_the_number_found_a_row_is_the_same_in_any_company() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(96, 64), torch.randn(64, 96), torch.randn(300, 64)]
    rows = find_stable_rows(weights)
    assert rows is not None
    inputs = torch.randn(200, 64)
    for count in (rows, rows + 1, rows + 6, 48, 133):
        if count >= rows:
            assert torch.equal(F.linear(inputs[:count], weights[0]), F.linear(inputs, weights[0])[:count])


def test_kernels_that_never_agree_are_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = itertools.count()

    def restless(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return inputs @ weight.t() + next(noise)

    monkeypatch.setattr("service.engine.row_padding.F.linear", restless)
    assert find_stable_rows([torch.randn(8, 8)]) is None
