"""A coordinator for tests that has no DHT and lets anyone in: it hands out whatever reply it is given, signed."""

from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import grpc
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key

from averaging.experiment import Experiment, canonical, experiment_of, fingerprint, run_id
from averaging.identity import public_bytes, sign
from averaging.membership import experiment_words
from coordinator.tls import self_signed
from proto.coordinator_pb2 import EnrolReply, EnrolRequest, WatchRequest
from proto.coordinator_pb2_grpc import CoordinatorServicer, add_CoordinatorServicer_to_server
from proto.swarm_pb2 import PeerRow, SwarmSnapshot

AUTHORITY = generate_private_key(public_exponent=65537, key_size=2048)
CERTIFICATE = self_signed()


@dataclass(frozen=True)
class Served:
    """Where it answers."""

    address: str  # HOST:PORT
    run_id: str

    def link(self, run_id: str = "") -> str:
        """Of its own run, or of another."""
        return f"covey://{self.address}/{run_id or self.run_id}/{CERTIFICATE.fingerprint}"


def experiment(dataset: str) -> Experiment:
    return experiment_of({
        "name": "fake", "model": {"trunk": {"depth": 18, "width_multiplier": 0.0625},
                                  "head": {"dims": [0, 8, 8], "num_clusters": [8]}},
        "data": {"dataset": dataset, "image_size": 32, "synthetic": {"num_train": 64, "num_val": 32},
                 "transforms": {"preset": "multicrop_2x224", "size_crops": [32]}},
        "optimizer": {"lr": 0.1, "max_epochs": 10}, "averaging": {"target_batch_size": 64, "target_group_size": 2}})


def reply_of(trained: Experiment) -> EnrolReply:
    document = canonical(trained)
    return EnrolReply(experiment=document, fingerprint=fingerprint(document), run_id=run_id(trained),
                      initial_peers=["/ip4/127.0.0.1/tcp/1/p2p/QmFake"])


class FakeCoordinator(CoordinatorServicer):
    def __init__(self, reply: EnrolReply) -> None:
        self.reply = reply

    def Enrol(self, request: EnrolRequest, context: grpc.ServicerContext) -> EnrolReply:
        if request.run_id != self.reply.run_id:
            context.abort(grpc.StatusCode.NOT_FOUND, f"experiment {request.run_id!r} is not run here; expected "
                          f"{self.reply.run_id}. The link is stale: ask the operator for a new one.")
        self.reply.name, self.reply.authority = request.name, public_bytes(AUTHORITY)
        self.reply.experiment_signature = sign(AUTHORITY, experiment_words(self.reply.run_id, self.reply.experiment))
        return self.reply

    def Watch(self, request: WatchRequest, context: grpc.ServicerContext) -> Iterator[SwarmSnapshot]:
        for epoch in range(3 if request.interval_seconds else 1):
            yield SwarmSnapshot(run_id=self.reply.run_id, epoch=epoch, peers=[PeerRow(name="ada", loss=2.5)])


@contextmanager
def serve(reply: EnrolReply) -> Iterator[Served]:
    """Over TLS, on any free port."""
    server = grpc.server(ThreadPoolExecutor(2))
    add_CoordinatorServicer_to_server(FakeCoordinator(reply), server)
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(CERTIFICATE.key, CERTIFICATE.chain)]))
    server.start()
    try:
        yield Served(f"127.0.0.1:{port}", reply.run_id)
    finally:
        server.stop(None).wait()


@asynccontextmanager
async def serve_here(reply: EnrolReply) -> AsyncIterator[Served]:
    """The same in this event loop, for a client in it: gRPC's two kinds do not get on with each other in a process."""
    server = grpc.aio.server(ThreadPoolExecutor(2))
    add_CoordinatorServicer_to_server(FakeCoordinator(reply), server)
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(CERTIFICATE.key, CERTIFICATE.chain)]))
    await server.start()
    try:
        yield Served(f"127.0.0.1:{port}", reply.run_id)
    finally:
        await server.stop(None)
