"""What `covey status` shows to people. Names come from strangers: nothing in them acts on the terminal."""

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from peer.plain import one_line
from peer.progress import counts
from proto.peer_pb2 import PeerStatus
from proto.swarm_pb2 import PeerRow, RoundCounts, SwarmSnapshot


def swarm_table(swarm: SwarmSnapshot) -> Table:
    """A coordinator's swarm: one row per live peer, by name."""
    loss = f", loss {swarm.loss:.4f}" if swarm.HasField("loss") else ""
    numbers = ("epoch", "samples/s", "loss", "group", "rounds", "seen")
    table = Table(
        "name", "state", "mode", *(Column(name, justify="right") for name in numbers), "device",
        title=_text(f"{swarm.run_id}: epoch {swarm.epoch}, {swarm.epoch_samples:,} of "
                        f"{swarm.target_batch_size:,} samples, {len(swarm.peers)} peers, "
                        f"{swarm.samples_per_second:.1f} samples/s{loss}"),
        caption="rounds: of averaging, averaged/failed/alone", box=SIMPLE, padding=(0, 1, 0, 0))
    for peer in sorted(swarm.peers, key=lambda row: (row.name, row.peer_id)):
        table.add_row(*(_text(cell) for cell in _cells(peer)))
    return table


def _cells(peer: PeerRow) -> list[str]:
    loss = f"{peer.loss:.4f}" if peer.HasField("loss") else "-"
    return [peer.name, peer.state, peer.mode, str(peer.epoch), f"{peer.samples_per_second:.1f}", loss,
            str(peer.group_size), _short(peer.rounds), f"{peer.last_seen_seconds:.0f} s", peer.device]


def _short(rounds: RoundCounts) -> str:
    return f"{rounds.averaged}/{rounds.failed}/{rounds.alone}"


def peers_list(peers: Sequence[PeerStatus]) -> Group:
    """This machine's peers, a paragraph each."""
    if not peers:
        return Group(Text("no peers of yours on this machine; `covey join LINK` starts one"))
    return Group(*(_text(line) for peer in peers for line in _paragraph(peer)))


def _paragraph(peer: PeerStatus) -> list[str]:
    step = peer.step
    return [f"{peer.name}: {peer.state}, {peer.run_id}, pid {peer.daemon_pid}, {peer.worker_restarts} restarts",
            f"  epoch {step.epoch}, {step.samples_total:,} samples here, {step.samples_per_second:.1f} samples/s, "
            f"loss {step.loss:.4f}, {step.swarm_peers} peers, group of {peer.group_size}",
            f"  averaging rounds: {counts(peer.rounds)}",
            f"  {peer.state_dir}", f"  {peer.metrics_url}"]


def _text(line: str) -> Text:
    return Text(one_line(line))  # not a str, in which rich would look for markup
