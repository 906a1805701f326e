"""The archivist: a coordinator's process that downloads states, writes checkpoints and hands the newest to newcomers.

    python -m coordinator.archivist STATE_DIR --events-fd N --parent-pid PID

It takes ArchiveOrders from its standard input, tells ArchiveEvents through the pipe N, and ends with its input. The
processor goes to others first. What comes from the network is bad input until it has been checked as a peer does.
"""

import argparse
import asyncio
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import uvloop
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure

from averaging.authorisation import MemberAuthoriser
from averaging.bans import BanFile
from averaging.dht import open_identity
from averaging.experiment import parse
from averaging.libp2p import attach
from averaging.pending_calls import mend_pending_calls
from averaging.pipe import framed, read_messages
from averaging.process import die_with_parent
from averaging.transports.swarm import state
from averaging.transports.swarm.averager import STREAMS_OF_ONE, UNREACHED
from averaging.transports.swarm.wire import Refused
from coordinator.evaluation import evaluate_checkpoint
from coordinator.held import Held, described
from coordinator.hub import upload
from coordinator.latest import Latest
from proto.archive_pb2 import ArchiveEvent, ArchiveOrder

UPLOADS = 16  # of states at a time; who comes beyond that is refused
NICE = 10
VERDICT_SECONDS = 60.0  # longer than the coordinator ever takes
SLOW = 5.0  # times the patience of a peer, which has a round to be in time for
log = logging.getLogger("covey.archivist")


