"""What a daemon hands to its worker, by files in the state directory.

The daemon writes `job.json`, `experiment.json`, `token` and `bans`, renews the last two (`job.json` where there are
other coordinators than before), and runs

    python -m peer.worker STATE_DIR --events-fd N --parent-pid PID

The worker calls `read_job(STATE_DIR)`, reports through `peer.events.EventWriter(N)`, and dies with the
process PID (`averaging.process.die_with_parent`). SIGTERM asks it to leave in good order. Exit codes:
0 after a Finished event, 2 after a Refused event (a restart would not help); the daemon restarts it after
any other. Imports no torch.
"""

import json
from pathlib import Path

from pydantic import Field

from averaging.bans import BanFile
from peer.config import PeerConfig
from training.config import Config
from training.errors import BadInput


class Job(Config):
    """One volunteer's part in one experiment. `experiment` travels beside it, byte for byte."""

    run_id: str = Field(description="the run: recipe name and the head of the fingerprint")
    fingerprint: str = Field(description="SHA-256 of `experiment`, hexadecimal")
    authority: str = Field(description="public key of the run's authority, in OpenSSH's format")
    initial_peers: list[str] = Field(description="multiaddresses of DHT nodes to start from")
    coordinators: list[str] = Field([], description="links of all that let volunteers in, as of the last enrolment")
    experiment: bytes = Field(exclude=True, description="the experiment as canonical JSON: "
                              "averaging.experiment.parse() makes an Experiment of it")
    config: PeerConfig = Field(description="what this volunteer decided")


def write_job(job: Job) -> None:
    """Puts `job` into its state directory, each file whole or not at all."""
    _replace(job.config.state_dir / "experiment.json", job.experiment)
    _replace(job.config.state_dir / "job.json", job.model_dump_json(indent=1).encode())


def read_job(state_dir: Path) -> Job:
    """The job that a daemon left in `state_dir`. Raises BadInput if it is missing or not of this version."""
    try:
        tree = json.loads((state_dir / "job.json").read_bytes())
        return Job.model_validate({**tree, "experiment": (state_dir / "experiment.json").read_bytes()})
    except (OSError, ValueError, TypeError) as error:  # pydantic's ValidationError is a ValueError
        raise BadInput(f"{state_dir}: {error}", expected="a job that `covey join` left here",
                       mend="Start it by `covey join`.") from None


def keep_membership(job: Job, token: bytes, bans: bytes) -> None:
    """Put the token, and the authority's list of bans if it is newer, where the worker looks for them."""
    _replace(job.config.token_path, token)
    ban_file(job).offer(bans)


def read_token(job: Job) -> bytes:
    """The newest; empty if there is none."""
    try:
        return job.config.token_path.read_bytes()
    except OSError:
        return b""


def keep_contribution(job: Job, signed: bytes) -> None:
    """Put the coordinator's word on what this peer is credited with where it is found after a restart."""
    _replace(job.config.state_dir / "contribution", signed)


def read_contribution(job: Job) -> bytes:
    """The last; empty if there is none."""
    try:
        return (job.config.state_dir / "contribution").read_bytes()
    except OSError:
        return b""


def ban_file(job: Job) -> BanFile:
    """Whom the authority has banned."""
    return BanFile(job.config.bans_path, job.authority.encode(), job.run_id)


def _replace(path: Path, content: bytes) -> None:
    draft = path.with_suffix(".tmp")
    draft.write_bytes(content)
    draft.replace(path)
