"""This user's folder of sockets: none else may open them, and none is left behind."""

import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.errors import BadInput

MEND = "Remove it, or set XDG_RUNTIME_DIR to a folder of yours."


def runtime_dir() -> Path:
    """The folder of this user's sockets, which may not exist yet. BadInput if others could have put some there."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(base, "covey") if base else Path(tempfile.gettempdir(), f"covey-{os.getuid()}")
    if os.path.lexists(path):
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise BadInput(f"runtime folder {path} (owner {found.st_uid}, mode {stat.S_IMODE(found.st_mode):o})",
                           expected=f"a folder of user {os.getuid()} with mode 700", mend=MEND)
    return path


def make_runtime_dir() -> None:
    """Make the folder of this user's sockets if it is missing. Raises BadInput."""
    try:
        runtime_dir().mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"runtime folder {error.filename} ({error.strerror})", expected="a folder for sockets",
                       mend=MEND) from None
    runtime_dir()


def runtime_path(state: Path, suffix: str) -> Path:
    """A path in the runtime folder for the one who owns `state`; a hash, as a socket's path has 107 bytes at most."""
    return runtime_dir() / f"{hashlib.sha256(bytes(state.resolve())).hexdigest()[:16]}{suffix}"


def withdraw_socket(path: Path) -> None:
    """Remove a socket that nobody serves any more."""
    path.unlink(missing_ok=True)


def libp2p_sockets(identity_path: Path) -> Path:
    """The folder of the sockets between the libp2p daemon with this identity and its processes."""
    return runtime_path(identity_path, ".p2p")


def remove_libp2p_sockets(identity_path: Path) -> None:
    """Remove what a node with this identity may have left; none may run."""
    shutil.rmtree(libp2p_sockets(identity_path), ignore_errors=True)


@contextmanager
def scratch_dir(state: Path) -> Iterator[Path]:
    """An empty folder for the temporary files of the processes that work on `state`; removed with the context.

    Processes that are killed leave such files behind: multiprocessing's and torch's shared memory are two.
    """
    make_runtime_dir()
    path = runtime_path(state, ".tmp")
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode=0o700)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
