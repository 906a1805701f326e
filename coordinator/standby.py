"""A second coordinator: what it is handed by the first, once, so that it can go on without it."""

import asyncio
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import grpc

from averaging.bans import BanFile
from averaging.experiment import Experiment, canonical, fingerprint, parse, run_id
from averaging.identity import parse_key, public_bytes
from averaging.known_peers import remember_peers
from averaging.private_file import write_private
from averaging.version import VERSION
from coordinator.calls import admin_metadata, explain
from coordinator.ledger import Ledger
from coordinator.link import MEND, Link, parse_link
from coordinator.tls import connect
from coordinator.wire import decode
from proto.replica_pb2 import HandoverReply, HandoverRequest
from proto.replica_pb2_grpc import ReplicaStub
from training.errors import BadInput

TIMEOUT_SECONDS = 30.0
LONGEST_REPLY = 64 << 20  # bytes: some 100,000 members


def stand_by(link: Link, folder: Path) -> tuple[Experiment, HandoverReply | None]:
    """What to run as a further coordinator of the run of the one behind `link`: the experiment, and what that one hands
    over at the first start; later ones on the state directory `folder` need nobody.

    Raises BadInput if it is another run's, SystemExit if nothing is handed over.
    """
    handover = None
    if (experiment := kept_experiment(folder.expanduser())) is None:
        handover = ask_for_all(link)
        experiment = checked(link, handover)
    if run_id(experiment) != link.run_id:
        raise BadInput(f"state directory {folder} of {run_id(experiment)}", expected=f"one of {link.run_id}, as in "
                       "the link, or a new one", mend="Choose another with --state-dir.")
    return experiment, handover


def kept_experiment(folder: Path) -> Experiment | None:
    """That of the coordinator whose state directory this is; None: it is none's yet. Raises BadInput."""
    try:
        return parse((folder / "experiment.json").read_bytes()) if (folder / "authority.key").exists() else None
    except FileNotFoundError:
        return None


def keep_experiment(folder: Path, experiment: Experiment) -> None:
    """For the next start, which then needs neither a recipe nor another coordinator."""
    write_private(folder / "experiment.json", canonical(experiment))


def ask_for_all(link: Link) -> HandoverReply:
    """All that the coordinator behind `link` has, with the admin token in COVEY_ADMIN_TOKEN.

    Asked in a process of its own: this one is to fork a DHT node, before which gRPC must not run. That process says
    what is wrong, and its exit status is then ours (SystemExit).
    """
    command = [sys.executable, "-m", "coordinator.standby", str(link)]
    asked = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if asked.returncode:
        raise SystemExit(asked.returncode)
    return HandoverReply.FromString(asked.stdout)


def checked(link: Link, reply: HandoverReply) -> Experiment:
    """The experiment that was handed over. Raises BadInput unless it is the link's, with a key for it."""
    if not link.run_id.endswith(f"-{fingerprint(reply.experiment)[:12]}"):
        raise BadInput(f"an experiment with fingerprint {fingerprint(reply.experiment)[:12]}",
                       expected=f"{link.run_id}, as in the link", mend=MEND)
    try:
        parse_key(reply.authority_key)
    except ValueError as error:
        raise BadInput(f"a key from {link.address} that is none ({error})", expected="the authority's",
                       mend="Look at its log.") from None
    return parse(reply.experiment)


def take_over(reply: HandoverReply, folder: Path, run_id: str) -> None:
    """Put what was handed over into the state directory `folder`, the key last: until then it is none's.

    Raises BadInput, and leaves it alone, if another authority's key is there: it is all that its members believe.
    """
    path = folder / "authority.key"
    if path.exists() and path.read_bytes() != reply.authority_key:
        raise BadInput(f"state directory {folder} of another authority", expected="a new one, or this one's",
                       mend="Choose another with --state-dir.")
    with closing(Ledger(folder / "ledger.sqlite")) as ledger:
        ledger.learn(decode(reply.facts))
    BanFile(folder / "bans", public_bytes(parse_key(reply.authority_key)), run_id).offer(reply.bans)
    write_private(folder / "credits.sqlite", reply.credits)
    remember_peers(folder / "known_peers.json", reply.initial_peers)
    write_private(folder / "experiment.json", reply.experiment)
    write_private(folder / "admin.token", reply.admin_token.encode())
    write_private(path, reply.authority_key)


async def ask(link: Link) -> HandoverReply:
    """As `ask_for_all`, in this process. Raises BadInput."""
    metadata = admin_metadata()
    async with await connect(link, timeout_seconds=TIMEOUT_SECONDS, longest_reply=LONGEST_REPLY) as channel:
        try:
            reply: HandoverReply = await ReplicaStub(channel).Handover(
                HandoverRequest(run_id=link.run_id, version=VERSION), metadata=metadata, timeout=TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise explain(link, error) from None
    checked(link, reply)
    return reply


if __name__ == "__main__":
    try:
        sys.stdout.buffer.write(asyncio.run(ask(parse_link(sys.argv[1]))).SerializeToString())
    except BadInput as error:
        print(f"covey: {error}", file=sys.stderr)
        sys.exit(2)
