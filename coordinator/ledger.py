"""Who may take part: invites, members and bans, in an SQLite file of the coordinator's state directory."""

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from training.errors import BadInput

VERSION = 1
SCHEMA = """
create table invites (code text primary key, label text not null unique, created real not null, expires real,
  uses_left integer, revoked integer not null default 0, used integer not null default 0);
create table members (peer_id text primary key, name text not null unique, public_key blob not null,
  invite text not null, enrolled real not null, renewed real not null);
create table bans (peer_id text primary key, reason text not null, time real not null);
create table lists (serial integer primary key autoincrement, time real not null);
"""


@dataclass(frozen=True)
class Invite:
    """Times in Unix seconds; None: no end, or any number."""

    code: str
    label: str
    created: float
    expires: float | None
    uses_left: int | None
    revoked: bool
    used: int  # volunteers who have enrolled with it

    def refusal(self, now: float) -> str | None:
        """Why nobody can enrol with it at `now`; None: somebody can."""
        if self.revoked:
            return "revoked"
        if self.expires is not None and self.expires <= now:
            return "expired"
        return "used up" if self.uses_left == 0 else None


@dataclass(frozen=True)
class Member:
    """Who has enrolled. `reason`: of its ban; None: it is not banned."""

    peer_id: str
    name: str
    public_key: bytes
    invite: str  # the label of the one that it enrolled with; empty: none was needed
    enrolled: float
    renewed: float
    reason: str | None


class Ledger:
    """What `path` holds; made on first use. Any thread may call, one at a time is served; a write is on disk when its
    call returns. Raises BadInput for a file that is none of ours, sqlite3's errors when the disk fails."""

    def __init__(self, path: Path) -> None:
        self._lock = Lock()
        path.touch(mode=0o600)  # SQLite would let others read it
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        try:
            self._db.execute("pragma journal_mode = wal")
            self._db.execute("pragma synchronous = full")
            self._make()
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise BadInput(f"{path} ({error})", expected=f"a ledger of version {VERSION}",
                           mend="Bring it back from a copy, or move it away: then nobody is a member.") from None

    def _make(self) -> None:
        (version,) = self._db.execute("pragma user_version").fetchone()
        if version == 0:
            self._db.executescript(f"begin; {SCHEMA} pragma user_version = {VERSION}; commit;")
        elif version != VERSION:
            raise sqlite3.DatabaseError(f"version {version}")

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._db.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("begin immediate")
            try:
                yield self._db
            except BaseException:
                self._db.execute("rollback")
                raise
            self._db.execute("commit")

    def _read(self, query: str, values: Mapping[str, Any] | None = None) -> list[sqlite3.Row]:
        with self._lock:
            return self._db.execute(query, values or {}).fetchall()

    # -- invites --

    def invites(self) -> list[Invite]:
        """All, the oldest first."""
        return [_invite(row) for row in self._read("select * from invites order by created, code")]

    def find_invite(self, code_or_label: str) -> Invite | None:
        """The one with this code, or else this label."""
        rows = self._read("select * from invites where :it in (code, label) order by code = :it desc",
                          {"it": code_or_label})
        return _invite(rows[0]) if rows else None

    def add_invite(self, invite: Invite) -> bool:
        """False: there is one with this label already."""
        with self._writing() as db:
            return db.execute(
                "insert or ignore into invites (code, label, created, expires, uses_left) values (?, ?, ?, ?, ?)",
                (invite.code, invite.label, invite.created, invite.expires, invite.uses_left)).rowcount == 1

    def revoke_invite(self, code: str) -> None:
        """From now on nobody enrols with it."""
        with self._writing() as db:
            db.execute("update invites set revoked = 1 where code = ?", (code,))

    # -- members --

    def members(self) -> list[Member]:
        """All, by name."""
        return [_member(row) for row in self._read(f"{MEMBERS} order by name")]

    def find_member(self, peer: str) -> Member | None:
        """The one with this peer id, or else this name."""
        rows = self._read(f"{MEMBERS} where :it in (members.peer_id, name) order by members.peer_id = :it desc",
                          {"it": peer})
        return _member(rows[0]) if rows else None

    def enrol(self, peer_id: str, name: str, public_key: bytes, code: str, now: float) -> str:
        """Make it a member by the invite `code` (empty: none is needed); the name it gets, which nobody else has.

        An invite that can't be used any more (two may come at once) raises ValueError. Who is a member already (it
        asked twice at once) is renewed.
        """
        with self._writing() as db:
            given = _free(db, name, peer_id)
            if db.execute("update members set name = ?, renewed = ? where peer_id = ?",
                          (given, now, peer_id)).rowcount:
                return given
            label = _use(db, code, now) if code else ""
            db.execute("insert into members values (?, ?, ?, ?, ?, ?)",
                       (peer_id, given, public_key, label, now, now))
            return given

    def renew(self, peer_id: str, name: str, now: float) -> str:
        """A member comes again; its name, the new one if it wishes another."""
        with self._writing() as db:
            given = _free(db, name, peer_id)
            db.execute("update members set name = ?, renewed = ? where peer_id = ?", (given, now, peer_id))
            return given

    # -- bans --

    def bans(self) -> list[str]:
        """The peer ids that are banned, sorted."""
        return [row["peer_id"] for row in self._read("select peer_id from bans order by peer_id")]

    def ban(self, peer_id: str, reason: str, now: float) -> None:
        """Add it to the bans, or change the reason."""
        with self._writing() as db:
            db.execute("insert or replace into bans values (?, ?, ?)", (peer_id, reason, now))

    def lift(self, peer_id: str) -> None:
        """Take it from the bans."""
        with self._writing() as db:
            db.execute("delete from bans where peer_id = ?", (peer_id,))

    def next_serial(self, now: float) -> int:
        """A number for a new list of bans, higher than all before it."""
        with self._writing() as db:
            serial = db.execute("insert into lists (time) values (?)", (now,)).lastrowid
        assert serial is not None
        return serial


MEMBERS = "select members.*, bans.reason from members left join bans on bans.peer_id = members.peer_id"


def _invite(row: sqlite3.Row) -> Invite:
    return Invite(**{**dict(row), "revoked": bool(row["revoked"])})


def _member(row: sqlite3.Row) -> Member:
    return Member(**dict(row))


def _use(db: sqlite3.Connection, code: str, now: float) -> str:
    """One use of the invite; its label."""
    row = db.execute(
        "update invites set uses_left = uses_left - 1, used = used + 1 where code = ? and not revoked and "
        "coalesce(uses_left, 1) > 0 and coalesce(expires, ?) > ? returning label", (code, now + 1, now)).fetchone()
    if row is None:
        raise ValueError("the invite can't be used any more")
    return str(row["label"])


def _free(db: sqlite3.Connection, name: str, peer_id: str) -> str:
    """`name`, or with a number behind it, so that no other member has it."""
    number, given = 1, name
    while db.execute("select 1 from members where name = ? and peer_id != ?", (given, peer_id)).fetchone():
        number += 1
        given = f"{name[:64 - len(str(number)) - 1]}-{number}"
    return given
