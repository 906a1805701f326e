"""covey.v1.Admin over real gRPC: on a socket for its owner only, and over TLS for who has the admin token."""

import asyncio
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from hivemind.utils.crypto import RSAPrivateKey

from averaging.membership import enrolment_words
from averaging.runtime import runtime_dir
from coordinator.admin import LONGEST_REASON, AdminService, admin_token, serve_admin
from coordinator.admin_socket import admin_socket
from coordinator.authority import Authority
from coordinator.link import Link
from coordinator.service import bind_grpc
from coordinator.tls import Certificate, connect, own_certificate
from proto.authority_pb2 import (
    BanRequest,
    ListInvitesRequest,
    ListMembersRequest,
    NewInvite,
    WhichInvite,
)
from proto.authority_pb2_grpc import AdminStub, add_AdminServicer_to_server
from proto.coordinator_pb2 import EnrolRequest

RUN = "admin-0123456789ab"
TOKEN = "the-operators-token"
Admin = Any  # a stub of the asynchronous kind


@pytest.fixture(autouse=True)
def own_runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return own_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def volunteer() -> RSAPrivateKey:
    return RSAPrivateKey()


@pytest.fixture(scope="module")
def authority_key(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("authority")
    with closing(Authority(folder, RUN, is_open=False)):
        return (folder / "authority.key").read_bytes()


@pytest.fixture
def authority(tmp_path: Path, authority_key: bytes) -> Iterator[Authority]:
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "authority.key").write_bytes(authority_key)
    with closing(Authority(folder, RUN, is_open=False, clock=lambda: 1000.0)) as made:
        yield made


@pytest.fixture
def eve(authority: Authority, volunteer: RSAPrivateKey) -> str:
    """A member of that name; its peer id."""
    request = EnrolRequest(run_id=RUN, name="eve", version="0", invite=authority.invite_to_show or "", time=1000.0,
                           public_key=volunteer.get_public_key().to_bytes())
    request.signature = volunteer.sign(enrolment_words(request))
    authority.enrol(request)
    [member] = authority.ledger.members()
    return member.peer_id


def link_with(code: str) -> str:
    return str(Link("127.0.0.1", 31338, RUN, "A" * 43, code))


@asynccontextmanager
async def on_a_socket(authority: Authority, path: Path,
                      banned: Callable[[], None] = lambda: None) -> AsyncIterator[Admin]:
    async with (serve_admin(AdminService(authority, link_with, banned), path),
                grpc.aio.insecure_channel(f"unix:{path}") as channel):
        yield AdminStub(channel)


def on_the_socket(authority: Authority, ask: Callable[[Admin], Awaitable[Any]],
                  banned: Callable[[], None] = lambda: None) -> Any:
    async def asked() -> Any:
        async with on_a_socket(authority, admin_socket(Path("state")), banned) as admin:
            return await ask(admin)
    return asyncio.run(asked())


CALLS: dict[str, Callable[[Admin, Any], Awaitable[Any]]] = {
    "create": lambda admin, metadata: admin.CreateInvite(NewInvite(label="new"), metadata=metadata, timeout=10),
    "list": lambda admin, metadata: admin.ListInvites(ListInvitesRequest(), metadata=metadata, timeout=10),
    "revoke": lambda admin, metadata: admin.RevokeInvite(
        WhichInvite(code_or_label="first"), metadata=metadata, timeout=10),
    "ban": lambda admin, metadata: admin.Ban(BanRequest(peer="eve"), metadata=metadata, timeout=10),
    "members": lambda admin, metadata: admin.ListMembers(ListMembersRequest(), metadata=metadata, timeout=10),
}


# -- the socket --

def test_the_socket_is_for_its_owner_only_and_gone_afterwards(authority: Authority) -> None:
    path = admin_socket(Path("state"))

    async def look() -> int:
        async with on_a_socket(authority, path):
            assert stat.S_ISSOCK(path.stat().st_mode)
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert list(path.parent.iterdir()) == [path]
            return stat.S_IMODE(path.stat().st_mode)

    assert asyncio.run(look()) == 0o600
    assert list(runtime_dir().iterdir()) == []


