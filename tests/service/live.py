"""A real `trimkv-serve` process on a real port."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
from openai import AsyncOpenAI, OpenAI

_START_SECONDS = 240
_LISTENING = re.compile(r"listening on (http://\S+?),")


@dataclass
class Live:
    """A running server."""

    url: str
    process: subprocess.Popen[str]
    lines: list[str]

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300)

    @property
    def async_client(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300)

    def kv(self) -> dict[str, Any]:
        result: dict[str, Any] = httpx.get(f"{self.url}/v1/kv", timeout=60).json()
        return result

    def metrics(self) -> str:
        return httpx.get(f"{self.url}/metrics", timeout=60).text

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    """Look again and again until `condition` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come true within {seconds:.0f} s")
        time.sleep(0.02)


@contextlib.contextmanager
def serving(*flags: str, **environment: str) -> Iterator[Live]:
    """Start `trimkv-serve`, wait until it is ready, and stop it at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "service.cli", "--port", "0", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
    )
    live = Live("", process, [])

    def read() -> None:
        assert process.stdout is not None
        live.lines.extend(line for line in process.stdout if not _note(line, live))

    threading.Thread(target=read, daemon=True).start()
    try:
        wait_for(lambda: bool(live.url) or process.poll() is not None, "a port", _START_SECONDS)

        def is_ready() -> bool:
            if process.poll() is not None:
                raise AssertionError("the server ended:\n" + "".join(live.lines))
            return httpx.get(f"{live.url}/health/ready", timeout=60).status_code == 200

        wait_for(is_ready, "readiness", _START_SECONDS)
        yield live
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()


def _note(line: str, live: Live) -> bool:
    """Keep every line, and the address out of the one that names it."""
    found = _LISTENING.search(line)
    if found:
        live.url = found.group(1)
    return False
