"""How many rows a matrix product needs so that a row's result does not depend on how many others there are.

BLAS libraries pick other kernels for a few rows, and those round differently: the same sequence would then get other
last digits alone than in company, and sooner or later another token. From some number of rows on the kernels agree to
the last bit (8 with MKL on AVX2). This module finds that number by trying, on the weights that will be used.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)

CANDIDATES = (1, 2, 4, 8, 16, 32, 64)
# Row counts that the kernels may treat differently: odd ones, multiples of a vector, and just beside them.
_OFFSETS = (0, 1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 64)
_REFERENCE_ROWS = 160


@torch.inference_mode()
def find_stable_rows(weights: Iterable[Tensor]) -> int | None:
    """The smallest candidate from which on every number of rows gives each row the same bits.

    Args:
        weights: [out, in] each, float32 on a CPU; one of every shape is enough.

    Returns:
        A number of rows, None if the kernels agree for no candidate.
    """
    shapes = {tuple(weight.shape): weight for weight in weights}
    for rows in CANDIDATES:
        if all(_is_stable_from(rows, weight) for weight in shapes.values()):
            return rows
    return None


def _is_stable_from(rows: int, weight: Tensor) -> bool:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(_REFERENCE_ROWS, weight.shape[1], generator=generator)
    # A slice of a wide layer goes through the same kernels as all of it.
    part = weight[:2048]
    reference = F.linear(inputs, part)
    counts = [rows + offset for offset in _OFFSETS if rows + offset < _REFERENCE_ROWS]
    return all(torch.equal(F.linear(inputs[:count], part), reference[:count]) for count in counts)


def choose_min_rows(model: Any) -> int:
    """Rows a forward is padded to: in float32 on a CPU, where answers are promised to be the same alone and in
    company."""
    if model.dtype != torch.float32 or model.device.type != "cpu":
        return 1
    rows = find_stable_rows(module.weight for module in model.modules() if isinstance(module, nn.Linear))
    if rows is None:
        logger.warning("this CPU's matrix products depend on the batch: answers may differ in company by a rounding")
    return rows or CANDIDATES[0]
