"""How peers agree: options of `averaging.*`. DeDLOC's and hivemind's names are kept."""

from typing import Literal, Self

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

    @model_validator(mode="after")
    def _rounds_outlive_lost_parts(self) -> Self:
        if self.averaging_timeout <= 2 * self.next_chunk_timeout:
            raise ValueError(f"averaging_timeout above 2 x next_chunk_timeout = {2 * self.next_chunk_timeout:g} s, so "
                             "that a lost member is found out before the whole round is given up")
        return self
