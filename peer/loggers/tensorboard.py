"""TensorBoard: scalars by epoch in the run's folder tensorboard/. Needs the extra: pip install 'covey[tensorboard]'."""

from collections.abc import Mapping

from torch.utils.tensorboard import SummaryWriter

from peer.loggers.logger import Run


def open_logger(run: Run) -> "TensorBoardLogger":
    return TensorBoardLogger(run)


class TensorBoardLogger:
    """`tensorboard --logdir RUN_DIR` shows it; what an earlier start told of epochs after the resumed one is hidden."""

    def __init__(self, run: Run) -> None:
        self.where = str(run.directory / "tensorboard")
        self._writer = SummaryWriter(self.where, purge_step=run.epoch + 1 if run.epoch else None)

    def update(self, values: Mapping[str, float], epoch: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch)

    def close(self) -> None:
        self._writer.close()
