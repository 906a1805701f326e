"""What volunteers are credited with, kept for good: in an SQLite file of the coordinator's state directory.

Each credit has a row by epoch and peer, and the volunteer's sum is brought up to date with it. A row is there to be
replaced by a better founded one, and so that what is read twice counts once; when no receipt of it can be in the DHT
any more it goes, and the sum stays. So the file grows with the number of volunteers, and not with time.
"""

import sqlite3
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from averaging.receipts import OLDEST_SECONDS
from coordinator.credits import Credit
from coordinator.database import Database

MOST_ROWS = 300_000  # whatever the swarm's size and pace; of a thousand volunteers' last receipts there are 64,000
KEEP_SECONDS = OLDEST_SECONDS + 3 * 3600.0  # clocks and nodes that are late included
SCHEMA = """
create table credits (epoch integer not null, peer_id text not null, group_id blob not null, claimed integer not null,
  samples integer not null, witnesses integer not null, flag text not null, heard real not null,
  primary key (epoch, peer_id)) without rowid;
create index credits_by_age on credits (heard);
create table totals (peer_id text primary key, samples integer not null, epochs integer not null,
  flagged integer not null) without rowid;
"""


@dataclass(frozen=True)
class Contribution:
    """Of one volunteer, over all time."""

    peer_id: str
    name: str      # in the ledger
    samples: int   # in completed rounds
    epochs: int    # with at least one of them
    flagged: int   # epochs in which it claimed more than its group saw, or was in two groups


@dataclass(frozen=True)
class Leaderboard:
    """Who has contributed, the most first, and the sums over all who ever have, those who are not shown included."""

    rows: Mapping[str, Contribution] = field(default_factory=dict)  # by peer id
    samples: int = 0
    flagged: int = 0


class CreditLedger:
    """The credits in `path`. Raises BadInput for a file that is none of ours, sqlite3's errors when the disk fails."""

    def __init__(self, path: Path) -> None:
        self._db = Database(
            path, schema=SCHEMA, version=1, what="a file of credits", durable=False,  # the DHT has the last hours' too
            mend="Bring it back from a copy, or move it away: then the sums begin anew.")

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    def record(self, credits: Iterable[Credit], now: float) -> None:
        """Take these in, heard of at `now` (Unix seconds). The same again, or less founded ones, change nothing."""
        with self._db.writing() as db:
            for credit in credits:
                _take(db, credit, now)
            _forget(db, now - KEEP_SECONDS)

    def recent(self) -> list[Credit]:
        """Those whose rows are still there, by epoch and peer."""
        return [_credit(row) for row in self._db.read("select * from credits")]

    def copy(self) -> bytes:
        """The whole file, for a second coordinator to begin with."""
        return self._db.copy()

    def leaderboard(self, names: Mapping[str, str], *, without: Collection[str] = ()) -> Leaderboard:
        """Of those who have `names` (by peer id), but for some."""
        rows = self._db.read("select * from totals order by samples desc, peer_id")
        return Leaderboard(
            {row["peer_id"]: Contribution(name=names[row["peer_id"]], **dict(row)) for row in rows
             if row["peer_id"] in names and row["peer_id"] not in without},
            sum(row["samples"] for row in rows), sum(row["flagged"] for row in rows))


def _forget(db: sqlite3.Connection, before: float) -> None:
    db.execute("delete from credits where heard < max(?, coalesce((select heard from credits order by heard desc "
               "limit 1 offset ?), 0))", (before, MOST_ROWS))


def _take(db: sqlite3.Connection, credit: Credit, now: float) -> None:
    at = credit.epoch, credit.peer_id
    found = db.execute("select * from credits where epoch = ? and peer_id = ?", at).fetchone()
    before = _credit(found) if found else None
    if before and before.rank >= credit.rank:
        return
    db.execute("insert into credits values (?, ?, ?, ?, ?, ?, ?, ?) on conflict do update set group_id = "
               "excluded.group_id, claimed = excluded.claimed, samples = excluded.samples, witnesses = "
               "excluded.witnesses, flag = excluded.flag",
               (*at, credit.group_id, credit.claimed, credit.samples, credit.witnesses, credit.flag, now))
    new, old = _tallies(credit), _tallies(before) if before else (0, 0, 0)
    db.execute("insert into totals values (?, ?, ?, ?) on conflict do update set samples = samples + excluded.samples, "
               "epochs = epochs + excluded.epochs, flagged = flagged + excluded.flagged",
               (credit.peer_id, *(late - early for late, early in zip(new, old, strict=True))))


def _credit(row: sqlite3.Row) -> Credit:
    return Credit(**{name: row[name] for name in row.keys() if name != "heard"})  # noqa: SIM118 - a row iterates values


def _tallies(credit: Credit) -> tuple[int, int, int]:
    return credit.samples, int(credit.samples > 0), int(bool(credit.flag))
