"""The swarm transport on real DHT nodes, libp2p daemons and averager processes: rounds, faults, state downloads."""

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from threading import Event, get_ident
from time import monotonic

import psutil
import pytest
import torch
from processes import is_running, until
from swarm_peers import FAST, Join, Peer, acquainted, enter, meet, swarm, together
from torch import Tensor

from averaging.authorisation import OpenSwarm
from averaging.messages import Average, Message
from averaging.records import ARCHIVING
from averaging.transports.swarm.all_reduce import AllReduce
from averaging.transports.swarm.averager import Averager
from averaging.transports.swarm.session import Session
from averaging.transports.swarm.swarm import AveragerLost

SLACK = 1.0  # seconds that a busy machine may add


@pytest.fixture
def join(tmp_path: Path) -> Iterator[Join]:
    with swarm(tmp_path) as join:
        yield join


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Peer]]:
    with swarm(tmp_path_factory.mktemp("trio")) as join:
        peers = [join(), join(), join()]
        acquainted(peers)
        yield peers


@pytest.fixture
def trio(peers: list[Peer]) -> list[Peer]:
    """Three peers that are in epoch 0."""
    enter(peers, 0)
    return peers


def tensors(peer: int, seed: int = 0, rows: int = 300) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + peer)
    return [torch.randn(shape, generator=generator) for shape in [(rows, 10), (7,), ()]]


def expect(peer: Peer, seconds: float, epoch: int) -> None:
    """As if the trainer were in `epoch`, and to be done with its micro-batch in `seconds`; below 0: long ago."""
    board = peer.swarm._board
    board.epoch, board.expected, board.step_seconds = epoch, monotonic() + seconds, abs(seconds) / 10


def test_forty_rounds_of_three_all_commit_with_equal_bits(trio: list[Peer]) -> None:
    latencies = []
    for epoch in range(40):
        values = [tensors(number, epoch) for number in range(3)]
        expected = [torch.stack(parts).mean(0) for parts in zip(*values, strict=True)]
        enter(trio, epoch)
        meetings = [meet(peer, values[number], trio, epoch=epoch, kind="forty") for number, peer in enumerate(trio)]
        met = monotonic()
        outcomes = together(meetings)
        latencies.append(monotonic() - met)
        assert [(o.averaged, o.members, o.reason, dict(o.refused)) for o in outcomes] == [
            (True, tuple(sorted(peer.id for peer in trio)), "", {})] * 3
        for ours in values[1:]:
            assert all(torch.equal(a, b) for a, b in zip(ours, values[0], strict=True))
        torch.testing.assert_close(values[0], expected)
    latencies.sort()
    print(f"\n40 rounds of 3: median {median(latencies) * 1e3:.0f} ms, 95 % {latencies[37] * 1e3:.0f} ms, "
          f"longest {latencies[-1] * 1e3:.0f} ms")


def test_the_mean_is_weighted_and_a_weight_of_zero_gives_nothing(trio: list[Peer]) -> None:
    values = [[torch.full((500,), number + 1.0)] for number in range(3)]
    values[2][0][3] = float("nan")
    outcomes = together([meet(peer, values[number], trio, weight=[3.0, 1.0, 0.0][number], kind="weights")
                         for number, peer in enumerate(trio)])
    assert [outcome.averaged for outcome in outcomes] == [True] * 3
    for value in values:
        torch.testing.assert_close(value[0], torch.full((500,), 1.25))


def test_a_weight_counts_up_to_the_target_batch_size(trio: list[Peer]) -> None:
    values = [[torch.tensor([float(number)])] for number in range(2)]
    together([meet(peer, values[number], trio[:2], weight=[1e9, 1000.0][number], kind="cap")
              for number, peer in enumerate(trio[:2])])
    assert values[0][0].item() == pytest.approx(0.5)


@pytest.mark.parametrize("differ", [False, True])
def test_state_is_averaged_only_where_fingerprints_differ(trio: list[Peer], differ: bool) -> None:
    values = [[torch.ones(10) * number] for number in range(3)]
    states = [[torch.ones(4) * number] for number in range(3)]
    outcomes = together([
        meet(peer, values[number], trio, kind=f"state{differ}", state=states[number],
             fingerprint=bytes([number if differ else 7])) for number, peer in enumerate(trio)])
    assert [(outcome.averaged, outcome.with_state) for outcome in outcomes] == [(True, differ)] * 3
    for number, (value, state) in enumerate(zip(values, states, strict=True)):
        torch.testing.assert_close(value[0], torch.ones(10))
        torch.testing.assert_close(state[0], torch.ones(4) * (1 if differ else number))


