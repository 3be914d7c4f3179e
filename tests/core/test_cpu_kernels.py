"""The CPU kernels one by one: against float64, the models' own modules, and to the last bit against themselves."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from trimkv_core import cpu
from trimkv_core.cpu import attention, linear, pointwise, vector
from trimkv_core.cpu.threads import threading_note
from trimkv_core.cpu.vector import LANES

Array = np.ndarray[Any, Any]
# What surrounds a result in memory and must still be there afterwards.
SENTINEL = np.float32(12345.0)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Array:
    return torch.randn(*shape, generator=generator(seed)).numpy()


def padded(outputs: int) -> int:
    return -(-outputs // LANES) * LANES


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """As many threads as torch has, whatever a test before has asked for."""
    attention.use_threads(torch.get_num_threads())
    yield
    attention.use_threads(torch.get_num_threads())


# ---- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("inputs", [1, 2, 33, 576])
@pytest.mark.parametrize("outputs", [(1,), (15, 2), (16,), (50, 3, 80)])
def test_a_product_is_the_exact_one_and_stays_in_its_bounds(
    outputs: tuple[int, ...], inputs: int, has_bias: bool, adds: bool
) -> None:
    weights = [torch.randn(count, inputs, generator=generator(count)) for count in outputs]
    # Of layers side by side some may have a bias and some none.
    biases = [torch.randn(count) if has_bias and at % 2 == 0 else None for at, count in enumerate(outputs)]
    layer = linear.pack_linear(weights, biases)
    width = sum(outputs)
    bias = torch.cat([torch.zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)])
    for rows in (1, 2, 3, 4, 5, 6, 7, 13, 191, 192, 193, 200):
        x = normal(rows, inputs, seed=rows)
        held = normal(rows + 2, padded(width), seed=rows + 1)
        held[[0, -1]] = SENTINEL
        before = held.copy()
        linear.multiply(layer, x, held[1:-1], adds)
        exact = x.astype(np.float64) @ torch.cat(weights).double().numpy().T + bias.double().numpy()
        if adds:
            exact += before[1:-1, :width]
        np.testing.assert_allclose(held[1:-1, :width], exact, rtol=2e-6, atol=3e-7 * inputs**0.5 * 8)
        assert (held[[0, -1]] == SENTINEL).all()
        assert np.array_equal(held[1:-1, width:], before[1:-1, width:] if adds else np.zeros_like(before[1:-1, width:]))


@pytest.mark.parametrize(("inputs", "adds"), [(1, False), (33, True), (576, False)])
def test_a_rows_bits_depend_on_neither_its_place_nor_its_company(inputs: int, adds: bool) -> None:
    layer = linear.pack_linear([torch.randn(50, inputs, generator=generator(0))], [torch.randn(50)])
    x, base = normal(400, inputs), normal(400, 64, seed=1) if adds else np.zeros((400, 64), np.float32)

    def product(start: int, stop: int) -> Array:
        out = base[start:stop].copy()
        linear.multiply(layer, x[start:stop], out, adds)
        return out

    alone = np.concatenate([product(at, at + 1) for at in range(400)])
    for rows in (*range(2, 15), 47, 48, 191, 192, 193, 198, 400):
        for start in {0, 1, 5, 400 - rows}:
            if start + rows <= 400:
                assert np.array_equal(product(start, start + rows), alone[start : start + rows]), (start, rows)


def test_a_row_that_is_no_number_spoils_no_other() -> None:
    layer = linear.pack_linear([torch.randn(40, 24)], [None])
    x, out = normal(23, 24), np.zeros((23, 48), np.float32)
    linear.multiply(layer, x, out, False)
    for row in (0, 4, 11, 22):
        spoiled, found = x.copy(), np.zeros_like(out)
        spoiled[row, 7] = np.nan
        linear.multiply(layer, spoiled, found, False)
        assert np.isnan(found[row, :40]).all()
        others = np.arange(23) != row
        assert np.array_equal(found[others], out[others])


def test_the_number_of_threads_changes_no_bit() -> None:
    if attention.use_threads(2) < 2:
        pytest.skip("one processor")
    layer = linear.pack_linear([torch.randn(200, 64)], [None])
    x, results = normal(300, 64), []
    for count in (1, 2):
        assert attention.use_threads(count) == count
        results.append(np.zeros((300, 208), np.float32))
        linear.multiply(layer, x, results[-1], False)
    assert np.array_equal(*results)


def test_threads_are_bounded_by_what_there_is() -> None:
    assert attention.use_threads(0) == 1
    assert attention.use_threads(10**6) == numba.config.NUMBA_NUM_THREADS


# ---- exp and what is made of it --------------------------------------------------------------------------------------


@numba.njit(fastmath={"reassoc", "contract", "nsz", "arcp"})
def exp_of_all_fast(x: Array, out: Array) -> None:
    for i in range(x.size):
        out[i] = vector.exp(x[i])


@numba.njit
def exp_of_all(x: Array, out: Array) -> None:
    for i in range(x.size):
        out[i] = vector.exp(x[i])


@pytest.mark.parametrize("kernel", [exp_of_all, exp_of_all_fast])
def test_exp_is_within_two_units_in_the_last_place(kernel: Any) -> None:
    # Every 997th float32 from -0 to -87, and a fine grid near the ends.
    least, most = (int(np.float32(end).view(np.int32)) for end in (-0.0, -87.0))
    x = np.arange(least, most + 1, 997).astype(np.int32).view(np.float32)
    x = np.concatenate([x, np.linspace(-87, 0, 100_001, dtype=np.float32)])
    found = np.empty_like(x)
    kernel(x, found)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(found - exact) / np.spacing(exact.astype(np.float32))).max() <= 2


@pytest.mark.parametrize("kernel", [exp_of_all, exp_of_all_fast])
@pytest.mark.parametrize(
    ("x", "expected"),
    [(0.0, 1.0), (-0.0, 1.0), (-87.00001, 0.0), (-1e30, 0.0), (-np.inf, 0.0), (np.nan, np.nan), (-np.nan, np.nan)],
)
def test_exp_at_the_ends_is_exact_wherever_in_a_vector(kernel: Any, x: float, expected: float) -> None:
    found = np.full(37, SENTINEL)
    kernel(np.full(37, x, np.float32), found)
    np.testing.assert_array_equal(found, np.full(37, expected, np.float32))


def test_exp_has_the_same_bits_in_every_kernel() -> None:
    x = np.linspace(-90, 0, 4099, dtype=np.float32)
    plain, fast = np.empty_like(x), np.empty_like(x)
    exp_of_all(x, plain)
    exp_of_all_fast(x, fast)
    assert np.array_equal(plain, fast)


EXTREMES = [0.0, -0.0, 1e-6, -1e-6, 0.5, -0.5, 20.0, -20.0, 80.0, -80.0, 100.0, -100.0, 1e30, -1e30]


def test_silu_holds_for_large_inputs_of_both_signs() -> None:
    line = np.array([*EXTREMES, np.nan], np.float32)
    x = np.stack([np.concatenate([[np.float32(7.0)], line, [np.float32(8.0)]])] * 2)
    out = np.empty((2, line.size), np.float32)
    pointwise.silu(x, 1, out)
    exact = torch.nn.functional.silu(torch.from_numpy(line).double()).numpy()
    # Below e⁻⁸⁷ the sigmoid is 0: 10⁻³⁶ is lost, no more.
    for row in out:
        np.testing.assert_allclose(row, exact, rtol=1e-6, atol=1e-35)


def test_silu_multiply_takes_gate_and_up_from_one_row() -> None:
    gate_up = normal(5, 2 * 21 + 3) * 30
    out = np.empty((5, 21), np.float32)
    pointwise.silu_multiply(gate_up, out)
    exact = torch.from_numpy(gate_up).double()
    exact = torch.nn.functional.silu(exact[:, :21]) * exact[:, 21:42]
    np.testing.assert_allclose(out, exact.numpy(), rtol=1e-6, atol=1e-12)


def test_log_sigmoid_is_precise_where_almost_nothing_is_forgotten() -> None:
    heads = np.array([18.0, 17.5, 30.0, 80.0, 1.0, 0.0, -1.0, -18.0, -200.0, np.inf, -np.inf], np.float32)
    x = np.full((2, 16), SENTINEL)
    x[:, : heads.size] = heads
    out = np.empty((2, heads.size), np.float32)
    pointwise.log_sigmoid(x, out)
    exact = -np.logaddexp(0.0, -heads.astype(np.float64))
    assert exact[0] == pytest.approx(-1.523e-8, rel=1e-3)
    for row in out:
        np.testing.assert_allclose(row, exact, rtol=3e-7)
    x[0, 2] = np.nan
    pointwise.log_sigmoid(x, out)
    assert np.argwhere(np.isnan(out)).tolist() == [[0, 2]]


# ---- norm and rotation -----------------------------------------------------------------------------------------------


def norm_module(size: int, eps: float) -> Any:
    module = Qwen3RMSNorm(size, eps=eps)
    with torch.no_grad():
        module.weight.copy_(torch.randn(size, generator=generator(9)))
    return module


@pytest.mark.parametrize("width", [1, 7, 64, 576])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_rms_norm_is_the_models(width: int, eps: float) -> None:
    module, x = norm_module(width, eps), normal(6, width)
    # Rows of every size, one of zeros: the epsilon decides there.
    x *= np.array([1, 1e-4, 1e4, 0, 1e-8, 3], np.float32)[:, None]
    out = np.empty_like(x)
    pointwise.rms_norm(x, module.weight.detach().numpy(), np.float32(eps), out)
    np.testing.assert_allclose(out, module(torch.from_numpy(x)).detach().numpy(), rtol=2e-6, atol=1e-12)
    x[2, 0] = np.nan
    pointwise.rms_norm(x, module.weight.detach().numpy(), np.float32(eps), out)
    assert np.isnan(out).any(1).tolist() == [False, False, True, False, False, False]


def turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As the models rotate a part of a head: [T, heads, D]."""
    size = cos.shape[1]
    front, _ = apply_rotary_pos_emb(states[None, :, :, :size], states[None, :, :, :size], cos[None], sin[None], 2)
    return torch.cat([front[0], states[..., size:]], -1)


