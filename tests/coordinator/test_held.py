"""What a hostile donor may send, and what of it comes into a checkpoint: nothing."""

import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from averaging.experiment import canonical, load_experiment
from averaging.sketch import sketch
from averaging.transports.swarm.wire import Refused
from coordinator.held import Held
from peer.trained import open_trained
from training.checkpoint import newest_checkpoint, read_checkpoint

State = dict[str, Tensor]


def held(*overrides: str) -> Held:
    experiment = load_experiment(str(Path(__file__).parents[1] / "swarm" / "tiny.toml"), overrides)
    return Held(canonical(experiment))


def state_of(held: Held, epoch: int = 5, seed: int = 1) -> State:
    """Another state of the same experiment."""
    _, data = held.snapshot()
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.rand(value.shape, generator=generator, dtype=value.dtype) if value.is_floating_point()
             else value for name, value in safetensors.torch.load(data).items()}
    return state | {"epoch": torch.tensor(epoch)}


def changed(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[State], State]:
    return lambda state: state | {name: value(state[name]).contiguous()}


@pytest.fixture(scope="module")
def shelf() -> Held:
    return held()


@pytest.mark.parametrize("strategy", ["collaborative", "local_sgd", "diloco", "gossip"])
def test_a_state_comes_back_as_it_was_from_a_checkpoint(strategy: str, tmp_path: Path) -> None:
    one, other = (held(f"averaging.strategy={strategy}") for _ in range(2))
    data = safetensors.torch.save(state_of(one))
    state, summary = one.check(data, 5)
    one.take(state)
    path = one.write(tmp_path, keep_last=3)
    assert other.restore(tmp_path) == path
    (epoch, before), (again, after) = one.snapshot(), other.snapshot()
    assert epoch == again == 5
    assert before == after
    parameters = safetensors.torch.load(after)
    count = sum(name.startswith("parameters.") for name in parameters)
    kept = sketch(parameters[f"parameters.{index}"] for index in range(count))
    assert (kept == summary) or strategy == "diloco"  # which begins an epoch at its anchors


def test_the_checkpoint_is_one_that_others_read(shelf: Held, tmp_path: Path) -> None:
    state = state_of(shelf, epoch=6)
    shelf.take(shelf.check(safetensors.torch.save(state), 6)[0])
    path = shelf.write(tmp_path, keep_last=3)
    checkpoint, trained = read_checkpoint(path), open_trained(path)
    assert (checkpoint.epoch, trained.epoch) == (6, 6)
    assert checkpoint.progress["precision"]["loss_scale"] > 0
    parameters = [value for _, value in sorted((int(name.split(".")[1]), value) for name, value in state.items()
                                               if name.startswith("parameters."))]
    ours = sorted(value.detach().flatten().tolist() for value in trained.objective.parameters())
    assert ours == sorted(value.flatten().tolist() for value in parameters)


@pytest.mark.parametrize(("spoil", "reason"), [
    (changed("parameters.0", lambda value: value * float("nan")), "not finite"),
    (changed("parameters.0", lambda value: value.double()), "float64"),
    (changed("parameters.0", lambda value: value.flatten()), "not torch.float32"),
    (changed("epoch", lambda value: value + 1), "was announced"),
    (lambda state: {name: value for name, value in state.items() if name != "parameters.0"}, "its tensors are others"),
    (lambda state: state | {"parameters.999": torch.zeros(1)}, "its tensors are others"),
])
def test_a_state_that_no_peer_would_take_is_refused(shelf: Held, spoil: Callable[[State], State], reason: str) -> None:
    before = shelf.snapshot()
    with pytest.raises(Refused, match=reason):
        shelf.check(safetensors.torch.save(spoil(state_of(shelf, epoch=9))), 9)
    assert shelf.snapshot() == before


@pytest.mark.parametrize("data", [b"", b"garbage", (10**9).to_bytes(8, "little") + b"{}", b"\x80\x04."])
def test_what_is_no_state_is_refused(shelf: Held, data: bytes) -> None:
    with pytest.raises(Refused, match="not a file of tensors"):
        shelf.check(data, 9)


def test_an_older_state_is_refused(tmp_path: Path) -> None:
    shelf = held()
    shelf.take(shelf.check(safetensors.torch.save(state_of(shelf, epoch=9)), 9)[0])
    with pytest.raises(Refused, match="older"):
        shelf.check(safetensors.torch.save(state_of(shelf, epoch=8)), 8)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`small_disk(size)`: a folder on a file system of its own with so many bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: int) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True,
                              text=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


def test_on_a_full_disk_earlier_checkpoints_stay_and_nothing_is_half_written(
        tmp_path: Path, small_disk: Callable[[int], Path]) -> None:
    shelf = held()
    size = shelf.write(tmp_path, keep_last=3).stat().st_size
    folder = small_disk(int(2.5 * size))
    first, second = (shelf.write(folder, keep_last=3) for _ in shelves(shelf, (1, 2)))
    before = sorted(path.name for path in folder.iterdir())
    for _ in shelves(shelf, (3,)):
        with pytest.raises(OSError, match="No space left on device"):
            shelf.write(folder, keep_last=3)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert newest_checkpoint(folder) == second
    first.unlink()
    first.with_suffix(".json").unlink()
    assert read_checkpoint(shelf.write(folder, keep_last=3)).epoch == 3


def shelves(shelf: Held, epochs: Sequence[int]) -> Iterator[None]:
    """Takes another state, epoch by epoch."""
    for epoch in epochs:
        shelf.take(shelf.check(safetensors.torch.save(state_of(shelf, epoch, seed=epoch)), epoch)[0])
        yield
