"""The bulletin board on a real DHT: records are told and read in time, and a lost DHT stops nobody."""

from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest
from hivemind.utils import get_dht_time
from processes import until

from averaging.bulletin import Bulletin
from averaging.config import Averaging
from averaging.dht import DHT, open_identity, start_dht
from averaging.progress import read_records, record_validators
from averaging.records import PeerRecord

RUN = "board"
SLOW = Averaging(target_batch_size=64, target_group_size=4, min_refresh_period=30.0, default_refresh_period=30.0,
                 max_refresh_period=30.0, report_progress_expiration=100.0)


def board(dht: DHT, key_path: Path, name: str) -> Bulletin:
    record = PeerRecord(
        peer_id=str(dht.peer_id), name=name, state="training", epoch=0, samples_accumulated=0, samples_total=0,
        samples_per_second=1.0, loss=None, group_size=0, version="0", device="cpu", client_mode=False,
        time=get_dht_time())
    return Bulletin(dht, RUN, open_identity(key_path), record, SLOW)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[DHT, Path]]]:
    folder, nodes = tmp_path_factory.mktemp("board"), list[tuple[DHT, Path]]()
    for number in range(2):
        path = folder / f"{number}.key"
        key = open_identity(path)
        known = [str(address) for dht, _ in nodes for address in dht.get_visible_maddrs()]
        nodes.append((start_dht(identity_path=path, host_maddrs=["/ip4/127.0.0.1/tcp/0"], initial_peers=known,
                                record_validators=record_validators(RUN, key)), path))
    yield nodes
    for dht, _ in reversed(nodes):
        dht.shutdown()


def told(dht: DHT, name: str) -> PeerRecord | None:
    return next((record for record in read_records(dht, RUN) if record.name == name), None)


def test_a_new_epoch_is_told_at_once_and_samples_when_it_is_time(nodes: list[tuple[DHT, Path]]) -> None:
    bulletin = board(*nodes[0], "ada")
    try:
        until(lambda: told(nodes[1][0], "ada") is not None, "the first word")
        bulletin.update(samples_accumulated=5)
        bulletin.update(epoch=1)
        until(lambda: (record := told(nodes[1][0], "ada")) is not None and record.epoch == 1, "the new epoch")
        record = told(nodes[1][0], "ada")
        assert record is not None
        assert record.samples_accumulated == 5
        bulletin.update(samples_accumulated=9)  # not worth a word for the next 30 seconds
        assert bulletin.record.samples_accumulated == 9
        bulletin.update(state="leaving")
        until(lambda: (record := told(nodes[1][0], "ada")) is not None and record.state == "leaving", "the goodbye")
    finally:
        bulletin.close()


def test_others_are_read_soon_when_that_is_asked_for_and_the_own_record_is_the_newest(
        nodes: list[tuple[DHT, Path]]) -> None:
    first, second = (board(*node, name) for node, name in zip(nodes, ("ada", "grace"), strict=True))
    try:
        until(lambda: told(nodes[0][0], "grace") is not None, "grace's word")

        def known() -> bool:
            first.hasten()
            return {record.name for record in first.records()} == {"ada", "grace"}
        until(known, "both are known")
        first.update(samples_accumulated=3)
        assert [record.samples_accumulated for record in first.records() if record.name == "ada"] == [3]
    finally:
        first.close()
        second.close()


def test_who_did_not_come_to_a_round_is_passed_over_until_it_writes_again(nodes: list[tuple[DHT, Path]]) -> None:
    first, second = (board(*node, name) for node, name in zip(nodes, ("ada", "grace"), strict=True))

    def grace() -> PeerRecord | None:
        first.hasten()
        return next((record for record in first.present() if record.name == "grace"), None)
    try:
        until(lambda: grace() is not None, "grace is known")
        until(lambda: told(nodes[0][0], "grace") == grace(), "her newest record is read")
        first.saw(0, [first.record.peer_id, second.record.peer_id], [first.record.peer_id])
        assert grace() is None
        assert "grace" in {record.name for record in first.records()}
        second.update(state="leaving")
        until(lambda: (record := grace()) is not None and record.state == "leaving", "she has written again")
    finally:
        first.close()
        second.close()


def test_who_held_a_round_is_in_the_next_epoch_though_its_record_lags(nodes: list[tuple[DHT, Path]]) -> None:
    first, second = (board(*node, name) for node, name in zip(nodes, ("ada", "grace"), strict=True))

    def grace() -> PeerRecord | None:
        first.hasten()
        return next((record for record in first.records() if record.name == "grace"), None)
    try:
        until(lambda: (record := grace()) is not None and record.epoch == 0 and record.state == "training", "grace")
        second.update(samples_accumulated=7, sketch=b"old")
        first.saw(0, *[[first.record.peer_id, second.record.peer_id]] * 2)
        record = grace()
        assert record is not None
        assert (record.epoch, record.samples_accumulated, record.sketch) == (1, 0, b"")
        second.update(epoch=3)
        until(lambda: (record := grace()) is not None and record.epoch == 3, "what she writes herself counts more")
    finally:
        first.close()
        second.close()


def test_who_held_a_round_is_there_though_the_dht_can_not_be_asked_for_its_record(
        nodes: list[tuple[DHT, Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (board(*node, name) for node, name in zip(nodes, ("ada", "grace"), strict=True))

    def names() -> set[str]:
        first.hasten()
        return {record.name for record in first.records()}

    def readings() -> int:
        first.hasten()
        return len(read)
    try:
        until(lambda: names() == {"ada", "grace"}, "grace is known")
        first.saw(0, *[[first.record.peer_id, second.record.peer_id]] * 2)
        read = list[int]()
        monkeypatch.setattr("averaging.bulletin.read_records", lambda *_: read.append(1) or [])
        until(lambda: readings() > 2, "a few readings that find nothing")
        assert names() == {"ada", "grace"}
        moment = get_dht_time() + SLOW.report_progress_expiration
        monkeypatch.setattr("averaging.bulletin.get_dht_time", lambda: moment)
        until(lambda: names() == {"ada"}, "what is not told for so long has expired")
    finally:
        first.close()
        second.close()


def test_the_last_word_is_told_though_the_node_is_shut_down_at_once(nodes: list[tuple[DHT, Path]],
                                                                    tmp_path: Path) -> None:
    path = tmp_path / "leaving.key"
    dht = start_dht(identity_path=path, host_maddrs=["/ip4/127.0.0.1/tcp/0"],
                    initial_peers=[str(address) for address in nodes[0][0].get_visible_maddrs()],
                    record_validators=record_validators(RUN, open_identity(path)))
    bulletin = board(dht, path, "leaving")
    until(lambda: told(nodes[0][0], "leaving") is not None, "the first word")
    bulletin.update(samples_total=1234)
    bulletin.close()
    dht.shutdown()
    record = told(nodes[0][0], "leaving")
    assert record is not None
    assert record.samples_total == 1234


def test_a_lost_dht_stops_neither_updates_nor_the_end(tmp_path: Path) -> None:
    path = tmp_path / "lone.key"
    dht = start_dht(identity_path=path, host_maddrs=["/ip4/127.0.0.1/tcp/0"],
                    record_validators=record_validators(RUN, open_identity(path)))
    bulletin = board(dht, path, "lone")
    dht.kill()
    dht.join()
    bulletin.update(epoch=1)
    bulletin.hasten()
    began = monotonic()
    bulletin.close()
    assert monotonic() - began < 5
    assert bulletin.record.epoch == 1
    dht.shutdown()
