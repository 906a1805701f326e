"""Butterfly all-reduce of one group over libp2p streams: all or nothing.

Every member but the clients reduces an equal span of the values. A member opens one stream to each reducer, sends its
chunks of that span (frames.py), and gets each chunk's average back as soon as all contributions to it are there
(reduction.py). Everybody, the reducer too, uses the average as it is decoded, so all end with equal bits.

Who sends nothing, not even a sign of life, for `chunk_timeout` while something is due, whose stream ends early, or who
sends what is not to be used, is blamed, and the all-reduce has failed here. Whoever fails says so on every stream, and
whom it blames: so nobody blames the bearer, and all end at once. That is hearsay: a member can lie in it, as it can in
its vote. At the deadline, a reducer blames those for want of whose values it could not go on, alive or not.

The opener of a stream closes it; the other end keeps it open until then: libp2p's daemon can lose the last data of a
stream that its server closes.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError
from torch import Tensor

from averaging.messages import Member
from averaging.transports.swarm import awake
from averaging.transports.swarm.frames import ALIVE, DATA, NOBODY, STOP, Header, Stream
from averaging.transports.swarm.reduction import Chunk, Refusal, Span, are_finite, as_bytes, decoded, encoded, lay_out

STREAMS = "covey.average"  # the name of the handler, at every averager
OPENING = 1.25             # chunk timeouts that a stream may take to open: members may not have met yet
PARTING = 0.25             # chunk timeouts that others have to close after a failure
SIGNS = 4                  # of life in a chunk timeout


@dataclass(frozen=True)
class Result:
    """How an all-reduce ended here. The mean is valid only if `complete`."""

    complete: bool
    blamed: tuple[str, ...]  # for that, by what this peer saw or another says; itself if its values are not finite
    bytes_sent: int          # of values, as encoded
    bytes_received: int
    refused: Counter[str]    # streams and contributions that this peer did not take, by reason
    reason: str = ""         # why not complete, for people


class AllReduce:
    """One group's all-reduce, at one member; all of it happens in the event loop that `run` is called in.

    `vector`, `mean`: flat float32 [n], contiguous, CPU; n is the sum of `sections`' values, which all members but
    auxiliaries (who pass neither) have in common. `vector` is only read, and must not change until `run` returns.
    The mean is over the members' `weight`s; a member of weight 0 sends no values. `clip_radius`: of
    robust.centered_clip, chunk by chunk, instead of the plain mean.
    """

    def __init__(self, *, p2p: P2P, group_id: bytes, me: str, members: Sequence[Member], vector: Tensor | None,
                 mean: Tensor | None, sections: Sequence[tuple[int, str]], clip_radius: float | None = None,
                 chunk_timeout: float, timeout: float, token: bytes = b"") -> None:
        self._p2p, self._header = p2p, bytes(Header(group_id, token))
        self._chunk_timeout, self._timeout = chunk_timeout, timeout
        self._members = sorted(members, key=lambda member: member.peer_id)
        self._numbers = {member.peer_id: number for number, member in enumerate(self._members)}
        self._me = self._numbers[me]
        values = sum(count for count, _ in sections)
        self.vector = torch.empty(0) if vector is None else vector
        self.mean = torch.empty(values) if mean is None else mean
        assert mean is None or self.vector.numel() == self.mean.numel() == values
        self._spans = self._lay_out(sections)
        self._receivers = {number for number, member in enumerate(self._members) if member.mode != "auxiliary"}
        shares = self._shares()
        self._contributes = self._me in shares
        self._span = Span(self._spans.get(self._me, ()), shares=shares, me=self._me, vector=self.vector, mean=self.mean,
                          clip_radius=clip_radius)
        self._guests = self._receivers - {self._me} if self._span.chunks else set()
        self._inflows: dict[int, _Inflow | None] = {}  # None: on its way
        self._outflows: dict[int, _Outflow] = {}
        self._begun, self._over = asyncio.Event(), asyncio.Event()
        self._blamed: list[int] = []
        self._reason = "" if shares and self._spans else "nobody contributes, or nobody reduces"
        self._refused: Counter[str] = Counter()
        self.bytes_sent = self.bytes_received = 0

    async def run(self) -> Result:
        """Take part until the end, which is `timeout` seconds away at most; nothing of it goes on afterwards."""
        self._begun.set()
        try:
            async with awake.timeout(self._timeout), asyncio.TaskGroup() as tasks:
                if self._reason:
                    self._over.set()
                self.advance()
                to_do = [self._open(reducer) for reducer in self._destinations()]
                running = [tasks.create_task(work) for work in (*to_do, self._watch())]
                await self._over.wait()
                for task in running:
                    task.cancel()
        except TimeoutError:
            missing = self._span.missing()
            late = ", ".join(self._members[member].peer_id for member in missing)
            self.fail(missing, f"not done within {self._timeout:g} s{', for want of ' * bool(late)}{late}")
        finally:
            self.fail([], "cancelled")
            try:
                await self._part()
            finally:
                self._forget()
        return Result(not self._reason, tuple(self._members[number].peer_id for number in self._blamed),
                      self.bytes_sent, self.bytes_received, self._refused, self._reason)

    async def serve(self, sender: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A stream that `sender` opened, whose header named this group; may come before `run`. Closed on return."""
        number = self._numbers.get(sender)
        if number is None or number not in self._guests or number in self._inflows:
            self._refused["duplicate" if number in self._inflows else "stranger"] += 1
            writer.transport.abort()
            return
        self._inflows[number] = None
        try:
            async with asyncio.timeout(self._timeout):
                await self._begun.wait()
            await self._attend(number, await Stream.over(reader, writer))
        except TimeoutError:
            pass
        finally:
            writer.transport.abort()

    def stop(self) -> None:
        """Give it up; `run` returns soon, blaming nobody."""
        self.fail([], "stopped here")
        self._begun.set()

    def advance(self) -> None:
        """Reduce what can be reduced, tell all, and take more."""
        inflows = [inflow for inflow in self._inflows.values() if inflow is not None]
        try:
            for average in self._span.reduce() if not self._over.is_set() else ():
                for inflow in inflows:
                    inflow.answer(average)
        except Refusal as refusal:
            self.refuse(refusal.member, refusal.reason)
        for inflow in inflows:
            inflow.take_on()
        self.look()

    def look(self) -> None:
        """See whether all is done."""
        received = all((to := self._outflows.get(number)) and to.is_done for number in self._destinations())
        answered = all((of := self._inflows.get(number)) and of.is_done for number in self._guests)
        if received and answered and self._span.is_done:
            self._over.set()

    def refuse(self, member: int, reason: str) -> None:
        """`member` sent what is not to be used, or nothing; count it, and fail for it."""
        if not self._over.is_set():
            self._refused[reason] += 1
            self.fail([member], f"{reason}: {self._members[member].peer_id}")

    def refuse_own(self) -> None:
        """This peer's own values are not to be sent."""
        self.refuse(self._me, "non-finite")

    def heard_stop(self, bearer: int, blamed: int) -> None:
        """`bearer` gave up, and blames the member of number `blamed`, if there is one and it isn't this peer."""
        is_known = blamed < len(self._members) and blamed != self._me
        self.fail([blamed] if is_known else [], f"given up by {self._members[bearer].peer_id}")

    def fail(self, blamed: Sequence[int], reason: str) -> None:
        """The all-reduce has failed here, unless it is over already."""
        if not self._over.is_set():
            self._blamed, self._reason = list(blamed), reason
            self._over.set()

    def _destinations(self) -> list[int]:
        """Whose averages this peer is to get from others."""
        others = [reducer for reducer, chunks in self._spans.items() if chunks and reducer != self._me]
        return others if self._me in self._receivers else []

    def _flows(self) -> list["_Inflow | _Outflow"]:
        return [flow for flow in (*self._inflows.values(), *self._outflows.values()) if flow is not None]

    def _lay_out(self, sections: Sequence[tuple[int, str]]) -> dict[int, tuple[Chunk, ...]]:
        reducers = [number for number, member in enumerate(self._members) if member.mode != "client"]
        return dict(zip(reducers, lay_out(sections, len(reducers)), strict=True)) if reducers else {}

    def _shares(self) -> dict[int, float]:
        """Of each contributor, its weight over all weights; empty if they have no mean."""
        weights = {number: member.weight for number, member in enumerate(self._members)
                   if number in self._receivers and member.weight != 0}
        total = sum(weights.values())
        is_sound = 0 < total < inf and all(weight > 0 for weight in weights.values())
        return {number: weight / total for number, weight in weights.items()} if is_sound else {}

    async def _open(self, reducer: int) -> None:
        peer = PeerID.from_base58(self._members[reducer].peer_id)
        try:
            async with awake.timeout(OPENING * self._chunk_timeout):
                _, reader, writer = await self._p2p.call_binary_stream_handler(peer, STREAMS)
                writer.write(self._header)
                stream = await Stream.over(reader, writer)
        except (TimeoutError, P2PDaemonError):
            self.refuse(reducer, "unreachable")
        except (OSError, EOFError) as error:
            self.fail([], f"this peer's libp2p daemon: {error!r}")
        else:
            self._outflows[reducer] = _Outflow(self, reducer, stream, self._spans[reducer], self._contributes)
            self._outflows[reducer].begin()

    async def _attend(self, number: int, stream: Stream) -> None:
        if self._over.is_set():
            self._say_stop(stream)
            stream.discard()
            await asyncio.wait([stream.closed], timeout=PARTING * self._chunk_timeout)
        else:
            self._inflows[number] = _Inflow(self, number, stream, self._span)
            self.advance()
            await asyncio.wait([stream.closed])

    async def _watch(self) -> None:
        """Send signs of life where nothing else is sent, and fail for the lack of others'."""
        loop = asyncio.get_running_loop()
        interval = self._chunk_timeout / SIGNS
        opened_by = loop.time() + OPENING * self._chunk_timeout
        while True:
            due = loop.time() + interval
            await asyncio.sleep(interval)
            now = loop.time()
            late = now - due if now - due > interval else 0.0  # this process was held up, and so heard nobody
            opened_by += late
            silent = {member for member in self._guests if not self._inflows.get(member) and now > opened_by}
            silent |= {flow.member for flow in self._flows() if flow.is_silent(now, late, self._chunk_timeout)}
            if silent:
                self._refused["silent"] += len(silent)
                names = ", ".join(self._members[member].peer_id for member in sorted(silent))
                self.fail(sorted(silent), f"silent for {self._chunk_timeout:g} s: {names}")
            for flow in self._flows():
                if not flow.is_done and now - flow.stream.said >= interval and not flow.stream.has_unsent:
                    flow.stream.send(ALIVE)

    async def _part(self) -> None:
        """Have all streams closed; after a failure tell others, and wait a little for those who are not to blame."""
        for flow in self._flows():
            if self._reason and not flow.is_done:
                self._say_stop(flow.stream)
                flow.part()
        closed = [flow.stream.closed for flow in self._flows() if flow.member not in self._blamed]
        if closed:
            await asyncio.wait(closed, timeout=PARTING * self._chunk_timeout)

    def _forget(self) -> None:
        """Let go of streams and memory; who keeps this object does so to tell latecomers that it is over."""
        for flow in self._flows():
            flow.stream.abort()
        self._span.forget()
        self._inflows.clear()
        self._outflows.clear()

    def _say_stop(self, stream: Stream) -> None:
        stream.send(STOP, (self._blamed[0] if self._blamed else NOBODY).to_bytes(2))


