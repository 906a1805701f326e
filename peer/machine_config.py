"""What one machine trains with, in a swarm or alone. Imports no torch."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from training.config import Config


class Machine(Config):
    """Options of `covey join` and `covey train` alike: the choice of whoever runs them, no part of the experiment."""

    data: Path | None = Field(
        None, description="folder of this machine's images; none for an experiment that makes its own")
    preload: Path | None = Field(
        None, description="local folder to which tar shards are copied before training; what is there already is kept")
    preload_gib: float | None = Field(
        None, gt=0, description="GiB of it that shards may take, the rest is read from --data; none: as many as the "
        "disk has, less one")
    loader: Literal["torchvision", "dali"] = Field(
        "torchvision", description="what decodes and crops: torchvision, or NVIDIA DALI where that is installed")
    readers: int | None = Field(
        None, gt=0, description="threads that decode and crop, each a batch ahead; none: one per core, 8 at most")
    batch_size: int = Field(
        32, gt=0, description="images per micro-batch: as many as the device's memory takes; gradients gather until "
        "they stand for averaging.target_batch_size images, the swarm's where there is one")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="where to train: auto (a GPU if there "
        "is one), cpu, mps, cuda or cuda:N")
    threads: int | None = Field(
        None, gt=0, description="CPU threads of PyTorch; none leaves the choice to PyTorch: one per core")
    compile: bool = Field(False, description="compile the trunk by torch.compile")
    memory_format: Literal["auto", "channels_last", "contiguous"] = Field(
        "auto", description="how images lie in memory; auto: what measures fastest at the start")
    stop_at_epoch: int | None = Field(
        None, gt=0, description="end in good order once this epoch is reached, that is after so many updates")
    checkpoint_every_epochs: int = Field(
        10, gt=0, description="epochs between checkpoints; one more is written at the end and on Ctrl-C")
    keep_last_checkpoints: int = Field(
        3, ge=2, description="older checkpoints than this many are deleted; never all but the one being written")
    evaluate_every_epochs: int | None = Field(
        None, gt=0, description="epochs between evaluations on the validation images: k-NN, or top-1 and top-5 of a "
        "classifier; none: never in between. A swarm goes on meanwhile")
