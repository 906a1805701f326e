"""Every logger records the figures of epochs, over resumed runs too."""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from peer.loggers import csv as csv_logger
from peer.loggers.console import JsonLines, Lines
from peer.loggers.csv import CsvLogger, read_rows
from peer.loggers.logger import EXTRAS, LOGGERS, Run, check_loggers, open_loggers
from training.errors import BadInput

FIRST = {"samples_total": 64, "samples_per_second": 10.5, "loss": 2.25}
SECOND = {"samples_total": 128, "samples_per_second": 11.0, "loss": 2.0}


def run(directory: Path, epoch: int = 0) -> Run:
    return Run(directory=directory, run_id="tiny-0123", epoch=epoch, experiment={"name": "tiny"}, metrics_port=0)


def text(directory: Path) -> str:
    return (directory / "metrics.csv").read_text()


def test_csv_has_a_row_per_epoch_under_the_names_that_all_loggers_share(tmp_path: Path) -> None:
    with open_loggers(["csv"], run(tmp_path)) as [logger]:
        logger.update(FIRST, 1)
        assert text(tmp_path) == "epoch,samples_total,samples_per_second,loss\n1,64,10.5,2.25\n"
        logger.update(SECOND, 2)
    assert text(tmp_path).splitlines()[2:] == ["2,128,11,2"]
    assert logger.where == str(tmp_path / "metrics.csv")


def test_csv_takes_up_where_an_earlier_start_ended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    CsvLogger(path).update(FIRST, 1)
    CsvLogger(path).update(SECOND, 2)
    assert read_rows(path) == [{"epoch": 1, **FIRST}, {"epoch": 2, **SECOND}]


def test_an_epoch_that_comes_again_replaces_its_row_and_what_followed(tmp_path: Path) -> None:
    logger = CsvLogger(tmp_path / "metrics.csv")
    for epoch in (1, 2, 3, 4):
        logger.update(FIRST, epoch)
    logger.update(SECOND, 3)
    logger.update(SECOND, 4)
    rows = read_rows(tmp_path / "metrics.csv")
    assert [(row["epoch"], row["loss"]) for row in rows] == [(1, 2.25), (2, 2.25), (3, 2.0), (4, 2.0)]


def test_a_name_that_comes_late_becomes_a_column_with_empty_cells_before(tmp_path: Path) -> None:
    logger = CsvLogger(tmp_path / "metrics.csv")
    logger.update(FIRST, 1)
    logger.update({**FIRST, "knn_accuracy": 0.75}, 2)
    logger.update(SECOND, 3)
    assert [line.rpartition(",")[2] for line in text(tmp_path).splitlines()] == ["knn_accuracy", "", "0.75", ""]
    assert ["knn_accuracy" in row for row in read_rows(tmp_path / "metrics.csv")] == [False, True, False]


def test_a_line_that_a_crash_left_unfinished_goes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    CsvLogger(path).update(FIRST, 1)
    with path.open("a") as file:
        file.write("2,1")
    assert len(read_rows(path)) == 1
    CsvLogger(path).update(SECOND, 2)
    assert read_rows(path) == [{"epoch": 1, **FIRST}, {"epoch": 2, **SECOND}]


@pytest.mark.parametrize("content", ["", "loss\n1\n", "epoch,loss\n1\n", "epoch,loss\none,2\n", "epoch,loss\n,2\n",
                                     "epoch\ninf\n", "\x00\n"])
def test_a_file_that_is_no_such_table_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(content)
    with pytest.raises(BadInput, match=r"metrics\.csv"):
        CsvLogger(path)
    assert path.read_text() == content


def test_a_crash_while_rewriting_leaves_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = CsvLogger(tmp_path / "metrics.csv")
    logger.update(FIRST, 1)
    before = text(tmp_path)

    def crash(*_: object) -> None:
        raise OSError("the machine went down")

    monkeypatch.setattr(csv_logger, "move_into_place", crash)
    with pytest.raises(OSError, match="went down"):
        logger.update(SECOND, 1)
    assert text(tmp_path) == before


def test_prometheus_serves_the_last_epoch(tmp_path: Path) -> None:
    with open_loggers(["prometheus"], run(tmp_path)) as [logger]:
        logger.update(FIRST, 1)
        logger.update({**SECOND, "knn_accuracy": 0.5}, 2)
        with urllib.request.urlopen(logger.where, timeout=10) as reply:
            lines = reply.read().decode().splitlines()
    for line in ("covey_epoch 2.0", "covey_loss 2.0", "covey_samples_total 128.0", "covey_samples_per_second 11.0",
                 "covey_knn_accuracy 0.5"):
        assert line in lines
    assert all(line.split()[2].startswith("covey_") for line in lines if line.startswith("# TYPE"))