class _Flow:
    """One stream of an all-reduce."""

    def __init__(self, owner: AllReduce, member: int, stream: Stream) -> None:
        self._owner, self.member, self.stream, self.is_done = owner, member, stream, False

    @property
    def is_awaited(self) -> bool:
        """Whether the other end is to send something, or to close."""
        return self.stream.is_awaited

    def is_silent(self, now: float, late: float, timeout: float) -> bool:
        """Whether the other end has shown no sign of life for too long, not counting the last `late` seconds."""
        self.stream.heard = now if self.stream.has_moved() else self.stream.heard + late
        return self.is_awaited and now - self.stream.heard > timeout

    def _ended(self, reason: str, member: int) -> None:
        if reason == "stopped":
            self.stream.close()
            self._owner.heard_stop(self.member, member)
        else:
            self._owner.refuse(self.member, reason)


class _Inflow(_Flow):
    """A member's chunks of this peer's span, and the averages back."""

    def __init__(self, owner: AllReduce, member: int, stream: Stream, span: Span) -> None:
        super().__init__(owner, member, stream)
        self._span = span
        for average in span.averages:
            self.answer(average)
        stream.begin(self._filled, lambda: None, self._ended)

    @property
    def is_awaited(self) -> bool:
        return self.stream.is_awaited and (self._span.is_done or not self._span.is_from(self.member))

    def answer(self, average: bytes | memoryview) -> None:
        """Send the average of the next chunk."""
        self.stream.send(DATA, average)
        self._owner.bytes_sent += len(average)

    def take_on(self) -> None:
        """Offer memory for the next chunk, if there is one and it may come yet."""
        if self._span.is_from(self.member):
            self.stream.last()
        elif not self.stream.is_awaited:
            self.stream.expect(self._span.place(self.member))

    def part(self) -> None:
        """It has failed: wait for the other end to close."""
        self.stream.discard()

    def _filled(self) -> None:
        self._owner.bytes_received += self._span.came(self.member)
        self._owner.advance()

    def _ended(self, reason: str, member: int) -> None:
        if reason == "short" and self._span.is_done and not self.stream.has_unsent:
            self.is_done = True
            self._owner.look()
        else:
            super()._ended(reason, member)


