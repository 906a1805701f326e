"""Enrolment: the coordinator hands out the experiment, and every byte of it is checked against the link."""

from dataclasses import dataclass

import grpc

from averaging.experiment import Experiment, fingerprint, parse
from averaging.version import VERSION
from coordinator.link import MEND, Link
from peer.plain import one_line
from proto.coordinator_pb2 import EnrolReply, EnrolRequest
from proto.coordinator_pb2_grpc import CoordinatorStub
from training.errors import BadInput

TIMEOUT_SECONDS = 15.0


@dataclass(frozen=True)
class Enrolment:
    """What a coordinator handed out, checked."""

    run_id: str
    experiment: Experiment
    document: bytes  # the experiment as it came, byte for byte
    fingerprint: str
    initial_peers: tuple[str, ...]
    dashboard_url: str


async def enrol(link: Link, name: str, *, timeout_seconds: float = TIMEOUT_SECONDS) -> Enrolment:
    """Ask the coordinator behind `link` for its experiment.

    Raises BadInput if none answers in time, if it runs another experiment than the link's, if what it sends
    hasn't the fingerprint that it and the link claim, or if this version of covey doesn't know it.
    """
    async with grpc.aio.insecure_channel(link.address) as channel:
        request = EnrolRequest(run_id=link.run_id, name=name, version=VERSION)
        try:
            reply = await CoordinatorStub(channel).Enrol(request, timeout=timeout_seconds)
        except grpc.aio.AioRpcError as error:
            raise explain(link, error) from None
    return check(link, reply)


def check(link: Link, reply: EnrolReply) -> Enrolment:
    """The reply as an Enrolment. Raises BadInput as `enrol` does."""
    actual = fingerprint(reply.experiment)
    if actual != reply.fingerprint:
        raise BadInput(f"an experiment with fingerprint {actual[:12]}",
                       expected=f"{one_line(reply.fingerprint)[:12]}, as its coordinator {link.address} claims",
                       mend="It changed on the way: join again, or ask the operator.")
    if reply.run_id != link.run_id or not link.run_id.endswith(f"-{actual[:12]}"):
        raise BadInput(f"experiment {one_line(reply.run_id)!r} with fingerprint {actual[:12]}",
                       expected=f"{link.run_id}, as in the link", mend=MEND)
    return Enrolment(link.run_id, parse(reply.experiment), reply.experiment, actual,
                     tuple(reply.initial_peers), reply.dashboard_url)


def explain(link: Link, error: grpc.aio.AioRpcError) -> BadInput:
    """A failed call to a coordinator, in a user's words."""
    details = one_line(error.details() or "")
    match error.code():
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.DEADLINE_EXCEEDED:
            return BadInput(f"no coordinator answers at {link.address} ({details})",
                            expected="a running `covey coordinator`", mend="Check that it runs and that this "
                            "machine reaches that port.")
        case grpc.StatusCode.NOT_FOUND | grpc.StatusCode.FAILED_PRECONDITION | grpc.StatusCode.INVALID_ARGUMENT:
            found, _, rest = details.partition("; expected ")  # a coordinator's errors are worded as ours
            expected, _, mend = rest.partition(". ")
            return BadInput(f"{link.address} refuses: {found}", expected=expected or "what it runs now",
                            mend=mend or "The link may be stale: ask the operator for a fresh one.")
        case code:
            return BadInput(f"{link.address} answers {code.name} ({details})", expected="a coordinator that "
                            "this version of covey knows", mend="Check the link and both versions.")
