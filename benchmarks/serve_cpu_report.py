"""The tables of the CPU benchmark, and the line that names the machine.

Owns how numbers look. Knows no server and no clock; what the numbers mean is said in `workload.py`.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from serve_cpu_goals import NOT_MEASURED, STATIC, Alone, Matmuls
from workload import Row

MIB = 1 << 20


def render_systems(machine: dict[str, str], rows: Sequence[Row]) -> str:
    """The table of all systems in Markdown, under a line that names the machine."""
    header = ["streams", "prompt", "system", "prefill tokens/s", "decode tokens/s", "first token s, mean / last"]
    header += ["KV MiB held", "note"]
    ideals = {(row.concurrency, row.prompt_tokens): row for row in rows if row.system == STATIC}
    lines = ["; ".join(f"{name} {value}" for name, value in machine.items()), ""]
    lines += [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for row in rows:
        ideal = ideals.get((row.concurrency, row.prompt_tokens))
        lines.append(f"| {' | '.join(cells_of(row, ideal))} |")
    return "\n".join(lines)


def render_steps(matmuls: Matmuls | None, alone: Alone | None) -> str:
    """The table of single steps: what the engine alone takes for them, and what their bare matmuls take."""
    rows = set() if matmuls is None else set(matmuls.decode_ms)
    rows |= set() if alone is None else set(alone.decode_ms)
    steps = [
        (
            f"decode, {count}",
            None if alone is None else alone.decode_ms.get(count),
            None if matmuls is None else matmuls.decode_ms.get(count),
        )
        for count in sorted(rows)
    ]
    size = "" if matmuls is None else f", {matmuls.chunk_rows:,}"
    steps.append(
        (
            f"prefill chunk{size}",
            None if alone is None else alone.chunk_ms,
            None if matmuls is None else matmuls.chunk_ms,
        )
    )
    lines = ["| step, rows | engine alone ms | bare matmuls ms |", "|---|---|---|"]
    lines += [f"| {name} | {_milliseconds(ours)} | {_milliseconds(bare)} |" for name, ours, bare in steps]
    return "\n".join(lines)


def _milliseconds(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:,.1f}"


def cells_of(row: Row, ideal: Row | None) -> list[str]:
    """A row of the table of all systems; rates are compared with `ideal`'s."""
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


def describe_machine(served: dict[str, str], *, threads: int) -> dict[str, str]:
    """What the numbers were measured on and with; `served` are the labels of the server's `model_info`."""
    described = {
        "processor": _processor(),
        "threads": f"{threads} of {os.cpu_count()} cores",
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
