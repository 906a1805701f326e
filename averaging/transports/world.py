"""A fixed world of processes over torch.distributed: gloo between CPUs, NCCL between GPUs. All are always there."""

import hashlib
import socket
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from time import monotonic
from typing import Any

import torch
from torch import Tensor, distributed

from averaging.compression import BLOCK, check_codec, decode, encode
from averaging.transports.transport import Meeting, Outcome, Standing

BUCKET_BYTES = 25 * 2**20  # of one all-reduce: while one is under way, the next is being filled
Reducer = Callable[[Tensor, Tensor], Tensor]  # contributions [n, d] and weights [n] -> [d], float32


class World:
    """A `Transport` between the processes of torch.distributed's default group; of one process, where there is none.

    All processes must hold the same meetings in the same order, and have equal micro-batches: nobody asks the others
    how far they are. A process that is lost is no outcome of a meeting: the collectives raise, and the run is over.
    Meetings run in the background: of all processes, uncompressed, by all-reduce in buckets of BUCKET_BYTES; otherwise
    each member reduces one span of everybody's, as the members of a swarm do (`Exchanged`).
    """

    def __init__(self, target_batch_size: int, *, reduce: Reducer | None = None) -> None:
        """`target_batch_size`: samples of all processes that end an epoch. `reduce`: None for the weighted mean."""
        alone = not distributed.is_initialized()
        self._rank, self._size = (0, 1) if alone else (distributed.get_rank(), distributed.get_world_size())
        self._target, self._reduce = target_batch_size, reduce
        self._epoch = self._samples = self._seen = 0
        self._checked = {"none"}
        self._everyone = tuple(map(peer_name, range(self._size)))
        self.machines = self._find_machines()

    @property
    def peer_id(self) -> str:
        """The rank, in digits that sort."""
        return peer_name(self._rank)

    def saw(self, samples: int) -> None:
        """A micro-batch has been made, as on all other processes at this time; also where its gradient is dropped."""
        self._seen += samples

    def report(self, epoch: int, samples: int, fingerprint: bytes = b"") -> None:
        """Nobody needs to be told."""
        if epoch != self._epoch:
            self._seen = 0
        self._epoch, self._samples = epoch, samples

    def standing(self) -> Standing:
        """All are where this process is."""
        return Standing(self._epoch, self._samples * self._size, self._size)

    def is_due(self, epoch: int) -> bool:
        """By what `saw` was told, so that a dropped gradient puts nobody out of step."""
        return epoch == self._epoch and self._seen * self._size >= self._target

    def members(self, epoch: int) -> tuple[str, ...]:
        """All processes, by rank."""
        return self._everyone

    def meet(self, tensors: Sequence[Tensor], weight: float, *, kind: str, epoch: int, group: Sequence[str],
             compression: str = "none", buffers: Sequence[Tensor] = (), state: Sequence[Tensor] = (),
             fingerprint: bytes = b"", state_compression: str = "none", samples: int = 0) -> Meeting:
        """See `Transport`; nobody is credited here.

        Of `state`, only fingerprints travel now; if they differ, it is averaged by `result`.
        """
        ranks = tuple(sorted(map(int, group)))
        assert self._rank in ranks, "a process averages in its own group"
        if len(ranks) == 1:
            return Alone()
        swap = Swap(ranks, self._rank, f"{kind}/{epoch}")
        is_of_a_kind = compression == state_compression == "none"
        means = [self._mean([*tensors, *buffers], weight, compression, swap)] if is_of_a_kind or not buffers else [
            self._mean(tensors, weight, compression, swap),
            self._mean(buffers, weight, state_compression, swap.named("buffers"))]
        return WorldMeeting(
            ranks, means, state=lambda: self._mean(state, weight, state_compression, swap.named("state")),
            is_equal=_equal(fingerprint, swap.named("fingerprint")) if state else lambda: True)

    def offer_state(self, read: Callable[[], Mapping[str, Tensor]]) -> None:
        """Nobody comes later."""

    def fetch_state(self) -> None:
        """Nobody is further on."""

    def close(self) -> None:
        """Whoever initialised torch.distributed ends it."""

    def _mean(self, tensors: Sequence[Tensor], weight: float, codec: str, swap: "Swap") -> "Mean":
        """Starts to average; every member must."""
        if codec not in self._checked:
            check_codec(codec)
            self._checked.add(codec)
        if codec == "none" and self._reduce is None and len(swap.ranks) == self._size:
            return AllReduced(tensors, weight, self._size)
        return Exchanged(tensors, weight, swap, codec=codec, reduce=self._reduce or weighted_mean)

    def _find_machines(self) -> tuple[tuple[str, ...], ...]:
        """Which processes share a machine, by its name."""
        if self._size == 1:
            return (self._everyone,)
        mine = torch.frombuffer(bytearray(hashlib.sha256(socket.gethostname().encode()).digest()), dtype=torch.uint8)
        names = [torch.empty_like(mine) for _ in self._everyone]
        distributed.all_gather(names, mine)
        by_name = sorted((bytes(name.tolist()), peer) for name, peer in zip(names, self._everyone, strict=True))
        return tuple(sorted(tuple(peer for _, peer in found) for _, found in groupby(by_name, lambda pair: pair[0])))


