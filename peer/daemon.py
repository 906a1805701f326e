"""A volunteer's daemon: enrols, checks what would go wrong, then supervises the worker. Never imports torch."""

import asyncio
import os
import platform
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Any

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from platformdirs import user_state_path

from averaging.backoff import Backoff
from averaging.identity import open_key, peer_id_of, public_bytes
from coordinator.http import serve_http
from coordinator.link import Link
from coordinator.ports import free_port
from coordinator.state_dir import open_state_dir
from coordinator.tls import Unreachable
from peer.config import PeerConfig
from peer.control import serve_control, socket_path
from peer.credited import keep_credited
from peer.enrol import Enrolment, enrol_anywhere, recall
from peer.http import peer_app
from peer.job import Job, keep_membership, write_job
from peer.membership import stay
from peer.metrics import PeerMetrics
from peer.recorder import Recorder
from peer.supervisor import Ending, Observer, Supervisor
from proto.peer_pb2 import PeerStatus
from proto.swarm_pb2 import Contribution
from training.config import validate
from training.data.checks import check_data
from training.errors import BadInput
from training.objectives.checks import require_queue_within, warnings

BACKOFF = Backoff()
HTTP_HOST = "127.0.0.1"
LEAVE_SECONDS = 7.5  # for the worker; what the daemon closes besides takes the rest of ten
MOST_PEERS = 64  # of one run on one machine, each in a state directory of its own


async def volunteer(link: Link, options: Mapping[str, Any], observer: Observer) -> Ending:
    """Take part in the experiment behind `link` until told to leave. `options` are PeerConfig's, those given.

    Raises BadInput, leaving nothing behind, for what can be found wrong before the worker starts.
    """
    _config(options, Path())
    with hold_state_dir(link.run_id, options) as config:
        key = open_key(config.identity_path)
        enrolment = await enrol_or_recall(link, config, key)
        job = prepare(enrolment, config)
        renewing = asyncio.create_task(stay(link, key, job, enrolment))
        try:
            return await run_job(job, [observer, Recorder(config.state_dir)], [sys.executable, "-m", "peer.worker"],
                                 credited=partial(keep_credited, list(dict.fromkeys([link, *enrolment.coordinators])),
                                                  job, peer_id_of(public_bytes(key))))
        finally:
            renewing.cancel()


async def enrol_or_recall(link: Link, config: PeerConfig, key: RSAPrivateKey) -> Enrolment:
    """Enrol, with the link's coordinator or another that is known from the last time; while all are away, who was a
    member goes on with what it was told then. Raises BadInput."""
    last = recall(link, config)
    try:
        return await enrol_anywhere(link, last.coordinators if last else (), config.name, key)
    except Unreachable as error:
        if last is None:
            raise
        print(f"covey: {error} Until then, this peer goes on with what it said last.", file=sys.stderr)
        return last


def prepare(enrolment: Enrolment, config: PeerConfig) -> Job:
    """The job, checked and written into its state directory. Raises BadInput."""
    _check(enrolment, config)
    job = Job(run_id=enrolment.run_id, fingerprint=enrolment.fingerprint, experiment=enrolment.document,
              authority=enrolment.authority.decode(), initial_peers=list(enrolment.initial_peers),
              coordinators=[str(link) for link in enrolment.coordinators],
              config=config.model_copy(update={"name": enrolment.name}))
    keep_membership(job, enrolment.token, enrolment.bans)
    write_job(job)
    for warning in warnings(enrolment.experiment, config.batch_size):
        print(f"covey: {warning}", file=sys.stderr)
    return job


def _check(enrolment: Enrolment, config: PeerConfig) -> None:
    if not config.auxiliary:
        images = check_data(enrolment.experiment.data, config.data, config.batch_size, config.loader)
        require_queue_within(enrolment.experiment, images)
    elif enrolment.experiment.averaging.strategy == "gossip":
        raise BadInput("--auxiliary in a swarm of strategy gossip", expected="a strategy that averages in groups: "
                       "neighbours need no help", mend="Join without it, to train.")
    free_port(HTTP_HOST, config.http_port, "HTTP")
    if not config.client_mode:
        free_port(config.listen, config.port, "libp2p")


