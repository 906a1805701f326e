"""Who may call whom: a token that the experiment's authority has signed, for DHT and averaging calls alike.

A token says until when the holder of a public key may take part in one run. It is no secret: it is worth something
only to who holds the private key, as libp2p authenticates the peer id that follows from the key (averaging calls), and
as every request in the DHT is signed with it.

Clocks: DHT requests are refused whose clock is more than a minute off (hivemind's bound). A token ends by the clock of
who checks it; its holder looks for a new one `RENEW_SECONDS` earlier, so that clocks may differ by as much.
"""

from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from time import time
from typing import Protocol

from google.protobuf.message import DecodeError
from hivemind.proto.auth_pb2 import AccessToken
from hivemind.utils.auth import TokenAuthorizerBase
from hivemind.utils.crypto import RSAPrivateKey, RSAPublicKey

from averaging.identity import peer_id_of
from training.errors import BadInput

RENEW_SECONDS = 120.0
LONGEST_TOKEN = 4096  # bytes; one of RSA keys of 2048 bits has about 800


class Authoriser(Protocol):
    """What averaging calls present, and whom they let in."""

    @property
    def token(self) -> bytes:
        """To present to other peers."""

    def refusal(self, peer_id: str, token: bytes) -> str | None:
        """Why the peer, whose id libp2p has authenticated, is not let in with this token; None: it is."""


class OpenSwarm:
    """Lets anyone in."""

    token = b""

    def refusal(self, peer_id: str, token: bytes) -> str | None:
        """None."""
        return None


class MemberAuthoriser(TokenAuthorizerBase):  # type: ignore[misc]  # hivemind is untyped
    """Lets in who holds a token of the run; one object for the DHT (`start_dht(authorizer=)`) and for averaging.

    `key` is this peer's identity. `authority` is the authority's public key as RSAPublicKey.to_bytes gives it.
    `read_token` returns this peer's newest token; it is called again, in whichever process needs it, when the last one
    is about to expire, and must neither wait nor raise. Once expired, others refuse this peer. `is_banned` says of a
    peer id whether the authority has banned it, and is asked at each call. To be forked, not pickled. Raises BadInput
    if the first token is not good.
    """

    def __init__(self, key: RSAPrivateKey, *, authority: bytes, run_id: str, read_token: Callable[[], bytes],
                 is_banned: Callable[[str], bool] = lambda _: False) -> None:
        super().__init__(key)
        self._authority, self._run_id, self._read_token = authority, run_id, read_token
        self._is_banned = is_banned
        self._own_token = read_token()
        if refusal := self.refusal(peer_id_of(self.local_public_key.to_bytes()), self._own_token):
            raise BadInput(f"this peer's access token: {refusal}", expected=f"a token of run {run_id} for this peer",
                           mend="Ask the operator for a new one")
        self._expires = _verified(self._own_token, authority, run_id)[1]

    @property
    def token(self) -> bytes:
        """This peer's, renewed if need be."""
        if self._expires - time() < RENEW_SECONDS:
            newest = self._read_token()
            with suppress(ValueError):  # half written, say: the next call looks again
                self._expires = _verified(newest, self._authority, self._run_id)[1]
                self._own_token = newest
        return self._own_token

    def refusal(self, peer_id: str, token: bytes) -> str | None:
        """As Authoriser's; good tokens are remembered, their expiry is looked at each time."""
        try:
            owner, expires = _verified(token, self._authority, self._run_id)
        except ValueError as error:
            return str(error)
        if owner != peer_id:
            return "token of another peer"
        if self._is_banned(peer_id):
            return "banned"
        return "token expired" if expires <= time() else None

    async def refresh_token_if_needed(self) -> None:
        """hivemind's hook before it signs or checks; its own asserts that the token is good, which time changes."""
        self._local_access_token = await self.get_token()

    async def get_token(self) -> AccessToken:
        """This peer's, for hivemind."""
        return AccessToken.FromString(self.token)

    def does_token_need_refreshing(self, access_token: AccessToken) -> bool:
        """Never: `token` sees to it."""
        return False

    def is_token_valid(self, access_token: AccessToken) -> bool:
        """hivemind's question; it then checks that the request is signed by the token's key."""
        try:
            owner, expires = _verified(access_token.SerializeToString(), self._authority, self._run_id)
        except ValueError:
            return False
        return expires > time() and not self._is_banned(owner)


def issue_token(authority: RSAPrivateKey, *, run_id: str, public_key: bytes, name: str, expires: datetime) -> bytes:
    """A token that lets the holder of `public_key` (as RSAPublicKey.to_bytes gives it) into run `run_id`.

    `expires` has a time zone. ValueError if it hasn't, if `name` holds a NUL, or if that is no RSA key.
    """
    peer_id_of(public_key)
    if expires.tzinfo is None or "\0" in name:
        raise ValueError("a token's expiry has a time zone, and its holder's name no NUL")
    token = AccessToken(username=name, public_key=public_key, expiration_time=expires.isoformat())
    token.signature = authority.sign(_signed_part(token, run_id))
    return bytes(token.SerializeToString())


@lru_cache(maxsize=4096)
def _verified(token: bytes, authority: bytes, run_id: str) -> tuple[str, float]:
    """The peer that a token was issued for, and when it expires (Unix time, s). ValueError: why it is no token."""
    if not token:
        raise ValueError("no token")
    if len(token) > LONGEST_TOKEN:
        raise ValueError("oversize token")
    try:
        parsed = AccessToken.FromString(token)
    except DecodeError:
        raise ValueError("malformed token") from None
    if not RSAPublicKey.from_bytes(authority).verify(_signed_part(parsed, run_id), parsed.signature):
        raise ValueError("token forged, or of another run")
    return peer_id_of(parsed.public_key), datetime.fromisoformat(parsed.expiration_time).timestamp()


def _signed_part(token: AccessToken, run_id: str) -> bytes:
    """The key comes last, as the one part that may hold a NUL."""
    parts = (b"covey access token 1", run_id.encode(), token.username.encode(), token.expiration_time.encode(),
             token.public_key)
    return b"\0".join(parts)
