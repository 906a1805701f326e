"""A peer's status follows its worker's events."""

from peer.status import fold, forget_worker
from proto.peer_pb2 import PeerStatus, WorkerEvent


def test_rounds_are_counted_by_outcome() -> None:
    status = PeerStatus()
    for outcome in ("averaged", "averaged", "failed", "alone"):
        fold(status, WorkerEvent(round=WorkerEvent.Round(kind="gradients", outcome=outcome, group_size=2)))
    assert (status.rounds.averaged, status.rounds.failed, status.rounds.alone) == (2, 1, 1)
    assert status.group_size == 2


def test_a_started_worker_trains_unless_it_is_leaving() -> None:
    started = WorkerEvent(started=WorkerEvent.Started(epoch=3))
    for before, after in (("starting", "training"), ("leaving", "leaving")):
        status = PeerStatus(state=before)
        fold(status, started)
        assert status.state == after


def test_a_new_worker_inherits_counts_and_checkpoint_only() -> None:
    status = PeerStatus(state="restarting", group_size=2, worker_restarts=1)
    status.step.epoch = status.started.epoch = 7
    status.finished.epoch = status.rounds.averaged = status.checkpoint.epoch = 5
    forget_worker(status)
    assert status.state == "starting"
    assert not any(map(status.HasField, ("step", "started", "finished")))
    assert status.rounds.averaged == status.checkpoint.epoch == 5
    assert status.worker_restarts == 1
