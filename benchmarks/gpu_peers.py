"""Other systems in the same run: `transformers` with its full cache, and the public `trimkv` in a process of its own.

Owns how they are run and which limit they are held against. Knows nothing of this project's engine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_model import build_plain_model
from gpu_report import Job, Measured, NotRun
from gpu_rows import Bench
from gpu_timing import Clock
from transformers import StoppingCriteria, StoppingCriteriaList

from trimkv_core.budget import Budget
from trimkv_core.byte_ledger import decode_bytes, geometry_of, held_at_most, tokens_per_second_limit, weigh_model

UPSTREAM_SECONDS = 150.0
STAND_IN = "its flash-attn is a stand-in over PyTorch's varlen attention"


class _Marks(StoppingCriteria):  # type: ignore[misc]
    """Stops nothing: notes when each token was there."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.marks: list[Any] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.marks.append(self._clock.mark())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class PeerModel:
    """A plain `transformers` model, built when a row first needs it and let go behind the last one."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._model: Any = None

    @property
    def model(self) -> Any:
        """The model; ours is let go for it."""
        if self._model is None:
            self._bench.let_go()
            self._model = build_plain_model(self._bench.sizes, device=self._bench.device, dtype=self._bench.dtype)
        return self._model

    def let_go(self) -> None:
        """Free it."""
        self._model = None


def peer_jobs(bench: Bench, *, upstream: Path | None) -> list[Job]:
    """A row for every context and batch of `transformers`, and for every case of `trimkv`."""
    sizes, factor, peer = bench.sizes, bench.sizes.seconds_factor, PeerModel(bench)
    jobs = []
    for context in sizes.full_cache_contexts:
        for batch in sizes.full_cache_batches:
            seconds = (5 + batch * context / 16_384) * factor
            name = f"transformers generate, full cache (sdpa), {context:,} tokens, batch {batch}"
            jobs.append(Job(name, None, seconds, partial(_full_cache, bench, peer, batch=batch, context=context)))
    for batch, memory, tokens in sizes.upstream_cases:
        name = f"trimkv 0.1.5, batch {batch}, M = {memory}, {tokens:,} tokens"
        case = {"batch": batch, "memory_size": memory, "prompt_tokens": tokens}
        seconds = 60 * factor if upstream else 0
        jobs.append(Job(name, None, seconds, partial(_upstream, bench, peer, folder=upstream, case=case)))
    return jobs


def _full_cache(bench: Bench, peer: PeerModel, *, batch: int, context: int) -> Measured:
    sizes, model = bench.sizes, peer.model
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, model.config.vocab_size, (batch, context), generator=generator).to(bench.device)
    clock = Clock(bench.device)

    def generate(tokens: int) -> list[Any]:
        noted = _Marks(clock)
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([noted]),
        )
        return noted.marks

    with torch.inference_mode():
        if context == sizes.full_cache_contexts[0]:
            generate(2)  # what only a first call takes
        marks = generate(sizes.full_cache_tokens + 1)
    seconds = clock.seconds(marks[0], marks[-1]) / (len(marks) - 1)
    held = context + sizes.full_cache_tokens / 2
    geometry = geometry_of(model.config, block_size=16, dtype=bench.dtype)
    step = decode_bytes(weigh_model(model), geometry, Budget.dense(), sequences=batch, held=held)
    rate, limit = batch / seconds, tokens_per_second_limit(step, bench.bandwidth)
    return Measured(
        value=rate,
        unit="tokens/s",
        limit=limit,
        share=rate / limit,
        note=f"{seconds * 1e3:.3g} ms a step, decode alone; the limit is that of a full cache",
    )


def _upstream(bench: Bench, peer: PeerModel, *, folder: Path | None, case: dict[str, int]) -> Measured:
    if folder is None:
        raise NotRun("--upstream was not given: a folder or virtual environment with trimkv 0.1.5")
    if not folder.exists():
        raise NotRun(f"--upstream={folder} is not there")
    bench.let_go()
    peer.let_go()
    sizes = bench.sizes
    job = case | {
        "model": sizes.model | {"rope_theta": sizes.rope_theta},
        "gate_width": sizes.gate_width,
        "buffer_size": sizes.buffer_size,
        "new_tokens": 2 * sizes.buffer_size,
        "device": str(bench.device),
        "dtype": str(bench.dtype).removeprefix("torch."),
    }
    result = _run_child(folder, job, seconds=max(min(UPSTREAM_SECONDS, bench.time.left), 1.0))
    budget = bench.budget(case["memory_size"])
    # The limit is ours: what it is given to do is the same.
    geometry = geometry_of(bench.config, block_size=16, dtype=bench.dtype)
    held = held_at_most(budget, case["prompt_tokens"])
    step = decode_bytes(bench.weights, geometry, budget, sequences=case["batch"], held=held)
    rate, limit = case["batch"] / result["step_seconds"], tokens_per_second_limit(step, bench.bandwidth)
    return Measured(
        value=rate,
        unit="tokens/s",
        limit=limit,
        share=rate / limit,
        note=f"{result['step_seconds'] * 1e3:.3g} ms a step, compressions included; transformers "
        f"{result['transformers']}; {STAND_IN} ({result['attention']})",
    )


def _run_child(folder: Path, job: dict[str, Any], *, seconds: float) -> dict[str, Any]:
    """Run one case in a process with `folder` on its path, or with the interpreter of the environment it is."""
    interpreter = folder / "bin" / "python"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if interpreter.exists():
        command = [str(interpreter)]
    else:
        command = [sys.executable]
        environment["PYTHONPATH"] = str(folder.resolve())
    script = Path(__file__).with_name("gpu_upstream.py")
    with tempfile.TemporaryDirectory(prefix="gpu-") as scratch:
        job_path, result_path = Path(scratch) / "job.json", Path(scratch) / "result.json"
        job_path.write_text(json.dumps(job), encoding="utf-8")
        done = subprocess.run(
            [*command, str(script), str(job_path), str(result_path)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=seconds,
            check=False,
        )
        if done.returncode or not result_path.exists():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"trimkv's process ended with status {done.returncode}: {last}")
        result: dict[str, Any] = json.loads(result_path.read_text(encoding="utf-8"))
        return result
