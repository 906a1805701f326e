"""The authority: who is let in and by what, what it signs, and that it forgets nothing when it starts again."""

import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hivemind.proto.auth_pb2 import AccessToken
from hivemind.utils.crypto import RSAPrivateKey

import averaging.authorisation
from averaging.authorisation import MemberAuthoriser
from averaging.bans import BanFile, parse_bans
from averaging.identity import is_signed, peer_id_of
from averaging.membership import bans_words, enrolment_words, experiment_words
from coordinator.authority import (
    BANS_SECONDS,
    CLOCK_SECONDS,
    DAY_SECONDS,
    FIRST_INVITE,
    TOKEN_SECONDS,
    Authority,
    Denied,
)
from proto.authority_pb2 import SignedBans
from proto.coordinator_pb2 import EnrolRequest
from training.errors import BadInput

RUN = "closed-0123456789ab"
Ask = Callable[..., EnrolRequest]


class Clock:
    """Unix seconds, as a test says."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def keys() -> list[RSAPrivateKey]:
    """Volunteers'."""
    return [RSAPrivateKey() for _ in range(4)]


@pytest.fixture(scope="module")
def authority_key(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file, as making one takes time."""
    folder = tmp_path_factory.mktemp("authority")
    with closing(Authority(folder, RUN, is_open=False)):
        return (folder / "authority.key").read_bytes()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def start(tmp_path: Path, clock: Clock, authority_key: bytes) -> Iterator[Callable[..., Authority]]:
    """`start()`: an authority in the test's folder, the same again each time, one after the other."""
    (tmp_path / "authority.key").write_bytes(authority_key)
    started: list[Authority] = []

    def run(*, is_open: bool = False) -> Authority:
        for before in started:
            before.close()
        started.append(Authority(tmp_path, RUN, is_open=is_open, clock=clock))
        return started[-1]
    yield run
    for one in started:
        one.close()


@pytest.fixture
def authority(start: Callable[..., Authority]) -> Authority:
    return start()


@pytest.fixture
def ask(keys: list[RSAPrivateKey], clock: Clock) -> Ask:
    """`ask(0, "ada", invite="...")`: a good request of the volunteer with key 0; `signer` is another who signs it."""
    def request(volunteer: int, name: str = "ada", *, signer: int | None = None, **fields: Any) -> EnrolRequest:
        given = {"run_id": RUN, "version": "0.1.0", "time": clock.now, "public_key": public(keys[volunteer]), **fields}
        made = EnrolRequest(name=name, **given)
        made.signature = keys[volunteer if signer is None else signer].sign(enrolment_words(made))
        return made
    return request


def public(key: RSAPrivateKey) -> bytes:
    return bytes(key.get_public_key().to_bytes())


def first(authority: Authority) -> str:
    """The code of the invite that is there from the start."""
    assert authority.invite_to_show is not None
    return authority.invite_to_show


def denied(authority: Authority, request: EnrolRequest) -> Denied:
    with pytest.raises(Denied) as refused:
        authority.enrol(request)
    assert "; expected " in str(refused.value)
    assert "\n" not in str(refused.value)
    return refused.value


# -- a start --

def test_a_first_start_makes_a_key_a_ledger_and_an_invite_for_the_owner_only(tmp_path: Path) -> None:
    with closing(Authority(tmp_path, RUN, is_open=False)) as made:
        secret = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir() if path.name != "bans"}
        assert set(secret.values()) == {0o600}
        assert {"authority.key", "ledger.sqlite"} <= secret.keys()
        [invite] = made.ledger.invites()
        assert (invite.label, invite.uses_left, invite.expires, invite.code) == (FIRST_INVITE, None, None, first(made))
        assert len(invite.code) >= 22  # 128 bits


def test_a_second_start_keeps_key_invites_members_and_bans(start: Callable[..., Authority], ask: Ask) -> None:
    one = start()
    one.create_invite("one use", uses=1)
    one.revoke_invite("one use")
    for number, name in enumerate(("ada", "eve")):
        one.enrol(ask(number, name, invite=first(one)))
    one.ban("eve", "spam")
    before = (one.public_key, one.ledger.invites(), one.ledger.members(), one.ban_file.newest().signed)
    other = start()
    assert (other.public_key, other.ledger.invites(), other.ledger.members(), other.ban_file.newest().signed) == before
    assert other.enrol(ask(0)).name == "ada"
    assert denied(other, ask(1)).reason == "banned"