class Alone:
    """A `Meeting` with nobody."""

    def done(self) -> bool:
        """At once."""
        return True

    def result(self) -> Outcome:
        """Nothing was averaged."""
        return Outcome(averaged=False, reason="alone")

    def cancel(self) -> None:
        """There is nothing to give up."""


class WorldMeeting:
    """A `Meeting` of processes that are all there."""

    def __init__(self, ranks: tuple[int, ...], means: Sequence["Mean"], *, state: Callable[[], "Mean"],
                 is_equal: Callable[[], bool]) -> None:
        """`state` starts to average it, unless `is_equal`."""
        self._started, self._members = monotonic(), tuple(map(peer_name, ranks))
        self._means, self._state, self._is_equal = means, state, is_equal
        self._outcome: Outcome | None = None

    def done(self) -> bool:
        """Only after `result`: whoever looked earlier would take it up at another step than the others."""
        return self._outcome is not None

    def result(self) -> Outcome:
        """Raises what torch.distributed does where a process is lost."""
        if self._outcome is None:
            self._outcome = self._finish()
        return self._outcome

    def cancel(self) -> None:
        """The others would wait: it ends as it ends."""

    def _finish(self) -> Outcome:
        differs = not self._is_equal()
        if not all([mean.take() for mean in self._means]):  # noqa: C419 - take each, whatever the others say
            return Outcome(False, reason="no member had anything finite to contribute",
                           seconds=monotonic() - self._started)
        moved = sum(mean.bytes for mean in self._means)
        if differs:
            state = self._state()
            state.take()
            moved += state.bytes
        return Outcome(True, self._members, differs, seconds=monotonic() - self._started, bytes_sent=moved,
                       bytes_received=moved)


class AllReduced:
    """The weighted mean by all-reduce, in buckets of one device and dtype, float32 at least."""

    def __init__(self, tensors: Sequence[Tensor], weight: float, members: int) -> None:
        self._buckets = [_Bucket(bucket, weight) for bucket in _buckets(tensors)]
        self.bytes = sum(bucket.flat.nbytes for bucket in self._buckets) * 2 * (members - 1) // members

    def take(self) -> bool:
        """Waits, and writes the mean into the tensors; False, and nothing is written, where all weights are 0."""
        for bucket in self._buckets:
            bucket.work.wait()
        if not self._buckets or not float(self._buckets[0].flat[-1]):
            return False
        for bucket in self._buckets:
            bucket.write()
        return True


class _Bucket:
    """The sum of weight * values, and behind it that of the weights."""

    @torch.no_grad()
    def __init__(self, tensors: list[Tensor], weight: float) -> None:
        self._tensors, wide = tensors, torch.promote_types(tensors[0].dtype, torch.float32)
        last = torch.ones(1, dtype=wide, device=tensors[0].device)
        self.flat = torch.cat([*(tensor.detach().flatten().to(wide) for tensor in tensors), last])
        if weight:
            self.flat *= weight
        else:
            self.flat.zero_()  # 0 * NaN would be NaN
        work = distributed.all_reduce(self.flat, async_op=True)
        assert work is not None
        self.work: Any = work

    @torch.no_grad()
    def write(self) -> None:
        values, total = self.flat[:-1], self.flat[-1]
        _scatter(values.div_(total), self._tensors)


