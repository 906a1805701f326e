"""`python -m benchmarks.coordinator_load [--minutes 5] [--volunteers 1000] [--viewers 50]`: a coordinator under load.

A real `covey coordinator`; the volunteers' records (benchmarks/load_volunteers.py) reach it through the DHT from
another process; viewers and Prometheus (benchmarks/load_viewers.py) by HTTP from this one. All on one machine, so that
the load takes processor time from the coordinator as well: what is printed is the coordinator's own.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from statistics import fmean, median
from time import monotonic
from typing import Any

import httpx
import psutil

from benchmarks.averaging_tables import print_table, wide_console
from benchmarks.load_viewers import Viewer, scrape

EPOCH_SECONDS, START_SECONDS, SAMPLE_SECONDS = 60.0, 300.0, 5.0
OVERRIDES = ("averaging.target_batch_size=12000000", "averaging.target_group_size=16",
             "averaging.report_progress_expiration=60", "averaging.min_refresh_period=0.5",
             "averaging.default_refresh_period=3", "averaging.max_refresh_period=10")  # the last four: the defaults
LOCAL = ("--listen", "127.0.0.1", "--port", "0", "--grpc-port", "0", "--http-port", "0", "--json", "--open")


@dataclass
class Load:
    """What was found. Seconds, bytes; `cores`: 1.0 is one core."""

    volunteers: int
    viewers: int
    minutes: float
    seen: int = 0  # volunteers, at the end
    lost: int = 0  # volunteers that it took for lost
    cores: float = 0.0
    cores_in_parts: dict[str, float] = field(default_factory=dict)
    memory: list[int] = field(default_factory=list)  # all its processes', shared pages once, each SAMPLE_SECONDS
    scrapes: list[float] = field(default_factory=list)
    event_bytes: float = 0.0  # per viewer and second, as sent
    events: float = 0.0  # per viewer and second
    first_load_bytes: float = 0.0  # per viewer
    right: bool = False  # whether all viewers saw the figures of /api/swarm


@contextmanager
def running(arguments: Sequence[str], log: Path) -> Iterator["subprocess.Popen[str]"]:
    """`python -m ARGUMENTS`, its errors in `log`, ended with the context."""
    with log.open("w") as errors:
        process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        process.wait()


def line_of(process: "subprocess.Popen[str]", log: Path) -> Any:
    """What it says next."""
    assert process.stdout is not None
    if not (line := process.stdout.readline()):
        raise SystemExit(f"ended early:\n{log.read_text()[-2000:]}")
    return json.loads(line)


async def measure(volunteers: int, viewers: int, minutes: float, epoch_seconds: float) -> Load:
    """Start all, wait until all volunteers were told of once, and look on for `minutes`."""
    with tempfile.TemporaryDirectory(prefix="covey-load-") as name:
        folder = Path(name)
        logs = folder / "coordinator.log", folder / "volunteers.log"
        with running(["peer.cli", "coordinator", "demo", *OVERRIDES, *LOCAL, "--state-dir", str(folder / "state")],
                     logs[0]) as coordinator:
            ready = line_of(coordinator, logs[0])
            url, tree = ready["dashboard_url"].rstrip("/"), psutil.Process(coordinator.pid)
            with running(["benchmarks.load_volunteers", ready["link"], str(volunteers), str(epoch_seconds)],
                         logs[1]) as crowd:
                await asyncio.wait_for(asyncio.to_thread(line_of, crowd, logs[1]), START_SECONDS)
                return await watch(url, tree, Load(volunteers, viewers, minutes))


async def watch(url: str, coordinator: psutil.Process, load: Load) -> Load:
    """Viewers and scrapes for so many minutes, and what they and the coordinator's processes tell."""
    crowd = [Viewer(f"127.0.{1 + number // 250}.{1 + number % 250}") for number in range(load.viewers)]
    tasks = [asyncio.create_task(viewer.watch(url)) for viewer in crowd]
    tasks.append(asyncio.create_task(scrape(url, load.scrapes)))
    while not all(viewer.events for viewer in crowd):
        await _sleep(0.2, tasks)
    before, began = _worked(coordinator), monotonic()
    counted = [(viewer.events, viewer.received) for viewer in crowd]
    while monotonic() < began + 60 * load.minutes:
        load.memory.append(sum(process.memory_full_info().pss for process in _tree(coordinator)))
        await _sleep(min(SAMPLE_SECONDS, 20 * load.minutes), tasks)
    took, after = monotonic() - began, _worked(coordinator)
    load.cores_in_parts = {name: (after[name] - before.get(name, 0.0)) / took for name in after}
    load.cores = sum(load.cores_in_parts.values())
    load.events = fmean(viewer.events - events for viewer, (events, _) in zip(crowd, counted, strict=True)) / took
    load.event_bytes = fmean(viewer.received - received
                             for viewer, (_, received) in zip(crowd, counted, strict=True)) / took
    load.first_load_bytes = fmean(viewer.loaded for viewer in crowd)
    swarm = await _settled(url, crowd, lambda swarm: len(swarm["peers"]) == load.volunteers)
    load.seen, load.lost, load.right = len(swarm["peers"]), swarm["departures"]["lost"], bool(crowd and swarm["right"])
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return load


