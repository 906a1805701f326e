"""Faults in a peer at named points of a named epoch: what they need is wrapped here, in that peer's process only.

`inject` is called in the process that becomes a peer, before its averager is forked. A fault is a file that the test
writes, so that it can be armed while the peer runs; whoever reaches the point takes the file away, says so, and acts.
"""

import asyncio
import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from averaging.messages import Complete, Decide, Join
from averaging.transports.swarm import all_reduce
from averaging.transports.swarm.averager import Averager
from averaging.transports.swarm.reduction import Span
from averaging.transports.swarm.session import Session

POINTS = {
    "computing": "in the midst of a micro-batch",
    "matching": "its trainer has come, and nothing is said yet",
    "joined": "a member has joined; the leader has heard the first who did",
    "sending": "a few chunks are sent",
    "reducing": "the first average of its span is made",
    "receiving": "the first average of another's span has come",
    "voting": "its average is complete, its vote is not said",
    "voted": "a member's yes is delivered",
    "deciding": "all votes are yes, and the leader has told nobody",
    "announcing": "the leader has told one of the others, and no more",
    "deciding heard": "the leader's decision has come to a member, and nothing is made of it",
}
GAP = 0.005     # seconds between the chunks of one who is to fail between them
SLOW_GAP = 0.2  # of a slow sender
CHUNKS = 2      # that are sent to each before it fails
HANG_SECONDS = 4.0
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fault:
    """What happens to a peer. `action`: kill, stop (the whole peer, as a machine would), pause (for a moment),
    hang (the averager), mute (no more values, but signs of life), slow, poison (NaN on the wire), cut (`command` takes
    it off the network)."""

    epoch: int
    point: str
    action: str
    epochs: int = 1              # that slow, mute and poison last
    also: tuple[int, ...] = ()   # process groups that are killed at the same time
    command: tuple[str, ...] = ()


class Faults:
    """Of one peer: the trainer's and the averager's copy read the same file."""

    def __init__(self, path: Path, tell: Callable[..., None]) -> None:
        self._path, self._tell = path, tell
        self.epoch, self.leads = -1, False  # of the round whose all-reduce runs
        self._lasting: Fault | None = None  # the last that was said to be there

    def arm(self, fault: Fault) -> None:
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(asdict(fault)))
        new.rename(self._path)

    def armed(self, epoch: int, point: str) -> Fault | None:
        try:
            fault = Fault(**json.loads(self._path.read_text()))
        except FileNotFoundError:
            return None
        return fault if fault.point == point and fault.epoch <= epoch < fault.epoch + fault.epochs else None

    def reach(self, epoch: int, point: str, leads: bool | None = None) -> None:
        """The peer is at this point; if that is where it is to fail, it does."""
        if fault := self.armed(epoch, point):
            self.fire(fault, leads)
            for group in fault.also:
                os.killpg(group, signal.SIGKILL)
            match fault.action:
                case "kill":
                    os.killpg(0, signal.SIGKILL)
                case "stop" | "pause":
                    os.killpg(0, signal.SIGSTOP)
                case "hang":
                    time.sleep(HANG_SECONDS)
                case "cut":
                    subprocess.run(fault.command, check=True)

    def last(self, fault: Fault) -> None:
        """It is there, until its epochs are over."""
        if fault != self._lasting:
            self._lasting = fault
            self._tell(fired=fault.point, epoch=fault.epoch, leads=self.leads)

    def fire(self, fault: Fault, leads: bool | None = None) -> None:
        self._path.unlink(missing_ok=True)
        self._tell(fired=fault.point, epoch=fault.epoch, leads=leads)


def inject(faults: Faults) -> None:
    """Have this process, and its averager, fail as `faults` says; and write what is said in rounds to its log."""
    _at_the_round(faults)
    _at_messages(faults)
    _at_the_all_reduce(faults)


def trace(way: str, peer: str, message: Any) -> None:
    """A line in the log."""
    said = ", ".join(f"{name} {str(value)[:40]}" for name, value in vars(message).items() if name in (
        "leader", "seconds", "taken", "reason", "ok", "blamed", "commit", "excluded", "echo", "status"))
    log.info("%d.%d %s %s: %s %s", message.round.epoch, message.attempt, way, peer[-4:], type(message).__name__, said)


