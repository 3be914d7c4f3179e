"""This service on one CPU, against `transformers` and against its own matrix products: the tables of the README.

Owns the command line, the order of the runs and the report. What the columns mean is said in `workload.py`; `×` is the
ratio to the static batch, the ideal for prompts of equal length. The goals come last: ratios of numbers of this run.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from serve_cpu_goals import Numbers, Ratio, Sizes, find_ratios, render_goals
from serve_cpu_report import describe_machine, render_steps, render_systems
from serve_cpu_runs import WARM_UP, Shared, measure_alone, measure_matmuls, measure_peer, measure_service
from transformers import AutoTokenizer
from workload import Cell, make_prompts

from trimkv_core.embedded import embedded_model_path

logger = logging.getLogger("serve_cpu")

QUICK_SIZES = Sizes(few=1, many=2, short=96, long=160, budget=64, streams=4, stream_prompt=64, stream_new=16)


def main(arguments: Sequence[str]) -> int:
    """Run everything, write the JSON, print the tables."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    started = time.monotonic()
    model_path = embedded_model_path()
    cells = [
        Cell(concurrency, prompt_tokens, _new_tokens(options, concurrency, prompt_tokens))
        for prompt_tokens in options.prompt_tokens
        for concurrency in options.concurrency
    ]
    with tempfile.TemporaryDirectory(prefix="serve_cpu-") as scratch:
        shared = Shared(options, QUICK_SIZES if options.quick else Sizes(), model_path, {}, Path(scratch))
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        for cell in (WARM_UP, shared.step_cell, shared.chunk_cell, shared.stream_cell, *cells):
            shared.prompts[cell] = make_prompts(tokenizer, cell, seed=options.seed)
        numbers, served = _measure(shared, cells)
    logger.info("all of it took %.1f minutes", (time.monotonic() - started) / 60)
    machine = describe_machine(served, threads=options.threads)
    ratios = find_ratios(numbers, shared.sizes)
    if options.output is not None:
        report = {"machine": machine, **asdict(numbers), "goals": [_as_json(ratio) for ratio in ratios]}
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        logger.info("wrote %s", options.output)
    print(render_systems(machine, numbers.rows), end="\n\n")
    print(render_steps(numbers.matmuls, numbers.alone), end="\n\n")
    if options.quick:
        print("Tiny sizes: the ratios below say that they can be measured, and nothing else.", end="\n\n")
    print(render_goals(ratios))
    return 0


def _measure(shared: Shared, cells: Sequence[Cell]) -> tuple[Numbers, dict[str, str]]:
    """All numbers, and the server's own words about itself. What is compared is measured side by side."""
    options = shared.options
    alone = matmuls = None
    if "alone" not in options.skip:
        alone, dtype = measure_alone(shared)
        matmuls = measure_matmuls(shared, dtype)
    rows, http, served = measure_service(shared, cells)
    for cell in cells:
        for system in ("static", "continuous"):
            if system not in options.skip:
                rows.append(measure_peer(shared, cell, system, served["dtype"].removeprefix("torch.")))
    rows.sort(key=lambda row: (row.prompt_tokens, row.concurrency))  # stable: systems stay in the order they ran
    return Numbers(rows=rows, matmuls=matmuls, alone=alone, http=http), served


def _as_json(ratio: Ratio) -> dict[str, str | float | None]:
    return {"what": ratio.what, "measured": ratio.value, "goal": str(ratio.goal), "verdict": ratio.verdict}


def _new_tokens(options: argparse.Namespace, concurrency: int, prompt_tokens: int) -> int:
    """Long enough that the first stream still decodes for a while when the last one has its first token.

    A server that prefills one chunk a step gives the first stream a token with each of the others' chunks.
    """
    head_start = (concurrency - 1) * -(-prompt_tokens // options.prefill_chunk)
    return int(options.decode_tokens + head_start)


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
    parser.add_argument("--decode-tokens", type=int, default=32, metavar="N", help="tokens while all streams decode")
    parser.add_argument("--prefill-chunk", type=int, default=512, metavar="N", help="of the server")
    parser.add_argument(
        "--static-rows", type=int, default=4, metavar="N", help="prompts the static batch prefills at once"
    )
    parser.add_argument("--continuous-cap-seconds", type=float, default=25.0, metavar="S", help="for one run")
    parser.add_argument("--continuous-batch-tokens", type=int, default=1024, metavar="N")
    parser.add_argument(
        "--skip",
        nargs="*",
        choices=("static", "continuous", "alone"),
        default=[],
        metavar="PART",
        help="static, continuous (of transformers), alone (bare matmuls, the engine alone, 64 streams through HTTP)",
    )
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
