"""Tokens: who is let in, and strangers of all kinds before the doors of a real DHT."""

import asyncio
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

import hivemind.utils.auth
import pytest
from hivemind.dht import DHTNode
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2P, PeerID
from hivemind.proto import dht_pb2
from hivemind.proto.auth_pb2 import AccessToken
from hivemind.utils import get_dht_time
from hivemind.utils.auth import TokenAuthorizerBase
from hivemind.utils.crypto import RSAPrivateKey

import averaging.authorisation
from averaging.authorisation import (
    LONGEST_TOKEN,
    RENEW_SECONDS,
    Authoriser,
    MemberAuthoriser,
    OpenSwarm,
    issue_token,
    peer_id_of,
)
from averaging.dht import DHT, open_identity, start_dht
from training.errors import BadInput

RUN = "closed-test"
AUTHORITY, OTHER_AUTHORITY = RSAPrivateKey(), RSAPrivateKey()
ADA, BOB = RSAPrivateKey(), RSAPrivateKey()


def public(key: RSAPrivateKey) -> bytes:
    return bytes(key.get_public_key().to_bytes())


def token(key: RSAPrivateKey, *, authority: RSAPrivateKey = AUTHORITY, run_id: str = RUN, hours: float = 1.0,
          name: str = "ada") -> bytes:
    return issue_token(authority, run_id=run_id, public_key=public(key), name=name,
                       expires=datetime.now(UTC) + timedelta(hours=hours))


def member(key: RSAPrivateKey = BOB, read_token: Callable[[], bytes] | None = None) -> MemberAuthoriser:
    own = token(key)
    return MemberAuthoriser(key, authority=public(AUTHORITY), run_id=RUN, read_token=read_token or (lambda: own))


def altered(sent: bytes, **fields: object) -> bytes:
    changed = AccessToken.FromString(sent)
    for name, value in fields.items():
        setattr(changed, name, value)
    return bytes(changed.SerializeToString())


def test_an_open_swarm_takes_anyone() -> None:
    swarm: Authoriser = OpenSwarm()
    assert swarm.token == b""
    assert swarm.refusal("anyone", b"whatever") is None


def test_a_member_is_let_in_by_another() -> None:
    ada, bob = member(ADA), member(BOB)
    assert bob.refusal(peer_id_of(public(ADA)), ada.token) is None
    assert ada.refusal(peer_id_of(public(BOB)), bob.token) is None


@pytest.mark.parametrize(("presented", "reason"), [
    (b"", "no token"),
    (b"\xff\xff\xff", "malformed token"),
    (b"x" * (LONGEST_TOKEN + 1), "oversize token"),
    (token(BOB), "token of another peer"),
    (token(ADA, hours=-0.001), "token expired"),
    (token(ADA, authority=OTHER_AUTHORITY), "token forged, or of another run"),
    (token(ADA, authority=ADA), "token forged, or of another run"),
    (token(ADA, run_id="another-run"), "token forged, or of another run"),
    (altered(token(ADA, hours=-1), expiration_time=datetime(2100, 1, 1, tzinfo=UTC).isoformat()),
     "token forged, or of another run"),
    (altered(token(BOB), public_key=public(ADA)), "token forged, or of another run"),
    (altered(token(ADA), username="operator"), "token forged, or of another run"),
    (altered(token(ADA), signature=b""), "token forged, or of another run"),
    (altered(token(ADA), signature=b"\xff not base64"), "token forged, or of another run"),
    (altered(token(ADA), public_key=b"ssh-dss AAAA"), "token forged, or of another run"),
])
def test_every_other_token_is_refused_with_its_reason(presented: bytes, reason: str) -> None:
    assert member().refusal(peer_id_of(public(ADA)), presented) == reason


def test_fields_cannot_be_shifted_into_each_other() -> None:
    one = issue_token(AUTHORITY, run_id="run", public_key=public(ADA), name="name", expires=datetime.now(UTC))
    with pytest.raises(ValueError, match="NUL"):
        token(ADA, name="run\0name")
    checker = MemberAuthoriser(BOB, authority=public(AUTHORITY), run_id="run\0name", read_token=lambda: token(
        BOB, run_id="run\0name"))
    assert checker.refusal(peer_id_of(public(ADA)), altered(one, username="")) == "token forged, or of another run"


