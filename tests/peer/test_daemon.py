"""The daemon as a process, over a fake worker: signals, its own death, its control socket and its metrics."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from processes import is_running, until, worker_pids

from averaging.runtime import make_runtime_dir, runtime_dir
from coordinator.state_dir import open_state_dir
from peer.control import socket_path
from peer.local import leave, local_peers
from peer.plain import plain
from training.errors import BadInput

RUN_DAEMON = str(Path(__file__).with_name("run_daemon.py"))


class Daemon:
    """A daemon that runs on a fake worker."""

    def __init__(self, state_dir: Path, behaviour: str) -> None:
        self.state_dir = state_dir
        self.process = subprocess.Popen(
            [sys.executable, RUN_DAEMON, str(state_dir), behaviour], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, start_new_session=True, env={**os.environ, "GRPC_ENABLE_FORK_SUPPORT": "0"})  # as peer.cli

    def event(self, wanted: str) -> dict[str, Any]:
        """The next event of that kind."""
        assert self.process.stdout
        for line in self.process.stdout:
            if json.loads(line)["event"] == wanted:
                return dict(json.loads(line))
        raise AssertionError(f"no {wanted}: {self.process.communicate()[1]}")

    def family(self) -> list[int]:
        until(lambda: len(worker_pids(self.state_dir)) == 3, "the fake worker and its children")
        return worker_pids(self.state_dir)

    def end(self) -> tuple[int, str]:
        """Exit code and stderr."""
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[list[Daemon]]:
    started: list[Daemon] = []
    yield started
    for daemon in started:
        for pid in [daemon.process.pid, *worker_pids(daemon.state_dir)]:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)
        daemon.process.communicate()


@pytest.fixture
def trainer(tmp_path: Path, daemons: list[Daemon]) -> Daemon:
    daemons.append(Daemon(tmp_path / "state", "train"))
    daemons[0].event("epoch")
    return daemons[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_leaves_in_good_order(trainer: Daemon, number: signal.Signals) -> None:
    family = trainer.family()
    trainer.process.send_signal(number)
    finished = trainer.event("finished")
    assert trainer.end() == (0, "")
    assert finished["parameters_checksum"] == "ab"
    assert finished["rounds"]["averaged"] == finished["epoch"]
    until(lambda: not any(map(is_running, family)), "all gone", seconds=5)
    assert not list(runtime_dir().iterdir())


def test_a_second_interrupt_ends_all_at_once(tmp_path: Path, daemons: list[Daemon]) -> None:
    daemons.append(Daemon(tmp_path / "state", "stubborn"))
    daemons[0].event("epoch")
    family = daemons[0].family()
    daemons[0].process.send_signal(signal.SIGINT)
    until(lambda: asyncio.run(local_peers())[0].state == "leaving", "leaving")
    daemons[0].process.send_signal(signal.SIGINT)
    exit_code, message = daemons[0].end()
    assert exit_code == 130
    assert message.count("\n") == 1
    until(lambda: not any(map(is_running, family)), "all gone", seconds=5)


def test_a_killed_daemon_takes_its_worker_and_that_one_s_children_along(trainer: Daemon) -> None:
    worker, bound, loose = trainer.family()
    trainer.process.kill()
    until(lambda: not is_running(worker) and not is_running(bound), "worker and child gone", seconds=5)
    os.kill(loose, signal.SIGKILL)  # a real worker has no child that is not bound to it


def test_a_refusal_is_one_line_and_exit_code_two(tmp_path: Path, daemons: list[Daemon]) -> None:
    daemons.append(Daemon(tmp_path / "state", "refuse"))
    assert daemons[0].end() == (2, "no such device; expected a GPU. Buy one.\n")


def test_status_and_leave_answer_on_the_socket(trainer: Daemon) -> None:
    [status] = asyncio.run(local_peers())
    assert (status.name, status.run_id, status.state) == ("tester", "test-0123456789ab", "training")
    assert status.daemon_pid == trainer.process.pid
    assert status.worker_pid == trainer.family()[0]
    assert status.state_dir == str(trainer.state_dir)
    assert status.step.samples_total == 16 * status.step.epoch > 0

    last = asyncio.run(leave(None))
    assert last.state == "left"
    assert last.finished.checkpoint == "/c"
    assert trainer.end() == (0, "")


def test_the_socket_is_its_owner_s_alone(trainer: Daemon) -> None:
    path = socket_path(trainer.state_dir)
    assert path.stat().st_mode & 0o777 == 0o600
    assert runtime_dir().stat().st_mode & 0o777 == 0o700
    assert len(bytes(path)) < 108


def test_a_runtime_folder_that_others_can_enter_is_refused(own_runtime_dir: Path) -> None:
    (own_runtime_dir / "covey").mkdir(mode=0o755)
    with pytest.raises(BadInput, match="mode 755"):
        socket_path(Path("/somewhere"))


def test_health_is_served_on_the_socket(trainer: Daemon) -> None:
    with grpc.insecure_channel(f"unix:{socket_path(trainer.state_dir)}") as channel:
        request = health_pb2.HealthCheckRequest(service="covey.v1.Peer")
        reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=10)
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_metrics_and_health_are_served_over_http(trainer: Daemon) -> None:
    [status] = asyncio.run(local_peers())
    text = urllib.request.urlopen(status.metrics_url, timeout=10).read().decode()
    assert 'covey_averaging_rounds_total{kind="gradients",outcome="averaged"}' in text
    health = urllib.request.urlopen(status.metrics_url.replace("/metrics", "/healthz"), timeout=10)
    assert health.read() == b"training\n"


def test_a_socket_left_by_a_killed_daemon_is_removed_by_the_next_look(own_runtime_dir: Path) -> None:
    make_runtime_dir()
    stale = runtime_dir() / "0123456789abcdef.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(stale))
    assert asyncio.run(local_peers()) == []
    assert not stale.exists()


def test_leaving_without_a_peer_says_so() -> None:
    with pytest.raises(BadInput, match="0 peers on this machine"):
        asyncio.run(leave(None))
    with pytest.raises(BadInput, match="no peer runs with state directory /nowhere"):
        asyncio.run(leave(Path("/nowhere")))


def test_the_state_directory_is_free_again_after_a_kill(trainer: Daemon) -> None:
    with (pytest.raises(BadInput, match=f"held by process {trainer.process.pid}"),
          open_state_dir(trainer.state_dir, role="peer", run_id="test-0123456789ab")):
        pass
    trainer.process.kill()
    trainer.process.wait()
    with open_state_dir(trainer.state_dir, role="peer", run_id="test-0123456789ab"):
        pass


def test_a_status_is_plain_data(trainer: Daemon) -> None:
    [status] = asyncio.run(local_peers())
    data = json.loads(json.dumps(plain(status)))
    assert data["started"]["images"] == 100
    assert data["finished"] is None


def test_the_daemon_never_imports_torch() -> None:
    code = "import peer.daemon, peer.watch, sys; print([name for name in ('torch', 'hivemind') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout == "[]\n"


def test_no_process_of_ours_is_left(trainer: Daemon) -> None:
    trainer.process.send_signal(signal.SIGTERM)
    trainer.end()
    assert not any(str(trainer.state_dir) in " ".join(process.info["cmdline"] or ())
                   for process in psutil.process_iter(["cmdline"]))
