"""What a daemon hands to its worker, by two files in the state directory.

The daemon writes `job.json` and `experiment.json`, then runs

    python -m peer.worker STATE_DIR --events-fd N --parent-pid PID

The worker calls `read_job(STATE_DIR)`, reports through `peer.events.EventWriter(N)`, and dies with the
process PID (`averaging.process.die_with_parent`). SIGTERM asks it to leave in good order. Exit codes:
0 after a Finished event, 2 after a Refused event (a restart would not help); the daemon restarts it after
any other. Imports no torch.
"""

import json
from pathlib import Path

from pydantic import Field

from peer.config import PeerConfig
from training.config import Config
from training.errors import BadInput


class Job(Config):
    """One volunteer's part in one experiment. `experiment` travels beside it, byte for byte."""

    run_id: str = Field(description="the run: recipe name and the head of the fingerprint")
    fingerprint: str = Field(description="SHA-256 of `experiment`, hexadecimal")
    initial_peers: list[str] = Field(description="multiaddresses of DHT nodes to start from")
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


def _replace(path: Path, content: bytes) -> None:
    draft = path.with_suffix(".tmp")
    draft.write_bytes(content)
    draft.replace(path)
