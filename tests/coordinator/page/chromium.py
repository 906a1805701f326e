"""Debian's Chromium, headless, driven by the DevTools protocol: one tab, in a process that is always ended."""

import base64
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from processes import until
from websockets.sync.client import ClientConnection, connect

CHROMIUM = shutil.which("chromium")
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
           "--disable-component-update", "--disable-sync", "--disable-extensions", "--disable-dev-shm-usage",
           "--hide-scrollbars", "--remote-debugging-port=0", "--remote-debugging-address=127.0.0.1", "about:blank")

# Expressions in the status page.
FIRST = "document.querySelector('#tiles dd') !== null"
DRAWN = ("(([...charts]) => charts.some((chart) => chart.querySelector('.main-svg')) && "
         "charts.every((chart) => chart.hidden || chart.querySelector('.main-svg')))"
         "(document.querySelectorAll('#charts .chart'))")
LIVE = "document.getElementById('connection').dataset.state === 'live'"
WARNED = "!document.getElementById('notice').hidden"
TILES = ("Object.fromEntries([...document.querySelectorAll('main dl > div')].filter((box) => !box.hidden)"
         ".map((box) => [box.dataset.name, [...box.querySelectorAll('.value, .note')].map((dd) => dd.innerText)]))")
TABLE = "[...document.querySelectorAll('#%s tbody tr')].map((row) => [...row.cells].map((cell) => cell.innerText))"
ROWS, LEADERBOARD = TABLE % "peers", TABLE % "leaderboard"


class Tab:
    """A tab. `events` are all that the browser told of it, the oldest first."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection, self._last = connection, 0
        self.events: list[dict[str, Any]] = []
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """The answer to a DevTools command."""
        self._last += 1
        self._connection.send(json.dumps({"id": self._last, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._connection.recv(timeout=60))
            if message.get("id") == self._last:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self.events.append(message)

    def open(self, url: str) -> None:
        """Load the document at `url`, and forget what was told of pages before; its scripts may still be loading."""
        self.call("Page.navigate", url="about:blank")
        self.events.clear()
        self.call("Page.navigate", url=url)
        self.wait("document.body !== null && document.readyState !== 'loading'", url)

    def js(self, expression: str) -> Any:
        """Its value in the page; a promise is awaited."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, f"{expression}: {result}"
        return result["result"].get("value")

    def text(self, selector: str) -> str:
        """What the first element that matches says, as it is seen; empty if there is none."""
        return str(self.js(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def wait(self, condition: str, what: str, seconds: float = 60.0) -> None:
        """Until `condition`, an expression in the page, holds."""
        until(lambda: self.js(condition), what, seconds)

    def told(self, method: str) -> list[dict[str, Any]]:
        """The parameters of all events of one kind."""
        return [event["params"] for event in self.events if event.get("method") == method]

    def complaints(self) -> list[str]:
        """Errors and warnings: exceptions, the console's, violated policies, and what could not be loaded."""
        said = [event["exceptionDetails"]["text"] for event in self.told("Runtime.exceptionThrown")]
        said += [str(event["args"]) for event in self.told("Runtime.consoleAPICalled")
                 if event["type"] in ("error", "warning", "assert")]
        return said + [event["entry"]["text"] for event in self.told("Log.entryAdded")
                       if event["entry"]["level"] in ("error", "warning")]

    def look(self, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
        """A window of that size, in CSS pixels, for somebody who prefers dark or light."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.call("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """A PNG of the window, or of the whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def chromium_tab() -> Iterator[Tab]:
    """The one tab of a new browser with a profile of its own."""
    assert CHROMIUM
    with TemporaryDirectory(prefix="covey-chromium-", ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [CHROMIUM, f"--user-data-dir={profile}", *OPTIONS], start_new_session=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "TMPDIR": profile})
        try:
            with connect(_debugger(Path(profile)), max_size=None) as connection:
                yield Tab(connection)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its own session, so all that it started
            process.wait()


def _debugger(profile: Path) -> str:
    told = profile / "DevToolsActivePort"
    until(lambda: told.exists() and told.read_text().count("\n"), "Chromium's debugging port")
    url = f"http://127.0.0.1:{told.read_text().splitlines()[0]}/json/list"

    def pages() -> list[str]:
        with suppress(httpx.TransportError):
            return [tab["webSocketDebuggerUrl"] for tab in httpx.get(url).json() if tab["type"] == "page"]
        return []

    until(pages, "a tab of Chromium")
    return pages()[0]
