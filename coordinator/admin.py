"""`covey.v1.Admin`: the operator's invites and bans, on a local socket, or over TLS with the admin token."""

import asyncio
import hmac
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from grpc import StatusCode, aio

from averaging.private_file import write_private
from coordinator import members
from coordinator.authority import Authority
from coordinator.local_server import serve_locally
from proto.authority_pb2 import (
    BanRequest,
    Invite,
    Invites,
    ListInvitesRequest,
    ListMembersRequest,
    Member,
    Members,
    NewInvite,
    WhichInvite,
)
from proto.authority_pb2_grpc import AdminServicer, add_AdminServicer_to_server
from training.errors import BadInput

Context = aio.ServicerContext[Any, Any]
Result = TypeVar("Result")
LONGEST_REASON = 200  # letters


class AdminService(AdminServicer):
    """What the operator asks of `authority`. `link(code)`: a volunteer's link with that invite. `banned()` is called
    after each change of the bans. `token`: who doesn't present it is refused; None: whoever comes may ask."""

    def __init__(self, authority: Authority, link: Callable[[str], str], banned: Callable[[], None],
                 token: str | None = None) -> None:
        self._authority, self._link, self._banned, self._token = authority, link, banned, token

    async def CreateInvite(self, request: NewInvite, context: Context) -> Invite:
        """INVALID_ARGUMENT: it could not be used, or the label is taken."""
        await self._admit(context)
        return self._invite(await _answer(
            context, self._authority.create_invite, request.label, request.uses if request.HasField("uses") else None,
            request.expires if request.HasField("expires") else None))

    async def ListInvites(self, request: ListInvitesRequest, context: Context) -> Invites:
        """All."""
        await self._admit(context)
        found = await _answer(context, self._authority.ledger.invites)
        return Invites(invites=[self._invite(invite) for invite in found])

    async def RevokeInvite(self, request: WhichInvite, context: Context) -> Invite:
        """INVALID_ARGUMENT: there is none."""
        await self._admit(context)
        return self._invite(await _answer(context, self._authority.revoke_invite, request.code_or_label))

    async def Ban(self, request: BanRequest, context: Context) -> Member:
        """INVALID_ARGUMENT: nobody is known by that."""
        await self._admit(context)
        member = await _answer(context, self._authority.ban, request.peer, request.reason[:LONGEST_REASON],
                               lift=request.lift)
        self._banned()
        return _member(member)

    async def ListMembers(self, request: ListMembersRequest, context: Context) -> Members:
        """All."""
        await self._admit(context)
        return Members(members=[_member(member) for member in await _answer(
            context, self._authority.ledger.members)])

    async def _admit(self, context: Context) -> None:
        if self._token is not None:
            await admit(context, self._token, self._authority.failures)

    def _invite(self, invite: members.Invite) -> Invite:
        return Invite(code=invite.code, label=invite.label, uses_left=invite.uses_left, expires=invite.expires,
                      revoked=invite.revoked, used=invite.used, link=self._link(invite.code))


async def admit(context: Context, token: str, failures: Counter[str]) -> None:
    """Go on only with the admin token. UNAUTHENTICATED: without it, which is counted."""
    shown = str(dict(context.invocation_metadata() or ()).get("authorization", ""))
    if not hmac.compare_digest(shown.encode(), f"Bearer {token}".encode()):
        failures["admin token"] += 1
        await context.abort(StatusCode.UNAUTHENTICATED, "no good admin token; expected the one in the coordinator's "
                            "state directory. Set COVEY_ADMIN_TOKEN to it.")


async def _answer(context: Context, ask: Callable[..., Result], *arguments: Any, **named: Any) -> Result:
    try:
        return await asyncio.to_thread(ask, *arguments, **named)
    except BadInput as error:
        await context.abort(StatusCode.INVALID_ARGUMENT, f"{error.found}; expected {error.expected}. {error.mend}")


def _member(member: members.Member) -> Member:
    return Member(peer_id=member.peer_id, name=member.name, invite=member.invite, enrolled=member.enrolled,
                  renewed=member.renewed, banned=member.reason is not None, reason=member.reason or "")


def admin_token(folder: Path) -> str:
    """The token in the state directory `folder`, made on first use; whoever can read it is the operator."""
    path = folder / "admin.token"
    if not path.exists() or not path.read_text().strip():  # an empty one, anybody could present
        write_private(path, secrets.token_urlsafe(32).encode())
    return path.read_text().strip()


@asynccontextmanager
async def serve_admin(service: AdminService, path: Path) -> AsyncIterator[None]:
    """Serve on the socket `path` meanwhile."""
    server = aio.server()
    add_AdminServicer_to_server(service, server)
    async with serve_locally(server, path):
        yield
