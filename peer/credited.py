"""What this volunteer is credited with: the coordinator's word, asked for now and then, verified and kept."""

import asyncio
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

import grpc
from google.protobuf.message import DecodeError

from averaging.identity import is_signed
from averaging.membership import contribution_words
from coordinator.calls import explain
from coordinator.link import Link
from coordinator.tls import Unreachable, connect
from peer.enrol import TIMEOUT_SECONDS
from peer.job import Job, keep_contribution, read_contribution
from proto.coordinator_pb2 import CreditsRequest, SignedContribution
from proto.coordinator_pb2_grpc import CoordinatorStub
from proto.swarm_pb2 import Contribution
from training.errors import BadInput

SOONEST_SECONDS, LATEST_SECONDS = 10.0, 300.0  # between two questions: more and more seldom


async def keep_credited(links: Sequence[Link], job: Job, peer_id: str, tell: Callable[[Contribution], None]) -> None:
    """`tell` what was said last, and each newer word, for ever: of the first coordinator behind `links` that answers.
    While all are away, they are asked again."""
    newest, wait, complaint = recall(job, peer_id), SOONEST_SECONDS, ""
    if newest:
        tell(newest)
    while True:
        await asyncio.sleep(wait)
        wait = min(2 * wait, LATEST_SECONDS)
        try:
            signed = await ask_first(links, peer_id)
            said = check(signed, job, peer_id)
            if newest is None or said.time > newest.time:
                await asyncio.to_thread(keep_contribution, job, signed.SerializeToString())
                newest = said
                tell(newest)
        except Unreachable:
            continue  # whoever renews the token says so
        except (BadInput, OSError) as error:
            if str(error) != complaint:
                complaint = str(error)
                print(f"covey: what this peer is credited with is not known: {error}", file=sys.stderr)


async def ask_first(links: Sequence[Link], peer_id: str) -> SignedContribution:
    """As `ask`, of the first that can be reached. Raises BadInput, Unreachable if none can."""
    for link in links[:-1]:
        with suppress(Unreachable):
            return await ask(link, peer_id)
    return await ask(links[-1], peer_id)


async def ask(link: Link, peer_id: str) -> SignedContribution:
    """The coordinator's word, not looked at yet. Raises BadInput if there is none."""
    async with await connect(link, timeout_seconds=TIMEOUT_SECONDS) as channel:
        try:
            return await CoordinatorStub(channel).Credits(CreditsRequest(peer_id=peer_id), timeout=TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise explain(link, error) from None


def check(signed: SignedContribution, job: Job, peer_id: str) -> Contribution:
    """What it says. Raises BadInput unless the run's authority has signed it, of this peer."""
    if is_signed(job.authority.encode(), contribution_words(signed.contribution), signed.signature):
        try:
            said = Contribution.FromString(signed.contribution)
        except DecodeError:
            said = Contribution()
        if (said.run_id, said.peer_id) == (job.run_id, peer_id):
            return said
    raise BadInput("credits that the run's authority has not signed, or another's", expected="this peer's, signed",
                   mend="Ask the operator.")


def recall(job: Job, peer_id: str) -> Contribution | None:
    """What was said last, if it is there and good."""
    try:
        return check(SignedContribution.FromString(read_contribution(job)), job, peer_id)
    except (BadInput, DecodeError):
        return None


def line(credited: Contribution, now: float) -> str:
    """For people; `now` in Unix seconds."""
    age = max(0.0, now - credited.time)
    share = f", {credited.samples / credited.swarm_samples:.1%} of all" if credited.swarm_samples else ""
    rank = f", rank {credited.rank} of {credited.volunteers}" if credited.rank else ""
    flagged = f"; flagged in {credited.flagged:,} epochs: more claimed than the group saw" if credited.flagged else ""
    return (f"credited: {credited.samples:,} samples in {credited.epochs:,} epochs{share}{rank} "
            f"(the coordinator's word, {_span(age)} ago){flagged}")


def _span(seconds: float) -> str:
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
