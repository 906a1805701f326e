"""The supervisor over a fake worker: restarts, refusals, leaving, and nobody left behind."""

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest
from processes import is_running, until, worker_pids

from averaging.backoff import Backoff
from peer.config import PeerConfig
from peer.job import Job
from peer.supervisor import Ending, Supervisor
from proto.peer_pb2 import PeerStatus, WorkerEvent

FAKE_WORKER = str(Path(__file__).with_name("fake_worker.py"))
QUICK = Backoff(first_seconds=0.02, ceiling_seconds=0.08)


class Diary:
    """An observer that writes down what it is told."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.delays: list[float] = []
        self.exit_codes: list[int] = []

    def event(self, event: WorkerEvent, status: PeerStatus) -> None:
        self.events.append(event.WhichOneof("event") or "")

    def restarting(self, exit_code: int, delay_seconds: float, status: PeerStatus) -> None:
        assert status.state == "restarting"
        self.exit_codes.append(exit_code)
        self.delays.append(delay_seconds)


class Scene:
    """A supervisor of a fake worker that behaves so."""

    def __init__(self, state_dir: Path, behaviour: str, backoff: Backoff = QUICK, leave_seconds: float = 30) -> None:
        self.state_dir, self.diary = state_dir, Diary()
        job = Job(run_id="test", fingerprint="", authority="", initial_peers=[], experiment=b"",
                  config=PeerConfig(name="tester", state_dir=state_dir))
        self.supervisor = Supervisor(
            job, [sys.executable, FAKE_WORKER, behaviour, str(state_dir)], [self.diary], PeerStatus(),
            backoff=backoff, leave_seconds=leave_seconds)

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        await asyncio.to_thread(until, condition, what)

    def play(self, script: Callable[["Scene"], Awaitable[None]]) -> Ending:
        async def run() -> Ending:
            running = asyncio.create_task(self.supervisor.run())
            await script(self)
            return await asyncio.wait_for(running, 30)

        ending = asyncio.run(run())
        assert self.supervisor.status.state == "left"
        assert self.supervisor.status.worker_pid == 0
        return ending

    def family_is_gone(self) -> None:
        pids = worker_pids(self.state_dir)
        assert len(pids) == 3
        until(lambda: not any(map(is_running, pids)), "the worker and its children gone", seconds=5)

    async def training(self) -> None:
        await self.until(lambda: "step" in self.diary.events, "a first step")


async def nothing(scene: Scene) -> None:
    return None


async def leave(scene: Scene) -> None:
    await scene.training()
    assert scene.supervisor.status.state == "training"
    scene.supervisor.leave.set()


def test_a_finished_worker_ends_the_run_with_zero(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "finish")
    assert scene.play(nothing) == Ending(0)
    assert scene.supervisor.status.finished.epoch == 3
    assert scene.supervisor.status.rounds.averaged == 3
    assert scene.diary.events[-1] == "finished"


def test_a_worker_that_hangs_after_its_last_word_has_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peer.supervisor.CLOSING_SECONDS", 0.1)
    scene = Scene(tmp_path, "linger")
    assert scene.play(nothing) == Ending(0)
    assert scene.diary.delays == []
    scene.family_is_gone()


def test_a_refusal_is_passed_on_and_not_retried(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "refuse")
    assert scene.play(nothing) == Ending(2, "no such device; expected a GPU. Buy one.")
    assert scene.diary.delays == []


def test_a_crashing_worker_is_restarted_ever_more_slowly(tmp_path: Path) -> None:
    async def leave_after_five(scene: Scene) -> None:
        await scene.until(lambda: len(scene.diary.delays) >= 5, "five restarts")
        scene.supervisor.leave.set()

    scene = Scene(tmp_path, "crash")
    scene.play(leave_after_five)
    assert scene.diary.delays[:5] == [0.02, 0.04, 0.08, 0.08, 0.08]
    assert set(scene.diary.exit_codes) == {1}
    assert scene.supervisor.status.worker_restarts >= 5


def test_backoff_doubles_to_its_ceiling_and_health_resets_it() -> None:
    backoff, waits = Backoff(), [0.0]
    for _ in range(8):
        waits.append(backoff.after(waits[-1], uptime_seconds=3))
    assert waits[1:] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert backoff.after(60, uptime_seconds=300) == 1


def test_a_killed_worker_s_children_are_gone_and_another_worker_trains(tmp_path: Path) -> None:
    first: list[int] = []

    async def kill_then_leave(scene: Scene) -> None:
        await scene.training()
        first.extend(worker_pids(tmp_path))
        os.kill(first[0], signal.SIGKILL)
        await scene.until(lambda: scene.diary.events.count("started") == 2, "a second worker")
        await scene.until(lambda: not any(map(is_running, first)), "the first family gone")
        scene.supervisor.leave.set()

    scene = Scene(tmp_path, "train")
    assert scene.play(kill_then_leave) == Ending(0)
    assert len(first) == 3
    assert scene.diary.exit_codes == [-signal.SIGKILL]
    scene.family_is_gone()


def test_what_a_worker_leaves_in_its_temporary_folder_goes_with_it(tmp_path: Path) -> None:
    left_behind: list[Path] = []

    async def kill_then_leave(scene: Scene) -> None:
        await scene.training()
        left_behind.append(Path((tmp_path / "left_behind").read_text()))
        assert left_behind[0].exists()
        os.kill(worker_pids(tmp_path)[0], signal.SIGKILL)
        await scene.until(lambda: not left_behind[0].exists(), "the killed worker's file gone")
        scene.supervisor.leave.set()

    Scene(tmp_path, "train").play(kill_then_leave)
    assert not left_behind[0].parent.exists()


def test_leaving_waits_for_the_worker_s_last_word(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "train")
    assert scene.play(leave) == Ending(0)
    assert scene.supervisor.status.finished.parameters_checksum == "ab"
    assert scene.diary.events[-2:] == ["checkpointed", "finished"]
    scene.family_is_gone()


def test_a_worker_that_will_not_leave_is_ended_after_the_deadline(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "stubborn", leave_seconds=0.2)
    ending = scene.play(leave)
    assert ending.exit_code == 1
    assert "had to be ended" in ending.message
    scene.family_is_gone()


def test_hurry_ends_a_worker_that_will_not_leave_at_once(tmp_path: Path) -> None:
    async def leave_and_hurry(scene: Scene) -> None:
        await leave(scene)
        await scene.until(lambda: scene.supervisor.status.state == "leaving", "leaving")
        scene.supervisor.hurry.set()

    scene = Scene(tmp_path, "stubborn", leave_seconds=3600)
    assert scene.play(leave_and_hurry).exit_code == 130
    scene.family_is_gone()


def test_leaving_does_not_wait_for_the_next_restart(tmp_path: Path) -> None:
    async def leave_while_resting(scene: Scene) -> None:
        await scene.until(lambda: bool(scene.diary.delays), "the wait before a restart")
        scene.supervisor.leave.set()

    scene = Scene(tmp_path, "crash", Backoff(first_seconds=3600))
    assert scene.play(leave_while_resting) == Ending(0)


def test_leaving_before_the_worker_can_hear_is_in_good_order(tmp_path: Path) -> None:
    async def at_once(scene: Scene) -> None:
        scene.supervisor.leave.set()

    assert Scene(tmp_path, "train").play(at_once).exit_code == 0


def test_a_cancelled_supervisor_leaves_nobody_behind(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "train")

    async def run() -> None:
        running = asyncio.create_task(scene.supervisor.run())
        await scene.training()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(run())
    scene.family_is_gone()


def test_the_worker_has_a_group_of_its_own_and_a_log(tmp_path: Path) -> None:
    groups: list[int] = []

    async def look(scene: Scene) -> None:
        await scene.training()
        groups.append(os.getpgid(scene.supervisor.status.worker_pid))
        await leave(scene)

    scene = Scene(tmp_path, "train")
    scene.play(look)
    assert groups[0] == worker_pids(tmp_path)[0] != os.getpgid(0)
    assert "the fake worker starts" in (tmp_path / "worker.log").read_text()
    assert not any("fake_worker" in " ".join(child.cmdline()) for child in psutil.Process().children())
