"""The averager: a peer's process for the network. It meets, averages and hands out state while the trainer computes.

One event loop, in a thread of its own. What comes from the network is bad input until its sender's token, its length
and its signed statements have been checked; what is refused is counted, and told with the next outcome.
"""

import asyncio
import logging
import signal
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePath
from threading import Thread
from time import monotonic
from typing import Any, Literal

import torch
import uvloop
from google.protobuf.message import DecodeError
from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, P2PHandlerError
from hivemind.utils.crypto import RSAPrivateKey
from hivemind.utils.multiaddr import Multiaddr

from averaging.authorisation import Authoriser
from averaging.config import Averaging
from averaging.messages import NOTHING, Average, Call, Join, Message, RoundId
from averaging.pending_calls import mend_pending_calls
from averaging.process import die_with_parent
from averaging.round import reply_of_the_absent
from averaging.transports.swarm import awake, state
from averaging.transports.swarm.all_reduce import STREAMS, AllReduce, Result
from averaging.transports.swarm.channel import (
    Board,
    Cancel,
    Channel,
    Drop,
    Ended,
    Fetch,
    Fetched,
    Know,
    Meet,
    Ready,
    Share,
    StateMade,
    StateWanted,
)
from averaging.transports.swarm.early import Early
from averaging.transports.swarm.frames import read_header
from averaging.transports.swarm.rtt import RoundTrips
from averaging.transports.swarm.session import Session, timing_of
from averaging.transports.swarm.wire import Refused, Wire
from averaging.transports.transport import Outcome
from proto.round_pb2 import Ack

KEPT_SESSIONS = 16     # that have ended, for those who ask late
KEPT_GROUPS = 4        # whose all-reduce has ended
UPLOADS = 4            # of states at a time; a member who comes beyond that is refused
STREAMS_OF_ONE = 16    # that one peer may have open here at a time; each costs files
BEFORE_DEADLINE = 0.95  # of a round's time an all-reduce ends, so that it can still say whose fault that is
LATE_STEPS = 3         # micro-batches that a trainer may be late by, and still be expected
COMPLAINTS = 1000      # that are written to the log, each once
UNREACHED = (TimeoutError, OSError, P2PDaemonError, P2PHandlerError, asyncio.IncompleteReadError, DecodeError)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """What the trainer tells the averager by forking it."""

    run_id: str
    key: RSAPrivateKey
    config: Averaging
    peer_id: str
    authoriser: Authoriser
    mode: Literal["node", "client", "auxiliary"]
    board: Board
    daemon: str  # address of libp2p's


def serve(setup: Setup, channel: Channel, trainers: Channel, parent_pid: int) -> None:
    """The process's main. `trainers` is the channel's other end, inherited by the fork."""
    die_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the trainer's to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    trainers.close()
    mend_pending_calls()
    torch.set_num_threads(1)  # the cores are the trainer's
    # hivemind does so too: OMP's threads do not survive the fork of a main thread that had some
    thread = Thread(target=_run, args=(setup, channel), name="averager")
    thread.start()
    thread.join()


def _run(setup: Setup, channel: Channel) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(Averager(setup, channel).run())


