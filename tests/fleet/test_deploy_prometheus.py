"""Scrape configuration, rules and dashboard: whole, tested, and about metrics that exist."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migrator.fleet.controller_metrics import ControllerMetrics
from migrator.metrics import Metrics

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy/prometheus"
DASHBOARD = ROOT / "deploy/grafana/migrator.json"
# Of Prometheus itself and of the node exporter.
OTHERS = {"up", "node_filesystem_avail_bytes", "node_filesystem_size_bytes"}


def exported() -> set[str]:
    """The names of all time series that our programs export."""
    names = set()
    for family in (*Metrics().registry.collect(), *ControllerMetrics().registry.collect()):
        names.add(family.name)
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ())
        names.update(family.name + suffix for suffix in suffixes)
    return names


def named(expression: str) -> set[str]:
    """The metrics that an expression of PromQL names: selectors, no functions, labels or texts."""
    plain = re.sub(r'"[^"]*"', '""', expression)
    plain = re.sub(r"\b(by|without|ignoring|on|group_left|group_right)\s*\(([^)]*)\)", " ", plain)
    plain = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", plain)
    words = re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*(?!\s*\()\b", plain)
    known = {"or", "and", "unless", "offset", "m", "h", "s", "group_left", "group_right", "bool", "vector", "on"}
    return {word for word in words if word not in known and not re.search(rf"\b{re.escape(word)}\s*\(", plain)}


def dashboard_queries() -> Iterator[tuple[str, str]]:
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def rule_queries() -> list[str]:
    """The expressions of all rules, as Prometheus itself prints them."""
    text = (FOLDER / "migrator.rules.yml").read_text()
    return re.findall(r"expr: (?:>\n((?: {10,}.*\n)+)|(.*))", text)  # type: ignore[return-value]


def test_names_are_found_in_an_expression_and_nothing_else() -> None:
    expression = 'sum by (le, x) (rate(a_bucket{b="c d"}[5m])) / ignoring (p) group_left e offset 15m > 0 or up == 0'
    assert named(expression) == {"a_bucket", "e", "up"}


@pytest.mark.parametrize(("panel", "expression"), list(dashboard_queries()))
def test_a_panel_shows_only_metrics_that_are_exported(panel: str, expression: str) -> None:
    names = named(expression)
    assert names, panel
    assert names <= exported() | OTHERS, panel


def test_prometheus_understands_every_panel(tmp_path: Path) -> None:
    lines = ["groups: [{name: panels, rules: ["]
    for number, (_, expression) in enumerate(dashboard_queries()):
        plain = expression.replace("$__rate_interval", "5m").replace("$instance", ".*")
        lines.append(f"{{record: 'p{number}', expr: {json.dumps(plain)}}},")
    (tmp_path / "panels.yml").write_text("\n".join([*lines, "]}]"]))
    done = subprocess.run(["promtool", "check", "rules", f"{tmp_path}/panels.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_metric_that_is_exported_is_on_the_dashboard() -> None:
    shown = set().union(*(named(expression) for _, expression in dashboard_queries()))
    stems = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in shown}
    families = (*Metrics().registry.collect(), *ControllerMetrics().registry.collect())
    assert {family.name for family in families} <= stems


def test_the_rules_are_about_metrics_that_exist() -> None:
    queries = ["".join(found) for found in rule_queries()]
    assert len(queries) == 11
    for query in queries:
        names = named(query)
        assert names and names <= exported() | OTHERS, query


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "migrator.rules.yml"),
        ("test", "rules", "migrator.test.yml"),
        ("check", "config", "prometheus.yml"),
    ],
)
def test_promtool_finds_nothing_wrong(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test_and_a_runbook_that_is_there() -> None:
    rules, tests = (FOLDER / "migrator.rules.yml").read_text(), (FOLDER / "migrator.test.yml").read_text()
    alerts = set(re.findall(r"alert: (\w+)", rules))
    assert alerts and alerts == set(re.findall(r"alertname: (\w+)", tests))
    runbooks = re.findall(r"runbook: (\S+)", rules)
    assert len(runbooks) == len(alerts)
    assert all((ROOT / runbook).is_file() for runbook in runbooks)


def test_the_dashboard_has_no_two_panels_in_one_place_and_none_that_is_empty() -> None:
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text())
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["type"] == "row" or panel["targets"]
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    assert {variable["name"] for variable in dashboard["templating"]["list"]} == {"datasource", "instance"}
