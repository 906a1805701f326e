"""Ten thousand calls that no client of ours makes, and connections that are none: refused, and nothing else."""

import asyncio
import gc
import logging
import random
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from grpc import StatusCode

from averaging.identity import peer_id_of, public_bytes, sign
from averaging.membership import enrolment_words
from coordinator.admin import AdminService
from coordinator.authority import Authority
from coordinator.limits import Limit
from coordinator.link import Link
from coordinator.replica import Own, ReplicaService
from coordinator.service import CoordinatorService, bind_grpc, start_grpc
from coordinator.tls import connect, self_signed
from proto.authority_pb2 import BanRequest, NewInvite, WhichInvite
from proto.authority_pb2_grpc import add_AdminServicer_to_server
from proto.coordinator_pb2 import CreditsRequest, EnrolReply, EnrolRequest, WatchRequest
from proto.coordinator_pb2_grpc import CoordinatorStub
from proto.replica_pb2 import ExchangeRequest, HandoverRequest
from proto.replica_pb2_grpc import add_ReplicaServicer_to_server
from proto.swarm_pb2 import SwarmSnapshot

CALLS = 10_000
AT_ONCE = 200
GROWTH = 64 << 20  # bytes; a leak of 16 KiB a call would be more than twice that
KEY, STRANGER = (generate_private_key(public_exponent=65537, key_size=2048) for _ in range(2))
CERTIFICATE = self_signed()
METHODS = ("Coordinator/Enrol", "Coordinator/Watch", "Coordinator/Credits", "Admin/CreateInvite", "Admin/RevokeInvite",
           "Admin/Ban", "Admin/ListMembers", "Replica/Handover", "Replica/Exchange", "Coordinator/Nothing",
           "../../etc/passwd")
EXPECTED = {StatusCode.OK, StatusCode.INVALID_ARGUMENT, StatusCode.NOT_FOUND, StatusCode.FAILED_PRECONDITION,
            StatusCode.UNAUTHENTICATED, StatusCode.PERMISSION_DENIED, StatusCode.RESOURCE_EXHAUSTED,
            StatusCode.UNIMPLEMENTED}
NO_MESSAGE = "Unexpected <class 'google.protobuf.message.DecodeError'>"  # gRPC's own words, as UNKNOWN


@asynccontextmanager
async def coordinator(folder: Path) -> AsyncIterator[tuple[Link, Authority]]:
    """One that counts, but does not mind how often one address calls."""
    authority = Authority(folder, "tiny-1", is_open=False)
    service = CoordinatorService(authority, lambda: EnrolReply(run_id="tiny-1"), "1.2.0", SwarmSnapshot)
    service._enrolments = service._questions = Limit(1e9, 10**9)
    server, port = bind_grpc("127.0.0.1", 0, CERTIFICATE)
    add_AdminServicer_to_server(AdminService(authority, lambda code: code, lambda: None, "the token"), server)
    link = Link("127.0.0.1", port, "tiny-1", CERTIFICATE.fingerprint, authority.invite_to_show or "")
    replica = ReplicaService(authority, Own("QmOwn", link, []), document=b"{}", folder=folder, token="the token",
                             version="1.2.0", initial_peers=list)
    replica._limit = Limit(1e9, 10**9)
    add_ReplicaServicer_to_server(replica, server)
    await start_grpc(server, service)
    try:
        yield link, authority
    finally:
        await server.stop(None)
        authority.close()


def good(link: Link) -> EnrolRequest:
    request = EnrolRequest(run_id="tiny-1", name="ada", version="1.2.3", invite=link.invite, time=time.time(),
                           public_key=public_bytes(KEY))
    request.signature = sign(KEY, enrolment_words(request))
    return request


def drawn(draw: random.Random, link: Link) -> bytes:
    """A message of one kind or another, with every field absent, empty, huge, wrong or right; or what is none."""
    text = ["", "x" * 70_000, "x" * 5000, "\x00", "../..", "tiny-1", "1.2.3", link.invite, "ada", "é" * 64, "' or 1=1"]
    number = [0.0, -1.0, float("nan"), float("inf"), 1e308, time.time(), 0.2]
    data = [b"", b"\xff" * 60_000, draw.randbytes(300), public_bytes(KEY), b"ssh-rsa AAAA", b"ssh-ed25519 " + b"A" * 68]

    def some(values: list[Any]) -> Any:
        return draw.choice(values)

    request = good(link)
    if draw.random() < 0.2:  # nothing is wrong but the invite
        request.invite, request.public_key = some(["", "unknown", link.invite[:-1], "x" * 5000]), public_bytes(STRANGER)
        request.signature = sign(STRANGER, enrolment_words(request))
    elif draw.random() < 0.5:
        request = EnrolRequest(
            run_id=some(text), name=some(text), version=some(text), invite=some(text), public_key=some(data),
            time=some(number), signature=some(data))
    elif draw.random() < 0.7:
        for field in draw.sample(["run_id", "name", "version", "invite", "public_key", "time", "signature"], 2):
            kind = {"public_key": data, "signature": data, "time": number}.get(field, text)
            setattr(request, field, some(kind))
        if draw.random() < 0.5:
            request.signature = sign(KEY, enrolment_words(request))
    message = some([request] * 4 + [
        WatchRequest(interval_seconds=some(number)), NewInvite(label=some(text), uses=some([0, 1, 2**32 - 1])),
        CreditsRequest(peer_id=some([*text, peer_id_of(public_bytes(KEY))])),
        HandoverRequest(run_id=some(text), version=some(text)), ExchangeRequest(words=some(data), signature=some(data)),
        WhichInvite(code_or_label=some(text)), BanRequest(peer=some(text), reason=some(text))]).SerializeToString()
    match draw.randrange(8):
        case 0:
            return draw.randbytes(draw.randrange(200))
        case 1:
            return message[:draw.randrange(len(message) + 1)]
        case 2:
            return message + message
        case 3:
            place = draw.randrange(len(message) + 1)
            return message[:place] + draw.randbytes(4) + message[place:]
    return message


