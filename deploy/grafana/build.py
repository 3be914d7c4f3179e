"""Writes `dashboards/*.json`: three dashboards out of the service's metrics and of `deploy/prometheus/rules.yml`.

    python deploy/grafana/build.py

Change a panel here, never in the JSON: tests/deploy/test_grafana.py compares the two, and
tests/deploy/test_prometheus.py asks every query of a real Prometheus.
"""

from __future__ import annotations

import json
from pathlib import Path

from instances import instances
from kv_cache import kv_cache
from overview import overview

FOLDER = Path(__file__).parent / "dashboards"
DASHBOARDS = {"overview": overview, "kv-cache": kv_cache, "instances": instances}


def render() -> dict[str, str]:
    """The text of every file in `dashboards/`, by its name."""
    return {
        f"{name}.json": json.dumps(make(), indent=2, ensure_ascii=False) + "\n" for name, make in DASHBOARDS.items()
    }


def main() -> None:
    """Write them."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in render().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