@contextmanager
def hold_state_dir(run_id: str, options: Mapping[str, Any]) -> Iterator[PeerConfig]:
    """Hold a state directory: the one in `options`, or the first of this machine's that is free.

    Folders that were made here are removed again on BadInput, which passes through. Raises BadInput if there is none.
    """
    chosen = options.get("state_dir")
    folders = [Path(chosen)] if chosen else [default_state_dir(run_id, number) for number in range(1, MOST_PEERS + 1)]
    refused: list[BadInput] = []
    for number, folder in enumerate(folders, 1):
        made = _first_missing(folder.expanduser().absolute())
        with ExitStack() as held:
            try:
                path = held.enter_context(open_state_dir(folder, role="peer", run_id=run_id))
            except BadInput as error:  # held by another peer of this machine
                refused.append(error)
                continue
            try:
                yield _config({"name": default_name(number), **options}, path)
            except BadInput:
                if made:
                    rmtree(made, ignore_errors=True)
                raise
            return
    raise refused[0]


def _first_missing(path: Path) -> Path | None:
    """The topmost folder that has to be made for `path`; None if it is there."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    return missing[-1] if missing else None


def default_state_dir(run_id: str, number: int) -> Path:
    """Where the `number`th peer of a run on this machine keeps its state."""
    return user_state_path("covey") / (run_id if number == 1 else f"{run_id}.{number}")


def default_name(number: int) -> str:
    """What the `number`th peer of a run on this machine is called."""
    host = platform.node().partition(".")[0][:56] or "volunteer"
    return host if number == 1 else f"{host}-{number}"


def _config(options: Mapping[str, Any], state_dir: Path) -> PeerConfig:
    return validate(PeerConfig, {"name": default_name(1), **options, "state_dir": state_dir})


async def run_job(job: Job, observers: Sequence[Observer], command: Sequence[str], *,
                  credited: Callable[[Callable[[Contribution], None]], Coroutine[Any, Any, None]] | None = None,
                  backoff: Backoff = BACKOFF, leave_seconds: float = LEAVE_SECONDS) -> Ending:
    """Supervise a worker, `command STATE_DIR ...`, on `job`; serve its metrics and control meanwhile.

    `credited(tell)` tells what this peer is credited with, for ever.
    """
    config, metrics = job.config, PeerMetrics()
    status = PeerStatus(name=config.name, run_id=job.run_id, state="starting", daemon_pid=os.getpid(),
                        state_dir=str(config.state_dir))
    supervisor = Supervisor(job, [*command, str(config.state_dir)], [metrics, *observers], status,
                            backoff=backoff, leave_seconds=leave_seconds)
    with leaving_on_signals(supervisor), ExitStack() as stack:
        if credited:
            stack.callback(asyncio.create_task(credited(status.contribution.CopyFrom)).cancel)
        async with (serve_http(peer_app(status, metrics.registry), HTTP_HOST, config.http_port) as http_port,
                    serve_control(supervisor, socket_path(config.state_dir))):
            status.metrics_url = f"http://{HTTP_HOST}:{http_port}/metrics"
            return await supervisor.run()


@contextmanager
def leaving_on_signals(supervisor: Supervisor) -> Iterator[None]:
    """SIGTERM, SIGHUP and the first SIGINT ask to leave; a SIGINT after that, to do so at once."""
    loop = asyncio.get_running_loop()

    def leave() -> None:
        supervisor.leave.set()

    def interrupt() -> None:
        if supervisor.leave.is_set():
            supervisor.hurry.set()
        leave()

    handlers = {signal.SIGTERM: leave, signal.SIGINT: interrupt}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup stays in force
        handlers[signal.SIGHUP] = leave
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in handlers:
            loop.remove_signal_handler(number)
