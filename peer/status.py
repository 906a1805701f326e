"""A peer's status: the worker's events folded, one by one. Pure."""

from proto.peer_pb2 import PeerStatus, WorkerEvent


def fold(status: PeerStatus, event: WorkerEvent) -> None:
    """Bring `status` up to date with `event`."""
    match event.WhichOneof("event"):
        case "started":
            status.state = "leaving" if status.state == "leaving" else "training"
            status.started.CopyFrom(event.started)
        case "step":
            status.step.CopyFrom(event.step)
        case "round":
            _count(status, event.round)
        case "evaluated":
            status.evaluation.CopyFrom(event.evaluated)
        case "checkpointed":
            status.checkpoint.CopyFrom(event.checkpointed)
        case "finished":
            status.finished.CopyFrom(event.finished)


def _count(status: PeerStatus, ended: WorkerEvent.Round) -> None:
    counts = status.rounds
    match ended.outcome:
        case "averaged":
            counts.averaged += 1
        case "failed":
            counts.failed += 1
        case "alone":
            counts.alone += 1
    status.group_size = ended.group_size


def forget_worker(status: PeerStatus) -> None:
    """A new worker starts: what the last one was doing says nothing of it. Counts and checkpoint remain."""
    for field in ("started", "step", "finished"):
        status.ClearField(field)
    status.group_size = 0
    status.state = "starting"
