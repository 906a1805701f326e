"""What `covey status` shows to people. Names come from strangers: nothing in them acts on the terminal."""

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Group
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from coordinator.calls import one_line
from peer.credited import line
from peer.progress import counts
from proto.peer_pb2 import PeerStatus
from proto.swarm_pb2 import PeerRow, RoundCounts, SwarmSnapshot

OLD_SECONDS = 90.0  # a coordinator's own 30, and a minute by which clocks may differ


def swarm_table(swarm: SwarmSnapshot, now: float) -> Group:
    """A coordinator's swarm: a row per live peer, by name, its sums, who is credited with what, and at `now` (Unix
    seconds) whether all that is old."""
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
    board = [_leaderboard(swarm)] if swarm.leaderboard else []
    return Group(table, *(_text(line) for line in _sums(swarm)), *board,
                 *(_text(line) for line in _blind(swarm.time_seconds, now)))


def _blind(read: float, now: float) -> list[str]:
    if not read:
        return ["the coordinator has not read the swarm's records yet"]
    if now - read <= OLD_SECONDS:
        return []
    return [f"the coordinator last read the swarm's records {now - read:,.0f} s ago: these figures are old"]


def _sums(swarm: SwarmSnapshot) -> list[str]:
    took = f"; the last took {swarm.round_seconds:.1f} s (median)" if swarm.HasField("round_seconds") else ""
    refused = swarm.refused
    lines = [f"averaging rounds: {counts(swarm.rounds)}{took}",
             f"contributions refused: {refused.value:,} for bad values, {refused.absent:,} gone or late, "
             f"{refused.message:,} bad messages",
             f"peers: {swarm.joins:,} joined, {swarm.departures.left:,} left, {swarm.departures.lost:,} lost"]
    if swarm.HasField("archive"):
        lines.append(f"newest checkpoint: {_archived(swarm)}")
        lines += [f"archive: {swarm.archive.last_error}"] * bool(swarm.archive.last_error)
    return lines


def _archived(swarm: SwarmSnapshot) -> str:
    kept = swarm.archive
    if not kept.HasField("epoch"):
        return "none yet"
    return f"epoch {kept.epoch}, {max(0.0, swarm.time_seconds - kept.time_seconds):,.0f} s old"


def _leaderboard(swarm: SwarmSnapshot) -> Table:
    """One row per volunteer, the most samples first."""
    numbers = ("samples", "of all", "epochs", "flagged")
    table = Table(
        Column("", justify="right"), "volunteer", *(Column(name, justify="right") for name in numbers),
        title=_text(f"credited: {swarm.credited_samples:,} samples"), box=SIMPLE, padding=(0, 1, 0, 0),
        caption="samples: in completed rounds; flagged: epochs in which more was claimed than the group saw")
    for place, row in enumerate(swarm.leaderboard, 1):
        share = row.samples / swarm.credited_samples if swarm.credited_samples else 0.0
        cells = (str(place), row.name, f"{row.samples:,}", f"{share:.1%}", f"{row.epochs:,}", str(row.flagged or ""))
        table.add_row(*map(_text, cells))
    return table


def _cells(peer: PeerRow) -> list[str]:
    loss = f"{peer.loss:.4f}" if peer.HasField("loss") else "-"
    return [peer.name, peer.state, peer.mode, str(peer.epoch), f"{peer.samples_per_second:.1f}", loss,
            str(peer.group_size), _short(peer.rounds), f"{peer.last_seen_seconds:.0f} s", peer.device]


def _short(rounds: RoundCounts) -> str:
    return f"{rounds.averaged}/{rounds.failed}/{rounds.alone}"


def peers_list(peers: Sequence[PeerStatus], now: float) -> Group:
    """This machine's peers at `now` (Unix seconds), a paragraph each."""
    if not peers:
        return Group(Text("no peers of yours on this machine; `covey join LINK` starts one"))
    return Group(*(part for peer in peers for part in _paragraph(peer, now)))


def _paragraph(peer: PeerStatus, now: float) -> list[Text | Padding]:
    step, kept = peer.step, peer.checkpoint
    age = f"of epoch {kept.epoch}, {now - kept.time_seconds:,.0f} s old" if peer.HasField("checkpoint") else "none"
    below = [f"epoch {step.epoch}, {step.samples_total:,} samples here, {step.samples_per_second:.1f} samples/s, "
             f"loss {step.loss:.4f}, {step.swarm_peers} peers, group of {peer.group_size}",
             f"averaging rounds: {counts(peer.rounds)}; newest checkpoint: {age}",
             *([line(peer.contribution, now)] if peer.HasField("contribution") else []),
             peer.state_dir, peer.metrics_url]
    return [_text(f"{peer.name}: {peer.state}, {peer.run_id}, pid {peer.daemon_pid}, {peer.worker_restarts} restarts"),
            *(Padding(_text(line), (0, 0, 0, 2), expand=False) for line in below)]


def _text(line: str) -> Text:
    return Text(one_line(line))  # not a str, in which rich would look for markup