def test_a_token_that_was_good_is_refused_once_it_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    bob, presented, now = member(), token(ADA), get_dht_time()
    assert bob.refusal(peer_id_of(public(ADA)), presented) is None
    monkeypatch.setattr(averaging.authorisation, "time", lambda: now + 3590)
    assert bob.refusal(peer_id_of(public(ADA)), presented) is None
    monkeypatch.setattr(averaging.authorisation, "time", lambda: now + 3601)
    assert bob.refusal(peer_id_of(public(ADA)), presented) == "token expired"
    assert not bob.is_token_valid(AccessToken.FromString(presented))


def test_a_new_token_is_read_before_the_old_one_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, reads, now = token(ADA, hours=1), token(ADA, hours=2), count(), get_dht_time()
    renewed = member(ADA, lambda: [first, b"half writ", second][min(next(reads), 2)])
    assert renewed.token == renewed.token == first
    monkeypatch.setattr(averaging.authorisation, "time", lambda: now + 3600 - RENEW_SECONDS - 5)
    assert renewed.token == first
    monkeypatch.setattr(averaging.authorisation, "time", lambda: now + 3600 - RENEW_SECONDS + 5)
    assert [renewed.token, renewed.token, renewed.token] == [first, second, second]
    assert next(reads) == 3
    assert asyncio.run(renewed.get_token()) == AccessToken.FromString(second)


@pytest.mark.parametrize(("own", "found"), [
    (token(ADA, hours=-1), "token expired"), (token(BOB), "token of another peer"), (b"", "no token"),
    (token(ADA, run_id="x"), "token forged, or of another run")])
def test_a_peer_whose_own_token_is_no_good_is_told_at_its_start(own: bytes, found: str) -> None:
    with pytest.raises(BadInput, match=found):
        member(ADA, lambda: own)


def test_only_good_tokens_can_be_issued() -> None:
    with pytest.raises(ValueError, match="time zone"):
        issue_token(AUTHORITY, run_id=RUN, public_key=public(ADA), name="ada", expires=datetime(2100, 1, 1))
    for wrong in (b"", b"ssh-rsa AAAA", b"x" * 10**6, b"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabg"
                  b"H5C9okWi0dh2l9GKJl"):
        with pytest.raises(ValueError):  # noqa: PT011
            issue_token(AUTHORITY, run_id=RUN, public_key=wrong, name="ada", expires=datetime.now(UTC))


async def signed_ping(sender: MemberAuthoriser) -> dht_pb2.PingRequest:
    request = dht_pb2.PingRequest(validate=True)
    await sender.sign_request(request, None)
    return request


def copy_of(request: dht_pb2.PingRequest) -> dht_pb2.PingRequest:
    return dht_pb2.PingRequest.FromString(request.SerializeToString())


def test_a_request_is_taken_once_and_unaltered_only() -> None:
    async def requests() -> None:
        ada, bob = member(ADA), member(BOB)
        request = await signed_ping(ada)
        wrong = copy_of(request)
        wrong.validate = False
        assert not await bob.validate_request(wrong)
        assert await bob.validate_request(copy_of(request))
        assert not await bob.validate_request(copy_of(request))  # a replay
        stolen = await signed_ping(ada)
        stolen.auth.client_access_token.CopyFrom(await bob.get_token())
        assert not await bob.validate_request(stolen)
    asyncio.run(requests())


@pytest.mark.parametrize(("seconds_off", "is_taken"), [(55, True), (-55, True), (65, False), (-65, False)])
def test_clocks_may_be_a_minute_apart(monkeypatch: pytest.MonkeyPatch, seconds_off: float, is_taken: bool) -> None:
    request = asyncio.run(signed_ping(member(ADA)))
    now = get_dht_time()
    monkeypatch.setattr(hivemind.utils.auth, "get_dht_time", lambda: now + seconds_off)
    assert asyncio.run(member(BOB).validate_request(request)) is is_taken


