"""The order in which peers see their images."""

import threading
from itertools import islice

import pytest
import torch

from training.data.batches import batches
from training.data.sources import MemorySource
from training.errors import BadInput

NUMBERED = MemorySource(torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 3, 2, 2), None)


def order(count: int, batch_size: int = 5, identity: str = "me", run: int = 0) -> list[int]:
    stream = islice(batches(NUMBERED, batch_size, identity=identity, run=run), count)
    return [int(number) for batch in stream for number in batch[:, 0, 0, 0]]


def test_a_pass_shows_every_image_once() -> None:
    assert sorted(order(2)) == list(range(10))


def test_every_pass_has_an_order_of_its_own() -> None:
    numbers = order(4)
    assert sorted(numbers[10:]) == list(range(10))
    assert numbers[:10] != numbers[10:]


def test_incomplete_batch_at_the_end_of_a_pass_is_dropped() -> None:
    numbers = order(4, batch_size=4)
    assert len(set(numbers[:8])) == 8
    assert len(set(numbers[8:])) == 8


def test_equal_identity_and_run_give_equal_order() -> None:
    assert order(6) == order(6)


def test_identity_and_run_change_the_order() -> None:
    assert order(6) != order(6, identity="you")
    assert order(6) != order(6, run=1)


@pytest.mark.parametrize("batch_size", [0, 11])
def test_batch_that_the_images_cannot_fill_is_bad_input_at_once(batch_size: int) -> None:
    with pytest.raises(BadInput, match=f"batch size {batch_size}; expected 1 to 10"):
        batches(NUMBERED, batch_size, identity="me", run=0)


def test_reading_ahead_ends_with_the_iterator() -> None:
    before = set(threading.enumerate())
    stream = batches(NUMBERED, 5, identity="me", run=0)
    next(stream)
    assert set(threading.enumerate()) - before
    stream.close()  # type: ignore[attr-defined]
    assert not set(threading.enumerate()) - before


def test_unreadable_images_fail_where_the_batch_is_taken() -> None:
    class Broken(MemorySource):
        def images(self, indices: object) -> torch.Tensor:
            raise BadInput("nothing readable", expected="images", mend="Look.")

    stream = batches(Broken(NUMBERED.images(range(10)), None), 5, identity="me", run=0)
    with pytest.raises(BadInput, match="nothing readable"):
        next(stream)
