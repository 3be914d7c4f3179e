"""A step's matrix products in torch alone and nothing else: what the engine's step is held against. Run as a child
process.

Owns the weights (random, in the shapes of the model, every layer its own, so that none is found in a cache) and the
clock. Reads a job from a JSON file, writes milliseconds to another. Knows torch alone: no model, no service.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# A decode step is short and is measured more often than a chunk.
DECODE_RUNS, CHUNK_RUNS = 25, 7
WARM_UP_RUNS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to multiply.

    Attributes:
        dtype: of weights and rows.
        threads: of torch.
        layers: how often the layer's products repeat.
        layer: [outputs, inputs] of a layer's products, in order: fused QKV, O, fused gate and up, down.
        head: [vocabulary, hidden size].
        decode_rows: rows of the decode steps; all of them go through the head.
        chunk_rows: rows of the prefill chunk; one of them goes through the head.
    """

    dtype: str
    threads: int
    layers: int
    layer: list[list[int]]
    head: list[int]
    decode_rows: list[int]
    chunk_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Median milliseconds of all products: of the decode steps, in the order of the job's rows, and of the chunk."""

    decode_ms: list[float]
    chunk_ms: float


class _Products:
    """One step's products, of as many rows as asked for."""

    def __init__(self, job: Job) -> None:
        dtype = getattr(torch, job.dtype)
        self._dtype = dtype
        self._layers = [[torch.randn(shape).to(dtype) for shape in job.layer] for _ in range(job.layers)]
        self._head = torch.randn(job.head).to(dtype)

    def milliseconds(self, *, rows: int, head_rows: int, runs: int) -> float:
        widths = {weight.shape[1] for weight in self._layers[0]}
        inputs = {width: torch.randn(rows, width).to(self._dtype) for width in widths}
        last = torch.randn(head_rows, self._head.shape[1]).to(self._dtype)
        for _ in range(WARM_UP_RUNS):
            self._multiply(inputs, last)
        return 1e3 * statistics.median(self._seconds(inputs, last) for _ in range(runs))

    def _seconds(self, inputs: dict[int, Tensor], last: Tensor) -> float:
        start = time.perf_counter()
        self._multiply(inputs, last)
        return time.perf_counter() - start

    def _multiply(self, inputs: dict[int, Tensor], last: Tensor) -> None:
        for layer in self._layers:
            for weight in layer:
                F.linear(inputs[weight.shape[1]], weight)
        F.linear(last, self._head)


@torch.inference_mode()
def run(job: Job) -> Result:
    """Multiply and take the time."""
    torch.set_num_threads(job.threads)
    products = _Products(job)
    return Result(
        decode_ms=[products.milliseconds(rows=rows, head_rows=rows, runs=DECODE_RUNS) for rows in job.decode_rows],
        chunk_ms=products.milliseconds(rows=job.chunk_rows, head_rows=1, runs=CHUNK_RUNS),
    )


def main(arguments: Sequence[str]) -> None:
    """`bare_matmuls.py JOB.json RESULT.json`."""
    job_path, result_path = map(Path, arguments)
    job = Job(**json.loads(job_path.read_text(encoding="utf-8")))
    result_path.write_text(json.dumps(asdict(run(job))), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
