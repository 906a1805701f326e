"""The images of a data folder: found, labelled and split by name alone. Imports no torch, decodes nothing."""

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal, NoReturn

from training.errors import BadInput

Split = Literal["train", "val"]
SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Listing:
    """Files in a stable order. `labels` index `classes`; both are None where there are no class folders."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...] | None
    classes: tuple[str, ...] | None


@dataclass(frozen=True, order=True)
class _Image:
    class_name: str  # "" where it lies in no class folder
    path: Path


def find_images(folder: Path, split: Split) -> Listing:
    """The images of one split of `folder`: class folders (at any depth inside them), or flat.

    With a `val` subfolder, `val` is what lies in it, and `train` is all the rest: the `train` subfolder, or
    where there is none, all outside `val`. Without one, a fifth of each class is `val`, chosen by the hash of
    the names, so that every run, machine and order of listing agrees; `train` is the other four fifths.
    A folder with images beside its class folders counts as flat. Raises BadInput if the split is empty, or if
    `train` and `val` have not the same classes.
    """
    if not folder.is_dir():
        raise BadInput(f"data folder {str(folder)!r} is {'not a folder' if folder.exists() else 'missing'}",
                       expected="a folder of JPEG or PNG images", mend="Check the path given with --data.")
    splits = _splits(folder)
    chosen = splits[split]
    if not chosen:
        raise BadInput(f"data folder {str(folder)!r} without images to {split} on",
                       expected="JPEG or PNG files, in class folders or flat",
                       mend="Check the path given with --data.")
    paths = tuple(image.path for image in chosen)
    classes = sorted({image.class_name for image in splits["train"] + splits["val"]})
    if "" in classes:
        return Listing(paths, None, None)
    _check_equal_classes(folder, splits)
    number = {name: index for index, name in enumerate(classes)}
    return Listing(paths, tuple(number[image.class_name] for image in chosen), tuple(classes))


def _check_equal_classes(folder: Path, splits: dict[Split, list[_Image]]) -> None:
    """What is held out of one folder may miss a class of fewer than five images; folders of their own may not."""
    train, val = ({image.class_name for image in splits[split]} for split in ("train", "val"))
    if (folder / "val").is_dir() and train != val:
        odd = [f"{len(names)} only in {split} ({', '.join(sorted(names)[:3])}{', ...' * (len(names) > 3)})"
               for split, names in (("train", train - val), ("val", val - train)) if names]
        raise BadInput(f"data folder {str(folder)!r} whose train and val classes differ: {' and '.join(odd)}",
                       expected="the same class folders in both", mend="Check their names, or add what is missing.")


def _splits(folder: Path) -> dict[Split, list[_Image]]:
    base = folder / "train" if (folder / "train").is_dir() else folder
    images, val = _images(base), folder / "val"
    if val.is_dir():
        return {"train": [image for image in images if not image.path.is_relative_to(val)], "val": _images(val)}
    by_class: dict[str, list[_Image]] = defaultdict(list)
    for image in sorted(images, key=lambda image: _digest(image.path.relative_to(base))):
        by_class[image.class_name].append(image)
    fifths = {name: len(group) // 5 for name, group in by_class.items()}
    return {"train": sorted(image for name, group in by_class.items() for image in group[fifths[name]:]),
            "val": sorted(image for name, group in by_class.items() for image in group[:fifths[name]])}


def _digest(path: Path) -> bytes:
    return blake2b(path.as_posix().encode(errors="surrogateescape")).digest()


def _images(base: Path) -> list[_Image]:
    found = [(path.relative_to(base).parts, path) for path in _walk(base)]
    return sorted(_Image(parts[0] if len(parts) > 1 else "", path) for parts, path in found)


def _walk(base: Path) -> Iterator[Path]:
    for directory, below, names in os.walk(base, onerror=_refuse, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".")]
        yield from (Path(directory, name) for name in names
                    if name.lower().endswith(SUFFIXES) and not name.startswith("."))


def _refuse(error: OSError) -> NoReturn:
    raise BadInput(f"data folder {error.filename!r} ({error.strerror})", expected="a folder that can be read",
                   mend="Check its permissions.")
