"""Calling a coordinator: what its refusals mean to a user, and how an operator shows that it is one."""

import os

import grpc

from coordinator.link import Link
from coordinator.tls import unreachable
from training.errors import BadInput

TOKEN = "COVEY_ADMIN_TOKEN"  # noqa: S105 - a variable's name


def explain(link: Link, error: grpc.aio.AioRpcError) -> BadInput:
    """A failed call to a coordinator, in a user's words."""
    details = one_line(error.details() or "")
    match error.code():
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return unreachable(link, details)
        case grpc.StatusCode.UNAVAILABLE if "; expected " not in details:
            return unreachable(link, details)
        case _ if "; expected " in details:  # a coordinator's errors are worded as ours
            found, _, rest = details.partition("; expected ")
            expected, _, mend = rest.partition(". ")
            return BadInput(f"{link.address} refuses: {found}", expected=expected,
                            mend=mend or "The link may be stale: ask the operator for a fresh one.")
        case code:
            return BadInput(f"{link.address} answers {code.name} ({details})", expected="a coordinator that "
                            "this version of covey knows", mend="Check the link and both versions.")


def admin_metadata() -> list[tuple[str, str]]:
    """What shows the admin token in COVEY_ADMIN_TOKEN. Raises BadInput if there is none."""
    token = os.environ.get(TOKEN, "").strip()
    if not token or not (token.isascii() and token.isprintable()):  # gRPC can't send what is not
        raise BadInput(f"no {'good ' if token else ''}{TOKEN} in the environment", expected="the admin token",
                       mend="The file admin.token in the coordinator's state directory has it.")
    return [("authorization", f"Bearer {token}")]


def one_line(text: str, limit: int = 300) -> str:
    """Text of a stranger that can't act on a terminal: no control characters, no line breaks, not long."""
    return "".join(character if character.isprintable() else " " for character in text[:limit])
