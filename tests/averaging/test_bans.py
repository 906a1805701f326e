"""The list of bans: only the authority's for this run is taken, the newest stands, and all processes see it soon."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key

import averaging.bans
from averaging.bans import LONGEST, LOOK_SECONDS, BanFile, parse_bans
from averaging.identity import public_bytes, sign
from averaging.membership import bans_words, experiment_words
from proto.authority_pb2 import Bans, SignedBans

RUN = "banned-0123456789ab"
Signed = Callable[..., bytes]


@pytest.fixture(scope="module")
def keys() -> tuple[RSAPrivateKey, RSAPrivateKey]:
    """The authority's, and another's."""
    one, other = (generate_private_key(public_exponent=65537, key_size=2048) for _ in range(2))
    return one, other


def signed_bans(key: RSAPrivateKey, serial: int, *peer_ids: str, run_id: str = RUN, expires: float = 1000.0) -> bytes:
    """A list as the authority signs it."""
    bans = Bans(run_id=run_id, serial=serial, expires=expires, peer_ids=peer_ids).SerializeToString()
    return SignedBans(bans=bans, signature=sign(key, bans_words(bans))).SerializeToString()


@pytest.fixture
def signed(keys: tuple[RSAPrivateKey, RSAPrivateKey]) -> Signed:
    """`signed(serial, *peer_ids)`: by the authority."""
    return lambda *arguments, **named: signed_bans(keys[0], *arguments, **named)


@pytest.fixture
def another(keys: tuple[RSAPrivateKey, RSAPrivateKey], tmp_path: Path) -> Callable[[], BanFile]:
    """One more look at the same file, as another process has it."""
    return lambda: BanFile(tmp_path / "bans", public_bytes(keys[0]), RUN)


def wrong_lists(keys: tuple[RSAPrivateKey, RSAPrivateKey]) -> dict[str, bytes]:
    """All that is not the authority's word on this run."""
    good = SignedBans.FromString(signed_bans(keys[0], 9, "eve"))
    more = Bans.FromString(good.bans)
    more.peer_ids.append("ada")
    return {
        "another's": signed_bans(keys[1], 9, "eve"),
        "another run's": signed_bans(keys[0], 9, "eve", run_id="another"),
        "altered": SignedBans(bans=more.SerializeToString(), signature=good.signature).SerializeToString(),
        "unsigned": SignedBans(bans=good.bans).SerializeToString(),
        "signed as something else": SignedBans(
            bans=good.bans, signature=sign(keys[0], experiment_words(RUN, good.bans))).SerializeToString(),
        "signed garbage": SignedBans(
            bans=b"\xff\xff", signature=sign(keys[0], bans_words(b"\xff\xff"))).SerializeToString(),
        "empty": b"", "garbage": b"\xff" * 100, "text": b"hello",
        "oversize": signed_bans(keys[0], 9, "x" * LONGEST)}


def test_nobody_is_banned_before_there_is_a_list(another: Callable[[], BanFile]) -> None:
    file = another()
    assert not file.is_banned("eve")
    assert (file.newest().signed, file.newest().peer_ids) == (b"", frozenset())


def test_the_authoritys_list_is_kept_as_it_was_signed(signed: Signed, another: Callable[[], BanFile]) -> None:
    file, given = another(), signed(1, "eve", "mallory")
    assert file.offer(given)
    for kept in (file.newest(), another().newest()):
        assert (kept.signed, kept.bans.serial, kept.peer_ids) == (given, 1, frozenset(["eve", "mallory"]))


def test_nothing_else_is_taken_whatever_its_serial(
        keys: tuple[RSAPrivateKey, RSAPrivateKey], signed: Signed, another: Callable[[], BanFile]) -> None:
    file = another()
    assert file.offer(signed(1, "mallory"))
    for what, wrong in wrong_lists(keys).items():
        assert parse_bans(wrong, public_bytes(keys[0]), RUN) is None, what
        assert not file.offer(wrong), what
    assert another().newest().peer_ids == {"mallory"}


@pytest.mark.parametrize("authority", [b"", b"garbage"])
def test_without_an_authority_nobody_can_be_banned(signed: Signed, tmp_path: Path, authority: bytes) -> None:
    file = BanFile(tmp_path / "bans", authority, RUN)
    assert not file.offer(signed(1, "eve"))
    assert not file.is_banned("eve")


def test_a_higher_serial_replaces_a_list_and_no_other_does(signed: Signed, another: Callable[[], BanFile]) -> None:
    file = another()
    assert file.offer(signed(5, "eve"))
    for serial, expires in ((5, 1000.0), (5, 999.0), (4, 9999.0), (0, 9999.0)):
        assert not file.offer(signed(serial, "mallory", expires=expires))
        assert file.newest().peer_ids == {"eve"}
    assert file.offer(signed(6, expires=10.0))  # a ban is lifted by a list without it
    assert another().newest().peer_ids == frozenset()


def test_a_change_by_another_process_is_seen_within_a_second(
        signed: Signed, another: Callable[[], BanFile], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(averaging.bans, "monotonic", lambda: now)
    here, there = another(), another()
    assert not here.is_banned("eve")
    assert there.offer(signed(1, "eve"))
    now += 0.5 * LOOK_SECONDS
    assert not here.is_banned("eve")  # it does not look at the disk at each call
    now += 0.5 * LOOK_SECONDS
    assert here.is_banned("eve")
    assert there.offer(signed(2))
    assert here.newest().peer_ids == frozenset()  # who asks for the newest gets it at once
    assert not here.is_banned("eve")


def test_the_last_good_list_stands_though_its_file_breaks_or_is_gone(
        signed: Signed, another: Callable[[], BanFile], tmp_path: Path) -> None:
    file = another()
    assert file.offer(signed(1, "eve"))
    assert file.newest().peer_ids == {"eve"}
    (tmp_path / "bans").write_bytes(b"\xff broken")
    assert file.newest().peer_ids == {"eve"}
    assert another().newest().peer_ids == frozenset()
    (tmp_path / "bans").unlink()
    assert file.newest().peer_ids == {"eve"}
    assert file.offer(signed(2, "eve", "mallory"))
    assert another().newest().peer_ids == {"eve", "mallory"}


def test_a_list_of_ten_thousand_peers_is_not_too_long(signed: Signed, another: Callable[[], BanFile]) -> None:
    peers = [f"Qm{number:044d}" for number in range(10_000)]
    assert another().offer(signed(1, *peers))
    assert another().is_banned(peers[-1])


def test_of_lists_that_come_at_once_the_newest_stands(signed: Signed, another: Callable[[], BanFile]) -> None:
    lists, file = [signed(serial, f"peer {serial}") for serial in range(1, 41)], another()
    with ThreadPoolExecutor(8) as threads:
        assert True in list(threads.map(file.offer, lists))  # all of them, to the end
    assert another().newest().peer_ids == {"peer 40"}


def test_a_disk_that_can_not_be_written_is_told(signed: Signed, tmp_path: Path,
                                                keys: tuple[RSAPrivateKey, RSAPrivateKey]) -> None:
    with pytest.raises(OSError, match="nowhere"):
        BanFile(tmp_path / "nowhere" / "bans", public_bytes(keys[0]), RUN).offer(signed(1, "eve"))