def test_a_ban_that_was_written_down_but_not_signed_is_signed_at_the_next_start(
        start: Callable[..., Authority], ask: Ask) -> None:
    """The power failed between the two."""
    one = start()
    one.enrol(ask(0, invite=first(one)))
    [member] = one.ledger.members()
    one.ledger.ban(member.peer_id, "", 0.0)
    assert one.ban_file.newest().peer_ids == frozenset()
    assert start().ban_file.newest().peer_ids == {member.peer_id}


def test_files_that_are_none_of_ours_stop_the_start(tmp_path: Path, authority_key: bytes) -> None:
    (tmp_path / "authority.key").write_bytes(b"garbage")
    with pytest.raises(BadInput, match=r"authority\.key"):
        Authority(tmp_path, RUN, is_open=False)
    (tmp_path / "authority.key").write_bytes(authority_key)
    (tmp_path / "ledger.sqlite").write_bytes(b"garbage" * 1000)
    with pytest.raises(BadInput, match=r"ledger\.sqlite"):
        Authority(tmp_path, RUN, is_open=False)


# -- letting in --

def test_a_volunteer_gets_a_token_that_members_take_until_it_expires(
        authority: Authority, ask: Ask, keys: list[RSAPrivateKey], clock: Clock,
        monkeypatch: pytest.MonkeyPatch) -> None:
    ada, bob = (authority.enrol(ask(number, name, invite=first(authority)))
                for number, name in enumerate(("ada", "bob")))
    assert (ada.name, ada.expires) == ("ada", clock.now + TOKEN_SECONDS)
    monkeypatch.setattr(averaging.authorisation, "time", clock)
    member = MemberAuthoriser(keys[1], authority=authority.public_key, run_id=RUN, read_token=lambda: bob.token)
    peer_id = peer_id_of(public(keys[0]))
    assert member.refusal(peer_id, ada.token) is None
    assert member.refusal(peer_id_of(public(keys[2])), ada.token) == "token of another peer"
    clock.now = ada.expires
    assert member.refusal(peer_id, ada.token) == "token expired"


def test_the_ledger_knows_who_came_by_which_invite_and_when(authority: Authority, ask: Ask, clock: Clock,
                                                            keys: list[RSAPrivateKey]) -> None:
    code = authority.create_invite("for friends", uses=2).code
    authority.enrol(ask(0, invite=code))
    clock.now += 10
    authority.enrol(ask(0, invite=code))
    [ada] = authority.ledger.members()
    assert (ada.peer_id, ada.public_key, ada.invite, ada.renewed - ada.enrolled) == (
        peer_id_of(public(keys[0])), public(keys[0]), "for friends", 10.0)
    found = authority.ledger.find_invite(code)
    assert found is not None
    assert (found.uses_left, found.used) == (1, 1)  # who comes again does not use it up


def test_a_member_comes_again_without_an_invite_and_though_its_own_is_revoked(authority: Authority, ask: Ask) -> None:
    authority.enrol(ask(0, invite=first(authority)))
    authority.revoke_invite(FIRST_INVITE)
    assert authority.enrol(ask(0)).name == "ada"
    assert denied(authority, ask(1)).reason == "invite"


@pytest.mark.parametrize(("fields", "reason", "text"), [
    ({"signature": b""}, "signature", "has not signed"),
    ({"signature": b"\xff" * 300}, "signature", "has not signed"),
    ({"name": "eve"}, "signature", "has not signed"),
    ({"invite": "another"}, "signature", "has not signed"),
    ({"public_key": b""}, "key", "a public key that is none"),
    ({"public_key": b"ssh-rsa AAAA"}, "key", "expected an RSA key"),
    ({"public_key": b"x" * 50_000}, "key", "expected an RSA key"),
    ({"time": 0.0}, "clock", "s slow; expected at most 60 s"),
    ({"time": 1e300}, "clock", "s fast"),
    ({"time": float("nan")}, "clock", "expected at most 60 s"),
    ({"time": float("inf")}, "clock", "expected at most 60 s"),
])
def test_what_its_key_did_not_sign_just_now_lets_nobody_in(
        authority: Authority, ask: Ask, fields: dict[str, Any], reason: str, text: str) -> None:
    request = ask(0, invite=first(authority))
    for field, value in fields.items():
        setattr(request, field, value)
    refused = denied(authority, request)
    assert refused.reason == reason
    assert text in str(refused)
    assert len(str(refused)) < 600
    assert authority.failures == {reason: 1}
    assert authority.ledger.members() == []


def test_nobody_enrols_with_the_key_of_another(authority: Authority, ask: Ask) -> None:
    assert denied(authority, ask(0, signer=1, invite=first(authority))).reason == "signature"


