"""The real nginx with the shipped configuration, before replicas of a test's own."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.deploy.debian import program
from tests.service.live import wait_for

SHIPPED = Path(__file__).parents[2] / "docker/nginx"
LISTEN = "listen 8080;"


@dataclass(frozen=True, slots=True)
class Proxy:
    """A running nginx."""

    url: str
    folder: Path

    def log(self) -> list[dict[str, Any]]:
        """Its access log, a line for each request that has ended."""
        return [json.loads(line) for line in (self.folder / "access.log").read_text().splitlines()]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def is_listening(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@contextlib.contextmanager
def nginx(replicas: Sequence[str]) -> Iterator[Proxy]:
    """Start nginx before `replicas` (URLs), as the compose file does, and stop it.

    Two things differ from what is shipped: the port it listens on, and the addresses in replicas.conf, which Docker's
    DNS gives there (with a parameter that Debian's nginx does not know yet).
    """
    binary, port = program("nginx", package="nginx-light"), free_port()
    configuration = (SHIPPED / "nginx.conf").read_text(encoding="utf-8")
    assert configuration.count(LISTEN) == 1
    with tempfile.TemporaryDirectory(prefix="trimkv-nginx-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # its workers are another user's, where root starts it
        (folder / "nginx.conf").write_text(configuration.replace(LISTEN, f"listen 127.0.0.1:{port};"))
        shipped = (SHIPPED / "replicas.conf").read_text(encoding="utf-8")
        (line,) = [line for line in shipped.splitlines() if not line.startswith("#")]
        lines = [
            line.replace("trimkv:8000", replica.removeprefix("http://")).replace(" resolve", "") for replica in replicas
        ]
        (folder / "replicas.conf").write_text("\n".join(lines) + "\n")
        command = [binary, "-p", f"{folder}/", "-c", f"{folder}/nginx.conf", "-e", "stderr", "-g", "daemon off;"]
        with (folder / "access.log").open("w") as out, (folder / "error.log").open("w") as error:
            process = subprocess.Popen(command, stdout=out, stderr=error)
        try:
            wait_for(lambda: is_listening(port) or process.poll() is not None, "nginx", 20)
            assert process.poll() is None, (folder / "error.log").read_text()
            yield Proxy(f"http://127.0.0.1:{port}", folder)
        finally:
            process.terminate()
            process.wait(timeout=20)
