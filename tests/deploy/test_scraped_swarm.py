"""A swarm of real processes, scraped by the real Prometheus: what it stores is what the peers and the coordinator say.

Two peers train up to known epochs. Midway their workers are stopped for a moment, so that figures stand still while
they are compared; once both have left, so do the coordinator's. They leave one after the other: of two who leave at
once, each may wait for the other's answer until it is too late to tell the coordinator.
"""

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
import yaml
from processes import until
from prometheus_server import Samples, Server, needs_prometheus, prometheus, sample_name
from swarm import Covey, Swarm
from truth import Volunteer, coordinators_truth

from proto.peer_pb2 import PeerStatus

DEPLOY = Path(__file__).parents[2] / "deploy"
LAST_EPOCHS = {"ada": 12, "grace": 15}
ROUNDS_BEFORE = 3  # that both average together before they are stopped for the first comparison
REMEMBERED = "averaging.report_progress_expiration=20"  # on a busy machine, a last record is read late
VARIABLES = {"$swarm": "tiny", "$peer": ".*", "$__rate_interval": "10s"}
EXPRESSIONS = [target["expr"] for panel in json.loads((DEPLOY / "grafana" / "swarm.json").read_text())["panels"]
               for target in panel.get("targets", [])]
ALERTS = re.findall(r"alert: (\w+)", (DEPLOY / "prometheus" / "alerts.yml").read_text())
pytestmark = [needs_prometheus, pytest.mark.timeout(300)]


@dataclass(frozen=True)
class Seen:
    """What is told of one process, and what was scraped from it at that time."""

    told: Samples
    scraped: Samples


@dataclass(frozen=True)
class Story:
    """The swarm's, until both peers have left."""

    server: Server
    coordinator: Covey
    midway: dict[str, Seen]      # while both workers stood still, by who it is of
    pages: list[str]             # /metrics of all three at that time
    last: list[PeerStatus]       # each peer's, at its end
    afterwards: Seen             # of the coordinator, once both have left


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("scraped")
    swarm = Swarm(folder, overrides=[REMEMBERED], flags=["--evaluate"], archive_every_epochs=4)
    try:
        coordinator = swarm.coordinator()
        joined = {name: swarm.join("--stop-at-epoch", str(last), "--checkpoint-every-epochs", "2", name=name)
                  for name, last in LAST_EPOCHS.items()}
        pair = [Volunteer(covey, folder / name) for name, covey in joined.items()]
        with prometheus(configuration(folder, coordinator, pair), folder) as server:
            yield tell(server, coordinator, pair)
    finally:
        swarm.close()


def tell(server: Server, coordinator: Covey, pair: list[Volunteer]) -> Story:
    url = coordinator.all("ready")[0]["metrics_url"]
    where = urlsplit(url).netloc

    def coordinators() -> Samples:
        with urlopen(f"http://{where}/api/swarm", timeout=10) as answer:
            return coordinators_truth(json.load(answer))

    for volunteer in pair:
        volunteer.covey.wait_for("round", ROUNDS_BEFORE, kind="gradients", outcome="averaged", group_size=2)
    for volunteer in pair:
        volunteer.worker.suspend()
    midway = {volunteer.covey.log.stem: at_rest(server, volunteer.instance, volunteer.truth) for volunteer in pair}
    midway["coordinator"] = at_rest(server, where, coordinators)
    pages = [page(each) for each in (url, *(volunteer.url for volunteer in pair))]
    for volunteer in pair:
        volunteer.worker.resume()
    last = [volunteer.left() for volunteer in pair]
    until(lambda: not any(value for name, value in coordinators().items() if name.startswith("covey_peers")),
          "the coordinator knows that both have left")
    return Story(server, coordinator, midway, pages, last, at_rest(server, where, coordinators))


