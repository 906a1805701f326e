"""Debian's Prometheus, as a process of the test's own, on a free port."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from processes import until

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="needs prometheus and promtool (Debian's package prometheus)")
LISTENING = re.compile(r'msg="Listening on" address=(\S+)')
Samples = dict[str, float]  # by name and labels, as in 'covey_peers{mode="direct",state="training"}'


class Server:
    """Its HTTP API at `url`; `since` is when it was started (Unix seconds)."""

    def __init__(self, url: str) -> None:
        self.url, self.since = url, time.time()

    def ask(self, path: str, **parameters: Any) -> Any:
        """The data of an answer."""
        with urlopen(f"{self.url}/api/v1/{path}?{urlencode(parameters)}", timeout=10) as answer:
            return json.load(answer)["data"]

    def now(self, expression: str) -> list[dict[str, Any]]:
        """What `expression` gives now: each a "metric" and a "value", as [time, text]."""
        return list(self.ask("query", query=expression)["result"])

    def over_time(self, expression: str) -> list[float]:
        """All values that `expression` took since the start, of all its series."""
        found = self.ask("query_range", query=expression, start=self.since, end=time.time(), step=1)["result"]
        return [float(value) for series in found for _, value in series["values"]]

    def scraped(self, instance: str) -> Samples:
        """The newest samples of covey's, but for buckets, without the labels that Prometheus gives."""
        return {sample_name(**series["metric"]): float(series["value"][1])
                for series in self.now(f'{{__name__=~"covey_.*", __name__!~".*_bucket", instance="{instance}"}}')}

    def last_scrape(self, instance: str) -> float:
        """When (Unix seconds); 0 before the first."""
        return max((float(series["value"][1]) for series in self.now(f'timestamp(up{{instance="{instance}"}})')),
                   default=0.0)


def sample_name(__name__: str, *, job: str = "", instance: str = "", swarm: str = "", **labels: str) -> str:
    """A sample's key among `Samples`."""
    return __name__ + "{" + ",".join(f'{name}="{value}"' for name, value in sorted(labels.items())) + "}"


@contextmanager
def prometheus(config: Path, folder: Path) -> Iterator[Server]:
    """One that keeps its data and log in `folder` and ends with the context."""
    log = folder / "prometheus.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
             "--web.listen-address=127.0.0.1:0"], stdout=errors, stderr=errors, start_new_session=True)
    try:
        def is_ready() -> bool:
            assert process.poll() is None, log.read_text()[-2000:]
            return bool(LISTENING.search(log.read_text())) and "Server is ready" in log.read_text()  # in any order
        until(is_ready, "Prometheus is ready")
        yield Server(f"http://{LISTENING.findall(log.read_text())[0]}")
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
