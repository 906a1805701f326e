"""The ledger: what is written stays, whoever else writes at the same time, and what is none of ours is left alone."""

import sqlite3
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from coordinator.facts import CoordinatorFact, Facts, by_key
from coordinator.ledger import Ledger
from coordinator.members import Invite
from training.errors import BadInput

NOW = 1_700_000_000.0
VERSION_1 = """
create table invites (code text primary key, label text not null unique, created real not null, expires real,
  uses_left integer, revoked integer not null default 0, used integer not null default 0);
create table members (peer_id text primary key, name text not null unique, public_key blob not null,
  invite text not null, enrolled real not null, renewed real not null);
create table bans (peer_id text primary key, reason text not null, time real not null);
create table lists (serial integer primary key autoincrement, time real not null);
insert into invites values ('c1', 'first', 0.0, null, null, 0, 1), ('c2', 'for two', 1.0, 9.0, 1, 1, 1);
insert into members values ('QmAda', 'ada', x'61', 'for two', 1.0, 5.0), ('QmEve', 'eve', x'65', 'first', 2.0, 2.0),
  ('QmOpen', 'open', x'6f', '', 3.0, 3.0);
insert into bans values ('QmEve', 'spam', 4.0);
insert into lists values (7, 4.0);
pragma user_version = 1;
"""


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """A new one."""
    with closing(Ledger(tmp_path / "ledger.sqlite")) as made:
        yield made


def invite(code: str = "code", label: str = "label", *, uses: int | None = None,
           expires: float | None = None) -> Invite:
    return Invite(code, label, NOW, expires, uses, False, 0)


def test_every_file_of_a_ledger_is_for_its_owner_only(ledger: Ledger, tmp_path: Path) -> None:
    ledger.ban("peer", "why", NOW)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(["ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm"], 0o600)


def test_what_was_written_is_there_again(ledger: Ledger, tmp_path: Path) -> None:
    assert ledger.add_invite(invite("c1", "for ada", uses=3, expires=NOW + 10))
    assert ledger.enrol("QmAda", "ada", b"key", "c1", NOW) == "ada"
    ledger.ban("QmEve", "spam", NOW)
    serial = ledger.next_serial(NOW)
    ledger.close()
    with closing(Ledger(tmp_path / "ledger.sqlite")) as again:
        assert again.invites() == [Invite("c1", "for ada", NOW, NOW + 10, 2, False, 1)]
        [ada] = again.members()
        assert (ada.peer_id, ada.name, ada.public_key, ada.invite, ada.enrolled, ada.renewed, ada.reason) == (
            "QmAda", "ada", b"key", "for ada", NOW, NOW, None)
        assert again.bans() == ["QmEve"]
        assert again.next_serial(NOW) > serial


@pytest.mark.parametrize("content", [b"not a ledger" * 100, b"\0" * 8192])
def test_a_file_that_is_no_ledger_is_bad_input_and_stays_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(content)
    with pytest.raises(BadInput, match="expected a ledger of version 2"):
        Ledger(path)
    assert path.read_bytes() == content


