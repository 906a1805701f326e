"""A peer's state, downloaded from another one's averager: one raw stream each, members only, bounded and checked.

The asker sends a StateRequest. The donor answers with signs of life while its trainer makes the snapshot, then with a
StateReply and, unless that refuses, exactly `length` bytes of safetensors. The asker closes the stream first: libp2p's
daemon can lose the end of a stream that the server closes.
"""

import asyncio
import hashlib
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import safetensors.torch
from google.protobuf.message import DecodeError, Message
from hivemind.p2p import P2P, PeerID
from safetensors import SafetensorError
from torch import Tensor

from averaging import roster
from averaging.authorisation import Authoriser
from averaging.records import ARCHIVING, PeerRecord
from averaging.transports.swarm.wire import Refused
from proto.round_pb2 import StateReply, StateRequest

STATE_HEADER = 1 << 20  # bytes at most of names and shapes in a state that travels
ALIVE, REPLY = b"\0", b"\1"
CHUNK = 1 << 18
MAX_HEADER = 1 << 14  # bytes: a token, mostly
CLOSE_SECONDS = 10.0  # that a donor waits for the asker to close
Header = TypeVar("Header", bound=Message)


@dataclass(frozen=True)
class Snapshot:
    """A state at one moment."""

    epoch: int
    data: memoryview
    sha256: bytes


def donors(records: Sequence[PeerRecord], me: str, epoch: int) -> tuple[str, ...]:
    """Whom to ask for a state, in order: those furthest on, the majority among them first, at random among equals.

    Nobody who is behind `epoch`, this peer's, or whose state it has already. An archive that is ahead of `epoch` comes
    after those who train, unless it is ahead of them too.
    """
    trainers = _trainers(records, me, epoch)
    newest = max((record.epoch for record in records if record.peer_id in trainers), default=epoch)
    archives = sorted((-record.epoch, record.peer_id) for record in records
                      if record.state == ARCHIVING and record.epoch > epoch and record.peer_id != me)
    ahead = tuple(peer for behind, peer in archives if -behind > newest)
    return (*ahead, *trainers, *(peer for _, peer in archives if peer not in ahead))


def _trainers(records: Sequence[PeerRecord], me: str, epoch: int) -> tuple[str, ...]:
    own = next((record.sketch for record in records if record.peer_id == me), b"")
    able = [record for record in records if record.peer_id != me and record.state == "training" and not (
        record.client_mode or record.auxiliary)]
    worth = [record for record in able if record.epoch > epoch or (record.epoch == epoch and record.sketch != own)]
    if not worth:
        return ()
    newest = max(record.epoch for record in worth)
    _, majority = roster.majority(records, newest)
    if newest == epoch and me in majority:
        return ()
    random.shuffle(worth)
    return tuple(record.peer_id for record in sorted(
        worth, key=lambda record: (-record.epoch, record.peer_id not in majority)))


def tensors_in(data: bytes) -> dict[str, Tensor] | None:
    """The tensors in a safetensors file; None where it is none, or has dtypes that PyTorch does not know (KeyError)."""
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, KeyError):
        return None


async def admit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asker: str, *, authoriser: Authoriser,
                patience: float) -> None:
    """Read the request; tell an asker who is no member so, and raise Refused, as for a request that is none.

    `patience`: seconds that it may take. Raises whatever a broken stream raises; the caller closes.
    """
    async with asyncio.timeout(patience):
        request = await _read_header(reader, StateRequest)
    if refusal := authoriser.refusal(asker, request.token):
        await _send_header(writer, StateReply(refusal=refusal))
        await _closed(reader)
        raise Refused(refusal)


