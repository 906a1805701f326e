"""Tar shards copied to a local disk before training, as far as a bound allows; the rest is read where it lies.

Imports no torch.
"""

import errno
import fcntl
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TextIO

from training.data.checked_copy import copy_checked
from training.data.manifest import NAME, digest, read_manifest
from training.data.shard_files import check_files
from training.data.tar_index import CACHE
from training.errors import BadInput

logger = logging.getLogger(__name__)

SPARED_BYTES = 1 << 30  # of the disk: checkpoints and logs want room too
FULL = {errno.ENOSPC, errno.EDQUOT}  # what a disk without room answers

Progress = Callable[[int, int], None]  # bytes that are local, and that will be


@dataclass(frozen=True)
class Preloaded:
    """`folder` is to be opened in place of the original: `copied` of its `shards` are files, the others links."""

    folder: Path
    copied: int
    shards: int
    num_bytes: int


@dataclass(frozen=True)
class _Shard:
    origin: Path
    copy: Path
    num_bytes: int
    sha256: str | None  # none: made elsewhere, without a manifest

    @property
    def part(self) -> Path:
        """A copy that is not whole yet."""
        return self.copy.with_name(f".{self.copy.name}.part")


def preload(folder: Path, local: Path, capacity_bytes: int, progress: Progress | None = None) -> Preloaded:
    """Copies the first shards of `folder` to a folder in `local`, all of whose tars stay within `capacity_bytes`.

    Copies are checked against the manifest, where there is one. Whole ones of an earlier call are kept, and one that
    was cut short goes on where it was. A disk that fills up is a warning: the rest is read where it lies. Raises
    BadInput for missing shards, for contents that are not the manifest's, and if `local` cannot be written to. Where
    another process is preloading into `local`, `folder` is read as it is.
    """
    try:
        local.mkdir(parents=True, exist_ok=True)
        with (local / ".lock").open("w") as lock:
            if _is_taken(lock):
                logger.warning("another process is preloading into %s: reading %s where it lies", local, folder)
                return Preloaded(folder, 0, 0, 0)
            return _preload(folder.absolute(), local.absolute(), capacity_bytes, progress or _silent)
    except OSError as error:
        raise BadInput(f"preloading {error.filename or str(local)!r} ({error.strerror})", mend="Check --preload.",
                       expected="shards that can be read, and a folder that can be written to") from None


def _is_taken(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _preload(folder: Path, local: Path, capacity_bytes: int, progress: Progress) -> Preloaded:
    splits = [path for name in ("train", "val") if (path := folder / name).is_dir()] or [folder]
    base = local / _identity(splits)
    shards = [shard for split in splits for shard in _shards(split, base / split.relative_to(folder))]
    if not shards:
        raise BadInput(f"data folder {str(folder)!r} without shards", expected="WebDataset *.tar files",
                       mend="Check the path given with --data.")
    others = sum(path.stat().st_size for path in local.rglob("*.tar")
                 if not path.is_symlink() and not path.is_relative_to(base))
    chosen = _that_fit(shards, capacity_bytes - others)
    for shard in shards:
        shard.copy.parent.mkdir(parents=True, exist_ok=True)
        if shard not in chosen:
            shard.part.unlink(missing_ok=True)
        if shard not in chosen or not _is_whole(shard):
            shard.copy.unlink(missing_ok=True)
            shard.copy.symlink_to(shard.origin)
    for split in splits:
        for path in (split / NAME, *split.glob(CACHE.format("*"))):
            if path.is_file():
                shutil.copyfile(path, base / path.relative_to(folder))
    _copy_all(chosen, progress)
    copied = [shard for shard in chosen if _is_whole(shard)]
    return Preloaded(base, len(copied), len(shards), sum(shard.num_bytes for shard in copied))


def _identity(splits: Sequence[Path]) -> str:
    """Name of a data set's folder: another one's shards may have the same names."""
    files = [f"{split.name} {path.name} {path.stat().st_size}" for split in splits for path in _tars(split)]
    manifests = [manifest.model_dump_json() for split in splits if (manifest := read_manifest(split))]
    return digest(*files, *manifests)[:16]


def _tars(split: Path) -> list[Path]:
    return sorted(path for path in split.glob("*.tar") if not path.name.startswith("."))


def _shards(split: Path, copies: Path) -> Iterator[_Shard]:
    manifest = read_manifest(split)
    if manifest is None:
        yield from (_Shard(path, copies / path.name, path.stat().st_size, None) for path in _tars(split))
        return
    check_files(split, manifest)
    yield from (_Shard(split / shard.name, copies / shard.name, shard.num_bytes, shard.sha256)
                for shard in manifest.shards)


def _that_fit(shards: Sequence[_Shard], capacity_bytes: int) -> list[_Shard]:
    totals = accumulate(shard.num_bytes for shard in shards)
    return [shard for shard, total in zip(shards, totals, strict=True) if total <= capacity_bytes]


def _is_whole(shard: _Shard) -> bool:
    """Whether it has been copied: a copy gets its name only when it is whole and has been checked."""
    return shard.copy.is_file() and not shard.copy.is_symlink() and shard.copy.stat().st_size == shard.num_bytes


def _copy_all(shards: Sequence[_Shard], progress: Progress) -> None:
    total, done = sum(shard.num_bytes for shard in shards), 0
    for shard in shards:
        if not _is_whole(shard):
            try:
                _check_room(shard)
                copy_checked(shard.origin, shard.copy, shard.part, shard.sha256, partial(_add, progress, done, total))
            except OSError as error:
                if error.errno not in FULL:
                    raise
                shard.part.unlink(missing_ok=True)
                logger.warning("the disk is full: %d of %d bytes preloaded, the rest is read from %s", done, total,
                               shard.origin.parent)
                return
        done += shard.num_bytes
        progress(done, total)


def _add(progress: Progress, done: int, total: int, copied: int) -> None:
    progress(done + copied, total)


def _check_room(shard: _Shard) -> None:
    there = shard.part.stat().st_size if shard.part.is_file() else 0
    if shutil.disk_usage(shard.part.parent).free + there < shard.num_bytes + SPARED_BYTES:
        raise OSError(errno.ENOSPC, "less than 1 GiB would be left", str(shard.part))


def _silent(_done: int, _total: int) -> None:
    """Nobody watches."""
