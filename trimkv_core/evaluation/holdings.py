"""Which stream held which token of a text until when, under a budget with true eviction.

Knows nothing of how that is shown.

Letters: L layers, H KV heads, N = L·H streams, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from trimkv_core.batches import Segment
from trimkv_core.evaluation.feeding import Regime
from trimkv_core.evaluation.gated import PagedMemory
from trimkv_core.evaluation.loading import LoadedModel
from trimkv_core.evaluation.perplexity import TextError

HELD = 255
MAX_POINTS = HELD


@dataclass(frozen=True, slots=True)
class Holdings:
    """The history of a text's entries.

    Attributes:
        gone: uint8 [L, H, T], the number of the eviction point at which the entry went; 255: held at the end.
        points: tokens seen at each eviction point.
    """

    gone: NDArray[np.uint8]
    points: tuple[int, ...]

    def held_at(self, point: int) -> NDArray[np.bool_]:
        """Which entries are held after an eviction point, bool [L, H, T]."""
        is_fed = np.arange(self.gone.shape[2]) < self.points[point]
        held: NDArray[np.bool_] = is_fed & (self.gone > point)
        return held


@torch.inference_mode()
def record(memory: PagedMemory, ids: Sequence[int], model: LoadedModel, regime: Regime) -> Holdings:
    """Read a text and note after every chunk what is still held.

    Raises:
        TextError: the text has more than 255 chunks.
    """
    points = [*range(regime.chunk, len(ids), regime.chunk), len(ids)]
    if len(points) > MAX_POINTS:
        raise TextError(
            f"{len(ids)} tokens are {len(points)} chunks, a picture holds {MAX_POINTS}: "
            "lower --picture-tokens or raise --chunk"
        )
    geometry = memory.table.geometry
    gone = np.full((geometry.streams, len(ids)), HELD, np.uint8)
    nothing = torch.zeros(0, dtype=torch.int64, device=model.device)
    row, fed = memory.open(len(ids)), 0
    for number, stop in enumerate(points):
        step = memory.extend([Segment(row, stop - fed)])
        model.decoder.forward(torch.tensor(ids[fed:stop], device=model.device), step.position, step.layers, nothing)
        memory.settle([row])
        fed = stop
        snapshot = memory.table.snapshot(row)
        lengths = snapshot.lengths.cpu().numpy()
        held = np.zeros(gone.shape, bool)
        held[np.repeat(np.arange(lengths.size), lengths), snapshot.position.cpu().numpy()] = True
        gone[:, :fed][(gone[:, :fed] == HELD) & ~held[:, :fed]] = number
    memory.close(row)
    return Holdings(gone.reshape(geometry.num_layers, geometry.num_heads, -1), tuple(points))
