"""What the peers of a bench swarm saw, and figures of it. The clock is the machine's: the same in all processes."""

from bisect import bisect_left
from dataclasses import dataclass, field
from statistics import mean

from averaging.records import RoundEnd, StateLoad

WARM_UP_EPOCHS = 2  # which count nowhere


@dataclass(frozen=True)
class Step:
    """One call of `step`."""

    entered: float
    left: float
    epoch: int  # after it


@dataclass(frozen=True)
class Update:
    """What the gradient of an update was made of."""

    epoch: int                 # that it ended
    lowest: tuple[float, ...]  # share of each peer, in the row where it is lowest
    highest: tuple[float, ...]


@dataclass
class Track:
    """What one peer saw."""

    steps: list[Step] = field(default_factory=list)
    rounds: list[RoundEnd] = field(default_factory=list)
    loads: list[StateLoad] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    loopback: dict[int, int] = field(default_factory=dict)  # bytes that it had carried when an epoch began

    def ends(self) -> dict[int, Step]:
        """The step that ended each epoch, of those that this peer ended by an update."""
        pairs = zip(self.steps, self.steps[1:], strict=False)
        return {before.epoch: after for before, after in pairs if after.epoch == before.epoch + 1}


@dataclass(frozen=True)
class Seen:
    """What all peers saw in `epochs` collaborative epochs after the warm-up."""

    tracks: list[Track]
    epochs: int

    def _windows(self) -> list[list[Step]]:
        """Each peer's steps from the one that ended the warm-up to the one that ended the last epoch."""
        windows = []
        for track in self.tracks:
            epochs = [step.epoch for step in track.steps]
            first, last = (bisect_left(epochs, epoch) for epoch in (WARM_UP_EPOCHS, WARM_UP_EPOCHS + self.epochs))
            windows.append(track.steps[first:last + 1])
        return windows

    def latencies(self) -> list[float]:
        """Seconds from when the last peer came to the end of an epoch until all were through, of each epoch.

        Only of those that all peers ended by an update of their own.
        """
        ends = [track.ends() for track in self.tracks]
        return [max(end[epoch].left for end in ends) - max(end[epoch].entered for end in ends)
                for epoch in range(WARM_UP_EPOCHS, WARM_UP_EPOCHS + self.epochs) if all(epoch in end for end in ends)]

    def waiting_share(self) -> float:
        """Of the peers' time: what they spent in `step`, that is not computing."""
        return mean(sum(step.left - step.entered for step in steps) / (steps[-1].left - first.left)
                    for first, *steps in self._windows())

    def epoch_seconds(self) -> float:
        """Mean over peers and epochs."""
        return mean((window[-1].left - window[0].left) / (window[-1].epoch - window[0].epoch)
                    for window in self._windows())

    def samples(self) -> float:
        """That all peers together gathered for an epoch, mean."""
        return sum((len(window) - 1) / (window[-1].epoch - window[0].epoch) for window in self._windows())

    def loopback_bytes(self) -> float:
        """That all peers together sent in an epoch: of tensors, of the DHT, of all else, headers included."""
        first, last = WARM_UP_EPOCHS, WARM_UP_EPOCHS + self.epochs
        return mean((track.loopback[last] - track.loopback[first]) / self.epochs for track in self.tracks
                    if {first, last} <= track.loopback.keys())

    def rounds(self) -> list[RoundEnd]:
        """Of all peers, those of the warm-up left out."""
        return [end for track in self.tracks for end in track.rounds
                if WARM_UP_EPOCHS <= end.epoch < WARM_UP_EPOCHS + self.epochs]
