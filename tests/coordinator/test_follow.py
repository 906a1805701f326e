import asyncio
import logging
from collections.abc import Callable

import pytest

from averaging.records import PeerRecord
from coordinator.follow import SwarmFollower


class ScriptedRecords:
    """What each reading gives: records, or an exception."""

    def __init__(self, *script: list[PeerRecord] | Exception) -> None:
        self.script = list(script)

    def __call__(self) -> list[PeerRecord]:
        step = self.script.pop(0)
        if isinstance(step, Exception):
            raise step
        return step


def follow(script: ScriptedRecords, times: list[float]) -> SwarmFollower:
    follower = SwarmFollower(script, stale_seconds=60.0, clock=iter(times).__next__)
    for _ in range(len(script.script)):
        asyncio.run(follower.refresh())
    return follower


def test_a_reading_that_fails_loses_nobody(record: Callable[..., PeerRecord], now: float,
                                           caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "covey.coordinator")
    later = record("a", time=now + 600)
    follower = follow(ScriptedRecords([record("a")], TimeoutError(), OSError("pipe"), [later]), [now, now + 601])
    assert (follower.state.lost, follower.state.peers["a"].record, follower.readable) == (0, later, True)
    assert [entry.message for entry in caplog.records if entry.levelno == logging.WARNING] == [
        "can't read the peers' records: TimeoutError", "the peers' records can be read again"]


def test_an_unreadable_dht_keeps_the_time_of_the_last_reading(record: Callable[..., PeerRecord], now: float) -> None:
    follower = follow(ScriptedRecords([record("a")], TimeoutError()), [now])
    assert (follower.state.time, follower.readable) == (now, False)


def test_every_reading_that_succeeds_goes_into_the_history(record: Callable[..., PeerRecord], now: float) -> None:
    follower = follow(ScriptedRecords([record("a")], TimeoutError(), []), [now, now + 2])
    assert [point.time for point in follower.history.over_time.points] == [now, now + 2]


def test_changes_are_logged_and_states_are_not(record: Callable[..., PeerRecord], now: float,
                                               caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "covey.coordinator")
    follow(ScriptedRecords([record("a", name="ada\x1b[2J")], [record("a", name="ada\x1b[2J")],
                           [record("a", time=now + 2, epoch=1, loss=3.5)],
                           [record("a", time=now + 3, epoch=1, state="leaving")], []),
           [now, now + 1, now + 2, now + 3, now + 20])
    assert [entry.message for entry in caplog.records] == [
        r"'ada\x1b[2J' joined (a): 1 peer", "epoch 1: 1 peer, loss 3.5000, 1.0 samples/s", "'a' left (a): 0 peers"]
