"""When the archive pulls, from whom, and what it believes."""

from collections.abc import Callable
from struct import pack

import pytest

from averaging.config import Averaging
from averaging.records import PeerRecord
from coordinator.pulls import KEPT_SKETCHES, PATIENCE_SECONDS, settled_epoch, verdict, wanted, with_majority
from coordinator.swarm import SKETCH

CONFIG = Averaging(target_batch_size=256, target_group_size=4)
GOSSIP = Averaging(strategy="gossip", target_batch_size=256, target_group_size=4)
Record = Callable[..., PeerRecord]


def sketch(*values: float) -> bytes:
    return pack(SKETCH, *values, *[0.0] * (32 - len(values)))


OURS, ROUNDED, OTHER = sketch(1.0, 2.0), sketch(1.0, 2.0001), sketch(1.0, 2.1)


@pytest.mark.parametrize(("epochs", "settled"), [([], None), ([7], 7), ([7, 5], 5), ([7, 6, 5], 6),
                                                ([10**9, 6, 6], 6), ([0, 6, 6], 6)])
def test_the_swarm_is_where_half_of_those_who_train_are(record: Record, epochs: list[int], settled: int | None) -> None:
    records = [record(str(number), epoch=epoch) for number, epoch in enumerate(epochs)]
    others = [record("helper", epoch=99, auxiliary=True), record("new", epoch=0, state="starting"),
              record("archive", epoch=99, state="archiving")]
    assert settled_epoch([*records, *others]) == settled


@pytest.mark.parametrize(("epoch", "held", "is_wanted"), [
    (9, None, False), (10, None, True), (19, 10, False), (20, 10, True), (25, 10, True), (20, 20, False),
    (30, 40, False), (41, 19, True)])
def test_a_state_is_wanted_every_so_many_epochs(record: Record, epoch: int, held: int | None, is_wanted: bool) -> None:
    pull = wanted([record("a", epoch=epoch), record("b", epoch=epoch)], "me", held, 10, CONFIG)
    assert (pull is not None) == is_wanted
    if pull:
        assert sorted(pull.donors) == ["a", "b"]
        assert pull.epoch == (held or 0) + 1


def test_the_majority_is_asked_first(record: Record) -> None:
    records = [record("odd", epoch=10, sketch=OTHER), *(record(name, epoch=10, sketch=OURS) for name in "abc")]
    pull = wanted(records, "me", None, 10, CONFIG)
    assert pull is not None
    assert pull.donors[-1] == "odd"


def test_who_claims_to_be_far_ahead_of_all_is_not_asked(record: Record) -> None:
    records = [record("liar", epoch=10**6), *(record(name, epoch=10) for name in "ab")]
    pull = wanted(records, "me", None, 10, CONFIG)
    assert pull is not None
    assert "liar" not in pull.donors


def test_nobody_to_ask_is_no_pull(record: Record) -> None:
    assert wanted([], "me", None, 10, CONFIG) is None
    assert wanted([record("helper", epoch=10, auxiliary=True)], "me", None, 10, CONFIG) is None


def test_who_accepts_no_connections_is_asked_last(record: Record) -> None:
    """Through one that it has opened itself."""
    pull = wanted([record("client", epoch=10, client_mode=True), record("a", epoch=10)], "me", None, 10, CONFIG)
    assert pull is not None
    assert pull.donors == ("a", "client")


@pytest.mark.parametrize(("epoch", "sketch", "waited", "believed"), [
    pytest.param(10, OURS, 0.0, True, id="what most have"),
    pytest.param(10, ROUNDED, 0.0, True, id="what most have, rounded otherwise"),
    pytest.param(10, OTHER, 0.0, False, id="something else"),
    pytest.param(10, b"", 0.0, False, id="no sketch at all"),
    pytest.param(10, sketch(float("nan")), 0.0, False, id="not a number"),
    pytest.param(9, OTHER, 0.0, None, id="an epoch of which no majority was seen: it may come"),
    pytest.param(9, OTHER, PATIENCE_SECONDS, True, id="... or not"),
    pytest.param(11, OURS, 0.0, None, id="an epoch that most may reach in a moment"),
    pytest.param(11, OURS, PATIENCE_SECONDS, False, id="... or not"),
])
def test_a_state_is_believed_if_it_is_the_majoritys(epoch: int, sketch: bytes, waited: float,
                                                    believed: bool | None) -> None:
    refusal = verdict(epoch, sketch, settled=10, sketches={10: OURS}, config=CONFIG, waited=waited)
    assert (None if refusal is None else not refusal) == believed


def test_where_peers_differ_within_an_epoch_only_the_epoch_is_checked() -> None:
    assert verdict(11, OTHER, settled=10, sketches={11: OURS}, config=GOSSIP, waited=0.0) == ""
    assert verdict(13, OTHER, settled=10, sketches={}, config=GOSSIP, waited=PATIENCE_SECONDS)


def test_majorities_are_remembered_for_a_while(record: Record) -> None:
    sketches: dict[int, bytes] = {}
    for epoch in range(100):
        sketches = with_majority(sketches, [record("a", epoch=epoch, sketch=OURS),
                                            record("b", epoch=epoch, sketch=OURS), record("c", epoch=0, sketch=OTHER)])
    assert len(sketches) == KEPT_SKETCHES
    assert sketches[99] == OURS
