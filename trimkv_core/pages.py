"""The page pool: storage for entries, and which pages are free.

Owns the key, value, log β and position storage and the stack of free pages. Knows no sequences: who holds a page is the
sequence table's business.

Letters: P pages, B entries a page, D head dimension, E entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimkv_core.budget import Geometry
from trimkv_core.fp8 import FP8, as_rows, quantise


class PoolExhausted(RuntimeError):
    """More pages were asked for than are free."""


class InvariantError(RuntimeError):
    """Pages or lengths no longer add up; the message says which sum failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEntries:
    """Entries as they lie in a pool: storing what was loaded changes no bit.

    Attributes:
        key, value: [E, D], the pool's dtype.
        key_scale, value_scale: float32 [E]; None where the pool has none.
        log_beta: float32 [E].
        position: int32 [E].
    """

    key: Tensor
    value: Tensor
    key_scale: Tensor | None
    value_scale: Tensor | None
    log_beta: Tensor
    position: Tensor


class PagePool:
    """P pages of B entries, and one more, the null page, which nobody holds: what a padded batch writes goes there.

    Attributes:
        dtype: of keys and values: the model's, or float8_e4m3fn.
        key, value: [P + 1, B, D].
        key_scale, value_scale: float32 [P + 1, B], what a stored 8-bit entry is multiplied by; None for other types.
        log_beta: float32 [P + 1, B].
        position: int32 [P + 1, B].
        free: int32 [P], a stack of free pages.
        free_count: int32 [1], its height, on the device: kernels take pages without the host.
    """

    # The storage outlives the mode it was made in: a prefill under `inference_mode`, then `generate` without.
    @torch.inference_mode(False)
    def __init__(
        self, geometry: Geometry, num_pages: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages={num_pages} is not possible: a pool has at least 1 page")
        self.geometry = geometry
        self.device = torch.device(device)
        self.dtype = dtype
        block, dim = geometry.block_size, geometry.head_dim
        self.key = torch.zeros(num_pages + 1, block, dim, dtype=dtype, device=device)
        self.value = torch.zeros(num_pages + 1, block, dim, dtype=dtype, device=device)
        self.key_scale, self.value_scale = (
            torch.zeros(num_pages + 1, block, dtype=torch.float32, device=device) if dtype == FP8 else None
            for _ in range(2)
        )
        self.log_beta = torch.zeros(num_pages + 1, block, dtype=torch.float32, device=device)
        self.position = torch.zeros(num_pages + 1, block, dtype=torch.int32, device=device)
        # The lowest page lies on top, so that a fresh pool hands out neighbours.
        self.free = torch.arange(num_pages - 1, -1, -1, dtype=torch.int32, device=device)
        self.free_count = torch.full((1,), num_pages, dtype=torch.int32, device=device)
        self._num_free: int | None = num_pages

    @property
    def num_pages(self) -> int:
        """P."""
        return self.free.numel()

    @property
    def num_free(self) -> int:
        """Pages nobody holds; waits for the device if kernels have taken or given since it was last asked."""
        if self._num_free is None:
            self._num_free = int(self.free_count.item())
        return self._num_free

    @property
    def num_used(self) -> int:
        """Pages somebody holds."""
        return self.num_pages - self.num_free

    def note_device_change(self) -> None:
        """Kernels take pages or give them back: only the device knows how many are free."""
        self._num_free = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the storage and the free stack."""
        return sum(tensor.nbytes for tensor in (*self._storages().values(), self.free))

    def _storages(self) -> dict[str, Tensor]:
        """What holds a number or more for each entry, by the attribute's name."""
        names = ("key", "value", "key_scale", "value_scale", "log_beta", "position")
        return {name: storage for name in names if (storage := getattr(self, name)) is not None}

    def allocate(self, count: int) -> Tensor:
        """Take `count` free pages: int32 [count].

        Raises:
            PoolExhausted: fewer are free. None is taken then.
        """
        top = self.num_free
        if count > top:
            raise PoolExhausted(f"{count} pages are needed and {top} of {self.num_pages} are free")
        self._set_num_free(top - count)
        return self.free[top - count : top].clone()

    def release(self, pages: Tensor) -> None:
        """Give pages back. Which they are is the caller's word: int32 [count], each held until now."""
        top = self.num_free
        self.free[top : top + pages.numel()] = pages
        self._set_num_free(top + pages.numel())

    def _set_num_free(self, count: int) -> None:
        self._num_free = count
        self.free_count.fill_(count)

    def scrub(self, pages: Tensor) -> None:
        """Zero the keys and values of pages, and their scales: int32 [count]."""
        for storage in (self.key, self.value, self.key_scale, self.value_scale):
            if storage is not None:
                storage[pages.long()] = 0

    def reset(self) -> None:
        """Make every page free and zero, in place."""
        for storage in self._storages().values():
            storage.zero_()
        self._set_num_free(self.num_pages)
        self.free.copy_(torch.arange(self.num_pages - 1, -1, -1, dtype=torch.int32, device=self.device))

    @torch.inference_mode(False)
    def grow(self, num_pages: int) -> None:
        """Enlarge the pool to `num_pages`; pages keep their numbers and contents."""
        old, extra, num_free = self.num_pages, num_pages - self.num_pages, self.num_free
        if extra <= 0:
            return
        for name, storage in self._storages().items():
            setattr(self, name, torch.cat([storage, storage.new_zeros(extra, *storage.shape[1:])]))
        fresh = torch.arange(num_pages - 1, old - 1, -1, dtype=torch.int32, device=self.device)
        self.free = torch.cat([self.free[:num_free], fresh, self.free[num_free:]])
        self._set_num_free(num_free + extra)

    @torch.no_grad()
    def write(self, slots: Tensor, key: Tensor, value: Tensor, log_beta: Tensor | None, position: Tensor) -> None:
        """Write entries, rounding keys and values where the pool holds 8-bit floats.

        Args:
            slots: int64 [E], page · B + place in the page.
            key, value: [E, D], the pool's dtype or, for 8-bit floats, any.
            log_beta: float32 [E]; None where no gate scores the entries.
            position: int32 [E].
        """
        for storage, scales, states in ((self.key, self.key_scale, key), (self.value, self.value_scale, value)):
            if scales is None:
                as_rows(storage).index_copy_(0, slots, states)
            else:
                stored, scale = quantise(states)
                as_rows(storage).index_copy_(0, slots, stored.view(torch.uint8))
                as_rows(scales).index_copy_(0, slots, scale)
        if log_beta is not None:
            self.log_beta.view(-1).index_copy_(0, slots, log_beta)
        self.position.view(-1).index_copy_(0, slots, position)

    @torch.no_grad()
    def load(self, slots: Tensor) -> StoredEntries:
        """Copy entries out: int64 [E]."""
        rows = {name: as_rows(storage).index_select(0, slots) for name, storage in self._storages().items()}
        return StoredEntries(
            key=rows["key"].view(self.dtype),
            value=rows["value"].view(self.dtype),
            key_scale=rows.get("key_scale"),
            value_scale=rows.get("value_scale"),
            log_beta=rows["log_beta"],
            position=rows["position"],
        )

    @torch.no_grad()
    def store(self, slots: Tensor, entries: StoredEntries) -> None:
        """Put back what `load` of a pool of the same dtype has copied: int64 [E]."""
        for name, storage in self._storages().items():
            rows = as_rows(storage)
            rows.index_copy_(0, slots, getattr(entries, name).view(rows.dtype))

    def write_layer(self, slots: Tensor, key: Tensor, value: Tensor, log_beta: Tensor | None, position: Tensor) -> None:
        """Write what a layer computes for T tokens.

        Args:
            slots: int64 [H·T], head after head.
            key, value: [T, H, D].
            log_beta: float32 [T, H]; None where no gate scores the entries.
            position: int32 [H·T].
        """
        keys, values = (states.transpose(0, 1).flatten(0, 1) for states in (key, value))
        self.write(slots, keys, values, None if log_beta is None else log_beta.t().flatten(), position)

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy entries from slots to other slots: int64 [E] each; no slot is in both."""
        for storage in self._storages().values():
            rows = as_rows(storage)
            rows.index_copy_(0, target, rows.index_select(0, source))

    def check_invariants(self, held: Tensor) -> None:
        """Check that the free stack and the pages `held` (int [count]) together are every page once.

        Raises:
            InvariantError: a page is lost, shared or held while free.
        """
        free = self.free[: self.num_free].long()
        count = torch.bincount(torch.cat([free, held.long()]), minlength=self.num_pages)
        lost, shared = int((count == 0).sum()), int((count > 1).sum())
        if lost or shared or free.numel() + held.numel() != self.num_pages:
            raise InvariantError(
                f"{self.num_pages} pages: {free.numel()} free + {held.numel()} held, {lost} lost, {shared} held twice"
            )
