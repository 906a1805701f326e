"""SwAV's queue: embeddings of earlier batches, which take part in the assignment (arXiv 2006.09882, section 4.1)."""

import logging

import torch
from torch import Tensor, nn

from training.objectives.config import Queue

log = logging.getLogger(__name__)


class EmbeddingQueue(nn.Module):
    """The latest embeddings of every assigned crop, float32 [C, L, D], newest batch first.

    Local to its process and no part of the state dict: peers neither average nor download it.
    """

    embeddings: Tensor

    def __init__(self, crops: int, length: int, width: int) -> None:
        super().__init__()
        self.register_buffer("embeddings", torch.zeros(crops, length, width), persistent=False)
        self.filled = 0  # of the L places

    @property
    def full(self) -> bool:
        """Whether its embeddings count."""
        return 0 < self.embeddings.shape[1] == self.filled

    @torch.no_grad()
    def push(self, batch: Tensor) -> None:
        """Takes in embeddings [C, B, D] at the front; the oldest fall out at the end."""
        length = self.embeddings.shape[1]
        self.embeddings.copy_(torch.cat([batch.to(self.embeddings.dtype), self.embeddings], dim=1)[:, :length])
        self.filled = min(length, self.filled + batch.shape[1])

    def state(self) -> dict[str, Tensor]:
        """Tensors from which `load` makes the same queue."""
        return {"queue.embeddings": self.embeddings, "queue.filled": torch.tensor(self.filled)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes up a `state`; where that has another shape, as with another batch size, the queue starts empty."""
        embeddings, filled = state.get("queue.embeddings"), state.get("queue.filled")
        if embeddings is None or filled is None or embeddings.shape != self.embeddings.shape:
            found = "nothing" if embeddings is None else f"shape {list(embeddings.shape)}"
            log.info("the queue starts empty: the checkpoint has %s for it, this run %s", found,
                     f"shape {list(self.embeddings.shape)}")
            return
        self.embeddings.copy_(embeddings)
        self.filled = int(filled)


def local_queue_length(config: Queue, batch_size: int, processes: int) -> int:
    """Places in the queue of each of `processes`: queue_length, lowered to a multiple of their batch, over them."""
    group_batch = batch_size * processes
    length = config.queue_length - config.queue_length % group_batch
    if length < config.queue_length:
        log.info("loss.queue.queue_length lowered from %d to %d, a multiple of the batch of %d%s", config.queue_length,
                 length, group_batch, "" if length else ": there is no queue")
    return length // processes