@pytest.mark.parametrize(("off", "is_let_in"), [
    (CLOCK_SECONDS, True), (-CLOCK_SECONDS, True), (CLOCK_SECONDS + 1, False), (-CLOCK_SECONDS - 1, False)])
def test_clocks_may_be_a_minute_apart(authority: Authority, ask: Ask, clock: Clock, off: float,
                                      is_let_in: bool) -> None:
    request = ask(0, invite=first(authority), time=clock.now + off)
    if is_let_in:
        assert authority.enrol(request).name == "ada"
    else:
        assert f"61 s {'fast' if off > 0 else 'slow'}" in str(denied(authority, request))


def test_an_invite_that_is_unknown_expired_revoked_or_used_up_lets_nobody_new_in(
        authority: Authority, ask: Ask, clock: Clock) -> None:
    expired = authority.create_invite("expired", expires=clock.now + 1).code
    revoked, used = (authority.create_invite(label, uses=1).code for label in ("revoked", "used"))
    authority.revoke_invite("revoked")
    authority.enrol(ask(0, invite=used))
    clock.now += 1
    cases = {"": "no invite", "unknown": "an unknown invite", "first": "an unknown invite",  # a label is no code
             expired: "an invite that is expired", revoked: "an invite that is revoked",
             used: "an invite that is used up"}
    for code, text in cases.items():
        refused = denied(authority, ask(1, invite=code))
        assert refused.reason == "invite"
        assert str(refused).startswith(text)
    assert authority.failures == {"invite": len(cases)}
    assert [member.name for member in authority.ledger.members()] == ["ada"]


def test_an_open_swarm_takes_anyone_whatever_it_brings_except_who_is_banned(
        start: Callable[..., Authority], ask: Ask) -> None:
    authority = start(is_open=True)
    assert authority.enrol(ask(0)).name == "ada"
    assert authority.enrol(ask(1, "bob", invite="unknown")).name == "bob"
    assert [member.invite for member in authority.ledger.members()] == ["", ""]
    authority.ban("bob", "")
    assert denied(authority, ask(1, "bob")).reason == "banned"
    assert denied(authority, ask(2, signer=1)).reason == "signature"


def test_an_open_swarm_that_is_closed_keeps_who_is_there(start: Callable[..., Authority], ask: Ask) -> None:
    start(is_open=True).enrol(ask(0))
    closed = start()
    assert closed.enrol(ask(0)).name == "ada"
    assert denied(closed, ask(1)).reason == "invite"


def test_a_name_is_bound_to_the_key_that_had_it_first(authority: Authority, ask: Ask) -> None:
    code = first(authority)
    assert [authority.enrol(ask(number, "ada", invite=code)).name for number in range(3)] == ["ada", "ada-2", "ada-3"]
    assert authority.enrol(ask(1, "ada")).name == "ada-2"
    assert authority.enrol(ask(1, "ada-2")).name == "ada-2"
    assert authority.enrol(ask(0, "ada")).name == "ada"
    assert authority.enrol(ask(0, "grace")).name == "grace"
    assert authority.enrol(ask(1, "ada")).name == "ada"


def test_the_name_in_the_token_is_the_one_that_was_given(authority: Authority, ask: Ask) -> None:
    grants = [authority.enrol(ask(number, "ada", invite=first(authority))) for number in range(2)]
    assert [AccessToken.FromString(grant.token).username for grant in grants] == ["ada", "ada-2"]


def test_of_two_that_race_for_the_last_use_of_an_invite_exactly_one_gets_in(
        start: Callable[..., Authority], ask: Ask) -> None:
    authority = start()
    for turn in range(5):
        code = authority.create_invite(f"last {turn}", uses=1).code
        requests = [ask(number, f"volunteer {number}", invite=code) for number in range(4)]

        def enrol(request: EnrolRequest) -> str:
            try:
                return authority.enrol(request).name
            except Denied as error:
                return error.reason
        with ThreadPoolExecutor(4) as threads:
            answers = sorted(threads.map(enrol, requests))
        new = 1 if turn < 4 else 0  # the members of earlier turns need no invite
        assert len([answer for answer in answers if answer != "invite"]) == turn + new
        assert len(authority.ledger.members()) == turn + new