class Pretender(TokenAuthorizerBase):  # type: ignore[misc]
    """Presents a token, whosever it is, and trusts everyone."""

    def __init__(self, key: RSAPrivateKey, presented: bytes) -> None:
        super().__init__(key)
        self.presented = AccessToken.FromString(presented)

    async def get_token(self) -> AccessToken:
        return self.presented

    def is_token_valid(self, access_token: AccessToken) -> bool:
        return True

    def does_token_need_refreshing(self, access_token: AccessToken) -> bool:
        return False

    async def validate_response(self, response: object, request: object) -> bool:
        return True


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[DHT]]:
    folder, dhts = tmp_path_factory.mktemp("keys"), list[DHT]()
    for number in range(2):
        path: Path = folder / f"{number}.key"
        key = open_identity(path)
        dhts.append(start_dht(
            identity_path=path, host_maddrs=["/ip4/127.0.0.1/tcp/0"], authorizer=member(key),
            record_validators=[RSASignatureValidator(key)],
            initial_peers=[str(maddr) for dht in dhts for maddr in dht.get_visible_maddrs()]))
        assert peer_id_of(public(key)) == str(dhts[-1].peer_id)
    yield dhts
    for dht in dhts:
        dht.shutdown()


async def intrude(addresses: list[str], authorizer: TokenAuthorizerBase | None,
                  loot: str) -> tuple[list[str], bool]:
    """Try everything that a DHT node can ask of another: what was answered, and whether `secret` was among it."""
    p2p = await P2P.create(initial_peers=addresses, host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    try:
        node = await DHTNode.create(p2p=p2p, authorizer=authorizer, initial_peers=addresses, wait_timeout=2.0,
                                    ensure_bootstrap_success=False, bootstrap_timeout=0.5)
        answered = []
        for address in addresses:
            peer = PeerID.from_base58(address.rsplit("/", 1)[1])
            if await node.protocol.call_ping(peer) is not None:
                answered.append("ping")
            if await node.protocol.call_store(peer, [DHTID.generate(loot)], [b"\xa4mine"], get_dht_time() + 600):
                answered.append("store")
            if await node.protocol.call_find(peer, [DHTID.generate("secret")]):
                answered.append("find")
        stored = await node.get("secret", latest=True)
        await node.shutdown()
        return sorted(set(answered)), stored is not None
    finally:
        await p2p.shutdown()


def known_peers(dht: DHT) -> set[str]:
    return set(dht.run_coroutine(_routing_table))


async def _routing_table(dht: object, node: DHTNode) -> list[str]:
    return [str(peer) for peer in node.protocol.routing_table.uid_to_peer_id.values()]


def test_members_read_what_members_store(members: list[DHT]) -> None:
    first, second = members
    assert first.store("from the first", b"hello", get_dht_time() + 60)
    assert second.get("from the first", latest=True).value == b"hello"
    assert second.store("from the second", b"hello back", get_dht_time() + 60)
    assert first.get("from the second", latest=True).value == b"hello back"


@pytest.mark.parametrize("authorizer", [
    None, Pretender(BOB, b""), Pretender(BOB, token(ADA)), Pretender(BOB, token(BOB, hours=-0.1)),
    Pretender(BOB, token(BOB, run_id="another-run")), Pretender(BOB, token(BOB, authority=OTHER_AUTHORITY))],
    ids=["unsigned", "no token", "another's", "expired", "wrong run", "forged"])
def test_a_stranger_can_neither_read_nor_store(members: list[DHT], authorizer: Pretender | None) -> None:
    assert members[0].store("secret", b"for members", get_dht_time() + 60)
    addresses = [str(maddr) for dht in members for maddr in dht.get_visible_maddrs()]
    known = known_peers(members[0])
    assert asyncio.run(intrude(addresses, authorizer, "loot")) == ([], False)
    assert [dht.get("loot", latest=True) for dht in members] == [None, None]
    assert known_peers(members[0]) == known


def test_with_a_good_token_the_same_attempts_succeed(members: list[DHT]) -> None:
    assert members[0].store("secret", b"for members", get_dht_time() + 60)
    addresses = [str(maddr) for dht in members for maddr in dht.get_visible_maddrs()]
    answered, has_read = asyncio.run(intrude(addresses, Pretender(BOB, token(BOB)), "gift"))
    assert (answered, has_read) == (["find", "ping", "store"], True)
    assert members[1].get("gift", latest=True).value == "mine"


def test_a_stranger_does_not_join(members: list[DHT], tmp_path: Path) -> None:
    addresses = [str(maddr) for maddr in members[0].get_visible_maddrs()]
    with pytest.raises(RuntimeError, match="none of the initial_peers responded"):
        start_dht(identity_path=tmp_path / "stranger.key", host_maddrs=["/ip4/127.0.0.1/tcp/0"],
                  initial_peers=addresses)
