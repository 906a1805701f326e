"""Who may take part: invites, members and bans, in an SQLite file of the coordinator's state directory."""

import sqlite3
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from coordinator.database import Database
from coordinator.facts import (
    TICK,
    BanFact,
    CoordinatorFact,
    Facts,
    InviteFact,
    MemberFact,
    UseFact,
    by_key,
    merge,
)
from coordinator.members import Invite, Member, free, invites_of, members_of, told_apart

TABLES = {"invites": InviteFact, "members": MemberFact, "uses": UseFact, "bans": BanFact,
          "coordinators": CoordinatorFact}  # as Facts has them; each table has its fact's fields, in order
SCHEMA = """
create table invites (code text primary key, label text not null, created real not null, expires real, uses integer,
  revoked integer not null);
create table members (peer_id text primary key, name text not null, public_key blob not null, enrolled real not null,
  renewed real not null);
create table uses (code text not null, peer_id text not null, time real not null, primary key (code, peer_id));
create table bans (peer_id text primary key, time real not null, banned integer not null, reason text not null);
create table coordinators (peer_id text primary key, time real not null, link text not null, addresses text not null);
create table if not exists lists (serial integer primary key autoincrement, time real not null);
"""
FROM_1 = f"""
alter table invites rename to old_invites; alter table members rename to old_members;
alter table bans rename to old_bans; {SCHEMA}
insert into invites select code, label, created, expires, uses_left + used, revoked from old_invites;
insert into members select peer_id, name, public_key, enrolled, renewed from old_members;
insert into uses select code, peer_id, enrolled from old_members join old_invites on label = invite;
insert into bans select peer_id, time, 1, reason from old_bans;
drop table old_invites; drop table old_members; drop table old_bans;
"""  # noqa: S608


class Ledger:
    """What `path` holds; made on first use. Any thread may call; a write is on disk when its call returns. Raises
    BadInput for a file that is none of ours, sqlite3's errors when the disk fails."""

    def __init__(self, path: Path) -> None:
        self._db = Database(path, schema=SCHEMA, version=2, upgrades={1: FROM_1}, what="a ledger", durable=True,
                            mend="Bring it back from a copy, or move it away: then nobody is a member.")
        self._known: tuple[int, Facts] | None = None

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    # -- what other coordinators are told --

    def facts(self) -> Facts:
        """All that is known; the same object until something changes."""
        with self._db.reading() as db:
            if self._known is None or self._known[0] != db.total_changes:
                self._known = db.total_changes, _facts(db)
            return self._known[1]

    def learn(self, told: Facts) -> bool:
        """Take in what another coordinator knows; whether any of it was new."""
        if merge(known := self.facts(), told) == known:
            return False
        with self._db.writing() as db:
            known = _facts(db)
            merged = merge(known, told)
            for name, kind in TABLES.items():
                before, marks = getattr(known, name), ", ".join("?" * len(fields(kind)))
                db.executemany(f"insert or replace into {name} values ({marks})", [  # noqa: S608 - a name of TABLES
                    astuple(fact) for key, fact in getattr(merged, name).items() if before.get(key) != fact])
            if merged.serial > known.serial:
                db.execute("insert into lists (serial, time) values (?, 0)", (merged.serial,))
        return True

    # -- invites --

    def invites(self) -> list[Invite]:
        """All, the oldest first."""
        return invites_of(self.facts())

    def find_invite(self, code_or_label: str) -> Invite | None:
        """The one with this code, or else this label."""
        found = self.invites()
        return next((invite for invite in found if invite.code == code_or_label),
                    next((invite for invite in found if invite.label == code_or_label), None))

    def add_invite(self, invite: Invite) -> bool:
        """False: there is one with this label already."""
        with self._db.writing() as db:
            if invite.label in {other.label for other in invites_of(_facts(db))}:
                return False
            db.execute("insert into invites values (?, ?, ?, ?, ?, 0)",
                       (invite.code, invite.label, invite.created, invite.expires, invite.uses_left))
            return True

    def revoke_invite(self, code: str) -> None:
        """From now on nobody enrols with it."""
        with self._db.writing() as db:
            db.execute("update invites set revoked = 1 where code = ?", (code,))

    # -- members --

    def members(self) -> list[Member]:
        """All, by name."""
        return sorted(members_of(self.facts()), key=lambda member: member.name)

    def names(self) -> dict[str, str]:
        """Of all members, by peer id."""
        return {member.peer_id: member.name for member in members_of(self.facts())}

    def find_member(self, peer: str) -> Member | None:
        """The one with this peer id, or else this name."""
        found = list(members_of(self.facts()))
        return next((member for member in found if member.peer_id == peer),
                    next((member for member in found if member.name == peer), None))

    def is_member(self, peer_id: str) -> bool:
        """Whether it has enrolled."""
        return bool(self._db.read("select 1 from members where peer_id = ?", (peer_id,)))

    def enrol(self, peer_id: str, name: str, public_key: bytes, code: str, now: float) -> str:
        """Make it a member by the invite `code` (empty: none is needed); the name it gets, which nobody else has.

        An invite that can't be used any more (two may come at once) raises ValueError. Who is a member already (it
        asked twice at once) is renewed.
        """
        with self._db.writing() as db:
            if given := _renewed(db, peer_id, name, now):
                return given
            if code:
                _use(db, code, peer_id, now)
            given = _free(db, name, peer_id)
            db.execute("insert into members values (?, ?, ?, ?, ?)", (peer_id, given, public_key, now, now))
            return given

    def renew(self, peer_id: str, name: str, now: float) -> str:
        """A member comes again; its name, the new one if it wishes another."""
        with self._db.writing() as db:
            return _renewed(db, peer_id, name, now)

    # -- bans --

    def bans(self) -> list[str]:
        """The peer ids that are banned, sorted."""
        return sorted(peer_id for peer_id, ban in self.facts().bans.items() if ban.banned)

    def ban(self, peer_id: str, reason: str, now: float) -> None:
        """Add it to the bans, or change the reason."""
        self._order(peer_id, now, banned=True, reason=reason)

    def lift(self, peer_id: str, now: float) -> None:
        """Take it from the bans."""
        self._order(peer_id, now, banned=False, reason="")

    def _order(self, peer_id: str, now: float, *, banned: bool, reason: str) -> None:
        with self._db.writing() as db:
            db.execute("insert into bans values (:it, :now, :banned, :reason) on conflict (peer_id) do update set "
                       "time = max(:now, time + :tick), banned = :banned, reason = :reason",
                       {"it": peer_id, "now": now, "banned": banned, "reason": reason, "tick": TICK})

    def next_serial(self, now: float, heard: int = 0) -> int:
        """A number for a new list of bans, higher than all before it, and than one that was `heard` of."""
        with self._db.writing() as db:
            serial = max(_serial(db), heard) + 1
            db.execute("insert into lists values (?, ?)", (serial, now))
        return serial


