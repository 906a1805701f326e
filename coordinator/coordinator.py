"""A coordinator's process: node of the DHT to start from, notary of one experiment, and window on its swarm.

It keeps nothing that training needs: peers go on without it, and a restart on the same state directory and
ports is the same node with the same link.
"""

import logging
from pathlib import Path

import uvloop

from averaging.experiment import Experiment, run_id
from coordinator.archive import ArchiveOptions
from coordinator.ports import check_hosts, free_port, reachable_host
from coordinator.standby import keep_experiment, take_over
from coordinator.state_dir import open_state_dir
from coordinator.tls import own_certificate, read_certificate
from proto.replica_pb2 import HandoverReply
from training.data.checks import check_dataset
from training.errors import BadInput


def run_coordinator(experiment: Experiment, *, state_dir: Path, host: str = "0.0.0.0",  # noqa: S104
                    announce_host: str | None = None, p2p_port: int = 31337, grpc_port: int = 31338,
                    http_port: int = 31339, is_open: bool = False, token_hours: float | None = None,
                    tls_files: tuple[Path | None, Path | None] = (None, None), json_output: bool = False,
                    handover: HandoverReply | None = None, archive: ArchiveOptions | None = None) -> None:
    """Run the coordinator of `experiment` until SIGTERM or SIGINT; a second one ends it at once.

    Call it from the main thread, before anything starts threads or gRPC. It listens at `host`, tells volunteers
    to call `announce_host` (None: an address of this machine), and takes any free port for 0. `is_open`: anyone may
    enrol. `tls_files`: the operator's certificate and its key. `handover`: what another coordinator of the run gave,
    for a state directory that is none's yet. `archive`: None for none. Prints where it can be reached, as text or as
    one line of JSON. Raises BadInput before anything is started; exits with status 1 if its DHT node dies, so that a
    supervisor starts it again.
    """
    check_hosts(host, announce_host)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    certificate_file, key_file = tls_files
    if (certificate_file is None) != (key_file is None):
        raise BadInput("one of --tls-cert and --tls-key", expected="both, or neither", mend="Give the other too.")
    run = run_id(experiment)
    if archive:
        check_archive(archive, experiment)
    with open_state_dir(state_dir, role="coordinator", run_id=run) as folder:
        if handover:
            take_over(handover, folder, run)
        keep_experiment(folder, experiment)
        certificate = (read_certificate(certificate_file, key_file) if certificate_file and key_file
                       else own_certificate(folder))
        for port, purpose in ((grpc_port, "gRPC"), (http_port, "HTTP")):
            free_port(host, port, purpose)
        p2p_port = free_port(host, p2p_port, "libp2p")
        from coordinator.authority import TOKEN_SECONDS, Authority  # noqa: PLC0415 - these take seconds,
        from coordinator.node import running_node  # noqa: PLC0415                     and bad input should not
        from coordinator.serve import serve  # noqa: PLC0415
        token_seconds = 3600 * token_hours if token_hours else TOKEN_SECONDS
        authority = Authority(folder, run, is_open=is_open, token_seconds=token_seconds)
        try:
            with running_node(run, authority, folder, host=host, announce_host=announce_host, port=p2p_port) as node:
                if archive:
                    check_images(archive, experiment)
                uvloop.run(serve(
                    experiment, authority, certificate, node, folder, host=host, grpc_port=grpc_port,
                    link_host=announce_host or reachable_host(host), http_port=http_port, json_output=json_output,
                    archive_options=archive))
        finally:
            authority.close()


def check_archive(options: ArchiveOptions, experiment: Experiment) -> None:
    """Raises BadInput where checkpoints could not be evaluated or uploaded."""
    if options.hub:
        from coordinator.hub import check_hub  # noqa: PLC0415
        check_hub(options.hub)
    if options.evaluate:
        check_dataset(experiment.data, options.data)


def check_images(options: ArchiveOptions, experiment: Experiment) -> None:
    """Raises BadInput where the images could not serve to evaluate. Once the DHT is forked: torch starts threads."""
    if options.evaluate:
        from coordinator.evaluation import images  # noqa: PLC0415 - imports torch
        images(experiment.data, options.data)
        images.cache_clear()
