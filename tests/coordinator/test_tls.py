"""TLS pinned by the link, over real sockets on loopback: the right certificate is enough, and nothing else will do."""

import asyncio
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from time import monotonic

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from coordinator.link import Link
from coordinator.service import bind_grpc
from coordinator.tls import Certificate, connect, fingerprint, own_certificate, read_certificate
from training.errors import BadInput

RUN = "tls-0123456789ab"
DAY = timedelta(days=1)
Names = Sequence[x509.GeneralName]


def name(common: str | None) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)] if common else [])


def pem(key: EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


class TestCa:
    """A certificate authority like those that operators use."""

    __test__ = False

    def __init__(self) -> None:
        self.key = generate_private_key(SECP256R1())
        self.certificate = self._sign(name("a test's CA"), self.key, [], is_ca=True)

    def _sign(self, subject: x509.Name, key: EllipticCurvePrivateKey, names: Names, *, is_ca: bool = False,
              end: timedelta = DAY) -> x509.Certificate:
        now = datetime.now(UTC)
        made = (x509.CertificateBuilder().subject_name(subject).issuer_name(name("a test's CA"))
                .public_key(key.public_key()).serial_number(x509.random_serial_number())
                .not_valid_before(now - 2 * DAY).not_valid_after(now + end)
                .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True))
        if names:
            made = made.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return made.sign(self.key, SHA256())

    def issue(self, names: Names, *, common: str | None = "coordinator", end: timedelta = DAY,
              key: EllipticCurvePrivateKey | None = None) -> Certificate:
        """A leaf, with the CA's own certificate behind it; for a new key, unless one is given."""
        key = key or generate_private_key(SECP256R1())
        leaf = self._sign(name(common), key, names, end=end)
        return Certificate(pem(key), b"".join(each.public_bytes(Encoding.PEM) for each in (leaf, self.certificate)))


@pytest.fixture(scope="module")
def ca() -> TestCa:
    return TestCa()


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """As a coordinator makes it."""
    return own_certificate(tmp_path_factory.mktemp("tls"))


@asynccontextmanager
async def serving(certificate: Certificate, host: str = "127.0.0.1") -> AsyncIterator[Link]:
    """A coordinator's gRPC server, of which only its health is asked; the link to it."""
    server, port = bind_grpc(host, 0, certificate)
    checks = health.aio.HealthServicer()  # type: ignore[attr-defined]  # missing in grpc-stubs
    await checks.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    await server.start()
    try:
        yield Link(host, port, RUN, certificate.fingerprint)
    finally:
        await server.stop(None)


async def ask(link: Link, timeout: float = 10.0) -> int:
    async with await connect(link, timeout_seconds=timeout) as channel:
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        return int(reply.status)


async def served_and_asked(certificate: Certificate, host: str = "127.0.0.1") -> int:
    async with serving(certificate, host) as link:
        return await ask(link)


# -- a coordinator's own --

def test_a_certificate_is_made_once_and_is_for_its_owner_only(tmp_path: Path) -> None:
    made = own_certificate(tmp_path)
    assert own_certificate(tmp_path) == made
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {
        "tls.key": 0o600, "tls.crt": 0o600}
    assert len(made.fingerprint) == 43


def test_a_key_without_its_certificate_is_replaced_as_the_first_start_was_cut_off(tmp_path: Path) -> None:
    (tmp_path / "tls.key").write_text("half")
    (tmp_path / "tls.tmp").write_text("half")
    assert own_certificate(tmp_path).fingerprint


def test_a_certificate_whose_key_is_gone_is_bad_input(tmp_path: Path) -> None:
    own_certificate(tmp_path)
    (tmp_path / "tls.key").unlink()
    with pytest.raises(BadInput, match=r"tls\.key.*expected a certificate and its key"):
        own_certificate(tmp_path)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_holder_of_the_certificate_in_the_link_is_spoken_to(own: Certificate, host: str) -> None:
    assert asyncio.run(served_and_asked(own, host)) == health_pb2.HealthCheckResponse.SERVING


