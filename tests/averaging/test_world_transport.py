"""The transport of a fixed world: three processes over gloo, on loopback, against the mean worked out here."""

from datetime import timedelta
from multiprocessing import set_forkserver_preload
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed
from torch import multiprocessing as mp

from averaging.compression import CODECS, error_bound
from averaging.transports import world as world_module
from averaging.transports.world import World, peer_name

WORLD = 3
WEIGHTS = (8.0, 24.0, 3.0)
SHAPES = {"small": (3, 5), "double": (7,), "half": (4,), "large": (300, 70), "scalar": ()}
GROUPS = {"all": (0, 1, 2), "ends": (0, 2), "pair": (1, 2)}


def tensors(rank: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    made = {name: torch.randn(shape, generator=generator) + rank for name, shape in SHAPES.items()}
    return made | {"double": made["double"].double(), "half": made["half"].half(),
                   "large": made["large"].view(10, 30, 7, 10).to(memory_format=torch.channels_last)}


def meet(world: World, rank: int, ranks: tuple[int, ...] = (0, 1, 2), **options: object) -> dict[str, Tensor]:
    """The tensors after a meeting, and how it ended; unchanged where this process is not of `ranks`."""
    mine = tensors(rank)
    if rank not in ranks:
        return mine
    if options.pop("poisoned", False):
        mine["small"].fill_(torch.nan)
    weight = options.pop("weight", WEIGHTS[rank])
    meeting = world.meet(list(mine.values()), weight, kind="test", epoch=0,  # type: ignore[arg-type]
                         group=[peer_name(each) for each in ranks], **options)  # type: ignore[arg-type]
    outcome = meeting.result()
    return mine | {"outcome.averaged": torch.tensor(outcome.averaged),
                   "outcome.state": torch.tensor(outcome.with_state),
                   "outcome.members": torch.tensor([int(each) for each in outcome.members]),
                   "outcome.bytes": torch.tensor(outcome.bytes_sent)}


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), WORLD)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    world_module.BUCKET_BYTES = 1000  # so that there are several
    world, found = World(96), dict[str, dict[str, Tensor]]()
    for name, ranks in GROUPS.items():
        found[name] = meet(world, rank, ranks)
    for codec in CODECS:
        found[codec] = meet(world, rank, compression=codec)
    for codec in ("none", "blockwise8bit"):
        found[f"poisoned-{codec}"] = meet(world, rank, compression=codec, poisoned=rank == 1,
                                          weight=0.0 if rank == 1 else WEIGHTS[rank])
        found[f"nobody-{codec}"] = meet(world, rank, compression=codec, weight=0.0)
    for name, fingerprint in (("equal", b"same"), ("differ", b"%d" % rank)):
        state = [torch.full((2, 2), float(rank))]
        found[name] = meet(world, rank, state=state, fingerprint=fingerprint) | {"state": state[0]}
    found["median"] = meet(World(96, reduce=lambda values, weights: values.median(0).values), rank)
    found["two at a time"] = at_once(world, rank)
    assert world.machines == (world.members(0),) == (("000000", "000001", "000002"),)
    save_file({f"{name}/{key}": value.contiguous() for name, each in found.items() for key, value in each.items()},
              folder / f"{rank}.safetensors")
    distributed.destroy_process_group()


def at_once(world: World, rank: int) -> dict[str, Tensor]:
    """Two meetings of different groups under way, taken up the other way round."""
    first, second = tensors(rank), tensors(rank)
    one = world.meet(list(first.values()), 1.0, kind="a", epoch=0, group=world.members(0))
    two = world.meet(list(second.values()), 1.0, kind="b", epoch=0, group=[peer_name(each) for each in (0, 2)]) \
        if rank != 1 else None
    if two:
        assert two.result().averaged
    assert one.result().averaged
    return {f"first.{name}": value for name, value in first.items()} | {
        f"second.{name}": value for name, value in second.items()}


