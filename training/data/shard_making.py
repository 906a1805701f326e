"""`covey shards make`: an image folder packed into WebDataset tar shards, each a mix of its classes."""

import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from training.atomic import move_into_place
from training.data.folder import Listing, Split, find_images
from training.data.manifest import Manifest, Packing, Shard, digest, read_manifest, write_manifest
from training.data.shard_files import find_shards
from training.data.shard_writer import Encode, encode_in_turn, write_shard
from training.errors import BadInput

logger = logging.getLogger(__name__)

JOURNAL = ".making.jsonl"  # first line: digest of what is being made; then one line per finished shard
TAR_BYTES_PER_IMAGE = 4 * 512  # two headers, the label, and on average a block to round up to


@dataclass(frozen=True)
class Made:
    """What lies in the destination. `skipped` images could not be decoded, and are named in the log."""

    images: int
    skipped: int
    shards: int
    num_bytes: int


@dataclass(frozen=True)
class _Job:
    """One split: `plan` holds the numbers of the images of each shard, `made` is a digest of all that it depends on."""

    split: Split
    folder: Path
    listing: Listing
    made: str
    plan: tuple[Sequence[int], ...]

    def shard_names(self) -> list[str]:
        return [f"{number:06}.tar" for number in range(len(self.plan))]


def make_shards(source: Path, destination: Path, packing: Packing, *, threads: int = 4,
                progress: Callable[[int, int], None] | None = None) -> Made:
    """Packs the train and val images of `source`, an image folder, into `destination`/train and `destination`/val.

    What is not shrunk stays as it is, byte for byte. Where a making was cut short, the same call goes on after its
    whole shards. `progress` is told how many images are done, and of how many. Raises BadInput if `source` holds no
    images or `destination` other shards, OSError if a file cannot be read or written.
    """
    jobs = [_job(source, destination / split, split, listing, packing) for split, listing in _listings(source)]
    finished = [_finished(job) for job in jobs]
    total, done = sum(len(job.listing.paths) for job in jobs), 0

    def tick(images: int) -> None:
        nonlocal done
        done += images
        if progress is not None:
            progress(done, total)

    with ThreadPoolExecutor(threads, thread_name_prefix="pack") as pool:
        encode = partial(encode_in_turn, pool, packing.shortest_side, 4 * threads)
        shards = [shard for job, there in zip(jobs, finished, strict=True) for shard in _make(job, there, encode, tick)]
    images = sum(shard.images for shard in shards)
    return Made(images, total - images, len(shards), sum(shard.num_bytes for shard in shards))


def _listings(source: Path) -> Iterator[tuple[Split, Listing]]:
    yield "train", find_images(source, "train")
    try:
        yield "val", find_images(source, "val")
    except BadInput:
        logger.warning("no images to evaluate on in %s, so no shards of them", source)


def _job(source: Path, folder: Path, split: Split, listing: Listing, packing: Packing) -> _Job:
    sizes = [path.stat().st_size for path in listing.paths]
    names = [f"{path.relative_to(source)} {size}" for path, size in zip(listing.paths, sizes, strict=True)]
    order = random.Random(f"{packing.seed}/{split}").sample(range(len(sizes)), len(sizes))
    made = digest(packing.model_dump_json(), *names)
    return _Job(split, folder, listing, made, tuple(_packed(order, sizes, packing)))


def _packed(order: Sequence[int], sizes: Sequence[int], packing: Packing) -> Iterator[list[int]]:
    """`order` cut so that no part has more images, or more bytes unless it is a single image, than allowed."""
    part, part_bytes = list[int](), 0
    for index in order:
        needed = sizes[index] + TAR_BYTES_PER_IMAGE
        if part and (len(part) == packing.images_per_shard or part_bytes + needed > packing.max_bytes):
            yield part
            part, part_bytes = [], 0
        part.append(index)
        part_bytes += needed
    yield part


def _finished(job: _Job) -> dict[str, Shard]:
    """The shards of this job that are there already. Raises BadInput where those of another are."""
    manifest, journal = read_manifest(job.folder), job.folder / JOURNAL
    if manifest is not None:
        made, shards = manifest.made, list(manifest.shards)
    elif journal.is_file():
        made, shards = _read_journal(journal)
    else:
        made, shards = "" if any(job.folder.glob("*.tar")) else job.made, []
    if made != job.made:
        raise BadInput(f"folder {str(job.folder)!r} with shards of other images or options", expected="an empty folder",
                       mend="Give another destination, or delete them.")
    return {shard.name: shard for shard in shards if _size(job.folder / shard.name) == shard.num_bytes}


def _read_journal(path: Path) -> tuple[str, list[Shard]]:
    made, *lines = path.read_text().split("\n")
    shards = []
    for line in lines:
        try:
            shards.append(Shard.model_validate_json(line))
        except ValidationError:  # the last line of a making that was cut: its shard is made again
            break
    return made, shards


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _make(job: _Job, finished: dict[str, Shard], encode: Encode, tick: Callable[[int], None]) -> tuple[Shard, ...]:
    job.folder.mkdir(parents=True, exist_ok=True)
    staged = job.folder / f"{JOURNAL}.part"  # whatever ends this process, the journal there is stays whole
    staged.write_text("\n".join([job.made, *(shard.model_dump_json() for shard in finished.values())]) + "\n")
    move_into_place(staged, job.folder / JOURNAL)
    with (job.folder / JOURNAL).open("a") as journal:
        for name, images in zip(job.shard_names(), job.plan, strict=True):
            if name in finished:
                tick(len(images))
                continue
            finished[name] = write_shard(job.folder / name, job.listing, images, encode, tick)
            journal.write(finished[name].model_dump_json() + "\n")
            journal.flush()
            os.fsync(journal.fileno())
    shards = tuple(finished[name] for name in job.shard_names())
    write_manifest(job.folder, Manifest(made=job.made, classes=job.listing.classes, shards=shards))
    (job.folder / JOURNAL).unlink()
    find_shards(job.folder.parent, job.split)  # checks them, and keeps the index
    return shards
