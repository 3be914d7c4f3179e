"""What one forward of the trainer sees: rows of packed documents. Knows no text, no model and no loss.

Letters: R rows, T tokens a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100
"""The label of a token whose successor is not counted."""
PAD_DOCUMENT = -1
"""The document number of padding, which attends to nothing and is attended by nothing."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Rows of documents laid end to end; all fields are int64 [R, T].

    Attributes:
        input_ids: the tokens; 0 where there is padding.
        labels: the token after `input_ids` in the same document, already shifted; `IGNORED` where it is not counted.
        position_ids: of a token in its piece of a document, 0 at each beginning.
        document: running number of the document inside its row; `PAD_DOCUMENT` for padding.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    document: Tensor

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on another device."""
        return PackedBatch(
            self.input_ids.to(device), self.labels.to(device), self.position_ids.to(device), self.document.to(device)
        )


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a document lies in a batch."""

    row: int
    start: int
    stop: int


def documents_of(batch: PackedBatch) -> list[Extent]:
    """The documents of a batch, padding left out."""
    found = []
    for row, numbers in enumerate(batch.document.tolist()):
        start = 0
        for at in range(1, len(numbers) + 1):
            if at == len(numbers) or numbers[at] != numbers[start]:
                if numbers[start] >= 0:
                    found.append(Extent(row, start, at))
                start = at
    return found
