"""A state directory: what one coordinator, peer or run keeps on disk, held by one process at a time."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from training.errors import BadInput

Role = Literal["coordinator", "peer", "run"]
ANOTHER = "Choose another with {}"

_held: set[int] = set()


def _let_go_in_child() -> None:
    # Every process that inherits a lock holds it: a forked DHT node would keep ours after we were killed.
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go_in_child)


@contextmanager
def open_state_dir(path: Path, *, role: Role, run_id: str, option: str = "--state-dir") -> Iterator[Path]:
    """Hold the directory `path`, made (mode 0700) if it is not there, and yield it as an absolute path.

    Raises BadInput if it can't be made or written, if another process holds it (naming its pid), or if it
    belongs to another role or another experiment. The kernel releases it however this process ends. `option` is how
    users choose it.
    """
    path, another = path.expanduser().absolute(), ANOTHER.format(option)
    lock = _open_lock(path, another)
    try:
        _acquire(lock, path, another)
        _held.add(lock)
        _claim(path, role, run_id, another)
        yield path
    finally:
        _held.discard(lock)
        os.close(lock)


def _open_lock(path: Path, another: str) -> int:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise BadInput(f"state directory {path} ({error.strerror})", expected="a folder that can be written",
                       mend=f"{another}, or mend its permissions.") from None


def _acquire(lock: int, path: Path, another: str) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
        raise BadInput(f"state directory {path} is held by process {holder}", expected="one that is free",
                       mend=f"{another}, or stop that process.") from None
    except OSError as error:
        raise BadInput(f"state directory {path} can't be locked ({error.strerror})",
                       expected="a file system with locks", mend=f"{another}, on a local disk.") from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)


def _claim(path: Path, role: Role, run_id: str, another: str) -> None:
    marker, ours = path / "owner.json", {"role": role, "run_id": run_id}
    if not marker.exists():
        draft = marker.with_suffix(".tmp")
        draft.write_text(json.dumps(ours))
        draft.replace(marker)
    try:
        owner = json.loads(marker.read_bytes())
    except (OSError, ValueError) as error:
        raise BadInput(f"{marker}: {error}", expected="what covey wrote there", mend=f"{another}.") from None
    if owner != ours:
        known = isinstance(owner, dict)
        found = f"a {owner.get('role')} of {owner.get('run_id')}" if known else "something else"
        raise BadInput(f"state directory {path} belongs to {found}",
                       expected=f"one of a {role} of {run_id}, or a new one", mend=f"{another}.")
