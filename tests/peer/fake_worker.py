"""A worker that trains nothing: `fake_worker.py BEHAVIOUR STATE_DIR --events-fd N --parent-pid PID`.

train: one epoch per step until SIGTERM, then leaves in good order. stubborn: the same, but ignores SIGTERM.
finish: leaves after three epochs. linger: the same, but hangs at the very end.
refuse: exit code 2. crash: exit code 1 at once.
It has two children, as a real one has: one that dies with it, one that only its group's end can reach.
Their pids and its own are lines of STATE_DIR/pids, from its start on.
"""

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from averaging.process import die_with_parent
from peer.events import EventWriter
from proto.peer_pb2 import WorkerEvent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("behaviour")
    parser.add_argument("state_dir", type=Path)
    parser.add_argument("--events-fd", type=int, required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    arguments = parser.parse_args()
    die_with_parent(arguments.parent_pid)
    print("the fake worker starts", flush=True)
    leave = threading.Event()
    stubborn = arguments.behaviour == "stubborn"
    signal.signal(signal.SIGTERM, signal.SIG_IGN if stubborn else lambda *_: leave.set())
    events = EventWriter(arguments.events_fd)
    if arguments.behaviour == "crash":
        sys.exit(1)
    if arguments.behaviour == "refuse":
        events.send(WorkerEvent(refused=WorkerEvent.Refused(message="no such device; expected a GPU. Buy one.")))
        sys.exit(2)
    with tempfile.NamedTemporaryFile(delete=False) as left_behind:
        (arguments.state_dir / "left_behind").write_text(left_behind.name)
    bound, loose = child(dies_with_us=True), child(dies_with_us=False)
    (arguments.state_dir / "pids").write_text(f"{os.getpid()}\n{bound}\n{loose}\n")
    epochs = 3 if arguments.behaviour in {"finish", "linger"} else 10**6
    train(events, leave, epochs)
    while arguments.behaviour == "linger":
        time.sleep(60)
    for pid in (bound, loose):
        os.kill(pid, signal.SIGKILL)


def child(*, dies_with_us: bool) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        if dies_with_us:
            die_with_parent(parent)
        while True:
            time.sleep(60)
    return pid


def train(events: EventWriter, leave: threading.Event, epochs: int) -> None:
    events.send(WorkerEvent(started=WorkerEvent.Started(peer_id="QmFake", device="cpu", parameters=7, images=100)))
    epoch = 0
    while epoch < epochs and not leave.is_set():  # to wait on it could keep the handler of SIGTERM from setting it
        time.sleep(0.02)
        epoch += 1
        events.send(WorkerEvent(step=WorkerEvent.Step(
            epoch=epoch, local_step=epoch, samples_total=16 * epoch, swarm_samples=32, swarm_peers=2,
            samples_per_second=800, loss=1 / epoch)))
        events.send(WorkerEvent(round=WorkerEvent.Round(
            kind="gradients", outcome="averaged", group_size=2, seconds=0.3, epoch=epoch)))
    events.send(WorkerEvent(checkpointed=WorkerEvent.Checkpointed(path="/c", epoch=epoch, time_seconds=1e9)))
    events.send(WorkerEvent(finished=WorkerEvent.Finished(epoch=epoch, parameters_checksum="ab", checkpoint="/c")))


if __name__ == "__main__":
    main()
