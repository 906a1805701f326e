"""Messages through a pipe between processes of ours: each after its length (4 bytes, big-endian). Imports no torch."""

import asyncio
import os
import struct
from collections.abc import AsyncIterator
from typing import TypeVar

from google.protobuf.message import Message

LENGTH = struct.Struct(">I")
Kind = TypeVar("Kind", bound=Message)


def framed(message: Message) -> bytes:
    """The message as it goes through the pipe."""
    data = message.SerializeToString()
    return LENGTH.pack(len(data)) + data


async def read_messages(fd: int, kind: type[Kind]) -> AsyncIterator[Kind]:
    """Every message until all writers have closed the pipe. Takes `fd` over and closes it."""
    stream = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(fd, "rb", buffering=0))
    try:
        while True:
            (length,) = LENGTH.unpack(await stream.readexactly(LENGTH.size))
            yield kind.FromString(await stream.readexactly(length))
    except asyncio.IncompleteReadError:
        return  # the writer is gone, perhaps in the midst of a message
    finally:
        transport.close()
