"""The clock that stands still while its process is stopped."""

import asyncio
import time

import pytest

from averaging.transports.swarm import awake


class Time:
    """In the place of time.monotonic."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.time = 100.0
        monkeypatch.setattr(awake, "monotonic", lambda: self.time)
        self.clock = awake.Clock()

    def passed(self, *seconds: float) -> float:
        """By the clock under test, read after each so many seconds."""
        before = after = self.clock.now()
        for gap in seconds:
            self.time += gap
            after = self.clock.now()
        return after - before


def test_a_clock_that_is_read_often_goes_as_any(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Time(monkeypatch).passed(*[awake.BEAT] * 100) == pytest.approx(100 * awake.BEAT)
    assert Time(monkeypatch).passed(*[awake.BEAT + awake.STOPPED - 0.01] * 10) == pytest.approx(2.9)


@pytest.mark.parametrize("seconds", [0.31, 1.0, 3600.0])
def test_a_stop_does_not_count_and_leaves_time_to_read_what_has_come(monkeypatch: pytest.MonkeyPatch,
                                                                     seconds: float) -> None:
    time_of = Time(monkeypatch)
    assert time_of.passed(0.05, seconds, 0.05) == pytest.approx(0.1 - awake.STOPPED)
    assert time_of.passed(0.05, 0.05) == pytest.approx(0.1)


def test_a_timeout_is_kept() -> None:
    async def wait() -> None:
        async with awake.timeout(0.2):
            await asyncio.sleep(30)

    started = time.monotonic()
    with pytest.raises(TimeoutError):
        asyncio.run(wait())
    assert time.monotonic() - started >= 0.2


def test_who_is_done_in_time_hears_nothing_of_it() -> None:
    async def wait() -> int:
        async with awake.timeout(0.1):
            await asyncio.sleep(0)
        await asyncio.sleep(0.2)
        return 1

    assert asyncio.run(wait()) == 1


def test_an_answer_that_came_while_the_process_was_stopped_is_in_time() -> None:
    async def wait() -> str:
        answer = asyncio.get_running_loop().create_future()
        async with awake.timeout(0.2):
            await asyncio.sleep(0)
            time.sleep(0.6)  # as if stopped
            asyncio.get_running_loop().call_later(0.05, answer.set_result, "read")
            return str(await answer)

    assert asyncio.run(wait()) == "read"
