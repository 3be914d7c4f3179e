"""The runs of the CPU benchmark: this service over HTTP, its engine alone, bare matmuls, and `transformers`.

Owns what the runs share (prompts, lengths, number format, threads) and the child processes. Only one process computes
at a time, but for a server and its client.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import bare_matmuls
import engine_alone
import raw_client
import transformers_peers
from http_streams import ServerProcess, chat_body
from serve_cpu_goals import STATIC, Alone, Http, Matmuls, Sizes, service_name
from serve_cpu_report import cells_of
from transformers import AutoConfig
from workload import Cell, Outcome, Prompt, Row, Timeline, decode_rate, median_row, repeat_while_short, summarise

from trimkv_core.embedded import EMBEDDED_NAME

logger = logging.getLogger("serve_cpu")

CONTINUOUS = "transformers, continuous batching"
WARM_UP = Cell(concurrency=2, prompt_tokens=96, new_tokens=4)
# Seconds a child may take beyond the cap of its run: to load the model, to warm up, to finish a step.
CHILD_SLACK_SECONDS = 300.0
BYTES_BESIDE_KEYS_AND_VALUES = 8
POOL_SPARE_BYTES = 1 << 30
# The server prefills one chunk after another: its rate does not depend on how many streams wait behind. Streams, and
# tokens of their prompts together, unless one has more.
PREFILL_STREAMS, PREFILL_TOKENS = 4, 4096
LONG_PROMPT_TOKENS = 1024
# As `trimkv-serve` sets it for itself.
SPINNING = {"GOMP_SPINCOUNT": "20000"}


@dataclass(frozen=True, slots=True)
class Shared:
    """What all runs have in common.

    Attributes:
        options: the command line.
        sizes: what the goals speak of.
        model_path: folder of the model.
        prompts: of every cell.
        scratch: folder for jobs, results and the server's log.
    """

    options: argparse.Namespace
    sizes: Sizes
    model_path: Path
    prompts: dict[Cell, list[Prompt]]
    scratch: Path

    @property
    def environment(self) -> dict[str, str]:
        """Variables of every process that computes."""
        threads = str(self.options.threads)
        return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}

    @property
    def stream_cell(self) -> Cell:
        """The many streams that go through HTTP and the engine alone."""
        return Cell(self.sizes.streams, self.sizes.stream_prompt, self.sizes.stream_new)

    @property
    def step_cell(self) -> Cell:
        """The sequences whose decode steps are measured."""
        return Cell(max(self.options.concurrency), self.sizes.short, 1)

    @property
    def chunk_cell(self) -> Cell:
        """A prompt of two prefill chunks."""
        return Cell(1, 2 * self.options.prefill_chunk, 1)

    @property
    def engine_flags(self) -> list[str]:
        """What the server is told about its engine, the engine alone likewise."""
        flags = ["--model", EMBEDDED_NAME, "--dtype", self.options.dtype, "--kv-memory", str(self._pool_bytes())]
        return [*flags, "--prefill-chunk", str(self.options.prefill_chunk), *self.options.serve_flag]

    def _pool_bytes(self) -> int:
        """A pool that holds the largest cell densely, so that nothing waits for pages."""
        config = AutoConfig.from_pretrained(self.model_path)
        entry: int = 2 * config.head_dim * 4 + BYTES_BESIDE_KEYS_AND_VALUES
        streams: int = config.num_hidden_layers * config.num_key_value_heads
        tokens = max(cell.concurrency * (cell.prompt_tokens + cell.new_tokens + 32) for cell in self.prompts)
        return tokens * streams * entry + POOL_SPARE_BYTES


def _run_child(
    shared: Shared, script: str, job: Any, *, environment: dict[str, str], limit: float | None = None
) -> dict[str, Any]:
    """What `script` says to `job`.

    Raises:
        subprocess.TimeoutExpired: it took longer than `limit` seconds.
        subprocess.CalledProcessError: it failed; why is on standard error.
    """
    job_path, result_path = shared.scratch / "job.json", shared.scratch / "result.json"
    job_path.write_text(json.dumps(asdict(job)), encoding="utf-8")
    result_path.unlink(missing_ok=True)
    subprocess.run(
        [sys.executable, Path(__file__).with_name(script), job_path, result_path],
        env=os.environ | shared.environment | environment,
        stdout=subprocess.DEVNULL,
        timeout=limit,
        check=True,
    )
    result: dict[str, Any] = json.loads(result_path.read_text(encoding="utf-8"))
    return result


# ---- this service's engine, and what bounds it -------------------------------------------------------------------


def measure_alone(shared: Shared) -> tuple[Alone, str]:
    """The engine without HTTP, and the number format it chose."""
    counts = sorted(set(shared.options.concurrency))
    cells = (shared.step_cell, shared.chunk_cell, shared.stream_cell)
    prompts, chunk, streams = ([list(prompt.ids) for prompt in shared.prompts[cell]] for cell in cells)
    job = engine_alone.Job(
        flags=shared.engine_flags,
        threads=shared.options.threads,
        budget=shared.sizes.budget,
        decode_sequences=counts,
        prompts=prompts,
        chunk_prompt=chunk[0],
        stream_prompts=streams,
        stream_new_tokens=shared.stream_cell.new_tokens,
    )
    result = engine_alone.Result(**_run_child(shared, "engine_alone.py", job, environment=SPINNING))
    logger.info("engine alone: %s", result)
    alone = Alone(
        decode_ms=dict(zip(counts, result.decode_ms, strict=True)),
        chunk_ms=result.chunk_ms,
        tokens_per_second=result.tokens_per_second,
    )
    return alone, result.dtype.removeprefix("torch.")


def measure_matmuls(shared: Shared, dtype: str) -> Matmuls:
    """The matrix products of the model's steps."""
    config = AutoConfig.from_pretrained(shared.model_path)
    hidden, inner = config.hidden_size, config.intermediate_size
    attention = config.num_attention_heads * config.head_dim
    both = 2 * config.num_key_value_heads * config.head_dim
    rows = sorted(set(shared.options.concurrency))
    job = bare_matmuls.Job(
        dtype=dtype,
        threads=shared.options.threads,
        layers=config.num_hidden_layers,
        layer=[[attention + both, hidden], [hidden, attention], [2 * inner, hidden], [hidden, inner]],
        head=[config.vocab_size, hidden],
        decode_rows=rows,
        chunk_rows=shared.options.prefill_chunk,
    )
    result = bare_matmuls.Result(**_run_child(shared, "bare_matmuls.py", job, environment=SPINNING))
    logger.info("bare matmuls: %s", result)
    return Matmuls(
        decode_ms=dict(zip(rows, result.decode_ms, strict=True)), chunk_rows=job.chunk_rows, chunk_ms=result.chunk_ms
    )


