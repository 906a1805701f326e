"""The coordinator's metrics: the swarm's sums, read at every scrape. Rows per peer are JSON, not labels."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from types import MappingProxyType

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from averaging.records import PEER_MODES, PEER_STATES
from coordinator.archive import STAGES, Archive
from coordinator.credit_ledger import Leaderboard
from coordinator.swarm import Counters, SwarmState
from coordinator.view import About, Seen, is_fresh

# of coordinator.authority and coordinator.replica
FAILURES = ("admin token", "banned", "clock", "invite", "key", "rate", "replica", "signature")
FIGURES = {"knn_accuracy": "k-NN accuracy of the newest evaluated checkpoint's backbone.",
           "top1_accuracy": "Top-1 accuracy of the newest evaluated checkpoint.",
           "top5_accuracy": "Top-5 accuracy of the newest evaluated checkpoint.",
           "val_loss": "Loss of the newest evaluated checkpoint on the validation images."}

ANEW = SwarmState()


class SwarmCollector(Collector):
    """`seen()` as metric families. What changes from moment to moment is absent when the reading is old.

    Counters begin at 0 with the process, whatever was counted `before`: Prometheus takes one that fell for a new one.
    """

    def __init__(self, seen: Callable[[], Seen], about: About, failures: Mapping[str, int], *,
                 clock: Callable[[], float], before: SwarmState) -> None:
        self.seen, self.about, self.failures, self.clock, self.before = seen, about, failures, clock, before

    def collect(self) -> Iterator[Metric]:
        """One scrape."""
        seen = self.seen()
        state = seen.state
        yield _gauge("covey_build_info", "The running version.", 1, version=self.about.version)
        yield _gauge("covey_target_batch_size", "Samples that make a collaborative epoch.",
                     self.about.target_batch_size)
        yield from _churn(self.before, state)
        yield from _counters(Counters().grown(self.before.counters, state.counters), self.about.averaged)
        yield _failures(self.failures)
        if seen.archive:
            yield from _archive(seen.archive)
        yield from _credits(seen.leaderboard)
        if is_fresh(state, self.clock()):
            yield from _gauges(state)


class ReplicaCollector(Collector):
    """How far this coordinator is in step with the others of its run: `heard()`, for each, few as they are."""

    def __init__(self, heard: Callable[[], Mapping[str, float]]) -> None:
        self.heard = heard

    def collect(self) -> Iterator[Metric]:
        """One scrape."""
        family = GaugeMetricFamily("covey_replica_last_success_timestamp_seconds",
                                   "Unix time at which another coordinator of the run last told what it knows; 0: not "
                                   "since the start.", labels=["coordinator"])
        for address, time_seconds in self.heard().items():
            family.add_metric([address], time_seconds)
        yield family


def coordinator_registry(seen: Callable[[], Seen], about: About, clock: Callable[[], float] = time.time, *,
                         failures: Mapping[str, int] = MappingProxyType({}),
                         replicas: Callable[[], Mapping[str, float]] = dict,
                         before: SwarmState = ANEW) -> CollectorRegistry:
    """A registry of its own with the swarm's metrics; `clock` gives Unix seconds, `failures` who was not let in.

    `replicas()` is when the other coordinators were last heard, by HOST:PORT. `before` is the state that the process
    began with.
    """
    registry = CollectorRegistry()
    registry.register(SwarmCollector(seen, about, failures, clock=clock, before=before))
    registry.register(ReplicaCollector(replicas))
    return registry


def _failures(failures: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily("covey_auth_failures_total", "Calls that were not let in.", labels=["reason"])
    for reason in FAILURES:
        family.add_metric([reason], failures.get(reason, 0))
    return family


def _archive(archive: Archive) -> Iterator[Metric]:
    yield _gauge("covey_checkpoint_last_success_timestamp_seconds", "Unix time of the newest checkpoint in the "
                 "archive; 0: there is none.", archive.time)
    if archive.epoch is not None:
        yield _gauge("covey_checkpoint_epoch", "Collaborative epoch of the newest checkpoint in the archive.",
                     archive.epoch)
    failures = CounterMetricFamily("covey_archive_failures_total", "What the archive could not do; it tries again.",
                                   labels=["stage"])
    for stage in STAGES:
        failures.add_metric([stage], archive.failures.get(stage, 0))
    yield failures
    for name, value in (archive.evaluations[-1].figures if archive.evaluations else {}).items():
        if name in FIGURES:
            yield _gauge(f"covey_{name}", FIGURES[name], value)


def _credits(leaderboard: Leaderboard) -> Iterator[Metric]:
    yield _gauge("covey_credited_samples", "Samples in completed rounds that volunteers are credited with, over all "
                 "time.", leaderboard.samples)
    yield _gauge("covey_flagged_claims", "Epochs in which a volunteer claimed more samples than its group saw, over "
                 "all time.", leaderboard.flagged)


def _churn(before: SwarmState, state: SwarmState) -> Iterator[Metric]:
    yield CounterMetricFamily("covey_peer_joins_total", "Peers that came, or came back.",
                              value=state.joins - before.joins)
    departures = CounterMetricFamily("covey_peer_departures_total", "Peers that left, or were lost.",
                                     labels=["reason"])
    departures.add_metric(["left"], state.left - before.left)
    departures.add_metric(["lost"], state.lost - before.lost)
    yield departures


def _counters(counters: Counters, kind: str) -> Iterator[Metric]:
    yield CounterMetricFamily("covey_samples_total", "Samples that peers reported as processed.",
                              value=counters.samples)
    rounds = CounterMetricFamily("covey_averaging_rounds_total", "Averaging rounds, counted by every member.",
                                 labels=["kind", "outcome"])
    for outcome, value in asdict(counters.rounds).items():
        rounds.add_metric([kind, outcome], value)
    yield rounds
    durations = SummaryMetricFamily("covey_averaging_duration_seconds", "From the wish to average to the result, "
                                    "counted by every member.", labels=["kind", "outcome"])
    for outcome, seconds in asdict(counters.seconds).items():
        durations.add_metric([kind, outcome], getattr(counters.rounds, outcome), seconds)
    yield durations
    rejected = CounterMetricFamily("covey_rejected_contributions_total", "Contributions that peers refused, counted "
                                   "by every peer that did.", labels=["reason"])
    for reason, value in asdict(counters.refused).items():
        rejected.add_metric([reason], value)
    yield rejected


def _gauges(state: SwarmState) -> Iterator[Metric]:
    yield _gauge("covey_epoch", "Collaborative epoch: updates of the model so far.", state.epoch)
    yield _gauge("covey_epoch_samples", "Samples gathered towards the next epoch.", state.epoch_samples)
    yield _gauge("covey_samples_per_second", "Samples that the swarm processes per second.",
                 state.samples_per_second)
    yield _gauge("covey_group_size", "Peers in the largest of the last averaging rounds.", state.group_size)
    if state.loss is not None:
        yield _gauge("covey_loss", "Mean training loss of the last finished epoch.", state.loss)
    if (distance := state.consensus_distance) is not None:
        yield _gauge("covey_consensus_distance", "Root mean square distance of the peers' parameters from their mean, "
                     "in the newest epoch; estimated.", distance)
    present = Counter((peer.record.state, peer.record.mode) for peer in state.peers.values())
    peers = GaugeMetricFamily("covey_peers", "Live peers; clients accept no incoming connections, auxiliaries only "
                              "help to average.", labels=["state", "mode"])
    for labels in ((name, mode) for name in PEER_STATES for mode in PEER_MODES):
        peers.add_metric(labels, present[labels])
    yield peers


def _gauge(name: str, documentation: str, value: float, **labels: str) -> Metric:
    family = GaugeMetricFamily(name, documentation, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family
