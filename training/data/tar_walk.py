"""The images of one WebDataset tar file, and their labels. Imports no torch."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from training.data.folder import SUFFIXES
from training.errors import BadInput

UNLABELLED = -1
LABEL_BYTES = 1 << 20  # a label's file is short; a json beside an image may say more


def member_name(path: Path, offset: int) -> str:
    """Name of the file whose content begins at `offset` of the tar at `path`."""
    with path.open("rb") as file:
        file.seek(offset - tarfile.BLOCKSIZE)
        header = file.read(tarfile.BLOCKSIZE)
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
    except tarfile.HeaderError:
        return f"byte {offset}"


def walk(path: Path) -> Iterator[tuple[int, int, int]]:
    """Offset, size and label of every image: files in a row whose names agree up to the first dot are one sample.

    Raises BadInput for what is no whole tar, and for labels that are no class's number.
    """
    sample, image, label = "", None, UNLABELLED
    with path.open("rb") as file:
        for member in _members(path, file):
            folder, slash, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            if folder + slash + stem != sample:
                if image is not None:
                    yield *image, label
                sample, image, label = folder + slash + stem, None, UNLABELLED
            if f".{suffix.lower()}" in SUFFIXES:
                image = (member.offset_data, member.size)
            elif suffix.lower() in ("cls", "json") and label == UNLABELLED:
                label = _label(path, member, file)
    if image is not None:
        yield *image, label


def _members(path: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # or it would remember all of them
                if member.isreg():
                    yield member
            file.seek(archive.offset)
            whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise _cut_off(path, str(error)) from None
    if not whole:  # tarfile ends in silence at a header that it cannot read
        raise _cut_off(path, f"no file and no end mark at byte {archive.offset}")


def _label(path: Path, member: tarfile.TarInfo, file: BinaryIO) -> int:
    """The class's number in a `cls` or a `json` member; UNLABELLED where a json has none."""
    if member.size > LABEL_BYTES:
        raise _not_a_label(path, member, f"{member.size} bytes")
    file.seek(member.offset_data)
    text = file.read(member.size)
    try:
        content: Any = json.loads(text) if member.name.lower().endswith(".json") else int(text)
    except (ValueError, RecursionError):
        raise _not_a_label(path, member, repr(text[:20])) from None
    if isinstance(content, dict):
        content = content.get("label", UNLABELLED)
    if type(content) is not int or not UNLABELLED <= content < 1 << 31:
        raise _not_a_label(path, member, repr(content)[:20])
    return content


def _not_a_label(path: Path, member: tarfile.TarInfo, found: str) -> BadInput:
    return BadInput(f"{path}: {member.name} holds {found}", expected="the class's number, from 0",
                    mend="Make the shards anew, with a number in each .cls, or as \"label\" in each .json.")


def _cut_off(path: Path, reason: str) -> BadInput:
    return BadInput(f"shard {str(path)!r} is cut off or no tar file ({reason})", expected="a whole, uncompressed tar",
                    mend="Copy or download it again.")
