"""What tests of strategies share: small peers on the memory transport, and what one process makes of the same data."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from averaging.config import Averaging
from averaging.records import RoundEnd, StateLoad
from averaging.strategies.open import open_strategy
from averaging.strategies.strategy import Strategy
from averaging.transports.memory import MemorySwarm
from training.loop import LocalStepper, Progress
from training.objectives.objective import Objective
from training.optimizers.build import build_optimizer, govern, initialise_state
from training.optimizers.config import Optimizer

Made = TypeVar("Made")
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
TOLERANCE = {"rtol": 1e-5, "atol": 5e-6}


class Bare(Objective):
    """A network, and nothing that happens around updates."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.backbone = net

    def forward(self, views: list[Tensor], labels: Tensor | None, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError


def network(seed: int = 1) -> nn.Module:
    """Convolution, BatchNorm, linear layer; input [B, 6]."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Unflatten(1, (2, 1, 3)), nn.Conv2d(2, 10, (1, 3), bias=False),
                             nn.BatchNorm2d(10, momentum=0.5), nn.ReLU(), nn.Flatten(), nn.Linear(10, 3))


def backward(net: nn.Module, batch: Tensor) -> None:
    """A loss that knows no sample from another, but for BatchNorm."""
    output = net(batch)
    (output - batch[:, :3].sin()).square().sum(1).mean().backward()


def batches(peer: int, sizes: Iterable[int], seed: int = 0) -> list[Tensor]:
    """Micro-batches of these sizes, different for each peer."""
    generator = torch.Generator().manual_seed(1000 * seed + peer)
    return [torch.randn(size, 6, generator=generator) + 0.1 * peer for size in sizes]


def governed(config: Optimizer, net: nn.Module, epoch: Callable[[], int]) -> torch.optim.Optimizer:
    """As the worker's: a rate that falls with every epoch, and clipping."""
    optimizer = build_optimizer(config, net)
    initialise_state(optimizer)
    govern(optimizer, Bare(net), lambda now: config.lr / (1 + now), epoch, config.grad_clip_norm)
    return optimizer


class Peer:
    """A network and its stepper."""

    def __init__(self, swarm: MemorySwarm, name: str, config: Averaging, *, net: nn.Module | None = None,
                 optimizer: Callable[["Peer"], torch.optim.Optimizer] | None = None, **options: Any) -> None:
        self.net = net or network()
        self.ends: list[RoundEnd] = []
        self.loads: list[StateLoad] = []
        self.name, self.transport = name, swarm.join(name)
        self.stepper: Strategy = open_strategy(
            config, transport=self.transport,
            optimizer=optimizer(self) if optimizer else plain_sgd(self.net), shared_buffers=self.net.buffers(),
            on_round=self.ends.append, on_state_load=self.loads.append, **options)

    def train(self, given: Iterable[Tensor]) -> list[Progress]:
        """Steps through the micro-batches."""
        progress = []
        for batch in given:
            backward(self.net, batch)
            progress.append(self.stepper.step(len(batch)))
        return progress

    @property
    def parameters(self) -> list[Tensor]:
        return [p.detach() for p in self.net.parameters()]

    @property
    def buffers(self) -> list[Tensor]:
        return [buffer for buffer in self.net.buffers() if buffer.is_floating_point()]

    @property
    def momenta(self) -> list[Tensor]:
        return [state["momentum_buffer"] for state in self.stepper.optimizer.state.values()]


def plain_sgd(net: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    initialise_state(optimizer)
    return optimizer


def at_once(jobs: Sequence[Callable[[], Made]]) -> list[Made]:
    """What the jobs return, each in a thread of its own."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


def train_at_once(peers: Sequence[Peer], given: Sequence[Iterable[Tensor]]) -> list[list[Progress]]:
    """All peers step, each through its own micro-batches."""
    def job(peer: Peer, share: Iterable[Tensor]) -> Callable[[], list[Progress]]:
        return lambda: peer.train(share)

    return at_once([job(peer, share) for peer, share in zip(peers, given, strict=True)])


def weighted_mean(tensors: Sequence[Sequence[Tensor]], weights: Sequence[float]) -> list[Tensor]:
    """For every place, the mean over the peers."""
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return [torch.stack([each.detach().double() for each in same]).mul(
        shares.view(-1, *[1] * same[0].dim())).sum(0).float() for same in zip(*tensors, strict=True)]


def one_process(config: Optimizer, epochs: Sequence[Sequence[Sequence[Tensor]]], net: nn.Module | None = None
                ) -> nn.Module:
    """What one process makes of all micro-batches, given by epoch and peer.

    BatchNorm's statistics are those of peers who go on from their common mean, weighted by samples, in each epoch.
    """
    net = network() if net is None else net
    stepper = LocalStepper(governed(config, net, lambda: stepper.epoch), sum(len(b) for p in epochs[0] for b in p))
    buffers = [buffer for buffer in net.buffers() if buffer.is_floating_point()]
    for peers in epochs:
        before, after = deepcopy(buffers), []
        for share in peers:
            torch._foreach_copy_(buffers, before)
            for batch in share:
                backward(net, batch)
                stepper.step(len(batch))
            after.append(deepcopy(buffers))
        torch._foreach_copy_(buffers, weighted_mean(after, [sum(map(len, share)) for share in peers]))
    return net


def spread(peers: Sequence[Peer]) -> float:
    """Root mean square distance of the peers' parameters from their mean."""
    flat = torch.stack([torch.cat([p.flatten().double() for p in peer.parameters]) for peer in peers])
    return float((flat - flat.mean(0)).square().sum(1).mean().sqrt())


def assert_close(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.detach(), their.detach(), **TOLERANCE)


def assert_equal(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
    """To the bit."""
    assert all(torch.equal(our, their) for our, their in zip(ours, theirs, strict=True))
