"""Strategies over the memory transport, a thread for each peer, with gradients that loops in one process have too."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, TypeVar

import torch
from memory_peers import at_once
from torch import Tensor

from averaging.config import Averaging
from averaging.strategies.open import open_strategy
from averaging.strategies.strategy import Strategy
from averaging.transports.memory import MemorySwarm, MemoryTransport

SHAPES = [(3, 4), (5,), (2, 2), (6,), (4, 3), (1,)]
Result = TypeVar("Result")
Optimizer = torch.optim.Optimizer


def start(seed: int = 0) -> list[Tensor]:
    """Parameters."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]


def gradients(params: Sequence[Tensor], peer: int, step: int) -> list[Tensor]:
    """Of micro-batch `step` of a peer: they depend on the parameters, the peer and the step, and not linearly."""
    generator = torch.Generator().manual_seed(1000 * peer + step)
    return [torch.tanh(param.detach() - torch.randn(param.shape, generator=generator) - peer) for param in params]


def sgd(params: Any) -> Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def names(peers: int) -> list[str]:
    return [f"{peer:03d}" for peer in range(peers)]


class Peer:
    """One peer's parameters, a buffer as BatchNorm has them, optimiser and strategy."""

    def __init__(self, config: Averaging, transport: Any, number: int, *, optimizer: Callable[[Any], Optimizer] = sgd,
                 seed: int = 0, **options: Any) -> None:
        self.number, self.transport, self.steps = number, transport, 0
        self.params, self.buffer = start(seed), torch.zeros(3)
        self.optimizer = optimizer(self.params)
        self.strategy: Strategy = open_strategy(config, transport=transport, optimizer=self.optimizer,
                                                shared_buffers=[self.buffer], **options)
        self.history: list[Tensor] = []  # parameters and buffer after every micro-batch

    def step(self, samples: int = 1) -> None:
        """One micro-batch."""
        for param, grad in zip(self.params, gradients(self.params, self.number, self.steps), strict=True):
            param.grad = grad
        self.buffer.mul_(0.9).add_(0.1 * (self.number + self.steps))
        self.strategy.step(samples)
        self.steps += 1
        self.history.append(flat([*self.params, self.buffer]))

    def go_on_from(self, other: "Peer") -> None:
        """Take over what any checkpoint holds: parameters, buffer and optimiser, and the place in the data."""
        with torch.no_grad():
            torch._foreach_copy_([*self.params, self.buffer], [*other.params, other.buffer])
        self.optimizer.load_state_dict(deepcopy(other.optimizer.state_dict()))
        self.steps = other.steps

    def run(self, steps: int, samples: int = 1) -> "Peer":
        """So many micro-batches of `samples` each."""
        for _ in range(steps):
            self.step(samples)
        return self


def together(swarm: MemorySwarm, peers: Sequence[Callable[[MemoryTransport], Result]]) -> list[Result]:
    """What each peer's work comes to, all done at once; all have joined before anybody begins."""
    transports = [swarm.join(name) for name in names(len(peers))]
    return at_once([lambda work=work, transport=transport: work(transport)  # type: ignore[misc]
                    for work, transport in zip(peers, transports, strict=True)])


def fixed_world(config: Averaging, samples: Sequence[int], steps: int) -> MemorySwarm:
    """In which each peer's epoch has `steps` micro-batches, of so many samples each."""
    quota: Mapping[str, int] = {name: steps * each for name, each in zip(names(len(samples)), samples, strict=True)}
    return MemorySwarm(config.target_batch_size, quota=quota)
