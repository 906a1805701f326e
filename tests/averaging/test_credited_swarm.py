"""A real swarm, with libp2p and DHT: what the receipts amount to is what was averaged, and nonsense changes nothing."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.utils import get_dht_time
from memory_peers import at_once
from processes import until
from swarm_peers import RUN, Peer, acquainted, enter, meet, swarm, together
from threads_of_peers import Peer as Trainer

from averaging.receipt_records import key_of, read_receipts
from averaging.receipts import LIFE_SECONDS, LONGEST, Receipt, dump, shard_of
from averaging.records import RoundEnd
from coordinator.credits import ABOVE, Credit, credits

TARGET = 60


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Peer]]:
    """Three that train, and one that helps them."""
    with ExitStack() as stack:
        join = stack.enter_context(swarm(tmp_path_factory.mktemp("keys")))
        found = [join(target_batch_size=TARGET) for _ in range(3)]
        found.append(join(target_batch_size=TARGET, auxiliary=True))
        acquainted(found)
        yield found


def credited(peers: list[Peer], most_samples: int = TARGET) -> dict[tuple[int, str], Credit]:
    """As a coordinator reads it: any node's view will do."""
    return credits(read_receipts(peers[0].dht, RUN), members={peer.id for peer in peers}, most_samples=most_samples)


def eventually(peers: list[Peer], epoch: int, expected: dict[str, int], witnesses: int = 3) -> dict[str, Credit]:
    def of_epoch() -> dict[str, Credit]:
        return {peer: credit for (at, peer), credit in credited(peers).items() if at == epoch}
    until(lambda: {peer: credit.samples for peer, credit in of_epoch().items()} == expected
          and all(credit.witnesses == witnesses for credit in of_epoch().values()),
          f"credits of epoch {epoch} are {expected}: {of_epoch()}", 30)
    return of_epoch()


def round_of(peers: list[Peer], epoch: int, samples: list[int]) -> None:
    """All meet at the end of `epoch`, those that train with so many samples each."""
    enter(peers, epoch)
    meetings = [meet(peer, [torch.ones(8)], peers, weight=float(number), epoch=epoch, samples=number)
                for peer, number in zip(peers[:3], samples, strict=True)]
    outcomes = together([*meetings, meet(peers[3], [], peers, weight=0.0, epoch=epoch)])
    assert all(outcome.averaged for outcome in outcomes), outcomes


def test_every_member_is_credited_with_what_it_brought_the_helper_confirms_and_no_more_than_counts(
        peers: list[Peer]) -> None:
    round_of(peers, 1, [10, 20, 10**6])
    found = eventually(peers, 1, {peers[0].id: 10, peers[1].id: 20, peers[2].id: TARGET})
    assert not any(credit.flag for credit in found.values())  # its statement is cut where it is read: no other claim


def test_who_is_left_behind_is_credited_with_nothing_and_the_others_with_theirs(peers: list[Peer]) -> None:
    first, second, absent, _ = peers
    enter([first, second], 3)
    enter([absent], 50)  # so it does not come
    outcomes = together([meet(peer, [torch.ones(8)], [first, second, absent], epoch=3, samples=samples)
                         for peer, samples in ((first, 10), (second, 20))])
    assert all(outcome.averaged for outcome in outcomes), outcomes
    alone = together([meet(absent, [torch.ones(8)], [first, second, absent], epoch=3, samples=30)])
    assert not alone[0].averaged
    found = eventually(peers, 3, {first.id: 10, second.id: 20}, witnesses=1)
    assert not any(credit.flag for credit in found.values())