async def _sleep(seconds: float, tasks: Sequence["asyncio.Task[None]"]) -> None:
    """Unless one of the tasks ends meanwhile, which none should."""
    for task in (await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED))[0]:
        task.result()
        raise SystemExit("a viewer's stream ended")


async def _settled(url: str, crowd: Sequence[Viewer], enough: Callable[[Any], bool]) -> Any:
    """The JSON, and whether all viewers were sent the same; a few tries, as it changes every second."""
    swarm: dict[str, Any] = {}
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        for _ in range(60):
            swarm = (await client.get("/api/swarm")).json()
            await asyncio.sleep(0.3)
            swarm["right"] = all(_same(viewer, swarm) for viewer in crowd)
            if swarm["right"] and enough(swarm):
                break
    return swarm


def _same(viewer: Viewer, swarm: Any) -> bool:
    figures = {name: value for name, value in viewer.swarm.items() if name not in ("peers", "changed", "gone")}
    rows = {row["peer_id"]: row for row in swarm["peers"]}
    return figures.items() <= swarm.items() and len(viewer.rows) == min(300, len(rows)) and all(
        row.items() <= (rows[peer] | {"heard_seconds": row["heard_seconds"]}).items()
        for peer, row in viewer.rows.items())


def _tree(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def _worked(coordinator: psutil.Process) -> dict[str, float]:
    """Seconds of processor time so far, by what the process is."""
    worked = dict[str, float]()
    for process in _tree(coordinator):
        name = "main" if process == coordinator else "libp2p" if process.name() == "p2pd" else "DHT" \
            if process.ppid() == coordinator.pid else "other"
        worked[name] = worked.get(name, 0.0) + sum(process.cpu_times()[:2])
    return worked


def rows(load: Load) -> list[tuple[str, str]]:
    """For the table."""
    after_a_minute = load.memory[min(len(load.memory) - 1, round(60 / SAMPLE_SECONDS))]
    mega = [f"{value / 2**20:.0f}" for value in (load.memory[0], after_a_minute, load.memory[-1])]
    return [
        ("volunteers seen", f"{load.seen} of {load.volunteers}, {load.lost} lost on the way"),
        ("viewers shown the right figures", f"all {load.viewers}" if load.right else "NOT all"),
        ("processor, % of one core", f"{100 * load.cores:.0f} (" + ", ".join(
            f"{name} {100 * cores:.0f}" for name, cores in sorted(load.cores_in_parts.items())) + ")"),
        ("memory, MiB: start, after a minute, end", ", ".join(mega)),
        ("growth after the first minute, MiB", f"{(load.memory[-1] - after_a_minute) / 2**20:+.1f}"),
        ("scrape, ms: median, worst", f"{1e3 * median(load.scrapes):.0f}, {1e3 * max(load.scrapes):.0f} "
                                      f"({len(load.scrapes)} scrapes)"),
        ("events, kB/s per viewer", f"{load.event_bytes / 1e3:.1f} ({load.events:.2f} events/s)"),
        ("first load of the page, kB", f"{load.first_load_bytes / 1e3:.0f}")]


def main() -> None:
    """Print the table, or with --json what it is made of."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--volunteers", type=int, default=1000)
    parser.add_argument("--viewers", type=int, default=50)
    parser.add_argument("--epoch", type=float, default=EPOCH_SECONDS, metavar="SECONDS")
    parser.add_argument("--json", action="store_true", help="for programs")
    given = parser.parse_args()
    load = asyncio.run(measure(given.volunteers, given.viewers, given.minutes, given.epoch))
    if given.json:
        print(json.dumps(asdict(load)))
    else:
        print_table(wide_console(), f"A coordinator under load, {date.today()}, {os.cpu_count()} cores, "
                    f"{given.minutes:g} min", ("", ""), rows(load))


if __name__ == "__main__":
    main()
