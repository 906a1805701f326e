"""A volunteer's identity in a file of its own: what a new machine needs to be the same volunteer."""

import base64
import json
import os
from pathlib import Path

from pydantic import Field, ValidationError

from averaging.identity import parse_key, peer_id_of, public_bytes, read_key
from averaging.private_file import write_private
from coordinator.state_dir import open_state_dir
from peer.daemon import default_state_dir
from training.config import Config
from training.errors import BadInput


class Kept(Config):
    """The file's content."""

    run_id: str = Field(pattern="^[a-z0-9][a-z0-9_-]{0,63}$", description="the run that this identity takes part in; "
                        "part of a path")
    peer_id: str = Field(description="for people: whose key it is")
    key: str = Field(description="identity.key, base64")


def export_to(file: Path, state_dir: Path | None) -> str:
    """Write the identity of the peer of `state_dir`, or of the only one here, to `file`; the peer id.

    Raises BadInput if there is none, or if there is such a file already.
    """
    folder = (state_dir or _only_one()).expanduser().absolute()
    path = folder / "identity.key"
    peer_id = peer_id_of(public_bytes(read_key(path)))
    try:
        owner = json.loads((folder / "owner.json").read_bytes())
        if owner["role"] != "peer":
            raise ValueError(f"of a {owner['role']}")
        kept = Kept(run_id=owner["run_id"], peer_id=peer_id, key=base64.b64encode(path.read_bytes()).decode())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder} ({str(error).splitlines()[0]})", expected="a peer's state directory",
                       mend="Choose with --state-dir.") from None
    try:
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            out.write(kept.model_dump_json(indent=1) + "\n")
    except OSError as error:
        raise BadInput(f"{file} ({error.strerror})", expected="a new file, in a folder that can be written",
                       mend="Choose another name.") from None
    return peer_id


def import_from(file: Path, state_dir: Path | None) -> tuple[str, Path]:
    """Put the identity in `file` into `state_dir`, or where `covey join` looks first; the peer id, and where.

    Raises BadInput if `file` holds none, or if another identity is there.
    """
    try:
        kept = Kept.model_validate_json(file.read_bytes())
        data = base64.b64decode(kept.key, validate=True)
        peer_id = peer_id_of(public_bytes(parse_key(data)))
    except (OSError, ValidationError, ValueError) as error:
        raise BadInput(f"{file} ({str(error).splitlines()[0]})", expected="what `covey identity export` wrote",
                       mend="Choose that file.") from None
    with open_state_dir(state_dir or default_state_dir(kept.run_id, 1), role="peer", run_id=kept.run_id) as folder:
        path = folder / "identity.key"
        if path.exists() and path.read_bytes() != data:
            raise BadInput(f"another identity in {folder}", expected="none, or the same",
                           mend="Export that one first, then remove its identity.key; or choose with --state-dir.")
        write_private(path, data)
    return peer_id, folder


def _only_one() -> Path:
    """The state directory of this user's only peer, whether it runs or not."""
    found = sorted({path.parent for path in default_state_dir("x", 1).parent.glob("*/identity.key")
                    if path.parent.name != "coordinator"})
    if len(found) != 1:
        raise BadInput(f"{len(found)} peers' state directories here" + "".join(f", {path}" for path in found),
                       expected="one, to know which is meant", mend="Choose with --state-dir.")
    return found[0]
