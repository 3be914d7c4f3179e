"""This service against `transformers` on one CPU: the table of the README.

Owns the order of the runs, what they share (prompts, lengths, number format, threads) and the table. Only one process
computes at a time: the server first, then a child process for every run of `transformers`. What the columns mean is
said in `workload.py`; `×` is the ratio to the static batch, the ideal for prompts of equal length.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from http_streams import ServerProcess
from transformers import AutoConfig, AutoTokenizer
from transformers_peers import Job
from workload import Cell, Outcome, Prompt, Row, Timeline, make_prompts, summarise

from trimkv_core.embedded import EMBEDDED_NAME, embedded_model_path

logger = logging.getLogger("serve_cpu")

STATIC, CONTINUOUS = "transformers, static batch", "transformers, continuous batching"
WARM_UP = Cell(concurrency=2, prompt_tokens=96, new_tokens=4)
# Seconds a child may take beyond the cap of its run: to load the model, to warm up, to finish a step.
CHILD_SLACK_SECONDS = 300.0
BYTES_BESIDE_KEYS_AND_VALUES = 8
POOL_SPARE_BYTES = 1 << 30
# The server prefills one chunk after another: its rate does not depend on how many streams wait behind.
PREFILL_STREAMS = 4
LONG_PROMPT_TOKENS = 1024
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Shared:
    """What all runs have in common."""

    options: argparse.Namespace
    model_path: Path
    prompts: dict[Cell, list[Prompt]]
    scratch: Path

    @property
    def environment(self) -> dict[str, str]:
        threads = str(self.options.threads)
        return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def main(arguments: Sequence[str]) -> int:
    """Run everything, write the JSON, print the table."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    model_path = embedded_model_path()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    cells = [
        Cell(concurrency, prompt_tokens, _new_tokens(options, concurrency, prompt_tokens))
        for prompt_tokens in options.prompt_tokens
        for concurrency in options.concurrency
    ]
    with tempfile.TemporaryDirectory(prefix="serve_cpu-") as scratch:
        prompts = {cell: make_prompts(tokenizer, cell, seed=options.seed) for cell in (WARM_UP, *cells)}
        shared = Shared(options, model_path, prompts, Path(scratch))
        rows, served = _measure_service(shared, cells)
        for cell in cells:
            for system in ("static", "continuous"):
                if system not in options.skip:
                    rows.append(_measure_peer(shared, cell, system, served["dtype"].removeprefix("torch.")))
    rows.sort(key=lambda row: (row.prompt_tokens, row.concurrency))  # stable: systems stay in the order they ran
    machine = _describe_machine(options, served)
    if options.output is not None:
        report = {"machine": machine, "rows": [asdict(row) for row in rows]}
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        logger.info("wrote %s", options.output)
    print(render(machine, rows))
    return 0


