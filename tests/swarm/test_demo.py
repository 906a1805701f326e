"""`covey demo`, shortened: from one command to a summary, and nothing left behind."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
from processes import is_running, until

from averaging.experiment import parse
from training.checkpoint import read_checkpoint


def start(folder: Path, epochs: int, *overrides: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-m", "peer.cli", "demo", *overrides, "--epochs", str(epochs),
                             "--state-dir", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True)


def read_until(demo: "subprocess.Popen[str]", pattern: str) -> str:
    """What it has printed once a line matches; all of its descendants are up by then."""
    assert demo.stdout is not None
    said = ""
    for line in demo.stdout:
        said += line
        if re.search(pattern, line):
            return said
    raise AssertionError(said)


def test_the_demo_ends_with_equal_parameters_and_a_checkpoint(tmp_path: Path) -> None:
    demo = start(tmp_path / "demo", 16, "loss.temperature=0.25")
    said = read_until(demo, r"epoch +\d+/16")
    family = psutil.Process(demo.pid).children(recursive=True)
    assert demo.stdout is not None
    said += demo.stdout.read()
    assert demo.wait(60) == 0, said
    for promised in ("status page http://127.0.0.1:", "metrics     http://127.0.0.1:", "join link   covey://",
                     "k-NN accuracy, trained together", "k-NN accuracy, untrained", "k-NN accuracy, raw pixels",
                     "their parameters are equal", "group of 2"):
        assert promised in said, said
    assert len(set(re.findall(r"(?:ada|grace): parameters *│ ([0-9a-f]{16})", said))) == 1, said
    (checkpoint,) = re.findall(r"checkpoint (\S+)", said)
    written = read_checkpoint(Path(checkpoint))
    assert written.epoch == 16
    assert parse(written.experiment).model_dump()["loss"]["temperature"] == 0.25
    until(lambda: not any(is_running(process.pid) for process in family), "nothing of it runs", 5)


def test_ctrl_c_ends_the_demo_with_all_that_it_started(tmp_path: Path) -> None:
    demo = start(tmp_path / "demo", epochs=1000)
    read_until(demo, r"epoch +\d+/1000")
    family = psutil.Process(demo.pid).children(recursive=True)
    assert len(family) > 10  # a coordinator, two daemons, their workers, and what those need
    demo.send_signal(signal.SIGINT)
    assert demo.wait(20) == 130
    until(lambda: not any(is_running(process.pid) for process in family), "nothing of it runs", 5)


def test_a_killed_demo_leaves_nothing_running(tmp_path: Path) -> None:
    demo = start(tmp_path / "demo", epochs=1000)
    read_until(demo, r"starting 2 volunteers")
    until(lambda: len(psutil.Process(demo.pid).children(recursive=True)) > 6, "volunteers are starting")
    family = psutil.Process(demo.pid).children(recursive=True)
    demo.kill()
    demo.wait()
    until(lambda: not any(is_running(process.pid) for process in family), "nothing of it runs", 5)
