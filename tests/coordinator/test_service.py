"""covey.v1.Coordinator over real gRPC and TLS on loopback."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from averaging.identity import public_bytes, sign
from averaging.membership import enrolment_words
from coordinator.authority import Authority
from coordinator.link import Link
from coordinator.service import ENROLMENTS, SERVICE, WATCHERS, CoordinatorService, bind_grpc, start_grpc
from coordinator.swarm import SwarmState
from coordinator.tls import connect, self_signed
from coordinator.view import About, Seen, view
from proto.coordinator_pb2 import EnrolReply, EnrolRequest, WatchRequest
from proto.coordinator_pb2_grpc import CoordinatorStub
from proto.swarm_pb2 import SwarmSnapshot
from training.errors import BadInput

ENROLMENT = EnrolReply(experiment=b'{"name":"tiny"}', fingerprint="ab" * 32, run_id="tiny-1", initial_peers=["/ip4/x"])
GOOD = {"run_id": "tiny-1", "name": "ada", "version": "1.2.3"}
OPENED: list[Authority] = []
CERTIFICATE, KEY = self_signed(), generate_private_key(public_exponent=65537, key_size=2048)


@pytest.fixture(scope="module", autouse=True)
def authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Authority]:
    """Of a swarm that anyone may join."""
    OPENED.append(Authority(tmp_path_factory.mktemp("authority"), "tiny-1", is_open=True))
    yield OPENED[0]
    OPENED.pop().close()


@asynccontextmanager
async def channel(snapshot: SwarmSnapshot | None = None) -> AsyncIterator[grpc.aio.Channel]:
    server, port = bind_grpc("127.0.0.1", 0, CERTIFICATE)

    def offer() -> EnrolReply:
        reply = EnrolReply()
        reply.CopyFrom(ENROLMENT)
        return reply

    await start_grpc(server, CoordinatorService(OPENED[0], offer, "1.2.0", lambda: snapshot or SwarmSnapshot()))
    try:
        link = Link("127.0.0.1", port, "tiny-1", CERTIFICATE.fingerprint)
        async with await connect(link, timeout_seconds=10) as opened:
            yield opened
    finally:
        await server.stop(None)


async def enrol(**fields: str) -> EnrolReply:
    async with channel() as opened:
        return await CoordinatorStub(opened).Enrol(request(**fields), timeout=10)


def request(**fields: str) -> EnrolRequest:
    made = EnrolRequest(**{**GOOD, **fields}, time=time.time(), public_key=public_bytes(KEY))
    made.signature = sign(KEY, enrolment_words(made))
    return made


async def watch(interval: float, count: int, snapshot: SwarmSnapshot | None = None) -> list[SwarmSnapshot]:
    async with channel(snapshot) as opened:
        snapshots = []
        async for received in CoordinatorStub(opened).Watch(WatchRequest(interval_seconds=interval), timeout=10):
            snapshots.append(received)
            if len(snapshots) == count:
                break
        return snapshots


def test_a_volunteer_gets_the_experiment_byte_for_byte_and_a_token() -> None:
    reply = asyncio.run(enrol())
    assert (reply.experiment, reply.fingerprint, reply.run_id) == (
        ENROLMENT.experiment, ENROLMENT.fingerprint, ENROLMENT.run_id)
    assert reply.initial_peers == ENROLMENT.initial_peers
    assert (reply.name, bool(reply.token)) == ("ada", True)
    assert reply.token_expires > time.time() + 86400


def test_an_enrolment_that_its_key_has_not_signed_is_refused_and_counted(authority: Authority) -> None:
    async def forge() -> None:
        forged = request()
        forged.name = "eve"
        async with channel() as opened:
            await CoordinatorStub(opened).Enrol(forged, timeout=10)

    before = authority.failures["signature"]
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        asyncio.run(forge())
    assert refused.value.code() is StatusCode.UNAUTHENTICATED
    assert authority.failures["signature"] == before + 1


def test_one_address_does_not_enrol_without_end(authority: Authority) -> None:
    async def hammer() -> list[StatusCode]:
        async with channel() as opened:
            calls = [CoordinatorStub(opened).Enrol(request(run_id="another"), timeout=30) for _ in range(150)]
            return [error.code() for error in await asyncio.gather(*calls, return_exceptions=True)]

    codes = asyncio.run(hammer())
    assert StatusCode.RESOURCE_EXHAUSTED in codes
    assert codes.count(StatusCode.NOT_FOUND) >= ENROLMENTS[1]
    assert authority.failures["rate"] == codes.count(StatusCode.RESOURCE_EXHAUSTED)


def test_one_address_does_not_watch_without_end() -> None:
    async def crowd() -> list[StatusCode]:
        async with channel() as opened:
            calls = [CoordinatorStub(opened).Watch(WatchRequest(interval_seconds=3600), timeout=30)
                     for _ in range(WATCHERS + 2)]
            first = await asyncio.gather(*(call.read() for call in calls), return_exceptions=True)
            for call in calls:
                call.cancel()
            return [answer.code() for answer in first if isinstance(answer, grpc.aio.AioRpcError)]

    assert asyncio.run(crowd()) == [StatusCode.RESOURCE_EXHAUSTED] * 2


@pytest.mark.parametrize(("fields", "code", "text"), [
    ({"run_id": "tiny-2"}, StatusCode.NOT_FOUND, "'tiny-2' is not run here; expected tiny-1."),
    ({"run_id": ""}, StatusCode.NOT_FOUND, "stale"),
    ({"version": "1.3.0"}, StatusCode.FAILED_PRECONDITION, "covey '1.3.0' can't join; expected 1.2."),
    ({"version": "2.2.0"}, StatusCode.FAILED_PRECONDITION, "expected 1.2"),
    ({"version": ""}, StatusCode.FAILED_PRECONDITION, "expected 1.2"),
    ({"version": "1"}, StatusCode.FAILED_PRECONDITION, "expected 1.2"),
    ({"name": ""}, StatusCode.INVALID_ARGUMENT, "1 to 64 printable"),
    ({"name": "a" * 65}, StatusCode.INVALID_ARGUMENT, "1 to 64 printable"),
    ({"name": "a\nb"}, StatusCode.INVALID_ARGUMENT, "1 to 64 printable"),
    ({"name": "x" * 70_000}, StatusCode.RESOURCE_EXHAUSTED, "larger"),
])
def test_who_can_not_take_part_is_told_why(fields: dict[str, str], code: StatusCode, text: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        asyncio.run(enrol(**fields))
    assert refused.value.code() is code
    assert text in refused.value.details()
    assert len(refused.value.details()) < 300


def test_a_patch_release_may_join() -> None:
    assert asyncio.run(enrol(version="1.2.99")).run_id == "tiny-1"


def test_a_snapshot_carries_the_whole_view(state: SwarmState, about: About) -> None:
    [received] = asyncio.run(watch(0, 99, SwarmSnapshot(**view(Seen(state), about))))
    assert (received.run_id, received.epoch, received.epoch_samples, received.target_batch_size) == (
        about.run_id, 7, 64, 256)
    assert (received.loss, received.samples_total, received.joins, received.departures.lost) == (2.5, 1500, 6, 1)
    ada, eve = received.peers
    assert (ada.peer_id, ada.rounds.averaged, ada.loss, ada.last_seen_seconds) == ("12D3ada", 5, 2.0, 3.0)
    assert (eve.mode, eve.state) == ("client", "starting")


def test_a_loss_that_nobody_knows_is_absent_not_zero(about: About) -> None:
    assert not SwarmSnapshot(**view(Seen(), about)).HasField("loss")


def test_an_interval_gives_one_snapshot_after_another() -> None:
    assert len(asyncio.run(watch(0.2, 3))) == 3


@pytest.mark.parametrize("interval", [0.1, -1.0, 3601.0, float("nan"), float("inf")])
def test_an_interval_out_of_bounds_is_refused(interval: float) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        asyncio.run(watch(interval, 1))
    assert refused.value.code() is StatusCode.INVALID_ARGUMENT
    assert "expected 0, or 0.2 to 3600" in refused.value.details()


def test_health_and_reflection_are_served() -> None:
    async def ask() -> tuple[int, set[str]]:
        async with channel() as opened:
            health = await health_pb2_grpc.HealthStub(opened).Check(health_pb2.HealthCheckRequest(service=SERVICE))
            call = reflection_pb2_grpc.ServerReflectionStub(opened).ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
            [listing] = [reply async for reply in call]
            return health.status, {service.name for service in listing.list_services_response.service}

    status, services = asyncio.run(ask())
    assert status == health_pb2.HealthCheckResponse.SERVING
    assert {"covey.v1.Coordinator", "grpc.health.v1.Health"} <= services


def test_a_grpc_port_in_use_is_bad_input() -> None:
    async def twice() -> None:
        server, port = bind_grpc("127.0.0.1", 0, CERTIFICATE)
        try:
            with pytest.raises(BadInput, match=f"port {port} for gRPC"):
                bind_grpc("127.0.0.1", port, CERTIFICATE)
        finally:
            await server.stop(None)

    asyncio.run(twice())
