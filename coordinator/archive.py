"""The archive as the coordinator knows it: what it holds, how good that is, and what went wrong. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STAGES = ("download", "disk", "evaluation", "upload", "crash")  # at which it can fail
MOST_EVALUATIONS = 200


@dataclass(frozen=True)
class ArchiveOptions:
    """What the operator wants of the archive."""

    every_epochs: int
    keep_last: int = 3
    evaluate: bool = False
    data: Path | None = None  # folder of images
    hub: str = ""  # repository to upload to; empty: none


@dataclass(frozen=True)
class Evaluation:
    """How good the checkpoint of `epoch` is: k-NN, or top-1 and the like, by the names of training.evaluation."""

    epoch: int
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Archive:
    """The newest good checkpoint, and what became of all."""

    epoch: int | None = None  # of the newest checkpoint; None: there is none, or it is not checked yet
    time: float = 0.0         # when that was written, Unix seconds
    sha256: str = ""          # of its tensor file, hexadecimal
    uploaded_epoch: int | None = None  # the newest that the hub has taken since the start
    evaluations: tuple[Evaluation, ...] = ()  # by epoch, also of checkpoints that are gone
    failures: Mapping[str, int] = field(default_factory=dict)  # by stage, since the start
    last_error: str = ""      # for people; empty once that stage has succeeded again


def with_evaluation(evaluations: tuple[Evaluation, ...], new: Evaluation) -> tuple[Evaluation, ...]:
    """With one more, in order; where there are too many, every second of the earlier ones goes."""
    together = tuple(sorted([*(one for one in evaluations if one.epoch != new.epoch), new], key=lambda one: one.epoch))
    return together if len(together) <= MOST_EVALUATIONS else together[::-2][::-1]


def archive_view(archive: Archive | None) -> dict[str, Any] | None:
    """The fields of `covey.v1.SwarmSnapshot.Archive`, by name; None where no archive is kept."""
    if archive is None:
        return None
    return {
        "epoch": archive.epoch,
        "time_seconds": archive.time,
        "sha256": archive.sha256,
        "uploaded_epoch": archive.uploaded_epoch,
        "evaluations": [{"epoch": one.epoch, "figures": dict(one.figures)} for one in archive.evaluations],
        "failures": {stage: archive.failures.get(stage, 0) for stage in STAGES},
        "last_error": archive.last_error,
    }
