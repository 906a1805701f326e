"""A peer's metrics follow its worker's events."""

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from peer.metrics import BAD_VALUES, PeerMetrics
from proto.peer_pb2 import PeerStatus, WorkerEvent


def step(samples_total: int) -> WorkerEvent:
    return WorkerEvent(step=WorkerEvent.Step(epoch=3, samples_total=samples_total, swarm_samples=48, loss=2.5,
                                             samples_per_second=10))


def started() -> WorkerEvent:
    return WorkerEvent(started=WorkerEvent.Started())


def skipped() -> WorkerEvent:
    return WorkerEvent(skipped=WorkerEvent.Skipped(path="broken.png", total=1))


def after(*events: WorkerEvent) -> PeerMetrics:
    metrics = PeerMetrics()
    for event in events:
        metrics.event(event, PeerStatus())
    return metrics


def test_samples_are_counted_across_lost_steps_and_restarts() -> None:
    metrics = after(started(), step(16), step(64), started(), step(32))
    assert metrics.registry.get_sample_value("covey_samples_total") == 96


def test_steps_set_the_gauges() -> None:
    registry = after(started(), step(16), skipped(), skipped()).registry
    assert registry.get_sample_value("covey_epoch") == 3
    assert registry.get_sample_value("covey_epoch_samples") == 48
    assert registry.get_sample_value("covey_loss") == 2.5
    assert registry.get_sample_value("covey_samples_per_second") == 10
    assert registry.get_sample_value("covey_skipped_images_total") == 2


def test_rounds_are_counted_and_timed() -> None:
    ended = WorkerEvent(round=WorkerEvent.Round(kind="state", outcome="failed", group_size=4, seconds=3))
    registry = after(ended, ended).registry
    assert registry.get_sample_value("covey_averaging_rounds_total", {"kind": "state", "outcome": "failed"}) == 2
    assert registry.get_sample_value("covey_averaging_duration_seconds_sum", {"kind": "state"}) == 6
    assert registry.get_sample_value("covey_group_size") == 4


def test_loads_that_fail_are_not_timed() -> None:
    def load(succeeded: bool) -> WorkerEvent:
        return WorkerEvent(state_loaded=WorkerEvent.StateLoaded(seconds=2, succeeded=succeeded))

    assert after(load(True), load(False)).registry.get_sample_value("covey_state_load_duration_seconds_count") == 1


def test_checkpoints_and_restarts_are_told() -> None:
    metrics = after(WorkerEvent(checkpointed=WorkerEvent.Checkpointed(time_seconds=1234)))
    metrics.restarting(-9, 1.0, PeerStatus())
    assert metrics.registry.get_sample_value("covey_checkpoint_last_success_timestamp_seconds") == 1234
    assert metrics.registry.get_sample_value("covey_worker_restarts_total") == 1


def test_bytes_and_refusals_are_counted_by_direction_and_reason() -> None:
    ended = WorkerEvent(round=WorkerEvent.Round(kind="state", outcome="averaged", bytes_sent=10, bytes_received=30,
                                                matchmaking_seconds=0.5, refused={"silent": 2}))
    registry = after(ended, ended).registry
    assert registry.get_sample_value("covey_network_bytes_total", {"direction": "sent"}) == 20
    assert registry.get_sample_value("covey_network_bytes_total", {"direction": "received"}) == 60
    assert registry.get_sample_value("covey_rejected_contributions_total", {"reason": "silent"}) == 4
    assert registry.get_sample_value("covey_matchmaking_duration_seconds_sum", {"kind": "state"}) == 1


@pytest.mark.parametrize("reason", BAD_VALUES)
def test_bad_values_are_counted_from_zero(reason: str) -> None:
    def refused() -> float | None:
        return metrics.registry.get_sample_value("covey_rejected_contributions_total", {"reason": reason})

    metrics, ended = after(started()), WorkerEvent.Round(kind="state", outcome="failed", refused={reason: 1})
    assert refused() == 0
    metrics.event(WorkerEvent(round=ended), PeerStatus())
    assert refused() == 1


def test_names_and_labels_keep_the_conventions() -> None:
    ended = WorkerEvent(round=WorkerEvent.Round(kind="state", outcome="averaged", refused={"silent": 2}))
    page = generate_latest(after(started(), step(16), ended).registry).decode()
    families = list(text_string_to_metric_families(page))
    assert families
    for family in families:
        assert family.documentation.endswith(".")
        for sample in family.samples:
            assert sample.name.startswith("covey_")
            assert sample.name.endswith("_total") == (family.type == "counter")
            assert set(sample.labels) <= {"version", "reason", "kind", "outcome", "direction", "le"}


def test_what_the_objective_and_an_evaluation_measure_have_gauges_of_their_own() -> None:
    measured = step(16)
    measured.step.metrics["prototype_entropy"] = 0.75
    metrics = after(started(), measured, WorkerEvent(
        evaluated=WorkerEvent.Evaluated(epoch=3, figures={"knn_accuracy": 0.5})))
    assert metrics.registry.get_sample_value("covey_prototype_entropy") == 0.75
    assert metrics.registry.get_sample_value("covey_knn_accuracy") == 0.5
