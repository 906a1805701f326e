"""What an experiment is refused or warned for once the batch and the data are known. Imports no torch."""

from training.errors import BadInput
from training.recipe import SwavTraining, Training


def warnings(training: Training, batch_size: int, *, processes: int = 1) -> list[str]:
    """What will probably go wrong with micro-batches of `batch_size` in each process of a volunteer, and the mend."""
    if not isinstance(training, SwavTraining):
        return []
    prototypes, batch = max(training.model.head.num_clusters), batch_size * processes
    images = batch + training.loss.queue.queue_length // batch * batch
    if 4 * images >= prototypes:
        return []
    enough = -(-(prototypes - 4 * batch) // (4 * batch)) * batch
    return [f"{images} images (batch and queue) share {prototypes} prototypes: most get almost nothing, and the loss "
            f"may stay at ln {prototypes}. Set loss.queue.queue_length to {enough} or more, or the largest of "
            f"model.head.num_clusters to {4 * images} or less, or enlarge the batch."]


def require_queue_within(training: Training, images: int) -> None:
    """Raises BadInput if the queue is longer than the data: it would hold the same images twice."""
    length = training.loss.queue.queue_length if isinstance(training, SwavTraining) else 0
    if length > images:
        raise BadInput(f"loss.queue.queue_length = {length}", expected=f"at most {images}, the images that there are",
                       mend="Shorten the queue, or leave it out with 0.")