def test_a_ledger_of_another_version_is_bad_input(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with closing(sqlite3.connect(path)) as db:
        db.execute("pragma user_version = 3")
    with pytest.raises(BadInput, match="version 3"):
        Ledger(path)


def test_a_ledger_of_version_1_is_taken_over_whole(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with closing(sqlite3.connect(path)) as db:
        db.executescript(VERSION_1)
    with closing(Ledger(path)) as ledger:
        assert [(invite.code, invite.label, invite.uses_left, invite.used, invite.revoked)
                for invite in ledger.invites()] == [("c1", "first", None, 1, False), ("c2", "for two", 1, 1, True)]
        assert [(member.peer_id, member.name, member.public_key, member.invite, member.enrolled, member.renewed,
                 member.reason) for member in ledger.members()] == [
            ("QmAda", "ada", b"a", "for two", 1.0, 5.0, None), ("QmEve", "eve", b"e", "first", 2.0, 2.0, "spam"),
            ("QmOpen", "open", b"o", "", 3.0, 3.0, None)]
        assert ledger.bans() == ["QmEve"]
        assert ledger.next_serial(NOW) == 8
    with closing(Ledger(path)) as again:
        assert len(again.members()) == 3


def test_what_one_ledger_knows_another_learns_for_good(ledger: Ledger, tmp_path: Path) -> None:
    ledger.add_invite(invite(uses=1))
    ledger.enrol("QmAda", "ada", b"key", "code", NOW)
    ledger.ban("QmEve", "spam", NOW)
    serial = ledger.next_serial(NOW)
    where = Facts(coordinators=by_key([CoordinatorFact("QmC", NOW, "covey://c", "/ip4/1.2.3.4 /ip6/::1")]))
    assert ledger.learn(where)
    with closing(Ledger(tmp_path / "other.sqlite")) as other:
        other.enrol("QmBob", "ada", b"bob", "", NOW + 1)
        assert other.learn(ledger.facts())
        assert not other.learn(ledger.facts())
        assert other.next_serial(NOW) > serial
        with pytest.raises(ValueError, match="can't be used any more"):
            other.enrol("QmEve", "eve", b"", "code", NOW)
    with closing(Ledger(tmp_path / "other.sqlite")) as again:
        assert ledger.learn(again.facts())
        assert ledger.facts() == again.facts()
        assert [(member.peer_id, member.name, member.invite) for member in again.members()] == [
            ("QmAda", "ada", "label"), ("QmBob", "ada-2", "")]
        assert again.facts().coordinators == where.coordinators


def test_a_name_that_two_asked_two_ledgers_for_is_the_firsts_at_their_next_renewal(
        ledger: Ledger, tmp_path: Path) -> None:
    ledger.enrol("QmAda", "ada", b"", "", NOW)
    with closing(Ledger(tmp_path / "other.sqlite")) as other:
        other.enrol("QmBob", "ada", b"", "", NOW + 1)
        ledger.learn(other.facts())
    assert ledger.enrol("QmEve", "ada-2", b"", "", NOW + 2) == "ada-2-2"  # that is Bob's now
    assert ledger.renew("QmBob", "ada", NOW + 3) == "ada-2"
    assert ledger.renew("QmAda", "ada", NOW + 3) == "ada"


def test_an_order_that_follows_another_is_the_last_though_the_clock_went_back(ledger: Ledger, tmp_path: Path) -> None:
    ledger.ban("QmEve", "spam", NOW)
    before = ledger.facts()
    ledger.lift("QmEve", NOW - 1000)
    assert ledger.bans() == []
    assert not ledger.learn(before)
    with closing(Ledger(tmp_path / "other.sqlite")) as other:
        other.learn(before)
        assert other.bans() == ["QmEve"]
        other.learn(ledger.facts())
        assert other.bans() == []


def test_an_invite_is_found_by_its_code_before_its_label(ledger: Ledger) -> None:
    assert ledger.add_invite(invite("one", "two"))
    assert ledger.add_invite(invite("two", "three"))
    found = [ledger.find_invite(it) for it in ("one", "two", "three", "", "four")]
    assert [invite and invite.code for invite in found] == ["one", "two", "two", None, None]


def test_a_label_is_given_once(ledger: Ledger) -> None:
    assert ledger.add_invite(invite("one", "label"))
    assert not ledger.add_invite(invite("two", "label"))
    assert [found.code for found in ledger.invites()] == ["one"]


@pytest.mark.parametrize(("changes", "refusal"), [
    ({}, None), ({"uses": 1}, None), ({"uses": 0}, "used up"), ({"expires": NOW + 1}, None),
    ({"expires": NOW}, "expired"), ({"expires": NOW - 1, "uses": 0}, "expired")])
def test_an_invite_says_why_it_can_not_be_used_and_the_ledger_agrees(
        ledger: Ledger, changes: dict[str, float], refusal: str | None) -> None:
    made = invite(**changes)  # type: ignore[arg-type]
    ledger.add_invite(made)
    assert made.refusal(NOW) == refusal
    if refusal is None:
        assert ledger.enrol("QmAda", "ada", b"", "code", NOW) == "ada"
    else:
        with pytest.raises(ValueError, match="can't be used any more"):
            ledger.enrol("QmAda", "ada", b"", "code", NOW)
        assert ledger.members() == []


def test_a_revoked_invite_makes_no_members_and_keeps_those_it_made(ledger: Ledger) -> None:
    ledger.add_invite(invite())
    ledger.enrol("QmAda", "ada", b"", "code", NOW)
    ledger.revoke_invite("code")
    [found] = ledger.invites()
    assert (found.refusal(NOW), found.used) == ("revoked", 1)
    with pytest.raises(ValueError, match="any more"):
        ledger.enrol("QmBob", "bob", b"", "code", NOW)
    assert [member.name for member in ledger.members()] == ["ada"]


def test_names_are_one_volunteers_each(ledger: Ledger) -> None:
    assert [ledger.enrol(peer, "ada", b"", "", NOW) for peer in ("Qm1", "Qm2", "Qm3")] == ["ada", "ada-2", "ada-3"]
    assert ledger.renew("Qm2", "ada-2", NOW + 1) == "ada-2"
    assert ledger.renew("Qm3", "ada", NOW + 1) == "ada-3"
    assert ledger.renew("Qm1", "grace", NOW + 1) == "grace"
    assert ledger.renew("Qm3", "ada", NOW + 1) == "ada"  # it is free now
    assert [(member.peer_id, member.name) for member in ledger.members()] == [
        ("Qm3", "ada"), ("Qm2", "ada-2"), ("Qm1", "grace")]


def test_a_name_with_a_number_is_not_longer_than_a_name_may_be(ledger: Ledger) -> None:
    names = [ledger.enrol(f"Qm{number}", "x" * 64, b"", "", NOW) for number in range(11)]
    assert (names[1], names[10]) == (f"{'x' * 62}-2", f"{'x' * 61}-11")
    assert len(set(names)) == 11


def test_a_member_is_found_by_its_peer_id_before_its_name(ledger: Ledger) -> None:
    """So nobody is taken for another whose peer id it chose for a name."""
    ledger.enrol("QmEve", "QmAda", b"", "", NOW)
    ledger.enrol("QmAda", "ada", b"", "", NOW)
    found = [ledger.find_member(it) for it in ("QmAda", "ada", "QmEve", "", "nobody")]
    assert [member and member.peer_id for member in found] == ["QmAda", "QmAda", "QmEve", None, None]


def test_a_ban_is_told_of_its_member_until_it_is_lifted(ledger: Ledger) -> None:
    ledger.enrol("QmEve", "eve", b"", "", NOW)
    ledger.ban("QmEve", "spam", NOW)
    ledger.ban("QmEve", "much spam", NOW)
    ledger.ban("QmBob", "", NOW)
    assert [member.reason for member in ledger.members()] == ["much spam"]
    assert ledger.bans() == ["QmBob", "QmEve"]
    ledger.lift("QmEve", NOW)
    ledger.lift("QmEve", NOW)
    assert [member.reason for member in ledger.members()] == [None]
    assert ledger.bans() == ["QmBob"]


def test_of_many_at_once_an_invite_lets_in_as_many_as_it_says(ledger: Ledger) -> None:
    ledger.add_invite(invite(uses=3))

    def enrol(number: int) -> str | None:
        try:
            return ledger.enrol(f"Qm{number}", "ada", b"", "code", NOW)
        except ValueError:
            return None

    with ThreadPoolExecutor(8) as threads:
        given = [name for name in threads.map(enrol, range(24)) if name]
    assert sorted(given) == ["ada", "ada-2", "ada-3"]
    assert [(found.uses_left, found.used) for found in ledger.invites()] == [(0, 3)]


def test_one_volunteer_that_comes_twice_at_once_is_one_member_and_one_use(ledger: Ledger) -> None:
    """Its first answer was lost on the way, say, and it asked again meanwhile."""
    ledger.add_invite(invite(uses=5))
    assert [ledger.enrol("QmAda", "ada", b"key", "code", NOW) for _ in range(2)] == ["ada", "ada"]
    assert [(found.uses_left, found.used) for found in ledger.invites()] == [(4, 1)]


def test_what_fails_half_way_changes_nothing(ledger: Ledger) -> None:
    ledger.add_invite(invite(uses=1))
    with pytest.raises(sqlite3.Error):
        ledger.enrol("QmAda", "ada", None, "code", NOW)  # type: ignore[arg-type]  # the schema wants a key
    assert [found.uses_left for found in ledger.invites()] == [1]
    assert ledger.enrol("QmAda", "ada", b"", "code", NOW) == "ada"


@pytest.mark.parametrize("text", ["'; drop table members; --", "\"", "%", "é\u202e", "a' or '1'='1"])
def test_text_of_a_volunteer_is_text_and_nothing_else(ledger: Ledger, text: str) -> None:
    assert ledger.enrol("QmAda", text, b"", "", NOW) == text
    found = ledger.find_member(text)
    assert found is not None
    assert found.peer_id == "QmAda"
    assert ledger.find_invite(text) is None
