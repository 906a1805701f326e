from dataclasses import replace

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from coordinator.metrics import FAILURES, coordinator_registry
from coordinator.swarm import SwarmState
from coordinator.view import About


def scrape(state: SwarmState, about: About, now: float) -> dict[tuple[str, tuple], float]:
    """Sample values by name and sorted labels, as Prometheus reads them."""
    text = generate_latest(coordinator_registry(lambda: state, about, lambda: now, failures={"banned": 2})).decode()
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text) for sample in family.samples}


def test_every_figure_is_the_states(state: SwarmState, about: About, now: float) -> None:
    samples = scrape(state, about, now)
    assert {name: value for (name, labels), value in samples.items() if not labels} == {
        "covey_target_batch_size": 256, "covey_samples_total": 1500, "covey_peer_joins_total": 6, "covey_epoch": 7,
        "covey_epoch_samples": 64, "covey_samples_per_second": 40.0, "covey_group_size": 2, "covey_loss": 2.5}
    assert samples["covey_build_info", (("version", "0.1.0"),)] == 1
    for reason, value in {"left": 3, "lost": 1}.items():
        assert samples["covey_peer_departures_total", (("reason", reason),)] == value
    failures = {labels: value for (name, labels), value in samples.items() if name == "covey_auth_failures_total"}
    assert len(failures) == len(FAILURES)
    assert {labels: value for labels, value in failures.items() if value} == {(("reason", "banned"),): 2}
    for outcome, value in {"averaged": 5, "failed": 1, "alone": 2}.items():
        assert samples["covey_averaging_rounds_total", (("kind", "gradients"), ("outcome", outcome))] == value
    peers = {labels: value for (name, labels), value in samples.items() if name == "covey_peers"}
    assert len(peers) == 9
    assert {labels: value for labels, value in peers.items() if value} == {
        (("mode", "direct"), ("state", "training")): 1, (("mode", "client"), ("state", "starting")): 1}


def test_an_old_reading_tells_nothing_of_now(state: SwarmState, about: About, now: float) -> None:
    names = {name for name, _ in scrape(state, about, now + 31)}
    assert names == {"covey_build_info", "covey_target_batch_size", "covey_samples_total", "covey_peer_joins_total",
                     "covey_peer_departures_total", "covey_averaging_rounds_total", "covey_auth_failures_total"}


def test_a_loss_that_nobody_knows_is_absent(state: SwarmState, about: About, now: float) -> None:
    assert not any(name == "covey_loss" for name, _ in scrape(replace(state, peers={}), about, now))


def test_names_and_labels_keep_the_conventions(state: SwarmState, about: About, now: float) -> None:
    text = generate_latest(coordinator_registry(lambda: state, about, lambda: now, failures={"banned": 2})).decode()
    for family in text_string_to_metric_families(text):
        assert family.documentation.endswith(".")
        for sample in family.samples:
            assert sample.name.startswith("covey_")
            assert sample.name.endswith("_total") == (family.type == "counter")
            assert set(sample.labels) <= {"version", "reason", "kind", "outcome", "state", "mode"}