def test_a_metrics_port_in_use_is_named(tmp_path: Path) -> None:
    with open_loggers(["prometheus"], run(tmp_path)) as [logger]:
        port = int(logger.where.partition(":")[2].rpartition(":")[2].partition("/")[0])
        taken = Run(tmp_path, "tiny", 0, {}, metrics_port=port)
        with pytest.raises(BadInput, match=f"port {port}"), open_loggers(["prometheus"], taken):
            pass


def test_tensorboard_shows_a_resumed_run_as_one(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_loggers(["tensorboard"], run(tmp_path)) as [logger]:
        for epoch in (1, 2, 3):
            logger.update(FIRST, epoch)
    with open_loggers(["tensorboard"], run(tmp_path, epoch=2)) as [logger]:
        logger.update(SECOND, 3)
    shown = EventAccumulator(logger.where).Reload()
    assert set(shown.Tags()["scalars"]) == set(FIRST)
    assert [(event.step, event.value) for event in shown.Scalars("loss")] == [(1, 2.25), (2, 2.25), (3, 2.0)]


def test_wandb_records_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    # a process of its own: wandb starts services that outlive what the test could close
    code = ("import sys; from pathlib import Path; from peer.loggers.logger import Run, open_loggers\n"
            "run = Run(Path(sys.argv[1]), 'tiny-0123', 0, {'name': 'tiny'}, 0)\n"
            "with open_loggers(['wandb'], run) as [logger]:\n"
            "    logger.update({'loss': 2.25, 'samples_total': 64}, 1); print(logger.where)\n")
    surroundings = {**os.environ, "WANDB_MODE": "offline", "HOME": str(tmp_path), "WANDB_SILENT": "true"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120,
                          env=surroundings, check=True)
    [record] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"samples_total" in record.read_bytes()
    assert (tmp_path / "wandb-id").read_text() in record.name
    assert str(tmp_path) in done.stdout


def test_without_an_account_wandb_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    code = ("import sys; from pathlib import Path; from peer.loggers.logger import Run, open_loggers\n"
            "from training.errors import BadInput\n"
            "try:\n"
            "    with open_loggers(['wandb'], Run(Path(sys.argv[1]), 'tiny', 0, {}, 0)): pass\n"
            "except BadInput as error: print(error)\n")
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120,
                          env={**surroundings, "HOME": str(tmp_path)}, check=True, stdin=subprocess.DEVNULL)
    assert "wandb login" in done.stdout
    assert done.stdout.count("\n") == 1


def test_the_console_shows_fewer_epochs_the_longer_a_run_lasts_and_all_that_matter() -> None:
    now, lines = 0.0, list[str]()
    shown = Lines(lines.append, lambda epoch, words: None, epochs=1000, clock=lambda: now)
    for epoch in range(1, 1001):
        now += 1.0
        shown.update({**FIRST, "learning_rate": 0.1, **({"knn_accuracy": 0.5} if epoch == 777 else {})}, epoch)
    told = [int(line.split()[1].replace(",", "")) for line in lines]
    assert told[:4] == [1, 3, 5, 7]
    assert told[-1] == 1000
    assert 777 in told
    assert 100 < len(told) < 300
    assert "k-NN 50.0%" in lines[told.index(777)]
    assert all(len(line) <= 80 for line in lines)


def test_the_console_tells_programs_everything_as_json() -> None:
    lines: list[str] = []
    teller = JsonLines(lines.append)
    teller.tell("ready", device="cpu")
    teller.update(FIRST, 1)
    teller.moment(1, 2, 3.0, 4.0)
    assert [json.loads(line) for line in lines] == [{"event": "ready", "device": "cpu"},
                                                    {"event": "epoch", "epoch": 1, **FIRST}]


def test_an_unknown_logger_is_refused() -> None:
    with pytest.raises(BadInput, match="csv, prometheus"):
        check_loggers(["csv", "comet"], 0)


@pytest.mark.parametrize("name", EXTRAS)
def test_a_missing_extra_is_one_line_that_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peer.loggers.logger.find_spec", lambda _: None)
    check_loggers([each for each in LOGGERS if each not in EXTRAS], 0)
    with pytest.raises(BadInput, match=rf"pip install 'covey\[{name}\]'"):
        check_loggers([name], 0)


def test_the_csv_logger_loads_nothing_heavy() -> None:
    code = "import sys, json, peer.loggers.csv; print(json.dumps([*{'torch', 'numpy', 'grpc'} & set(sys.modules)]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout) == []
