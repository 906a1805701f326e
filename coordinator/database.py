"""An SQLite file of the coordinator's state directory."""

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any

from training.errors import BadInput


class Database:
    """What `path` holds, by `schema`; made on first use, readable by its owner only. Any thread may call, one at a
    time is served. Raises BadInput, with `what` it should have been and how to `mend` it, for a file that is none of
    ours; sqlite3's errors when the disk fails. `durable`: a write is on disk when it returns, whatever happens to the
    power. `upgrades`: by an older version, the script that makes the newest of it."""

    def __init__(self, path: Path, *, schema: str, version: int, what: str, mend: str, durable: bool,
                 upgrades: Mapping[int, str] = MappingProxyType({})) -> None:
        self._lock = Lock()
        path.touch(mode=0o600)  # SQLite would let others read it
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        try:
            self._db.execute("pragma journal_mode = wal")
            self._db.execute(f"pragma synchronous = {'full' if durable else 'normal'}")
            self._make({0: schema, **upgrades}, version)
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise BadInput(f"{path} ({error})", expected=f"{what} of version {version}", mend=mend) from None

    def _make(self, scripts: Mapping[int, str], version: int) -> None:
        (found,) = self._db.execute("pragma user_version").fetchone()
        if found in scripts:
            self._db.executescript(f"begin; {scripts[found]} pragma user_version = {version}; commit;")
        elif found != version:
            raise sqlite3.DatabaseError(f"version {found}")

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._db.close()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all of it, or nothing."""
        with self._lock:
            self._db.execute("begin immediate")
            try:
                yield self._db
            except BaseException:
                self._db.execute("rollback")
                raise
            self._db.execute("commit")

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Nobody writes meanwhile."""
        with self._lock:
            yield self._db

    def copy(self) -> bytes:
        """The whole file, as it would be if nothing were under way."""
        with self._lock:
            return self._db.serialize()

    def read(self, query: str, values: Mapping[str, Any] | Sequence[Any] = ()) -> list[sqlite3.Row]:
        """The rows."""
        with self._lock:
            return self._db.execute(query, values).fetchall()
