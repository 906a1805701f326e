"""The archive of a real swarm: checkpoints while it trains, a full disk, a crash, and the swarm's return from it."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
import pytest
import torch
from processes import is_running, until
from swarm import Covey, Event, Swarm

from peer.evaluate import evaluate
from peer.trained import open_trained
from training.checkpoint import parameters_checksum, read_checkpoint

DEADLINE = 90.0
pytestmark = pytest.mark.timeout(400)


def archive_of(coordinator: Covey) -> dict[str, Any]:
    """What it tells of its archive."""
    with urlopen(f"{coordinator.all('ready')[0]['dashboard_url']}api/swarm", timeout=10) as answer:
        archive: dict[str, Any] = json.load(answer)["archive"]
        return archive


def metric(coordinator: Covey, name: str) -> float:
    with urlopen(coordinator.all("ready")[0]["metrics_url"], timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


def archivist(coordinator: Covey) -> psutil.Process:
    return next(child for child in psutil.Process(coordinator.process.pid).children()
                if "coordinator.archivist" in " ".join(child.cmdline()))


@dataclass
class Story:
    """What happened, one thing after the other, and what was seen of it."""

    first: dict[str, Any]         # the archive once a checkpoint was evaluated
    log: str
    volunteers: dict[str, Any]    # the volunteer's checkpoint of that epoch, and the archive's
    full: dict[str, Any]          # the archive while its disk was full
    metrics_when_full: list[float]
    files_when_full: list[str]
    epochs_when_full: int         # that training made meanwhile
    recovered: dict[str, Any]     # once there was room again
    crashed: dict[str, Any]       # once the archivist had come back from a SIGKILL
    before: dict[str, Any]        # as everything was killed
    truncated: Path
    kept: Path                    # the checkpoint before it
    evaluations_after: list[dict[str, Any]]
    finished: Event               # of who came to a swarm that was gone, and left at that epoch
    loaded: Event
    went_on: list[int]            # epochs of the next one


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    swarm = Swarm(tmp_path_factory.mktemp("archived"), flags=["--evaluate"], archive_every_epochs=2)
    try:
        yield tell(swarm)
    finally:
        swarm.close()


def tell(swarm: Swarm) -> Story:
    coordinator, log = swarm.coordinator(), swarm.folder / "coordinator.log"
    (volunteer,) = swarm.volunteers(1, "--checkpoint-every-epochs", "1", "--keep-last-checkpoints", "1000")
    checkpoints = swarm.folder / "coordinator" / "checkpoints"

    def wait(condition: Callable[[dict[str, Any]], Any], what: str) -> dict[str, Any]:
        def there() -> bool:
            assert coordinator.alive, coordinator.last_words()
            return bool(condition(archive_of(coordinator)))
        until(there, what, DEADLINE)
        return archive_of(coordinator)

    def later(than: dict[str, Any]) -> dict[str, Any]:
        return wait(lambda archive: (archive["epoch"] or 0) > than["epoch"], "a later checkpoint")

    first = wait(lambda archive: archive["evaluations"], "an evaluation")
    ours = checkpoints / f"epoch-{first['epoch']:08d}.safetensors"
    theirs = volunteer.log.with_suffix("") / "checkpoints" / ours.name
    until(theirs.with_suffix(".json").exists, "the volunteer's checkpoint of that epoch", DEADLINE)
    pair = {"ours": read_checkpoint(ours), "theirs": read_checkpoint(theirs), "evaluated": evaluate(ours, None)}

    process, since = archivist(coordinator), len(volunteer.events)
    process.rlimit(psutil.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    full = wait(lambda archive: archive["failures"]["disk"], "a failure")
    files = sorted(path.name for path in checkpoints.iterdir())
    metrics = [metric(coordinator, 'covey_archive_failures_total{stage="disk"}'),
               metric(coordinator, "covey_checkpoint_last_success_timestamp_seconds")]
    volunteer.wait_for("epoch", 2, since=since)
    epochs = len(volunteer.all("epoch", since=since))
    process.rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    recovered = later(full)

    process.kill()
    crashed = wait(lambda archive: archive["failures"]["crash"] and archive["epoch"] > recovered["epoch"],
                   "a checkpoint after the crash")
    before = later(crashed)

    families = [*volunteer.family(), *coordinator.family()]
    for one in (volunteer, coordinator):
        one.process.kill()
        one.process.wait()
    until(lambda: not any(is_running(process.pid) for process in families), "nothing of them remains")
    shutil.rmtree(volunteer.log.with_suffix(""))
    newest, kept, *_ = sorted(checkpoints.glob("epoch-*.safetensors"), reverse=True)
    with newest.open("r+b") as file:
        file.truncate(newest.stat().st_size // 2)
    coordinator = swarm.coordinator()
    evaluations = archive_of(coordinator)["evaluations"]
    back = wait(lambda archive: archive["epoch"] is not None, "the archive is read")
    stopper = swarm.join("--stop-at-epoch", str(back["epoch"]))
    (loaded,) = stopper.wait_for("state_loaded", succeeded=True)
    (finished,) = stopper.wait_for("finished")
    stopper.process.wait(30)
    goer = swarm.join()
    goer.wait_for("epoch", 2)
    return Story(first, log.read_text(), pair, full, metrics, files, epochs, recovered, crashed, before,
                 newest, kept, evaluations, finished, loaded, [event["epoch"] for event in goer.all("epoch")])


def test_a_checkpoint_is_what_the_swarm_has_at_that_epoch(story: Story) -> None:
    ours, theirs = story.volunteers["ours"], story.volunteers["theirs"]
    assert (ours.epoch, ours.fingerprint, ours.experiment) == (theirs.epoch, theirs.fingerprint, theirs.experiment)
    shared = [name for name in theirs.tensors if name.startswith("optimizer.")] + [
        name for name in theirs.tensors if name.startswith("objective.") and name.endswith((".weight", ".bias"))]
    assert len(shared) > 100
    assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in shared)


def test_each_checkpoint_is_evaluated_as_covey_evaluate_does(story: Story) -> None:
    (evaluation,) = story.first["evaluations"][:1]
    assert evaluation["figures"] == {"knn_accuracy": story.volunteers["evaluated"]["knn_accuracy"]}
    assert len(story.before["evaluations"]) > 1


def test_a_full_disk_leaves_training_and_the_earlier_checkpoints_alone(story: Story) -> None:
    assert story.epochs_when_full >= 2
    assert story.full["epoch"] >= story.first["epoch"]
    assert "no checkpoint was written" in story.full["last_error"]
    assert "the earlier ones are as they were" in story.full["last_error"]
    assert not [name for name in story.files_when_full if name.endswith(".tmp")]
    assert f"epoch-{story.full['epoch']:08d}.json" in story.files_when_full
    assert {Path(name).stem for name in story.files_when_full if name.endswith(".safetensors")} == {
        Path(name).stem for name in story.files_when_full if name.endswith(".json")}


def test_a_full_disk_is_told_by_a_metric_and_one_clear_line(story: Story) -> None:
    failures, newest = story.metrics_when_full
    assert failures >= 1
    assert newest == story.full["time_seconds"]
    lines = [line for line in story.log.splitlines() if "no checkpoint was written" in line]
    assert len(lines) == story.recovered["failures"]["disk"]
    assert all("ERROR" in line and "File too large" in line for line in lines)


def test_it_goes_on_by_itself_when_there_is_room_again(story: Story) -> None:
    assert story.recovered["epoch"] > story.full["epoch"]
    assert story.recovered["last_error"] == ""


def test_a_killed_archivist_is_started_again(story: Story) -> None:
    assert story.crashed["failures"]["crash"] == 1
    assert "the archivist ended with exit code -9" in story.log
    assert story.crashed["epoch"] > story.recovered["epoch"]


def test_a_truncated_checkpoint_is_passed_over_with_a_line(story: Story) -> None:
    assert f"checkpoint passed over: {story.truncated}" in story.log
    assert story.loaded["epoch"] < int(story.truncated.stem.removeprefix("epoch-"))


def test_everyone_gone_the_swarm_resumes_from_the_newest_good_checkpoint_at_its_epoch(story: Story) -> None:
    checkpoint = read_checkpoint(story.kept)
    assert story.loaded["epoch"] == checkpoint.epoch
    assert story.finished["epoch"] == checkpoint.epoch
    assert story.finished["parameters_checksum"] == parameters_checksum(open_trained(story.kept).objective)
    assert story.went_on[0] == checkpoint.epoch + 1


def test_evaluations_survive_a_restart(story: Story) -> None:
    assert story.evaluations_after[:len(story.before["evaluations"])] == story.before["evaluations"]
