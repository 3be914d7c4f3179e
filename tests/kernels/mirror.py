"""A device memory and a sequence table that are fed the same tokens: what one holds, the other must."""

from __future__ import annotations

import torch
from torch import Tensor

from trimkv_core.batches import Segment
from trimkv_core.budget import Geometry
from trimkv_core.kernels.allocate import add_entries
from trimkv_core.kernels.append import append
from trimkv_core.kernels.memory import DeviceMemory
from trimkv_core.pages import PagePool
from trimkv_core.sequences import SequenceTable


class Mirror:
    """`rows` sequences of `layers` · `heads` streams, kept twice."""

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        dim: int,
        block_size: int,
        rows: int,
        device: torch.device,
        num_pages: int = 200,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(7)
        self.layers, self.heads, self.dim, self.dtype, self.device = layers, heads, dim, dtype, device
        # The pool has no 8-bit floats.
        pool_dtype = torch.float32 if dtype.itemsize == 1 else dtype
        geometry = Geometry(layers, heads, dim, block_size, kv_itemsize=pool_dtype.itemsize)
        self.table = SequenceTable(PagePool(geometry, num_pages, dtype=pool_dtype, device=device), rows)
        self.table_rows = [self.table.open(64) for _ in range(rows)]
        self.memory = DeviceMemory.empty(
            num_pages=num_pages,
            block_size=block_size,
            head_dim=dim,
            num_rows=rows,
            num_streams=geometry.streams,
            pages_per_row=num_pages,
            dtype=dtype,
            device=device,
        )

    def index(self, rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int32, device=self.device)

    def feed(self, rows: list[int], log_beta: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """One token for each row, in both; returns slots, first pages and positions of the device memory."""
        streams = self.layers * self.heads
        real = [row for row in rows if row != self.memory.null_row]
        places = [at for at, row in enumerate(rows) if row != self.memory.null_row]
        slots = torch.full((streams, len(rows)), -1, dtype=torch.int32, device=self.device)
        first_page = torch.full((len(rows), streams), -1, dtype=torch.int32, device=self.device)
        position = torch.full((len(rows),), -1, dtype=torch.int32, device=self.device)
        index = self.index(rows)
        add_entries(self.memory, index, slots=slots, first_page=first_page, position=position)
        batch = self.table.extend([Segment(self.table_rows[row], 1) for row in real])
        assert torch.equal(position[places], batch.position)
        key, value = torch.randn(2, len(rows), self.layers, self.heads, self.dim, device=self.device).to(self.dtype)
        if log_beta is None:
            # Few values: ties are the rule.
            log_beta = -torch.randint(0, 4, (len(rows), self.layers, self.heads), device=self.device) / 8
        for layer in range(self.layers):
            of_layer = slots.view(self.layers, self.heads, -1)[layer]
            one = {"key": key[:, layer], "value": value[:, layer], "log_beta": log_beta[:, layer]}
            append(self.memory, of_layer, position=position, **one)
            own = {name: tensor[places].transpose(0, 1).flatten(0, 1) for name, tensor in one.items()}
            self.table.pool.write(batch.slots[layer].flatten(), **own, position=batch.position.repeat(self.heads))
        return slots, first_page, position

    def pages_of(self, row: int) -> list[Tensor]:
        """The device memory's page numbers of every stream of a row."""
        memory = self.memory
        counts = (-(-memory.lengths[row] // memory.block_size)).tolist()
        start = int(memory.starts[row])
        return list(memory.arena[start : start + sum(counts)].long().split(counts))

    def entries_of(self, row: int) -> list[dict[str, Tensor]]:
        """What the device memory holds in every stream of a row, in order of places."""
        result = []
        for pages, length in zip(self.pages_of(row), self.memory.lengths[row].tolist(), strict=True):
            names = ("key", "value", "log_beta", "position")
            result.append({name: getattr(self.memory, name)[pages].flatten(0, 1)[:length] for name in names})
        return result

    def check(self) -> None:
        """Both hold the same entries in the same places; no page of the device memory is lost or held twice."""
        memory = self.memory
        held = [page for row in range(memory.null_row) for page in self.pages_of(row)]
        free = memory.free[: int(memory.num_free)].long()
        assert sorted(torch.cat([free, *held]).tolist()) == list(range(memory.null_page))
        assert not memory.lengths[memory.null_row].any()
        for row, table_row in enumerate(self.table_rows):
            snapshot = self.table.snapshot(table_row)
            assert memory.lengths[row].tolist() == snapshot.lengths.tolist()
            assert int(memory.seen[row]) == snapshot.seen
            for stream, entries in enumerate(self.entries_of(row)):
                start = int(snapshot.lengths[:stream].sum())
                stop = start + int(snapshot.lengths[stream])
                for name, tensor in entries.items():
                    assert torch.equal(tensor, getattr(snapshot, name)[start:stop]), (row, stream, name)