def test_a_value_that_is_not_finite_fails_its_own_meeting_only(trio: list[Peer]) -> None:
    values = [tensors(number) for number in range(3)]
    values[1][0][5, 5] = float("inf")
    before = [tensor.clone() for tensor in values[1]]
    outcomes = together([meet(peer, values[number], trio, kind="infinite") for number, peer in enumerate(trio)])
    assert [outcome.averaged for outcome in outcomes] == [True, False, True]
    assert "finite" in outcomes[1].reason
    assert all(torch.equal(a, b) for a, b in zip(values[1], before, strict=True))
    assert trio[1].id not in outcomes[0].members


def test_a_peer_alone_is_told_so_at_once(trio: list[Peer]) -> None:
    started = monotonic()
    outcome = meet(trio[0], [torch.ones(3)], trio[:1], kind="alone").result()
    assert not outcome.averaged
    assert outcome.reason
    assert monotonic() - started < SLACK


def test_a_late_peer_is_left_behind_at_once_and_told_so(trio: list[Peer]) -> None:
    for peer in trio:  # the third has gone on without the others
        expect(peer, 1.0, epoch=6 if peer is not trio[2] else 8)
    started = monotonic()
    values = [tensors(number) for number in range(3)]
    outcomes = together([meet(peer, values[number], trio, kind="late", epoch=6)
                         for number, peer in enumerate(trio[:2])])
    assert monotonic() - started < SLACK
    assert [(outcome.averaged, len(outcome.members)) for outcome in outcomes] == [(True, 2)] * 2
    arrived = monotonic()
    late = meet(trio[2], values[2], trio, kind="late", epoch=6).result()
    assert not late.averaged
    assert late.reason
    assert monotonic() - arrived < SLACK
    assert torch.equal(values[2][0], tensors(2)[0])


def test_a_peer_that_hangs_is_left_behind_within_the_deadline(trio: list[Peer]) -> None:
    values, pid = [tensors(number) for number in range(3)], trio[1].swarm.averager_pid
    os.kill(pid, signal.SIGSTOP)
    try:
        started = monotonic()
        outcomes = together([meet(peer, value, trio, kind="hangs") for peer, value in
                             ((trio[0], values[0]), (trio[2], values[2]))])
        assert [(outcome.averaged, len(outcome.members)) for outcome in outcomes] == [(True, 2)] * 2
        assert monotonic() - started < 2 * FAST["request_timeout"] + SLACK
    finally:
        os.kill(pid, signal.SIGCONT)
    assert torch.equal(values[0][0], values[2][0])


def test_a_peer_in_the_midst_of_a_micro_batch_is_called_and_waited_for(trio: list[Peer]) -> None:
    for peer in trio:
        expect(peer, 1.0, epoch=7)
    values = [tensors(number) for number in range(3)]
    meetings = [meet(peer, values[number], trio, kind="midst", epoch=7) for number, peer in enumerate(trio[:2])]
    assert not trio[2].swarm.is_due(8)
    until(lambda: trio[2].swarm.is_due(7), "it is called", 1)
    until(lambda: monotonic() > trio[2].swarm._board.expected, "its micro-batch is done", 2)
    outcomes = together([*meetings, meet(trio[2], values[2], trio, kind="midst", epoch=7)])
    assert [len(outcome.members) for outcome in outcomes] == [3, 3, 3]


def test_a_cancelled_meeting_ends_and_leaves_the_tensors(trio: list[Peer]) -> None:
    values, started = tensors(0), monotonic()
    for peer in trio:
        expect(peer, 100.0, epoch=8)
    meeting = meet(trio[0], values, trio, kind="cancelled", epoch=8)
    meeting.cancel()
    outcome = meeting.result()
    assert not outcome.averaged
    assert monotonic() - started < SLACK
    assert all(torch.equal(a, b) for a, b in zip(values, tensors(0), strict=True))


def test_several_meetings_are_open_at_once(trio: list[Peer]) -> None:
    values = {kind: [tensors(number, len(kind)) for number in range(3)] for kind in ("one", "another")}
    meetings = [meet(peer, values[kind][number], trio, kind=kind) for kind in values
                for number, peer in enumerate(trio)]
    assert [outcome.averaged for outcome in together(meetings)] == [True] * 6
    for kind in values:
        assert torch.equal(values[kind][0][0], values[kind][2][0])


