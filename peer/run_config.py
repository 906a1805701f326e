"""What whoever runs `covey train` decides. Imports no torch."""

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from peer.machine_config import Machine


class RunConfig(Machine):
    """Options of `covey train`, the same in all its processes.

    But for the batch size (of each process), which BatchNorm sees, none changes what is trained.
    """

    run_dir: Path = Field(
        description="folder of this run's checkpoints and records, made if it is not there; a run that was "
        "cut short goes on from its newest checkpoint")
    log: tuple[str, ...] = Field(
        ("csv",), description="what records every epoch, separated by commas: csv (metrics.csv in the run's folder), "
        "prometheus (at --metrics-port), tensorboard, wandb")
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="serve /metrics for Prometheus at this TCP port, on loopback; 0 for any free "
        "one")

    @field_validator("log", mode="before")
    @classmethod
    def _separated_by_commas(cls, log: Any) -> Any:
        return tuple(name for name in log.split(",") if name) if isinstance(log, str) else log

    @property
    def checkpoints(self) -> Path:
        """Folder of this run's checkpoints."""
        return self.run_dir / "checkpoints"

    @property
    def loggers(self) -> tuple[str, ...]:
        """What records every epoch, each once."""
        return tuple(dict.fromkeys((*self.log, *(["prometheus"] if self.metrics_port is not None else []))))
