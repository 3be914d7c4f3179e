from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from trimkv_core.byte_ledger import decode_bytes, geometry_of, held_at_most, weigh_config

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
TINY = ["--tiny", "--backend", "torch"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark's scripts as the modules they import each other as."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("gpu")


def module(name: str) -> ModuleType:
    return import_module(name)


def table_of(text: str) -> list[list[str]]:
    """Cells of the Markdown table that `text` ends with, without its two header lines."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Standard output and JSON of one run, started as a person starts it."""
    output = tmp_path_factory.mktemp("gpu") / "gpu.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py"), *TINY, "--output", str(output)],
        env=environment | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, json.loads(output.read_text(encoding="utf-8"))


def test_every_row_is_there_with_a_number_or_a_reason(whole_run: tuple[str, dict[str, Any]]) -> None:
    _, report = whole_run
    rows = {row["name"]: row for row in report["rows"]}
    assert len(rows) == len(report["rows"])
    for part, count in {
        "copy bandwidth": 1,
        "matmul rate": 1,
        "decode, batch": 3,
        "decode step at 2,048 logical tokens ÷ at 64": 1,
        "eviction, share of decode time": 1,
        "memory reserved for a sequence": 1,
        "prefill, 96 tokens": 2,
        "transformers generate, full cache (sdpa)": 4,
        "trimkv 0.1.5": 1,
        "our decode kernel": 2,
        "FlashInfer's decode kernel": 2,
    }.items():
        assert sum(name.startswith(part) for name in rows) == count, part
    for row in rows.values():
        assert row["status"] in {"measured", "not run"}, row
        assert (row["value"] is None) == (row["status"] == "not run")
        assert row["note"]
        if row["status"] == "measured":
            assert row["value"] > 0
    not_run = {name for name, row in rows.items() if row["status"] == "not run"}
    assert all(name.startswith(("trimkv", "our decode kernel", "FlashInfer's")) for name in not_run)
    assert next(row for name, row in rows.items() if name.startswith("trimkv"))["note"].startswith("--upstream was not")


def test_shares_are_values_over_limits_and_judged_by_the_goals(whole_run: tuple[str, dict[str, Any]]) -> None:
    _, report = whole_run
    judged = [row for row in report["rows"] if row["status"] == "measured" and row["goal"]]
    assert len(judged) == 8
    for row in judged:
        bound = float(row["goal"].split()[1])
        assert row["is_met"] == (row["share"] <= bound if row["goal"].startswith("≤") else row["share"] >= bound)
        if row["limit"] is not None:
            assert row["share"] == pytest.approx(row["value"] / row["limit"])


def test_table_and_json_agree_and_the_table_comes_last(whole_run: tuple[str, dict[str, Any]]) -> None:
    text, report = whole_run
    cells = table_of(text)
    assert text.rstrip().endswith("|")
    assert len(cells) == len(report["rows"])
    for line, row in zip(cells, report["rows"], strict=True):
        assert line[0] == row["name"]
        assert line[5] == row["note"]
        if row["value"] is None:
            assert line[1] == row["status"]
        else:
            shown = float(line[1].removesuffix(row["unit"]).replace(",", ""))
            assert shown == pytest.approx(row["value"], rel=1e-3)
            if row["is_met"] is not None:
                assert line[4] == f"{row['goal']} {'met' if row['is_met'] else 'missed'}"
    assert text.startswith("device CPU")
    assert report["machine"]["torch"] == torch.__version__


