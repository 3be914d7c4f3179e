"""What the kernels work on: pages, the stack of free ones, page lists and lengths, all in one device's memory.

Owns the names, shapes and dtypes of these tensors. Knows no kernel and imports no Triton. Nothing here looks at a
value, so nothing here waits for the device.

    arena    | row 0: stream 0's pages, stream 1's, … | slack | row 1: …      no gaps between the streams of a row
              ^ starts[0]                                      ^ starts[1]
    scratch  | the same offsets: where lists are put together before they replace what stands in the arena

Letters: P pages, B entries a page, D head dimension, L layers, H KV heads, S = L·H streams of a sequence, R rows, A
page numbers the arena has room for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class PagedEntries(Protocol):
    """The part of a memory that writing and attending need: entries, and which of them a stream holds.

    Attributes as in `DeviceMemory`; it need not have a null page or a null row.
    """

    @property
    def key(self) -> Tensor: ...
    @property
    def value(self) -> Tensor: ...
    @property
    def key_scale(self) -> Tensor | None: ...
    @property
    def value_scale(self) -> Tensor | None: ...
    @property
    def log_beta(self) -> Tensor: ...
    @property
    def position(self) -> Tensor: ...
    @property
    def arena(self) -> Tensor: ...
    @property
    def lengths(self) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """P pages and a null page, R rows and a null row.

    The null page and the null row take what the padding of a captured batch writes: page P is never in the free stack,
    row R is always empty.

    Attributes:
        key, value: [P + 1, B, D], bfloat16, float16 or float32; float8_e4m3fn with scales.
        key_scale, value_scale: float32 [P + 1, B], what a stored entry is multiplied by; None: nothing.
        log_beta: float32 [P + 1, B].
        position: int32 [P + 1, B].
        free: int32 [P], a stack of free pages.
        num_free: int32 [1], its height. Below 0: more was taken than there is, and the null page was handed out.
        arena: int32 [A], page lists.
        scratch: int32 [A].
        starts: int64 [R + 1], where each row's page list begins. Each must have room for its row's ceiling.
        lengths: int32 [R + 1, S], entries of every stream.
        seen: int32 [R + 1], tokens seen.
    """

    key: Tensor
    value: Tensor
    key_scale: Tensor | None
    value_scale: Tensor | None
    log_beta: Tensor
    position: Tensor
    free: Tensor
    num_free: Tensor
    arena: Tensor
    scratch: Tensor
    starts: Tensor
    lengths: Tensor
    seen: Tensor

    @classmethod
    def empty(
        cls,
        *,
        num_pages: int,
        block_size: int,
        head_dim: int,
        num_rows: int,
        num_streams: int,
        pages_per_row: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> DeviceMemory:
        """A memory in which nothing is held, with a page list of `pages_per_row` for each row.

        Args:
            num_pages: P, without the null page.
            block_size: B.
            head_dim: D.
            num_rows: R, without the null row.
            num_streams: S.
            pages_per_row: the most pages a row ever holds.
            dtype: of keys and values; float8_e4m3fn brings scales along.
            device: where all of it lies.
        """
        places = (num_pages + 1, block_size)
        has_scales = dtype == torch.float8_e4m3fn

        def zeros(*shape: int, of: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=of, device=device)

        return cls(
            key=zeros(*places, head_dim, of=dtype),
            value=zeros(*places, head_dim, of=dtype),
            key_scale=zeros(*places, of=torch.float32) if has_scales else None,
            value_scale=zeros(*places, of=torch.float32) if has_scales else None,
            log_beta=zeros(*places, of=torch.float32),
            position=zeros(*places, of=torch.int32),
            free=torch.arange(num_pages - 1, -1, -1, dtype=torch.int32, device=device),
            num_free=torch.full((1,), num_pages, dtype=torch.int32, device=device),
            arena=zeros(num_rows * pages_per_row, of=torch.int32),
            scratch=zeros(num_rows * pages_per_row, of=torch.int32),
            starts=torch.arange(num_rows + 1, dtype=torch.int64, device=device) * pages_per_row,
            lengths=zeros(num_rows + 1, num_streams, of=torch.int32),
            seen=zeros(num_rows + 1, of=torch.int32),
        )

    @property
    def null_page(self) -> int:
        """P."""
        return self.key.shape[0] - 1

    @property
    def block_size(self) -> int:
        """B."""
        return self.key.shape[1]

    @property
    def head_dim(self) -> int:
        """D."""
        return self.key.shape[2]

    @property
    def null_row(self) -> int:
        """R."""
        return self.lengths.shape[0] - 1

    @property
    def num_streams(self) -> int:
        """S."""
        return self.lengths.shape[1]
