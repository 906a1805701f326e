"""docs/metrics.md says what is exported, and nothing else; the design's list is in it."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from averaging.records import PeerRecord
from coordinator.archive import Archive, Evaluation
from coordinator.metrics import FIGURES, coordinator_registry
from coordinator.swarm import Peer, SwarmState
from coordinator.view import About, Seen
from peer.metrics import HELP, PeerMetrics
from proto.peer_pb2 import PeerStatus, WorkerEvent

DOCUMENT = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
ROW = re.compile(r"^\| `(covey_\w+)` \| (\w+) \| (.*?) ?\| (.+) \|$", re.MULTILINE)
BOTH = {"covey_epoch", "covey_loss", "covey_epoch_samples", "covey_samples_total", "covey_averaging_rounds_total",
        "covey_averaging_duration_seconds", "covey_rejected_contributions_total", "covey_group_size",
        "covey_build_info"}
COORDINATORS = {"covey_target_batch_size", "covey_peers", "covey_peer_joins_total", "covey_peer_departures_total",
                "covey_auth_failures_total", "covey_checkpoint_last_success_timestamp_seconds"}
PEERS = {"covey_matchmaking_duration_seconds", "covey_network_bytes_total",
         "covey_state_load_duration_seconds", "covey_checkpoint_last_success_timestamp_seconds",
         "covey_gpu_memory_used_bytes"}
Metrics = dict[str, tuple[str, frozenset[str]]]  # type and labels, by name


def documented(heading: str) -> Metrics:
    """The table under it."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## )", DOCUMENT, re.MULTILINE | re.DOTALL)
    rows = ROW.findall(section)
    assert len(rows) == section.count("| `covey_")
    return {name: (kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels, _ in rows}


def exported(registry: CollectorRegistry) -> Metrics:
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {family.name + "_total" * (family.type == "counter"):
            (family.type, frozenset(label for sample in family.samples for label in sample.labels) - {"le"})
            for family in families}


def a_coordinator() -> CollectorRegistry:
    """Of a swarm of two, of which all is known."""
    about = About(run_id="tiny-0", link="", version="0.1.0", target_batch_size=256, target_group_size=2,
                  averaged="gradients")
    peers = {name: Peer(PeerRecord(
        peer_id=name, name=name, state="training", epoch=1, samples_accumulated=0, samples_total=0, loss=2.5,
        samples_per_second=1.0, group_size=2, version="0.1.0", device="cpu", client_mode=False, time=0.0,
        sketch=bytes(136)), heard=0.0) for name in ("ada", "grace")}
    state = SwarmState(peers=peers, epoch=1)
    archive = Archive(epoch=1, evaluations=(Evaluation(1, dict.fromkeys(FIGURES, 0.5)),))
    return coordinator_registry(lambda: Seen(state, archive), about, clock=lambda: 0.0,
                                replicas=lambda: {"host:31338": 0.0})


def a_peer() -> CollectorRegistry:
    """Whose worker has reported all that a worker can."""
    metrics = PeerMetrics()
    figures = HELP.keys() - {"epoch", "loss", "samples_per_second"}  # which have gauges of their own
    for event in (WorkerEvent(evaluated=WorkerEvent.Evaluated(figures=dict.fromkeys(figures, 0.5))),
                  WorkerEvent(round=WorkerEvent.Round(kind="gradients", outcome="averaged", bytes_sent=1))):
        metrics.event(event, PeerStatus())
    return metrics.registry


@pytest.mark.parametrize(("heading", "registry"), [("On the coordinator", a_coordinator), ("On a peer", a_peer)],
                         ids=["coordinator", "peer"])
def test_the_document_has_every_metric_with_its_type_and_labels(
        heading: str, registry: Callable[[], CollectorRegistry]) -> None:
    assert documented(heading) == exported(registry())


def test_the_designs_list_is_there_on_whom_it_concerns() -> None:
    assert documented("On the coordinator").keys() >= BOTH | COORDINATORS
    assert documented("On a peer").keys() >= BOTH | PEERS
