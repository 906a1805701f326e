"""The messages of averaging/round.py on the wire (proto/round.proto), and the signed statements in them.

A statement is what a peer says of its own contribution. Its signature is made with the key that the peer id is the
hash of, so a leader can pass it on but not change it, and every member checks everybody's.
"""

from dataclasses import asdict, fields
from functools import lru_cache
from math import isfinite
from time import time
from typing import Any, Literal

from cryptography.exceptions import UnsupportedAlgorithm
from google.protobuf.message import DecodeError
from hivemind.p2p import PeerID
from hivemind.utils.crypto import RSAPrivateKey, RSAPublicKey

from averaging import messages
from averaging.authorisation import Authoriser
from averaging.compression import CODECS
from averaging.identity import peer_id_of
from averaging.messages import NOTHING, Layout, Member, Message, RoundId
from proto.round_pb2 import Envelope, SignedStatement, Statement

LONGEST_MESSAGE = 1 << 20   # bytes
LONGEST_STATEMENT = 1 << 12  # bytes; verified ones are kept for a while
LONGEST_TEXT = 128          # characters of a kind, a peer id, a reason
LONGEST_FINGERPRINT = 256   # bytes
LONGEST_KEY = 1 << 11       # bytes; one of 2048 bits has about 400
STATEMENT_SECONDS = 300.0   # that a statement's clock may be off, delays included
MOST_VALUES = 1 << 34         # an auxiliary sets apart memory for as many
TYPES: dict[str, type[Message]] = {kind.__name__.lower(): kind for kind in (
    messages.Join, messages.Call, messages.Coming, messages.Late, messages.Elsewhere, messages.Propose,
    messages.Refuse, messages.Complete, messages.Decide, messages.Ask, messages.Tell)}
Mode = Literal["node", "client", "auxiliary"]


class Refused(Exception):
    """What came from elsewhere is not to be used; says why, in words that are few and always the same."""


