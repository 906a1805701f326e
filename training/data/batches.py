"""Batches without end: every pass over the images in an order of its own, cropped ahead of the training."""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from threading import Barrier

import torch
from torch import Tensor

from training.data.checks import check_batch_size
from training.data.crops import draw_crops
from training.data.draws import seeded
from training.data.sources import DECODING_THREADS, Source, stand_ins
from training.data.transforms_config import Transforms

START_SECONDS = 60.0  # within which the system gives us all threads, or reading fails


@dataclass(frozen=True)
class Batch:
    """Crops of `samples` images, cut and brought to size; the rest of the views is made on the device."""

    number: int            # batches of this key before it
    crops: list[Tensor]    # uint8, one [num_crops * samples, 3, size, size] per size, crop-major
    labels: Tensor | None  # int64 [samples]
    samples: int


def batches(source: Source, transforms: Transforms, batch_size: int, *, key: str, start: int = 0, every: int = 1,
            threads: int = DECODING_THREADS) -> Generator[Batch, None, None]:
    """Endless batches from number `start` on, each `every`th; an incomplete one at a pass's end is dropped.

    The order of a pass depends on `key` and the number of the pass, crops on `key` and the number of the batch: so
    a run that goes on at `start` sees what it would have seen. `key` names the peer and how often it has started:
    seeded alike, all peers would see one order of data, and a peer the same one after each restart. Processes that
    share a key, and of n take each nth batch from the first, second, ... on, share each pass without overlap.
    `threads` threads each make whole batches, one ahead apiece; they end when the iterator is closed.
    Raises BadInput, at once, if the source cannot fill a batch.
    """
    check_batch_size(batch_size, len(source))

    def make(number: int, indices: list[int]) -> Batch:
        crops = source.crops(indices, draw_crops(transforms, batch_size, key, number))
        labels = None if source.labels is None else source.labels[stand_ins(source, indices)]
        return Batch(number, crops, labels, batch_size)

    return _read_ahead(make, islice(_orders(len(source), batch_size, key, start), 0, None, every), threads)


def _orders(size: int, batch_size: int, key: str, start: int) -> Iterator[tuple[int, list[int]]]:
    per_pass = size // batch_size
    first_pass, skipped = divmod(start, per_pass)
    for number in count(first_pass):
        order = torch.split(torch.randperm(size, generator=seeded(key, number, "order")), batch_size)
        for place in range(skipped if number == first_pass else 0, per_pass):
            yield number * per_pass + place, order[place].tolist()


def _read_ahead(make: Callable[[int, list[int]], Batch], orders: Iterator[tuple[int, list[int]]],
                threads: int) -> Generator[Batch, None, None]:
    started = Barrier(threads + 1, timeout=START_SECONDS)
    readers = ThreadPoolExecutor(threads, "read-ahead", initializer=_work_alone, initargs=(started,))
    try:
        ahead = deque(readers.submit(make, *order) for order in islice(orders, threads + 1))
        _restore_threads_after(started)
        for order in orders:
            yield ahead.popleft().result()
            ahead.append(readers.submit(make, *order))
    finally:
        readers.shutdown(cancel_futures=True)


def _work_alone(started: Barrier) -> None:
    """Readers are parallel among themselves: were each operation of theirs, too, they would be in each other's way."""
    torch.set_num_threads(1)
    torch.get_num_threads()  # a thread takes over what is set for all when it first asks
    started.wait()


def _restore_threads_after(started: Barrier) -> None:
    """`set_num_threads` holds for the thread that calls it, and for all that torch meets later."""
    threads = torch.get_num_threads()
    started.wait()
    torch.set_num_threads(threads)
