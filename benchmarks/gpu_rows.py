"""The rows of the goals: decode against the byte limit, length, eviction, memory, prefill against the matmul rate.

Owns what each of them runs and divides by what. Knows no other system and no kernel by itself.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch
from gpu_driver import DecodeRun, Driver, Stream
from gpu_model import build_model, gate_shape, model_config
from gpu_report import Goal, Job, Measured, NotRun, TimeBudget
from gpu_sizes import Sizes
from gpu_timing import Clock, copy_bandwidth, matmul_rate

from trimkv_core.budget import Budget
from trimkv_core.byte_ledger import (
    WORD,
    ModelWeights,
    decode_bytes,
    held_at_most,
    prefill_flops,
    reservation,
    tokens_per_second_limit,
    weigh_config,
)


class Bench:
    """What rows share: ceilings, the model and its driver, each made when a row first needs it.

    Attributes:
        runs: decode runs of finished rows, by row.
    """

    def __init__(
        self, sizes: Sizes, *, device: torch.device, dtype: torch.dtype, time: TimeBudget, backend: str
    ) -> None:
        self.sizes = sizes
        self.device = device
        self.dtype = dtype
        self.time = time
        self.runs: dict[str, list[DecodeRun]] = {}
        self._backend = backend
        self._driver: Driver | None = None

    @cached_property
    def bandwidth(self) -> float:
        """Bytes a second of a large copy."""
        return copy_bandwidth(self.device, num_bytes=self.sizes.copy_bytes)

    @cached_property
    def flops(self) -> float:
        """Operations a second of a large matrix product."""
        return matmul_rate(self.device, size=self.sizes.matmul_size, dtype=self.dtype)

    @cached_property
    def config(self) -> Any:
        """The model's config."""
        return model_config(self.sizes)

    @cached_property
    def weights(self) -> ModelWeights:
        """What the model weighs, gates included."""
        return weigh_config(self.config, dtype=self.dtype, gates=gate_shape(self.sizes))

    @property
    def driver(self) -> Driver:
        """Sequences over the model."""
        if self._driver is None:
            sizes, goals = self.sizes, self.budget(self.sizes.memory_size)
            self._driver = Driver(
                build_model(sizes, device=self.device, dtype=self.dtype),
                cases=[
                    (max(sizes.batches), goals),
                    (2 * sizes.long_batch, goals),
                    (sizes.paper_batch, self.budget(sizes.paper_memory_size)),
                ],
                batches=(1, *sizes.batches, sizes.long_batch, sizes.paper_batch),
                lane_tokens=max(sizes.lane_tokens, *sizes.prefill_chunks),
                backend=self._backend,
            )
        return self._driver

    def budget(self, memory_size: int, *, prefill_chunk: int | None = None) -> Budget:
        """A budget with the sizes' buffer."""
        chunk = self.sizes.prefill_chunks[0] if prefill_chunk is None else prefill_chunk
        return Budget(memory_size=memory_size, buffer_size=self.sizes.buffer_size, prefill_chunk=chunk)

    def let_go(self) -> None:
        """Free the model and the pool: other systems need the memory."""
        self._driver = None
        clean_up()