@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize(("dim", "rotated"), [(8, 8), (16, 4), (80, 32), (64, 64)])
def test_rotate_takes_a_projection_apart_as_the_models_do(dim: int, rotated: int, has_norms: bool) -> None:
    tokens, query_heads, heads, rest = 5, 6, 2, 11
    projected = normal(tokens, (query_heads + 2 * heads) * dim + rest)
    angles = torch.randn(tokens, rotated // 2, generator=generator(3)) * 100
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
    query, key, value = (
        torch.from_numpy(projected)[:, : (query_heads + 2 * heads) * dim]
        .unflatten(1, (-1, dim))
        .split((query_heads, heads, heads), 1)
    )
    none = np.zeros(0, np.float32)
    query_norm, key_norm = none, none
    if has_norms:
        modules = norm_module(dim, 1e-5), norm_module(dim, 1e-5)
        modules[1].weight.data.neg_()
        query, key = (module(states).detach() for module, states in zip(modules, (query, key), strict=True))
        query_norm, key_norm = (module.weight.detach().numpy() for module in modules)
    shapes = ((tokens, query_heads, dim), (tokens, heads, dim), (tokens, heads, dim))
    out = [np.full(shape, SENTINEL) for shape in shapes]
    pointwise.rotate(projected, cos.numpy(), sin.numpy(), query_norm, key_norm, np.float32(1e-5), *out)
    for found, wanted in zip(out, (turned(query, cos, sin), turned(key, cos, sin), value), strict=True):
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=2e-6)


