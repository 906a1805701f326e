"""A peer's status follows its worker's events."""

from peer.status import fold, forget_worker
from proto.peer_pb2 import PeerStatus, WorkerEvent


def test_rounds_are_counted_by_kind_and_outcome() -> None:
    status = PeerStatus()
    for kind, outcome in (("gradients", "averaged"), ("gradients", "averaged"), ("gradients", "failed"),
                          ("state", "alone"), ("state", "averaged")):
        fold(status, WorkerEvent(round=WorkerEvent.Round(kind=kind, outcome=outcome, group_size=2)))
    gradients, state = status.gradient_rounds, status.state_rounds
    assert (gradients.averaged, gradients.failed, gradients.alone) == (2, 1, 0)
    assert (state.averaged, state.failed, state.alone) == (1, 0, 1)
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
    status.finished.epoch = status.gradient_rounds.averaged = status.checkpoint.epoch = 5
    forget_worker(status)
    assert status.state == "starting"
    assert not any(map(status.HasField, ("step", "started", "finished")))
    assert status.gradient_rounds.averaged == status.checkpoint.epoch == 5
    assert status.worker_restarts == 1
