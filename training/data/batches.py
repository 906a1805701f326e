"""Batches without end: every pass over the images in an order of its own."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import count, islice

import torch
from torch import Tensor

from training.data.folder import check_batch_size
from training.data.sources import Source


def batches(source: Source, batch_size: int, *, identity: str, run: int) -> Iterator[Tensor]:
    """Endless batches of images, uint8 [batch_size, 3, S, S]; an incomplete one at a pass's end is dropped.

    The order of a pass depends on `identity` (the peer's), `run` (how often that peer has started) and the
    number of the pass: seeded alike, all peers would see one order of data, and a peer the same one after each
    restart. Two batches are read ahead by a thread that ends when the iterator is closed.
    Raises BadInput, at once, if the source cannot fill a batch.
    """
    check_batch_size(batch_size, len(source))
    return _read_ahead(source, _orders(len(source), batch_size, f"{identity}/{run}"))


def _orders(size: int, batch_size: int, key: str) -> Iterator[list[int]]:
    for number in count():
        seed = int.from_bytes(sha256(f"{key}/{number}".encode()).digest()[:7])
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
        yield from (order[start:start + batch_size] for start in range(0, size - batch_size + 1, batch_size))


def _read_ahead(source: Source, orders: Iterator[list[int]]) -> Iterator[Tensor]:
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
        ahead = deque(reader.submit(source.images, indices) for indices in islice(orders, 2))
        for indices in orders:
            yield ahead.popleft().result()
            ahead.append(reader.submit(source.images, indices))