def at_rest(server: Server, instance: str, tell: Callable[[], Samples]) -> Seen:
    """What it tells, and what was scraped between two times that it told the same."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        before, since = tell(), time.time()
        until(lambda: server.last_scrape(instance) > since, f"{instance} is scraped")  # noqa: B023 - called at once
        scraped = server.scraped(instance)
        if before == tell():
            return Seen(before, scraped)
    pytest.fail(f"{instance} does not come to rest")


def configuration(folder: Path, coordinator: Covey, pair: list[Volunteer]) -> Path:
    """The one in deploy/, for these targets, every second."""
    document = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    document["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    document["rule_files"] = [str(DEPLOY / "prometheus" / name) for name in document["rule_files"]]
    targets = {"covey-coordinator": [urlsplit(coordinator.all("ready")[0]["metrics_url"]).netloc],
               "covey-peer": [volunteer.instance for volunteer in pair]}
    for job in document["scrape_configs"]:
        job["static_configs"] = [{"targets": targets[job["job_name"]], "labels": {"swarm": "tiny"}}]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(document))
    return path


def page(url: str) -> str:
    with urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


@pytest.mark.parametrize("name", ["ada", "grace"])
def test_what_is_stored_of_a_peer_is_what_it_says_itself(name: str, story: Story) -> None:
    seen = story.midway[name]
    assert seen.scraped == seen.told
    averaged = sample_name("covey_averaging_rounds_total", kind="gradients", outcome="averaged")
    assert seen.scraped[averaged] >= ROUNDS_BEFORE
    assert seen.scraped[sample_name("covey_checkpoint_last_success_timestamp_seconds")] > 0


@pytest.mark.parametrize("when", ["midway", "afterwards"])
def test_what_is_stored_of_the_swarm_is_what_the_coordinator_says(when: str, story: Story) -> None:
    seen = story.midway["coordinator"] if when == "midway" else story.afterwards
    assert seen.scraped == seen.told


def test_the_swarms_sums_are_those_of_its_peers(story: Story) -> None:
    stored = story.afterwards.scraped
    assert stored[sample_name("covey_epoch")] == max(LAST_EPOCHS.values())
    assert stored[sample_name("covey_samples_total")] == sum(status.step.samples_total for status in story.last)
    for outcome in ("averaged", "failed", "alone"):
        assert stored[sample_name("covey_averaging_rounds_total", kind="gradients", outcome=outcome)] == sum(
            getattr(status.rounds, outcome) for status in story.last)
    departures = [stored[sample_name("covey_peer_departures_total", reason=reason)] for reason in ("left", "lost")]
    assert departures[0] == 2
    assert stored[sample_name("covey_peer_joins_total")] == sum(departures)


def test_both_peers_were_counted_while_they_trained(story: Story) -> None:
    assert max(story.server.over_time('covey_peers{state="training", mode="direct"}')) == 2


@pytest.mark.parametrize("number", range(3), ids=["coordinator", "ada", "grace"])
def test_promtool_has_nothing_to_say_about_a_page(number: int, story: Story) -> None:
    done = subprocess.run(["promtool", "check", "metrics"], input=story.pages[number], capture_output=True, text=True,
                          check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_rule_is_loaded_and_healthy(story: Story) -> None:
    rules = [rule for group in story.server.ask("rules")["groups"] for rule in group["rules"]]
    assert [rule["name"] for rule in rules] == ALERTS
    assert {rule["health"] for rule in rules} == {"ok"}
    assert not [rule for rule in rules if rule.get("lastError")]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_expression_of_the_dashboard_returns_data(expression: str, story: Story) -> None:
    for variable, value in VARIABLES.items():
        expression = expression.replace(variable, value)
    assert "$" not in expression
    assert any(isfinite(value) for value in story.server.over_time(expression))


def test_the_alert_follows_the_coordinators_death(story: Story) -> None:
    def states(name: str) -> set[str]:
        return {alert["state"] for alert in story.server.ask("alerts")["alerts"]
                if alert["labels"]["alertname"] == name}

    assert not states("CoveyCoordinatorDown")
    story.coordinator.signal(signal.SIGKILL)
    story.coordinator.process.wait()
    until(lambda: [each["value"][1] for each in story.server.now('up{job="covey-coordinator"}')] == ["0"], "it is down")
    until(lambda: states("CoveyCoordinatorDown"), "the alert waits for its time")
