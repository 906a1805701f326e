"""Who is credited with how many samples: a pure function of the receipts of rounds that their members wrote.

A member is credited for a round with what it claims, but not with more than the others of its group saw: the median of
their words, of two the lower; nor with more than `most_samples`, which counted for nothing in the round. Whoever
claims more is flagged. A claim that nobody else confirms brings nothing: not that of a round of one, nor of a group of
whose others none has written.

No word counts of who is no member; of who does not name itself among those averaged; of one about another who does
not name it in turn; of who says two things of one group. For one epoch nobody is credited twice: of several groups
the one with the most witnesses counts, and who claims them in one breath is flagged. A whole group that lies together
is believed.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import median_low

from averaging.receipts import Receipt

ABOVE, TWICE = "above", "twice"  # what a member is flagged for
Round = tuple[int, bytes]  # epoch and group


@dataclass(frozen=True)
class Credit:
    """Of one member for one epoch. `rank` orders what may be known of it: more evidence replaces less."""

    epoch: int
    peer_id: str
    group_id: bytes
    claimed: int
    samples: int    # that it is credited with
    witnesses: int  # others of its group who have written
    flag: str = ""  # ABOVE, TWICE, or nothing

    @property
    def rank(self) -> tuple[int, bool, int, bytes]:
        """A total order but for what is equal, so that whoever gathers credits comes to the same in any order."""
        return self.witnesses, bool(self.flag), -self.samples, self.group_id


def credits(receipts: Mapping[str, Iterable[Receipt]], *, members: Collection[str], most_samples: int
            ) -> dict[tuple[int, str], Credit]:
    """By epoch and peer id: what the receipts, by their writers' peer ids, amount to."""
    found: dict[tuple[int, str], Credit] = {}
    for at, words in _words(receipts, members).items():
        for peer_id in words:
            credit = _credit(at, peer_id, words, most_samples)
            if credit is None:
                continue
            before = found.get((credit.epoch, peer_id))
            found[credit.epoch, peer_id] = credit if before is None else _one_of(before, credit)
    return found


def _words(receipts: Mapping[str, Iterable[Receipt]], members: Collection[str]
           ) -> Mapping[Round, Mapping[str, Mapping[str, int]]]:
    """What each writer says of each round."""
    words: defaultdict[Round, dict[str, Mapping[str, int]]] = defaultdict(dict)
    for writer in receipts.keys() & set(members):
        contradicted = set[Round]()
        for receipt in receipts[writer]:
            at = receipt.epoch, receipt.group_id
            if writer in receipt.accepted and words[at].setdefault(writer, receipt.accepted) != receipt.accepted:
                contradicted.add(at)
        for at in contradicted:
            del words[at][writer]
    return words


def _credit(at: Round, peer_id: str, words: Mapping[str, Mapping[str, int]], most_samples: int) -> Credit | None:
    """None: it claims nothing, or nobody confirms that it was there."""
    claimed = words[peer_id][peer_id]
    others = [said[peer_id] for writer, said in words.items()
              if writer != peer_id and peer_id in said and writer in words[peer_id]]
    if not claimed or not others:
        return None
    samples = min(claimed, median_low(others), most_samples)
    return Credit(at[0], peer_id, at[1], claimed, samples, len(others), ABOVE if claimed > samples else "")


def _one_of(one: Credit, other: Credit) -> Credit:
    better = max(one, other, key=lambda credit: credit.rank)
    return replace(better, flag=TWICE)
