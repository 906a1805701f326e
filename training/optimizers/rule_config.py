"""How a gradient becomes an update: a part of `optimizer.*`, under VISSL's and torch's names. Imports no torch.

A field that the chosen rule has no use for must stay at its default.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from training.config import Config

ADAMS = {"adam", "adamw", "accum_adam", "accum_adamw"}
USED_BY = {"momentum": {"sgd"}, "nesterov": {"sgd"}, "betas": ADAMS, "eps": ADAMS,
           "accum_iter": {"accum_adam", "accum_adamw"}}
Beta = Annotated[float, Field(ge=0, lt=1)]


class Larc(Config):
    """Layer-wise adaptive rate control (You et al., arXiv 1708.03888), with Apex's and VISSL's defaults."""

    clip: bool = Field(False, description="never step further than plain SGD would")
    eps: float = Field(1e-8, ge=0, description="added to the denominator")
    trust_coefficient: float = Field(0.001, gt=0, description="norm of a step over the parameter's, at lr 1")
    exclude_bias_and_norm: bool = Field(
        False, description="biases and norm layers take plain SGD's steps (common since SimCLR, arXiv 2002.05709)")


class Rule(Config):
    """An optimiser, and what it does with a gradient."""

    refused: ClassVar[Mapping[str, str]] = {"larc_config": "It is `optimizer.larc` here, with the same names in it."}

    name: Literal["sgd", "adam", "adamw", "accum_adam", "accum_adamw"] = Field(
        "sgd", description="torch's SGD, Adam and AdamW, or AccumAdam, whose moments move once every accum_iter "
        "updates, with L2 or decoupled weight decay")
    lr: float = Field(gt=0, description="peak learning rate, reached when warm-up ends; see base_lr_batch_size")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="share of each of the Adams' two moments that is kept")
    eps: float = Field(1e-8, gt=0, description="the Adams': added to the denominator")
    accum_iter: int = Field(4, ge=1, description="AccumAdam's K: updates between two changes of the moments")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD's")
    nesterov: bool = Field(False, description="SGD's momentum as Nesterov's")
    weight_decay: float = Field(
        1e-6, ge=0, description="sgd, adam, accum_adam: times the parameter, added to its gradient; adamw, "
        "accum_adamw: times lr, decoupled. The default is SwAV's")
    regularize_bn: bool = Field(True, description="decay the parameters of norm layers, of whatever kind, as well")
    regularize_bias: bool = Field(True, description="decay biases as well; a norm layer's only with regularize_bn")
    use_larc: bool = Field(
        False, description="scale each parameter's step to its norm (SwAV, arXiv 2006.09882, appendix A); SGD only")
    larc: Larc = Field(Larc(), description="where use_larc is on")
    grad_clip_norm: float = Field(
        0.0, ge=0, description="an update's gradient is scaled down to this norm, taken over all parameters "
        "together, where it is longer; 0: never")

    @model_validator(mode="after")
    def _larc_is_for_sgd(self) -> Self:
        if self.use_larc and self.name != "sgd":
            raise ValueError(f"use_larc = false where name = {self.name!r}: LARC scales the steps of sgd only")
        return self

    @model_validator(mode="after")
    def _rule_uses_its_fields(self) -> Self:
        unused = [field for field, names in USED_BY.items() if self.name not in names]
        require_defaults(self, unused, f"name = {self.name!r}")
        if not self.use_larc:
            require_defaults(self, ["larc"], "use_larc = false")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov = false, or a momentum above 0")
        return self


def require_defaults(config: Config, fields: Iterable[str], choice: str) -> None:
    """Raises ValueError for the first of `fields` that is not at its default though `choice` has no use for it."""
    for name in fields:
        default = type(config).model_fields[name].get_default()
        if getattr(config, name) != default:
            raise ValueError(f"{name} at its default, {default}: {choice} has no use for it")
