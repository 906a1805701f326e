"""What `covey join` shows of a worker's events."""

import json
import subprocess
import sys
import threading

from peer.progress import Epoch, JsonLines, Lines, Printer, Tally
from peer.status import fold
from proto.peer_pb2 import PeerStatus, WorkerEvent


def step(epoch: int, loss: float, swarm_samples: int, samples_total: int = 0) -> WorkerEvent:
    return WorkerEvent(step=WorkerEvent.Step(epoch=epoch, loss=loss, swarm_samples=swarm_samples, swarm_peers=3,
                                             samples_total=samples_total, samples_per_second=50))


def ended_round(outcome: str, group_size: int = 2) -> WorkerEvent:
    return WorkerEvent(round=WorkerEvent.Round(kind="gradients", outcome=outcome, group_size=group_size))


STORY = [
    WorkerEvent(started=WorkerEvent.Started(peer_id="Qm", device="cpu", parameters=1000, images=64, epoch=4)),
    WorkerEvent(skipped=WorkerEvent.Skipped(path="broken.png", total=1)),
    step(4, 3.0, 32, 16), step(4, 2.0, 64, 32), ended_round("averaged"), step(5, 1.0, 0, 48), step(5, 9.0, 16, 64),
    WorkerEvent(state_loaded=WorkerEvent.StateLoaded(epoch=6, seconds=1.25, succeeded=True)),
    WorkerEvent(checkpointed=WorkerEvent.Checkpointed(path="/c/epoch", epoch=5, time_seconds=1e9)),
    WorkerEvent(finished=WorkerEvent.Finished(epoch=5, parameters_checksum="abcd", checkpoint="/c/epoch")),
]


def tell(observer: JsonLines | Lines, story: list[WorkerEvent]) -> PeerStatus:
    status = PeerStatus(metrics_url="http://here/metrics", daemon_pid=7)
    for event in story:
        fold(status, event)
        observer.event(event, status)
    return status


def test_a_step_that_ends_an_epoch_counts_towards_it() -> None:
    tally, status, ended = Tally(), PeerStatus(group_size=2), []
    tally.begin(4)
    for event in (step(4, 3.0, 32, 16), step(4, 2.0, 64, 32), step(5, 1.0, 0, 48)):
        fold(status, event)
        ended.append(tally.step(status))
    tally.start(5)  # a new worker, which counts from 0
    for event in (step(5, 8.0, 32, 64), step(6, 4.0, 96, 80)):
        fold(status, event)
        ended.append(tally.step(status))
    assert ended[:2] == [None, None]
    rest = {"peers": 3, "group_size": 2, "samples_per_second": 50}
    assert ended[2] == Epoch(epoch=5, own_samples=48, samples=64, loss=2.0, **rest)
    assert ended[4] == Epoch(epoch=6, own_samples=80, samples=96, loss=6.0, **rest)


def test_a_jump_to_the_swarm_s_state_is_no_epoch_of_ours() -> None:
    lines: list[str] = []
    tell(JsonLines(lines.append), [
        WorkerEvent(started=WorkerEvent.Started(epoch=0)),
        WorkerEvent(state_loaded=WorkerEvent.StateLoaded(epoch=37, seconds=1, succeeded=True)),
        step(37, 5.0, 32), step(38, 3.0, 64)])
    told = [json.loads(line) for line in lines]
    assert [(line["epoch"], line["loss"]) for line in told if line["event"] == "epoch"] == [(38, 4.0)]


def test_json_lines_tell_the_story() -> None:
    lines: list[str] = []
    observer = JsonLines(lines.append)
    status = tell(observer, STORY)
    observer.restarting(-9, 2.0, status)
    told = [json.loads(line) for line in lines]
    assert [line["event"] for line in told] == [
        "ready", "skipped", "round", "epoch", "state_loaded", "checkpoint", "finished", "restarting"]
    assert told[0]["metrics_url"] == "http://here/metrics"
    assert told[1] == {"event": "skipped", "path": "broken.png", "total": 1}
    assert told[3] == {"event": "epoch", "epoch": 5, "own_samples": 48, "samples": 64, "peers": 3, "group_size": 2,
                       "loss": 2.0, "samples_per_second": 50.0}
    assert told[6]["rounds"] == {"averaged": 1, "failed": 0, "alone": 0}
    assert told[7] == {"event": "restarting", "exit_code": -9, "delay_seconds": 2.0}


def test_lines_for_people_tell_the_story() -> None:
    lines: list[str] = []
    moments: list[str] = []
    tell(Lines(lines.append, moments.append), STORY)
    text = "\n".join(lines)
    for told in ("1,000 parameters", "passed over broken.png", "epoch     5", "group  2",
                 "state of epoch 6", "1 averaged, 0 failed", "abcd"):
        assert told in text
    assert len(moments) == 4


def test_a_reader_that_does_not_read_holds_nothing_up() -> None:
    reading, shown = threading.Event(), []

    def show(line: str) -> None:
        reading.wait(60)
        shown.append(line)

    printer = Printer(show)
    for number in range(5000):
        printer.line(str(number))  # would hang
    reading.set()
    printer.close(timeout_seconds=60)
    assert shown[:3] == ["0", "1", "2"]
    assert 1000 <= len(shown) <= 1002


def test_a_reader_that_goes_away_ends_nothing() -> None:
    code = ("from peer.progress import progress\n"
            "with progress(as_json=True) as observer:\n"
            "    for _ in range(100000): observer._write('x' * 100)\n"
            "import sys; sys.stderr.write('went on')\n")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.read(1) == b"x"
    process.stdout.close()
    assert process.stderr
    assert process.stderr.read() == b"went on"
    assert process.wait(60) == 0