class Swap:
    """Messages between the members of a group, each with each; of one `purpose`, so that others are kept apart.

    Process groups would be made in one order by all processes of the world, who don't know each other's groups; those
    of `use_local_synchronization` are named by how many a process has made.
    """

    def __init__(self, ranks: tuple[int, ...], me: int, purpose: str) -> None:
        self.ranks, self.me = ranks, me
        self.index, self._purpose = ranks.index(me), purpose
        self._tag = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:3])

    def named(self, part: str) -> "Swap":
        """The same for another part of the purpose."""
        return Swap(self.ranks, self.me, f"{self._purpose}/{part}")

    def start(self, parts: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Sends each member its part, all of one shape; what is returned waits for those of all, by rank."""
        received = [part if rank == self.me else torch.empty_like(part)
                    for rank, part in zip(self.ranks, parts, strict=True)]
        others = [(rank, sent, got) for rank, sent, got in zip(self.ranks, parts, received, strict=True)
                  if rank != self.me]
        works = distributed.batch_isend_irecv(
            [distributed.P2POp(distributed.isend, sent, rank, tag=self._tag) for rank, sent, _ in others]
            + [distributed.P2POp(distributed.irecv, got, rank, tag=self._tag) for rank, _, got in others])

        def wait() -> list[Tensor]:
            for work in works:
                work.wait()
            return received
        return wait


class Exchanged:
    """Every member gets one span of all members' vectors, encoded, and sends what it makes of it to all, encoded.

    In float32; uncompressed where the tensors are, otherwise on the CPU.
    """

    def __init__(self, tensors: Sequence[Tensor], weight: float, swap: Swap, *, codec: str, reduce: Reducer) -> None:
        self._tensors, self._swap, self._codec, self._reduce = tensors, swap, codec, reduce
        device, members = tensors[0].device if codec == "none" else torch.device("cpu"), len(swap.ranks)
        values = torch.cat([tensor.detach().flatten().to(device, torch.float32) for tensor in tensors])
        if not weight:
            values.zero_()
        self._span = -(-len(values) // (members * BLOCK)) * BLOCK  # cut where blocks end
        padded = torch.nn.functional.pad(values, (0, members * self._span - len(values)))
        head = torch.tensor([weight], dtype=torch.float64).view(torch.uint8).to(device)
        parts = [torch.cat([head, self._encoded(span)]) for span in torch.split(padded, self._span)]
        self.bytes = 2 * sum(part.nbytes for part in parts[1:])
        self._receive = swap.start(parts)

    def _encoded(self, values: Tensor) -> Tensor:
        if self._codec == "none":
            return values.contiguous().view(torch.uint8)
        return torch.frombuffer(bytearray(encode(self._codec, values)), dtype=torch.uint8)

    def _decoded(self, data: Tensor) -> Tensor:
        if self._codec == "none":
            return data.view(torch.float32)
        return decode(self._codec, data.numpy().data, self._span)

    @torch.no_grad()
    def take(self) -> bool:
        """Waits, and writes the mean into the tensors; False, and nothing is written, where all weights are 0."""
        received = self._receive()
        weights = torch.stack([part[:8] for part in received]).view(torch.float64)[:, 0]
        if not weights.any():
            return False
        given = [part[8:] for part, weight in zip(received, weights.tolist(), strict=True) if weight]
        mine = self._encoded(self._reduce(torch.stack([self._decoded(data) for data in given]),
                                          weights[weights > 0].float()))
        spans = self._swap.named("mean").start([mine] * len(received))()
        _scatter(torch.cat([self._decoded(span) for span in spans]), self._tensors)
        return True


def _equal(fingerprint: bytes, swap: Swap) -> Callable[[], bool]:
    """Starts to compare; what is returned waits for the answer: whether all members have this fingerprint."""
    mine = torch.frombuffer(bytearray(hashlib.sha256(fingerprint).digest()), dtype=torch.uint8)
    receive = swap.start([mine] * len(swap.ranks))
    return lambda: all(torch.equal(mine, other) for other in receive())


Mean = AllReduced | Exchanged


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """[n, d] and [n] -> [d]."""
    return weights @ values / weights.sum()


def peer_name(rank: int) -> str:
    """Digits that sort by rank."""
    return f"{rank:06d}"


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Neighbours of one device and dtype, up to BUCKET_BYTES together."""
    found: list[list[Tensor]] = []
    free = 0
    for tensor in tensors:
        alike = bool(found) and (found[-1][0].device, found[-1][0].dtype) == (tensor.device, tensor.dtype)
        if not alike or tensor.nbytes > free:
            found.append([])
            free = BUCKET_BYTES
        found[-1].append(tensor)
        free -= tensor.nbytes
    return found


def _scatter(values: Tensor, tensors: Sequence[Tensor]) -> None:
    sizes = [tensor.numel() for tensor in tensors]
    parts = torch.split(values[:sum(sizes)], sizes)
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.detach().copy_(part.view_as(tensor))
