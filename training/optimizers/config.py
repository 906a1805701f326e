"""An optimiser and the course of its learning rate: options of `optimizer.*`. Imports no torch.

Epochs are collaborative epochs, updates of the whole swarm, unless num_epochs is given: then all counts are of passes
over the training images.
"""

from itertools import pairwise
from typing import Literal, Self

from pydantic import Field, model_validator

from training.optimizers.rule_config import Rule, require_defaults

USED_BY = {"eta_min": {"cosine"}, "step_size": {"step"}, "milestones": {"multi_step"}, "gamma": {"step", "multi_step"}}


class Optimizer(Rule):
    """A rule, and its learning rate: linear warm-up, then what lr_scheduler says (training/optimizers/schedule.py)."""

    lr_scheduler: Literal["cosine", "step", "multi_step", "constant"] = Field(
        "cosine", description="after warm-up: half a cosine from lr to eta_min; lr times gamma after every "
        "step_size, or after each of the milestones; or lr throughout")
    max_epochs: int = Field(
        0, ge=0, description="length of the run in collaborative epochs, that is updates; 0: num_epochs says")
    num_epochs: int = Field(
        0, ge=0, description="length of the run in passes over the training images, in which warmup_epochs, "
        "step_size and milestones then count too; 0: max_epochs says")
    warmup_epochs: float = Field(0.0, ge=0, description="from warmup_start_lr to lr; updates, or passes")
    warmup_start_lr: float = Field(
        0.0, ge=0, description="learning rate of the first update, if there is warm-up; never scaled to the batch")
    eta_min: float = Field(
        0.0, ge=0, description="learning rate at the end of the cosine, where it stays; never scaled to the batch")
    step_size: int = Field(0, ge=0, description="step: updates, or passes, from one rate to the next")
    gamma: float = Field(0.1, gt=0, lt=1, description="step and multi_step: one rate over the one before")
    milestones: tuple[int, ...] = Field(
        (), description="multi_step: updates, or passes, from the start of the run, after which the rate drops")
    base_lr_batch_size: int = Field(
        0, ge=0, description="samples of the update that lr is meant for: where averaging.target_batch_size is k "
        "times as large, so is the rate (Goyal et al., arXiv 1706.02677); 0: lr is meant as it is")

    def peak_lr(self, batch_size: int) -> float:
        """The rate at the end of warm-up where an update has `batch_size` samples."""
        return self.lr * batch_size / self.base_lr_batch_size if self.base_lr_batch_size else self.lr

    def require_order(self, batch_size: int) -> None:
        """Raises ValueError unless warm-up rises to the peak for `batch_size`, and the cosine falls from it."""
        peak, base = self.peak_lr(batch_size), self.base_lr_batch_size
        scaled = f" x {batch_size} / {base} = {peak:g}" if base else ""
        for field in ("warmup_start_lr", "eta_min"):
            if getattr(self, field) > peak:
                raise ValueError(f"{field} of at most lr = {self.lr}{scaled}, not {getattr(self, field)}")

    @model_validator(mode="after")
    def _run_has_one_length(self) -> Self:
        if bool(self.max_epochs) == bool(self.num_epochs):
            raise ValueError("one of max_epochs (updates) and num_epochs (passes over the data) above 0, not "
                             + ("both: set the other to 0" if self.max_epochs else "neither"))
        length = f"max_epochs = {self.max_epochs}" if self.max_epochs else f"num_epochs = {self.num_epochs}"
        if self.warmup_epochs > (self.max_epochs or self.num_epochs):
            raise ValueError(f"warmup_epochs within {length}, not {self.warmup_epochs:g}")
        return self

    @model_validator(mode="after")
    def _scheduler_uses_its_fields(self) -> Self:
        unused = [field for field, schedulers in USED_BY.items() if self.lr_scheduler not in schedulers]
        require_defaults(self, unused, f"lr_scheduler = {self.lr_scheduler!r}")
        if not self.warmup_epochs:
            require_defaults(self, ["warmup_start_lr"], "warmup_epochs = 0")
        return self

    @model_validator(mode="after")
    def _schedule_is_in_order(self) -> Self:
        if not self.base_lr_batch_size:
            self.require_order(batch_size=1)
        if self.lr_scheduler == "step" and not self.step_size:
            raise ValueError("step_size above 0 where lr_scheduler = 'step'")
        if self.lr_scheduler == "multi_step":
            times = (self.warmup_epochs, *self.milestones)
            if len(times) < 2 or any(late <= early for early, late in pairwise(times)):
                raise ValueError("milestones that ascend, from above warmup_epochs, where lr_scheduler = 'multi_step', "
                                 f"not {list(self.milestones)}")
        return self
