"""A file copied, with its digest checked; a copy that was cut short goes on where it was. Imports no torch."""

import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from training.atomic import move_into_place
from training.errors import BadInput

CHUNK_BYTES = 4 << 20


def copy_checked(origin: Path, copy: Path, part: Path, expected: str | None, tick: Callable[[int], None]) -> None:
    """Copies `origin` to `part`, which may hold its beginning, and when it is whole and right moves that to `copy`.

    `tick` is told how many bytes are there. The copy keeps the time of the original. Raises BadInput if the original's
    SHA-256 is not `expected` (none: not checked), OSError if it cannot be read or the copy not be written.
    """
    if expected is None:  # nothing to check what an earlier call has left against
        part.unlink(missing_ok=True)
    for _ in range(2):  # what an earlier call has left may be wrong: the second time starts anew
        found = _append(origin, part, tick)
        if expected in (None, found):
            stat = origin.stat()
            os.utime(part, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            move_into_place(part, copy)
            return
        part.unlink()
    raise BadInput(f"shard {str(origin)!r} with SHA-256 {found}", expected=f"{expected}, as in its manifest",
                   mend="Copy it again from where it was made, or make the shards anew with `covey shards make`.")


def _append(origin: Path, part: Path, tick: Callable[[int], None]) -> str:
    """Copies what `part` does not hold yet; the SHA-256 of all that it then holds."""
    hashed, done = sha256(), 0
    with origin.open("rb") as source, part.open("a+b") as copy:
        copy.seek(0)
        while chunk := copy.read(CHUNK_BYTES):
            hashed.update(chunk)
            done += len(chunk)
        source.seek(done)
        while chunk := source.read(CHUNK_BYTES):
            hashed.update(chunk)
            copy.write(chunk)
            done += len(chunk)
            tick(done)
    return hashed.hexdigest()