def test_client_mode_and_auxiliary_peers_take_part(join: Join) -> None:
    node, other, client, helper = peers = [join(), join(), join(client_mode=True), join(auxiliary=True)]
    acquainted(peers)
    for epoch in range(5):
        values = [tensors(number, epoch, rows=20_000) for number in range(3)]  # enough for three reducers
        expected = torch.stack([parts[0] for parts in values]).mean(0)
        enter(peers, epoch)
        outcomes = together([*(meet(peer, values[number], peers, epoch=epoch)
                               for number, peer in enumerate([node, other, client])),
                             meet(helper, [], peers, epoch=epoch, weight=0.0)])
        assert [(o.averaged, len(o.members)) for o in outcomes] == [(True, 4)] * 4
        assert outcomes[2].bytes_received > 0
        assert outcomes[3].bytes_received > 0
        torch.testing.assert_close(values[2][0], expected)


# -- state --


class Insider:
    """Lets in members, and is one."""

    token = b"member"

    def refusal(self, peer_id: str, token: bytes) -> str | None:
        return None if token == b"member" else "no member"


class Stranger(OpenSwarm):
    """Holds no good token, and makes nothing of it."""

    token = b"none"


def state_of(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"weight": torch.randn(200, 100, generator=generator), "steps": torch.tensor(seed),
            "half": torch.randn(5, generator=generator).half()}


def ahead(donor: Peer, asker: Peer, epoch: int = 5) -> None:
    donor.swarm.report(epoch, 0, b"sketch")
    until(lambda: any(record.epoch == epoch for record in asker.bulletin.records()), "the record is read", 20)


def test_a_state_comes_whole(join: Join) -> None:
    donor, asker = join(), join()
    state = state_of(1)
    donor.swarm.offer_state(lambda: state)
    asker.swarm.offer_state(lambda: state_of(2))
    ahead(donor, asker)
    found = asker.swarm.fetch_state()
    assert found is not None
    assert found[0] == 5
    assert found[1].keys() == state.keys()
    assert all(torch.equal(found[1][name], state[name]) for name in state)
    assert donor.swarm.fetch_state() is None  # nobody is further on


def why_not(asker: Peer, log: pytest.LogCaptureFixture) -> str:
    """The words of a download that fails."""
    assert asker.swarm.fetch_state() is None
    return log.messages[-1]


def test_a_state_that_is_far_longer_than_ones_own_is_refused(join: Join, caplog: pytest.LogCaptureFixture) -> None:
    donor, asker = join(), join()
    donor.swarm.offer_state(lambda: {"weight": torch.zeros(1 << 20)})
    asker.swarm.offer_state(lambda: state_of(2))
    ahead(donor, asker)
    assert "can be right" in why_not(asker, caplog)


