"""Real processes for the tests of this folder: a coordinator and volunteers, as a user starts them."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from processes import is_running, until

from coordinator.link import parse_link

RECIPE = str(Path(__file__).parent / "tiny.toml")
DEADLINE = 120.0
Event = dict[str, Any]


class Covey:
    """One `covey` command that runs, its JSON lines gathered as they come."""

    def __init__(self, arguments: Sequence[str], log: Path, **environment: str) -> None:
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "peer.cli", *arguments, "--json"], stdout=subprocess.PIPE, stderr=errors,
                text=True, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
        self.log, self.events = log, list[Event]()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.append(json.loads(line))

    def all(self, name: str, since: int = 0, **fields: object) -> list[Event]:
        """The events called `name` with these fields, from the `since`th event on."""
        return [event for event in self.events[since:] if event["event"] == name
                and all(event[field] == value for field, value in fields.items())]

    def wait_for(self, name: str, count: int = 1, since: int = 0, **fields: object) -> list[Event]:
        def there() -> bool:
            assert self.process.poll() is None or len(self.all(name, since, **fields)) >= count, self.last_words()
            return len(self.all(name, since, **fields)) >= count
        until(there, f"{count} x {name} {fields} of {self.process.args}", DEADLINE)
        return self.all(name, since, **fields)

    def last_words(self) -> str:
        return f"{self.process.args} ended with {self.process.poll()}: {self.log.read_text()[-2000:]}"

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def family(self) -> list[psutil.Process]:
        """The command's process and all below it."""
        top = psutil.Process(self.process.pid)
        return [top, *top.children(recursive=True)]

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def end(self) -> None:
        """Have it leave, or else end it; nothing of it remains."""
        family = self.family() if self.alive else []
        if self.alive:
            self.signal(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(5)
        for process in family:
            if is_running(process.pid):
                process.kill()


class Swarm:
    """A coordinator and as many volunteers as a test asks for, shared by the tests of a module."""

    def __init__(self, folder: Path, recipe: str = RECIPE, overrides: Sequence[str] = (), *,
                 flags: Sequence[str] = (), archive_every_epochs: int = 0) -> None:
        self.folder, self._recipe = folder, recipe
        self._overrides = [*overrides, *flags, "--archive-every-epochs", str(archive_every_epochs)]
        self._coordinator: Covey | None = None
        self._volunteers: list[Covey] = []
        self._all: list[Covey] = []  # ever started
        self._ports = ["0", "0", "0"]

    def coordinator(self) -> Covey:
        """The coordinator, started (again) if it doesn't run."""
        if self._coordinator is None or not self._coordinator.alive:
            flags = [word for pair in zip(("--port", "--grpc-port", "--http-port"), self._ports, strict=True)
                     for word in pair]
            self._coordinator = Covey(
                ["coordinator", self._recipe, *self._overrides, "--listen", "127.0.0.1", *flags,
                 "--state-dir", str(self.folder / "coordinator")], self.folder / "coordinator.log")
            (ready,) = self._coordinator.wait_for("ready")
            self._ports[1] = str(parse_link(ready["link"]).port)  # so that the link stays good
        return self._coordinator

    @property
    def link(self) -> str:
        return str(self.coordinator().all("ready")[0]["link"])

    def volunteers(self, count: int, *more: str) -> list[Covey]:
        """`count` volunteers that train, topped up or sent home as need be."""
        self._volunteers = [one for one in self._volunteers if one.alive]
        while len(self._volunteers) > count:
            self._volunteers.pop().end()
        while len(self._volunteers) < count:
            self._volunteers.append(self.join(*more))
        for one in self._volunteers:
            one.wait_for("epoch")
        return list(self._volunteers)

    def join(self, *more: str, name: str | None = None, link: str | None = None) -> Covey:
        """One more volunteer, not waited for."""
        name = name or f"volunteer{len(self._all) + 1}"
        self._all.append(Covey(
            ["join", link or self.link, "--name", name, "--listen", "127.0.0.1", "--port", "0", "--http-port", "0",
             "--threads", "1", "--batch-size", "32", "--state-dir", str(self.folder / name), *more],
            self.folder / f"{name}.log"))
        return self._all[-1]

    def close(self) -> None:
        for one in [*self._all, *([self._coordinator] if self._coordinator else [])]:
            one.end()