@pytest.mark.parametrize(("number", "strategy"), enumerate(("collaborative", "local_sgd", "diloco", "gossip"), 1))
def test_of_each_strategy_the_credits_of_an_epoch_are_the_samples_that_were_averaged(
        peers: list[Peer], number: int, strategy: str) -> None:
    first, made, averaged = 100 * number, list[Counter[int]](), list[set[int]]()

    def trainer_of(peer: Peer, index: int) -> Trainer:
        def note(end: RoundEnd) -> None:
            if end.outcome == "averaged":
                averaged[index].add(end.epoch)
        made.append(Counter())
        averaged.append(set())
        trainer = Trainer(peer.config.model_copy(update={"strategy": strategy}), peer.swarm, index, on_round=note)
        trainer.strategy.resume(first)
        return trainer

    def train(trainer: Trainer, index: int) -> None:
        while (epoch := trainer.strategy.epoch) < first + 2:
            trainer.step(2 + index)
            made[index][epoch] += 2 + index
        trainer.strategy.settle()

    enter(peers, first)
    trainers = [trainer_of(peer, index) for index, peer in enumerate(peers[:3])]  # nobody begins before all can
    at_once([lambda trainer=trainer, index=index: train(trainer, index)  # type: ignore[misc]
             for index, trainer in enumerate(trainers)])
    by_all = {epoch for epoch in set.intersection(*averaged) if epoch >= first}  # gossip mixes once before
    assert by_all, averaged
    for epoch in by_all:
        eventually_of_three(peers, epoch, {peers[index].id: made[index][epoch] for index in range(3)})


def eventually_of_three(peers: list[Peer], epoch: int, expected: dict[str, int]) -> None:
    def found() -> dict[str, int]:
        return {peer: credit.samples for (at, peer), credit in credited(peers).items() if at == epoch}
    until(lambda: found() == expected, f"credits of epoch {epoch} are {expected}, not {found()}", 30)
    assert sum(expected.values()) >= TARGET


def forge(peer: Peer, value: object, *, shard: int | None = None, owner: bytes = b"", life: float = 60.0) -> bool:
    """Store as a volunteer of bad will would, past our own writer; whether any node took it."""
    key = key_of(RUN, shard_of(peer.id) if shard is None else shard)
    return bool(peer.dht.store(key, subkey=owner or RSASignatureValidator(peer.key).local_public_key, value=value,
                               expiration_time=get_dht_time() + life))


def test_what_is_no_receipt_or_not_its_writers_is_stored_nowhere(peers: list[Peer]) -> None:
    liar, other = peers[0], RSASignatureValidator(peers[1].key).local_public_key
    good = dump([Receipt(1, bytes(16), {liar.id: 1})])
    for value in (b"\xff", b"\0" * (LONGEST + 1), "text", 1e300, float("nan"), None, {"samples": 10**9}, [good] * 1000,
                  dump([Receipt(2**60, bytes(16), {})])):
        assert not forge(liar, value)
    assert not forge(liar, good, owner=other)
    assert not forge(liar, good, owner=b"more" + RSASignatureValidator(liar.key).local_public_key)
    assert not forge(liar, good, shard=(shard_of(liar.id) + 1) % 16)
    assert not forge(liar, good, life=LIFE_SECONDS + 600)


def test_a_volunteer_that_signs_lies_changes_nothing_of_others_and_gets_no_more_than_its_group_saw(
        peers: list[Peer]) -> None:
    """Last: its true receipts are gone then."""
    round_of(peers, 2, [10, 20, 30])
    eventually(peers, 2, truth := {peers[0].id: 10, peers[1].id: 20, peers[2].id: 30})
    group = next(receipt for receipt in read_receipts(peers[1].dht, RUN)[peers[0].id] if receipt.epoch == 2)
    lies = [Receipt(epoch, bytes([epoch]) * 16, {peer.id: 10**9 for peer in peers}) for epoch in range(4, 8)]
    lies.append(replace(group, accepted={**group.accepted, peers[0].id: 50, peers[1].id: 0}))
    assert forge(peers[0], dump(lies), life=LIFE_SECONDS + 60)  # beyond the true one
    until(lambda: len(read_receipts(peers[1].dht, RUN)[peers[0].id]) == len(lies), "the lies are read", 20)
    found = credited(peers)
    assert {peer: credit.samples for (epoch, peer), credit in found.items() if epoch == 2} == truth
    assert {peer: credit.flag for (epoch, peer), credit in found.items() if credit.flag} == {peers[0].id: ABOVE}
    assert not any(4 <= epoch < 8 for epoch, _ in found)
