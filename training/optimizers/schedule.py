"""The learning rate as a closed form of the epoch, so that a peer that joins late agrees with the others."""

import math

from training.optimizers.config import Optimizer


def learning_rate(config: Optimizer, epoch: int) -> float:
    """The rate of the update that follows `epoch` collaborative epochs.

    Linear from warmup_start_lr to lr over warmup_epochs, then half a cosine (Loshchilov and Hutter, arXiv
    1608.03983, equation 5, without restarts) to eta_min at max_epochs; eta_min from there on.
    """
    if epoch < config.warmup_epochs:
        return config.warmup_start_lr + (config.lr - config.warmup_start_lr) * epoch / config.warmup_epochs
    if epoch >= config.max_epochs:
        return config.eta_min
    progress = (epoch - config.warmup_epochs) / (config.max_epochs - config.warmup_epochs)
    return config.eta_min + (config.lr - config.eta_min) * (1 + math.cos(math.pi * progress)) / 2
