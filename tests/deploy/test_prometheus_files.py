"""What `deploy/` has for Prometheus and Grafana, as their tools and the code see it."""

import json
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import yaml
from prometheus_server import needs_prometheus

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "swarm.json"
ALERTS = [rule for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
          for rule in group["rules"]]
EXPECTED = [expected for test in yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
            for expected in test["promql_expr_test"]]


def promtool(*arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_the_configuration_and_its_rules_are_valid() -> None:
    promtool("check", "config", "prometheus.yml")


@needs_prometheus
def test_every_alert_fires_when_it_should_and_only_then() -> None:
    promtool("test", "rules", "alerts_test.yml")


@pytest.mark.parametrize("alert", [rule["alert"] for rule in ALERTS])
def test_the_tests_of_an_alert_have_it_fire_and_not(alert: str) -> None:
    of_it = [bool(expected["exp_samples"]) for expected in EXPECTED if f'"{alert}"' in expected["expr"]]
    assert set(of_it) == {True, False}


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_is_the_matter_and_what_to_do(rule: dict) -> None:
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert all(rule["annotations"][text].endswith(".") for text in ("summary", "description"))


def names_in(text: str) -> set[str]:
    """Metrics that a text speaks of; a histogram's by its own name."""
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\bcovey_[a-z0-9_]+\b", text)}


@pytest.mark.parametrize("path", [PROMETHEUS / "alerts.yml", DASHBOARD], ids=lambda path: path.name)
def test_nothing_is_asked_for_that_no_metric_is_called(path: Path) -> None:
    known = set(re.findall(r"^\| `(covey_\w+)`", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE))
    asked = names_in(path.read_text())
    assert asked
    assert asked <= known


def test_the_dashboard_can_be_imported_and_provisioned() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["id"] is None
    assert dashboard["uid"]
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource", "swarm", "peer"]
    targets = [target for panel in dashboard["panels"] for target in panel.get("targets", [])]
    assert {target["datasource"]["uid"] for target in targets} == {"${datasource}"}
    assert set(Counter(panel["id"] for panel in dashboard["panels"]).values()) == {1}


def test_no_panel_of_the_dashboard_lies_on_another() -> None:
    cells = Counter((x, y) for panel in json.loads(DASHBOARD.read_text())["panels"] for place in [panel["gridPos"]]
                    for x in range(place["x"], place["x"] + place["w"])
                    for y in range(place["y"], place["y"] + place["h"]))
    assert set(cells.values()) == {1}
    assert max(x for x, _ in cells) < 24
