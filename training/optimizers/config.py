"""How gradients become updates: options of `optimizer.*`, under VISSL's names. Imports no torch.

Epochs are collaborative epochs: updates of the whole swarm.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from training.config import Config


class Larc(Config):
    """Layer-wise adaptive rate control (You et al., arXiv 1708.03888), with Apex's and VISSL's defaults."""

    clip: bool = Field(False, description="never step further than plain SGD would")
    eps: float = Field(1e-8, ge=0, description="added to the denominator")
    trust_coefficient: float = Field(0.001, gt=0, description="norm of a step over the parameter's, at lr 1")


class Optimizer(Config):
    """An optimiser, and the course of its learning rate: linear warm-up, then half a cosine."""

    name: Literal["sgd", "adamw"] = Field("sgd", description="torch's SGD, or AdamW with torch's betas and eps")
    lr: float = Field(gt=0, description="peak learning rate, reached when warm-up ends")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD's; without Nesterov")
    weight_decay: float = Field(
        1e-6, ge=0, description="SGD: times the parameter, added to its gradient; AdamW: times lr, decoupled. "
        "The default is SwAV's")
    use_larc: bool = Field(
        False, description="scale each parameter's step to its norm (SwAV, arXiv 2006.09882, appendix A); SGD only")
    larc: Larc = Field(Larc(), description="where use_larc is on")
    warmup_start_lr: float = Field(0.0, ge=0, description="learning rate of the first update, if there is warm-up")
    warmup_epochs: int = Field(0, ge=0, description="epochs from warmup_start_lr to lr")
    max_epochs: int = Field(gt=0, description="epoch at which the cosine reaches eta_min, where it stays")
    eta_min: float = Field(0.0, ge=0, description="last learning rate")

    @model_validator(mode="after")
    def _larc_is_for_sgd(self) -> Self:
        if self.use_larc and self.name != "sgd":
            raise ValueError(f"use_larc = false where name = {self.name!r}: LARC scales the steps of sgd only")
        return self

    @model_validator(mode="after")
    def _schedule_is_in_order(self) -> Self:
        if self.warmup_epochs > self.max_epochs:
            raise ValueError(f"warmup_epochs within max_epochs = {self.max_epochs}, not {self.warmup_epochs}")
        if self.eta_min > self.lr:
            raise ValueError(f"eta_min of at most lr = {self.lr}, not {self.eta_min}")
        return self
