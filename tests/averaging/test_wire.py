"""Messages on the wire: what goes in comes out, and nothing else is let in."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import pytest
from hivemind.utils.crypto import RSAPrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from averaging import round as rounds
from averaging.authorisation import OpenSwarm, peer_id_of
from averaging.messages import NOTHING, Layout, Member, Message, RoundId
from averaging.transports.swarm.early import PER_SENDER, SENDERS, Early
from averaging.transports.swarm.wire import LONGEST_MESSAGE, TYPES, Refused, Wire
from proto.round_pb2 import Envelope, SignedStatement, Statement

RUN, ROUND = "wire-test", RoundId("gradients", 7)
KEYS = [RSAPrivateKey(), RSAPrivateKey()]
PEERS = [peer_id_of(key.get_public_key().to_bytes()) for key in KEYS]
GROUP = b"0123456789abcdef"


class Members:
    """Lets in who presents `token`, which it presents itself."""

    def __init__(self, token: bytes = b"member") -> None:
        self.token = token

    def refusal(self, peer_id: str, token: bytes) -> str | None:
        return None if token == b"member" else "no member"


def wire(number: int = 0, token: bytes = b"member") -> Wire:
    return Wire(RUN, KEYS[number], Members(token), most_weight=100.0)


def member(number: int = 0, round: RoundId = ROUND, weight: float = 32.0, **fields: object) -> Member:
    said = {"weight": weight, "mode": "node", "fingerprint": b"f", "layout": Layout(5, state=3)} | fields
    return wire(number).member(round, **said)


MESSAGES = [
    rounds.Join(ROUND, 0, member()), rounds.Call(ROUND, 1, PEERS[1]), rounds.Coming(ROUND, 0, 1.5),
    rounds.Late(ROUND, 1, tuple(PEERS)), rounds.Elsewhere(ROUND, 0, PEERS[1]),
    rounds.Propose(ROUND, 0, GROUP, 3, (member(0), member(1))), rounds.Refuse(ROUND, 0, GROUP, "no"),
    rounds.Complete(ROUND, 1, GROUP, False, (PEERS[1],)), rounds.Decide(ROUND, 0, GROUP, True, (), True),
    rounds.Ask(ROUND, 0, b""), rounds.Tell(ROUND, 0, GROUP, "committed", (PEERS[0],))]


def kinds(base: type[Message]) -> set[type[Message]]:
    """What derives from `base` and has nothing derived from it."""
    below = base.__subclasses__()
    return set().union(*map(kinds, below)) if below else {base}


def test_every_message_is_tried_here() -> None:
    assert {type(message) for message in MESSAGES} == set(TYPES.values()) == kinds(Message)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_comes_out_as_it_went_in(message: Message) -> None:
    assert wire(1).load(PEERS[0], wire(0).dump(message)) == message


def test_a_greeting_says_nothing() -> None:
    assert wire(1).load(PEERS[0], wire(0).dump_greeting()) is None


def test_a_statement_says_who_made_it_and_counts_up_to_the_target() -> None:
    assert member(1).peer_id == PEERS[1]
    assert member(weight=1e9).weight == 100.0
    assert member(mode="auxiliary", layout=NOTHING).weight == 0.0


def spoilt(change: Callable[[SignedStatement], object]) -> Envelope:
    envelope = Envelope.FromString(wire(0).dump(rounds.Join(ROUND, 0, member())))
    change(envelope.join.member)
    return envelope


def resigned(**changes: object) -> Envelope:
    """A join whose statement says other things, properly signed."""
    def change(signed: SignedStatement) -> None:
        statement = Statement.FromString(signed.statement)
        statement.MergeFrom(Statement(**changes))
        signed.statement = statement.SerializeToString()
        signed.signature = KEYS[0].sign(signed.statement)
    return spoilt(change)


@pytest.mark.parametrize(("envelope", "reason"), [
    (spoilt(lambda signed: setattr(signed, "statement", signed.statement + b"\x21" + bytes(8))), "forged statement"),
    (spoilt(lambda signed: setattr(signed, "signature", b"")), "forged statement"),
    (spoilt(lambda signed: setattr(signed, "public_key", b"ssh-rsa AAAA")), "malformed key"),
    (spoilt(lambda signed: setattr(signed, "token", b"")), "no member"),
    (spoilt(lambda signed: signed.CopyFrom(SignedStatement.FromString(member(1).statement))),
     "statement of another peer"),
    (resigned(run_id="another"), "statement for another round"), (resigned(epoch=6), "statement for another round"),
    (resigned(kind="state"), "statement for another round"), (resigned(time=1.0), "statement out of time"),
    (resigned(weight=float("nan")), "malformed weight"), (resigned(weight=-1.0), "malformed weight"),
    (resigned(mode=9), "unknown value"), (resigned(fingerprint=bytes(1000)), "malformed statement"),
    (resigned(tensors=2**60), "malformed statement"), (resigned(mode=Statement.AUXILIARY), "malformed statement")])
def test_a_statement_that_is_not_in_order_is_refused(envelope: Envelope, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        wire(1).load(PEERS[0], envelope.SerializeToString())


def test_a_statement_of_an_old_round_can_not_be_played_again() -> None:
    old = member(round=replace(ROUND, epoch=6))
    with pytest.raises(Refused, match="another round"):
        wire(1).load(PEERS[0], wire(0).dump(rounds.Join(ROUND, 0, old)))


def test_who_is_no_member_says_nothing() -> None:
    for data in (wire(0, b"none").dump(rounds.Call(ROUND, 0, PEERS[0])), wire(0, b"none").dump_greeting()):
        with pytest.raises(Refused, match="no member"):
            wire(1).load(PEERS[0], data)


@pytest.mark.parametrize("data", [bytes(LONGEST_MESSAGE + 1), b"\xff", Envelope(
    token=b"member", kind="k" * 1000, call=Envelope.Call(leader=PEERS[0])).SerializeToString(), Envelope(
    token=b"member", call=Envelope.Call(leader="0OIl")).SerializeToString(), Envelope(
    token=b"member", ask=Envelope.Ask(group_id=b"7")).SerializeToString(), Envelope(
    token=b"member", coming=Envelope.Coming(seconds=float("inf"))).SerializeToString(), Envelope(
    token=b"member", tell=Envelope.Tell(status=99)).SerializeToString()])
def test_a_message_that_is_not_in_order_is_refused(data: bytes) -> None:
    with pytest.raises(Refused):
        wire(1).load(PEERS[0], data)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_comes_is_taken_or_refused(data: st.DataObject) -> None:
    good = bytearray(Wire(RUN, KEYS[0], OpenSwarm(), 100.0).dump(data.draw(st.sampled_from(MESSAGES))))
    for _ in range(data.draw(st.integers(0, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    noise = data.draw(st.sampled_from([bytes(good), bytes(good[:data.draw(st.integers(0, len(good)))])]))
    with suppress(Refused):
        Wire(RUN, KEYS[1], OpenSwarm(), 100.0).load(PEERS[0], noise)


# -- early messages --

def test_an_early_message_is_kept_for_its_round_once() -> None:
    early = Early(seconds=10.0)
    first, again, other = MESSAGES[0], replace(MESSAGES[0], member=member(weight=1.0)), rounds.Join(
        RoundId("gradients", 8), 0, member(round=RoundId("gradients", 8)))
    for time, message in enumerate((first, again, other)):
        early.keep(PEERS[0], message, 100, float(time))
    assert [kept.message for kept in early.take(ROUND, 3.0)] == [again]
    assert early.take(ROUND, 3.0) == []
    assert [kept.message for kept in early.take(other.round, 3.0)] == [other]


def test_early_messages_are_bounded_in_number_length_and_age() -> None:
    early = Early(seconds=10.0)
    for epoch in range(3 * PER_SENDER):
        early.keep("flooder", rounds.Call(RoundId("k", epoch), 0, PEERS[0]), 100, 0.0)
    assert sum(bool(early.take(RoundId("k", epoch), 0.0)) for epoch in range(3 * PER_SENDER)) == PER_SENDER
    for number in range(2 * SENDERS):
        early.keep(f"{number}", MESSAGES[0], 100, 0.0)
    assert len(early.take(ROUND, 0.0)) == SENDERS
    early.keep("long", MESSAGES[0], LONGEST_MESSAGE, 0.0)
    early.keep("old", MESSAGES[0], 100, -11.0)
    assert early.take(ROUND, 0.0) == []
