"""Time on a device, and what the device can do at best: copy bandwidth and matmul rate.

Owns the clock: CUDA events on a GPU, the process's own clock on a CPU. Knows no model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

WARM_UP = 3


class Clock:
    """Marks in the device's work and the seconds between them."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"

    def mark(self) -> Any:
        """A point in the device's work; waits for nothing on a GPU."""
        if not self._is_cuda:
            return time.perf_counter()
        make_event: Any = torch.cuda.Event
        event = make_event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Seconds between two marks; waits for the second."""
        if not self._is_cuda:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    def synchronize(self) -> None:
        """Wait until the device has done all its work."""
        if self._is_cuda:
            torch.cuda.synchronize()

    def median(self, work: Callable[[], object], *, repeats: int, warm_up: int = WARM_UP) -> float:
        """Median seconds of `work`."""
        for _ in range(warm_up):
            work()
        self.synchronize()
        marks = [self.mark()]
        for _ in range(repeats):
            work()
            marks.append(self.mark())
        return statistics.median(self.seconds(*pair) for pair in pairwise(marks))


def copy_bandwidth(device: torch.device, *, num_bytes: int, repeats: int = 20) -> float:
    """Bytes a second of a copy within the device's memory, bytes read and bytes written both counted."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).random_(0, 256)
    target = torch.empty_like(source)
    return 2 * num_bytes / Clock(device).median(lambda: target.copy_(source), repeats=repeats)


def matmul_rate(device: torch.device, *, size: int, dtype: torch.dtype, repeats: int = 20) -> float:
    """Operations a second of a square matrix product of random numbers: zeros would run faster."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / Clock(device).median(lambda: torch.mm(left, right, out=out), repeats=repeats)
