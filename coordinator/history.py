"""The swarm's figures so far, over time and over epochs: a pure function of the states seen, in bounded memory.

Thinning: a series has buckets of equal width, and keeps of each the last point. Once more than CAPACITY of them are
filled, the width doubles until they fit. So a series always spans the whole run, evenly, in at most CAPACITY points:
after a week it has one every 34 minutes, and in its first minutes every reading.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any

from pydantic import Field

from coordinator.swarm import SwarmState

CAPACITY = 512


@dataclass(frozen=True)
class Point:
    """What one reading said. Rounds and what was refused are the coordinator's counters, which never fall."""

    time: float  # Unix seconds
    epoch: int
    loss: float | None
    samples_per_second: float
    peers: int
    group_size: int
    consensus_distance: float | None
    averaged: int
    failed: int
    alone: int
    round_seconds: float | None
    refused_value: int
    refused_absent: int
    refused_message: int


@dataclass(frozen=True)
class Series:
    """Points in the order of their key, which the owner knows; `width` is that of a bucket, in the key's unit."""

    width: Annotated[int, Field(ge=1)] = 1  # what is read from a file is held to it
    points: tuple[Point, ...] = ()


@dataclass(frozen=True)
class History:
    """The same readings twice: by time (seconds), and by epoch, of which each has its newest reading."""

    over_time: Series = Series()
    over_epochs: Series = Series()


def remember(history: History, state: SwarmState) -> History:
    """`history` with `state`, a reading that succeeded."""
    point = _point(state)
    return History(_with(history.over_time, point, lambda point: point.time),
                   _with(history.over_epochs, point, lambda point: point.epoch))


def columns(history: History) -> dict[str, Any]:
    """For JSON: for each series the width of its buckets and a list for every field of Point.

    Epochs beyond the present one are left out: who claimed them is gone.
    """
    newest = history.over_time.points[-1].epoch if history.over_time.points else 0
    reached = tuple(point for point in history.over_epochs.points if point.epoch <= newest)
    return {"over_time": _columns(history.over_time),
            "over_epochs": _columns(Series(history.over_epochs.width, reached))}


def _point(state: SwarmState) -> Point:
    rounds, refused = state.counters.rounds, state.counters.refused
    return Point(
        time=state.time, epoch=state.epoch, loss=state.loss, samples_per_second=state.samples_per_second,
        peers=len(state.peers), group_size=state.group_size, consensus_distance=state.consensus_distance,
        averaged=rounds.averaged, failed=rounds.failed, alone=rounds.alone, round_seconds=state.round_seconds,
        refused_value=refused.value, refused_absent=refused.absent, refused_message=refused.message)


def _with(series: Series, point: Point, key: Callable[[Point], float]) -> Series:
    width, points = series.width, sorted((*series.points, point), key=key)
    while True:
        # the sort keeps the order of equal keys, so the newest of a bucket comes last and stays
        kept = {key(point) // width: point for point in points}
        if len(kept) <= CAPACITY:
            return Series(width, tuple(kept.values()))
        width *= 2


def _columns(series: Series) -> dict[str, Any]:
    return {"width": series.width,
            **{field.name: [getattr(point, field.name) for point in series.points] for field in fields(Point)}}
