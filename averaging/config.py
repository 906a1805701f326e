"""How peers agree: options of `averaging.*`. DeDLOC's and hivemind's names are kept."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from training.config import Config


class Averaging(Config):
    """Collaborative averaging (DeDLOC, arXiv 2106.10207; hivemind.Optimizer)."""

    strategy: Literal["collaborative"] = Field(
        "collaborative", description="how peers agree; the name of a module in averaging/strategies")
    target_batch_size: int = Field(
        gt=0, description="samples that the swarm gathers for one collaborative epoch, that is for one update")
    target_group_size: int = Field(
        ge=2, description="largest all-reduce group, in peers; a group that is complete starts without waiting")
    average_state_every: int = Field(
        1, ge=1, description="collaborative epochs between averagings of parameters and BatchNorm statistics")
    max_allowed_epoch_difference: int = Field(
        1, ge=1, description="a peer further behind the swarm than this many epochs drops its gradients and "
        "downloads the state (DeDLOC's default)")
    matchmaking_time: float = Field(
        5.0, gt=0, description="seconds before the expected end of an epoch at which peers start to look for a group")
    averaging_timeout: float = Field(
        30.0, gt=0, description="seconds after which an averaging round has failed and the peer goes on alone")
    next_chunk_timeout: float = Field(
        5.0, gt=0, description="seconds without a tensor part after which its sender is given up in this round")
    request_timeout: float = Field(
        2.0, gt=0, description="seconds that a groupmate has to answer while groups form")
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
        "topology": "It belongs to the strategy gossip, which this version does not have.",
        **dict.fromkeys(("local_steps", "initial_steps", "initial_step_method"),
                        "It belongs to the strategy local_sgd, which this version does not have."),
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
    def _rounds_outlive_lost_parts(self) -> Self:
        if self.averaging_timeout <= 2 * self.next_chunk_timeout:
            raise ValueError(f"averaging_timeout above 2 x next_chunk_timeout = {2 * self.next_chunk_timeout:g} s, so "
                             "that a lost member is found out before the whole round is given up")
        return self