class Wire:
    """One peer's messages. `most_weight`: what a statement claims beyond that does not count."""

    def __init__(self, run_id: str, key: RSAPrivateKey, authoriser: Authoriser, most_weight: float) -> None:
        self._run_id, self._key, self._authoriser, self._most_weight = run_id, key, authoriser, most_weight

    def member(self, round: RoundId, *, weight: float, mode: Mode, fingerprint: bytes,
               layout: Layout, samples: int = 0) -> Member:
        """This peer, with its signed statement."""
        statement = Statement(
            run_id=self._run_id, kind=round.kind, epoch=round.epoch, weight=weight,
            mode=Statement.Mode.Value(mode.upper()), fingerprint=fingerprint, time=time(), samples=samples,
            **asdict(layout)).SerializeToString()
        return self._member(SignedStatement(
            statement=statement, public_key=self._key.get_public_key().to_bytes(),
            signature=self._key.sign(statement), token=self._authoriser.token), round)

    def dump(self, message: Message) -> bytes:
        """For another averager."""
        name = type(message).__name__
        content = getattr(Envelope, name)(**{
            field.name: _dumped(field.name, getattr(message, field.name)) for field in fields(message)
            if field.name not in ("round", "attempt")})
        return bytes(Envelope(token=self._authoriser.token, kind=message.round.kind, epoch=message.round.epoch,
                              attempt=message.attempt, **{name.lower(): content}).SerializeToString())

    def dump_greeting(self) -> bytes:
        """That `load` makes nothing of."""
        return bytes(Envelope(token=self._authoriser.token).SerializeToString())

    def load(self, sender: str, data: bytes) -> Message | None:
        """What `sender`, whom libp2p has authenticated, says; None: just a greeting. Raises Refused."""
        _require(len(data) <= LONGEST_MESSAGE, "oversize message")
        try:
            envelope = Envelope.FromString(data)
        except DecodeError:
            raise Refused("malformed message") from None
        if refusal := self._authoriser.refusal(sender, envelope.token):
            raise Refused(refusal)
        if (name := envelope.WhichOneof("message")) is None:
            return None
        _require(len(envelope.kind) <= LONGEST_TEXT, "oversize text")
        round = RoundId(envelope.kind, envelope.epoch)
        content = getattr(envelope, name)
        message = TYPES[name](round, envelope.attempt, **{
            field.name: self._loaded(field.name, getattr(content, field.name), round) for field in fields(TYPES[name])
            if field.name not in ("round", "attempt")})
        _require(not isinstance(message, messages.Join) or message.member.peer_id == sender,
                 "statement of another peer")
        return message

    def _loaded(self, name: str, value: Any, round: RoundId) -> Any:
        match name:
            case "member":
                value = self._member(value, round)
            case "members":
                value = tuple(self._member(signed, round) for signed in value)
            case "leader":
                _check_peer(value)
            case "taken" | "blamed" | "excluded":
                value = tuple(value)
                for peer in value:
                    _check_peer(peer)
            case "group_id":
                _require(len(value) in (0, 16), "malformed group id")
            case "seconds":
                _require(isfinite(value) and value >= 0, "malformed time")
            case "reason":
                _require(len(value) <= LONGEST_TEXT, "oversize text")
            case "status":
                value = _name(Envelope.Status, value)
        return value

    def _member(self, signed: SignedStatement, round: RoundId) -> Member:
        peer_id, said = _verified(signed.statement, signed.public_key, signed.signature)
        if refusal := self._authoriser.refusal(peer_id, signed.token):
            raise Refused(refusal)
        _require((said.run_id, said.kind, said.epoch) == (self._run_id, round.kind, round.epoch),
                 "statement for another round")
        _require(abs(said.time - time()) < STATEMENT_SECONDS, "statement out of time")
        _require(isfinite(said.weight) and said.weight >= 0, "malformed weight")
        mode = _name(Statement.Mode, said.mode)
        layout = Layout(said.tensors, said.buffers, said.state, said.compression, said.state_compression)
        _require({layout.compression, layout.state_compression} <= set(CODECS), "unknown codec")
        is_auxiliary = mode == "auxiliary"
        _require(mode != "unknown" and len(said.fingerprint) <= LONGEST_FINGERPRINT and layout.values <= MOST_VALUES
                 and not (is_auxiliary and layout != NOTHING), "malformed statement")
        weight = 0.0 if is_auxiliary else min(said.weight, self._most_weight)
        samples = int(min(said.samples, self._most_weight)) if weight else 0  # of weight 0: not in the mean
        return Member(peer_id, weight, mode, said.fingerprint, layout, signed.SerializeToString(), samples)


@lru_cache(maxsize=1024)
def _verified(statement: bytes, public_key: bytes, signature: bytes) -> tuple[str, Statement]:
    """Whose statement it is, and what it says. Raises Refused."""
    _require(len(statement) <= LONGEST_STATEMENT, "oversize statement")
    _require(len(public_key) <= LONGEST_KEY, "malformed key")
    try:
        peer_id, key = peer_id_of(public_key), RSAPublicKey.from_bytes(public_key)
    except (ValueError, UnsupportedAlgorithm):
        raise Refused("malformed key") from None
    _require(key.verify(statement, signature), "forged statement")
    try:
        return peer_id, Statement.FromString(statement)
    except DecodeError:
        raise Refused("malformed statement") from None


def _dumped(name: str, value: Any) -> Any:
    match name:
        case "member":
            return SignedStatement.FromString(value.statement)
        case "members":
            return [SignedStatement.FromString(member.statement) for member in value]
        case "status":
            return value.upper()
        case "reason":
            return value[:LONGEST_TEXT]
    return value


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise Refused(reason)


def _check_peer(peer_id: str) -> None:
    _require(len(peer_id) <= LONGEST_TEXT, "oversize text")
    try:
        PeerID.from_base58(peer_id)
    except ValueError:
        raise Refused("malformed peer id") from None


def _name(enum: Any, value: int) -> Any:
    try:
        return enum.Name(value).lower()
    except ValueError:
        raise Refused("unknown value") from None
