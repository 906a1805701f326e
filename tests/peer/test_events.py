"""The event pipe: whole messages, steps dropped rather than waited for, everything else within a bound."""

import asyncio
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from peer.events import EventWriter, read_events
from proto.peer_pb2 import WorkerEvent


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        with suppress(OSError):  # the test closed it
            os.close(end)


def step(number: int) -> WorkerEvent:
    return WorkerEvent(step=WorkerEvent.Step(local_step=number, metrics={"entropy": 0.5}))


def refusal(text: str = "no") -> WorkerEvent:
    return WorkerEvent(refused=WorkerEvent.Refused(message=text))


def read_all(fd: int) -> list[WorkerEvent]:
    async def collect() -> list[WorkerEvent]:
        return [event async for event in read_events(fd)]

    return asyncio.run(collect())


def fill(writer: EventWriter) -> int:
    sent = 0
    while writer.send(step(sent + 1)):
        sent += 1
    return sent


def test_events_arrive_whole_and_in_order(pipe: tuple[int, int]) -> None:
    writer, sent = EventWriter(pipe[1]), [step(1), refusal("x" * 30_000), step(2)]
    assert all(writer.send(event) for event in sent)
    os.close(pipe[1])
    assert read_all(pipe[0]) == sent


def test_a_step_that_does_not_fit_is_dropped(pipe: tuple[int, int]) -> None:
    writer = EventWriter(pipe[1], timeout_seconds=3600)
    taken = fill(writer)  # would hang if it waited
    assert not writer.send(step(0))
    os.close(pipe[1])
    steps = [event.step.local_step for event in read_all(pipe[0])]
    # the last one taken may have its tail still here
    assert steps in (list(range(1, taken + 1)), list(range(1, taken)))


def test_after_a_full_pipe_the_stream_is_whole_again(pipe: tuple[int, int]) -> None:
    writer = EventWriter(pipe[1])
    taken = fill(writer)

    def send_and_close() -> bool:
        sent = writer.send(refusal("waited for room"))
        os.close(pipe[1])
        return sent

    with ThreadPoolExecutor() as pool:
        sending = pool.submit(send_and_close)
        received = read_all(pipe[0])
        assert sending.result(timeout=30)
    assert [event.step.local_step for event in received[:-1]] == list(range(1, taken + 1))
    assert received[-1] == refusal("waited for room")


def test_other_events_wait_no_longer_than_the_bound(pipe: tuple[int, int]) -> None:
    writer = EventWriter(pipe[1], timeout_seconds=0.05)
    fill(writer)
    assert not writer.send(refusal("x" * 10_000))


def test_a_message_cut_off_by_the_worker_s_death_ends_the_stream(pipe: tuple[int, int]) -> None:
    EventWriter(pipe[1]).send(step(1))
    os.write(pipe[1], b"\0\0\0\x09only")
    os.close(pipe[1])
    assert read_all(pipe[0]) == [step(1)]


def test_a_dead_daemon_is_not_waited_for(pipe: tuple[int, int]) -> None:
    os.close(pipe[0])
    assert not EventWriter(pipe[1]).send(refusal())


def test_the_pipe_is_not_inherited_by_what_the_worker_starts(pipe: tuple[int, int]) -> None:
    os.set_inheritable(pipe[1], True)
    EventWriter(pipe[1])
    assert not os.get_inheritable(pipe[1])