async def upload(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, authoriser: Authoriser,
                 snapshot: Callable[[], Awaitable[Snapshot | None]], patience: float, seconds: float) -> None:
    """Serve one whom `admit` let in. Raises whatever a broken stream raises; the caller closes.

    `patience`: seconds that the asker may take for each next chunk; it hears of us at least four times in that time.
    `seconds`: for all of it.
    """
    async with asyncio.timeout(seconds):
        made = asyncio.ensure_future(snapshot())
        while not (await asyncio.wait({made}, timeout=patience / 4))[0]:
            writer.write(ALIVE)
            await writer.drain()
        if (state := made.result()) is None:
            await _send_header(writer, StateReply(refusal="no state to give"))
        else:
            await _send_header(writer, StateReply(epoch=state.epoch, length=len(state.data), sha256=state.sha256,
                                                  token=authoriser.token))
            for start in range(0, len(state.data), CHUNK):
                async with asyncio.timeout(patience):
                    writer.write(state.data[start:start + CHUNK])
                    await writer.drain()
    await _closed(reader)


async def download(p2p: P2P, handler: str, donor: str, into: memoryview, *, authoriser: Authoriser, epoch: int,
                   patience: float) -> tuple[int, int]:
    """The epoch and length of the state that `donor` sent, which is now in `into`.

    Raises Refused if the donor refuses, is no member, or sends what is older than `epoch`, longer than `into`, or not
    what its hash says; TimeoutError after `patience` seconds without a byte; OSError and hivemind's errors when it
    can't be reached or hangs up.
    """
    async with asyncio.timeout(patience):
        _, reader, writer = await p2p.call_binary_stream_handler(PeerID.from_base58(donor), handler)
    try:
        await _write_request(writer, authoriser.token)
        while True:
            async with asyncio.timeout(patience):
                if await reader.readexactly(1) == REPLY:
                    break
        async with asyncio.timeout(patience):
            reply = await _read_header(reader, StateReply)
        _check(reply, donor, authoriser, epoch, len(into))
        if await _read_into(reader, into[:reply.length], patience) != reply.sha256:
            raise Refused("not what its hash says")
        return reply.epoch, reply.length
    finally:
        writer.close()


def _check(reply: StateReply, donor: str, authoriser: Authoriser, epoch: int, limit: int) -> None:
    if reply.refusal:
        raise Refused(f"refused: {reply.refusal[:100]}")
    if refusal := authoriser.refusal(donor, reply.token):
        raise Refused(f"the donor is no member: {refusal}")
    if reply.epoch < epoch:
        raise Refused(f"of epoch {reply.epoch}, older than {epoch}")
    if not 0 < reply.length <= limit:
        raise Refused(f"{reply.length} bytes, where at most {limit} can be right")


async def _read_into(reader: asyncio.StreamReader, into: memoryview, patience: float) -> bytes:
    received, digest = 0, hashlib.sha256()
    while received < len(into):
        async with asyncio.timeout(patience):
            chunk = await reader.read(min(CHUNK, len(into) - received))
        if not chunk:
            raise Refused(f"it ended after {received} of {len(into)} bytes")
        into[received:received + len(chunk)] = chunk
        digest.update(chunk)
        received += len(chunk)
    return digest.digest()


async def _write_request(writer: asyncio.StreamWriter, token: bytes) -> None:
    data = StateRequest(token=token).SerializeToString()
    writer.write(len(data).to_bytes(4) + data)
    await writer.drain()


async def _send_header(writer: asyncio.StreamWriter, reply: StateReply) -> None:
    data = reply.SerializeToString()
    writer.write(REPLY + len(data).to_bytes(4) + data)
    await writer.drain()


async def _read_header(reader: asyncio.StreamReader, kind: type[Header]) -> Header:
    length = int.from_bytes(await reader.readexactly(4))
    if length > MAX_HEADER:
        raise Refused("oversize header")
    try:
        return kind.FromString(await reader.readexactly(length))
    except DecodeError:
        raise Refused("malformed header") from None


async def _closed(reader: asyncio.StreamReader) -> None:
    async with asyncio.timeout(CLOSE_SECONDS):
        while await reader.read(CHUNK):
            pass