def test_a_row_that_raises_is_reported_and_stops_no_other(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = module("gpu_rows")

    def fall_over(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of\nluck | today")

    monkeypatch.setattr(rows, "prefill_flops", fall_over)
    jobs = gpu.all_jobs

    def few(bench: Any, *, upstream: Path | None) -> list[Any]:
        kept = ("matmul", "prefill", "memory", "transformers generate, full cache (sdpa), 16 tokens, batch 1")
        return [job for job in jobs(bench, upstream=upstream) if job.name.startswith(kept)]

    monkeypatch.setattr(gpu, "all_jobs", few)
    output = tmp_path / "gpu.json"
    assert gpu.main([*TINY, "--output", str(output)]) == 0
    found = json.loads(output.read_text(encoding="utf-8"))["rows"]
    assert [row["status"] for row in found] == ["measured", "measured", "failed", "failed", "measured"]
    assert found[2]["note"] == "RuntimeError: out of luck | today"
    failed = table_of(capsys.readouterr().out)[2]
    assert failed[1] == "failed"
    assert failed[5] == "RuntimeError: out of luck / today"


def test_rows_that_no_longer_fit_the_time_are_named(gpu: Any) -> None:
    report = module("gpu_report")
    now = 0.0
    time = report.TimeBudget(60, clock=lambda: now)

    def measure() -> Any:
        nonlocal now
        now += 40
        return report.Measured(value=1.0, unit="")

    jobs = [report.Job(name, None, seconds, measure) for name, seconds in (("a", 30), ("b", 30), ("c", 10))]
    rows = report.run_jobs(jobs, time, clean_up=lambda: None)
    assert [row.status for row in rows] == ["measured", "skipped", "measured"]
    assert rows[1].note == "needs some 30 s, 20 s are left of --minutes"


def test_a_failed_model_fails_its_rows_and_the_eviction_row_says_so(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, report = module("gpu_rows"), module("gpu_report")

    def fall_over(*args: Any, **kwargs: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(rows, "build_model", fall_over)
    time = report.TimeBudget(60)
    bench = gpu.make_bench(gpu._parse(TINY), time)
    jobs = [job for job in rows.goal_jobs(bench) if job.name.startswith(("decode, batch", "eviction"))]
    found = report.run_jobs(jobs, time, clean_up=lambda: None)
    assert [row.status for row in found] == ["failed"] * 3 + ["not run"]
    assert found[-1].note == "no decode row was measured"


def test_the_driver_evicts_when_due_and_ages_sequences_without_changing_what_they_hold(gpu: Any) -> None:
    bench = gpu.make_bench(gpu._parse(TINY), module("gpu_report").TimeBudget(60))
    driver, budget = bench.driver, bench.budget(24)
    streams = driver.start(3, budget, tokens=64, distinct=2)
    table = driver.table
    assert [table.held(stream.row) for stream in streams] == [24 * 4] * 3
    old = driver.age(streams[:1], 2048)
    assert table.seen(old[0].row) == 2048
    assert torch.equal(table.lengths_of(old[0].row), table.lengths_of(streams[0].row))
    moved = table.positions_of(old[0].row, 0, 0) - table.positions_of(streams[0].row, 0, 0)
    assert set(moved.tolist()) <= {2048 - 64}
    run = driver.decode(streams, 8)
    assert len(run.step_seconds) == 8
    assert run.evictions == 3 * 2
    assert 0 < run.evict_seconds < run.seconds
    # A step finds 25 to 28 entries a stream: M = 24, one more each step, cut at 28.
    assert run.held == pytest.approx(26.5)
    driver.stop([*streams, *old])
    assert table.pool.num_used == 0
    table.check_invariants()


def test_the_full_sizes_are_those_of_the_goals(gpu: Any) -> None:
    sizes = module("gpu_sizes").Sizes()
    config = module("gpu_model").model_config(sizes)
    weights = weigh_config(config, dtype=torch.bfloat16, gates=module("gpu_model").gate_shape(sizes))
    assert weights.base_bytes == pytest.approx(8.0e9, rel=0.01)
    options = gpu._parse(TINY)
    bench = gpu.make_bench(options, module("gpu_report").TimeBudget(60))
    bench.sizes = sizes
    budget = bench.budget(sizes.memory_size)
    geometry = geometry_of(config, block_size=16, dtype=torch.bfloat16)
    step = decode_bytes(weights, geometry, budget, sequences=64, held=held_at_most(budget, sizes.long_tokens))
    assert step.sequence_bytes == pytest.approx(81e6, rel=0.02)
    names = [job.name for job in gpu.all_jobs(bench, upstream=None)]
    assert "decode, batch 4, M = 1024" in names
    assert "decode step at 131,072 logical tokens ÷ at 1,024, batch 16" in names
    seconds = sum(job.seconds for job in gpu.all_jobs(bench, upstream=Path("there")))
    assert seconds < 8 * 60


def test_the_stand_in_for_flash_attention_is_causal_attention_over_pages(gpu: Any) -> None:
    upstream = module("gpu_upstream")
    torch.manual_seed(0)
    keys, values = torch.randn(6, 4, 1, 8), torch.randn(6, 4, 1, 8)
    lengths = torch.tensor([7, 3], dtype=torch.int32)
    pages = torch.tensor([[5, 2], [0, 99]], dtype=torch.int32)
    query = torch.randn(2, 3, 2, 8)
    mixed = upstream.flash_attn_with_kvcache(
        query, keys, values, cache_seqlens=lengths, block_table=pages, softmax_scale=0.3, causal=True
    )
    assert mixed.shape == query.shape
    for nth, (length, listed) in enumerate(zip((7, 3), ([5, 2], [0]), strict=True)):
        key, value = (states[listed].flatten(0, 1)[:length, 0] for states in (keys, values))
        for token in range(3):
            seen = length - 2 + token
            expected = torch.softmax(0.3 * query[nth, token] @ key[:seen].T, -1) @ value[:seen]
            torch.testing.assert_close(mixed[nth, token], expected)
    one = upstream.flash_attn_with_kvcache(
        query[:, -1:], keys, values, cache_seqlens=lengths, block_table=pages, softmax_scale=0.3, causal=True
    )
    torch.testing.assert_close(one, mixed[:, -1:])


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_an_upstream_that_cannot_run_is_a_row_with_its_reason(gpu: Any, tmp_path: Path, folder: str) -> None:
    report = module("gpu_report")
    (tmp_path / "empty").mkdir()
    time = report.TimeBudget(120)
    bench = gpu.make_bench(gpu._parse(TINY), time)
    jobs = module("gpu_peers").peer_jobs(bench, upstream=tmp_path / folder)
    (row,) = report.run_jobs([job for job in jobs if job.name.startswith("trimkv")], time, clean_up=lambda: None)
    if folder == "nowhere":
        assert row.status == "not run"
        assert row.note.endswith("is not there")
    else:
        assert row.status == "failed"
        assert "No module named 'trimkv'" in row.note


INTERPRETED = """
import sys
import tests.kernels.conftest  # puts Triton into its interpreter, mended
sys.path.insert(0, "benchmarks")
import gpu, gpu_kernels, gpu_report
time = gpu_report.TimeBudget(60)
bench = gpu.make_bench(gpu._parse(["--tiny"]), time)
rows = gpu_report.run_jobs(gpu_kernels.kernel_jobs(bench)[:1], time, clean_up=lambda: None)
print(gpu_report.render({}, rows))
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: pip install triton==3.6.0")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: Triton compiles")
def test_our_kernels_row_is_measured_and_checked_against_attention() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ((name, measured, *_),) = table_of(done.stdout)
    assert name.startswith("our decode kernel")
    assert measured.endswith("TB/s")


def test_a_kernel_that_computes_something_else_has_no_result(gpu: Any) -> None:
    kernels, report = module("gpu_kernels"), module("gpu_report")
    bench = gpu.make_bench(gpu._parse(TINY), report.TimeBudget(60))
    bench.sizes = replace(bench.sizes, memory_size=40)
    ragged = kernels.make_ragged(bench, 2)
    pages = -(-ragged.lengths.long() // kernels.BLOCK_SIZE)
    assert int(pages.sum()) == ragged.arena.numel() == ragged.key.shape[0]
    assert float(ragged.lengths.float().mean()) == pytest.approx(42, rel=0.1)
    with pytest.raises(RuntimeError, match="differs by"):
        kernels._check(ragged, torch.zeros_like(ragged.query[0]), heads=2)


def test_without_a_gpu_it_says_what_runs_without_one(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as caught:
        gpu.main([])
    assert caught.value.code == 2
    assert "--tiny runs on a CPU" in capsys.readouterr().err
