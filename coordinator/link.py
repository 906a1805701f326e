"""The join link: where a coordinator answers, for which experiment, by what certificate, and on whose invitation.

`covey://HOST:PORT/RUN_ID/CERTIFICATE/INVITE`; no invite where anyone may join. No character of it means anything to a
shell.
"""

import re
from dataclasses import dataclass
from urllib.parse import SplitResult, parse_qsl, urlsplit

from training.errors import BadInput

SHAPE = "covey://HOST:PORT/RUN_ID/CERTIFICATE/INVITE"
MEND = "Copy the whole link that `covey coordinator` printed."


@dataclass(frozen=True)
class Link:
    """`host` is a name or an IP address (IPv6 without brackets), `port` the coordinator's gRPC port.

    `certificate` is the fingerprint of its key (coordinator/tls.py), `invite` a code; empty: none.
    """

    host: str
    port: int
    run_id: str
    certificate: str
    invite: str = ""

    @property
    def address(self) -> str:
        """`HOST:PORT` as gRPC and URLs take it."""
        return f"{bracketed(self.host)}:{self.port}"

    def __str__(self) -> str:
        return "/".join(filter(None, (f"covey://{self.address}", self.run_id, self.certificate, self.invite)))


def bracketed(host: str) -> str:
    """`host` as it stands before a port: an IPv6 address goes in brackets."""
    return f"[{host}]" if ":" in host else host


def parse_link(text: str) -> Link:
    """The link in `text`. Raises BadInput that says which part is wrong."""
    text = text.strip()
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:  # a port out of range, or brackets that don't match
        raise _malformed(text, str(error)) from None
    if complaint := _complaint(parts, port):
        raise _malformed(text, complaint)
    run_id, certificate, *invite = parts.path[1:].split("/")
    return Link(parts.hostname or "", port or 0, run_id, certificate, *invite)


def _complaint(parts: SplitResult, port: int | None) -> str | None:
    host, unknown = parts.hostname or "", [key for key, _ in parse_qsl(parts.query, keep_blank_values=True)]
    faults = {
        "it does not start with covey://": parts.scheme != "covey",
        "it has no host": not host,
        "its host has characters that no host has": not re.fullmatch(r"[\w.:-]+", host, re.ASCII),
        "it holds a user name or password": "@" in parts.netloc,
        "it has no port from 1 to 65535": not port,
        "it has no run id of a-z, 0-9, - and _": not re.match(r"/[a-z0-9][a-z0-9_-]{0,63}(/|$)", parts.path),
        "it has no fingerprint of a certificate": not re.match(r"/[^/]*/[A-Za-z0-9_-]{43}(/|$)", parts.path),
        "what stands behind the fingerprint is no invite": not re.fullmatch(
            r"/[^/]*/[^/]*(/[A-Za-z0-9_-]{1,64})?", parts.path),
        f"this version knows no {', '.join(map(repr, unknown)) or 'query'}": bool(parts.query),
        "it goes on after '#'": bool(parts.fragment),
    }
    return next((complaint for complaint, present in faults.items() if present), None)


def _malformed(text: str, complaint: str) -> BadInput:
    shown = text if len(text) <= 120 else f"{text[:120]}..."
    return BadInput(f"link {shown!r} ({complaint})", expected=SHAPE, mend=MEND)
