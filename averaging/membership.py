"""What is signed for a member's sake, as bytes that mean nothing else. Imports no torch."""

from proto.coordinator_pb2 import EnrolRequest


def enrolment_words(request: EnrolRequest) -> bytes:
    """Signed by the volunteer: that it, and not another with its public key, wants to take part."""
    return _words("covey enrolment 1", request.run_id, request.name, request.version, request.invite,
                  repr(request.time), request.public_key)


def experiment_words(run_id: str, experiment: bytes) -> bytes:
    """Signed by the authority: that this is the run's experiment."""
    return _words("covey experiment 1", run_id, experiment)


def bans_words(bans: bytes) -> bytes:
    """Signed by the authority."""
    return _words("covey bans 1", bans)


def contribution_words(contribution: bytes) -> bytes:
    """Signed by the authority: what a volunteer is credited with."""
    return _words("covey contribution 1", contribution)


def exchange_words(words: bytes) -> bytes:
    """Signed with the authority's key by a coordinator that asks another what it knows."""
    return _words("covey exchange 1", words)


def _words(*parts: str | bytes) -> bytes:
    """Each with its length before it, so that no two lists of parts give the same bytes."""
    encoded = [part.encode() if isinstance(part, str) else part for part in parts]
    return b"".join(len(part).to_bytes(4) + part for part in encoded)