def test_two_of_one_name_are_told_apart(own: Certificate, tmp_path: Path) -> None:
    async def misled() -> None:
        async with serving(own_certificate(tmp_path)) as link:
            with pytest.raises(BadInput) as refused:
                await connect(replace(link, certificate=own.fingerprint), timeout_seconds=10)
            assert refused.value.found == f"certificate {link.certificate[:12]}... at {link.address}"
            assert refused.value.expected == f"{own.fingerprint[:12]}..., as in the link"
    asyncio.run(misled())


def test_a_certificate_that_is_swapped_behind_the_look_at_it_gets_no_call(own: Certificate, tmp_path: Path) -> None:
    """The channel trusts the one that was seen, not whoever answers later."""
    async def swapped() -> grpc.StatusCode | None:
        async with serving(own) as link:
            channel = await connect(link, timeout_seconds=10)
        other = own_certificate(tmp_path)
        server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        server.add_secure_port(link.address, grpc.ssl_server_credentials([(other.key, other.chain)]))
        await server.start()
        try:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert "CERTIFICATE_VERIFY_FAILED" in (refused.value.details() or "")
            return refused.value.code()
        finally:
            await channel.close(None)
            await server.stop(None)
    assert asyncio.run(swapped()) is grpc.StatusCode.UNAVAILABLE


