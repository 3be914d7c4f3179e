"""The dashboards as files: made by build.py, in one piece, and of nothing that does not exist. No Grafana runs here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest
import yaml

from tests.deploy.dashboards import FLEET_GAUGES, GRAFANA, NAMES, load, queries
from tests.service.contract import COUNTERS, GAUGES, HISTOGRAMS

KNOWN = {f"trimkv_{name}" for name in (*GAUGES, *COUNTERS)}
KNOWN |= {f"trimkv_{name}" for name in FLEET_GAUGES}
KNOWN |= {f"trimkv_{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "sum", "count")}
METRIC = re.compile(r"\b(?:(?:instance|job):)?trimkv_\w+(?::\w+)?")


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((GRAFANA.parent / "prometheus/rules.yml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def recorded() -> set[str]:
    return {rule["record"] for rule in rules() if "record" in rule}


def test_the_files_are_what_the_script_makes() -> None:
    script = "import build, json, sys; json.dump(build.render(), sys.stdout)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=GRAFANA, capture_output=True, text=True, timeout=60, check=True
    )
    made = json.loads(done.stdout)
    assert {path.name for path in (GRAFANA / "dashboards").iterdir()} == made.keys()
    for name, text in made.items():
        assert (GRAFANA / "dashboards" / name).read_text(encoding="utf-8") == text, "run deploy/grafana/build.py"


def provisioned() -> dict[str, Any]:
    path = GRAFANA / "provisioning/datasources/prometheus.yaml"
    (source,) = yaml.safe_load(path.read_text(encoding="utf-8"))["datasources"]
    found: dict[str, Any] = source
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_panel_asks_the_provisioned_source_and_says_what_it_shows(name: str) -> None:
    source, board = {"type": "prometheus", "uid": provisioned()["uid"]}, load(name)
    assert board["uid"].startswith("trimkv-")
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len(panels) >= 10
    for panel in panels:
        assert panel["datasource"] == source
        assert all(target["datasource"] == source for target in panel["targets"])
        assert panel["targets"]
        assert panel["title"]
        assert panel["description"].endswith(".")
    for variable in board["templating"]["list"]:
        assert variable["datasource"] == source


@pytest.mark.parametrize("name", NAMES)
def test_panels_lie_side_by_side_without_covering_each_other(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    identifiers = set()
    for panel in load(name)["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells
        identifiers.add(panel["id"])
    assert len(identifiers) == len(load(name)["panels"])


def test_dashboards_ask_for_nothing_that_does_not_exist() -> None:
    for query in queries(rate_interval="1m"):
        names = set(METRIC.findall(query.expression))
        assert names <= KNOWN | recorded(), str(query)


def test_rules_ask_for_nothing_that_does_not_exist() -> None:
    for rule in rules():
        assert set(METRIC.findall(rule["expr"])) <= KNOWN | recorded(), rule


def test_a_number_is_that_of_this_moment() -> None:
    """Over a span Grafana shows the last number there was, however long ago."""
    for panel in (panel for name in NAMES for panel in load(name)["panels"]):
        if panel["type"] in ("stat", "table"):
            assert all(target["instant"] and not target["range"] for target in panel["targets"]), panel["title"]


def test_every_recorded_series_is_shown_or_watched() -> None:
    shown = " ".join(query.expression for query in queries(rate_interval="1m"))
    watched = " ".join(rule["expr"] for rule in rules() if "alert" in rule)
    for name in recorded():
        assert name in shown or name in watched, name