class Archivist:
    """The process's work. `tell` takes its events."""

    def __init__(self, folder: Path, first: ArchiveOrder, tell: Callable[[ArchiveEvent], None]) -> None:
        begin = self._begin = first.begin
        self.token, self._tell, self._folder = first.token, tell, folder / "checkpoints"
        self._experiment, self._held = parse(begin.experiment), Held(begin.experiment)
        self._config, self._handler = self._experiment.averaging, f"covey.{begin.run_id}.state"
        self._authoriser = MemberAuthoriser(
            open_identity(folder / "identity.key"), authority=begin.authority, run_id=begin.run_id,
            is_banned=BanFile(folder / "bans", begin.authority, begin.run_id).is_banned,
            read_token=lambda: self.token)
        self._streams, self._uploads = Counter[str](), 0
        self._verdict: asyncio.Future[str] | None = None
        self._made: asyncio.Future[state.Snapshot] | None = None
        self._work = set[asyncio.Task[None]]()
        self._later = [Latest(work) for work, is_wanted in (
            (self._evaluate, begin.evaluate), (self._upload, begin.hub)) if is_wanted]

    async def start(self) -> None:
        """Serve what there is."""
        if path := await asyncio.to_thread(self._held.restore, self._folder):
            log.info("the archive goes on from %s", path)
            self._keep(path)
        self._p2p = await attach(self._begin.daemon, "archivist")
        with suppress(ControlFailure, KeyError):  # there is none, mostly; if there is, it is not this process's
            await self._p2p.remove_binary_stream_handler(self._handler)
        await self._p2p.add_binary_stream_handler(self._handler, self._host)
        self._tell(ArchiveEvent(ready=ArchiveEvent.Ready()))

    def obey(self, order: ArchiveOrder) -> None:
        """Returns at once."""
        self.token = order.token
        match order.WhichOneof("order"):
            case "pull":
                task = asyncio.create_task(self._pull(order.pull))
                self._work.add(task)
                task.add_done_callback(self._work.discard)
            case "verdict":
                if self._verdict and not self._verdict.done():
                    self._verdict.set_result(order.verdict.refusal)

    # -- taking --

    async def _pull(self, pull: ArchiveOrder.Pull) -> None:
        problems, into = list[str](), memoryview(bytearray(self._held.most_bytes))
        for donor in pull.donors:
            try:
                await self._take(donor, pull.epoch, into)
            except (*UNREACHED, Refused) as error:
                problems.append(f"{donor}: {error or type(error).__name__}")
            else:
                await self._write()
                return
        self._fail("download", f"no donor gave a good state: {'; '.join(problems[:3])}")

    async def _take(self, donor: str, epoch: int, into: memoryview) -> None:
        async with asyncio.timeout(self._config.load_state_timeout):
            epoch, length = await state.download(
                self._p2p, self._handler, donor, into, authoriser=self._authoriser, epoch=epoch,
                patience=SLOW * self._config.next_chunk_timeout)
        found, sketch = await asyncio.to_thread(self._held.check, into[:length], epoch)
        self._verdict = asyncio.get_running_loop().create_future()
        self._tell(ArchiveEvent(downloaded=ArchiveEvent.Downloaded(donor=donor, epoch=epoch, sketch=sketch)))
        async with asyncio.timeout(VERDICT_SECONDS):
            refusal = await self._verdict
        if refusal:
            raise Refused(refusal)
        await asyncio.to_thread(self._held.take, found)
        self._made = None

    async def _write(self) -> None:
        try:
            path = await asyncio.to_thread(self._held.write, self._folder, self._begin.keep_last)
        except OSError as error:
            self._fail("disk", f"no checkpoint was written: {error}; the earlier ones are as they were")
        else:
            self._keep(path)

    def _keep(self, path: Path) -> None:
        meta = described(path)
        self._tell(ArchiveEvent(kept=ArchiveEvent.Kept(
            epoch=meta["epoch"], time_seconds=meta["progress"].get("time", path.stat().st_mtime),
            sha256=meta["sha256"], path=str(path))))
        for later in self._later:
            later.give(path)

    def _fail(self, stage: str, message: str) -> None:
        self._tell(ArchiveEvent(failed=ArchiveEvent.Failed(stage=stage, message=message)))

    # -- what follows a checkpoint, and may take longer than until the next --

    async def _evaluate(self, path: Path) -> None:
        epoch = described(path)["epoch"]
        if epoch <= self._begin.evaluated:
            return
        data = Path(self._begin.data) if self._begin.data else None
        try:
            figures = await asyncio.to_thread(evaluate_checkpoint, path, data)
        except Exception as error:  # whatever images or a GPU do, the archive goes on
            self._fail("evaluation", f"the checkpoint of epoch {epoch} was not evaluated: {_words(error)}")
        else:
            self._tell(ArchiveEvent(evaluated=ArchiveEvent.Evaluated(epoch=epoch, figures=figures)))

    async def _upload(self, path: Path) -> None:
        epoch = described(path)["epoch"]
        try:
            await asyncio.to_thread(upload, self._begin.hub, path, epoch)
        except Exception as error:  # of httpx, huggingface-hub, the disk
            self._fail("upload", f"the checkpoint of epoch {epoch} was not uploaded to {self._begin.hub}: "
                       f"{_words(error)}; the next one is tried")
        else:
            self._tell(ArchiveEvent(uploaded=ArchiveEvent.Uploaded(epoch=epoch)))

    # -- giving --

    async def _host(self, info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A stream that somebody opened."""
        asker = str(info.peer_id)
        self._streams[asker] += 1
        try:
            if self._streams[asker] > STREAMS_OF_ONE:
                raise Refused("too many streams")
            await self._give(asker, reader, writer)
        except Refused as error:
            log.info("the archive's state is not for %s: %s", asker, error)
        except UNREACHED:
            pass  # it is gone, or too slow: its loss
        finally:
            writer.close()
            self._streams -= Counter([asker])

    async def _give(self, asker: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        patience = SLOW * self._config.next_chunk_timeout
        await state.admit(reader, writer, asker, authoriser=self._authoriser, patience=patience)
        if self._uploads >= UPLOADS:
            raise Refused("too many downloads at once")
        self._uploads += 1
        try:
            await state.upload(reader, writer, authoriser=self._authoriser, snapshot=self._snapshot, patience=patience,
                               seconds=self._config.load_state_timeout)
        finally:
            self._uploads -= 1

    async def _snapshot(self) -> state.Snapshot:
        """One for all who ask until there is a newer state."""
        if self._made is None:
            self._made = asyncio.ensure_future(asyncio.to_thread(_snapshot_of, self._held))
        return await asyncio.shield(self._made)


def _snapshot_of(held: Held) -> state.Snapshot:
    epoch, data = held.snapshot()
    return state.Snapshot(epoch, memoryview(data), hashlib.sha256(data).digest())


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


async def serve(folder: Path, events_fd: int) -> None:
    """Until the coordinator closes the pipe of orders."""
    mend_pending_calls()
    archivist: Archivist | None = None
    async for order in read_messages(os.dup(0), ArchiveOrder):
        if archivist is None:
            archivist = Archivist(folder, order, lambda event: _send(events_fd, event))
            await archivist.start()
        else:
            archivist.obey(order)


def _send(fd: int, event: ArchiveEvent) -> None:
    """Waits for the coordinator, which always reads."""
    data = memoryview(framed(event))
    while data:
        data = data[os.write(fd, data):]


def main() -> None:
    """Until the coordinator is gone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("state_dir", type=Path)
    parser.add_argument("--events-fd", type=int, required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    arguments = parser.parse_args()
    die_with_parent(arguments.parent_pid)
    os.set_inheritable(arguments.events_fd, False)
    os.nice(NICE)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(arguments.state_dir, arguments.events_fd))


if __name__ == "__main__":
    main()