class _Outflow(_Flow):
    """This peer's chunks of another's span, and the averages back."""

    def __init__(self, owner: AllReduce, reducer: int, stream: Stream, chunks: Sequence[Chunk],
                 contributes: bool) -> None:
        super().__init__(owner, reducer, stream)
        self._to_send = iter(chunks if contributes else ())
        self._to_come = list(reversed(chunks))
        self._memory = memoryview(b"")

    def part(self) -> None:
        """It has failed: close once the other end knows, which it says."""

    def begin(self) -> None:
        """Send and receive."""
        self.stream.begin(self._filled, self._send_on, self._ended)
        self._send_on()
        self._take_on()

    def _send_on(self) -> None:
        while not self.stream.is_full and (chunk := next(self._to_send, None)):
            try:
                data = encoded(chunk, self._owner.vector)
            except ValueError:
                self._owner.refuse_own()
                return
            self.stream.send(DATA, data)
            self._owner.bytes_sent += len(data)

    def _take_on(self) -> None:
        chunk = self._to_come[-1]
        is_direct = chunk.codec == "none"
        self._memory = as_bytes(chunk.of(self._owner.mean)) if is_direct else memoryview(bytearray(chunk.size))
        self.stream.expect(self._memory)

    def _filled(self) -> None:
        chunk = self._to_come.pop()
        self._owner.bytes_received += chunk.size
        try:
            average = decoded(chunk, self._memory)
        except ValueError:
            self._owner.refuse(self.member, "misshapen")
            return
        if chunk.codec != "none":
            chunk.of(self._owner.mean).copy_(average)
        elif not are_finite(average):
            self._owner.refuse(self.member, "non-finite")
            return
        if self._to_come:
            self._take_on()
        else:
            self.is_done = True
            self.stream.close()
            self._owner.look()
