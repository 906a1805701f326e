"""One tar shard written, with its size and digest."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from webdataset.writer import TarWriter

from training.atomic import move_into_place
from training.data.folder import Listing
from training.data.manifest import Shard
from training.data.shrink import shrink

logger = logging.getLogger(__name__)

Encode = Callable[[Iterable[Path]], Iterator[bytes | None]]


def write_shard(path: Path, listing: Listing, images: Sequence[int], encode: Encode,
                tick: Callable[[int], None]) -> Shard:
    """Packs the images with these numbers into a tar at `path`, there whole or not at all. `tick` counts images."""
    staged, packed = path.with_name(f".{path.name}.part"), 0
    try:
        with staged.open("wb") as file:
            output = _Hashed(file)
            with TarWriter(output, encoder=False, mtime=0, user="", group="") as tar:
                for index, encoded in zip(images, encode(listing.paths[index] for index in images), strict=True):
                    if encoded is not None:
                        tar.write(_sample(listing, index, encoded))
                        packed += 1
                    tick(1)
        move_into_place(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    return Shard(name=path.name, images=packed, num_bytes=output.num_bytes, sha256=output.digest.hexdigest())


def _sample(listing: Listing, index: int, encoded: bytes) -> dict[str, str | bytes]:
    """What WebDataset makes files of: 000000017.jpg with the image, 000000017.cls with its class's number."""
    suffix = "png" if listing.paths[index].suffix.lower() == ".png" else "jpg"
    sample: dict[str, str | bytes] = {"__key__": f"{index:09}", suffix: encoded}
    return sample if listing.labels is None else sample | {"cls": str(listing.labels[index]).encode()}


def _encoded(path: Path, shortest_side: int | None) -> bytes | None:
    encoded = path.read_bytes()
    try:
        return encoded if shortest_side is None else shrink(encoded, shortest_side)
    except (RuntimeError, ValueError) as error:
        logger.warning("leaving out %s, which cannot be decoded: %s", path, str(error).partition("\n")[0])
        return None


def encode_in_turn(pool: ThreadPoolExecutor, shortest_side: int | None, ahead: int,
                   paths: Iterable[Path]) -> Iterator[bytes | None]:
    """The files' contents, shrunk where they are to be, in order; None for one that cannot be decoded to be shrunk.

    At most `ahead` of them wait in memory. Raises OSError if a file cannot be read.
    """
    waiting = deque[Future[bytes | None]]()
    for path in paths:
        waiting.append(pool.submit(_encoded, path, shortest_side))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class _Hashed:
    """A file being written, with its size and digest."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest, self.num_bytes = file, sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.num_bytes += len(data)
        return self._file.write(data)