def test_a_socket_that_a_killed_coordinator_left_is_no_hindrance(authority: Authority) -> None:
    path = admin_socket(Path("state"))
    path.parent.mkdir(mode=0o700)
    path.write_text("left behind")
    assert on_the_socket(authority, lambda admin: admin.ListInvites(ListInvitesRequest(), timeout=10)).invites


def test_an_invite_is_made_listed_and_revoked(authority: Authority) -> None:
    async def ask(admin: Admin) -> None:
        made = await admin.CreateInvite(NewInvite(label="for friends", uses=3, expires=2000.0), timeout=10)
        assert (made.label, made.uses_left, made.expires, made.revoked, made.used) == (
            "for friends", 3, 2000.0, False, 0)
        assert made.link == link_with(made.code)
        plain = await admin.CreateInvite(NewInvite(label="for all"), timeout=10)
        assert not plain.HasField("uses_left")
        assert not plain.HasField("expires")
        assert (await admin.RevokeInvite(WhichInvite(code_or_label="for friends"), timeout=10)).revoked
        assert (await admin.RevokeInvite(WhichInvite(code_or_label=plain.code), timeout=10)).code == plain.code
        listed = (await admin.ListInvites(ListInvitesRequest(), timeout=10)).invites
        assert {invite.label: invite.revoked for invite in listed} == {
            "first": False, "for friends": True, "for all": True}
    on_the_socket(authority, ask)
    assert {invite.label: (invite.uses_left, invite.expires) for invite in authority.ledger.invites()} == {
        "first": (None, None), "for friends": (3, 2000.0), "for all": (None, None)}


def test_a_member_is_banned_here_at_once_the_dht_is_told_and_the_ban_is_lifted(authority: Authority, eve: str) -> None:
    told: list[frozenset[str]] = []

    async def ask(admin: Admin) -> None:
        [before] = (await admin.ListMembers(ListMembersRequest(), timeout=10)).members
        assert (before.peer_id, before.name, before.invite, before.enrolled, before.renewed, before.banned) == (
            eve, "eve", "first", 1000.0, 1000.0, False)
        banned = await admin.Ban(BanRequest(peer="eve", reason="x" * 1000), timeout=10)
        assert (banned.peer_id, banned.banned, banned.reason) == (eve, True, "x" * LONGEST_REASON)
        assert authority.ban_file.newest().peer_ids == {eve}
        [after] = (await admin.ListMembers(ListMembersRequest(), timeout=10)).members
        assert after == banned
        lifted = await admin.Ban(BanRequest(peer=eve, lift=True), timeout=10)
        assert (lifted.banned, lifted.reason) == (False, "")
    on_the_socket(authority, ask, lambda: told.append(authority.ban_file.newest().peer_ids))
    assert told == [{eve}, set()]


def test_a_ban_without_a_reason_is_a_ban(authority: Authority, eve: str) -> None:
    assert on_the_socket(authority, lambda admin: admin.Ban(BanRequest(peer=eve), timeout=10)).banned


def test_several_bans_and_invites_at_once_are_all_done(authority: Authority, eve: str) -> None:
    async def ask(admin: Admin) -> None:
        await asyncio.gather(
            *(admin.CreateInvite(NewInvite(label=f"invite {number}"), timeout=10) for number in range(10)),
            *(admin.Ban(BanRequest(peer=eve, reason=str(number)), timeout=10) for number in range(10)))
    on_the_socket(authority, ask)
    assert len(authority.ledger.invites()) == 11
    assert authority.ban_file.newest().peer_ids == {eve}


