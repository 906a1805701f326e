"""The operator's commands against a real coordinator's admin service: on this machine, and from far away."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from averaging.identity import open_key, public_bytes, sign
from averaging.membership import enrolment_words
from averaging.runtime import make_runtime_dir
from coordinator.admin import AdminService, serve_admin
from coordinator.admin_socket import admin_socket
from coordinator.authority import Authority
from coordinator.calls import TOKEN
from coordinator.link import Link
from coordinator.service import bind_grpc
from coordinator.tls import Certificate, own_certificate
from peer.operate import Operator, invites_table, members_table, rows, seconds
from proto.authority_pb2 import Invite, Member
from proto.authority_pb2_grpc import add_AdminServicer_to_server
from proto.coordinator_pb2 import EnrolRequest
from training.errors import BadInput

RUN, NOW = "operated-0123456789ab", 1_700_000_000.0
GOOD = "the-operators-token"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return own_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Authority]:
    """With one member, eve."""
    folder = tmp_path_factory.mktemp("authority")
    key = open_key(folder / "eve.key")
    with closing(Authority(folder, RUN, is_open=False, clock=lambda: NOW)) as made:
        request = EnrolRequest(run_id=RUN, name="eve", invite=made.invite_to_show or "", time=NOW,
                               public_key=public_bytes(key))
        request.signature = sign(key, enrolment_words(request))
        made.enrol(request)
        yield made


def service(authority: Authority, token: str | None = None) -> AdminService:
    return AdminService(authority, lambda code: f"covey://{code}", lambda: None, token)


def here(authority: Authority, folder: Path, ask: Callable[[], Awaitable[Any]]) -> Any:
    """What `ask` gets while a coordinator with this state directory serves on its socket."""
    async def asked() -> Any:
        async with serve_admin(service(authority), admin_socket(folder)):
            return await ask()
    return asyncio.run(asked())


@asynccontextmanager
async def far_away(authority: Authority, certificate: Certificate) -> AsyncIterator[str]:
    """The link to a coordinator whose admin service wants the token."""
    server, port = bind_grpc("127.0.0.1", 0, certificate)
    add_AdminServicer_to_server(service(authority, GOOD), server)
    await server.start()
    try:
        yield str(Link("127.0.0.1", port, RUN, certificate.fingerprint))
    finally:
        await server.stop(None)


async def every_command(operator: Operator) -> None:
    label = f"invite {len(await operator.list_invites())}"
    made = await operator.create_invite(label, 3, NOW + 60)
    assert (made.label, made.uses_left, made.expires, made.link) == (label, 3, NOW + 60, f"covey://{made.code}")
    assert not (await operator.create_invite(f"{label} for all", None, None)).HasField("uses_left")
    assert (await operator.revoke_invite(made.code)).revoked
    assert {invite.label: invite.revoked for invite in await operator.list_invites()}[label]
    banned = await operator.ban("eve", "spam", lift=False)
    assert (banned.banned, banned.reason) == (True, "spam")
    assert [(member.name, member.banned) for member in await operator.list_members()] == [("eve", True)]
    assert not (await operator.ban(banned.peer_id, "", lift=True)).banned


def test_every_command_is_answered_by_the_coordinator_of_a_state_directory(
        authority: Authority, tmp_path: Path) -> None:
    here(authority, tmp_path, lambda: every_command(Operator(None, tmp_path)))


def test_the_only_coordinator_of_this_machine_needs_no_name(authority: Authority, tmp_path: Path) -> None:
    here(authority, tmp_path, lambda: every_command(Operator(None, None)))


def test_every_command_is_answered_from_far_away_for_the_token(
        authority: Authority, certificate: Certificate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, f"{GOOD}\n")  # as from a file

    async def ask() -> None:
        async with far_away(authority, certificate) as link:
            await every_command(Operator(link, None))
    asyncio.run(ask())


def told(ask: Callable[[], Awaitable[Any]]) -> BadInput:
    with pytest.raises(BadInput) as refused:
        asyncio.run(_awaited(ask))
    assert str(refused.value).isprintable()
    return refused.value


async def _awaited(ask: Callable[[], Awaitable[Any]]) -> Any:
    return await ask()


@pytest.mark.parametrize(("ask", "found", "mend"), [
    (lambda operator: operator.create_invite("", None, None), "label ''", "Choose another."),
    (lambda operator: operator.create_invite("first", None, None), "a second invite with the label 'first'", "revoke"),
    (lambda operator: operator.create_invite("a", 1, NOW), "an invite that nobody could use", "--expires"),
    (lambda operator: operator.revoke_invite("unknown"), "invite 'unknown'", "covey invite list"),
    (lambda operator: operator.ban("nobody", "", lift=False), "volunteer 'nobody'", "covey status"),
])
def test_a_no_reads_as_the_coordinator_meant_it(authority: Authority, tmp_path: Path, ask: Any, found: str,
                                                mend: str) -> None:
    with pytest.raises(BadInput) as refused:
        here(authority, tmp_path, lambda: ask(Operator(None, tmp_path)))
    assert refused.value.found == found
    assert refused.value.expected
    assert mend in refused.value.mend


@pytest.mark.parametrize("shown", ["wrong", f"{GOOD}x", f"{GOOD} x", f"Bearer {GOOD}"])
def test_a_wrong_token_is_told(authority: Authority, certificate: Certificate, monkeypatch: pytest.MonkeyPatch,
                               shown: str) -> None:
    monkeypatch.setenv(TOKEN, shown)

    async def ask() -> Any:
        async with far_away(authority, certificate) as link:
            return await Operator(link, None).list_members()
    refused = told(ask)
    assert "no good admin token" in refused.found
    assert TOKEN in refused.mend


@pytest.mark.parametrize(("shown", "found"), [
    (None, "no "), ("", "no "), (" \n", "no "), ("two\nlines", "no good "), ("é", "no good "), ("\x7f", "no good ")])
def test_from_far_away_there_has_to_be_a_token(monkeypatch: pytest.MonkeyPatch, shown: str | None, found: str) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    if shown is not None:
        monkeypatch.setenv(TOKEN, shown)
    refused = told(Operator(str(Link("127.0.0.1", 1, RUN, "A" * 43)), None).list_members)
    assert refused.found == f"{found}{TOKEN} in the environment"
    assert "admin.token" in refused.mend


def test_nobody_far_away_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, GOOD)
    assert "no coordinator answers at 127.0.0.1:1" in told(
        Operator(str(Link("127.0.0.1", 1, RUN, "A" * 43)), None).list_members).found
    with pytest.raises(BadInput, match="link 'nonsense'"):
        Operator("nonsense", None)


def test_no_coordinator_or_several_on_this_machine_are_told(authority: Authority, tmp_path: Path) -> None:
    assert told(Operator(None, None).list_members).found == "0 coordinators of yours on this machine"
    assert told(Operator(None, tmp_path).list_members).found == "no coordinator answers here"

    async def with_another() -> Any:
        async with serve_admin(service(authority), admin_socket(tmp_path / "another")):
            return await Operator(None, None).list_members()
    with pytest.raises(BadInput, match=r"2 coordinators of yours.*--state-dir"):
        here(authority, tmp_path, with_another)


def test_a_socket_of_a_coordinator_that_was_killed_is_nobody(tmp_path: Path) -> None:
    make_runtime_dir()
    admin_socket(tmp_path).touch()
    assert told(Operator(None, None).list_members).found == "no coordinator answers here"


@pytest.mark.parametrize(("text", "found"), [
    ("90m", 5400.0), ("12h", 43200.0), ("7d", 604800.0), ("0.5h", 1800.0), ("1e2m", 6000.0)])
def test_a_time_is_a_number_and_its_unit(text: str, found: float) -> None:
    assert seconds(text) == found


@pytest.mark.parametrize("text", ["", "7", "d", "7 days", "-1h", "0m", "nand", "infd", "1e9d", "1w", "é"])
def test_any_other_time_is_bad_input(text: str) -> None:
    with pytest.raises(BadInput, match="expected a number and m, h or d"):
        seconds(text)


def shown(table: Any) -> str:
    out = StringIO()
    Console(file=out, width=200, color_system=None).print(table)
    return out.getvalue()


def test_tables_show_what_is_there_and_let_nobody_write_on_the_terminal() -> None:
    hostile = "[red]eve[/red]\x1b[2J\nroot  admin"
    members = [Member(peer_id="QmEve", name=hostile, invite="", enrolled=NOW, renewed=NOW, banned=True, reason=hostile),
               Member(peer_id="QmBob", name="bob", invite="first", enrolled=NOW, renewed=NOW, banned=True)]
    text = shown(members_table(members))
    assert text.count("[red]eve[/red] [2J root  admin") == 2
    assert "\x1b" not in text
    assert len(text.splitlines()) == 3
    assert datetime.fromtimestamp(NOW, UTC).strftime("%Y-%m-%d %H:%M UTC") in text
    assert text.splitlines()[2].split()[-1] == "yes"
    text = shown(invites_table([Invite(code="c1", label=hostile, uses_left=2, expires=NOW, used=1),
                                Invite(code="c2", label="b", revoked=True)]))
    assert "[red]eve[/red] [2J root  admin" in text
    assert "2023-11-14 22:13 UTC" in text
    assert text.splitlines()[2].split() == ["b", "revoked", "any", "0", "never", "c2"]


def test_for_programs_what_is_absent_is_none() -> None:
    [row] = rows([Invite(code="c", label="l")])
    assert (row["code"], row["uses_left"], row["expires"], row["revoked"], row["used"]) == ("c", None, None, False, 0)
