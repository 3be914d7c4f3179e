"""The service's engine without HTTP, threads and event loop: its core stepped by hand. Run as a child process.

Owns the order of submissions and steps, and the clock around them. Reads a job from a JSON file, writes numbers to
another. What a decode step, a chunk and a rate are is said in `workload.py`.
"""

from __future__ import annotations

import itertools
import json
import logging
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from workload import WINDOWS, Cell, Timeline, decode_rate, repeat_while_short

from service.engine.interface import (
    AbortReason,
    EngineObserver,
    Event,
    Failed,
    GenerationRequest,
    SamplingParams,
)
from service.engine.loader import load_engine
from service.engine.mailbox import Dispatcher, Mailbox
from service.engine.request import RequestState
from service.generation.sampler import SamplingState
from service.generation.stopping import AnswerStream
from service.settings import load_settings
from trimkv_core.budget import Budget, Strategy

CHUNK_RUNS = 5
# Steps before the first window: buffers have grown to their size by then.
SETTLING_STEPS = 4
WARM_UP_TOKENS = 4

logger = logging.getLogger("engine_alone")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to measure.

    Attributes:
        flags: of `trimkv-serve`: the engine is configured as the server's is.
        threads: of torch.
        budget: M of every request; 0 is dense.
        decode_sequences: how many sequences the measured decode steps have, one measurement each.
        prompts: token ids, as many as the largest of them.
        chunk_prompt: token ids of exactly two prefill chunks.
        stream_prompts: token ids of the streams whose tokens/s are measured.
        stream_new_tokens: tokens each of them generates.
    """

    flags: list[str]
    threads: int
    budget: int
    decode_sequences: list[int]
    prompts: list[list[int]]
    chunk_prompt: list[int]
    stream_prompts: list[list[int]]
    stream_new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What was measured, and what the engine says of itself.

    Attributes:
        decode_ms: milliseconds of a decode step, in the order of the job's `decode_sequences`.
        chunk_ms: milliseconds of a prefill chunk.
        tokens_per_second: of the streams while all of them decode; None when they never all did.
        runs: runs of the streams, of which the rate is the median.
        dtype, backend: as the server's `model_info` has them.
    """

    decode_ms: list[float]
    chunk_ms: float
    tokens_per_second: float | None
    runs: int
    dtype: str
    backend: str


def greedy(new_tokens: int) -> SamplingParams:
    """As the API makes it of the body that goes through HTTP."""
    return SamplingParams(max_tokens=new_tokens, temperature=0.0, min_tokens=new_tokens, ignore_eos=True)


class _Silent:
    """Takes every report and keeps none."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_args, **_kwargs: None


class _Clock(Dispatcher):
    """Notes when a step handed over how many tokens of which request."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.lines: dict[Mailbox, Timeline] = {}
        self._step: list[tuple[Mailbox, Event]] = []

    def restart(self) -> None:
        """Forget the requests so far and count seconds from now."""
        self.lines, self.start = {}, time.monotonic()

    def add(self, mailbox: Mailbox, event: Event) -> None:
        self._step.append((mailbox, event))

    def flush(self) -> None:
        now = time.monotonic() - self.start
        for mailbox, event in self._step:
            if isinstance(event, Failed):
                raise RuntimeError(f"the engine failed: {event.message}")
            self.lines.setdefault(mailbox, Timeline()).note(now, event.completion_tokens)
        self._step.clear()


