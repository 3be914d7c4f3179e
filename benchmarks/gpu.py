"""This engine on one GPU against what the card allows, and against other systems: one call, one table.

    PYTHONPATH=. python benchmarks/gpu.py --output gpu.json [--upstream FOLDER] [--minutes 8]

Owns the order of the rows, the options and the report. Ceilings come first: every limit is bytes or operations over
what this very card reached. The model has the shapes of Qwen3-4B-Instruct-2507 and random weights, built on the device
and saved nowhere. `--tiny` runs the same control flow on a CPU in seconds; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import kernel_jobs
from gpu_peers import peer_jobs
from gpu_report import Job, Row, TimeBudget, render, run_jobs
from gpu_rows import Bench, clean_up, goal_jobs
from gpu_sizes import TINY, Sizes

logger = logging.getLogger("gpu")


def main(arguments: Sequence[str]) -> int:
    """Measure everything, write the JSON, print the table."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s")
    time = TimeBudget(options.minutes * 60)
    bench = make_bench(options, time)
    rows = run_jobs(all_jobs(bench, upstream=options.upstream), time, clean_up=clean_up)
    report(options, rows)
    return 0


def make_bench(options: Any, time: TimeBudget) -> Bench:
    """What the rows share, for these options."""
    return Bench(
        TINY if options.tiny else Sizes(),
        device=torch.device(options.device),
        dtype=torch.float32 if options.tiny else torch.bfloat16,
        time=time,
        backend=options.backend,
    )


def all_jobs(bench: Bench, *, upstream: Path | None) -> list[Job]:
    """Every row. Those of other systems come last: ours has to go for them."""
    return [*goal_jobs(bench), *kernel_jobs(bench), *peer_jobs(bench, upstream=upstream)]


def report(options: Any, rows: Sequence[Row]) -> None:
    """Write the JSON, then print the table."""
    machine = describe_machine(options)
    if options.output is not None:
        result = {"machine": machine, "rows": [asdict(row) for row in rows]}
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        logger.info("wrote %s", options.output)
    print(render(machine, rows))


def describe_machine(options: Any) -> dict[str, str]:
    """The device, versions and the date, for the line over the table."""
    device = torch.device(options.device)
    described = {"device": f"CPU, {os.cpu_count()} cores"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described = {"device": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"}
        described["CUDA"] = str(torch.version.cuda)
    described["date"] = datetime.now(UTC).strftime("%Y-%m-%d")
    described["Python"] = platform.python_version()
    for package in ("torch", "transformers", "triton", "flash-attn", "flashinfer-python"):
        try:
            described[package] = version(package)
        except PackageNotFoundError:
            described[package] = "not installed"
    described["model"] = "tiny, random weights" if options.tiny else "Qwen3-4B-Instruct-2507 shapes, random weights"
    return described


def _parse(arguments: Sequence[str]) -> Any:
    parser = argparse.ArgumentParser(description="Measure this engine on one GPU against the card's own limits.")
    parser.add_argument("--output", type=Path, help="write the numbers as JSON here too")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: whether it runs, not how fast")
    parser.add_argument("--device", help="cuda, or cpu with --tiny")
    parser.add_argument("--backend", default="auto", help="attention backend (%(default)s)")
    parser.add_argument("--minutes", type=float, default=8.0, metavar="M", help="rows that no longer fit are skipped")
    parser.add_argument("--upstream", type=Path, metavar="FOLDER", help="environment or folder with trimkv 0.1.5")
    options = parser.parse_args(arguments)
    if options.device is None:
        options.device = "cpu" if options.tiny else "cuda"
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("this PyTorch sees no GPU: --tiny runs on a CPU")
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
