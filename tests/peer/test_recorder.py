"""A volunteer's metrics.csv follows its worker's events."""

from pathlib import Path

import pytest

from peer.loggers.csv import read_rows
from peer.plot import plot
from peer.recorder import Recorder
from peer.status import fold
from proto.peer_pb2 import PeerStatus, WorkerEvent
from training.errors import BadInput


def step(epoch: int, loss: float, samples_total: int) -> WorkerEvent:
    return WorkerEvent(step=WorkerEvent.Step(
        epoch=epoch, loss=loss, samples_total=samples_total, swarm_samples=64, swarm_peers=3, samples_per_second=50,
        learning_rate=0.5, metrics={"prototype_entropy": 0.9}))


def started(epoch: int = 0) -> WorkerEvent:
    return WorkerEvent(started=WorkerEvent.Started(epoch=epoch))


def record(directory: Path, *events: WorkerEvent) -> Recorder:
    recorder, status = Recorder(directory), PeerStatus(group_size=2)
    for event in events:
        fold(status, event)
        recorder.event(event, status)
    return recorder


def test_an_epoch_is_a_row(tmp_path: Path) -> None:
    record(tmp_path, started(), step(0, 3, 16), step(1, 2, 32), step(1, 9, 48))
    assert read_rows(tmp_path / "metrics.csv") == [{
        "epoch": 1, "samples_total": 32, "samples_per_second": 50, "learning_rate": 0.5, "loss": 2.5,
        "prototype_entropy": 0.9, "swarm_samples": 64, "peers": 3, "group_size": 2}]


def test_restarts_go_on_with_the_table_and_its_samples(tmp_path: Path) -> None:
    record(tmp_path, started(), step(1, 2, 32), started(1), step(2, 2, 16))
    record(tmp_path, started(2), step(3, 2, 8))
    assert [(row["epoch"], row["samples_total"]) for row in read_rows(tmp_path / "metrics.csv")] == [
        (1, 32), (2, 48), (3, 56)]


def test_epochs_that_others_made_meanwhile_are_no_rows(tmp_path: Path) -> None:
    record(tmp_path, started(), step(1, 2, 32), WorkerEvent(
        state_loaded=WorkerEvent.StateLoaded(epoch=7, succeeded=True)), step(7, 3, 40), step(8, 3, 48))
    assert [row["epoch"] for row in read_rows(tmp_path / "metrics.csv")] == [1, 8]


def test_an_evaluation_joins_its_epoch_s_row(tmp_path: Path) -> None:
    record(tmp_path, started(), step(1, 2, 32), step(2, 2, 64), WorkerEvent(
        evaluated=WorkerEvent.Evaluated(epoch=2, figures={"knn_accuracy": 0.75})), step(3, 2, 96))
    rows = read_rows(tmp_path / "metrics.csv")
    assert [(row["epoch"], row["samples_total"], row.get("knn_accuracy")) for row in rows] == [
        (1, 32, None), (2, 64, 0.75), (3, 96, None)]
    assert [path.name for path in plot(tmp_path, None)] == ["loss.png", "accuracy.png", "throughput.png"]


def test_what_cannot_be_written_ends_nothing_and_is_logged_once(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "gone").mkdir()
    recorder, status = Recorder(tmp_path / "gone"), PeerStatus()
    (tmp_path / "gone").rmdir()
    for number in (1, 2, 3):
        fold(status, event := step(number, 2, 32 * number))
        recorder.event(event, status)
    assert len([told for told in caplog.records if told.name == "peer.recorder"]) == 1


def test_a_table_of_somebody_else_s_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("name,mark\nada,1\n")
    with pytest.raises(BadInput, match=r"metrics\.csv"):
        Recorder(tmp_path)


def test_an_evaluation_after_a_download_takes_no_other_epoch_s_figures(tmp_path: Path) -> None:
    record(tmp_path, started(), step(1, 2, 32), WorkerEvent(
        state_loaded=WorkerEvent.StateLoaded(epoch=7, succeeded=True)), step(7, 3, 40), WorkerEvent(
        evaluated=WorkerEvent.Evaluated(epoch=7, figures={"knn_accuracy": 0.75})))
    assert read_rows(tmp_path / "metrics.csv")[-1] == {"epoch": 7, "knn_accuracy": 0.75}
