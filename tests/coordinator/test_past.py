"""The past of a swarm outlives the coordinator's process, and a bad disk harms nobody."""

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from averaging.records import PeerRecord
from coordinator.follow import SwarmFollower
from coordinator.history import CAPACITY, History, remember
from coordinator.past import KEPT_GONE, KEPT_SECONDS, Past, PastFile
from coordinator.swarm import Peer, SwarmState

Record = Callable[..., PeerRecord]


@pytest.fixture
def past(state: SwarmState, record: Record) -> Past:
    """Of two peers with sketches and addresses, and one who is gone."""
    peers = {peer_id: replace(peer, record=replace(peer.record, sketch=bytes(range(136)), addresses=("/ip4/1.2.3.4",)))
             for peer_id, peer in state.peers.items()}
    state = replace(state, peers=peers, gone={"12D3gone": Peer(record("12D3gone", state="leaving"), state.time)})
    return Past(state, remember(remember(History(), replace(state, time=state.time - 60)), state))


def test_what_is_kept_is_recalled_whole(past: Past, tmp_path: Path) -> None:
    PastFile(tmp_path / "past.json").keep(past)
    assert PastFile(tmp_path / "past.json").recall() == past


def test_before_the_first_time_there_is_no_past(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert PastFile(tmp_path / "past.json").recall() == Past()
    assert not caplog.records


def cut(data: bytes) -> bytes:
    return data[:len(data) // 2]


def without_width(data: bytes) -> bytes:
    """Which nothing could be divided by."""
    document = json.loads(data)
    document[1]["over_time"]["width"] = 0
    return json.dumps(document).encode()


@pytest.mark.parametrize("spoil", [cut, without_width, lambda _: b"", lambda _: bytes(1000), lambda _: b"[1, 2]",
                                   lambda data: data.replace(b"2.5", b"NaN")],
                         ids=["cut", "width", "empty", "zeros", "other", "NaN"])
def test_a_spoilt_file_is_passed_over_with_a_word(spoil: Callable[[bytes], bytes], past: Past, tmp_path: Path,
                                                  caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "past.json"
    PastFile(path).keep(past)
    path.write_bytes(spoil(path.read_bytes()))
    assert PastFile(path).recall() == Past()
    [said] = caplog.messages
    assert said.startswith(f"{path} can't be read (")
    assert said.endswith("): charts and sums begin anew")
    assert "\n" not in said


def test_a_full_disk_is_told_once_and_its_end_too_and_the_last_file_stays(
        past: Past, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    file = PastFile(tmp_path / "past.json")
    file.keep(past)
    with monkeypatch.context() as broken:
        broken.setattr("coordinator.past.write_private", full)
        for _ in range(3):
            file.keep(Past())
    assert PastFile(tmp_path / "past.json").recall() == past
    file.keep(Past())
    assert caplog.messages == [
        f"{tmp_path}/past.json can't be written ([Errno 28] No space left on device): a restart would lose what is not "
        "in it", f"{tmp_path}/past.json can be written again"]


def test_the_file_is_bounded(past: Past, record: Record, tmp_path: Path, now: float) -> None:
    history = History()
    for i in range(2 * CAPACITY):
        history = remember(history, replace(past.state, time=now + i, epoch=i))
    gone = {f"{i:052d}": Peer(record(f"{i:052d}", name="x" * 64, sketch=bytes(136)), now) for i in range(10_000)}
    PastFile(tmp_path / "past.json").keep(Past(replace(past.state, gone=gone), history))
    assert (tmp_path / "past.json").stat().st_size < 2e6
    assert list(PastFile(tmp_path / "past.json").recall().state.gone) == list(gone)[-KEPT_GONE:]  # the newest


def test_it_is_written_once_a_minute(past: Past, tmp_path: Path) -> None:
    times = iter([0.0, KEPT_SECONDS - 1, KEPT_SECONDS, KEPT_SECONDS, 2 * KEPT_SECONDS - 1, 2 * KEPT_SECONDS])
    file = PastFile(tmp_path / "past.json", clock=times.__next__)
    assert not file.is_due()
    assert file.is_due()
    file.keep(past)
    assert not file.is_due()
    assert file.is_due()


def test_what_peers_did_while_no_coordinator_looked_is_counted_once(record: Record, now: float,
                                                                   tmp_path: Path) -> None:
    def look(readings: list[tuple[float, list[PeerRecord]]]) -> SwarmFollower:
        """A coordinator's life, to its orderly end."""
        times, records = (iter(column) for column in zip(*readings, strict=True))
        follower = SwarmFollower(records.__next__, stale_seconds=60.0, clock=times.__next__,
                                 past_file=PastFile(tmp_path / "past.json"))
        for _ in readings:
            asyncio.run(follower.refresh())
        follower.keep()
        return follower

    stayed, left = record("stayed", samples_total=100), record("left", samples_total=7)
    look([(now, [stayed, left])])
    later = now + 1000
    state = look([(later, [replace(stayed, time=later, samples_total=150), record("new", time=later)])]).state
    assert (state.counters.samples, state.joins, state.left, state.lost) == (157, 3, 0, 1)
    assert (state.since, sorted(state.peers)) == (now, ["new", "stayed"])
    back = replace(left, time=later + 5, samples_total=9)
    last = look([(later + 5, [back])])
    assert (last.state.counters.samples, last.state.joins) == (159, 4)
    assert [point.time for point in last.history.over_time.points] == [now, later, later + 5]


def test_a_follower_keeps_the_past_when_it_is_time(record: Record, now: float, tmp_path: Path,
                                                   caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    file = PastFile(tmp_path / "past.json", clock=iter([0.0, 1.0, KEPT_SECONDS, KEPT_SECONDS]).__next__)
    follower = SwarmFollower(lambda: [record("a")], stale_seconds=60.0, clock=iter([now, now + 1]).__next__,
                             past_file=file)
    asyncio.run(follower.refresh())
    assert not (tmp_path / "past.json").exists()
    asyncio.run(follower.refresh())
    assert PastFile(tmp_path / "past.json").recall() == Past(follower.state, follower.history)
    assert not caplog.records
