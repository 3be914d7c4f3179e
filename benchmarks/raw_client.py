"""Many chat streams read as raw bytes, in a process of its own: the cheapest client there is. Run as a child process.

Owns the sockets, the count of events and the CPU time it took. Reads a job from a JSON file, writes timelines to
another. One thread, no HTTP library, no JSON: a piece of the answer is a marker in the bytes.

A token whose text is not decided yet (half a character) has no event of its own. So a stream's count of events is
scaled to the count of tokens that its usage ends with.
"""

from __future__ import annotations

import json
import re
import selectors
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from workload import Timeline

HOST = "127.0.0.1"
SILENCE_SECONDS = 600.0
RECEIVE_BYTES = 1 << 16
# Text cannot hold it: quotes in it are escaped.
PIECE = b'"delta":{"content":'
_USAGE = re.compile(rb'"prompt_tokens":(\d+),"completion_tokens":(\d+)')
_OK = re.compile(rb"HTTP/1\.1 200 ")
# What is kept of a stream's end: its usage lies within.
_END_BYTES = 2048


class StreamError(RuntimeError):
    """A stream that was no answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Where to send which bodies, all of them at once."""

    port: int
    bodies: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came back.

    Attributes:
        timelines: of the streams.
        prompt_tokens: of each stream, as the server counted them.
        cpu_seconds: of this process, from the first byte sent to the last received.
        wall_seconds: the same on the clock.
    """

    timelines: list[Timeline]
    prompt_tokens: list[int]
    cpu_seconds: float
    wall_seconds: float


class Reader:
    """One stream: counts pieces in the bytes as they come."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._counts: list[int] = []
        self._pieces = 0
        self._end = b""
        self._has_answer = False

    def take(self, data: bytes, seconds: float) -> None:
        """The next bytes, which came at `seconds`.

        Raises:
            StreamError: the answer's status is not 200.
        """
        if not self._has_answer:
            self._end += data
            if len(self._end) < len(b"HTTP/1.1 200 "):
                return
            if not _OK.match(self._end):
                raise StreamError(f"the server answered {self._end[:_END_BYTES]!r}")
            self._has_answer, data, self._end = True, self._end, b""
        # The bytes before may end with the beginning of a marker.
        found = (self._end[1 - len(PIECE) :] + data).count(PIECE)
        self._end = (self._end + data)[-_END_BYTES:]
        if found:
            self._pieces += found
            self._times.append(seconds)
            self._counts.append(self._pieces)

    def finish(self) -> tuple[Timeline, int]:
        """The whole stream: its timeline in tokens, and its prompt's tokens.

        Raises:
            StreamError: it ended without usage, or without text.
        """
        usages = _USAGE.findall(self._end)
        if not usages or not self._pieces:
            raise StreamError(f"a stream ended without usage or text: {self._end!r}")
        prompt_tokens, tokens = map(int, usages[-1])
        line = Timeline()
        for at, count in zip(self._times, self._counts, strict=True):
            line.note(at, max(round(count * tokens / self._pieces), 1))
        return line, prompt_tokens


def run(job: Job) -> Result:
    """Send all bodies, read all streams to their ends."""
    requests = [_request(body.encode()) for body in job.bodies]
    readers = [Reader() for _ in requests]
    with selectors.DefaultSelector() as selector:
        for reader in readers:
            connection = socket.create_connection((HOST, job.port), SILENCE_SECONDS)
            selector.register(connection, selectors.EVENT_READ, reader)
        keys = list(selector.get_map().values())
        cpu, start = time.process_time(), time.monotonic()
        for key, request in zip(keys, requests, strict=True):
            _socket(key).sendall(request)
        while selector.get_map():
            ready = selector.select(SILENCE_SECONDS)
            if not ready:
                raise StreamError(f"the server was silent for {SILENCE_SECONDS:.0f} s")
            now = time.monotonic() - start
            for key, _ in ready:
                data = _socket(key).recv(RECEIVE_BYTES)
                if data:
                    key.data.take(data, now)
                else:
                    selector.unregister(key.fileobj)
                    _socket(key).close()
        cpu, wall = time.process_time() - cpu, time.monotonic() - start
    streams = [reader.finish() for reader in readers]
    return Result(
        timelines=[line for line, _ in streams],
        prompt_tokens=[tokens for _, tokens in streams],
        cpu_seconds=cpu,
        wall_seconds=wall,
    )


def _request(body: bytes) -> bytes:
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _socket(key: selectors.SelectorKey) -> socket.socket:
    if not isinstance(key.fileobj, socket.socket):
        raise TypeError("only sockets are registered")
    return key.fileobj


def main(arguments: Sequence[str]) -> None:
    """`raw_client.py JOB.json RESULT.json`."""
    job_path, result_path = map(Path, arguments)
    job = Job(**json.loads(job_path.read_text(encoding="utf-8")))
    result_path.write_text(json.dumps(asdict(run(job))), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
