"""Compile every kernel as a GPU would run it, on a machine without one, and say what each takes, as JSON.

Run without TRITON_INTERPRET: `python -m tests.kernels.compile_kernels`. The shapes are those of Qwen3-4B: 36 layers of
8 KV heads with 4 query heads each, head dimension 128, 16 entries a page.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trimkv_core.kernels import allocate, append, decode, evict, layout, retention_sums, select

STREAMS, PADDED = 36 * 8, 512
BLOCK = {"B": 16, "STREAMS_PADDED": PADDED}
LISTS = {"STREAMS": layout.STREAM_TILE, "PAGES": layout.PAGE_TILE}
HEAD = {"D": 128, "D_PADDED": 128}
# What a parameter points at, where that is not int32.
POINTERS = {
    "starts": "*i64",
    "key_scale": "*fp32",
    "value_scale": "*fp32",
    "to_key_scale": "*fp32",
    "to_value_scale": "*fp32",
    "log_beta": "*fp32",
    "to_log_beta": "*fp32",
    "partial": "*fp32",
    "weight": "*fp32",
    "sums": "*fp32",
    "grad": "*fp32",
    "result": "*fp32",
    "query": "*bf16",
    "out": "*bf16",
}
SCALARS = {
    "null_row", "null_page", "num_streams", "num_rows", "num_tokens", "num_heads", "num_query_heads", "layer", "window",
    "max_entries", "choices", "tokens",
}  # fmt: skip
FLOATS = {"scale", "epsilon", "kappa"}


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel in one configuration.

    Attributes:
        name: of the case.
        kernel: what is compiled.
        constants: its constexpr arguments.
        stored: type of stored keys and values.
        given: type of keys and values that are written.
        pointers: parameters that are pointers although others of their name are numbers.
    """

    name: str
    kernel: Any
    constants: dict[str, int | bool]
    stored: str = "*bf16"
    given: str = "*bf16"
    pointers: tuple[str, ...] = ()


def cases() -> list[Case]:
    """All kernels, those that read or write keys with 8-bit pages too."""
    listed = BLOCK | LISTS
    chunk = {"STREAMS_PADDED": PADDED, "CHUNK": select._CHUNK, "TILE": select._TILE}
    result = [
        Case("settle-grown", layout._settle, listed | {"GROWTH": 1}),
        Case("settle-kept", layout._settle, listed | {"GROWTH": 0}),
        Case("grow", allocate._grow, listed),
        Case("advance", allocate._advance, {"TILE": allocate._ADVANCE_TILE}),
        Case("release", allocate._release, BLOCK | {"PAGES": allocate._RELEASE_TILE}),
        Case("score", select._score, BLOCK | {"TILE": select._STREAM_TILE}, pointers=("window",)),
        Case("halve", select._halve, {"STREAMS_PADDED": PADDED, "TILE": select._TILE}),
        Case("count", evict._count, {"STREAMS_PADDED": PADDED, "TILE": evict._TILE}),
        Case("drop-pages", evict._drop_pages, listed),
        Case("combine", decode._combine, HEAD | {"SPLITS": 8}),
        Case("sum-retentions", retention_sums._forward, {"TILE": retention_sums._TILE}),
        Case("pull-retentions", retention_sums._backward, {"TILE": retention_sums._TILE}),
    ]
    for skipped, below, bits in select._DIGITS:
        digit = {"BITS": bits, "IS_TOP": skipped == 0}
        result.append(Case(f"count-digits-{below}", select._count_digits, chunk | digit | {"BELOW": below}))
        result.append(Case(f"pick-digit-{below}", select._pick_digit, digit))
    for is_global in (True, False):
        constants = {"IS_GLOBAL": is_global, "STREAMS_PADDED": PADDED, "TILE": evict._TILE}
        result.append(Case(f"plan-moves-{'global' if is_global else 'local'}", evict._plan_moves, constants))
    for stored, suffix in (("*bf16", ""), ("*fp8e4nv", "-fp8")):
        scales = {"HAS_SCALES": bool(suffix)}
        moves = BLOCK | HEAD | scales | {"MOVES": evict._MOVE_TILE}
        result.append(Case(f"move{suffix}", evict._move, moves, stored=stored))
        written = HEAD | scales | {"TOKENS": append._TOKEN_TILE, "HAS_LOG_BETA": True}
        result.append(Case(f"append{suffix}", append._append, written, stored=stored))
        for group, splits, has_window in ((4, 1, False), (4, 8, True), (1, 8, False)):
            attended = {
                **HEAD,
                **scales,
                "G": group,
                "G_PADDED": decode.padded_group(group),
                "B": 16,
                "TILE": decode.entry_tile(1 if suffix else 2),
                "SPLITS": splits,
                "HAS_WINDOW": has_window,
                "STAGES": decode.STAGES,
            }
            name = f"attend-{group}-{splits}{'-window' if has_window else ''}{suffix}"
            result.append(Case(name, decode._attend, attended, stored=stored))
    return result


def type_of(case: Case, name: str) -> str:
    """Type of a parameter that is no constant."""
    if name in FLOATS:
        return "fp32"
    if name in {"key", "value"}:
        return case.given if case.kernel is append._append else case.stored
    if name in {"to_key", "to_value"}:
        return case.stored
    is_number = "_by_" in name or (name in SCALARS and name not in case.pointers)
    return "i32" if is_number else POINTERS.get(name, "*i32")


def compile_case(case: Case, capability: int) -> Any:
    """What `case` compiles to for a compute capability, its pointers aligned as PyTorch's are."""
    signature: dict[str, str] = {}
    constants: dict[str, int | bool] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for at, name in enumerate(case.kernel.arg_names):
        if name in case.constants or name.endswith("_by_dim"):
            # Heads are contiguous, which a launch finds out.
            signature[name], constants[name] = "constexpr", case.constants.get(name, 1)
            continue
        signature[name] = type_of(case, name)
        if signature[name].startswith("*") or name in {"num_streams", "max_entries"} or "_by_" in name:
            attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


def usage(kernel: Any) -> dict[str, int]:
    """What the assembler says of a compiled kernel: registers, and bytes of stack, local and shared memory."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tools / "cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures = {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    # Shared memory is given at launch; the binary does not know of it.
    return {
        "registers": figures["REG"],
        "stack": figures["STACK"],
        "local": figures["LOCAL"],
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "copies_ahead": kernel.asm["ptx"].count("cp.async.cg"),
        "wide_loads": len(re.findall(r"ld\.global[^;]*\.v4\.b32", kernel.asm["ptx"])),
        "tensor_products": len(re.findall(r"mma\.sync|wgmma", kernel.asm["ptx"])),
    }


def main() -> None:
    """Print a list of what was compiled, or why it could not be."""
    results: list[dict[str, Any]] = []
    for capability in (80, 90):
        for case in cases():
            # 8-bit floats of this kind came with compute capability 8.9.
            if case.stored == "*fp8e4nv" and capability < 89:
                continue
            results.append({"name": case.name, "capability": capability, **usage(compile_case(case, capability))})
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
