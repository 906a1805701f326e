"""/metrics on loopback, for Prometheus to scrape: the figures of the last epoch as covey_<name>."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from averaging.version import VERSION
from coordinator.ports import port_taken
from peer.loggers.logger import METRICS_HOST, Run
from peer.metrics import Figures


def open_logger(run: Run) -> "PrometheusLogger":
    return PrometheusLogger(run.metrics_port)


class PrometheusLogger:
    """Serves `registry` at `where` from a thread. Raises BadInput if the port can't be had."""

    def __init__(self, port: int) -> None:
        self.registry = CollectorRegistry()
        self._figures = Figures(self.registry)
        self._samples = Counter("covey_samples", "Samples trained on", registry=self.registry)
        self._samples_seen = 0.0
        Gauge("covey_build_info", "1", ["version"], registry=self.registry).labels(VERSION).set(1)
        try:
            self._server, self._thread = start_http_server(port, METRICS_HOST, self.registry)
        except OSError as error:
            raise port_taken(METRICS_HOST, port, "metrics", error.strerror or str(error)) from None
        self.where = f"http://{METRICS_HOST}:{self._server.server_port}/metrics"

    def update(self, values: Mapping[str, float], epoch: int) -> None:
        gauges = {"epoch": epoch, **values}
        samples = gauges.pop("samples_total", self._samples_seen)
        self._samples.inc(max(0.0, samples - self._samples_seen))
        self._samples_seen = samples
        self._figures.set(gauges)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
