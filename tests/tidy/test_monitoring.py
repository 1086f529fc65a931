"""Alert rules and dashboard name metrics that there are, and every metric is used by one of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from cloudsave.cli.metrics import GAUGES, STATE

FOLDER = Path(__file__).parents[2] / "docs/monitoring"
NAMES = {*GAUGES, STATE}


def named(expressions: list[str]) -> set[str]:
    return {name for one in expressions for name in re.findall(r"cloudsave_\w+", one)}


def rules() -> list[str]:
    groups = yaml.safe_load((FOLDER / "prometheus-rules.yml").read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


def panels() -> list[str]:
    board = json.loads((FOLDER / "grafana-dashboard.json").read_text())
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def test_rules_and_dashboard_name_metrics_that_are_served() -> None:
    assert rules()
    assert panels()
    assert named(rules()) - NAMES == set()
    assert named(panels()) - NAMES == set()


def test_every_metric_is_shown_or_alarmed() -> None:
    assert NAMES - named([*rules(), *panels()]) == {
        "cloudsave_seconds_behind",
        "cloudsave_stored_log_objects",
    }