def _facts(db: sqlite3.Connection) -> Facts:
    found = {name: by_key(_fact(kind, row) for row in db.execute(f"select * from {name}"))  # noqa: S608
             for name, kind in TABLES.items()}
    return Facts(**found, serial=_serial(db))


def _fact(kind: type[Any], row: sqlite3.Row) -> Any:
    return kind(**{name: bool(row[name]) if name in {"revoked", "banned"} else row[name] for name in row.keys()})  # noqa: SIM118


def _serial(db: sqlite3.Connection) -> int:
    return int(db.execute("select coalesce(max(serial), 0) from lists").fetchone()[0])


def _renewed(db: sqlite3.Connection, peer_id: str, name: str, now: float) -> str:
    """The member's name from now on; empty if it is none."""
    given = _free(db, name, peer_id)
    changed = db.execute("update members set name = ?, renewed = max(?, renewed + ?) where peer_id = ?",
                         (given, now, TICK, peer_id)).rowcount
    return given if changed else ""


def _use(db: sqlite3.Connection, code: str, peer_id: str, now: float) -> None:
    """One use of the invite."""
    if not db.execute(
            "insert into uses select code, ?, ? from invites where code = ? and not revoked and coalesce(expires, ?) > "
            "? and (uses is null or uses > (select count(*) from uses as past where past.code = invites.code))",
            (peer_id, now, code, now + 1, now)).rowcount:
        raise ValueError("the invite can't be used any more")


def _free(db: sqlite3.Connection, name: str, peer_id: str) -> str:
    """`name`, or with a number behind it, so that no other member has it."""
    names = told_apart((row["peer_id"], row["name"]) for row in db.execute(
        "select peer_id, name from members order by enrolled, peer_id"))
    return free(name, {given for other, given in names.items() if other != peer_id})
