"""A coordinator for tests that has no DHT: it hands out whatever reply it is given."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc

from averaging.experiment import Experiment, canonical, experiment_of, fingerprint, run_id
from proto.coordinator_pb2 import EnrolReply, EnrolRequest, WatchRequest
from proto.coordinator_pb2_grpc import CoordinatorServicer, add_CoordinatorServicer_to_server
from proto.swarm_pb2 import PeerRow, SwarmSnapshot


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
        return self.reply

    def Watch(self, request: WatchRequest, context: grpc.ServicerContext) -> Iterator[SwarmSnapshot]:
        for epoch in range(3 if request.interval_seconds else 1):
            yield SwarmSnapshot(run_id=self.reply.run_id, epoch=epoch, peers=[PeerRow(name="ada", loss=2.5)])


@contextmanager
def serve(reply: EnrolReply) -> Iterator[str]:
    """Its HOST:PORT."""
    server = grpc.server(ThreadPoolExecutor(2))
    add_CoordinatorServicer_to_server(FakeCoordinator(reply), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
