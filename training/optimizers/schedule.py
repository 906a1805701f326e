"""The learning rate as a closed form of the epoch, so that a peer that joins late agrees with the others."""

import math

from training.optimizers.config import Optimizer


def learning_rate(config: Optimizer, epoch: int, *, batch_size: int, images_per_pass: int) -> float:
    """The rate of the update that follows `epoch` updates of `batch_size` samples each.

    t is `epoch`, or with num_epochs the passes made over the data, epoch * batch_size / images_per_pass; peak is lr,
    scaled to `batch_size` where base_lr_batch_size is given. While t < warmup_epochs: linear from warmup_start_lr to
    peak. From there on:
    cosine: eta_min + (peak - eta_min) (1 + cos(pi p)) / 2, with p rising from 0 at the end of warm-up to 1 at that of
      the run, and staying there (Loshchilov and Hutter, arXiv 1608.03983, equation 5, without restarts);
    step: peak gamma^floor(t / step_size);  multi_step: peak gamma^(milestones passed);  constant: peak.
    """
    now = epoch if config.max_epochs else epoch * batch_size / images_per_pass
    peak = config.peak_lr(batch_size)
    if now < config.warmup_epochs:
        return config.warmup_start_lr + (peak - config.warmup_start_lr) * now / config.warmup_epochs
    match config.lr_scheduler:
        case "cosine":
            return _cosine(config, peak, now)
        case "step":
            return float(peak * config.gamma ** (now // config.step_size))
        case "multi_step":
            return float(peak * config.gamma ** sum(now >= milestone for milestone in config.milestones))
        case "constant":
            return peak


def _cosine(config: Optimizer, peak: float, now: float) -> float:
    end = config.max_epochs or config.num_epochs
    if now >= end:
        return config.eta_min
    progress = (now - config.warmup_epochs) / (end - config.warmup_epochs)
    return config.eta_min + (peak - config.eta_min) * (1 + math.cos(math.pi * progress)) / 2


def total_updates(config: Optimizer, *, batch_size: int, images_per_pass: int) -> int:
    """Updates of the whole run: max_epochs, or as many as num_epochs passes take, a last broken one included."""
    return config.max_epochs or -(-config.num_epochs * images_per_pass // batch_size)