Results = list[dict[str, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """By rank and scenario."""
    folder = tmp_path_factory.mktemp("world")
    set_forkserver_preload(["averaging.transports.world"])
    mp.start_processes(work, (folder,), nprocs=WORLD, start_method="forkserver")
    found: Results = [{} for _ in range(WORLD)]
    for rank, scenarios in enumerate(found):
        for path, value in load_file(folder / f"{rank}.safetensors").items():
            name, key = path.split("/")
            scenarios.setdefault(name, {})[key] = value
    return found


def mean(name: str, ranks: tuple[int, ...], weights: tuple[float, ...] = WEIGHTS) -> Tensor:
    """In float64."""
    return sum(weights[rank] * tensors(rank)[name].double() for rank in ranks) / sum(weights[rank] for rank in ranks)


@pytest.mark.parametrize("group", GROUPS)
def test_members_have_the_weighted_mean_in_equal_bits_and_others_what_they_had(results: Results, group: str) -> None:
    ranks = GROUPS[group]
    for name in SHAPES:
        for rank in range(WORLD):
            found = results[rank][group][name]
            if rank in ranks:
                assert torch.equal(found, results[ranks[0]][group][name])
                tolerance = 1e-3 if name == "half" else 1e-6
                torch.testing.assert_close(found.double(), mean(name, ranks), rtol=tolerance, atol=tolerance)
            else:
                assert torch.equal(found, tensors(rank)[name])
    assert results[ranks[0]][group]["outcome.members"].tolist() == list(ranks)


@pytest.mark.parametrize("codec", CODECS)
def test_a_codec_is_off_by_no_more_than_its_bound_and_all_have_equal_bits(results: Results, codec: str) -> None:
    every = torch.cat([value.float().flatten() for rank in range(WORLD) for value in tensors(rank).values()])
    bound = 2 * float(error_bound(codec, every).max()) + 1e-3  # encoded twice; half is rounded besides
    for name in SHAPES:
        found = [results[rank][codec][name] for rank in range(WORLD)]
        assert all(torch.equal(found[0], other) for other in found)
        assert float((found[0].double() - mean(name, (0, 1, 2))).abs().max()) <= bound
    size = {"none": 4, "fp16": 2, "bf16": 2, "uniform8bit": 1, "blockwise8bit": 1}[codec]
    values = sum(tensor.numel() for tensor in tensors(0).values())
    ideal = 2 * 2 / 3 * values * size
    assert ideal <= int(results[0][codec]["outcome.bytes"]) <= 1.2 * ideal + 2 * 4096 * size


@pytest.mark.parametrize("codec", ["none", "blockwise8bit"])
def test_who_has_weight_0_receives_the_mean_and_spoils_nothing(results: Results, codec: str) -> None:
    for rank in range(WORLD):
        found = results[rank][f"poisoned-{codec}"]["small"]
        torch.testing.assert_close(found.double(), mean("small", (0, 2)), rtol=0, atol=1e-6 if codec == "none" else 0.1)


@pytest.mark.parametrize("codec", ["none", "blockwise8bit"])
def test_with_nobodys_contribution_nothing_changes(results: Results, codec: str) -> None:
    for rank in range(WORLD):
        found = results[rank][f"nobody-{codec}"]
        assert not found["outcome.averaged"]
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors(rank).items())


def test_state_is_averaged_only_where_fingerprints_differ(results: Results) -> None:
    expected = sum(rank * weight for rank, weight in enumerate(WEIGHTS)) / sum(WEIGHTS)
    for rank in range(WORLD):
        assert torch.equal(results[rank]["equal"]["state"], torch.full((2, 2), float(rank)))
        torch.testing.assert_close(results[rank]["differ"]["state"], torch.full((2, 2), expected))
        assert [bool(results[rank][name]["outcome.state"]) for name in ("equal", "differ")] == [False, True]


def test_contributions_can_be_reduced_otherwise(results: Results) -> None:
    median = torch.stack([tensors(rank)["large"] for rank in range(WORLD)]).median(0).values
    torch.testing.assert_close(results[1]["median"]["large"], median, rtol=0, atol=1e-6)


def test_meetings_of_several_groups_can_be_under_way_at_once(results: Results) -> None:
    ones = (1.0, 1.0, 1.0)
    for rank in range(WORLD):
        found = results[rank]["two at a time"]
        torch.testing.assert_close(found["first.small"].double(), mean("small", (0, 1, 2), ones), rtol=0, atol=1e-6)
        expected = tensors(1)["small"].double() if rank == 1 else mean("small", (0, 2), ones)
        torch.testing.assert_close(found["second.small"].double(), expected, rtol=0, atol=1e-6)


def test_an_epoch_is_due_by_micro_batches_made_also_where_a_gradient_was_dropped() -> None:
    world = World(16)
    world.report(3, 0)
    for samples in (0, 8):  # of the second one alone
        world.saw(8)
        world.report(3, samples)
        assert world.is_due(3) == (samples == 8)
    assert world.standing().samples == 8
    world.report(4, 0)
    assert not world.is_due(4)


def test_a_process_on_its_own_meets_nobody() -> None:
    world: World = World(16)
    tensor = torch.ones(3)
    outcome = world.meet([tensor], 1.0, kind="test", epoch=0, group=world.members(0)).result()
    assert (outcome.averaged, outcome.reason, world.members(0)) == (False, "alone", (world.peer_id,))
    assert world.fetch_state() is None

