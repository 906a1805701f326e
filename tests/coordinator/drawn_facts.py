"""What a coordinator may know, drawn by hypothesis: few peers, names and times, so that they meet."""

from typing import Any

from hypothesis import strategies as st

from coordinator.facts import BanFact, CoordinatorFact, Facts, InviteFact, MemberFact, UseFact, by_key

peers, codes = st.sampled_from(["QmA", "QmB", "QmC"]), st.sampled_from(["one", "two"])
times, few = st.sampled_from([0.0, 1.0, 2.0, 2.5]), st.sampled_from(["", "a", "b"])


def facts_of(kind: type[Any], **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[Any, Any]]:
    return st.lists(st.builds(kind, **fields), max_size=4).map(by_key)


FACTS = st.builds(
    Facts, serial=st.integers(0, 9),
    invites=facts_of(InviteFact, code=codes, label=few, created=times, expires=st.none() | times,
                     uses=st.none() | st.integers(0, 3), revoked=st.booleans()),
    members=facts_of(MemberFact, peer_id=peers, name=few, public_key=st.just(b"key"), enrolled=times, renewed=times),
    uses=facts_of(UseFact, code=codes, peer_id=peers, time=times),
    bans=facts_of(BanFact, peer_id=peers, time=times, banned=st.booleans(), reason=few),
    coordinators=facts_of(CoordinatorFact, peer_id=peers, time=times, link=few, addresses=few))