class Engine:
    """An engine core, its clock, and requests by token ids.

    Attributes:
        info: what was loaded.
        budget: of every request.
    """

    def __init__(self, flags: Sequence[str], *, budget: int) -> None:
        self._loaded = load_engine(load_settings(flags).engine_config())
        self._clock = _Clock()
        self._core = self._loaded.build_core(self._clock, cast(EngineObserver, _Silent()), lambda _state: None)
        self._numbers = itertools.count()
        self.info = self._loaded.info
        # As the API makes it of a request that names `kv_budget` and nothing else.
        default = self.info.budget
        self.budget = (
            replace(default, memory_size=budget, strategy=Strategy.FIXED_BUDGET)
            if budget
            else replace(Budget.dense(), scope=default.scope, prefill_chunk=default.prefill_chunk)
        )

    def decode_ms(self, prompts: Sequence[Sequence[int]]) -> float:
        """Milliseconds of a step that decodes all `prompts`."""
        window = self.budget.buffer_size
        steps = SETTLING_STEPS + WINDOWS * window
        # Prompts are prefilled one after another while those before them decode, a token with each chunk; and the last
        # timed step must not be the last of all.
        spare = sum(-(-len(prompt) // self.budget.prefill_chunk) for prompt in prompts) + 1
        states = [self._submit(prompt, steps + spare) for prompt in prompts]
        while not all(state.generated for state in states):
            self._core.step()
        for _ in range(SETTLING_STEPS):
            self._core.step()
        seconds = statistics.median(self._seconds(window) for _ in range(WINDOWS)) / window
        if len(self._core.scheduler.running) != len(states):
            raise RuntimeError("a sequence ended while its steps were being timed")
        self._core.abort_all(AbortReason.CLIENT)
        self._core.flush()
        return 1e3 * seconds

    def chunk_ms(self, prompt: Sequence[int]) -> float:
        """Milliseconds of the second of the two chunks that `prompt` is."""
        return 1e3 * statistics.median(self._second_chunk(prompt) for _ in range(CHUNK_RUNS))

    def _second_chunk(self, prompt: Sequence[int]) -> float:
        state = self._submit(prompt, 1)
        self._core.step()
        if state.fed * 2 != len(prompt):
            raise RuntimeError(f"the first chunk of a prompt of {len(prompt)} tokens had {state.fed}, not half of them")
        seconds = self._seconds(1)
        if self._core.scheduler.has_work:
            raise RuntimeError("the second chunk was not the last")
        return seconds

    def streams(self, prompts: Sequence[Sequence[int]], *, new_tokens: int) -> list[Timeline]:
        """Timelines of all `prompts`, submitted at once."""
        self._clock.restart()
        for prompt in prompts:
            self._submit(prompt, new_tokens)
        while self._core.scheduler.has_work:
            self._core.step()
        return list(self._clock.lines.values())

    def _seconds(self, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            self._core.step()
        return time.perf_counter() - start

    def _submit(self, prompt_ids: Sequence[int], new_tokens: int) -> RequestState:
        params = greedy(new_tokens)
        request = GenerationRequest(
            request_id=f"alone-{next(self._numbers)}",
            prompt_ids=tuple(prompt_ids),
            sampling=params,
            budget=self.budget,
            arrival=time.monotonic(),
        )
        eos = self.info.eos_token_ids
        state = RequestState(
            request=request,
            mailbox=Mailbox(),
            sampling=SamplingState(params, prompt_ids=prompt_ids, eos_token_ids=eos),
            answer=AnswerStream(self._loaded.tokenizer, params, eos_token_ids=eos, prompt_ids=prompt_ids),
            pages=self._loaded.ledger.check_fits(request),
        )
        self._core.add(state)
        return state


def run(job: Job) -> Result:
    """Load the engine, warm it up, measure."""
    torch.set_num_threads(job.threads)
    engine = Engine(job.flags, budget=job.budget)
    engine.streams([*job.prompts[:2], job.chunk_prompt], new_tokens=WARM_UP_TOKENS)
    streams = job.stream_prompts
    cell = Cell(len(streams), len(streams[0]), job.stream_new_tokens)
    rates = repeat_while_short(lambda: decode_rate(cell, engine.streams(streams, new_tokens=cell.new_tokens)))
    measured = [rate for rate in rates if rate is not None]
    return Result(
        decode_ms=[engine.decode_ms(job.prompts[:sequences]) for sequences in job.decode_sequences],
        chunk_ms=engine.chunk_ms(job.chunk_prompt),
        tokens_per_second=statistics.median(measured) if measured else None,
        runs=len(rates),
        dtype=engine.info.dtype,
        backend=engine.info.backend,
    )


def main(arguments: Sequence[str]) -> None:
    """`engine_alone.py JOB.json RESULT.json`."""
    job_path, result_path = map(Path, arguments)
    job = Job(**json.loads(job_path.read_text(encoding="utf-8")))
    result_path.write_text(json.dumps(asdict(run(job))), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