class Averager:
    """The process's work, in small steps."""

    def __init__(self, setup: Setup, channel: Channel) -> None:
        self._setup, self._channel, self._board = setup, channel, setup.board
        config = setup.config
        self._wire = Wire(setup.run_id, setup.key, setup.authoriser, most_weight=config.target_batch_size)
        self._prefix = f"covey.{setup.run_id}"
        self._sessions: dict[RoundId, Session] = {}
        self._early = Early(2 * config.matchmaking_time + config.averaging_timeout)
        self._round_trips = RoundTrips()
        self._refused, self._complained = Counter[str](), set[tuple[str, str]]()
        self._memory: dict[int, Any] = {}
        self._groups: dict[bytes, asyncio.Future[AllReduce]] = {}  # by group id: that run, or that streams wait for
        self._over = deque[bytes]()  # of these, those that have ended, the oldest first
        self._snapshot: asyncio.Future[state.Snapshot | None] | None = None
        self._uploads, self._streams = 0, Counter[str]()
        self._tasks = set[asyncio.Task[None]]()

    # -- from start to end --

    async def run(self) -> None:
        """Serve until the trainer hangs up."""
        loop = asyncio.get_running_loop()
        self._left = loop.create_future()
        await self._connect()
        loop.add_reader(self._channel.fileno(), self._hear)
        self._channel.send(Ready())
        await self._left
        await self._leave()

    async def _connect(self) -> None:
        daemon = Multiaddr(self._setup.daemon)
        P2P._UNIX_SOCKET_PREFIX = f"/unix{PurePath(daemon['unix']).parent}/"  # beside the daemon's own
        self._p2p = await P2P.replicate(daemon)
        await self._p2p.add_protobuf_handler(f"{self._prefix}.message", self._take_call, _Raw)
        await self._p2p.add_binary_stream_handler(STREAMS, partial(self._host, self._take_part))
        await self._p2p.add_binary_stream_handler(f"{self._prefix}.state", partial(self._host, self._give_state))

    async def _leave(self) -> None:
        for task in self._tasks:
            task.cancel()
        with suppress(*UNREACHED):
            async with asyncio.timeout(0.2):
                await self._p2p.remove_protobuf_handler(f"{self._prefix}.message")
                await self._p2p.remove_binary_stream_handler(STREAMS)
                await self._p2p.remove_binary_stream_handler(f"{self._prefix}.state")
        await self._p2p.shutdown()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("a bug: a task of the averager failed", exc_info=error)

    # -- the trainer's word --

    def _hear(self) -> None:
        try:
            while self._channel.has_message():
                self._obey(self._channel.receive())
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
            self._left.set_result(None)

    def _obey(self, word: Any) -> None:
        match word:
            case Share(number, _):
                self._memory[number] = self._channel.accept(word)
            case Drop(number):
                self._memory.pop(number, None)
            case Know(peers):
                for peer in peers:
                    self._spawn(self._greet(peer))
            case Meet():
                self._meet(word)
            case Cancel(number):
                for session in self._sessions.values():
                    if session.meet.meeting == number:
                        session.cancel()
            case Fetch():
                self._spawn(self._fetch(word))
            case StateMade():
                self._take_snapshot(word)

    def _tell(self, word: Any) -> None:
        with suppress(OSError):  # a trainer that is gone: _hear sees it too
            self._channel.send(word)

    # -- meetings --

    def _meet(self, meet: Meet) -> None:
        setup = self._setup
        try:
            if meet.round in self._sessions:
                raise Refused("this peer has met for this already")
            me = self._wire.member(meet.round, weight=meet.weight, mode=setup.mode, fingerprint=meet.fingerprint,
                                   layout=meet.layout, samples=meet.samples)
        except Refused as error:  # its token has expired, say
            self._tell(Ended(meet.meeting, Outcome(False, reason=f"this peer can't take part: {error}")))
            return
        session = self._sessions[meet.round] = Session(
            self, meet, memory=self._memory.get(meet.memory) if meet.memory else None, me=me,
            timing=timing_of(setup.config, self._round_trips.longest(meet.group)),
            capacity=max(setup.config.target_group_size, len(meet.group)))
        for kept in self._early.take(meet.round, monotonic()):
            session.received(kept.sender, kept.message)
        self._spawn(session.start())

    def ended(self, session: Session, outcome: Outcome) -> None:
        """Tell the trainer, and keep the last few sessions for who asks late."""
        refused, self._refused = self._refused + Counter(outcome.refused), Counter()
        self._tell(Ended(session.meet.meeting, replace(outcome, refused=dict(refused))))
        over = [round for round, session in self._sessions.items() if session.has_ended]
        for round in over[:-KEPT_SESSIONS]:
            del self._sessions[round]

    # -- messages --

    def send(self, session: Session, receiver: str, message: Message) -> None:
        """Have it delivered, or the session told that it is not."""
        self._spawn(self._deliver(session, receiver, message))

    async def _deliver(self, session: Session, receiver: str, message: Message) -> None:
        try:
            await self._call(receiver, self._wire.dump(message), session.timing.answer_seconds)
        except UNREACHED:
            session.undelivered(receiver, message)

    async def _call(self, receiver: str, data: bytes, seconds: float) -> None:
        started = monotonic()
        async with awake.timeout(seconds):
            await self._p2p.call_protobuf_handler(PeerID.from_base58(receiver), f"{self._prefix}.message",
                                                  _Raw(data), Ack)
        self._round_trips.took(receiver, monotonic() - started)

    async def _greet(self, peer: str) -> None:
        """Connect, and learn how far it is; a peer in client mode is reached by others through this connection."""
        with suppress(*UNREACHED):
            await self._call(peer, self._wire.dump_greeting(), 10 * self._setup.config.request_timeout)

    async def _take_call(self, call: "_Raw", context: P2PContext) -> Ack:
        sender = str(context.remote_id)
        try:
            if message := self._wire.load(sender, call.data):
                self._receive(sender, message, len(call.data))
        except Refused as error:
            self._refuse(sender, str(error))
            raise
        except Exception:  # hivemind tells the caller of it, and nobody else
            log.exception("a bug: a message was not taken")
            raise
        return Ack()

    def _receive(self, sender: str, message: Message, length: int) -> None:
        if session := self._sessions.get(message.round):
            session.received(sender, message)
            return
        if isinstance(message, Call | Join):
            self._early.keep(sender, message, length, monotonic())
            if message.round.epoch == self._board.epoch:
                self._board.called = message.round.epoch
        if reply := reply_of_the_absent(message, self._board.epoch, self._coming_seconds()):
            self._spawn(self._reply(sender, reply))

    async def _reply(self, receiver: str, message: Message) -> None:
        with suppress(*UNREACHED):
            await self._call(receiver, self._wire.dump(message), self._setup.config.request_timeout)

    def _coming_seconds(self) -> float | None:
        """Until the trainer's micro-batch is done, or the round that it waits for, as far as that can be told."""
        left, step = self._board.expected - monotonic(), self._board.step_seconds
        if not all(session.has_ended for session in self._sessions.values()):
            return self._setup.config.request_timeout + step  # others may have heard of its end before this peer
        return None if left < -LATE_STEPS * step else max(left, step / 4)

    def _refuse(self, peer: str, reason: str) -> None:
        """Count it for the next outcome; say it once."""
        self._refused[reason] += 1
        if (peer, reason) not in self._complained and len(self._complained) < COMPLAINTS:
            self._complained.add((peer, reason))
            log.warning("refused what %s sent: %s", peer, reason)

    # -- streams that others open --

    async def _host(self, serve: Callable[[str, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
                    info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Have one served, and close it."""
        peer = str(info.peer_id)
        self._streams[peer] += 1
        try:
            if self._streams[peer] > STREAMS_OF_ONE:
                raise Refused("too many streams")
            await serve(peer, reader, writer)
        except Refused as error:
            self._refuse(peer, str(error))
        except UNREACHED:
            pass  # it is gone, or too slow: its loss
        finally:
            writer.close()
            self._streams -= Counter([peer])  # nothing stays of those who have none

    # -- all-reduce --

    async def all_reduce(self, session: Session, group: Average) -> Result:
        """Run the group's; the streams that name it, also those that have waited for it, go there."""
        try:
            reduce = self._make_all_reduce(session, group)
        except RuntimeError as error:  # torch's: an auxiliary has no memory for so many values
            return Result(False, (), 0, 0, Counter(), str(error))
        group_id = group.group_id
        self._groups.setdefault(group_id, asyncio.get_running_loop().create_future()).set_result(reduce)
        try:
            return await reduce.run()
        finally:  # kept a little longer: who comes late is told that it is over
            self._over.append(group_id)
            if len(self._over) > KEPT_GROUPS:
                del self._groups[self._over.popleft()]

    def _make_all_reduce(self, session: Session, group: Average) -> AllReduce:
        config = self._setup.config
        contributors = (member.layout for member in group.members if member.mode != "auxiliary")
        layout = next(contributors, NOTHING)  # equal, of all of them
        sections = layout.sections(with_state=group.with_state)
        values = sum(size for size, _ in sections)
        return AllReduce(
            p2p=self._p2p, group_id=group.group_id, me=self._setup.peer_id, members=group.members, sections=sections,
            vector=session.given[:values] if session.given is not None else None,
            mean=session.mean[:values] if session.mean is not None else None,
            clip_radius=config.clip_radius if config.robust == "centered_clip" else None,
            chunk_timeout=self._patience([member.peer_id for member in group.members]),
            timeout=BEFORE_DEADLINE * session.timing.average_seconds, token=self._setup.authoriser.token)

    def stop_all_reduce(self, group_id: bytes) -> None:
        """Give it up, if it runs."""
        if (running := self._groups.get(group_id)) and running.done():
            running.result().stop()

    async def _running(self, group_id: bytes) -> AllReduce:
        """The group's all-reduce; it may begin here a little later than elsewhere."""
        group = self._groups.setdefault(group_id, asyncio.get_running_loop().create_future())
        try:
            async with awake.timeout(self._setup.config.request_timeout):
                return await asyncio.shield(group)
        except TimeoutError:
            if not group.done():
                self._groups.pop(group_id, None)
            raise Refused("a group that is not known") from None

    async def _take_part(self, sender: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A member's stream of values."""
        try:
            header = await read_header(reader)
        except ValueError as error:
            raise Refused(str(error)) from None
        if refusal := self._setup.authoriser.refusal(sender, header.token):
            raise Refused(refusal)
        reduce = await self._running(header.group_id)
        await reduce.serve(sender, reader, writer)

    # -- state --

    async def _give_state(self, asker: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Somebody downloads."""
        setup, patience = self._setup, self._patience([asker])
        await state.admit(reader, writer, asker, authoriser=setup.authoriser, patience=patience)
        if self._uploads >= UPLOADS:
            raise Refused("too many downloads at once")
        self._uploads += 1
        try:
            await state.upload(reader, writer, authoriser=setup.authoriser, snapshot=self._make_snapshot,
                               patience=patience, seconds=setup.config.load_state_timeout)
        finally:
            self._uploads -= 1

    def _patience(self, peers: Sequence[str]) -> float:
        return self._setup.config.next_chunk_timeout + 10 * self._round_trips.longest(peers)

    async def _make_snapshot(self) -> state.Snapshot | None:
        """The trainer's; one for all who ask at the same time."""
        if self._snapshot is None:
            self._snapshot = asyncio.get_running_loop().create_future()
            self._tell(StateWanted())
        return await asyncio.shield(self._snapshot)

    def _take_snapshot(self, made: StateMade) -> None:
        assert self._snapshot is not None
        snapshot, self._snapshot = self._snapshot, None
        memory = self._memory.pop(made.memory) if made.memory is not None else None
        data = memoryview(memory)[:made.length] if memory else None
        snapshot.set_result(state.Snapshot(made.epoch, data, made.sha256) if data else None)

    async def _fetch(self, fetch: Fetch) -> None:
        """Download from one donor after the other, until one's state is good."""
        into, problems = memoryview(self._memory[fetch.memory])[:fetch.limit], []
        with suppress(TimeoutError):
            async with asyncio.timeout(fetch.seconds):
                for donor in fetch.donors:
                    try:
                        epoch, length = await state.download(
                            self._p2p, f"{self._prefix}.state", donor, into, authoriser=self._setup.authoriser,
                            epoch=fetch.epoch, patience=self._patience([donor]))
                    except (*UNREACHED, Refused) as error:
                        problems.append(f"{donor}: {error or type(error).__name__}")
                    else:
                        self._tell(Fetched(donor, epoch, length, ""))
                        return
        self._tell(Fetched("", 0, 0, "; ".join(problems[:3]) or "no donor answered in time"))


class _Raw:
    """Stands for a protobuf where hivemind wants one: a message's length is looked at before it is parsed."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    FromString = classmethod(lambda cls, data: cls(data))

    def SerializeToString(self) -> bytes:
        return self.data