def test_one_volunteer_that_asks_several_times_at_once_is_let_in_each_time(authority: Authority, ask: Ask) -> None:
    requests = [ask(0, invite=first(authority)) for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        assert {grant.name for grant in threads.map(authority.enrol, requests)} == {"ada"}
    assert [invite.used for invite in authority.ledger.invites()] == [1]


# -- what it signs --

def test_the_experiment_is_signed_for_this_run(authority: Authority) -> None:
    signature = authority.sign_experiment(b'{"a":1}')
    assert is_signed(authority.public_key, experiment_words(RUN, b'{"a":1}'), signature)
    assert not is_signed(authority.public_key, experiment_words("another", b'{"a":1}'), signature)
    assert not is_signed(authority.public_key, experiment_words(RUN, b'{"a":2}'), signature)


def test_a_ban_is_signed_at_once_and_lifted_by_the_next_list(authority: Authority, ask: Ask, clock: Clock,
                                                             tmp_path: Path) -> None:
    authority.enrol(ask(0, "eve", invite=first(authority)))
    assert authority.ban_file.newest().signed == b""  # nobody was ever banned
    banned = authority.ban("eve", "spam")
    assert (banned.name, banned.reason) == ("eve", "spam")
    refused = denied(authority, ask(0, "eve"))
    assert refused.reason == "banned"
    assert "this volunteer is banned (spam)" in str(refused)
    signed = SignedBans.FromString(authority.ban_file.newest().signed)
    assert is_signed(authority.public_key, bans_words(signed.bans), signed.signature)
    bans = parse_bans(authority.ban_file.newest().signed, authority.public_key, RUN)
    assert bans is not None
    assert (list(bans.peer_ids), bans.expires) == ([banned.peer_id], clock.now + BANS_SECONDS)
    assert BanFile(tmp_path / "bans", authority.public_key, RUN).is_banned(banned.peer_id)
    lifted = authority.ban(banned.peer_id, "", lift=True)
    assert lifted.reason is None
    assert authority.ban_file.newest().bans.serial > bans.serial
    assert authority.enrol(ask(0, "eve")).name == "eve"


def test_a_name_that_is_anothers_peer_id_bans_nobody_else(authority: Authority, ask: Ask,
                                                          keys: list[RSAPrivateKey]) -> None:
    victim = peer_id_of(public(keys[0]))
    authority.enrol(ask(1, victim, invite=first(authority)))  # before the victim comes
    assert authority.enrol(ask(0, "ada", invite=first(authority))).name == "ada"
    assert authority.ban(victim, "").peer_id == victim
    assert authority.enrol(ask(1, victim)).name == victim


@pytest.mark.parametrize("lift", [False, True])
def test_nobody_unknown_can_be_banned(authority: Authority, lift: bool) -> None:
    with pytest.raises(BadInput, match="expected the name or peer id of a member") as refused:
        authority.ban("x" * 1000, "", lift=lift)
    assert len(str(refused.value)) < 200
    assert authority.ban_file.newest().signed == b""


def test_bans_that_come_at_once_are_all_in_the_list(authority: Authority, ask: Ask) -> None:
    for number in range(4):
        authority.enrol(ask(number, f"eve {number}", invite=first(authority)))
    with ThreadPoolExecutor(4) as threads:
        banned = {member.peer_id for member in threads.map(
            lambda number: authority.ban(f"eve {number}", ""), range(4))}
    assert authority.ban_file.newest().peer_ids == banned
    assert len(banned) == 4


def test_the_list_is_signed_anew_a_day_later_so_that_the_dht_never_forgets_it(
        authority: Authority, ask: Ask, clock: Clock) -> None:
    authority.tend_bans()
    assert authority.ban_file.newest().signed == b""  # there is none to keep
    authority.enrol(ask(0, "eve", invite=first(authority)))
    authority.ban("eve", "")
    before = authority.ban_file.newest()
    clock.now += DAY_SECONDS
    authority.tend_bans()
    assert authority.ban_file.newest().signed == before.signed
    clock.now += 1
    authority.tend_bans()
    fresh = authority.ban_file.newest()
    assert fresh.bans.serial > before.bans.serial
    assert (fresh.peer_ids, fresh.bans.expires) == (before.peer_ids, clock.now + BANS_SECONDS)


# -- a second authority with the same key --

@pytest.fixture
def second(tmp_path: Path, clock: Clock, authority_key: bytes) -> Iterator[Authority]:
    folder = tmp_path / "second"
    folder.mkdir()
    (folder / "authority.key").write_bytes(authority_key)
    with closing(Authority(folder, RUN, is_open=False, clock=clock)) as made:
        yield made


def hear(listener: Authority, speaker: Authority) -> None:
    """Its list of bans, and nothing else, by way of the DHT."""
    listener.ban_file.offer(speaker.ban_file.newest().signed)
    listener.tend_bans()


def test_bans_that_two_order_while_apart_are_all_in_the_list_that_both_sign_at_last(
        authority: Authority, second: Authority, ask: Ask, clock: Clock) -> None:
    for number, name in enumerate(("eve", "mallory")):
        authority.enrol(ask(number, name, invite=first(authority)))
    second.ledger.learn(authority.ledger.facts())
    banned = {authority.ban("eve", "spam").peer_id}
    clock.now += 1
    banned.add(second.ban("mallory", "noise").peer_id)
    serials = {one.ban_file.newest().bans.serial for one in (authority, second)}
    assert len(serials) == 1  # so either list alone would keep the other from being heard
    for listener, speaker in ((second, authority), (authority, second), (second, authority), (authority, second)):
        hear(listener, speaker)
    assert authority.ban_file.newest().signed == second.ban_file.newest().signed
    assert authority.ban_file.newest().peer_ids == banned
    assert authority.ban_file.newest().bans.serial > max(serials)
    assert denied(authority, ask(1, "mallory")).reason == "banned"
    reasons = [member.reason for member in second.ledger.members()]
    assert reasons == ["", "noise"]  # a reason is not for all to read: it comes with the ledger
    second.ledger.learn(authority.ledger.facts())
    assert [member.reason for member in second.ledger.members()] == ["spam", "noise"]
    assert not second.tend_bans()


def test_a_ban_that_one_lifts_is_not_brought_back_by_the_other(
        authority: Authority, second: Authority, ask: Ask) -> None:
    authority.enrol(ask(0, "eve", invite=first(authority)))
    second.ledger.learn(authority.ledger.facts())
    authority.ban("eve", "spam")
    hear(second, authority)
    second.ban("eve", "", lift=True)
    hear(authority, second)
    assert authority.ledger.bans() == []
    assert authority.ban_file.newest().signed == second.ban_file.newest().signed
    assert authority.enrol(ask(0, "eve")).name == "eve"
    authority.ban("eve", "again")
    hear(second, authority)
    assert second.ban_file.newest().peer_ids == set(authority.ledger.bans()) != set()


def test_a_ledger_brought_back_from_an_old_copy_hears_of_its_bans_from_the_list(
        start: Callable[..., Authority], ask: Ask, tmp_path: Path) -> None:
    authority = start()
    authority.enrol(ask(0, "eve", invite=first(authority)))
    authority.close()
    copy = (tmp_path / "ledger.sqlite").read_bytes()
    banned = start()
    peer_id = banned.ban("eve", "spam").peer_id
    serial = banned.ban_file.newest().bans.serial
    banned.close()
    (tmp_path / "ledger.sqlite").write_bytes(copy)
    again = start()
    assert again.ledger.bans() == [peer_id]
    again.ban("eve", "", lift=True)
    assert again.ban_file.newest().bans.serial > serial


# -- invites --

@pytest.mark.parametrize(("label", "options"), [
    ("", {}), ("x" * 65, {}), ("two\nlines", {}), ("\x1b[2J", {}), ("a", {"uses": 0}), ("a", {"expires": 0.0}),
    ("a", {"expires": 1_700_000_000.0}), ("a", {"expires": float("nan")}), (FIRST_INVITE, {})])
def test_an_invite_that_would_be_of_no_use_is_bad_input(authority: Authority, label: str,
                                                        options: dict[str, Any]) -> None:
    with pytest.raises(BadInput) as refused:
        authority.create_invite(label, **options)
    assert "\n" not in str(refused.value)
    assert "\x1b" not in str(refused.value)
    assert len(authority.ledger.invites()) == 1


def test_an_invite_is_revoked_by_its_code_or_its_label_and_stays_in_the_books(authority: Authority) -> None:
    made = [authority.create_invite(label) for label in ("a", "b")]
    assert authority.revoke_invite("a").revoked
    assert authority.revoke_invite(made[1].code).revoked
    assert authority.revoke_invite("a").revoked  # again
    assert {invite.label: invite.revoked for invite in authority.ledger.invites()} == {
        FIRST_INVITE: False, "a": True, "b": True}
    with pytest.raises(BadInput, match="expected the code or label of an invite"):
        authority.revoke_invite("unknown")


def test_the_link_shows_an_invite_that_is_good_for_any_number(authority: Authority, clock: Clock) -> None:
    clock.now += 1
    authority.create_invite("one use", uses=1)
    assert authority.invite_to_show == authority.ledger.invites()[0].code
    authority.revoke_invite(FIRST_INVITE)
    assert authority.invite_to_show is None
    clock.now += 1
    made = authority.create_invite("for all", expires=clock.now + 5)
    assert authority.invite_to_show == made.code
    clock.now += 5
    assert authority.invite_to_show is None
