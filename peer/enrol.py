"""Enrolment: the coordinator lets this volunteer in, and all that it says is checked against the link."""

import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace

import grpc
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from averaging.experiment import Experiment, fingerprint, parse
from averaging.identity import is_signed, public_bytes, sign
from averaging.membership import enrolment_words, experiment_words
from averaging.version import VERSION
from coordinator.calls import explain, one_line
from coordinator.link import MEND, Link, parse_link
from coordinator.tls import Unreachable, connect
from peer.config import PeerConfig
from peer.job import ban_file, read_job, read_token
from proto.coordinator_pb2 import EnrolReply, EnrolRequest
from proto.coordinator_pb2_grpc import CoordinatorStub
from training.errors import BadInput

TIMEOUT_SECONDS = 15.0
GUESS_SECONDS = 86400.0
MOST_COORDINATORS = 8


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
    coordinators: tuple[Link, ...] = ()  # all that may be asked the next time, without an invite


async def enrol_anywhere(link: Link, others: Iterable[Link], name: str, key: RSAPrivateKey, *,
                         timeout_seconds: float = TIMEOUT_SECONDS) -> Enrolment:
    """As `enrol` with the coordinator behind `link`, or else with the first of the `others` that lets this volunteer
    in, all by the link's invite. Raises BadInput, Unreachable if none of them can be reached."""
    complaints = list[BadInput]()
    for asked in dict.fromkeys((link, *(replace(other, invite=link.invite) for other in others))):
        try:
            return await enrol(asked, name, key, timeout_seconds=timeout_seconds)
        except BadInput as error:
            complaints.append(error)
    raise next((error for error in complaints if not isinstance(error, Unreachable)), complaints[0])


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
                     ban_file(job).newest().signed, links(job.run_id, job.coordinators))


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
                     reply.bans, links(link.run_id, reply.coordinators))


def links(run_id: str, texts: Iterable[str]) -> tuple[Link, ...]:
    """The first few of these that are links of the run; what is none, a later version may know."""
    found = list[Link]()
    for text in texts:
        with suppress(BadInput):
            found.append(parse_link(text))
    return tuple(link for link in found if link.run_id == run_id)[:MOST_COORDINATORS]
