from dataclasses import replace

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from averaging.records import Refusals
from coordinator.credit_ledger import Leaderboard
from coordinator.metrics import ANEW, FAILURES, coordinator_registry
from coordinator.swarm import SwarmState
from coordinator.view import About, Seen


def scrape(state: SwarmState, about: About, now: float, before: SwarmState = ANEW) -> dict[tuple[str, tuple], float]:
    """Sample values by name and sorted labels, as Prometheus reads them."""
    registry = coordinator_registry(lambda: Seen(state, leaderboard=Leaderboard(samples=1200, flagged=3)), about,
                                    lambda: now, failures={"banned": 2}, before=before)
    text = generate_latest(registry).decode()
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text) for sample in family.samples}


def test_every_figure_is_the_states(state: SwarmState, about: About, now: float) -> None:
    samples = scrape(state, about, now)
    assert {name: value for (name, labels), value in samples.items() if not labels} == {
        "covey_target_batch_size": 256, "covey_samples_total": 1500, "covey_peer_joins_total": 6, "covey_epoch": 7,
        "covey_epoch_samples": 64, "covey_samples_per_second": 40.0, "covey_group_size": 2, "covey_loss": 2.5,
        "covey_credited_samples": 1200, "covey_flagged_claims": 3}
    assert samples["covey_build_info", (("version", "0.1.0"),)] == 1
    for reason, value in {"left": 3, "lost": 1}.items():
        assert samples["covey_peer_departures_total", (("reason", reason),)] == value
    failures = {labels: value for (name, labels), value in samples.items() if name == "covey_auth_failures_total"}
    assert len(failures) == len(FAILURES)
    assert {labels: value for labels, value in failures.items() if value} == {(("reason", "banned"),): 2}
    for outcome, value in {"averaged": 5, "failed": 1, "alone": 2}.items():
        assert samples["covey_averaging_rounds_total", (("kind", "gradients"), ("outcome", outcome))] == value
    for outcome, seconds, rounds in (("averaged", 12.5, 5), ("failed", 30.0, 1)):
        labels = (("kind", "gradients"), ("outcome", outcome))
        assert samples["covey_averaging_duration_seconds_sum", labels] == seconds
        assert samples["covey_averaging_duration_seconds_count", labels] == rounds
    for reason, value in {"value": 3, "absent": 1, "message": 0}.items():
        assert samples["covey_rejected_contributions_total", (("reason", reason),)] == value
    peers = {labels: value for (name, labels), value in samples.items() if name == "covey_peers"}
    assert len(peers) == 9
    assert {labels: value for labels, value in peers.items() if value} == {
        (("mode", "direct"), ("state", "training")): 1, (("mode", "client"), ("state", "starting")): 1}


def test_an_old_reading_tells_nothing_of_now(state: SwarmState, about: About, now: float) -> None:
    names = {name for name, _ in scrape(state, about, now + 31)}
    assert names == {"covey_build_info", "covey_target_batch_size", "covey_samples_total", "covey_peer_joins_total",
                     "covey_peer_departures_total", "covey_averaging_rounds_total", "covey_auth_failures_total",
                     "covey_averaging_duration_seconds_sum", "covey_averaging_duration_seconds_count",
                     "covey_rejected_contributions_total", "covey_credited_samples", "covey_flagged_claims"}


def test_counters_begin_at_0_with_the_process_though_the_swarms_do_not(
        state: SwarmState, about: About, now: float) -> None:
    later = replace(state, joins=state.joins + 1, lost=state.lost + 1, counters=replace(
        state.counters, samples=1600, refused=Refusals(value=4, absent=1)))
    counted = {name: value for name, value in scrape(later, about, now, before=state).items()
               if name[0].endswith(("_total", "_sum", "_count")) and value and name[0] != "covey_auth_failures_total"}
    assert counted == {("covey_samples_total", ()): 100, ("covey_peer_joins_total", ()): 1,
                       ("covey_peer_departures_total", (("reason", "lost"),)): 1,
                       ("covey_rejected_contributions_total", (("reason", "value"),)): 1}


def test_a_loss_that_nobody_knows_is_absent(state: SwarmState, about: About, now: float) -> None:
    assert not any(name == "covey_loss" for name, _ in scrape(replace(state, peers={}), about, now))


def test_names_and_labels_keep_the_conventions(state: SwarmState, about: About, now: float) -> None:
    registry = coordinator_registry(lambda: Seen(state), about, lambda: now, failures={"banned": 2})
    text = generate_latest(registry).decode()
    for family in text_string_to_metric_families(text):
        assert family.documentation.endswith(".")
        for sample in family.samples:
            assert sample.name.startswith("covey_")
            assert sample.name.endswith("_total") == (family.type == "counter")
            assert set(sample.labels) <= {"version", "reason", "kind", "outcome", "state", "mode"}
