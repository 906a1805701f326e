"""How peers agree: options of `averaging.*`. DeDLOC's, hivemind's and local SGD's names are kept."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from training.config import Config

OF_STRATEGY = {
    "collaborative": ("average_state_every", "overlap", "robust", "clip_radius"),
    "local_sgd": ("initial_steps", "initial_step_method", "average_momentum"),
    "diloco": ("outer_lr", "outer_momentum", "outer_nesterov", "fragments", "delay", "alpha"),
    "gossip": ("topology",),
}
LOCAL_STEPPERS = ("local_sgd", "diloco")


class Averaging(Config):
    """Averaging in a swarm or a fixed world, by one of four strategies."""

    strategy: Literal["collaborative", "local_sgd", "diloco", "gossip"] = Field(
        "collaborative", description="how peers agree: average gradients (collaborative), parameters (local_sgd), "
        "steps of several updates (diloco), or parameters of a few neighbours (gossip)")
    target_batch_size: int = Field(
        gt=0, description="samples that the swarm gathers for one collaborative epoch, that is between two averagings")
    target_group_size: int = Field(
        ge=2, description="largest all-reduce group, in peers; in larger swarms groups form, anew every epoch")
    average_state_every: int = Field(
        1, ge=1, description="collaborative epochs between averagings of parameters, statistics of the optimiser and "
        "of BatchNorm; peers that are equal already send none. Strategy collaborative")
    overlap: bool = Field(
        False, description="average in the background while the next epoch's gradients gather: updates come up to one "
        "epoch late. Strategy collaborative")
    robust: Literal["mean", "centered_clip"] = Field(
        "mean", description="how contributions are put together: their mean, or the mean clipped around itself "
        "(Karimireddy et al., arXiv 2012.10333), which bounds what one bad peer can do. Strategy collaborative")
    clip_radius: float = Field(
        1.0, gt=0, description="centered_clip: how far a contribution may lie from the centre, in medians of the "
        "members' distances. Strategy collaborative")
    local_steps: int = Field(
        4, ge=1, description="steps of a peer's own optimiser in one collaborative epoch, each on an equal share of "
        "target_batch_size (Lin et al., arXiv 1808.07217). Strategies local_sgd and diloco")
    initial_steps: int = Field(
        0, ge=0, description="steps before local SGD begins (post-local SGD). Strategy local_sgd")
    initial_step_method: Literal["single_process", "multiple_processes"] = Field(
        "single_process", description="how the initial steps are made: by one process that then copies its model to "
        "the others, or by all, averaging after every step. Strategy local_sgd")
    average_momentum: bool = Field(
        False, description="average the local optimisers' statistics with the parameters. Strategy local_sgd")
    outer_lr: float = Field(0.7, gt=0, description="learning rate of the outer optimiser (DiLoCo, arXiv 2311.08105)")
    outer_momentum: float = Field(0.9, ge=0, lt=1, description="momentum of the outer optimiser. Strategy diloco")
    outer_nesterov: bool = Field(True, description="Nesterov momentum in the outer optimiser. Strategy diloco")
    fragments: int = Field(
        1, ge=1, description="parts of the model, averaged in turn, one in a collaborative epoch (Streaming DiLoCo, "
        "arXiv 2501.18512). Strategy diloco")
    delay: int = Field(
        0, ge=0, description="local steps from the start of an averaging to its result being applied. Strategy diloco")
    alpha: float = Field(
        1.0, gt=0, le=1, description="share of the averaged fragment in the local one when it is applied (1: it "
        "replaces it). Strategy diloco")
    topology: Literal["complete", "ring", "one-peer-exp", "alternating-exp-ring"] = Field(
        "complete", description="who averages with whom at each step (Decent-DP). Strategy gossip")
    compression: Literal["none", "fp16", "bf16", "uniform8bit", "blockwise8bit"] = Field(
        "none", description="how gradients, or diloco's steps, travel")
    state_compression: Literal["none", "fp16", "bf16", "uniform8bit", "blockwise8bit"] = Field(
        "none", description="how parameters and statistics travel when they are averaged")
    max_allowed_epoch_difference: int = Field(
        1, ge=1, description="a peer further behind the swarm than this many epochs drops its gradients and "
        "downloads the state (DeDLOC's default)")
    matchmaking_time: float = Field(
        5.0, gt=0, description="seconds at most that a group waits for a member that is in the midst of a micro-batch")
    averaging_timeout: float = Field(
        30.0, gt=0, description="seconds that a group's all-reduce may take")
    next_chunk_timeout: float = Field(
        1.0, gt=0, description="seconds without a sign of life after which a member that averages is given up; longer "
        "where round trips are")
    request_timeout: float = Field(
        1.0, gt=0, description="seconds that a member has to answer; longer where round trips are")
    load_state_timeout: float = Field(
        60.0, gt=0, description="seconds that one attempt to download the swarm's state may take")
    report_progress_expiration: float = Field(
        60.0, gt=0, description="seconds that a progress record lives in the DHT: a peer that vanished counts "
        "as present for this long")
    min_refresh_period: float = Field(
        0.5, gt=0, description="seconds at least between two readings of the swarm's progress")
    default_refresh_period: float = Field(
        3.0, gt=0, description="seconds between two readings while no other peer is known")
    max_refresh_period: float = Field(
        10.0, gt=0, description="seconds at most between two readings of the swarm's progress")

    refused: ClassVar[Mapping[str, str]] = {
        "exp_prefix": "The run id is made of the recipe's `name` and the experiment's fingerprint: set `name`.",
        "run_id": "The run id is made of the recipe's `name` and the experiment's fingerprint: set `name`.",
        "dht_initial_peers": "The join link carries them.",
        "initial_peers": "The join link carries them.",
        "dht_listen_on_port": "Each volunteer's own: `covey join --port`.",
        "averager_listen_on_port": "Averaging and DHT share one port: `covey join --port`.",
    }

    @model_validator(mode="before")
    @classmethod
    def _target_in_steps(cls, tree: Any) -> Any:
        """DeDLOC's way to say target_batch_size: total_steps_in_epoch times batch_size_for_tracking."""
        if not isinstance(tree, dict) or not {"total_steps_in_epoch", "batch_size_for_tracking"} & tree.keys():
            return tree
        tree = dict(tree)
        steps, batch = tree.pop("total_steps_in_epoch", None), tree.pop("batch_size_for_tracking", None)
        if not all(isinstance(number, int) and number > 0 for number in (steps, batch)):
            raise ValueError("total_steps_in_epoch and batch_size_for_tracking together, both above 0: their product "
                             "is target_batch_size")
        if tree.setdefault("target_batch_size", steps * batch) != steps * batch:
            raise ValueError(f"target_batch_size = {steps * batch}, as total_steps_in_epoch x batch_size_for_tracking "
                             f"= {steps} x {batch} says, not {tree['target_batch_size']}; one of the two is enough")
        return tree

    @model_validator(mode="after")
    def _options_are_the_strategys(self) -> Self:
        owners = [(name, (strategy,)) for strategy, names in OF_STRATEGY.items() for name in names]
        for name, strategies in [*owners, ("local_steps", LOCAL_STEPPERS)]:
            is_default = getattr(self, name) == type(self).model_fields[name].default
            if self.strategy not in strategies and not is_default:
                raise ValueError(f"averaging.{name} with strategy {' or '.join(strategies)} only, not with "
                                 f"{self.strategy}")
        return self

    @model_validator(mode="after")
    def _fragments_return_before_the_next_leaves(self) -> Self:
        if self.delay and self.delay >= self.local_steps:
            raise ValueError(f"averaging.delay below averaging.local_steps = {self.local_steps}, so that a fragment is "
                             f"applied before the next one leaves, not {self.delay}")
        return self

    @model_validator(mode="after")
    def _what_is_left_out_can_be_kept(self) -> Self:
        if self.strategy == "diloco" and self.compression == "uniform8bit":
            raise ValueError("averaging.compression = blockwise8bit with strategy diloco, not uniform8bit: its errors "
                             "depend on where the network cuts, and can't be fed back")
        return self

    @model_validator(mode="after")
    def _rounds_outlive_lost_parts(self) -> Self:
        if self.averaging_timeout <= 2 * self.next_chunk_timeout:
            raise ValueError(f"averaging_timeout above 2 x next_chunk_timeout = {2 * self.next_chunk_timeout:g} s, so "
                             "that a lost member is found out before the whole round is given up")
        return self
