"""What one volunteer decides. Imports no torch."""

from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from peer.machine_config import Machine


class PeerConfig(Machine):
    """Options of `covey join`: none changes what is trained, and no two volunteers need agree on one."""

    name: str = Field(
        min_length=1, max_length=64, description="what this volunteer is called in the swarm's tables; also "
        "seeds the order of its data and its augmentations")
    state_dir: Path = Field(
        description="folder of this peer's identity, checkpoints, log and lock; one peer at a time")
    listen: str = Field(
        "0.0.0.0", description="IP address to accept other peers' connections at")  # noqa: S104
    port: int = Field(
        0, ge=0, le=65535, description="TCP port of libp2p; 0 for any free one")
    http_port: int = Field(
        0, ge=0, le=65535, description="TCP port of this peer's /metrics and /healthz, on loopback; 0 for "
        "any free one")
    client_mode: bool = Field(
        False, description="accept no incoming connections, for a volunteer behind a strict firewall; others "
        "reach it through connections that it opens itself")

    auxiliary: bool = Field(
        False, description="train nothing, only help others to average: for a machine without a GPU but with a good "
        "connection")

    @model_validator(mode="after")
    def _auxiliaries_are_reachable(self) -> Self:
        if self.auxiliary and self.client_mode:
            raise ValueError("--auxiliary without --client-mode: whoever helps others to average must be reachable")
        return self

    @field_validator("listen")
    @classmethod
    def _is_an_address(cls, listen: str) -> str:
        ip_address(listen)
        return listen

    @property
    def host_maddrs(self) -> list[str]:
        """hivemind's `host_maddrs`: the multiaddresses at which libp2p listens; none in client mode."""
        if self.client_mode:
            return []
        family = "ip6" if isinstance(ip_address(self.listen), IPv6Address) else "ip4"
        return [f"/{family}/{self.listen}/tcp/{self.port}"]

    @property
    def identity_path(self) -> Path:
        """hivemind's `identity_path`: the private key that this peer keeps its id by."""
        return self.state_dir / "identity.key"

    @property
    def token_path(self) -> Path:
        """What lets this peer into the swarm; renewed by the daemon, read by the worker."""
        return self.state_dir / "token"

    @property
    def bans_path(self) -> Path:
        """The authority's list of those who may take no part, the newest that this peer has heard of."""
        return self.state_dir / "bans"

    @property
    def known_peers(self) -> Path:
        """Other peers' addresses, for a start while the coordinator is away."""
        return self.state_dir / "known_peers.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of this peer's checkpoints."""
        return self.state_dir / "checkpoints"

    @property
    def log(self) -> Path:
        """What the worker and its children print."""
        return self.state_dir / "worker.log"