# ---- this service over HTTP --------------------------------------------------------------------------------------


def measure_service(shared: Shared, cells: Sequence[Cell]) -> tuple[list[Row], Http | None, dict[str, str]]:
    """A line for every cell and budget, the many streams, and the server's own words about itself."""
    options = shared.options
    log_path = shared.scratch / "trimkv-serve.log"
    with ServerProcess(flags=shared.engine_flags, log_path=log_path, environment=shared.environment) as server:
        logger.info("trimkv-serve is ready: %s", server.info)
        for budget in (shared.sizes.budget, 0):
            server.run_streams(shared.prompts[WARM_UP], new_tokens=WARM_UP.new_tokens, kv_budget=budget)
        # Right after the engine alone was measured: the machine is as it was then.
        http = None if "alone" in options.skip else _measure_raw(shared, server)
        rows = [_measure_cell(shared, server, cell, budget) for cell in cells for budget in _budgets(options, cell)]
        return rows, http, server.info


def _measure_cell(shared: Shared, server: ServerProcess, cell: Cell, budget: int) -> Row:
    prompts = shared.prompts[cell]
    few = max(1, min(PREFILL_STREAMS, PREFILL_TOKENS // cell.prompt_tokens))

    def measure() -> Row:
        full, kept = server.run_streams(prompts, new_tokens=cell.new_tokens, kv_budget=budget)
        # Alone, a stream's way to its first token is the same whether it stops there or not.
        first = full
        if cell.concurrency > 1:
            first, _ = server.run_streams(prompts[:few], new_tokens=1, kv_budget=budget)
        held = sum(kv["peak_bytes"] for kv in kept)
        return summarise(service_name(budget), cell, Outcome(first=first, full=full, kv_bytes=held))

    return _say(median_row(repeat_while_short(measure)))


def _budgets(options: argparse.Namespace, cell: Cell) -> list[int]:
    is_long = cell.prompt_tokens > LONG_PROMPT_TOKENS
    return list(options.long_budgets if is_long and options.long_budgets else options.budgets)


def _measure_raw(shared: Shared, server: ServerProcess) -> Http:
    """The many streams, read by a client that does nothing but count."""
    cell, budget = shared.stream_cell, shared.sizes.budget
    bodies = [
        chat_body(server.model, prompt, new_tokens=cell.new_tokens, kv_budget=budget, counts_tokens=False)
        for prompt in shared.prompts[cell]
    ]
    job = raw_client.Job(port=server.port, bodies=bodies)

    def measure() -> tuple[float | None, float, float]:
        result = _run_child(shared, "raw_client.py", job, environment={})
        lines = [Timeline(**line) for line in result["timelines"]]
        got = {(prompt, line.tokens[-1]) for prompt, line in zip(result["prompt_tokens"], lines, strict=True)}
        if got != {(cell.prompt_tokens, cell.new_tokens)}:
            raise RuntimeError(f"{cell} is not what the server counted: prompt and new tokens {sorted(got)}")
        return decode_rate(cell, lines), result["cpu_seconds"], result["wall_seconds"]

    rates, cpu, wall = zip(*repeat_while_short(measure), strict=True)
    measured = [rate for rate in rates if rate is not None]
    http = Http(
        tokens_per_second=statistics.median(measured) if measured else None,
        client_cpu_seconds=sum(cpu),
        wall_seconds=sum(wall),
    )
    logger.info("%d streams through HTTP: %s", cell.concurrency, http)
    return http


# ---- transformers ------------------------------------------------------------------------------------------------


def measure_peer(shared: Shared, cell: Cell, system: str, dtype: str) -> Row:
    """A line for one cell: `static` or `continuous`."""
    prompts = shared.prompts[cell]
    if system == "static":
        # One run holds both: all streams get their first tokens together, before any decodes: none needs a head start.
        cell = replace(cell, new_tokens=1 + shared.options.decode_tokens)
        both, held, _ = _run_peer(shared, cell, prompts, system=system, dtype=dtype)
        return _say(summarise(STATIC, cell, Outcome(first=both, full=both, kv_bytes=held)))
    first, held, is_cut = _run_peer(shared, replace(cell, new_tokens=1), prompts, system=system, dtype=dtype)
    full: list[Timeline] = []
    if not is_cut:
        full, held, is_cut = _run_peer(shared, cell, prompts, system=system, dtype=dtype)
    cap = shared.options.continuous_cap_seconds if is_cut else None
    return _say(summarise(CONTINUOUS, cell, Outcome(first=first, full=full, kv_bytes=held, cap_seconds=cap)))


def _run_peer(
    shared: Shared, cell: Cell, prompts: Sequence[Prompt], *, system: str, dtype: str
) -> tuple[list[Timeline], int | None, bool]:
    """Timelines, bytes held and whether the run was cut short. Nothing at all if the child had to be ended."""
    options = shared.options
    job = transformers_peers.Job(
        system=system,
        model_path=str(shared.model_path),
        dtype=dtype,
        threads=options.threads,
        prompts=[list(prompt.ids) for prompt in prompts],
        new_tokens=cell.new_tokens,
        cap_seconds=options.continuous_cap_seconds,
        prefill_rows=options.static_rows,
        batch_tokens=options.continuous_batch_tokens,
    )
    limit = options.continuous_cap_seconds + CHILD_SLACK_SECONDS if system == "continuous" else None
    try:
        result = _run_child(shared, "transformers_peers.py", job, environment={}, limit=limit)
    except subprocess.TimeoutExpired:
        return [Timeline() for _ in range(cell.concurrency)], None, True
    return [Timeline(**line) for line in result["timelines"]], result["kv_bytes"], result["is_cut"]


def _say(row: Row) -> Row:
    cells = " | ".join(cells_of(row, None)[2:])
    logger.info("%d x %d, runs: %d: %s", row.concurrency, row.prompt_tokens, row.runs, cells)
    return row
