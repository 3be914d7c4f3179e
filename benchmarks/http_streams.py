"""A `trimkv-serve` of its own, and chat streams against it with the time of every token.

Owns the server's process and the clients' threads. Knows nothing of how the numbers are used.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from workload import Prompt, Timeline

HOST = "127.0.0.1"
START_SECONDS = 600.0
STREAM_SECONDS = 3600.0
LOG_TAIL = 4000


class ServeError(RuntimeError):
    """The server did not start, or did not answer as it should."""


class ServerProcess:
    """`trimkv-serve` in a child process; use it as a context manager.

    Attributes:
        model: the name it serves its model by.
        dtype: number format it chose.
        info: labels of its `model_info` metric.
    """

    def __init__(self, *, flags: Sequence[str], log_path: Path, environment: dict[str, str]) -> None:
        self._log_path = log_path
        self._flags = list(flags)
        self._environment = os.environ | environment
        self.port = _free_port()
        self.model = ""
        self.info: dict[str, str] = {}

    @property
    def dtype(self) -> str:
        return self.info["dtype"].removeprefix("torch.")

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "service.cli", "--host", HOST, "--port", str(self.port), *self._flags]
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=self._environment)
        try:
            self._wait_until_ready()
            self.model = json.loads(self._get("/v1/models"))["data"][0]["id"]
            self.info = _model_info(self._get("/metrics").decode())
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServeError(f"trimkv-serve ended with status {self._process.returncode}:\n{self._log_end()}")
            try:
                self._get("/health/ready")
                return
            except (OSError, ServeError):
                time.sleep(0.5)
        raise ServeError(f"trimkv-serve was not ready after {START_SECONDS:.0f} s:\n{self._log_end()}")

    def _get(self, path: str) -> bytes:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=60)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        if answer.status != http.client.OK:
            raise ServeError(f"GET {path} answered {answer.status}: {body[:300]!r}")
        return body

    def _log_end(self) -> str:
        return self._log_path.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL:]

    def _stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def run_streams(
        self, prompts: Sequence[Prompt], *, new_tokens: int, kv_budget: int
    ) -> tuple[list[Timeline], list[dict[str, int]]]:
        """All `prompts` at once, each a stream of its own.

        Returns:
            Their timelines, and their `usage.kv`.
        """
        streams = [_Stream(self, prompt, new_tokens=new_tokens, kv_budget=kv_budget) for prompt in prompts]
        gate = threading.Barrier(len(streams) + 1)
        start: list[float] = []
        threads = [threading.Thread(target=stream.run, args=(gate, start), daemon=True) for stream in streams]
        for thread in threads:
            thread.start()
        start.append(time.monotonic())
        gate.wait()
        for thread in threads:
            thread.join()
        failures = [stream.failure for stream in streams if stream.failure is not None]
        if failures:
            raise ServeError(f"{len(failures)} of {len(streams)} streams failed: {failures[0]}\n{self._log_end()}")
        return [stream.timeline for stream in streams], [stream.kv for stream in streams]


def chat_body(model: str, prompt: Prompt, *, new_tokens: int, kv_budget: int, counts_tokens: bool) -> str:
    """A greedy, streamed chat completion of exactly `new_tokens` tokens, as JSON.

    Args:
        model: the name it is served by.
        prompt: its messages.
        new_tokens: how long the answer is.
        kv_budget: M; 0 is dense.
        counts_tokens: whether every chunk says how many tokens there are so far, or only the last how many there were.
    """
    options = {"include_usage": True} | ({"continuous_usage_stats": True} if counts_tokens else {})
    return json.dumps(
        {
            "model": model,
            "messages": list(prompt.messages),
            "temperature": 0,
            "max_tokens": new_tokens,
            "min_tokens": new_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": options,
            "kv_budget": kv_budget,
        }
    )


class _Stream:
    """One chat completion, read on its own thread."""

    def __init__(self, server: ServerProcess, prompt: Prompt, *, new_tokens: int, kv_budget: int) -> None:
        self._port = server.port
        self._prompt_tokens = len(prompt.ids)
        self._new_tokens = new_tokens
        body = chat_body(server.model, prompt, new_tokens=new_tokens, kv_budget=kv_budget, counts_tokens=True)
        self._body = body.encode()
        self.timeline = Timeline()
        self.kv: dict[str, int] = {}
        self.failure: Exception | None = None

    def run(self, gate: threading.Barrier, start: Sequence[float]) -> None:
        try:
            self._run(gate, start)
        except Exception as error:  # it is raised where the threads are joined
            self.failure = error

    def _run(self, gate: threading.Barrier, start: Sequence[float]) -> None:
        connection = http.client.HTTPConnection(HOST, self._port, timeout=STREAM_SECONDS)
        connection.connect()
        gate.wait()
        try:
            connection.request("POST", "/v1/chat/completions", self._body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != http.client.OK:
                raise ServeError(f"status {answer.status}: {answer.read(1000)!r}")
            for line in answer:
                if line.startswith(b"data: {"):
                    self._take(json.loads(line[6:]), time.monotonic() - start[0])
        finally:
            connection.close()
        if not self.kv:
            raise ServeError("the stream ended without usage")

    def _take(self, chunk: dict[str, Any], seconds: float) -> None:
        if "error" in chunk:
            raise ServeError(chunk["error"]["message"])
        usage = chunk.get("usage")
        if not usage:
            return
        self.timeline.note(seconds, usage["completion_tokens"])
        if "kv" not in usage or not usage["kv"]:
            return
        self.kv = usage["kv"]
        asked, got = (self._prompt_tokens, self._new_tokens), (usage["prompt_tokens"], usage["completion_tokens"])
        if asked != got:
            raise ServeError(f"asked for {asked} prompt and new tokens, the server counted {got}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


def _model_info(metrics: str) -> dict[str, str]:
    for line in metrics.splitlines():
        if line.startswith("trimkv_model_info{"):
            return dict(re.findall(r'(\w+)="([^"]*)"', line))
    raise ServeError("GET /metrics has no trimkv_model_info")
