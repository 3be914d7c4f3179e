"""The seam between the model and whatever reads and writes the pages.

A backend plans a step once, before the first layer, and then serves every layer from that plan. Knows no model and no
scheduler.

Letters: S segments, L layers, H KV heads, G query heads a KV head, T tokens of the packed batch, D head dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from trimkv_core.batches import StepBatch
from trimkv_core.sequences import SequenceTable

Plan = TypeVar("Plan")


class AttentionBackend(ABC, Generic[Plan]):
    """One way to attend over pages.

    Attributes:
        name: what `--backend` and the start-up lines call it.
    """

    name: str

    @abstractmethod
    def plan(self, table: SequenceTable, batch: StepBatch) -> Plan:
        """Everything the layers share. May synchronise with the host; `append` and `attend` may not."""

    @abstractmethod
    def append(self, plan: Plan, layer: int, key: Tensor, value: Tensor, log_beta: Tensor | None) -> None:
        """Write the batch's entries of one layer into their slots.

        Args:
            plan: of this step.
            layer: which layer.
            key, value: [T, H, D], keys after RoPE.
            log_beta: float32 [T, H]; None without gates.
        """

    @abstractmethod
    def attend(
        self, plan: Plan, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        """Attention of the batch's tokens over what their sequences hold and, causally, over each other in a segment.

        Called after `append` of the same layer.

        Args:
            plan: of this step.
            layer: which layer.
            query: [T, H·G, D].
            key, value: [T, H, D], what `append` wrote.
            scale: of the logits.
            window: the base model's own sliding window: only positions above t - window are seen; None: all.

        Returns:
            [T, H·G, D], the query's dtype.
        """


class LayerStep(Protocol):
    """What a decoder's layers are handed: one step's way to the pages."""

    def layer(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        log_beta: Tensor | None,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Write one layer's entries, then attend; shapes as in `AttentionBackend`."""


class PagedStep(Generic[Plan]):
    """A backend and its plan for one step: what the model's layers are handed."""

    def __init__(self, backend: AttentionBackend[Plan], table: SequenceTable, batch: StepBatch) -> None:
        self.batch = batch
        self._backend = backend
        self._plan = backend.plan(table, batch)

    def layer(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        log_beta: Tensor | None,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Write one layer's entries, then attend; shapes as in `AttentionBackend`."""
        self._backend.append(self._plan, layer, key, value, log_beta)
        return self._backend.attend(self._plan, layer, query, key, value, scale=scale, window=window)
