"""Staying a member: the token is renewed long before it expires, and the worker finds it in a file."""

import asyncio
import sys
import time

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from coordinator.link import Link
from peer.enrol import Enrolment, enrol_anywhere
from peer.job import Job, keep_membership, write_job
from training.errors import BadInput

RENEWED_AT = 1 / 4   # of a token's time: a week, of a month's
RETRY_AT = 1 / 100   # of the time that is left
SOONEST_SECONDS = 1.0


async def stay(link: Link, key: RSAPrivateKey, job: Job, enrolment: Enrolment) -> None:
    """Renew the token, for ever, with the coordinator behind `link`, or else with another one of the run. While all are
    away, or say no, they are asked again; each change is told."""
    wait, complaint = _until_renewal(enrolment.expires), ""
    while True:
        await asyncio.sleep(wait)
        try:
            renewed = await enrol_anywhere(link, enrolment.coordinators, job.config.name, key)
            if renewed.authority != enrolment.authority:
                raise BadInput("another authority", expected="the one that let this peer in", mend="Join anew.")
            await asyncio.to_thread(keep_membership, job, renewed.token, renewed.bans)
            if set(renewed.coordinators) != set(enrolment.coordinators):  # for this peer's next start, and its worker's
                job = with_places(job, renewed)
                await asyncio.to_thread(write_job, job)
        except (BadInput, OSError) as error:
            wait = max(SOONEST_SECONDS, RETRY_AT * (enrolment.expires - time.time()))
            if str(error) != complaint:
                complaint = str(error)
                print(f"covey: this peer's token is not renewed: {error}", file=sys.stderr)
        else:
            enrolment, wait = renewed, _until_renewal(renewed.expires)
            if complaint:
                complaint = ""
                print("covey: this peer's token is renewed", file=sys.stderr)


def with_places(job: Job, enrolment: Enrolment) -> Job:
    """The job, with the addresses of coordinators and DHT nodes that came with the enrolment."""
    return job.model_copy(update={"initial_peers": list(enrolment.initial_peers),
                                  "coordinators": [str(link) for link in enrolment.coordinators]})


def _until_renewal(expires: float) -> float:
    return max(SOONEST_SECONDS, RENEWED_AT * (expires - time.time()))