def _at_the_round(faults: Faults) -> None:
    start, received, undelivered, run = Session.start, Session.received, Session.undelivered, Averager.all_reduce

    async def started(self: Session) -> None:
        faults.reach(self.meet.round.epoch, "matching")
        await start(self)

    def heard(self: Session, sender: str, message: Any) -> None:
        if isinstance(message, Decide) and message.commit:
            faults.reach(message.round.epoch, "deciding heard", False)
        trace("from", sender, message)
        received(self, sender, message)
        if isinstance(message, Join):
            faults.reach(message.round.epoch, "joined", True)

    async def reduced(self: Averager, session: Session, group: Any) -> Any:
        faults.epoch, faults.leads = session.meet.round.epoch, session._round._leads
        log.info("all-reduce of %s", [member.peer_id[-4:] for member in group.members])
        result = await run(self, session, group)
        log.info("all-reduce ended: %s %s", result.reason or "complete", [peer[-4:] for peer in result.blamed])
        if result.complete:
            faults.reach(session.meet.round.epoch, "voting", session._round._leads)
        return result

    def failed(self: Session, receiver: str, message: Any) -> None:
        trace("not to", receiver, message)
        undelivered(self, receiver, message)

    Session.start, Session.received, Averager.all_reduce = started, heard, reduced
    Session.undelivered = failed


def _at_messages(faults: Faults) -> None:
    send, deliver = Averager.send, Averager._deliver
    told = set[Any]()

    def sent(self: Averager, session: Session, receiver: str, message: Any) -> None:
        if isinstance(message, Decide) and message.commit:
            faults.reach(message.round.epoch, "deciding", True)
            if faults.armed(message.round.epoch, "announcing"):
                if message.round in told:
                    return
                told.add(message.round)
        trace("to", receiver, message)
        send(self, session, receiver, message)

    async def delivered(self: Averager, session: Session, receiver: str, message: Any) -> None:
        await deliver(self, session, receiver, message)
        match message:
            case Join():
                faults.reach(message.round.epoch, "joined", False)
            case Complete(ok=True):
                faults.reach(message.round.epoch, "voted", False)
            case Decide(commit=True):
                faults.reach(message.round.epoch, "announcing", True)

    Averager.send, Averager._deliver = sent, delivered


def _at_the_all_reduce(faults: Faults) -> None:
    outflow = all_reduce._Outflow
    send_on, filled, reduce, encoded = outflow._send_on, outflow._filled, Span.reduce, all_reduce.encoded

    def gently(self: Any) -> None:
        """One chunk at a time, if this peer is to fail between two of them."""
        fault = faults.armed(faults.epoch, "sending") or faults.armed(faults.epoch, "slow sending")
        if fault is None or self._owner._over.is_set():
            send_on(self)
            return
        number = self.__dict__["sent"] = self.__dict__.get("sent", 0) + 1
        if fault.action == "slow":
            faults.last(fault)
        elif number > CHUNKS:
            if fault.action == "mute":
                faults.last(fault)
                return
            faults.reach(faults.epoch, "sending", faults.leads)
        rest = self._to_send
        chunk = next(rest, None)
        self._to_send = iter([] if chunk is None else [chunk])
        send_on(self)
        self._to_send = rest
        if chunk is not None:
            gap = SLOW_GAP if fault.action == "slow" else GAP
            asyncio.get_running_loop().call_later(gap, gently, self)

    def came(self: Any) -> None:
        filled(self)
        faults.reach(faults.epoch, "receiving", faults.leads)

    def reduced(self: Span) -> Any:
        for average in reduce(self):
            yield average
            faults.reach(faults.epoch, "reducing", faults.leads)

    def poisoned(chunk: Any, vector: Any) -> Any:
        data = encoded(chunk, vector)
        if fault := faults.armed(faults.epoch, "poisoning"):
            faults.last(fault)
            return memoryview(torch.full((chunk.values,), torch.nan).numpy().data).cast("B")
        return data

    outflow._send_on, outflow._filled, Span.reduce, all_reduce.encoded = gently, came, reduced, poisoned