@pytest.mark.parametrize(("method", "request_", "found"), [
    ("CreateInvite", NewInvite(), "label ''"),
    ("CreateInvite", NewInvite(label="x" * 65), "label 'xxx"),
    ("CreateInvite", NewInvite(label="x" * 100_000), "label 'xxx"),
    ("CreateInvite", NewInvite(label="a\nb"), r"label 'a\nb'"),
    ("CreateInvite", NewInvite(label="\x1b]0;x"), r"label '\x1b]0;x'"),
    ("CreateInvite", NewInvite(label="first"), "a second invite with the label 'first'"),
    ("CreateInvite", NewInvite(label="a", uses=0), "an invite that nobody could use"),
    ("CreateInvite", NewInvite(label="a", expires=999.0), "an invite that nobody could use"),
    ("CreateInvite", NewInvite(label="a", expires=float("nan")), "an invite that nobody could use"),
    ("CreateInvite", NewInvite(label="a", expires=float("inf")), "an invite that nobody could use"),
    ("CreateInvite", NewInvite(label="a", expires=1e300), "an invite that nobody could use"),
    ("RevokeInvite", WhichInvite(), "invite ''"),
    ("RevokeInvite", WhichInvite(code_or_label="x" * 100_000), "invite 'xxx"),
    ("Ban", BanRequest(), "volunteer ''"),
    ("Ban", BanRequest(peer="nobody", reason="x"), "volunteer 'nobody'"),
    ("Ban", BanRequest(peer="x" * 100_000, lift=True), "volunteer 'xxx"),
])
def test_bad_input_is_an_invalid_argument_that_says_what_to_do(
        authority: Authority, method: str, request_: Any, found: str) -> None:
    told: list[int] = []
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        on_the_socket(authority, lambda admin: getattr(admin, method)(request_, timeout=10), lambda: told.append(1))
    details = refused.value.details() or ""
    assert refused.value.code() is StatusCode.INVALID_ARGUMENT
    assert details.startswith(found)
    assert "; expected " in details
    assert details.partition("; expected ")[2].partition(". ")[2]  # what to do about it
    assert len(details) < 400
    assert details.isprintable()
    assert told == []
    assert [invite.label for invite in authority.ledger.invites()] == ["first"]


# -- over TLS --

def over_tls(authority: Authority, certificate: Certificate, ask: Callable[[Admin], Awaitable[Any]]) -> Any:
    async def asked() -> Any:
        server, port = bind_grpc("127.0.0.1", 0, certificate)
        add_AdminServicer_to_server(AdminService(authority, link_with, lambda: None, TOKEN), server)
        await server.start()
        try:
            link = Link("127.0.0.1", port, RUN, certificate.fingerprint)
            async with await connect(link, timeout_seconds=10) as channel:
                return await ask(AdminStub(channel))
        finally:
            await server.stop(None)
    return asyncio.run(asked())


def test_with_the_admin_token_each_call_is_answered(authority: Authority, certificate: Certificate, eve: str) -> None:
    async def ask(admin: Admin) -> None:
        for call in CALLS.values():
            assert await call(admin, (("authorization", f"Bearer {TOKEN}"),))
    over_tls(authority, certificate, ask)
    assert not authority.failures


@pytest.mark.parametrize("name", CALLS)
def test_without_it_no_call_is(authority: Authority, certificate: Certificate, eve: str, name: str) -> None:
    shown = [(), *((("authorization", value),) for value in (
        "", "Bearer ", TOKEN, f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", f"bearer {TOKEN}", "Bearer None")),
        (("token", f"Bearer {TOKEN}"),)]

    async def ask(admin: Admin) -> None:
        for metadata in shown:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await CALLS[name](admin, metadata)
            assert refused.value.code() is StatusCode.UNAUTHENTICATED
            assert "no good admin token; expected " in (refused.value.details() or "")
    over_tls(authority, certificate, ask)
    assert authority.failures == {"admin token": len(shown)}
    assert [invite.revoked for invite in authority.ledger.invites()] == [False]
    assert [member.reason for member in authority.ledger.members()] == [None]


def test_a_message_that_is_too_long_is_refused(authority: Authority, certificate: Certificate) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        over_tls(authority, certificate, lambda admin: admin.CreateInvite(
            NewInvite(label="x" * 70_000), metadata=(("authorization", f"Bearer {TOKEN}"),), timeout=10))
    assert refused.value.code() is StatusCode.RESOURCE_EXHAUSTED


def test_the_admin_token_is_made_once_is_long_and_for_the_owner_only(tmp_path: Path) -> None:
    token = admin_token(tmp_path)
    assert admin_token(tmp_path) == token
    assert len(token) >= 43
    assert stat.S_IMODE((tmp_path / "admin.token").stat().st_mode) == 0o600


def test_an_empty_file_of_a_token_lets_nobody_in(tmp_path: Path) -> None:
    """As when the disk was full, or the power failed, at the first start."""
    (tmp_path / "admin.token").touch(mode=0o600)
    assert len(admin_token(tmp_path)) >= 43
