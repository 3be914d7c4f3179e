"""The shipped dashboards: their panels, and their queries as Prometheus is asked them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GRAFANA = Path(__file__).parents[2] / "deploy/grafana"
NAMES = ("overview", "kv-cache", "instances")
# What the door of a fleet has besides, without the prefix `trimkv_`.
FLEET_GAUGES = ("replica_info", "fleet_figures_age_seconds")


@dataclass(frozen=True, slots=True)
class Query:
    """One query of one panel, with Grafana's variables filled in."""

    dashboard: str
    panel: str
    expression: str
    is_instant: bool

    def __str__(self) -> str:
        return f"{self.dashboard}: {self.panel}: {self.expression}"


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GRAFANA / f"dashboards/{name}.json").read_text(encoding="utf-8"))
    return found


def queries(*, rate_interval: str) -> list[Query]:
    """Every query of every panel of every dashboard."""
    filled_in = {"$__rate_interval": rate_interval, "$instance": ".*", "$job": "trimkv"}
    found = []
    for name in NAMES:
        for panel in load(name)["panels"]:
            for target in panel.get("targets", ()):
                expression = target["expr"]
                for variable, value in filled_in.items():
                    expression = expression.replace(variable, value)
                found.append(Query(name, panel["title"], expression, target["instant"]))
    return found
