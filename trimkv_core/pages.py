"""The page pool: storage for entries, and which pages are free.

Owns the key, value, log β and position storage and the stack of free pages. Knows no sequences: who holds a page is the
sequence table's business.

Letters: P pages, B entries a page, D head dimension, E entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimkv_core.budget import Geometry


class PoolExhausted(RuntimeError):
    """More pages were asked for than are free."""


class InvariantError(RuntimeError):
    """Pages or lengths no longer add up; the message says which sum failed."""


class PagePool:
    """P pages of B entries.

    Attributes:
        key, value: [P, B, D], the model's dtype.
        log_beta: float32 [P, B].
        position: int32 [P, B].
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
        self.key = torch.zeros(num_pages, block, dim, dtype=dtype, device=device)
        self.value = torch.zeros(num_pages, block, dim, dtype=dtype, device=device)
        self.log_beta = torch.zeros(num_pages, block, dtype=torch.float32, device=device)
        self.position = torch.zeros(num_pages, block, dtype=torch.int32, device=device)
        # The lowest page lies on top, so that a fresh pool hands out neighbours.
        self._free = torch.arange(num_pages - 1, -1, -1, dtype=torch.int32, device=device)
        self._num_free = num_pages

    @property
    def num_pages(self) -> int:
        """P."""
        return self.key.shape[0]

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""
        return self._num_free

    @property
    def num_used(self) -> int:
        """Pages somebody holds."""
        return self.num_pages - self._num_free

    @property
    def num_bytes(self) -> int:
        """Bytes of the storage and the free stack."""
        tensors = (self.key, self.value, self.log_beta, self.position, self._free)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def allocate(self, count: int) -> Tensor:
        """Take `count` free pages: int32 [count].

        Raises:
            PoolExhausted: fewer are free. None is taken then.
        """
        if count > self._num_free:
            raise PoolExhausted(f"{count} pages are needed and {self._num_free} of {self.num_pages} are free")
        top = self._num_free
        self._num_free -= count
        return self._free[top - count : top].clone()

    def release(self, pages: Tensor) -> None:
        """Give pages back. Which they are is the caller's word: int32 [count], each held until now."""
        top = self._num_free
        self._free[top : top + pages.numel()] = pages
        self._num_free += pages.numel()

    def scrub(self, pages: Tensor) -> None:
        """Zero the keys and values of pages: int32 [count]."""
        self.key[pages.long()] = 0
        self.value[pages.long()] = 0

    def reset(self) -> None:
        """Make every page free and zero, in place."""
        for storage in (self.key, self.value, self.log_beta, self.position):
            storage.zero_()
        self._num_free = self.num_pages
        self._free.copy_(torch.arange(self.num_pages - 1, -1, -1, dtype=torch.int32, device=self.device))

    @torch.inference_mode(False)
    def grow(self, num_pages: int) -> None:
        """Enlarge the pool to `num_pages`; pages keep their numbers and contents."""
        old, extra = self.num_pages, num_pages - self.num_pages
        if extra <= 0:
            return
        for name in ("key", "value", "log_beta", "position"):
            storage: Tensor = getattr(self, name)
            setattr(self, name, torch.cat([storage, storage.new_zeros(extra, *storage.shape[1:])]))
        fresh = torch.arange(num_pages - 1, old - 1, -1, dtype=torch.int32, device=self.device)
        self._free = torch.cat([self._free[: self._num_free], fresh, self._free[self._num_free :]])
        self._num_free += extra

    @torch.no_grad()
    def write(self, slots: Tensor, key: Tensor, value: Tensor, log_beta: Tensor | None, position: Tensor) -> None:
        """Write entries.

        Args:
            slots: int64 [E], page · B + place in the page.
            key, value: [E, D].
            log_beta: float32 [E]; None where no gate scores the entries.
            position: int32 [E].
        """
        self.key.view(-1, self.key.shape[-1]).index_copy_(0, slots, key)
        self.value.view(-1, self.value.shape[-1]).index_copy_(0, slots, value)
        if log_beta is not None:
            self.log_beta.view(-1).index_copy_(0, slots, log_beta)
        self.position.view(-1).index_copy_(0, slots, position)

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy entries from slots to other slots: int64 [E] each; no slot is in both."""
        for storage in (self.key, self.value, self.log_beta, self.position):
            rows = storage.view(storage.shape[0] * storage.shape[1], *storage.shape[2:])
            rows.index_copy_(0, target, rows.index_select(0, source))

    def check_invariants(self, held: Tensor) -> None:
        """Check that the free stack and the pages `held` (int [count]) together are every page once.

        Raises:
            InvariantError: a page is lost, shared or held while free.
        """
        free = self._free[: self._num_free].long()
        count = torch.bincount(torch.cat([free, held.long()]), minlength=self.num_pages)
        lost, shared = int((count == 0).sum()), int((count > 1).sum())
        if lost or shared or free.numel() + held.numel() != self.num_pages:
            raise InvariantError(
                f"{self.num_pages} pages: {free.numel()} free + {held.numel()} held, {lost} lost, {shared} held twice"
            )
