"""What lies in a folder of WebDataset tar shards: the manifest that `covey shards make` writes. Imports no torch."""

from hashlib import sha256
from pathlib import Path

from pydantic import Field, ValidationError

from training.atomic import move_into_place
from training.config import Config
from training.errors import BadInput

NAME = "index.json"


class Shard(Config):
    """One tar file."""

    name: str = Field(pattern=r"^[A-Za-z0-9_][\w.-]*\.tar$", description="of the file, in the manifest's folder")
    images: int = Field(ge=0, description="how many it holds")
    num_bytes: int = Field(gt=0, description="size of the file")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="digest of the file")


class Manifest(Config):
    """The shards of one split; written last, so that a folder with one is whole."""

    made: str = Field(description="digest of the source's listing and of the options, from which a making goes on")
    classes: tuple[str, ...] | None = Field(description="names that the .cls files count; none: no labels")
    shards: tuple[Shard, ...] = Field(min_length=1, description="in order: images are numbered through them")

    @property
    def images(self) -> int:
        """How many images all shards hold."""
        return sum(shard.images for shard in self.shards)


class Packing(Config):
    """How images are packed into shards: options of `covey shards make`."""

    images_per_shard: int = Field(4096, gt=0, description="images in a shard, at most")
    max_bytes: int = Field(1 << 30, gt=0, description="size of a shard in bytes, about, at most")
    shortest_side: int | None = Field(
        None, gt=0, description="shrink images whose shortest side is longer than this many pixels; none: pack every "
        "file as it is")
    seed: int = Field(0, ge=0, description="from which the order is drawn that mixes the classes")


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in `folder`; None where there is none, as in shards made elsewhere. BadInput for a broken one."""
    path = folder / NAME
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.errors()[0]["msg"]
        raise BadInput(f"manifest {str(path)!r} ({reason})", expected="what `covey shards make` wrote",
                       mend="Make the shards anew, or delete it to read them as plain WebDataset tars.") from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Puts `manifest` into `folder`, whole or not at all."""
    staged = folder / f".{NAME}.part"
    staged.write_text(manifest.model_dump_json(indent=1))
    move_into_place(staged, folder / NAME)


def digest(*parts: str) -> str:
    """SHA-256 of texts, told apart."""
    return sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()