def clean_up() -> None:
    """Give the device what nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def goal_jobs(bench: Bench) -> list[Job]:
    """The rows of the goals, in the order in which they are stated."""
    sizes, factor = bench.sizes, bench.sizes.seconds_factor
    first, *others = sizes.batches
    cases = [(first, sizes.memory_size, 0.60), (sizes.paper_batch, sizes.paper_memory_size, 0.65)]
    cases += [(batch, sizes.memory_size, 0.50) for batch in others]
    jobs = [
        Job("copy bandwidth", None, 2 * factor, lambda: _ceiling(bench.bandwidth, 1e12, "TB/s")),
        Job("matmul rate", None, 2 * factor, lambda: _ceiling(bench.flops, 1e12, "TFLOP/s")),
    ]
    for batch, memory, bound in cases:
        name = f"decode, batch {batch}, M = {memory}"
        seconds = (10 + batch / 8) * factor
        jobs.append(Job(name, Goal(bound), seconds, partial(_decode, bench, name=name, batch=batch, memory=memory)))
    lengths = f"{sizes.long_tokens:,} logical tokens ÷ at {sizes.short_tokens:,}"
    length = f"decode step at {lengths}, batch {sizes.long_batch}"
    jobs += [
        Job(length, Goal(1.05, is_ceiling=True), 15 * factor, partial(_length, bench)),
        Job("eviction, share of decode time", Goal(0.03, is_ceiling=True), 0, partial(_eviction, bench)),
        Job(
            f"memory reserved for a sequence ÷ its entries, M = {sizes.memory_size}",
            Goal(1.06, is_ceiling=True),
            5 * factor,
            partial(_reserved, bench),
        ),
    ]
    jobs += [
        Job(
            f"prefill, {sizes.prefill_tokens:,} tokens, chunks of {chunk}",
            Goal(0.45),
            10 * factor,
            partial(_prefill, bench, chunk=chunk),
        )
        for chunk in sizes.prefill_chunks
    ]
    return jobs


def _ceiling(rate: float, unit_size: float, unit: str) -> Measured:
    return Measured(value=rate / unit_size, unit=unit, note="measured here; what the limits below are made of")


# ---- decode ------------------------------------------------------------------------------------------------------


def _decode(bench: Bench, *, name: str, batch: int, memory: int) -> Measured:
    sizes, driver = bench.sizes, bench.driver
    budget = bench.budget(memory)
    streams = driver.start(batch, budget, tokens=sizes.prompt_factor * memory, distinct=sizes.distinct)
    try:
        runs = _rounds(bench, driver, streams)
        unequal = _inequality(driver, streams)
    finally:
        driver.stop(streams)
    bench.runs[name] = runs
    seconds, held = statistics.median(_per_step(run) for run in runs), statistics.fmean(run.held for run in runs)
    step = decode_bytes(bench.weights, driver.geometry, budget, sequences=batch, held=held)
    rate, limit = batch / seconds, tokens_per_second_limit(step, bench.bandwidth)
    copies = f"; {sizes.distinct} sequences and copies of them" if batch > sizes.distinct else ""
    return Measured(
        value=rate,
        unit="tokens/s",
        limit=limit,
        share=rate / limit,
        note=f"{seconds * 1e3:.3g} ms a step, evictions included; a step without {_step_ms(runs):.3g} ms; "
        f"{step.total / 1e9:.3g} GB a step, {held:.0f} entries a stream, the longest {unequal:.1f} × that; "
        f"{driver.how}{copies}",
    )


def _rounds(bench: Bench, driver: Driver, streams: Sequence[Stream]) -> list[DecodeRun]:
    """Rounds of two buffers each, so that each holds as many evictions as steps deserve; one more first to warm up."""
    steps = 2 * bench.sizes.buffer_size
    warm_up = driver.decode(streams, steps)
    runs: list[DecodeRun] = []
    for _ in range(bench.sizes.rounds):
        if not runs or bench.time.left > 2 * warm_up.seconds:
            runs.append(driver.decode(streams, steps))
    return runs


def _per_step(run: DecodeRun) -> float:
    return run.seconds / len(run.step_seconds)


def _step_ms(runs: Sequence[DecodeRun]) -> float:
    return 1e3 * statistics.median(seconds for run in runs for seconds in run.step_seconds)


def _inequality(driver: Driver, streams: Sequence[Stream]) -> float:
    """The longest stream over the mean one."""
    lengths = torch.stack([driver.table.lengths_of(stream.row) for stream in streams]).float()
    return float(lengths.max() / lengths.mean())


def _length(bench: Bench) -> Measured:
    """Both kinds in turn, so that a drifting clock meets both."""
    sizes, driver = bench.sizes, bench.driver
    budget = bench.budget(sizes.memory_size)
    short = driver.start(sizes.long_batch, budget, tokens=sizes.short_tokens, distinct=sizes.distinct)
    long = driver.age(short, sizes.long_tokens)
    try:
        pairs = [(_rounds(bench, driver, short), _rounds(bench, driver, long)) for _ in range(2)]
    finally:
        driver.stop([*short, *long])
    near, far = (statistics.median(_per_step(run) for pair in pairs for run in pair[which]) for which in (0, 1))
    return Measured(
        value=far / near,
        unit="",
        share=far / near,
        note=f"{far * 1e3:.3g} and {near * 1e3:.3g} ms a step; both were fed {sizes.short_tokens:,} tokens, then every "
        "position of the long ones was moved up: the state of a long sequence, without computing it",
    )


def _eviction(bench: Bench) -> Measured:
    shares = {
        name: sum(run.evict_seconds for run in runs) / sum(run.seconds for run in runs)
        for name, runs in bench.runs.items()
        if sum(run.evictions for run in runs)
    }
    if not shares:
        raise NotRun("no decode row was measured")
    worst = max(shares.values())
    listed = ", ".join(f"{name.removeprefix('decode, ')}: {share:.1%}" for name, share in shares.items())
    return Measured(value=worst, unit="", share=worst, note=f"the worst of {listed}")


# ---- memory and prefill ------------------------------------------------------------------------------------------


def _reserved(bench: Bench) -> Measured:
    """The reservation, with what a page of the pool really takes, and whether a sequence stays within it."""
    sizes, driver = bench.sizes, bench.driver
    budget = bench.budget(sizes.memory_size)
    tokens = sizes.long_tokens
    reserved = reservation(driver.geometry, budget, total_tokens=tokens)
    streams = driver.start(1, budget, tokens=sizes.prompt_factor * sizes.memory_size)
    try:
        most = 0
        for _ in range(2 * sizes.buffer_size):
            driver.decode(streams, 1)
            most = max(most, driver.table.pages(streams[0].row))
    finally:
        driver.stop(streams)
    if most > reserved.pages:
        raise RuntimeError(f"a sequence held {most} pages, {reserved.pages} are reserved")
    pool = driver.table.pool
    # The free stack, a word a page, is in both.
    taken = reserved.pages * (pool.num_bytes / pool.num_pages - WORD) + reserved.table_bytes
    ratio = taken / reserved.entry_bytes
    return Measured(
        value=ratio,
        unit="",
        share=ratio,
        note=f"{taken / 1e6:.4g} MB for {reserved.entry_bytes / 1e6:.4g} MB of entries at M + buffer, up to {tokens:,} "
        f"tokens; a pool page measured {pool.num_bytes / pool.num_pages:,.0f} bytes; at most {most:,} of "
        f"{reserved.pages:,} pages were held",
    )


def _prefill(bench: Bench, *, chunk: int) -> Measured:
    sizes, driver = bench.sizes, bench.driver
    budget = bench.budget(sizes.memory_size, prefill_chunk=chunk)
    driver.stop(driver.start(1, budget, tokens=2 * chunk))
    clock = Clock(bench.device)
    clock.synchronize()
    begin = clock.mark()
    streams = driver.start(1, budget, tokens=sizes.prefill_tokens)
    end = clock.mark()
    seconds = clock.seconds(begin, end)
    driver.stop(streams)
    work = prefill_flops(bench.weights, budget, prompt_tokens=sizes.prefill_tokens)
    rate, limit = work / seconds / 1e12, bench.flops / 1e12
    return Measured(
        value=rate,
        unit="TFLOP/s",
        limit=limit,
        share=rate / limit,
        note=f"{sizes.prefill_tokens / seconds:,.0f} tokens/s, evictions included; {work / 1e12:.3g} TFLOP; M = "
        f"{sizes.memory_size}, never more than {held_at_most(budget, sizes.prefill_tokens) + chunk:,} entries a stream",
    )
