"""The real Prometheus with the shipped configuration, scraping servers of a test's own."""

from __future__ import annotations

import contextlib
import math
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.deploy.dashboards import Query
from tests.deploy.debian import program
from tests.deploy.proxy import free_port
from tests.service.live import wait_for

SHIPPED = Path(__file__).parents[2] / "deploy/prometheus"
PACKAGE = "prometheus"


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A running Prometheus."""

    url: str

    def get(self, path: str, **parameters: Any) -> Any:
        """The data of an API answer."""
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def range(self, expression: str, *, start: float, end: float) -> list[Any]:
        """The series of `expression`, a value a second."""
        found: list[Any] = self.get("query_range", query=expression, start=start, end=end, step=1)["result"]
        return found

    def now(self, expression: str) -> list[Any]:
        found: list[Any] = self.get("query", query=expression)["result"]
        return found

    def answer(self, query: Query, *, start: float, end: float) -> list[Any]:
        """The series of a panel's query, as Grafana asks for them."""
        if query.is_instant:
            return self.now(query.expression)
        return self.range(query.expression, start=start, end=end)

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self.get("rules")["groups"] for rule in group["rules"]]

    def catch_up(self) -> None:
        """Wait until every service was scraped twice, so that a rate sees the end, and then every rule evaluated."""

        def are_scraped() -> bool:
            times = [float(each["value"][1]) for each in self.now('timestamp(up{job="trimkv"})')]
            return min(times, default=0.0) > asked

        def are_evaluated() -> bool:
            return all(datetime.fromisoformat(rule["lastEvaluation"]).timestamp() > scraped for rule in self.rules())

        for _ in range(2):
            asked = time.time()
            wait_for(are_scraped, "a scrape of every service", 30)
        scraped = time.time()
        wait_for(are_evaluated, "an evaluation of every rule", 30)


def has_values(series: list[Any]) -> bool:
    """Whether any sample of any series is a number."""
    samples = [sample for each in series for sample in each.get("values") or [each["value"]]]
    return any(not math.isnan(float(value)) for _, value in samples)


@contextlib.contextmanager
def scraping(replicas: Sequence[str], folder: Path) -> Iterator[Prometheus]:
    """Start Prometheus on `replicas` (URLs), and stop it.

    What differs from the shipped configuration: where the targets come from, which is Docker's DNS there, and that
    three seconds pass between two scrapes and one between two evaluations. A scrape may wait two for a step's end.
    """
    binary, port = program("prometheus", package=PACKAGE), free_port()
    configuration = yaml.safe_load((SHIPPED / "prometheus.yml").read_text(encoding="utf-8"))
    configuration["global"] = {"scrape_interval": "3s", "scrape_timeout": "3s", "evaluation_interval": "1s"}
    configuration["rule_files"] = [str(SHIPPED / name) for name in configuration["rule_files"]]
    (service, itself) = configuration["scrape_configs"]
    assert service.pop("dns_sd_configs")
    service["static_configs"] = [{"targets": [replica.removeprefix("http://") for replica in replicas]}]
    itself["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration), encoding="utf-8")
    command = [
        binary,
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    running = Prometheus(f"http://127.0.0.1:{port}")

    def is_ready() -> bool:
        assert process.poll() is None, (folder / "prometheus.log").read_text()
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{running.url}/-/ready", timeout=5).status_code == 200
        return False

    try:
        wait_for(is_ready, "Prometheus", 60)
        yield running
    finally:
        process.terminate()
        process.wait(timeout=30)
