"""The list of bans in a real DHT of members: it spreads, nobody can put another in its place, and a banned peer is out.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count
from pathlib import Path
from threading import Event, Thread

import pytest
from hivemind.dht import DHTNode
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord
from hivemind.p2p import P2P, PeerID
from hivemind.utils import MSGPackSerializer, get_dht_time
from hivemind.utils.crypto import RSAPrivateKey
from processes import until

import averaging.ban_records
from averaging.authorisation import MemberAuthoriser, issue_token
from averaging.ban_records import BanValidator, keep_bans, key_of, look_for_bans, publish_bans
from averaging.bans import BanFile, Kept
from averaging.dht import DHT, open_identity, start_dht
from averaging.identity import peer_id_of
from averaging.membership import bans_words
from averaging.progress import record_validators
from proto.authority_pb2 import Bans, SignedBans
from training.errors import BadInput

RUN = "banned-0123456789ab"
AUTHORITY, STRANGER, EVE = RSAPrivateKey(), RSAPrivateKey(), RSAPrivateKey()
serials, REGULAR = count(1), DHTProtocol.IS_REGULAR_VALUE


def public(key: RSAPrivateKey) -> bytes:
    return bytes(key.get_public_key().to_bytes())


def signed_bans(*peer_ids: str, key: RSAPrivateKey = AUTHORITY, run_id: str = RUN, serial: int | None = None,
                expires: float | None = None) -> bytes:
    """A list newer than all before it, unless told otherwise."""
    number = next(serials) if serial is None else serial
    bans = Bans(run_id=run_id, serial=number, peer_ids=peer_ids,
                expires=get_dht_time() + 1000 + number if expires is None else expires).SerializeToString()
    return bytes(SignedBans(bans=bans, signature=key.sign(bans_words(bans))).SerializeToString())


def expiry(signed: bytes) -> float:
    return Bans.FromString(SignedBans.FromString(signed).bans).expires


def token(key: RSAPrivateKey) -> bytes:
    return issue_token(AUTHORITY, run_id=RUN, public_key=public(key), name="somebody",
                       expires=datetime.now(UTC) + timedelta(hours=1))


@dataclass(frozen=True)
class Node:
    """A member: its place in the DHT, and the list that it keeps."""

    dht: DHT
    file: BanFile

    def store(self, value: object, expires: float, subkey: str | None = None) -> bool:
        """Whether the DHT takes this under the key of the bans."""
        return bool(self.dht.store(key_of(RUN), value=value, expiration_time=expires, subkey=subkey))

    def found(self) -> object:
        """What the DHT has under the key of the bans."""
        found = self.dht.get(key_of(RUN), latest=True)
        return found and found.value

    def look(self) -> Kept:
        """What it keeps after a look at the DHT."""
        look_for_bans(self.dht, RUN, self.file)
        return self.file.newest()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    folder, nodes = tmp_path_factory.mktemp("bans"), list[Node]()
    for number in range(2):
        path: Path = folder / f"{number}.key"
        key, file = open_identity(path), BanFile(folder / f"{number}.bans", public(AUTHORITY), RUN)
        member = MemberAuthoriser(key, authority=public(AUTHORITY), run_id=RUN, is_banned=file.is_banned,
                                  read_token=partial(token, key))
        known = [str(address) for node in nodes for address in node.dht.get_visible_maddrs()]
        nodes.append(Node(start_dht(
            identity_path=path, host_maddrs=["/ip4/127.0.0.1/tcp/0"], initial_peers=known, authorizer=member,
            record_validators=record_validators(RUN, key, public(AUTHORITY))), file))
    yield nodes
    for node in reversed(nodes):
        node.dht.shutdown()


def test_a_list_that_is_published_at_one_node_is_found_at_another(nodes: list[Node]) -> None:
    first, second = nodes
    given = signed_bans("QmEve")
    assert first.file.offer(given)
    publish_bans(first.dht, RUN, first.file)
    until(lambda: second.look().signed == given, "the list has arrived", 20)
    assert second.file.is_banned("QmEve")


def test_what_the_authority_has_not_signed_so_is_taken_by_no_node(nodes: list[Node]) -> None:
    first, second = nodes
    good = signed_bans("QmMallory")
    assert first.file.offer(good)
    assert first.store(good, expiry(good))
    later = expiry(good) + 500
    for what, value in {
            "another's": signed_bans("QmAda", key=STRANGER, expires=later),
            "another run's": signed_bans("QmAda", run_id="another", expires=later),
            "unsigned": SignedBans(bans=SignedBans.FromString(good).bans).SerializeToString(),
            "garbage": b"\xff" * 50, "text": "hello", "a number": 7, "none": None, "a list": [good]}.items():
        assert not first.store(value, later), what
    assert not first.store(good, later)  # the authority's own, to be kept for longer than it says
    assert not first.store(good, expiry(good) - 1)
    assert not first.store(good, later, subkey="a dictionary")
    assert not first.store(good, expiry(good), subkey="a dictionary")
    assert first.found() == second.found() == good


def test_an_older_list_does_not_take_the_place_of_a_newer(nodes: list[Node]) -> None:
    first, second = nodes
    older, newer = signed_bans("QmEve"), signed_bans("QmEve", "QmMallory")
    assert first.store(newer, expiry(newer))
    assert not second.store(older, expiry(older))
    assert first.found() == second.found() == newer
    assert second.look().signed == newer
    assert not second.file.offer(older)


def test_who_has_a_newer_list_than_the_dht_tells_it(nodes: list[Node]) -> None:
    first, second = nodes
    given = signed_bans("QmTrudy")
    assert second.file.offer(given)
    until(lambda: second.look().signed == first.look().signed == given, "the first has it from the second", 20)
    assert first.found() == given


def test_a_thread_keeps_the_list_until_it_is_told_that_it_is_over(
        nodes: list[Node], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averaging.ban_records, "KEEP_SECONDS", 0.05)
    first, second = nodes
    given, over = signed_bans("QmOscar"), Event()
    threads = [Thread(target=keep_bans, args=(node.dht, RUN, node.file, over), daemon=True) for node in nodes]
    for thread in threads:
        thread.start()
    assert first.file.offer(given)
    until(lambda: second.file.is_banned("QmOscar"), "the second has it from the first", 20)
    over.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_a_look_at_a_dht_that_is_gone_is_an_error_that_the_thread_outlives(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Gone:
        def get(self, *_: object, **__: object) -> None:
            raise BrokenPipeError("gone")

    monkeypatch.setattr(averaging.ban_records, "KEEP_SECONDS", 0.01)
    over, file = Event(), BanFile(tmp_path / "bans", public(AUTHORITY), RUN)
    thread = Thread(target=keep_bans, args=(Gone(), RUN, file, over), daemon=True)
    thread.start()
    until(lambda: caplog.text.count("could not be kept: gone") > 1, "it has looked twice", 10)
    over.set()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("value", [b"", b"\xc1", b"\xff" * 20, MSGPackSerializer.dumps(None)])
def test_bytes_that_are_no_value_are_refused_without_a_word(value: bytes) -> None:
    key = DHTID.generate(key_of(RUN)).to_bytes()
    validator = BanValidator(public(AUTHORITY), RUN)
    assert not validator.validate(DHTRecord(key, REGULAR, value, get_dht_time() + 10))
    assert validator.validate(DHTRecord(DHTID.generate("else").to_bytes(), REGULAR, value, get_dht_time() + 10))


def test_without_an_authority_no_list_is_taken_at_all() -> None:
    given = signed_bans("QmEve")
    record = DHTRecord(DHTID.generate(key_of(RUN)).to_bytes(), REGULAR, MSGPackSerializer.dumps(given), expiry(given))
    assert BanValidator(public(AUTHORITY), RUN).validate(record)
    assert not BanValidator(b"", RUN).validate(record)


# -- who is banned --

def test_a_banned_peers_token_is_refused_until_the_ban_is_lifted(tmp_path: Path) -> None:
    file, own, hers = BanFile(tmp_path / "bans", public(AUTHORITY), RUN), token(STRANGER), token(EVE)
    eve = peer_id_of(public(EVE))
    member = MemberAuthoriser(STRANGER, authority=public(AUTHORITY), run_id=RUN, read_token=lambda: own,
                              is_banned=lambda peer: peer in file.newest().peer_ids)
    assert member.refusal(eve, hers) is None
    assert file.offer(signed_bans(eve))
    assert member.refusal(eve, hers) == "banned"
    assert member.refusal(peer_id_of(public(STRANGER)), hers) == "token of another peer"
    assert member.refusal(peer_id_of(public(STRANGER)), own) is None
    assert file.offer(signed_bans())
    assert member.refusal(eve, hers) is None


def test_who_is_banned_itself_is_told_at_its_start() -> None:
    with pytest.raises(BadInput, match="this peer's access token: banned"):
        MemberAuthoriser(EVE, authority=public(AUTHORITY), run_id=RUN, read_token=lambda: token(EVE),
                         is_banned=lambda _: True)


async def asked(address: str) -> set[str]:
    """What a node answers to Eve, who has a good token and heeds no bans."""
    own = token(EVE)
    eve = MemberAuthoriser(EVE, authority=public(AUTHORITY), run_id=RUN, read_token=lambda: own)
    p2p = await P2P.create(initial_peers=[address], host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    try:
        node = await DHTNode.create(p2p=p2p, authorizer=eve, initial_peers=[address], wait_timeout=2.0,
                                    ensure_bootstrap_success=False, bootstrap_timeout=0.5)
        peer, answered = PeerID.from_base58(address.rsplit("/", 1)[1]), set()
        if await node.protocol.call_ping(peer) is not None:
            answered.add("ping")
        if await node.protocol.call_store(peer, [DHTID.generate("gift")], [b"\xa4mine"], get_dht_time() + 60):
            answered.add("store")
        if await node.protocol.call_find(peer, [DHTID.generate(key_of(RUN))]):
            answered.add("find")
        await node.shutdown()
        return answered
    finally:
        await p2p.shutdown()


def test_a_node_answers_a_member_and_no_more_once_it_is_banned(nodes: list[Node]) -> None:
    address, file = str(nodes[0].dht.get_visible_maddrs()[0]), nodes[0].file
    assert file.offer(signed_bans())
    until(lambda: asyncio.run(asked(address)) == {"ping", "store", "find"}, "a member is answered", 20)
    assert file.offer(signed_bans(peer_id_of(public(EVE))))
    until(lambda: not asyncio.run(asked(address)), "it is refused", 20)
    assert file.offer(signed_bans())
    until(lambda: asyncio.run(asked(address)) == {"ping", "store", "find"}, "the ban is lifted", 20)
