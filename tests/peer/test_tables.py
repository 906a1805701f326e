"""What `covey status` shows, and what strangers' names can't do to it."""

import io
import json

from rich.console import Console, RenderableType

from coordinator.calls import one_line
from peer.plain import plain
from peer.tables import peers_list, swarm_table
from proto.peer_pb2 import PeerStatus
from proto.swarm_pb2 import Contribution, Departures, LeaderboardRow, PeerRow, Refusals, RoundCounts, SwarmSnapshot


def shown(view: RenderableType, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(view)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_swarm_s_peers_are_rows_by_name() -> None:
    text = shown(swarm_table(SwarmSnapshot(
        run_id="demo-01", epoch=12, epoch_samples=96, target_batch_size=256, samples_per_second=40.5, loss=2.25,
        peers=[PeerRow(name="zoe", state="training", rounds=RoundCounts(averaged=5, failed=1)),
               PeerRow(name="adam", state="starting", loss=0.0)]), now=0.0))
    assert "demo-01: epoch 12, 96 of 256 samples, 2 peers, 40.5 samples/s, loss 2.2500" in text
    assert text.index("adam") < text.index("zoe")
    assert "5/1/0" in text


def test_under_them_is_what_an_operator_asks_for_at_night() -> None:
    swarm = SwarmSnapshot(time_seconds=1000.0, round_seconds=2.55, joins=23, refused=Refusals(value=3, absent=90),
                          rounds=RoundCounts(averaged=5312, failed=90), departures=Departures(left=9, lost=4))
    text = shown(swarm_table(swarm, now=1001.0))
    assert "averaging rounds: 5312 averaged, 90 failed, 0 alone; the last took 2.5 s (median)" in text
    assert "contributions refused: 3 for bad values, 90 gone or late, 0 bad messages" in text
    assert "peers: 23 joined, 9 left, 4 lost" in text
    assert "checkpoint" not in text
    swarm.archive.last_error = "disk: no space\x1b[2J"
    assert "newest checkpoint: none yet" in shown(swarm_table(swarm, now=1001.0))
    swarm.archive.epoch, swarm.archive.time_seconds = 410, 863.0
    text = shown(swarm_table(swarm, now=1001.0))
    assert "newest checkpoint: epoch 410, 137 s old" in text
    assert "archive: disk: no space [2J" in text


def test_old_figures_are_called_old() -> None:
    swarm = SwarmSnapshot(time_seconds=1000.0)
    assert "old" not in shown(swarm_table(swarm, now=1089.0))
    assert "last read the swarm's records 95 s ago: these figures are old" in shown(swarm_table(swarm, now=1095.0))
    assert "has not read the swarm's records yet" in shown(swarm_table(SwarmSnapshot(), now=1095.0))


def test_a_peers_newest_checkpoint_is_told_with_its_age() -> None:
    peer = PeerStatus(name="ada")
    assert "newest checkpoint: none" in shown(peers_list([peer], now=1000.0))
    peer.checkpoint.epoch, peer.checkpoint.time_seconds = 40, 880.0
    assert "newest checkpoint: of epoch 40, 120 s old" in shown(peers_list([peer], now=1000.0))


def test_what_does_not_fit_a_narrow_terminal_stays_below_its_peer() -> None:
    peer = PeerStatus(name="ada", state="training", state_dir="/home/ada")
    head, *below = shown(peers_list([peer], now=0.0), width=60).splitlines()
    assert head.startswith("ada: training")
    assert len(below) > 4
    assert all(line.startswith("  ") for line in below)


def test_the_leaderboard_is_rows_by_samples_with_shares_and_flags() -> None:
    swarm = SwarmSnapshot(credited_samples=4000, leaderboard=[
        LeaderboardRow(name="zoe", samples=3000, epochs=12), LeaderboardRow(name="adam", samples=500, flagged=2)])
    text = shown(swarm_table(swarm, now=0.0))
    assert "credited: 4,000 samples" in text
    rows = [line.split() for line in text.splitlines() if "zoe" in line or "adam" in line]
    assert rows == [["1", "zoe", "3,000", "75.0%", "12"], ["2", "adam", "500", "12.5%", "0", "2"]]
    assert "credited" not in shown(swarm_table(SwarmSnapshot(), now=0.0))


def test_ones_own_contribution_is_told_with_the_age_of_the_coordinators_word() -> None:
    told = Contribution(samples=1500, epochs=6, swarm_samples=6000, rank=2, volunteers=5, time=1000.0)
    text = shown(peers_list([PeerStatus(name="ada", contribution=told)], now=1190.0))
    assert ("credited: 1,500 samples in 6 epochs, 25.0% of all, rank 2 of 5 (the coordinator's word, 3 min ago)\n"
            in text)
    told.flagged, told.time = 3, -1e6
    assert "12 d ago); flagged in 3 epochs: more claimed than the group saw" in shown(
        peers_list([PeerStatus(name="ada", contribution=told)], now=1190.0))
    assert "credited: 0 samples in 0 epochs (the coordinator's word, 5 s ago)\n" in shown(peers_list(
        [PeerStatus(contribution=Contribution(time=1.0))], now=6.0))
    assert "credited" not in shown(peers_list([PeerStatus(name="ada")], now=1190.0))


def test_a_name_cannot_act_on_the_terminal() -> None:
    name = "\x1b[31mred\x07\u202e[bold]bold[/]"
    for text in (shown(swarm_table(SwarmSnapshot(peers=[PeerRow(name=name)]), now=0.0)),
                 shown(swarm_table(SwarmSnapshot(leaderboard=[LeaderboardRow(name=name)]), now=0.0)),
                 shown(peers_list([PeerStatus(name=name)], now=0.0))):
        assert not set(text) & {"\x1b", "\x07", "\u202e"}
        assert "[bold]bold[/]" in text


def test_text_of_strangers_is_one_short_line() -> None:
    assert one_line("a\nb\tc" + "x" * 1000) == "a b c" + "x" * 295


def test_no_peers_are_said_to_be_none() -> None:
    assert "no peers of yours" in shown(peers_list([], now=0.0))


def test_messages_become_json_with_numbers_as_numbers() -> None:
    data = json.loads(json.dumps(plain(SwarmSnapshot(samples_total=2**60, peers=[PeerRow(epoch=3)]))))
    assert data["samples_total"] == 2**60
    assert data["loss"] is None
    assert data["peers"][0]["epoch"] == 3
