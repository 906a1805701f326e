"""What an experiment is refused or warned for once the batch and the data are known. Imports no torch."""

from training.errors import BadInput
from training.recipe import SwavTraining, Training


def warnings(training: Training, batch_size: int, *, processes: int = 1, sharing: int | None = None) -> list[str]:
    """What will probably go wrong with micro-batches of `batch_size` in each of `processes`, and the mend.

    `sharing`: processes that assign their images together and share a queue; by default all.
    """
    found = []
    if training.model.sync_bn.convert_bn_to_sync_bn and processes == 1:
        found.append("model.sync_bn.convert_bn_to_sync_bn changes nothing: there is one process, with nobody to "
                     "synchronise with.")
    return found + (_of_swav(training, batch_size, sharing or processes) if isinstance(training, SwavTraining) else [])


def pass_warnings(training: Training, images: int) -> list[str]:
    """What of a schedule in passes does not suit `images`, where one machine has them all."""
    nominal = training.data.images_per_pass
    if not training.optimizer.num_epochs or 0.9 < images / nominal < 1.1:
        return []
    return [f"optimizer.num_epochs counts passes of {nominal} images, and there are {images}. Set data.num_images."]


def _of_swav(training: SwavTraining, batch_size: int, processes: int) -> list[str]:
    length = training.loss.queue.queue_length
    prototypes, batch = max(training.model.head.num_clusters), batch_size * processes
    unused = [f"loss.queue.queue_length = {length} holds no whole batch of {batch}: there is no queue. Lengthen it, or "
              "make the batch smaller."] if 0 < length < batch else []
    images = batch + length // batch * batch
    if 4 * images >= prototypes:
        return unused
    enough = -(-(prototypes - 4 * batch) // (4 * batch)) * batch
    return [*unused,
            f"{images} images (batch and queue) share {prototypes} prototypes: most get almost nothing, and the loss "
            f"may stay at ln {prototypes}. Set loss.queue.queue_length to {enough} or more, or the largest of "
            f"model.head.num_clusters to {4 * images} or less, or enlarge the batch."]


def require_queue_within(training: Training, images: int) -> None:
    """Raises BadInput if the queue is longer than the data: it would hold the same images twice."""
    length = training.loss.queue.queue_length if isinstance(training, SwavTraining) else 0
    if length > images:
        raise BadInput(f"loss.queue.queue_length = {length}", expected=f"at most {images}, the images that there are",
                       mend="Shorten the queue, or leave it out with 0.")
