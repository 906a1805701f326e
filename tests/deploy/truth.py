"""What a swarm's processes should export, as they tell it in other ways: JSON lines, control service, /api/swarm."""

from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import grpc
import psutil
from prometheus_server import Samples, sample_name
from swarm import Covey

from averaging.records import BAD_VALUES, PEER_MODES, PEER_STATES
from averaging.version import VERSION
from coordinator.metrics import FAILURES
from peer.control import socket_path
from proto.peer_pb2 import PeerStatus, PeerWatchRequest
from proto.peer_pb2_grpc import PeerStub


class Volunteer:
    """A peer, what its JSON lines and its control service say of it, and where it is scraped."""

    def __init__(self, covey: Covey, state_dir: Path) -> None:
        self.covey, (ready, *_) = covey, covey.wait_for("ready")
        self.url, self.worker = ready["metrics_url"], psutil.Process(ready["worker_pid"])
        self.instance, self.last = urlsplit(self.url).netloc, PeerStatus()
        self._socket = socket_path(state_dir)
        self._watching = Thread(target=self._watch, daemon=True)
        self._watching.start()

    def _watch(self) -> None:
        with grpc.insecure_channel(f"unix:{self._socket}") as channel:
            for status in PeerStub(channel).Watch(PeerWatchRequest(interval_seconds=0.2)):
                self.last = status

    def left(self) -> PeerStatus:
        """Its last status, once it has gone."""
        assert self.covey.process.wait(60) == 0, self.covey.last_words()
        self._watching.join(10)
        assert self.last.HasField("finished")
        return self.last

    def truth(self) -> Samples:
        """What it should export just now."""
        step = self.last.step
        figures: Samples = {
            "covey_epoch": step.epoch, "covey_epoch_samples": step.swarm_samples, "covey_loss": step.loss,
            "covey_samples_total": step.samples_total, "covey_samples_per_second": step.samples_per_second,
            "covey_learning_rate": step.learning_rate, "covey_group_size": self.last.group_size,
            "covey_prototype_entropy": step.metrics["prototype_entropy"], "covey_skipped_images_total": 0,
            "covey_worker_restarts_total": self.last.worker_restarts,
            "covey_checkpoint_last_success_timestamp_seconds": self.last.checkpoint.time_seconds}
        loads = self.covey.all("state_loaded", succeeded=True)
        return {**{sample_name(name): value for name, value in figures.items()}, **self._rounds(),
                **summed("covey_state_load_duration_seconds", loads, "seconds"),
                sample_name("covey_build_info", version=VERSION): 1}

    def _rounds(self) -> Samples:
        rounds, kind = self.covey.all("round"), "gradients"
        outcomes = {ended["outcome"] for ended in rounds}
        reasons = {*BAD_VALUES, *(reason for ended in rounds for reason in ended["refused"])}
        return {
            **{sample_name("covey_averaging_rounds_total", kind=kind, outcome=outcome):
               len(self.covey.all("round", outcome=outcome)) for outcome in outcomes},
            **{sample_name("covey_network_bytes_total", direction=direction):
               sum(ended[f"bytes_{direction}"] for ended in rounds) for direction in ("sent", "received")},
            **{sample_name("covey_rejected_contributions_total", reason=reason):
               sum(ended["refused"].get(reason, 0) for ended in rounds) for reason in reasons},
            **summed("covey_averaging_duration_seconds", rounds, "seconds", kind=kind),
            **summed("covey_matchmaking_duration_seconds", rounds, "matchmaking_seconds", kind=kind)}


def summed(name: str, events: list[dict[str, Any]], field: str, **labels: str) -> Samples:
    """A histogram's count and sum, had it observed the field of the events."""
    return {sample_name(f"{name}_count", **labels): len(events),
            sample_name(f"{name}_sum", **labels): sum(event[field] for event in events)}


def coordinators_truth(swarm: dict[str, Any]) -> Samples:
    """What a coordinator should export while this is its /api/swarm."""
    of_state = [(peer["state"], peer["mode"]) for peer in swarm["peers"]]
    figures = {"covey_epoch": swarm["epoch"], "covey_epoch_samples": swarm["epoch_samples"],
               "covey_loss": swarm["loss"], "covey_target_batch_size": swarm["target_batch_size"],
               "covey_samples_total": swarm["samples_total"], "covey_samples_per_second": swarm["samples_per_second"],
               "covey_group_size": swarm["group_size"], "covey_consensus_distance": swarm["consensus_distance"],
               "covey_peer_joins_total": swarm["joins"], "covey_credited_samples": swarm["credited_samples"],
               "covey_flagged_claims": swarm["flagged_claims"]}
    return {
        **{sample_name(name): value for name, value in figures.items() if value is not None},
        **{sample_name("covey_peers", state=state, mode=mode): of_state.count((state, mode))
           for state in PEER_STATES for mode in PEER_MODES},
        **{sample_name("covey_auth_failures_total", reason=reason): 0 for reason in FAILURES},
        **{sample_name("covey_peer_departures_total", reason=reason): swarm["departures"][reason]
           for reason in ("left", "lost")},
        **{sample_name("covey_averaging_rounds_total", kind="gradients", outcome=outcome): swarm["rounds"][outcome]
           for outcome in ("averaged", "failed", "alone")},
        **(archives_truth(swarm["archive"]) if swarm["archive"] else {}),
        **{sample_name(f"covey_averaging_duration_seconds_{of}", kind="gradients", outcome=outcome): value
           for outcome, seconds in swarm["seconds_in_rounds"].items()
           for of, value in (("count", swarm["rounds"][outcome]), ("sum", seconds))},
        **{sample_name("covey_rejected_contributions_total", reason=reason): value
           for reason, value in swarm["refused"].items()},
        sample_name("covey_build_info", version=VERSION): 1}


def archives_truth(archive: dict[str, Any]) -> Samples:
    """What it should export of its archive."""
    figures = archive["evaluations"][-1]["figures"] if archive["evaluations"] else {}
    return {
        sample_name("covey_checkpoint_last_success_timestamp_seconds"): archive["time_seconds"],
        **({} if archive["epoch"] is None else {sample_name("covey_checkpoint_epoch"): archive["epoch"]}),
        **{sample_name("covey_archive_failures_total", stage=stage): count
           for stage, count in archive["failures"].items()},
        **{sample_name(f"covey_{name}"): value for name, value in figures.items()}}
