"""Files that a crash leaves whole or not at all: written aside, seen to the disk, then renamed. Imports no torch."""

import os
from pathlib import Path


def move_into_place(staged: Path, path: Path) -> None:
    """Renames `staged` to `path` once its bytes are on the disk, and sees the new name to the disk too."""
    _fsync(staged)
    staged.replace(path)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
