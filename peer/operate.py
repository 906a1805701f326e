"""The operator's commands: invites, members and bans, asked of a coordinator of this machine or of one far away."""

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from rich.markup import escape
from rich.table import Table

from averaging.runtime import runtime_dir
from coordinator.admin_socket import SUFFIX, admin_socket
from coordinator.calls import admin_metadata, explain, one_line
from coordinator.link import parse_link
from coordinator.tls import connect
from peer.enrol import TIMEOUT_SECONDS
from peer.plain import plain
from proto.authority_pb2 import (
    BanRequest,
    Invite,
    ListInvitesRequest,
    ListMembersRequest,
    Member,
    NewInvite,
    WhichInvite,
)
from proto.authority_pb2_grpc import AdminStub
from training.errors import BadInput

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from proto.authority_pb2_grpc import AdminAsyncStub

UNITS = {"m": 60.0, "h": 3600.0, "d": 86400.0}


class Operator:
    """Where to ask: the coordinator behind `link`, with the token in COVEY_ADMIN_TOKEN; else that of `state_dir`; else
    the only one of this machine. Each call raises BadInput if it can't be reached, or says no."""

    def __init__(self, link: str | None, state_dir: Path | None) -> None:
        self._link = parse_link(link) if link else None
        self._state_dir = state_dir

    async def create_invite(self, label: str, uses: int | None, expires: float | None) -> Invite:
        """A new one."""
        async with self._admin() as (admin, metadata):
            return await admin.CreateInvite(NewInvite(label=label, uses=uses, expires=expires), metadata=metadata,
                                            timeout=TIMEOUT_SECONDS)

    async def list_invites(self) -> list[Invite]:
        """All."""
        async with self._admin() as (admin, metadata):
            found = await admin.ListInvites(ListInvitesRequest(), metadata=metadata, timeout=TIMEOUT_SECONDS)
            return list(found.invites)

    async def revoke_invite(self, code_or_label: str) -> Invite:
        """Nobody enrols with it any more."""
        async with self._admin() as (admin, metadata):
            return await admin.RevokeInvite(WhichInvite(code_or_label=code_or_label), metadata=metadata,
                                            timeout=TIMEOUT_SECONDS)

    async def ban(self, peer: str, reason: str, *, lift: bool) -> Member:
        """Put a volunteer out, or let it in again."""
        async with self._admin() as (admin, metadata):
            return await admin.Ban(BanRequest(peer=peer, reason=reason, lift=lift), metadata=metadata,
                                   timeout=TIMEOUT_SECONDS)

    async def list_members(self) -> list[Member]:
        """All who have enrolled."""
        async with self._admin() as (admin, metadata):
            found = await admin.ListMembers(ListMembersRequest(), metadata=metadata, timeout=TIMEOUT_SECONDS)
            return list(found.members)

    @asynccontextmanager
    async def _admin(self) -> AsyncIterator[tuple["AdminAsyncStub", Sequence[tuple[str, str]]]]:
        metadata: list[tuple[str, str]] = []
        if self._link:
            metadata = admin_metadata()
            channel = await connect(self._link, timeout_seconds=TIMEOUT_SECONDS)
        else:
            channel = grpc.aio.insecure_channel(f"unix:{self._socket()}")
        async with channel:
            try:
                yield AdminStub(channel), metadata
            except grpc.aio.AioRpcError as error:
                raise self._explain(error) from None

    def _explain(self, error: grpc.aio.AioRpcError) -> BadInput:
        if self._link:
            return explain(self._link, error)
        details = one_line(error.details() or "")
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            return BadInput("no coordinator answers here", expected="a running `covey coordinator` of yours",
                            mend="Start it, or choose another with --state-dir or --link.")
        found, _, rest = details.partition("; expected ")
        expected, _, mend = rest.partition(". ")
        return BadInput(found, expected=expected or "an answer", mend=mend or "Its log says more.")

    def _socket(self) -> Path:
        if self._state_dir:
            return admin_socket(self._state_dir.expanduser().absolute())
        running = sorted(runtime_dir().glob(f"*{SUFFIX}"))
        if len(running) != 1:
            raise BadInput(f"{len(running)} coordinators of yours on this machine", expected="one, to know which is "
                           "meant", mend="Choose with --state-dir, or with --link.")
        return running[0]


def seconds(text: str) -> float:
    """Of a time as in `90m`, `12h`, `7d`. Raises BadInput."""
    number, unit = text[:-1], text[-1:]
    try:
        found = float(number) * UNITS[unit]
    except (ValueError, KeyError):
        found = 0.0
    if not 0 < found < 1e10:
        raise BadInput(f"time {text!r}", expected="a number and m, h or d, as in 90m, 12h or 7d", mend="Correct it.")
    return found


def rows(messages: "Sequence[Message]") -> list[dict[str, Any]]:
    """For programs."""
    return [plain(message) for message in messages]


def invites_table(invites: Sequence[Invite]) -> Table:
    """For people."""
    table = _table("label", "state", "uses left", "used", "expires", "code")
    for invite in invites:
        state = _state(invite)
        table.add_row(escape(one_line(invite.label)), state, str(invite.uses_left) if invite.HasField("uses_left")
                      else "any", str(invite.used), _when(invite.expires) if invite.HasField("expires") else "never",
                      invite.code)
    return table


def _state(invite: Invite) -> str:
    if invite.revoked:
        return "revoked"
    if invite.HasField("expires") and invite.expires <= time.time():
        return "expired"
    return "used up" if invite.HasField("uses_left") and not invite.uses_left else "good"


def members_table(members: Sequence[Member]) -> Table:
    """For people."""
    table = _table("name", "peer id", "enrolled", "renewed", "invite", "banned")
    for member in members:
        banned = (escape(one_line(member.reason)) or "yes") if member.banned else ""
        table.add_row(escape(one_line(member.name)), member.peer_id, _when(member.enrolled), _when(member.renewed),
                      escape(one_line(member.invite)), banned)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _when(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M UTC")