def test_a_stranger_in_a_group_changes_nothing(join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("averaging.transports.swarm.swarm.OpenSwarm", Insider)
    members = [join(), join()]
    monkeypatch.setattr("averaging.transports.swarm.swarm.OpenSwarm", Stranger)
    stranger = join()
    everybody = [*members, stranger]
    acquainted(everybody)
    values = [tensors(number) for number in range(3)]
    expected = (values[0][0] + values[1][0]) / 2
    outcomes = together([meet(peer, values[number], everybody, weight=[1.0, 1.0, 1e9][number])
                         for number, peer in enumerate(everybody)])
    assert [outcome.averaged for outcome in outcomes] == [True, True, False]
    assert sum(outcome.refused.get("no member", 0) for outcome in outcomes[:2]) > 0
    torch.testing.assert_close(values[0][0], expected)
    assert torch.equal(values[2][0], tensors(2)[0])


@pytest.mark.parametrize("stranger", ["asker", "donor"])
def test_states_pass_between_members_only(join: Join, stranger: str, monkeypatch: pytest.MonkeyPatch,
                                          caplog: pytest.LogCaptureFixture) -> None:
    peers = []
    for role in ("donor", "asker"):
        monkeypatch.setattr("averaging.transports.swarm.swarm.OpenSwarm", Stranger if stranger == role else Insider)
        peers.append(join())
        peers[-1].swarm.offer_state(lambda: state_of(1))
    donor, asker = peers
    ahead(donor, asker)
    assert {"asker": "refused: no member", "donor": "the donor is no member"}[stranger] in why_not(asker, caplog)


def test_a_state_that_is_not_what_its_hash_says_is_refused(join: Join, monkeypatch: pytest.MonkeyPatch,
                                                           caplog: pytest.LogCaptureFixture) -> None:
    donor, asker = join(), join()
    for peer in (donor, asker):
        peer.swarm.offer_state(lambda: state_of(1))
    monkeypatch.setattr("averaging.transports.swarm.swarm.hashlib.sha256", hashlib.md5)
    ahead(donor, asker)
    assert "hash" in why_not(asker, caplog)


def test_a_donor_that_hangs_costs_a_chunks_time_and_the_next_is_asked(join: Join) -> None:
    hung, donor, asker = join(), join(), join()
    for peer in (hung, donor, asker):
        peer.swarm.offer_state(lambda: state_of(1))
    ahead(donor, asker, epoch=4)
    ahead(hung, asker, epoch=5)
    os.kill(hung.swarm.averager_pid, signal.SIGSTOP)
    started = monotonic()
    found = asker.swarm.fetch_state()
    assert found is not None
    assert found[0] == 4
    assert monotonic() - started < 2 * FAST["next_chunk_timeout"] + SLACK


def test_an_archive_that_gives_nothing_is_left_alone_for_a_while(join: Join) -> None:
    archive, asker = join(), join()
    for peer, steps in ((archive, 1), (asker, 2)):
        peer.swarm.offer_state(lambda steps=steps: state_of(steps))
    archive.swarm.report(3, 0)  # what it really has is older than what the asker has
    archive.bulletin.update(state=ARCHIVING, epoch=6)
    asker.swarm.report(5, 0)
    until(lambda: asker.swarm.standing().archived == 6, "the archive's record is read", 20)
    assert asker.swarm.fetch_state() is None
    assert asker.swarm.standing().archived == 0


def test_a_download_waits_for_a_donors_trainer(join: Join) -> None:
    donor, asker, busy = join(), join(), Event()
    asker.swarm.offer_state(lambda: state_of(2))
    donor.swarm.offer_state(lambda: state_of(1) if busy.wait(3 * FAST["next_chunk_timeout"]) else state_of(3))
    ahead(donor, asker)
    found = asker.swarm.fetch_state()
    assert found is not None
    assert found[1]["steps"] == 3


def test_who_downloads_is_not_waited_for_by_those_whose_state_it_waits_for(join: Join) -> None:
    """A trainer that waits in a round gives no state: were the newcomer awaited, both would wait for the deadline."""
    donor, other, newcomer = peers = [join(), join(), join()]
    acquainted(peers)
    asked, over = Event(), Event()

    def read() -> dict[str, Tensor]:
        asked.set()
        over.wait(FAST["matchmaking_time"] + 5)
        return state_of(1)

    for peer in peers:
        peer.swarm.offer_state(lambda: state_of(2))
    donor.swarm._read = read
    other.swarm.report(1, 0)
    ahead(donor, newcomer, epoch=1)
    with ThreadPoolExecutor(1) as pool:
        download = pool.submit(newcomer.swarm.fetch_state)
        until(asked.is_set, "the donor is asked", 10)
        outcomes = together([meet(peer, tensors(number), peers, epoch=1)
                             for number, peer in enumerate((donor, other))])
        over.set()
        assert all(outcome.averaged and len(outcome.members) == 2 for outcome in outcomes), outcomes
        assert max(outcome.seconds for outcome in outcomes) < FAST["request_timeout"] + SLACK
        assert download.result(20) is not None


# -- ends --


def test_an_averager_that_is_killed_is_left_behind(join: Join) -> None:
    peers = [join(), join(), join()]
    acquainted(peers)
    values = [tensors(number) for number in range(3)]
    os.kill(peers[2].swarm.averager_pid, signal.SIGKILL)
    until(lambda: not peers[2].swarm.is_alive, "its end is noticed", 2)
    with pytest.raises(AveragerLost):
        meet(peers[2], values[2], peers)
    started = monotonic()
    outcomes = together([meet(peer, values[number], peers) for number, peer in enumerate(peers[:2])])
    assert [(outcome.averaged, len(outcome.members)) for outcome in outcomes] == [(True, 2)] * 2
    assert monotonic() - started < FAST["request_timeout"] + SLACK


@pytest.mark.parametrize(("fault", "step"), [
    (signal.SIGKILL, "Join"), (signal.SIGKILL, "Propose"), (signal.SIGKILL, "Complete"), (signal.SIGKILL, "Decide"),
    (signal.SIGKILL, "averaging"), (signal.SIGSTOP, "Complete"), (signal.SIGSTOP, "Decide"),
    (signal.SIGSTOP, "averaging")])
def test_who_is_lost_at_any_step_leaves_the_others_agreed(join: Join, monkeypatch: pytest.MonkeyPatch, step: str,
                                                          fault: signal.Signals) -> None:
    with monkeypatch.context() as patch:  # the fork inherits it
        befall(patch, step, fault)
        victim = join()
    survivors = [join(), join()]
    acquainted([victim, *survivors])
    for epoch in range(50):  # the victim leads in some, and follows in others
        enter([victim, *survivors], epoch)
        values = [tensors(number, epoch) for number in range(3)]
        started = monotonic()
        lost = meet(victim, values[2], [victim, *survivors], epoch=epoch)
        outcomes = together([meet(peer, values[number], [victim, *survivors], epoch=epoch)
                             for number, peer in enumerate(survivors)])
        took = monotonic() - started
        assert outcomes[0].averaged == outcomes[1].averaged
        assert outcomes[0].members == outcomes[1].members
        for number, value in enumerate(values[:2]):
            expected = values[0] if outcomes[0].averaged else tensors(number, epoch)
            assert all(torch.equal(a, b) for a, b in zip(value, expected, strict=True))
        if len(outcomes[0].members) < 3:
            break
        assert lost.result().averaged
    else:
        pytest.fail("it never came to that step")
    print(f"\n{fault.name} at {step}: {len(outcomes[0].members)} averaged, in {took:.2f} s")
    assert took < 2 * FAST["request_timeout"] + 2 * FAST["next_chunk_timeout"] + SLACK
    os.kill(victim.swarm.averager_pid, signal.SIGKILL)
    with pytest.raises(AveragerLost):
        lost.result()


def befall(patch: pytest.MonkeyPatch, step: str, fault: signal.Signals) -> None:
    """Averagers that are forked from now on meet with `fault` when they come to `step`."""
    send, make = Averager.send, Averager._make_all_reduce

    def fatal_send(self: Averager, session: Session, receiver: str, message: Message) -> None:
        if type(message).__name__ == step:
            signal.pthread_kill(get_ident(), fault)  # of this thread: another's would take effect a little later
        send(self, session, receiver, message)

    def fatal_make(self: Averager, session: Session, group: Average) -> AllReduce:
        if step == "averaging":
            signal.pthread_kill(get_ident(), fault)
        return make(self, session, group)

    patch.setattr(Averager, "send", fatal_send)
    patch.setattr(Averager, "_make_all_reduce", fatal_make)


def test_an_averager_that_is_killed_in_a_meeting_says_so_to_its_trainer(join: Join) -> None:
    peers = [join(), join()]
    acquainted(peers)
    expect(peers[1], 100.0, epoch=0)
    meeting = meet(peers[0], [torch.ones(3)], peers)
    os.kill(peers[0].swarm.averager_pid, signal.SIGKILL)
    with pytest.raises(AveragerLost):
        meeting.result()


@pytest.mark.parametrize("stop", [False, True])
def test_closing_takes_a_second_at_most_and_leaves_no_process(join: Join, stop: bool) -> None:
    peer = join()
    pid = peer.swarm.averager_pid
    if stop:
        os.kill(pid, signal.SIGSTOP)
    started = monotonic()
    peer.swarm.close()
    assert monotonic() - started < 1.0
    assert not is_running(pid)


def test_nothing_outlives_a_trainer_that_is_killed(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        sys.path[:0] = [sys.argv[2], sys.argv[3]]
        from swarm_peers import Peer
        if __name__ == "__main__":
            peer = Peer(Path(sys.argv[1]), [])
            print(peer.dht.pid, peer.swarm.averager_pid, flush=True)
            time.sleep(600)
    """)
    here = Path(__file__).parent
    parent = subprocess.Popen([sys.executable, "-c", script, *map(str, (tmp_path / "identity.key", here, here.parent))],
                              stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        dht, averager = map(int, parent.stdout.readline().split())
        (p2pd,) = psutil.Process(dht).children()
        parent.kill()
        for pid in (dht, averager, p2pd.pid):
            until(lambda pid=pid: not is_running(pid), "it is gone", 5)
    finally:
        parent.kill()
        parent.wait()