async def call(channel: grpc.aio.Channel, method: str, message: bytes, metadata: list[tuple[str, str]]) -> str:
    """The status, having seen that what is said with it is fit for a stranger."""
    kind = channel.unary_stream if method.endswith("Watch") else channel.unary_unary
    ask = kind(f"/covey.v1.{method}", request_serializer=bytes, response_deserializer=bytes)(
        message, metadata=metadata, timeout=30)
    if method.endswith("Watch"):
        with suppress(grpc.aio.AioRpcError):
            await ask.read()
            return "watched" if ask.cancel() else "over"
    code, details = await ask.code(), await ask.details() or ""
    assert code in EXPECTED or details.startswith(NO_MESSAGE), (code, details)
    assert len(details) < 600
    assert "Traceback" not in details
    assert "File \"" not in details
    return code.name


async def fuzz(channel: grpc.aio.Channel, link: Link, draw: random.Random, calls: int) -> Counter[str]:
    seen = Counter[str]()
    for _ in range(calls // AT_ONCE):
        metadata = [("authorization", draw.choice(["", "Bearer", "Bearer the tokem", "x" * 4000]))]
        answers = await asyncio.gather(*(call(channel, draw.choice(METHODS), drawn(draw, link), metadata)
                                         for _ in range(AT_ONCE)), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, AssertionError):
                raise answer
            seen[answer if isinstance(answer, str) else type(answer).__name__] += 1
    return seen


@pytest.mark.timeout(300)
def test_whatever_is_called_is_answered_with_a_refusal_and_costs_nothing(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> tuple[Counter[str], int, EnrolReply]:
        async with coordinator(tmp_path) as (link, authority), await connect(link, timeout_seconds=10) as channel:
            members = len(authority.ledger.members())
            await fuzz(channel, link, random.Random(0), CALLS // 10)  # what has to be allocated once is
            gc.collect()
            before = psutil.Process().memory_info().rss
            seen = await fuzz(channel, link, random.Random(1), CALLS)
            gc.collect()
            grown = psutil.Process().memory_info().rss - before
            reply = await CoordinatorStub(channel).Enrol(good(link), timeout=10)
            assert len(authority.ledger.members()) == members + 1  # whoever got in has the invite
            assert [invite.label for invite in authority.ledger.invites()] == ["first"]
            assert authority.failures["admin token"] > 100
            assert authority.failures["replica"] > 100
            assert authority.ledger.facts().coordinators == {}
            return seen, grown, reply

    caplog.set_level(logging.ERROR)
    seen, grown, reply = asyncio.run(work())
    print(dict(seen), f"{grown / (1 << 20):.1f} MiB")
    assert reply.token
    assert {"INVALID_ARGUMENT", "NOT_FOUND", "UNAUTHENTICATED", "PERMISSION_DENIED", "UNIMPLEMENTED"} <= seen.keys()
    assert grown < GROWTH
    assert "Traceback" not in caplog.text


@pytest.mark.timeout(120)
def test_connections_that_are_none_keep_nobody_out(tmp_path: Path) -> None:
    async def work() -> EnrolReply:
        async with coordinator(tmp_path) as (link, _):
            draw, idle = random.Random(2), list[socket.socket]()
            try:
                for number in range(300):
                    idle.append(socket.create_connection(("127.0.0.1", link.port), timeout=10))
                    idle[-1].setblocking(False)
                    if number % 3:  # the others say nothing at all
                        hello = b"\x16\x03\x01" + draw.randbytes(2) + b"\x01" if number % 2 else draw.randbytes(100)
                        idle[-1].send(hello)
                async with await connect(link, timeout_seconds=10) as channel:
                    return await CoordinatorStub(channel).Enrol(good(link), timeout=10)
            finally:
                for opened in idle:
                    opened.close()

    assert asyncio.run(work()).token
