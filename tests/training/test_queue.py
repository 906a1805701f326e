import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from training.errors import BadInput
from training.objectives.checks import pass_warnings, require_queue_within, warnings
from training.objectives.config import Queue, SwavLoss
from training.objectives.objective import build_objective
from training.objectives.queue import EmbeddingQueue, local_queue_length
from training.objectives.swav import Swav, assignments, swapped_prediction_loss
from training.recipe import SwavTraining

Tiny = Callable[..., SwavTraining]
BATCH = 4


def views(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2 * BATCH, 3, side, side, generator=generator) for side in (16, 8)]


def build(training: SwavTraining) -> Swav:
    objective = build_objective(training, batch_size=BATCH)
    assert isinstance(objective, Swav)
    return objective


def embedding_of(objective: Swav, images: list[Tensor]) -> Tensor:
    """Of the assigned crops [C, B, D]."""
    with torch.no_grad():
        embedding, _ = objective.head(torch.cat([objective.backbone(crops) for crops in images]))
    return embedding.unflatten(0, (4, BATCH))[list(objective.config.crops_for_assign)]


def expected_loss(objective: Swav, images: list[Tensor], queue: Tensor) -> Tensor:
    """From the queue's embeddings [C, L, D] and the definition: assign batch and queue together, keep the batch."""
    with torch.no_grad():
        _, heads = objective.head(torch.cat([objective.backbone(crops) for crops in images]))
        losses = []
        for prototypes, scores in zip(objective.head.prototypes, heads, strict=True):
            crops = scores.unflatten(0, (4, BATCH))
            together = torch.cat([crops[list(objective.config.crops_for_assign)], prototypes(queue)], dim=1)
            codes = assignments(together, objective.config, epoch=0)[:, :BATCH]
            losses.append(swapped_prediction_loss(crops, codes, objective.config))
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("asked", "batches", "local", "said"), [
    (0, (64, 1), 0, False), (3840, (64, 1), 3840, False), (3840, (64, 4), 960, False), (3840, (100, 1), 3800, True),
    (3900, (64, 2), 1920, True), (63, (64, 1), 0, True)])
