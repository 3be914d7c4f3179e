"""How trimkv 0.1.5's local cache was run for the fixtures, so that its numbers can be checked.

The fixtures' `local` cases went through PyTorch's SDPA with `is_causal=True` (flash-attn was not at hand), whose causal
mask starts at the top left: a lone query then sees one key, the oldest its stream holds. With flash-attn, as the
package is meant to run, a lone query sees everything; so does ours. This backend sees what the fixtures saw.
"""

from __future__ import annotations

import dataclasses

import torch

from trimkv_core.attention.torch import TorchBackend, TorchPlan
from trimkv_core.batches import StepBatch
from trimkv_core.sequences import SequenceTable


class TopLeftBackend(TorchBackend):
    """Decodes one sequence, each query seeing the oldest entry only."""

    name = "top-left"

    def plan(self, table: SequenceTable, batch: StepBatch) -> TorchPlan:
        plan = super().plan(table, batch)
        if plan.tiles is None:
            return plan
        block, lengths = table.geometry.block_size, batch.lengths_after[0].flatten()
        pages = -(-lengths // block)
        stream = torch.repeat_interleave(torch.arange(lengths.numel()), pages)
        local = torch.arange(stream.numel()) - (pages.cumsum(0) - pages)[stream]
        place = local[:, None] * block + torch.arange(block)
        # The newest entry is not written yet; where it is alone, it is the oldest too.
        position = table.pool.position[plan.tiles.page].clone()
        position[place == (lengths - 1)[stream][:, None]] = int(batch.position[0])
        position[place >= lengths[stream][:, None]] = torch.iinfo(torch.int32).max
        oldest = torch.full_like(lengths, torch.iinfo(torch.int32).max).int()
        oldest.scatter_reduce_(0, stream, position.amin(1), "amin")
        bias = plan.tiles.bias.masked_fill((position != oldest[stream][:, None])[:, None], float("-inf"))
        return dataclasses.replace(plan, tiles=dataclasses.replace(plan.tiles, bias=bias))
