"""Frames over a libp2p stream, read straight into the memory that they are for.

A stream begins with the opener's header: group id (16 bytes), the token's length (2 bytes, big-endian), the token.
Then frames go both ways, each with its type in the first byte: DATA, with a payload whose length both sides know;
ALIVE, with none; STOP, with the number of the member to blame (2 bytes, NOBODY: none), after which nothing comes.
"""

import asyncio
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

DATA, ALIVE, STOP = b"\x00", b"\x01", b"\x02"
NOBODY = 0xFFFF
LONGEST_TOKEN = 4096  # bytes
HEADER_SECONDS = 5.0
MOST_ALIVE = 10_000   # ALIVE frames in one stream; each costs the reader time
UNSENT = 1 << 20      # bytes that wait to be sent above which `is_full`

Buffer = bytes | memoryview


@dataclass(frozen=True)
class Header:
    """What a stream is for."""

    group_id: bytes
    token: bytes  # of the opener, for the authoriser

    def __bytes__(self) -> bytes:
        return struct.pack(">16sH", self.group_id, len(self.token)) + self.token


async def read_header(reader: asyncio.StreamReader) -> Header:
    """The header that the opener of a stream sent. ValueError if it is too long, or not there in HEADER_SECONDS.

    What it says are few words and always the same: they are counted.
    """
    try:
        async with asyncio.timeout(HEADER_SECONDS):
            group_id, length = struct.unpack(">16sH", await reader.readexactly(18))
            if length > LONGEST_TOKEN:
                raise ValueError("oversize token")
            return Header(group_id, await reader.readexactly(length))
    except TimeoutError:
        raise ValueError("no header in time") from None
    except (asyncio.IncompleteReadError, OSError):
        raise ValueError("the stream ended before its header") from None


class Stream(asyncio.BufferedProtocol):
    """One stream of frames. The owner offers memory for one DATA frame after another, and is called back.

    `filled()`: the memory is full. `room()`: no more than half of UNSENT waits to be sent. `ended(reason, member)`,
    once: nothing more will come; the reason is "short" (closed, whether or not that was due), "stopped" (`member` is
    whom the other end blames), "misshapen", "oversize" (data where none is due) or "flood".
    Nothing is read while no memory is offered, unless `last` was called.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._before = reader, writer  # asyncio closes the transport when they are collected
        self._transport: asyncio.Transport = writer.transport  # type: ignore[assignment]  # of a socket: reads too
        self._loop = asyncio.get_running_loop()
        self._early = memoryview(b"")  # bytes that asyncio had read already
        self._type, self._member, self._trash = (memoryview(bytearray(size)) for size in (1, 2, 1 << 16))
        self._memory: memoryview | None = None        # for the next DATA frame's payload
        self._piece = self._rest = self._type         # what is being read, and what of it has not come
        self._is_last = self._has_ended = self._is_feeding = self.is_full = False
        self._alive = self._unsent = 0
        self._filled: Callable[[], None] = lambda: None
        self._room: Callable[[], None] = lambda: None
        self._ended: Callable[[str, int], None] = lambda reason, member: None
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self.heard = self.said = self._loop.time()    # when something was last read, and written

    @classmethod
    async def over(cls, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Self:
        """Take a stream over from asyncio's reader and writer, which are of no use then."""
        self = cls(reader, writer)
        self._transport.pause_reading()
        self._transport.set_protocol(self)
        self._transport.set_write_buffer_limits(high=UNSENT, low=UNSENT // 2)
        reader.feed_eof()
        self._early = memoryview(await reader.read())
        if self._transport.is_closing():  # nobody tells us of an end that came before us
            self.connection_lost(None)
        self._read_on()
        return self

    def begin(self, filled: Callable[[], None], room: Callable[[], None], ended: Callable[[str, int], None]) -> None:
        """Call these from now on."""
        self._filled, self._room, self._ended = filled, room, ended
        if self.closed.done():
            ended("short", NOBODY)

    @property
    def is_awaited(self) -> bool:
        """Whether the other end is to send something, or to close."""
        return not self._has_ended and (self._memory is not None or self._is_last)

    @property
    def has_unsent(self) -> bool:
        """Whether something waits to be sent."""
        return self._transport.get_write_buffer_size() > 0

    def has_moved(self) -> bool:
        """Whether some of what waited to be sent has left since the last call."""
        before, self._unsent = self._unsent, self._transport.get_write_buffer_size()
        return self._unsent < before

    def expect(self, memory: memoryview | None) -> None:
        """The next DATA frame's payload is to fill `memory`. None: read nothing for now."""
        if self._memory is None:
            self.heard = self._loop.time()
        self._memory = memory
        self._read_on()

    def last(self) -> None:
        """No DATA frame is due any more; the other end may close."""
        self._memory, self._is_last, self.heard = None, True, self._loop.time()
        self._read_on()

    def send(self, kind: bytes, payload: Buffer = b"") -> None:
        """Send a frame, however much waits to be sent; `payload` must not change until it has left."""
        if not self._transport.is_closing():
            self.said = self._loop.time()
            self._transport.write(kind)
            if payload:
                self._transport.write(payload)

    def discard(self) -> None:
        """Read on until the other end closes, and drop it; `ended` is not called any more."""
        self._has_ended = True
        self._read_on()

    def close(self) -> None:
        """Send what waits, then close; `ended` is not called any more."""
        self._has_ended = True
        self._transport.close()

    def abort(self) -> None:
        """Close at once; `ended` is not called any more."""
        self._has_ended = True
        self._transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._trash if self._has_ended else self._rest

    def buffer_updated(self, nbytes: int) -> None:
        if self._has_ended:
            return
        self.heard = self._loop.time()
        self._rest = self._rest[nbytes:]
        if not self._rest:
            self._piece_came()
            self._read_on()

    def eof_received(self) -> None:
        self._end("short")

    def connection_lost(self, exc: Exception | None) -> None:
        self._end("short")
        if not self.closed.done():
            self.closed.set_result(None)

    def pause_writing(self) -> None:
        self.is_full = True

    def resume_writing(self) -> None:
        self.is_full = False
        self._room()

    def _piece_came(self) -> None:
        piece, self._piece = self._piece, self._type
        if piece is self._type:
            self._frame_begins(bytes(piece))
        elif piece is self._member:
            self._end("stopped", int.from_bytes(piece))
        else:
            self._memory = None
            self._filled()
        self._rest = self._piece

    def _frame_begins(self, kind: bytes) -> None:
        if kind == DATA and self._memory is not None:
            self._piece = self._memory
        elif kind == STOP:
            self._piece = self._member
        elif kind == ALIVE and self._alive < MOST_ALIVE:
            self._alive += 1
        else:
            self._end({DATA: "oversize", ALIVE: "flood"}.get(kind, "misshapen"))

    def _end(self, reason: str, member: int = NOBODY) -> None:
        if not self._has_ended:
            self._has_ended = True
            self._ended(reason, member)

    def _read_on(self) -> None:
        """Read, if there is anything to read for, beginning with what asyncio had read."""
        while self._early and self.is_awaited and not self._is_feeding:
            size = min(len(self._rest), len(self._early))
            self._rest[:size], self._early = self._early[:size], self._early[size:]
            self._is_feeding = True
            self.buffer_updated(size)
            self._is_feeding = False
        if self._transport.is_closing() or self._is_feeding:
            return
        if self.is_awaited or self._has_ended:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()
