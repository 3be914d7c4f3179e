"""Prometheus' configuration, rules and their unit tests, by its own promtool; every alert has its runbook paragraph."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import yaml

from tests.deploy.debian import program
from tests.deploy.prometheus import PACKAGE, SHIPPED

RUNBOOK = SHIPPED.parent / "runbook.md"


def promtool(*arguments: str) -> None:
    done = subprocess.run(
        [program("promtool", package=PACKAGE), *arguments],
        cwd=SHIPPED,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((SHIPPED / "rules.yml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


def test_the_configuration_is_valid() -> None:
    promtool("check", "config", "prometheus.yml")


def test_rules_do_what_their_unit_tests_say() -> None:
    promtool("test", "rules", "rules_test.yml")


def test_every_alert_is_tested_where_it_fires_and_where_it_does_not() -> None:
    cases = yaml.safe_load((SHIPPED / "rules_test.yml").read_text(encoding="utf-8"))["tests"]
    tried = [case for test in cases for case in test.get("alert_rule_test", ())]
    names = {alert["alert"] for alert in alerts()}
    assert {case["alertname"] for case in tried if case.get("exp_alerts")} == names
    assert {case["alertname"] for case in tried if not case.get("exp_alerts")} == names


def test_every_alert_has_a_paragraph_in_the_runbook_and_says_where() -> None:
    sections = re.split(r"^## ", RUNBOOK.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    paragraphs = dict(section.split("\n", 1) for section in sections)
    assert paragraphs.keys() == {alert["alert"] for alert in alerts()}
    assert all(len(paragraph.split()) > 30 for paragraph in paragraphs.values())
    for alert in alerts():
        assert alert["annotations"]["runbook"] == f"deploy/runbook.md#{alert['alert'].lower()}"
        assert alert["annotations"]["summary"]
        assert alert["labels"]["severity"] in ("info", "warning", "critical")