def test_who_speaks_no_tls_is_not_served(own: Certificate) -> None:
    async def plain() -> grpc.StatusCode | None:
        async with serving(own) as link, grpc.aio.insecure_channel(link.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
            return refused.value.code()
    assert asyncio.run(plain()) is grpc.StatusCode.UNAVAILABLE


# -- who else may answer there --

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def hangs_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def talks_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(100)
    writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
    writer.close()


async def greets(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH_9.6\r\n")
    await reader.read(100)
    writer.close()


async def says_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.read(1000):
        pass
    writer.close()


async def refusal(answer: Answer, timeout: float) -> str:
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        with pytest.raises(BadInput) as refused:
            await connect(Link("127.0.0.1", port, RUN, "A" * 43), timeout_seconds=timeout)
        assert f"127.0.0.1:{port}" in refused.value.found
        return str(refused.value)
    finally:
        server.close()


@pytest.mark.parametrize(("answer", "found"), [
    (hangs_up, "no coordinator"), (talks_http, "(no TLS: "), (greets, "(no TLS: "), (says_nothing, "timed out")])
def test_whoever_else_answers_there_is_told_in_one_line_and_in_time(answer: Answer, found: str) -> None:
    began = monotonic()
    told = asyncio.run(refusal(answer, 1.0))
    assert monotonic() - began < 5
    assert found in told
    assert "expected a running `covey coordinator`" in told
    assert "\n" not in told


def test_nobody_there_is_told_in_one_line() -> None:
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        link = Link("127.0.0.1", taken.getsockname()[1], RUN, "A" * 43)
        with pytest.raises(BadInput, match=r"no coordinator answers at 127\.0\.0\.1:.*refused"):
            asyncio.run(connect(link, timeout_seconds=5))


@pytest.mark.parametrize("host", ["nobody.invalid", "a..b", "." * 3, "x" * 64, f"{'x' * 64}.example"])
def test_a_host_that_does_not_exist_or_cannot_is_bad_input(host: str) -> None:
    with pytest.raises(BadInput, match="no coordinator answers at") as refused:
        asyncio.run(connect(Link(host, 1, RUN, "A" * 43), timeout_seconds=5))
    assert "\n" not in str(refused.value)


# -- the operator's own --

@pytest.mark.parametrize(("names", "common"), [
    ([x509.DNSName("gpu-box.example.org"), x509.DNSName("other.example.org")], "coordinator"),
    ([x509.DNSName("*.example.org")], "coordinator"),
    ([x509.IPAddress(ip_address("203.0.113.7"))], None),
    ([x509.IPAddress(ip_address("2001:db8::17"))], None),
    ([x509.DNSName("gpu-box.example.org"), x509.IPAddress(ip_address("203.0.113.7"))], None),
    ([], "gpu-box.example.org"),
], ids=["names", "wildcard", "IPv4", "IPv6", "both", "common name"])
def test_a_leaf_of_a_ca_is_trusted_by_its_fingerprint_whatever_it_is_called(
        ca: TestCa, names: Names, common: str | None) -> None:
    assert asyncio.run(served_and_asked(ca.issue(names, common=common))) == health_pb2.HealthCheckResponse.SERVING


def test_another_leaf_of_the_same_ca_and_name_is_not(ca: TestCa) -> None:
    one, other = (ca.issue([x509.DNSName("gpu-box.example.org")]) for _ in range(2))

    async def misled() -> None:
        async with serving(other) as link:
            with pytest.raises(BadInput, match="as in the link"):
                await connect(replace(link, certificate=one.fingerprint), timeout_seconds=10)
    asyncio.run(misled())


def test_a_certificate_that_is_renewed_with_the_same_key_leaves_the_link_good(ca: TestCa) -> None:
    key = generate_private_key(SECP256R1())
    before, after = (ca.issue([x509.DNSName(name)], key=key) for name in ("old.example.org", "new.example.org"))
    assert before.chain != after.chain

    async def renewed() -> int:
        async with serving(after) as link:
            return await ask(replace(link, certificate=before.fingerprint))
    assert asyncio.run(renewed()) == health_pb2.HealthCheckResponse.SERVING


def test_the_fingerprint_of_a_chain_is_its_first_certificates(ca: TestCa) -> None:
    issued = ca.issue([x509.DNSName("a")])
    leaf = x509.load_pem_x509_certificates(issued.chain)[0]
    assert issued.fingerprint == fingerprint(leaf)


def test_a_certificate_that_has_expired_is_called_so_before_it_is_served(ca: TestCa, tmp_path: Path) -> None:
    """Volunteers' gRPC would refuse it, though they name it by its fingerprint."""
    expired = ca.issue([x509.DNSName("a")], end=-DAY)
    with pytest.raises(BadInput, match=r"good from .* to \d{4}-\d\d-\d\d only.*renew it"):
        written(tmp_path, expired.chain, expired.key)


def test_a_volunteer_that_meets_an_expired_certificate_gets_no_answer(ca: TestCa) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        asyncio.run(served_and_asked(ca.issue([x509.DNSName("a")], end=-DAY)))
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "certificate has expired" in (refused.value.details() or "")


def written(folder: Path, chain: bytes, key: bytes) -> Certificate:
    (folder / "chain.pem").write_bytes(chain)
    (folder / "key.pem").write_bytes(key)
    return read_certificate(folder / "chain.pem", folder / "key.pem")


def test_an_operators_certificate_is_read_as_it_is(ca: TestCa, tmp_path: Path) -> None:
    issued = ca.issue([x509.DNSName("a")])
    assert written(tmp_path, issued.chain, issued.key) == issued


def test_what_is_no_certificate_with_its_key_is_bad_input(ca: TestCa, tmp_path: Path) -> None:
    good, other = (ca.issue([x509.DNSName("a")]) for _ in range(2))
    key = generate_private_key(SECP256R1())
    locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for chain, private, why in (
            (good.chain, other.key, "the key is another certificate's"), (b"", good.key, ""), (good.chain, b"", ""),
            (good.chain, locked, "assword"), (good.key, good.chain, ""), (good.chain, public, ""),
            (good.chain[:300], good.key, ""), (b"\xff" * 99, good.key, ""),
            (ca.certificate.public_bytes(Encoding.PEM) + good.chain, good.key, "another certificate's")):
        with pytest.raises(BadInput, match="expected a certificate and its key, both PEM") as refused:
            written(tmp_path, chain, private)
        assert why in refused.value.found
        assert "\n" not in str(refused.value)
    with pytest.raises(BadInput, match="No such file"):
        read_certificate(tmp_path / "nowhere", tmp_path / "key.pem")


def test_a_certificate_that_names_nothing_is_refused_before_it_is_served(ca: TestCa, tmp_path: Path) -> None:
    """gRPC would never take it for anybody's."""
    nameless = ca.issue([], common=None)
    with pytest.raises(BadInput, match="no name"):
        written(tmp_path, nameless.chain, nameless.key)
