"""WebDataset tar shards of a data folder: found, checked and indexed, no image decoded. Imports no torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from training.data.folder import Split
from training.data.manifest import NAME, Manifest, read_manifest
from training.data.tar_index import CACHE, TarIndex, index_tars
from training.errors import BadInput

SPLITS: tuple[Split, ...] = ("train", "val")
VAL_NAME = re.compile(r"(?<![a-z])val(id|idation)?(?![a-z])", re.IGNORECASE)  # imagenet1k-validation-03.tar
MEND = "Copy it again from where it was made, or make the shards anew with `covey shards make`."


@dataclass(frozen=True)
class ShardListing:
    """Images of one split, numbered through its tars. `labels` index `classes`, where those have names."""

    paths: tuple[Path, ...]
    index: TarIndex
    labels: tuple[int, ...] | None
    classes: tuple[str, ...] | None

    @property
    def count(self) -> int:
        """How many images there are."""
        return len(self.index)


def find_shards(folder: Path, split: Split) -> ShardListing:
    """The shards of one split of `folder`: in its `train` and `val` folders, or side by side.

    Side by side, those with the word val, valid or validation in their names are `val`, all others `train`. With a
    manifest (`covey shards make`) the tars must be those that it lists; without, any with JPEG or PNG images and, for
    labels, a `cls` or a `json` with a "label" beside each. Raises BadInput for what is missing, cut off or mixed up.
    """
    base, names = _tars(folder, split)
    manifest = read_manifest(base)
    if manifest is None:
        paths = tuple(base / name for name in names)
        index = _index(base, names, split)
        return ShardListing(paths, index, index.class_numbers(), _numbered_classes(folder))
    check_files(base, manifest)
    _check_classes(folder, manifest)
    names = [shard.name for shard in manifest.shards]
    index, classes = _index(base, names, split), manifest.classes
    labels = index.class_numbers()
    known = 0 if classes is None else len(classes)
    if len(index) != manifest.images or (labels is None) != (known == 0) or index.labels.max() >= known > 0:
        raise BadInput(f"shards in {str(base)!r} with other images or labels than {NAME} says", expected="the same",
                       mend="Make the shards anew with `covey shards make`.")
    return ShardListing(tuple(base / name for name in names), index, labels, classes)


def _index(base: Path, names: Sequence[str], split: Split) -> TarIndex:
    return index_tars([base / name for name in names], base / CACHE.format(split))


def _numbered_classes(folder: Path) -> tuple[str, ...] | None:
    """Classes of tars that count them but do not name them: as many as train and val together show."""
    numbers = [-1]
    for split in SPLITS:
        base, names = _listed(folder, split)
        if names:
            numbers.append(int(_index(base, names, split).labels.max()))
    return tuple(str(number) for number in range(max(numbers) + 1)) or None


def check_files(base: Path, manifest: Manifest) -> None:
    """Raises BadInput unless the shards in `base` are there, and as long as `manifest` says."""
    for shard in manifest.shards:
        path = base / shard.name
        if not path.is_file():
            raise BadInput(f"shard {str(path)!r} missing", expected=f"every shard that {NAME} lists", mend=MEND)
        if path.stat().st_size != shard.num_bytes:
            raise BadInput(f"shard {str(path)!r} of {path.stat().st_size} bytes",
                           expected=f"{shard.num_bytes}, as in {NAME}", mend=MEND)


def _tars(folder: Path, split: Split) -> tuple[Path, list[str]]:
    if not folder.is_dir():
        raise BadInput(f"data folder {str(folder)!r} is {'not a folder' if folder.exists() else 'missing'}",
                       expected="a folder of tar shards", mend="Check the path given with --data.")
    base, names = _listed(folder, split)
    if not names:
        raise BadInput(f"data folder {str(folder)!r} without shards to {split} on",
                       expected="WebDataset *.tar files in its train and val folders, or side by side",
                       mend="Check the path given with --data; `covey shards make` makes shards of an image folder.")
    return base, names


def _listed(folder: Path, split: Split) -> tuple[Path, list[str]]:
    apart = any((folder / name).is_dir() for name in SPLITS)
    base = folder / split if apart else folder
    names = sorted(path.name for path in base.glob("*.tar") if not path.name.startswith("."))
    return base, [name for name in names if apart or bool(VAL_NAME.search(name)) == (split == "val")]


def _check_classes(folder: Path, manifest: Manifest) -> None:
    for split in SPLITS:
        other = read_manifest(folder / split)
        if other is not None and other.classes != manifest.classes:
            raise BadInput(f"shards in {str(folder)!r} whose train and val classes differ", expected="the same classes",
                           mend="Make both splits from one folder with `covey shards make`.")
