"""What the coordinator says of its archive: one view for gRPC, JSON and metrics."""

from dataclasses import replace

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from coordinator.archive import MOST_EVALUATIONS, STAGES, Archive, Evaluation, archive_view, with_evaluation
from coordinator.metrics import coordinator_registry
from coordinator.swarm import SwarmState
from coordinator.view import About, Seen, swarm_json, view
from proto.swarm_pb2 import SwarmSnapshot

ARCHIVE = Archive(epoch=40, time=1234.5, sha256="ab", evaluations=(
    Evaluation(30, {"knn_accuracy": 0.25}), Evaluation(40, {"knn_accuracy": 0.5})), failures={"disk": 2},
    last_error="disk full")


def scrape(state: SwarmState, about: About, archive: Archive | None) -> dict[str, float]:
    text = generate_latest(coordinator_registry(lambda: Seen(state, archive), about)).decode()
    return {sample.name + "".join(sample.labels.get("stage", "")): sample.value
            for family in text_string_to_metric_families(text) for sample in family.samples}


def test_grpc_and_json_say_the_same(state: SwarmState, about: About, now: float) -> None:
    seen = Seen(state, ARCHIVE)
    snapshot, page = SwarmSnapshot(**view(seen, about)), swarm_json(seen, about, now)["archive"]
    assert snapshot.archive == SwarmSnapshot.Archive(**page)
    assert page == {
        "epoch": 40, "time_seconds": 1234.5, "sha256": "ab", "uploaded_epoch": None, "last_error": "disk full",
        "evaluations": [{"epoch": 30, "figures": {"knn_accuracy": 0.25}},
                        {"epoch": 40, "figures": {"knn_accuracy": 0.5}}],
        "failures": {"download": 0, "disk": 2, "evaluation": 0, "upload": 0, "crash": 0}}


def test_no_archive_is_not_an_empty_one(state: SwarmState, about: About, now: float) -> None:
    assert not SwarmSnapshot(**view(Seen(state), about)).HasField("archive")
    assert swarm_json(Seen(state), about, now)["archive"] is None
    empty = SwarmSnapshot(**view(Seen(state, Archive()), about))
    assert empty.HasField("archive")
    assert not empty.archive.HasField("epoch")


def test_metrics_are_the_archives(state: SwarmState, about: About) -> None:
    samples = scrape(state, about, ARCHIVE)
    assert samples["covey_checkpoint_last_success_timestamp_seconds"] == 1234.5
    assert samples["covey_checkpoint_epoch"] == 40
    assert samples["covey_knn_accuracy"] == 0.5
    assert {stage: samples[f"covey_archive_failures_total{stage}"] for stage in STAGES} == {
        "download": 0, "disk": 2, "evaluation": 0, "upload": 0, "crash": 0}


def test_before_the_first_checkpoint_its_time_is_zero(state: SwarmState, about: About) -> None:
    samples = scrape(state, about, Archive())
    assert samples["covey_checkpoint_last_success_timestamp_seconds"] == 0
    assert "covey_checkpoint_epoch" not in samples


def test_without_an_archive_there_are_no_metrics_of_one(state: SwarmState, about: About) -> None:
    assert not [name for name in scrape(state, about, None) if "checkpoint" in name or "archive" in name]


@pytest.mark.parametrize("count", [1, MOST_EVALUATIONS, MOST_EVALUATIONS + 1, 1000])
def test_evaluations_are_in_order_span_the_run_and_do_not_grow_without_bound(count: int) -> None:
    kept: tuple[Evaluation, ...] = ()
    for epoch in range(10, 10 * (count + 1), 10):
        kept = with_evaluation(kept, Evaluation(epoch, {}))
    epochs = [one.epoch for one in kept]
    assert epochs == sorted(set(epochs))
    assert len(epochs) == count if count <= MOST_EVALUATIONS else len(epochs) >= MOST_EVALUATIONS // 2
    assert len(epochs) <= MOST_EVALUATIONS
    assert epochs[-1] == 10 * count
    assert epochs[0] <= 10 * (1 + count // 20)


def test_a_second_evaluation_of_an_epoch_takes_the_place_of_the_first() -> None:
    kept = with_evaluation(ARCHIVE.evaluations, Evaluation(30, {"knn_accuracy": 0.75}))
    assert archive_view(replace(ARCHIVE, evaluations=kept))["evaluations"][0]["figures"] == {"knn_accuracy": 0.75}
    assert len(kept) == 2
