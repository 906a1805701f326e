"""Enrolment: the coordinator lets this volunteer in, and all that it says is checked against the link."""

import time
from dataclasses import dataclass

import grpc
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from averaging.experiment import Experiment, fingerprint, parse
from averaging.identity import is_signed, public_bytes, sign
from averaging.membership import enrolment_words, experiment_words
from averaging.version import VERSION
from coordinator.link import MEND, Link
from coordinator.tls import connect, unreachable
from peer.config import PeerConfig
from peer.job import ban_file, read_job, read_token
from peer.plain import one_line
from proto.coordinator_pb2 import EnrolReply, EnrolRequest
from proto.coordinator_pb2_grpc import CoordinatorStub
from training.errors import BadInput

TIMEOUT_SECONDS = 15.0
GUESS_SECONDS = 86400.0


@dataclass(frozen=True)
class Enrolment:
    """What a coordinator handed out, checked."""

    run_id: str
    experiment: Experiment
    document: bytes  # the experiment as it came, byte for byte
    fingerprint: str
    initial_peers: tuple[str, ...]
    dashboard_url: str
    name: str        # what this volunteer is called
    token: bytes     # lets it into the swarm
    expires: float   # the token, Unix seconds
    authority: bytes  # public key
    bans: bytes      # signed; empty: nobody was ever banned


async def enrol(link: Link, name: str, key: RSAPrivateKey, *, timeout_seconds: float = TIMEOUT_SECONDS) -> Enrolment:
    """Ask the coordinator behind `link` to let the holder of `key` in, as `name` or the like; or in again.

    Raises BadInput if none answers in time, if it does not let this volunteer in, if it runs another experiment than
    the link's, if what it sends hasn't the fingerprint that it and the link claim, or if this version of covey doesn't
    know it.
    """
    request = EnrolRequest(run_id=link.run_id, name=name, version=VERSION, invite=link.invite, time=time.time(),
                           public_key=public_bytes(key))
    request.signature = sign(key, enrolment_words(request))
    async with await connect(link, timeout_seconds=timeout_seconds) as channel:
        try:
            reply = await CoordinatorStub(channel).Enrol(request, timeout=timeout_seconds)
        except grpc.aio.AioRpcError as error:
            raise explain(link, error) from None
    return check(link, reply)


def recall(link: Link, config: PeerConfig) -> Enrolment | None:
    """What the coordinator said when this peer last enrolled; None if it never has, or if it was another run's.

    The token may have been renewed since, or have expired; that it is good for another day is a guess.
    """
    try:
        job = read_job(config.state_dir)
    except BadInput:
        return None
    token = read_token(job)
    if job.run_id != link.run_id or fingerprint(job.experiment) != job.fingerprint or not token:
        return None
    return Enrolment(job.run_id, parse(job.experiment), job.experiment, job.fingerprint, tuple(job.initial_peers), "",
                     job.config.name, token, time.time() + GUESS_SECONDS, job.authority.encode(),
                     ban_file(job).newest().signed)


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
    if not is_signed(reply.authority, experiment_words(link.run_id, reply.experiment), reply.experiment_signature):
        raise BadInput(f"an experiment from {link.address} that its authority has not signed", expected="its signature",
                       mend="Ask the operator.")
    return Enrolment(link.run_id, parse(reply.experiment), reply.experiment, actual, tuple(reply.initial_peers),
                     reply.dashboard_url, one_line(reply.name), reply.token, reply.token_expires, reply.authority,
                     reply.bans)


def explain(link: Link, error: grpc.aio.AioRpcError) -> BadInput:
    """A failed call to a coordinator, in a user's words."""
    details = one_line(error.details() or "")
    match error.code():
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return unreachable(link, details)
        case grpc.StatusCode.UNAVAILABLE if "; expected " not in details:
            return unreachable(link, details)
        case _ if "; expected " in details:  # a coordinator's errors are worded as ours
            found, _, rest = details.partition("; expected ")
            expected, _, mend = rest.partition(". ")
            return BadInput(f"{link.address} refuses: {found}", expected=expected,
                            mend=mend or "The link may be stale: ask the operator for a fresh one.")
        case code:
            return BadInput(f"{link.address} answers {code.name} ({details})", expected="a coordinator that "
                            "this version of covey knows", mend="Check the link and both versions.")