def test_queue_is_lowered_to_a_multiple_of_the_groups_batch(
        asked: int, batches: tuple[int, int], local: int, said: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert local_queue_length(Queue(queue_length=asked), *batches) == local
    assert ("queue_length lowered" in caplog.text) == said
    assert ("there is no queue" in caplog.text) == (said and not local)


def test_newest_batch_comes_first_and_the_oldest_falls_out() -> None:
    queue = EmbeddingQueue(crops=2, length=6, width=1)
    batches = torch.arange(16).float().view(4, 2, 2, 1)
    for number, batch in enumerate(batches):
        assert queue.full == (number >= 3)
        queue.push(batch)
    assert torch.equal(queue.embeddings, torch.cat([batches[3], batches[2], batches[1]], dim=1))


@pytest.mark.parametrize("overrides", [[], ["model.head.num_clusters=[6,9]"], ["loss.crops_for_assign=[3,0,1]"]])
def test_queue_takes_part_in_the_assignment_once_it_is_full(tiny: Tiny, overrides: list[str]) -> None:
    objective = build(tiny("loss.queue.queue_length=8", *overrides))
    past = [embedding_of(objective, views(step)) for step in range(4)]
    losses = [objective(views(step), None, epoch=0)[0] for step in range(4)]
    for step in (0, 1):
        torch.testing.assert_close(losses[step].detach(), expected_loss(objective, views(step), past[0][:, :0]))
    for step in (2, 3):
        queue = torch.cat([past[step - 1], past[step - 2]], dim=1)
        torch.testing.assert_close(losses[step].detach(), expected_loss(objective, views(step), queue))
        assert losses[step] != expected_loss(objective, views(step), past[0][:, :0])


def test_queue_is_scored_by_the_prototypes_as_they_are_now(tiny: Tiny) -> None:
    objective = build(tiny("loss.queue.queue_length=4"))
    past = embedding_of(objective, views(0))
    objective(views(0), None, epoch=0)
    with torch.no_grad():
        objective.head.prototypes[0].weight.copy_(objective.head.prototypes[0].weight.roll(1, dims=1))
    loss, _ = objective(views(1), None, epoch=0)
    torch.testing.assert_close(loss.detach(), expected_loss(objective, views(1), past))


def test_queue_gathers_nothing_before_its_start(tiny: Tiny) -> None:
    objective = build(tiny("loss.queue.queue_length=4", "loss.queue.start_iter=5"))
    filled = []
    for epoch in (3, 4, 5):
        objective(views(epoch), None, epoch)
        filled.append(objective.queue.filled)
    assert filled == [0, 0, 4]


def test_queue_that_was_filled_before_its_start_does_not_count(tiny: Tiny) -> None:
    objective = build(tiny("loss.queue.queue_length=4"))
    objective(views(0), None, epoch=0)
    objective.config = SwavLoss(queue=Queue(queue_length=4, start_iter=2))
    loss, _ = objective(views(1), None, epoch=1)
    torch.testing.assert_close(loss.detach(), expected_loss(objective, views(1), torch.zeros(2, 0, 8)))


def test_no_gradient_flows_into_the_queue(tiny: Tiny) -> None:
    objective = build(tiny("loss.queue.queue_length=4"))
    for step in range(2):
        objective(views(step), None, epoch=0)[0].backward()
    assert not objective.queue.embeddings.requires_grad


def test_queue_is_the_peers_own(tiny: Tiny) -> None:
    with_queue, without = build(tiny("loss.queue.queue_length=8")), build(tiny())
    assert with_queue.state_dict().keys() == without.state_dict().keys()
    shared = list(with_queue.shared_buffers())
    assert not any(buffer is with_queue.queue.embeddings for buffer in shared)
    assert sorted(map(id, shared)) == sorted(id(buffer) for name, buffer in with_queue.named_buffers()
                                             if name.endswith(("running_mean", "running_var")))


def test_evaluation_has_no_queue(tiny: Tiny) -> None:
    objective = build_objective(tiny("loss.queue.queue_length=8"))
    assert isinstance(objective, Swav)
    objective(views(0), None, epoch=0)
    assert objective.local_state() == {}


def test_local_state_goes_on_where_the_other_stopped(tiny: Tiny) -> None:
    training = tiny("loss.queue.queue_length=8")
    first, second = build(training), build(training)
    for step in range(2):
        first(views(step), None, epoch=0)
    second.load_state_dict(first.state_dict())
    second.load_local_state({name: tensor.clone() for name, tensor in first.local_state().items()})
    losses = [objective(views(2), None, epoch=0)[0] for objective in (first, second)]
    assert torch.equal(*losses)
    assert torch.equal(first.queue.embeddings, second.queue.embeddings)


@pytest.mark.parametrize("other", ["loss.queue.queue_length=4", "loss.queue.queue_length=0"])
def test_queue_of_another_shape_starts_empty_with_a_line_in_the_log(
        tiny: Tiny, other: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    objective, another = build(tiny("loss.queue.queue_length=8")), build(tiny(other))
    objective.load_local_state(another.local_state())
    assert objective.queue.filled == 0
    assert "the queue starts empty" in caplog.text


def test_queue_longer_than_the_data_is_refused(tiny: Tiny) -> None:
    with pytest.raises(BadInput, match=r"loss\.queue\.queue_length of at most 100, the images of one pass, not 128"):
        tiny("loss.queue.queue_length=128", "data.num_images=100")
    training = tiny("loss.queue.queue_length=128", "data.num_images=128")
    require_queue_within(training, 128)
    with pytest.raises(BadInput, match="at most 127"):
        require_queue_within(training, 127)


@pytest.mark.parametrize(("prototypes", "batches", "queue", "warned"), [
    (3000, (64, 1), 0, True), (3000, (64, 1), 3840, False), (3000, (94, 8), 0, False), (3000, (93, 8), 0, True),
    (256, (64, 1), 0, False), (257, (64, 1), 0, True), (3000, (64, 1), 686, True), (3000, (64, 1), 704, False)])
def test_too_few_images_for_the_prototypes_are_warned_of(
        tiny: Tiny, prototypes: int, batches: tuple[int, int], queue: int, warned: bool) -> None:
    training = tiny(f"model.head.num_clusters=[6,{prototypes}]", f"loss.queue.queue_length={queue}")
    batch, processes = batches
    assert bool(warnings(training, batch, processes=processes)) == warned


def test_either_mend_of_that_warning_silences_it(tiny: Tiny) -> None:
    training = tiny("model.head.num_clusters=[3000]")
    (warning,) = warnings(training, 64)
    assert "queue_length to 704 or more" in warning
    assert "num_clusters to 256 or less" in warning
    assert not warnings(tiny("model.head.num_clusters=[3000]", "loss.queue.queue_length=704"), 64)
    assert not warnings(tiny("model.head.num_clusters=[256]"), 64)


def test_a_queue_that_holds_no_whole_batch_is_warned_of(tiny: Tiny) -> None:
    (message,) = warnings(tiny("loss.queue.queue_length=63"), 64)
    assert "holds no whole batch of 64" in message
    assert warnings(tiny("loss.queue.queue_length=64"), 64) == []


def test_synchronised_batchnorm_in_one_process_is_warned_of(tiny: Tiny) -> None:
    training = tiny("model.sync_bn.convert_bn_to_sync_bn=true")
    assert "nobody to synchronise with" in warnings(training, 64)[0]
    assert warnings(training, 64, processes=2) == []


def test_passes_of_another_length_than_the_data_are_warned_of(tiny: Tiny) -> None:
    training = tiny("optimizer.max_epochs=0", "optimizer.num_epochs=2", "data.num_images=1000")
    assert pass_warnings(training, 950) == []
    assert "there are 500. Set data.num_images." in pass_warnings(training, 500)[0]
