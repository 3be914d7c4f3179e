"""The CPU benchmark: its ratios, its windows, the client that counts bytes, and the engine stepped by hand."""

from __future__ import annotations

import itertools
import json
import socket
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from service.api.knobs import Caps, resolve_budget
from service.api.sampling import resolve_sampling
from service.api.schemas import parse_chat_request

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CHUNK = 16


def module(name: str) -> Any:
    return import_module(name)


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Any:
    """The benchmark's scripts import each other by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


# ---- the table of goals ------------------------------------------------------------------------------------------


def row(system: str, *, prompt: int, prefill: float | None, decode: float | None, concurrency: int = 16) -> Any:
    return module("workload").Row(
        system=system,
        concurrency=concurrency,
        prompt_tokens=prompt,
        new_tokens=32,
        prefill_tokens_per_second=prefill,
        decode_tokens_per_second=decode,
        first_token_seconds_mean=1.0,
        first_token_seconds_last=2.0,
        kv_bytes=1,
        note="",
    )


def numbers(**changed: Any) -> Any:
    """A run that meets every goal, each at its very bound."""
    goals = module("serve_cpu_goals")
    rows = [
        row(goals.STATIC, prompt=4096, prefill=100.0, decode=10.0),
        row("trimkv-serve, budget 128", prompt=4096, prefill=1.0, decode=1.0, concurrency=1),
        row("trimkv-serve, budget 128", prompt=4096, prefill=300.0, decode=100.0),
        row("trimkv-serve, dense", prompt=4096, prefill=1.0, decode=1.0),
        row(goals.STATIC, prompt=512, prefill=100.0, decode=100.0),
        row("trimkv-serve, dense", prompt=512, prefill=120.0, decode=200.0),
    ]
    found = {
        "rows": rows,
        "matmuls": goals.Matmuls(decode_ms={1: 10.0, 16: 20.0}, chunk_rows=512, chunk_ms=100.0),
        "alone": goals.Alone(decode_ms={1: 18.0, 16: 36.0}, chunk_ms=160.0, tokens_per_second=1000.0),
        "http": goals.Http(tokens_per_second=950.0, client_cpu_seconds=0.25, wall_seconds=8.0),
    }
    return goals.Numbers(**(found | changed))


def ratios(**changed: Any) -> list[Any]:
    goals = module("serve_cpu_goals")
    found: list[Any] = goals.find_ratios(numbers(**changed), goals.Sizes())
    return found


def test_the_goals_are_the_issues_and_are_met_at_their_bounds() -> None:
    assert [(str(ratio.goal), ratio.verdict) for ratio in ratios()] == [
        ("≤ 1.8", "met"),
        ("≤ 1.8", "met"),
        ("≤ 1.6", "met"),
        ("≥ 10", "met"),
        ("≥ 3", "met"),
        ("≥ 2", "met"),
        ("≥ 1.2", "met"),
        ("≥ 0.95", "met"),
    ]


def test_a_little_past_its_bound_every_goal_is_missed() -> None:
    goals = module("serve_cpu_goals")
    worse = numbers()
    slower = [
        row(line.system, prompt=line.prompt_tokens, prefill=factor * 1e2, decode=factor * 1e2)
        for line, factor in zip(worse.rows[1::4], (2.99, 1.19), strict=True)
    ]
    static = [line for line in worse.rows if line.system == goals.STATIC]
    found = ratios(
        rows=[*static, *slower],
        alone=goals.Alone(decode_ms={1: 18.1, 16: 36.1}, chunk_ms=161.0, tokens_per_second=1001.0),
    )
    by_name = {ratio.what: ratio.verdict for ratio in found}
    met = [name for name, verdict in by_name.items() if verdict == "met"]
    # At 299 tokens/s beside a static batch at 10 decoding goes on to meet its goal, in that one line.
    assert met == ["16 × 4,096 tokens at M = 128 ÷ transformers, static batch: decode"]
    assert set(by_name.values()) == {"met", "missed"}


@pytest.mark.parametrize(
    ("left_out", "lines"),
    [
        ({"matmuls": None}, [0, 1, 2]),
        ({"alone": None}, [0, 1, 2, 7]),
        ({"http": None}, [7]),
        ({"rows": []}, [3, 4, 5, 6]),
    ],
)
def test_what_was_not_measured_is_said_where_it_is_missing(left_out: dict[str, Any], lines: list[int]) -> None:
    found = ratios(**left_out)
    assert [index for index, ratio in enumerate(found) if ratio.verdict == "not measured"] == lines
    text = module("serve_cpu_goals").render_goals(found).splitlines()[2:]
    assert [index for index, line in enumerate(text) if "not measured" in line] == lines
    assert all(found[index].measured == "not measured" for index in lines)


def test_a_size_or_a_rate_that_is_missing_leaves_its_own_line_unmeasured() -> None:
    goals = module("serve_cpu_goals")
    rows = [*numbers().rows[1:], row(goals.STATIC, prompt=4096, prefill=100.0, decode=None)]
    matmuls = goals.Matmuls(decode_ms={1: 10.0}, chunk_rows=512, chunk_ms=100.0)
    verdicts = [ratio.verdict for ratio in ratios(rows=rows, matmuls=matmuls)]
    assert verdicts == ["met", "not measured", "met", "not measured", "met", "met", "met", "met"]


def test_a_line_shows_both_numbers_and_the_clients_cpu_time() -> None:
    text = module("serve_cpu_goals").render_goals(ratios())
    assert "| 1.80 (18.0 ÷ 10.0 ms) | ≤ 1.8 | met |" in text
    assert "16 sequences of 512 tokens at M = 128 ÷ bare matmuls of 16 rows" in text
    assert "0.95 (950.0 ÷ 1,000.0 tokens/s; client: 0.25 s of CPU time in 8.0 s)" in text


def test_a_default_run_measures_every_budget_at_both_lengths() -> None:
    options, runs, work = module("serve_cpu")._parse([]), module("serve_cpu_runs"), module("workload")
    assert (options.concurrency, options.prompt_tokens) == ([1, 16], [512, 4096])
    for length in options.prompt_tokens:
        assert runs._budgets(options, work.Cell(16, length, 32)) == [64, 128, 256, 0]


# ---- windows -----------------------------------------------------------------------------------------------------


def timeline(*notes: tuple[float, int]) -> Any:
    line = module("workload").Timeline()
    for seconds, tokens in notes:
        line.note(seconds, tokens)
    return line


def test_decode_counts_from_the_last_streams_first_token_to_the_first_streams_last() -> None:
    work = module("workload")
    early = timeline((1.0, 1), (2.0, 2), (3.0, 3), (4.0, 4), (5.0, 5))
    late = timeline((3.0, 1), (4.0, 2), (5.0, 3), (6.0, 4), (7.0, 5))
    assert work.decode_rate(work.Cell(2, 10, 5), [early, late]) == pytest.approx(4 / 2.0)
    assert work.decode_rate(work.Cell(3, 10, 5), [early, late]) is None
    assert work.decode_rate(work.Cell(2, 10, 5), [early, work.Timeline()]) is None


def test_streams_that_never_decode_together_have_no_rate() -> None:
    work = module("workload")
    lines = [timeline((1.0, 1), (2.0, 2)), timeline((3.0, 1), (4.0, 2))]
    assert work.decode_rate(work.Cell(2, 10, 2), lines) is None


def test_prefill_counts_to_the_last_first_token() -> None:
    work = module("workload")
    lines = [timeline((1.0, 1), (9.0, 2)), timeline((4.0, 1))]
    assert work.prefill_rate(work.Cell(2, 100, 2), lines) == pytest.approx(200 / 4.0)


def test_several_runs_become_one_line_by_the_median_of_each_number() -> None:
    work = module("workload")
    runs = [
        row("a", prompt=512, prefill=3.0, decode=None),
        row("a", prompt=512, prefill=1.0, decode=8.0),
        row("a", prompt=512, prefill=2.0, decode=4.0),
    ]
    one = work.median_row(runs)
    assert (one.prefill_tokens_per_second, one.decode_tokens_per_second, one.runs) == (2.0, 6.0, 3)
    assert (one.prompt_tokens, one.new_tokens, one.first_token_seconds_last) == (512, 32, 2.0)


@pytest.mark.parametrize(("seconds", "times"), [(0.5, 3), (3600.0, 1)])
def test_only_short_runs_are_repeated(monkeypatch: pytest.MonkeyPatch, seconds: float, times: int) -> None:
    work, clock = module("workload"), [0.0]
    monkeypatch.setattr(work.time, "monotonic", lambda: clock[0])

    def measure() -> float:
        clock[0] += seconds
        return clock[0]

    assert work.repeat_while_short(measure) == [seconds * number for number in range(1, times + 1)]


# ---- the client that counts bytes --------------------------------------------------------------------------------

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null}],"usage":null}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":%d,"total_tokens":0}}\n\n'


def piece(text: str) -> bytes:
    return b'data: {"choices":[{"index":0,"delta":{"content":%s},"logprobs":null}]}\n\n' % json.dumps(text).encode()


def chunked(*events: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in (*events, b""))


@pytest.mark.parametrize("size", [1, 7, 64, 4096])
def test_pieces_are_counted_however_the_bytes_are_cut(size: int) -> None:
    events = [ROLE, piece("a"), piece('"delta":{"content":'), piece("c"), USAGE % 3, b"data: [DONE]\n\n"]
    stream = HEAD + chunked(*events)
    reader = module("raw_client").Reader()
    for number, start in enumerate(range(0, len(stream), size)):
        reader.take(stream[start : start + size], float(number))
    line, prompt_tokens = reader.finish()
    assert (line.tokens[-1], prompt_tokens) == (3, 7)
    if size == 1:
        assert line.tokens == [1, 2, 3]
        marker = module("raw_client").PIECE
        assert line.seconds[0] == stream.index(marker) + len(marker) - 1


def test_tokens_without_a_piece_of_their_own_are_counted_with_their_neighbours() -> None:
    reader = module("raw_client").Reader()
    reader.take(HEAD + chunked(ROLE, piece("a"))[:-5], 1.0)
    reader.take(chunked(piece("b"), USAGE % 4), 2.0)
    line, _ = reader.finish()
    assert (line.seconds, line.tokens) == ([1.0, 2.0], [2, 4])


def test_an_answer_that_is_an_error_or_breaks_off_is_not_counted() -> None:
    raw = module("raw_client")
    with pytest.raises(raw.StreamError, match="503"):
        raw.Reader().take(b"HTTP/1.1 503 Service Unavailable\r\n\r\n", 0.0)
    broken = raw.Reader()
    broken.take(HEAD + chunked(ROLE, piece("a")), 0.0)
    with pytest.raises(raw.StreamError, match="without usage"):
        broken.finish()


def test_the_client_reads_all_streams_and_says_what_it_cost(tmp_path: Path) -> None:
    raw, bodies = module("raw_client"), ['{"n": 1}', '{"n": 22}', '{"n": 333}']
    with socket.create_server(("127.0.0.1", 0)) as listener:
        asked: list[bytes] = []

        def serve() -> None:
            connections = [listener.accept()[0] for _ in bodies]
            for connection in connections:  # nobody is answered before all have asked
                asked.append(connection.recv(1 << 16))
            for connection in connections:
                connection.sendall(HEAD + chunked(ROLE, piece("a"), piece("b"), USAGE % 2))
                connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        job, result = tmp_path / "job.json", tmp_path / "result.json"
        job.write_text(json.dumps({"port": listener.getsockname()[1], "bodies": bodies}), encoding="utf-8")
        raw.main([str(job), str(result)])
        thread.join(10)
    assert [request.partition(b"\r\n\r\n")[2].decode() for request in asked] == bodies
    got = json.loads(result.read_text(encoding="utf-8"))
    assert [line["tokens"] for line in got["timelines"]] == [[2]] * 3
    assert got["prompt_tokens"] == [7] * 3
    assert 0 <= got["cpu_seconds"] <= got["wall_seconds"] + 0.1


# ---- bare matmuls ------------------------------------------------------------------------------------------------


def test_bare_matmuls_are_every_product_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = module("bare_matmuls")
    calls: list[tuple[int, tuple[int, ...], int]] = []
    real = bare.F.linear

    def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        calls.append((x.shape[0], tuple(weight.shape), weight.data_ptr()))
        return real(x, weight)

    monkeypatch.setattr(bare.F, "linear", linear)
    layer, head = [[40, 24], [24, 24], [96, 24], [24, 48]], [64, 24]
    job = {
        "dtype": "bfloat16",
        "threads": torch.get_num_threads(),
        "layers": 2,
        "layer": layer,
        "head": head,
        "decode_rows": [1, 3],
        "chunk_rows": 32,
    }
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    bare.main([str(tmp_path / "job.json"), str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert len(result["decode_ms"]) == 2
    assert min(*result["decode_ms"], result["chunk_ms"]) > 0
    step = 2 * len(layer) + 1
    steps = [calls[start : start + step] for start in range(0, len(calls), step)]
    for rows, head_rows, runs in ((1, 1, bare.DECODE_RUNS), (3, 3, bare.DECODE_RUNS), (32, 1, bare.CHUNK_RUNS)):
        mine = [one for one in steps if one[0][0] == rows]
        assert len(mine) == runs + bare.WARM_UP_RUNS
        for one in mine:
            assert [shape for _, shape, _ in one] == [*map(tuple, layer * 2), tuple(head)]
            assert [count for count, _, _ in one] == [rows] * (step - 1) + [head_rows]
            assert len({address for _, _, address in one}) == step


# ---- the engine stepped by hand ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> Any:
    flags = ["--model", "embedded", "--dtype", "float32", "--kv-memory", "256MiB", "--prefill-chunk", str(CHUNK)]
    return module("engine_alone").Engine(flags, budget=8)


def prompts(count: int, tokens: int) -> list[list[int]]:
    return [[100 + 7 * number + step for step in range(tokens)] for number in range(count)]


def test_the_engine_alone_is_asked_for_what_goes_through_http(engine: Any) -> None:
    work = module("workload")
    prompt = work.Prompt(({"role": "user", "content": "Hello"},), (1, 2, 3))
    body = module("http_streams").chat_body("embedded", prompt, new_tokens=9, kv_budget=8, counts_tokens=False)
    fields = parse_chat_request(body.encode())
    assert engine.budget == resolve_budget(fields, engine.info, Caps())
    asked = resolve_sampling(fields, engine.info, max_tokens=9, max_tokens_field="max_tokens")
    assert module("engine_alone").greedy(9) == asked


def test_the_engine_alone_measures_steps_chunks_and_streams(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, sizes = module("engine_alone"), []
    monkeypatch.setattr(alone, "Engine", lambda flags, budget: engine)
    forward = engine._core.runner.forward
    monkeypatch.setattr(
        engine._core.runner, "forward", lambda feeds: sizes.append([len(f.token_ids) for f in feeds]) or forward(feeds)
    )
    job = {
        "flags": [],
        "threads": torch.get_num_threads(),
        "budget": 8,
        "decode_sequences": [1, 3],
        "prompts": prompts(3, 2 * CHUNK),
        "chunk_prompt": prompts(1, 2 * CHUNK)[0],
        "stream_prompts": prompts(5, CHUNK),
        "stream_new_tokens": 8,
    }
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    alone.main([str(tmp_path / "job.json"), str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert min(*result["decode_ms"], result["chunk_ms"], result["tokens_per_second"]) > 0
    assert (result["dtype"], len(result["decode_ms"]), result["runs"]) == ("float32", 2, 3)
    timed = module("workload").WINDOWS * engine.budget.buffer_size
    assert sizes.count([1, 1, 1]) >= timed
    assert sizes.count([1, 1, 1, 1, 1]) >= 3  # five streams decode together in every one of three runs
    assert sizes[-2 * alone.CHUNK_RUNS :] == [[CHUNK]] * (2 * alone.CHUNK_RUNS)
    assert not engine._core.scheduler.has_work


def test_streams_alone_have_a_token_a_step_on_one_clock(engine: Any) -> None:
    lines = engine.streams(prompts(2, CHUNK), new_tokens=5)
    assert [line.tokens for line in lines] == [[1, 2, 3, 4, 5]] * 2
    first, second = (line.seconds for line in lines)
    assert first[1:] == second[:-1]  # the second was prefilled while the first decoded
    assert all(earlier < later for earlier, later in itertools.pairwise(first))


def test_a_prompt_that_is_not_two_chunks_is_refused(engine: Any) -> None:
    with pytest.raises(RuntimeError, match="not half of them"):
        engine.chunk_ms(prompts(1, 3 * CHUNK)[0])
