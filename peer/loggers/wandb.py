"""Weights & Biases, online or by WANDB_MODE=offline. Needs the extra: pip install 'covey[wandb]'."""

import os
import secrets
from collections.abc import Mapping

import wandb

from peer.loggers.logger import Run
from training.errors import BadInput


def open_logger(run: Run) -> "WandbLogger":
    return WandbLogger(run)


class WandbLogger:
    """One run at W&B for one folder, however often it is resumed; project: WANDB_PROJECT, else covey.

    Raises BadInput where W&B can't be reached or nobody is logged in.
    """

    def __init__(self, run: Run) -> None:
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "covey"), name=run.run_id, id=_id(run), resume="allow",
                dir=run.directory, config=dict(run.experiment), save_code=False,
                settings=wandb.Settings(silent=True, console="off", disable_git=True))
        except wandb.errors.Error as error:
            raise BadInput(f"W&B: {' '.join(str(error).split())}", expected="an account that is logged in, or "
                           "WANDB_MODE=offline", mend="Run `wandb login`, or set that.") from None
        # by epoch rather than W&B's own step, which could not go back to a checkpoint
        self._run.define_metric("*", step_metric="epoch")
        self.where = str(self._run.dir if self._run.offline else self._run.url)

    def update(self, values: Mapping[str, float], epoch: int) -> None:
        self._run.log({"epoch": epoch, **values})

    def close(self) -> None:
        self._run.finish()


def _id(run: Run) -> str:
    path = run.directory / "wandb-id"
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()
