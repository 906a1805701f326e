"""An answer that comes just as its call is given up does not make a process deaf to all others."""

import asyncio
from uuid import uuid4

import pytest
from hivemind.p2p.p2p_daemon_bindings.control import ControlClient
from hivemind.p2p.p2p_daemon_bindings.utils import write_pbmsg
from hivemind.proto import p2pd_pb2

from averaging.pending_calls import mend_pending_calls


async def hears_on(client: ControlClient) -> bool:
    """Whether an answer gets through after one whose call was given up in the same turn."""
    reader = asyncio.StreamReader()
    reading = asyncio.create_task(client._read_from_persistent_conn(reader))
    given_up, waits = uuid4(), uuid4()
    for call in (given_up, waits):
        client._pending_calls[call] = asyncio.get_running_loop().create_future()
        answer = p2pd_pb2.PersistentConnectionResponse(
            callId=call.bytes, callUnaryResponse=p2pd_pb2.CallUnaryResponse(response=b"yes"))
        await write_pbmsg(Feeding(reader), answer)
    client._pending_calls[given_up].cancel()
    done, _ = await asyncio.wait({client._pending_calls[waits], reading}, timeout=5, return_when="FIRST_COMPLETED")
    reading.cancel()
    return reading not in done


class Feeding:
    """A writer into a reader."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self.write = reader.feed_data

    async def drain(self) -> None:
        pass


@pytest.mark.parametrize("mended", [False, True])
def test_an_answer_to_a_call_that_was_given_up_is_dropped(mended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ControlClient, "__init__", ControlClient.__init__)  # as it was, afterwards
    if mended:
        mend_pending_calls()

    async def run() -> bool:
        client = ControlClient(None, _initialized_with_create=True)
        return await hears_on(client)

    assert asyncio.run(run()) == mended, "hivemind has mended it: drop averaging/pending_calls.py"