# ---- attention's corner ----------------------------------------------------------------------------------------------


def test_a_stream_without_entries_attends_to_nothing() -> None:
    pages = normal(4, 5, 16)
    out = np.full((1, 4, 16), SENTINEL)
    lengths = np.array([[[0, 3]]], np.int64)
    arena, first_page = np.array([2, 2, 2], np.int32), np.zeros((1, 1, 2), np.int64)
    places, query = np.zeros((4, 5), np.int32), normal(1, 4, 16, seed=1)
    attention.decode(
        *(pages, pages, places, arena, first_page, lengths, 0, query, np.zeros(1, np.int32)),
        *(np.float32(0.25), attention.NO_WINDOW, True, attention.use_threads(2), np.zeros(1, np.int64), out),
    )
    assert (out[0, :2] == 0).all()
    logits = torch.from_numpy(query[0, 2:] @ pages[2, :3].T) * 0.25
    np.testing.assert_allclose(out[0, 2:], (logits.softmax(-1).numpy() @ pages[2, :3]), rtol=1e-5, atol=1e-6)


# ---- compiled code and threads ---------------------------------------------------------------------------------------


def test_the_folder_of_compiled_kernels_is_named_after_their_sources(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("one = 1")
    first = cpu._cache_name(tmp_path)
    assert first == cpu._cache_name(tmp_path)
    (tmp_path / "b.py").write_text("two = 2")
    second = cpu._cache_name(tmp_path)
    (tmp_path / "b.py").write_text("two = 3")
    assert len({first, second, cpu._cache_name(tmp_path)}) == 3


def test_kernels_are_kept_there_and_numbas_setting_is_left_alone() -> None:
    sources = Path(cpu.__file__).parent
    for kernel in (linear.multiply, attention.decode, attention.prefill, pointwise.rotate):
        assert cpu._cache_name(sources) in Path(kernel.stats.cache_path).parts
    assert os.environ.get("NUMBA_CACHE_DIR", "") == numba.config.CACHE_DIR


def test_the_users_own_folder_for_numba_is_used_under_a_name_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    folder = cpu._cache_folder()
    assert folder.parent == tmp_path
    assert folder.is_dir()


def test_without_a_writable_cache_kernels_go_to_a_passing_folder_and_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setenv("TRIMKV_CACHE_HOME", str(tmp_path / "file" / "home"))
    with caplog.at_level(logging.WARNING):
        folder = cpu._cache_folder()
    (folder / "kernel").touch()
    assert "TRIMKV_CACHE_HOME" in caplog.text
    assert str(tmp_path / "file" / "home") in caplog.text


def run_python(program: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return result.stdout


def test_an_operator_without_openmp_is_told_what_to_install() -> None:
    program = "from trimkv_core.cpu.threads import threading_note; print(threading_note())"
    answer = run_python(program, NUMBA_THREADING_LAYER="workqueue")
    assert "libgomp1" in answer
    assert answer.count("\n") == 1


def test_torch_keeps_its_number_of_threads_when_numba_starts_its_own() -> None:
    program = (
        "import torch; from trimkv_core.cpu.attention import use_threads; from trimkv_core.cpu.threads import *;"
        "before = torch.get_num_threads(); use_threads(99); threading_note(); print(before, torch.get_num_threads())"
    )
    assert run_python(program, OMP_NUM_THREADS="1").split() == ["1", "1"]


def test_with_openmp_there_is_nothing_to_say() -> None:
    note = threading_note()
    if numba.threading_layer() == "workqueue":
        pytest.skip("no OpenMP here")
    assert note is None
