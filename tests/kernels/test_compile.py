"""What the compiler makes of the kernels for GPUs that are not here: nothing is spilled, and enough programs fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.compile_kernels import cases

# Room that programs of four warps share on one multiprocessor, by compute capability.
REGISTERS, SHARED = 65536, {80: 164 * 1024, 90: 227 * 1024}
# 2,048 counts a program; 8-bit floats beside what they are widened to.
HEAVY = ("count-digits", "attend-4-8-window-fp8", "attend-4-1-fp8", "attend-1-8-fp8")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict[str, Any]]:
    """Figures of every case; the compiler needs a process in which kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_kernels"],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return {(result["name"], result["capability"]): result for result in json.loads(run.stdout)}


CASES = [
    (case.name, capability)
    for case in cases()
    for capability in SHARED
    if case.stored != "*fp8e4nv" or capability >= 89
]


@pytest.mark.parametrize(("name", "capability"), CASES)
def test_a_kernel_spills_nothing_and_leaves_room_for_others(
    name: str, capability: int, compiled: dict[tuple[str, int], dict[str, Any]]
) -> None:
    figures = compiled[name, capability]
    assert figures["stack"] == 0
    assert figures["local"] == 0
    programs = 3 if name.startswith(HEAVY) else 4
    assert figures["registers"] * 32 * figures["warps"] * programs <= REGISTERS
    assert (figures["shared"] + 1024) * programs <= SHARED[capability]


@pytest.mark.parametrize(("name", "capability"), [case for case in CASES if case[0].startswith("attend")])
def test_grouped_queries_use_matrix_products_on_pages_fetched_ahead(
    name: str, capability: int, compiled: dict[tuple[str, int], dict[str, Any]]
) -> None:
    assert compiled[name, capability]["tensor_products"] > 0
    assert compiled[name, capability]["copies_ahead"] > 0


@pytest.mark.parametrize("capability", SHARED)
def test_entries_are_moved_and_written_16_bytes_at_a_time(
    capability: int, compiled: dict[tuple[str, int], dict[str, Any]]
) -> None:
    assert compiled["move", capability]["wide_loads"] > 0
    assert compiled["append", capability]["wide_loads"] > 0
