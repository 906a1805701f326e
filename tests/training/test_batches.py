"""The order in which peers see their images, and the threads that read them ahead."""

import threading
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.io import write_png

from training.data.batches import Batch, batches
from training.data.crops import CropDraw
from training.data.open import open_folder
from training.data.sources import MemorySource
from training.data.transforms_config import Transforms
from training.errors import BadInput

WHOLE = Transforms(total_num_crops=1, num_crops=(1,), size_crops=(2,), crop_scales=((1.0, 1.0),))
TWO_SIZES = Transforms(total_num_crops=3, num_crops=(2, 1), size_crops=(8, 4), crop_scales=((0.3, 1.0), (0.1, 0.3)))
NUMBERED = MemorySource(torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 3, 2, 2),
                        torch.arange(10) + 100)
NOISE = MemorySource(torch.randint(0, 256, (10, 3, 16, 16), dtype=torch.uint8,
                                   generator=torch.Generator().manual_seed(0)), None)


def take(count: int, batch_size: int = 5, key: str = "me/0", start: int = 0, threads: int = 2) -> list[Batch]:
    return list(islice(batches(NUMBERED, WHOLE, batch_size, key=key, start=start, threads=threads), count))


def order(*arguments: object, **options: object) -> list[int]:
    return [int(number) for batch in take(*arguments, **options) for number in batch.crops[0][:, 0, 0, 0]]


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


def test_equal_keys_give_equal_order_however_many_threads_read() -> None:
    assert order(6) == order(6, threads=1) == order(6, threads=5)


def test_peers_and_restarts_of_a_peer_see_orders_of_their_own() -> None:
    assert order(6) != order(6, key="you/0")
    assert order(6) != order(6, key="me/1")


def test_labels_and_numbers_go_with_the_crops() -> None:
    for number, batch in enumerate(take(5)):
        assert batch.number == number
        assert batch.samples == 5
        assert batch.labels is not None
        assert batch.labels.tolist() == [100 + int(image) for image in batch.crops[0][:, 0, 0, 0]]


@pytest.mark.parametrize("start", [0, 1, 2, 3, 7])
def test_going_on_at_a_number_shows_bit_for_bit_what_would_have_come(start: int) -> None:
    whole = list(islice(batches(NOISE, TWO_SIZES, 4, key="me/0"), 9))
    rest = list(islice(batches(NOISE, TWO_SIZES, 4, key="me/0", start=start), 9 - start))
    assert [batch.number for batch in rest] == list(range(start, 9))
    for one, other in zip(whole[start:], rest, strict=True):
        assert [crop.shape for crop in one.crops] == [(8, 3, 8, 8), (4, 3, 4, 4)]
        assert all(torch.equal(*pair) for pair in zip(one.crops, other.crops, strict=True))


@pytest.mark.parametrize("batch_size", [0, 11])
def test_batch_that_the_images_cannot_fill_is_bad_input_at_once(batch_size: int) -> None:
    with pytest.raises(BadInput, match=f"batch size {batch_size}; expected 1 to 10"):
        batches(NUMBERED, WHOLE, batch_size, key="me/0")


def test_reading_ahead_ends_with_the_iterator() -> None:
    before = set(threading.enumerate())
    stream = batches(NUMBERED, WHOLE, 5, key="me/0", threads=3)
    next(stream)
    assert len(set(threading.enumerate()) - before) == 3
    stream.close()
    assert not set(threading.enumerate()) - before


class Watched(MemorySource):
    """Numbered images that count how often they are asked for, and fail the second time if told to."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__(NUMBERED.images(range(10), 2, 2), None)
        self.broken, self.asked, self.threads = broken, threading.Semaphore(0), set[int]()

    def crops(self, indices: Sequence[int], draw: CropDraw) -> list[Tensor]:
        self.asked.release()
        self.threads.add(torch.get_num_threads())
        if self.broken:
            raise BadInput("nothing readable", expected="images", mend="Look.")
        return super().crops(indices, draw)


def test_each_thread_is_one_batch_ahead_and_no_further() -> None:
    source = Watched()
    stream = batches(source, WHOLE, 5, key="me/0", threads=3)
    for _ in range(4):
        next(stream)
    stream.close()
    asked = sum(source.asked.acquire(blocking=False) for _ in range(100))
    assert 4 <= asked <= 4 + 3


def test_readers_do_not_multiply_by_torchs_threads_and_training_keeps_its_own() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        source = Watched()
        stream = batches(source, WHOLE, 5, key="me/0", threads=2)
        next(stream)
        stream.close()
        assert source.threads == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_errors_of_a_reader_reach_whoever_takes_the_batch() -> None:
    before = set(threading.enumerate())
    with pytest.raises(BadInput, match="nothing readable"):
        next(batches(Watched(broken=True), WHOLE, 5, key="me/0"))
    assert not set(threading.enumerate()) - before


def test_label_is_that_of_the_image_that_is_shown(tmp_path: Path) -> None:
    """The only bee is corrupt: what stands in for it is the first ant, or the first cat, and labelled so."""
    for number, kind in enumerate(("ant", "bee", "cat")):
        (tmp_path / kind).mkdir()
        write_png(torch.full((3, 4, 4), 50 * number, dtype=torch.uint8), str(tmp_path / kind / "1.png"))
    (tmp_path / "bee" / "1.png").write_bytes(b"no image")
    for batch in islice(batches(open_folder(tmp_path, "train"), WHOLE, 3, key="me/0"), 4):
        assert batch.labels is not None
        assert sorted(batch.labels.tolist()) == [0, 2, 2]
        assert (batch.crops[0][:, 0, 0, 0] // 50).tolist() == batch.labels.tolist()
