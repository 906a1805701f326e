"""A peer's own Prometheus metrics, from its worker's events. docs/metrics.md has them all."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from averaging.records import BAD_VALUES
from averaging.version import VERSION
from proto.peer_pb2 import PeerStatus, WorkerEvent

HELP = {"epoch": "Collaborative epoch: updates of the model so far.",
        "loss": "Mean loss of the last epoch's micro-batches.",
        "samples_per_second": "Samples trained on here per second.",
        "learning_rate": "Learning rate of the last update.",
        "prototype_entropy": "How evenly prototypes are used, as a share of the maximum.",
        "train_top1_accuracy": "Top-1 accuracy on the last micro-batch.",
        "gpu_memory_used_bytes": "Memory of the GPU that the worker's PyTorch holds.",
        "knn_accuracy": "Accuracy of k-NN on the backbone's features of the validation images.",
        "top1_accuracy": "Top-1 accuracy on the validation images.",
        "top5_accuracy": "Top-5 accuracy on the validation images.",
        "val_loss": "Loss on the validation images."}
SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300)
disable_created_metrics()  # type: ignore[no-untyped-call]  # series of when others began, which nobody uses


class Figures:
    """A gauge covey_NAME for every figure that an objective or an evaluation gives a name."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry, self._gauges = registry, dict[str, Gauge]()

    def set(self, figures: Mapping[str, float]) -> None:
        """The newest values; the others stay."""
        for name, value in figures.items():
            if name not in self._gauges:
                said = HELP.get(name, "Its newest value.")
                self._gauges[name] = Gauge(f"covey_{name}", said, registry=self._registry)
            self._gauges[name].set(value)


class PeerMetrics:
    """Observes a supervisor (peer/supervisor.py) into `registry`. No label has unbounded values."""

    def __init__(self) -> None:
        self.registry = to = CollectorRegistry()
        self._epoch = Gauge("covey_epoch", HELP["epoch"], registry=to)
        self._epoch_samples = Gauge(
            "covey_epoch_samples", "Samples that the swarm has gathered towards the next epoch.", registry=to)
        self._loss = Gauge("covey_loss", "Training loss of the last micro-batch.", registry=to)
        self._samples = Counter("covey_samples", "Samples trained on here.", registry=to)
        self._rate = Gauge("covey_samples_per_second", HELP["samples_per_second"], registry=to)
        self._rounds = Counter(
            "covey_averaging_rounds", "Averaging rounds that ended.", ["kind", "outcome"], registry=to)
        self._duration = Histogram(
            "covey_averaging_duration_seconds", "From the wish to average to the result.", ["kind"],
            buckets=SECONDS, registry=to)
        self._matchmaking = Histogram(
            "covey_matchmaking_duration_seconds", "From the wish to average until the group began to.", ["kind"],
            buckets=SECONDS, registry=to)
        self._bytes = Counter("covey_network_bytes", "Tensors averaged, as encoded.", ["direction"], registry=to)
        self._rejected = Counter(
            "covey_rejected_contributions", "Contributions refused here, this peer's own included.", ["reason"],
            registry=to)
        for reason in BAD_VALUES:  # at 0 from the start: of a counter that begins at 1, Prometheus sees no rise
            self._rejected.labels(reason)
        self._group_size = Gauge("covey_group_size", "Peers in the last averaging round.", registry=to)
        self._state_load = Histogram(
            "covey_state_load_duration_seconds", "Downloads of the swarm's state that succeeded.",
            buckets=SECONDS, registry=to)
        self._checkpoint = Gauge("covey_checkpoint_last_success_timestamp_seconds",
                                 "Unix time of the last checkpoint; 0 before the first.", registry=to)
        self._figures = Figures(to)
        self._skipped = Counter("covey_skipped_images", "Unreadable images met by the workers.", registry=to)
        self._restarts = Counter("covey_worker_restarts", "Workers that failed.", registry=to)
        Gauge("covey_build_info", "The running version.", ["version"], registry=to).labels(VERSION).set(1)
        self._samples_seen = 0

    def event(self, event: WorkerEvent, status: PeerStatus) -> None:
        """See peer.supervisor.Observer."""
        match event.WhichOneof("event"):
            case "started":
                self._started(event.started)
            case "step":
                self._step(event.step)
            case "round":
                self._round(event.round)
            case "state_loaded" if event.state_loaded.succeeded:
                self._state_load.observe(event.state_loaded.seconds)
            case "checkpointed":
                self._checkpoint.set(event.checkpointed.time_seconds)
            case "evaluated":
                self._figures.set(event.evaluated.figures)
            case "skipped":
                self._skipped.inc()

    def restarting(self, exit_code: int, delay_seconds: float, status: PeerStatus) -> None:
        """See peer.supervisor.Observer."""
        self._restarts.inc()

    def _started(self, started: WorkerEvent.Started) -> None:
        self._samples_seen = 0  # a worker counts from its own start, the counter here goes on
        self._epoch.set(started.epoch)

    def _step(self, step: WorkerEvent.Step) -> None:
        self._epoch.set(step.epoch)
        self._epoch_samples.set(step.swarm_samples)
        self._loss.set(step.loss)
        self._figures.set({"learning_rate": step.learning_rate, **step.metrics})
        self._rate.set(step.samples_per_second)
        self._samples.inc(max(0, step.samples_total - self._samples_seen))  # steps in between may be missing
        self._samples_seen = step.samples_total

    def _round(self, ended: WorkerEvent.Round) -> None:
        self._rounds.labels(ended.kind, ended.outcome).inc()
        self._duration.labels(ended.kind).observe(ended.seconds)
        self._matchmaking.labels(ended.kind).observe(ended.matchmaking_seconds)
        self._bytes.labels("sent").inc(ended.bytes_sent)
        self._bytes.labels("received").inc(ended.bytes_received)
        for reason, count in ended.refused.items():
            self._rejected.labels(reason).inc(count)
        self._group_size.set(ended.group_size)
