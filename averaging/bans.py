"""Whom the authority has banned: its signed list, kept in a file that all of a peer's processes look at.

A list never goes out of force: without a newer one, the last stands. It expires as a record of the DHT only. Imports no
torch.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from time import monotonic

from google.protobuf.message import DecodeError

from averaging.identity import is_signed
from averaging.membership import bans_words
from proto.authority_pb2 import Bans, SignedBans

LONGEST = 1 << 20     # bytes of a signed list: some ten thousand peers, banned or not any more
LOOK_SECONDS = 1.0    # between two looks at the file


def parse_bans(signed: bytes, authority: bytes, run_id: str) -> Bans | None:
    """The list in `signed`, a SignedBans; None unless the authority has signed it for this run."""
    try:
        outer = SignedBans.FromString(signed if len(signed) <= LONGEST else b"")
        bans = Bans.FromString(outer.bans)
    except DecodeError:
        return None
    if bans.run_id != run_id or not is_signed(authority, bans_words(outer.bans), outer.signature):
        return None
    return bans


@dataclass(frozen=True)
class Kept:
    """A list of bans; without any, of nobody."""

    signed: bytes  # as the authority signed it; empty: there was never a list
    bans: Bans
    peer_ids: frozenset[str]


class BanFile:
    """The newest list that this peer has heard of, at `path`. Any thread and any process may use it, once forked."""

    def __init__(self, path: Path, authority: bytes, run_id: str) -> None:
        self._path, self._authority, self._run_id = path, authority, run_id
        self._looked, self._seen = -LOOK_SECONDS, (0, 0)  # when; the file's time of change, ns, and inode
        self._kept, self._offering = Kept(b"", Bans(), frozenset()), Lock()

    def newest(self) -> Kept:
        """The list, as it is now."""
        return self._look(0.0)

    def is_banned(self, peer_id: str) -> bool:
        """Whether it is in the list, as of a second ago at most."""
        return peer_id in self._look(LOOK_SECONDS).peer_ids

    def offer(self, signed: bytes) -> bool:
        """Keep a list that came from elsewhere if it is the authority's and newer; whether it is. Raises OSError."""
        bans = parse_bans(signed, self._authority, self._run_id)
        with self._offering:  # two threads would write one draft, and an older list could come last
            known = self.newest().bans
            if bans is None or (bans.serial, bans.expires) <= (known.serial, known.expires):
                return False
            draft = self._path.with_suffix(f".{os.getpid()}.tmp")
            draft.write_bytes(signed)
            draft.replace(self._path)
        return True

    def _look(self, at_most_every: float) -> Kept:
        if monotonic() - self._looked >= at_most_every:
            self._looked = monotonic()
            with suppress(FileNotFoundError):
                found = self._path.stat()
                if (found.st_mtime_ns, found.st_ino) != self._seen:
                    signed = self._path.read_bytes()
                    if bans := parse_bans(signed, self._authority, self._run_id):
                        self._kept = Kept(signed, bans, frozenset(bans.peer_ids))
                    self._seen = found.st_mtime_ns, found.st_ino  # now: another thread may look meanwhile
        return self._kept