def _new_tokens(options: argparse.Namespace, concurrency: int, prompt_tokens: int) -> int:
    """Long enough that the first stream still decodes for a while when the last one has its first token.

    A server that prefills one chunk a step gives the first stream a token with each of the others' chunks.
    """
    head_start = (concurrency - 1) * -(-prompt_tokens // options.prefill_chunk)
    return int(options.decode_tokens + head_start)


# ---- this service ------------------------------------------------------------------------------------------------


def _measure_service(shared: Shared, cells: Sequence[Cell]) -> tuple[list[Row], dict[str, str]]:
    """A line for every cell and budget, and the server's own words about itself."""
    options = shared.options
    flags = ["--model", EMBEDDED_NAME, "--dtype", options.dtype, "--kv-memory", str(_pool_bytes(shared, cells))]
    flags += ["--prefill-chunk", str(options.prefill_chunk), *options.serve_flag]
    log_path = shared.scratch / "trimkv-serve.log"
    rows = []
    with ServerProcess(flags=flags, log_path=log_path, environment=shared.environment) as server:
        logger.info("trimkv-serve is ready: %s", server.info)
        for budget in (options.budgets[0], 0):
            server.run_streams(shared.prompts[WARM_UP], new_tokens=WARM_UP.new_tokens, kv_budget=budget)
        for cell in cells:
            for budget in _budgets(options, cell):
                prompts = shared.prompts[cell]
                first, _ = server.run_streams(prompts[:PREFILL_STREAMS], new_tokens=1, kv_budget=budget)
                full, kept = server.run_streams(prompts, new_tokens=cell.new_tokens, kv_budget=budget)
                held = sum(kv["peak_bytes"] for kv in kept)
                name = f"trimkv-serve, {f'budget {budget}' if budget else 'dense'}"
                rows.append(_finish(name, cell, Outcome(first=first, full=full, kv_bytes=held)))
        return rows, server.info


def _budgets(options: argparse.Namespace, cell: Cell) -> list[int]:
    is_long = cell.prompt_tokens > LONG_PROMPT_TOKENS
    return list(options.long_budgets if is_long and options.long_budgets else options.budgets)


def _pool_bytes(shared: Shared, cells: Sequence[Cell]) -> int:
    """A pool that holds the largest cell densely, so that nothing waits for pages."""
    config = AutoConfig.from_pretrained(shared.model_path)
    entry: int = 2 * config.head_dim * 4 + BYTES_BESIDE_KEYS_AND_VALUES
    streams: int = config.num_hidden_layers * config.num_key_value_heads
    tokens = max(cell.concurrency * (cell.prompt_tokens + cell.new_tokens + 32) for cell in cells)
    return tokens * streams * entry + POOL_SPARE_BYTES


# ---- transformers ------------------------------------------------------------------------------------------------


def _measure_peer(shared: Shared, cell: Cell, system: str, dtype: str) -> Row:
    name = STATIC if system == "static" else CONTINUOUS
    if system == "static":  # one run holds both: all streams get their first token together, before any decodes
        both, held, _ = _run_child(shared, cell, system, dtype, new_tokens=cell.new_tokens)
        return _finish(name, cell, Outcome(first=both, full=both, kv_bytes=held))
    first, held, is_cut = _run_child(shared, cell, system, dtype, new_tokens=1)
    full: list[Timeline] = []
    if not is_cut:
        full, held, is_cut = _run_child(shared, cell, system, dtype, new_tokens=cell.new_tokens)
    cap = shared.options.continuous_cap_seconds if is_cut else None
    return _finish(name, cell, Outcome(first=first, full=full, kv_bytes=held, cap_seconds=cap))


def _run_child(
    shared: Shared, cell: Cell, system: str, dtype: str, *, new_tokens: int
) -> tuple[list[Timeline], int | None, bool]:
    """Timelines, bytes held and whether the run was cut short. Nothing at all if the child had to be ended."""
    options = shared.options
    job = Job(
        system=system,
        model_path=str(shared.model_path),
        dtype=dtype,
        threads=options.threads,
        prompts=[list(prompt.ids) for prompt in shared.prompts[cell]],
        new_tokens=new_tokens,
        cap_seconds=options.continuous_cap_seconds,
        prefill_rows=options.static_rows,
        batch_tokens=options.continuous_batch_tokens,
    )
    job_path, result_path = shared.scratch / "job.json", shared.scratch / "result.json"
    job_path.write_text(json.dumps(asdict(job)), encoding="utf-8")
    result_path.unlink(missing_ok=True)
    script = Path(__file__).with_name("transformers_peers.py")
    limit = options.continuous_cap_seconds + CHILD_SLACK_SECONDS if system == "continuous" else None
    try:
        subprocess.run(
            [sys.executable, script, job_path, result_path],
            env=os.environ | shared.environment,
            stdout=subprocess.DEVNULL,
            timeout=limit,
            check=True,
        )
    except subprocess.TimeoutExpired:
        return [Timeline() for _ in range(cell.concurrency)], None, True
    result = json.loads(result_path.read_text(encoding="utf-8"))
    return [Timeline(**line) for line in result["timelines"]], result["kv_bytes"], result["is_cut"]


# ---- the report --------------------------------------------------------------------------------------------------


def _finish(name: str, cell: Cell, outcome: Outcome) -> Row:
    row = summarise(name, cell, outcome)
    logger.info("%d x %d: %s", cell.concurrency, cell.prompt_tokens, " | ".join(_cells_of(row, None)[2:]))
    return row


def render(machine: dict[str, str], rows: Sequence[Row]) -> str:
    """The table in Markdown, under a line that names the machine."""
    header = ["streams", "prompt", "system", "prefill tokens/s", "decode tokens/s", "first token s, mean / last"]
    header += ["KV MiB held", "note"]
    ideals = {(row.concurrency, row.prompt_tokens): row for row in rows if row.system == STATIC}
    lines = ["; ".join(f"{name} {value}" for name, value in machine.items()), ""]
    lines += [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for row in rows:
        ideal = ideals.get((row.concurrency, row.prompt_tokens))
        lines.append(f"| {' | '.join(_cells_of(row, ideal))} |")
    return "\n".join(lines)


def _cells_of(row: Row, ideal: Row | None) -> list[str]:
    first, last = row.first_token_seconds_mean, row.first_token_seconds_last
    return [
        str(row.concurrency),
        f"{row.prompt_tokens:,}",
        row.system,
        _rate(row.prefill_tokens_per_second, ideal.prefill_tokens_per_second if ideal else None),
        _rate(row.decode_tokens_per_second, ideal.decode_tokens_per_second if ideal else None),
        "–" if first is None or last is None else f"{first:.2f} / {last:.2f}",
        "–" if row.kv_bytes is None else f"{row.kv_bytes / MIB:,.1f}",
        row.note,
    ]


def _rate(rate: float | None, ideal: float | None) -> str:
    if rate is None:
        return "–"
    text = f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"
    return f"{text} (×{rate / ideal:.2f})" if ideal else text


def _describe_machine(options: argparse.Namespace, served: dict[str, str]) -> dict[str, str]:
    described = {
        "processor": _processor(),
        "threads": f"{options.threads} of {os.cpu_count()} cores",
        "dtype": served["dtype"],
        "attention backend": served["backend"],
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "Python": platform.python_version(),
    }
    for package in ("torch", "transformers", "trimkv-serve"):
        try:
            described[package] = version(package)
        except PackageNotFoundError:
            described[package] = "not installed"
    if os.environ.get("LD_PRELOAD"):
        described["preloaded"] = Path(os.environ["LD_PRELOAD"].split(":")[0]).name
    return described


def _processor() -> str:
    """The processor's name, and what it has for matrix products."""
    facts: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    flags = set(facts.get("flags", "").split())
    notable = [name for name in ("amx_tile", "avx512_bf16", "avx512f", "avx2") if name in flags]
    family = f" family {facts['cpu family']} model {facts['model']}" if "cpu family" in facts else ""
    name = facts.get("model name") or platform.processor() or platform.machine()
    return f"{name}{family}{f' ({notable[0]})' if notable else ''}"


def _parse(arguments: Sequence[str]) -> Any:
    parser = argparse.ArgumentParser(description="Measure this service and transformers on one CPU.")
    parser.add_argument("--output", type=Path, help="write the numbers as JSON here too")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16], metavar="N")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[512, 4096], metavar="N")
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128, 256, 0], metavar="M", help="0 is dense")
    parser.add_argument(
        "--long-budgets", type=int, nargs="+", metavar="M", help="for prompts over 1,024 tokens; all if not given"
    )
    parser.add_argument("--decode-tokens", type=int, default=64, metavar="N", help="tokens while all streams decode")
    parser.add_argument("--prefill-chunk", type=int, default=512, metavar="N", help="of the server")
    parser.add_argument(
        "--static-rows", type=int, default=4, metavar="N", help="prompts the static batch prefills at once"
    )
    parser.add_argument("--continuous-cap-seconds", type=float, default=120.0, metavar="S", help="for one run")
    parser.add_argument("--continuous-batch-tokens", type=int, default=1024, metavar="N")
    parser.add_argument("--skip", nargs="*", choices=("static", "continuous"), default=[], metavar="SYSTEM")
    parser.add_argument("--dtype", default="auto", help="of everything; auto is what the server picks")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--serve-flag", action="append", default=[], metavar="FLAG", help="--serve-flag=--block-size=32"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.concurrency, options.prompt_tokens, options.budgets = [1, 2], [96, 160], [64, 0]
        options.decode_tokens, options.prefill_chunk, options.continuous_cap_seconds = 8, 64, 30.0
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
