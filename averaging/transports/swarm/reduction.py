"""The numbers of an all-reduce: which peer reduces what, in which pieces, and the mean of the pieces. No sockets."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, isfinite

import torch
from torch import Tensor

from averaging.compression import BLOCK, decode, encode, encoded_size
from averaging.robust import centered_clip

MOST_VALUES = 1 << 18   # in a chunk; see lay_out
LEAST_VALUES = 1 << 14
CHUNKS = 8              # of a reducer at least, where that leaves them LEAST_VALUES
WINDOW = 4              # chunks that a sender may be ahead of the slowest
ALIGNED = 64            # bytes; chunks in memory begin at multiples of it


@dataclass(frozen=True)
class Chunk:
    """What one frame carries: some consecutive values of one section."""

    start: int    # among all values
    values: int
    codec: str
    section: int

    @property
    def size(self) -> int:
        """In bytes, as encoded."""
        return encoded_size(self.codec, self.values)

    def of(self, vector: Tensor) -> Tensor:
        return vector[self.start:self.start + self.values]


class Refusal(Exception):
    """What `member` brings is not to be used."""

    def __init__(self, member: int, reason: str) -> None:
        super().__init__(reason)
        self.member, self.reason = member, reason


def lay_out(sections: Sequence[tuple[int, str]], reducers: int) -> list[tuple[Chunk, ...]]:
    """Every reducer's chunks: as many for each as for the others, give or take one; none for some if there are few.

    `sections`: (values, codec), one after the other; no chunk has values of two. Chunks begin at multiples of BLOCK
    values within their section.
    """
    values = ceil(sum(count for count, _ in sections) / (reducers * CHUNKS))
    values = ceil(min(max(values, LEAST_VALUES), MOST_VALUES) / BLOCK) * BLOCK
    chunks, start = [], 0
    for section, (count, codec) in enumerate(sections):
        chunks += [Chunk(start + first, min(values, count - first), codec, section)
                   for first in range(0, count, values)]
        start += count
    cuts = [len(chunks) * reducer // reducers for reducer in range(reducers + 1)]
    return [tuple(chunks[first:last]) for first, last in pairwise(cuts)]


def as_bytes(values: Tensor) -> memoryview:
    """The memory of `values` (float32, [n], CPU, contiguous)."""
    return memoryview(values.numpy().data).cast("B")


def are_finite(values: Tensor) -> bool:
    return isfinite(values.sum()) or bool(torch.isfinite(values).all())  # the sum is fast, but may overflow


def encoded(chunk: Chunk, vector: Tensor) -> bytes | memoryview:
    """The chunk's values as they travel; of codec none, `vector`'s own memory. ValueError if one is not finite."""
    values = chunk.of(vector)
    if chunk.codec != "none":
        return encode(chunk.codec, values)
    if not are_finite(values):
        raise ValueError("a value to send is not finite")
    return as_bytes(values)


def decoded(chunk: Chunk, data: memoryview) -> Tensor:
    """The values in `data`; of codec none in its own memory, and finite or not. ValueError as `decode`."""
    if chunk.codec != "none":
        return decode(chunk.codec, data, chunk.values)
    return torch.frombuffer(data, dtype=torch.float32)


class Span:
    """The chunks that this peer reduces: sums in the members' order, so that equal input gives equal bits.

    `shares`: of each member that contributes, its weight over all weights. `mean` (float32, [all values]): receives
    the averages, as everybody decodes them. `vector`: this peer's own values, which are taken as they are, not as
    they would arrive after encoding. With `clip_radius` a chunk's average is robust.centered_clip of it, whose radius
    is of the distances within the chunk.
    """

    def __init__(self, chunks: Sequence[Chunk], *, shares: Mapping[int, float], me: int, vector: Tensor, mean: Tensor,
                 clip_radius: float | None) -> None:
        self.chunks = chunks
        self.averages: list[bytes | memoryview] = []  # of the first chunks, as they travel
        self._shares, self._me, self._vector, self._mean = dict(sorted(shares.items())), me, vector, mean
        self._clip_radius = clip_radius
        self._slot = ceil(max((chunk.size for chunk in chunks), default=0) / ALIGNED) * ALIGNED
        slots = min(WINDOW, len(chunks))
        self._memory = {member: memoryview(torch.empty(slots * self._slot, dtype=torch.uint8).numpy().data)
                        for member in shares if member != me}
        self._came = dict.fromkeys(self._memory, 0)  # chunks, of each member

    @property
    def is_done(self) -> bool:
        """Whether all averages are there."""
        return len(self.averages) == len(self.chunks)

    def is_from(self, member: int) -> bool:
        """Whether all chunks of `member` have come, or none is due."""
        return self._came.get(member, len(self.chunks)) == len(self.chunks)

    def missing(self) -> list[int]:
        """The members without whose next chunk there is no further average; empty: all are there."""
        return [member for member, came in self._came.items() if not self.is_done and came <= len(self.averages)]

    def place(self, member: int) -> memoryview | None:
        """Where the next chunk of `member` goes; None while it is too far ahead of others."""
        number = self._came[member]
        return self._sent(member, number) if number < len(self.averages) + WINDOW else None

    def came(self, member: int) -> int:
        """The chunk is in its place. Its size in bytes."""
        self._came[member] += 1
        return self.chunks[self._came[member] - 1].size

    def reduce(self) -> Iterator[bytes | memoryview]:
        """Reduce what is there of everybody: the new averages, as they travel. Raises Refusal."""
        while not self.is_done and all(came > len(self.averages) for came in self._came.values()):
            number = len(self.averages)
            mean = self.chunks[number].of(self._mean)
            self._put_together([self._values(member, number) for member in self._shares], mean)
            if not are_finite(mean):
                self._blame(number)
            self.averages.append(self._settle(self.chunks[number]))
            yield self.averages[-1]

    def forget(self) -> None:
        """Let go of all memory."""
        self._memory.clear()
        self.averages.clear()

    def _put_together(self, rows: Sequence[Tensor], mean: Tensor) -> None:
        shares = list(self._shares.values())
        if self._clip_radius is not None:
            mean.copy_(centered_clip(torch.stack(list(rows)), torch.tensor(shares), self._clip_radius))
            return
        torch.mul(rows[0], shares[0], out=mean)
        for values, share in zip(rows[1:], shares[1:], strict=True):
            mean.add_(values, alpha=share)

    def _blame(self, number: int) -> None:
        """Raise Refusal for the first member with a value that is not finite; if there is none, for the largest's."""
        largest = {member: float(self._values(member, number).abs().max()) for member in self._shares}
        for member, magnitude in largest.items():
            if not isfinite(magnitude):
                raise Refusal(member, "non-finite")
        raise Refusal(max(largest, key=largest.__getitem__), "overflow")

    def _values(self, member: int, number: int) -> Tensor:
        chunk = self.chunks[number]
        if member == self._me:
            return chunk.of(self._vector)
        try:
            return decoded(chunk, self._sent(member, number))
        except ValueError:
            raise Refusal(member, "non-finite" if chunk.codec in ("fp16", "bf16") else "misshapen") from None

    def _settle(self, chunk: Chunk) -> bytes | memoryview:
        """Put in place what everybody decodes; the average as it travels."""
        if chunk.codec == "none":
            return as_bytes(chunk.of(self._mean))
        data = encode(chunk.codec, chunk.of(self._mean))
        chunk.of(self._mean).copy_(decode(chunk.codec, data, chunk.values))
        return data

    def _sent(self, member: int, number: int) -> memoryview:
        first = number % WINDOW * self._slot
        return self._memory[member][first:first + self.chunks[number].size]
