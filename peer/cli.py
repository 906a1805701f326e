"""The command line. Commands import what they need when they run, so that `covey --help` answers at once."""

# ruff: noqa: PLC0415, PLR0917

import os
import sys
import warnings
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from peer.config import PeerConfig
from peer.options import options_of
from peer.run_config import RunConfig
from training.data.manifest import Packing
from training.errors import BadInput

Result = TypeVar("Result")

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
shards = typer.Typer(no_args_is_help=True, help="Images as WebDataset tar shards.")
app.add_typer(shards, name="shards")
invite = typer.Typer(no_args_is_help=True, help="Who may enrol: the operator's invites.")
app.add_typer(invite, name="invite")
identity = typer.Typer(no_args_is_help=True, help="This volunteer's key and name, kept safe elsewhere.")
app.add_typer(identity, name="identity")


def main() -> None:
    """The `covey` command. What the user got wrong is one line on stderr and exit code 2."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries, for their developers
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # children exec at once, or fork before gRPC starts
    try:
        app(prog_name="covey")
    except BadInput as error:
        _fail(str(error), 2)
    except OSError as error:  # a full disk, a folder without permission: ours to word better, once met
        _fail(str(error), 1)


def _fail(message: str, exit_code: int) -> None:
    print(f"covey: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(exit_code)


def _run(work: Coroutine[Any, Any, Result]) -> Result:
    import asyncio

    import uvloop
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def _show_version(wanted: bool) -> None:
    if wanted:
        from averaging.version import VERSION
        print(VERSION)
        raise typer.Exit


RecipeName = Annotated[str, typer.Argument(help="A recipe that `covey recipes` lists, or a .toml file.")]
Overrides = Annotated[list[str] | None, typer.Argument(
    metavar="[KEY=VALUE]...", help="Laid over the recipe, as in loss.temperature=0.2.")]
JoinLink = Annotated[str, typer.Argument(metavar="LINK", help="What `covey coordinator` printed.")]
CheckpointPath = Annotated[Path, typer.Argument(help="A checkpoint, or a folder, for its newest one.")]
Json = Annotated[bool, typer.Option("--json", help="For programs: one JSON object per line.")]
DataFolder = Annotated[Path | None, typer.Option("--data", help="Folder of images, where the experiment asks for one.")]
StateDir = Annotated[Path | None, typer.Option("--state-dir", help="The peer's; default: that of the only one here.")]


CoordinatorLink = Annotated[str | None, typer.Option(
    "--link", help="Of a coordinator far away; its admin token is read from COVEY_ADMIN_TOKEN.")]
CoordinatorDir = Annotated[Path | None, typer.Option(
    "--state-dir", help="The coordinator's; default: that of the only one here.")]


@app.callback()
def covey(version: Annotated[bool, typer.Option(
        "--version", callback=_show_version, is_eager=True, help="Print the version.")] = False) -> None:
    """Train one vision model together over the internet."""


@app.command()
def demo(overrides: Overrides = None,
         epochs: Annotated[int | None, typer.Option(
             min=1, help="collaborative epochs; default: as many as the recipe is made for")] = None,
         state_dir: Annotated[Path | None, typer.Option(
             help="folder for logs and checkpoints; default: a new temporary one")] = None) -> None:
    """A coordinator and two volunteers on this machine, on a data set made on the spot."""
    from tempfile import mkdtemp

    from peer.demo import run_demo
    state_dir = state_dir or Path(mkdtemp(prefix="covey-demo-"))
    raise typer.Exit(_run(run_demo(overrides or [], epochs=epochs, state_dir=state_dir)))


@app.command()
def coordinator(
        recipe: Annotated[str | None, typer.Argument(
            help="A recipe that `covey recipes` lists, or a .toml file; none with --join.")] = None,
        overrides: Overrides = None,
        standing_by: Annotated[str | None, typer.Option(
            "--join", metavar="LINK", help="Stand by another coordinator of yours, whose link this is and whose admin "
            "token COVEY_ADMIN_TOKEN holds: all goes on when either dies.")] = None,
        state_dir: Annotated[Path | None, typer.Option(help="folder of its identity and lock: with the same one "
                                                       "it comes back as the same node")] = None,
        listen: Annotated[str, typer.Option(help="host name or IP address to listen at")] = "0.0.0.0",  # noqa: S104
        announce_host: Annotated[str | None, typer.Option(
            help="what volunteers call this machine, where that is not an address of its own")] = None,
        port: Annotated[int, typer.Option(help="TCP port of libp2p; 0 for any free one")] = 31337,
        grpc_port: Annotated[int, typer.Option(help="TCP port of gRPC, which is in the link")] = 31338,
        http_port: Annotated[int, typer.Option(help="TCP port of the status page and /metrics")] = 31339,
        is_open: Annotated[bool, typer.Option("--open", help="Let anyone enrol, without an invite.")] = False,
        token_hours: Annotated[float | None, typer.Option(
            min=0.001, help="that a volunteer stays a member while the coordinator is away; default: 720")] = None,
        tls_cert: Annotated[Path | None, typer.Option(
            help="your own certificate for gRPC, PEM; default: one is made")] = None,
        tls_key: Annotated[Path | None, typer.Option(help="its key, PEM")] = None,
        archive_every_epochs: Annotated[int, typer.Option(
            min=0, help="epochs between checkpoints of the swarm's state, in STATE_DIR/checkpoints; 0: none")] = 10,
        keep_last_checkpoints: Annotated[int, typer.Option(
            min=2, help="older checkpoints than this many are deleted")] = 3,
        data: Annotated[Path | None, typer.Option(
            help="folder of images to evaluate each checkpoint on: k-NN, or top-1 and top-5 of a classifier")] = None,
        evaluate: Annotated[bool, typer.Option(
            "--evaluate", help="Evaluate also where the experiment makes its own images.")] = False,
        upload_to_hub: Annotated[str, typer.Option(
            metavar="REPO", help="Upload each checkpoint to this Hugging Face repository; with the token in HF_TOKEN "
            "or of `hf auth login`. Made if need be, private.")] = "",
        as_json: Json = False) -> None:
    """Start the first node of an experiment, or one more; prints the join link and the status page's address."""
    from platformdirs import user_state_path

    if (recipe is None) == (standing_by is None):
        raise BadInput("neither a recipe nor --join" if recipe is None else "a recipe and --join", expected="one of "
                       "them: a run of your own, or another coordinator's", mend="`covey recipes` lists recipes.")
    from averaging.experiment import load_experiment, run_id
    from coordinator.archive import ArchiveOptions
    from coordinator.coordinator import run_coordinator
    from coordinator.link import parse_link
    from coordinator.standby import stand_by
    if not archive_every_epochs and (data or evaluate or upload_to_hub):
        raise BadInput("--data, --evaluate or --upload-to-hub without an archive", expected="--archive-every-epochs "
                       "above 0", mend="Give a number of epochs, or leave these out.")
    folder, handover = user_state_path("covey") / "coordinator", None
    if standing_by is not None:
        link = parse_link(standing_by)
        experiment, handover = stand_by(link, state_dir or folder / link.run_id)
    else:
        experiment = load_experiment(recipe or "", overrides or [])
    run_coordinator(experiment, state_dir=state_dir or folder / run_id(experiment), handover=handover,
                    host=listen, announce_host=announce_host, p2p_port=port, grpc_port=grpc_port,
                    http_port=http_port, is_open=is_open, token_hours=token_hours, tls_files=(tls_cert, tls_key),
                    json_output=as_json, archive=ArchiveOptions(
                        archive_every_epochs, keep_last_checkpoints, evaluate or data is not None, data,
                        upload_to_hub) if archive_every_epochs else None)


@app.command()
@options_of(PeerConfig, inferred=("name", "state_dir"))
def join(link: JoinLink, as_json: Json = False, **given: Any) -> None:
    """Volunteer this machine. Runs until Ctrl-C, which leaves in good order; twice leaves at once."""
    from coordinator.link import parse_link
    from peer.daemon import volunteer
    from peer.progress import progress
    where = parse_link(link)
    with progress(as_json) as observer:
        ending = _run(volunteer(where, given, observer))
    if ending.message:
        _fail(ending.message, ending.exit_code)
    raise typer.Exit(ending.exit_code)


@app.command()
def status(link: Annotated[str | None, typer.Argument(
               metavar="[LINK]", help="Of a coordinator, to see its swarm; without it, this machine's peers.")] = None,
           watch: Annotated[bool, typer.Option("--watch", help="Keep showing, until Ctrl-C.")] = False,
           as_json: Json = False) -> None:
    """This machine's peers, or a coordinator's swarm."""
    from coordinator.link import parse_link
    from peer.watch import show
    raise typer.Exit(_run(show(parse_link(link) if link else None, watch=watch, as_json=as_json)))


@app.command()
def leave(state_dir: StateDir = None) -> None:
    """Have this machine's peer leave in good order."""
    from peer.local import leave as leave_peer
    last = _run(leave_peer(state_dir))
    print(f"{last.name} left {last.run_id} at epoch {last.finished.epoch or last.step.epoch}")


@app.command()
@options_of(RunConfig, stop_at_epoch="--epochs")
def train(recipe: RecipeName, overrides: Overrides = None, as_json: Json = False, **given: Any) -> None:
    """Train without a swarm, on this machine, or under torchrun or srun in several processes, each with its own GPU.

    Ctrl-C leaves a checkpoint, from which the same command goes on.
    """
    from averaging.experiment import load_experiment
    from training.config import validate
    experiment = load_experiment(recipe, overrides or [])
    config = validate(RunConfig, given)
    from peer.train import train_alone
    from training.loop import NonFiniteLoss
    try:
        train_alone(experiment, config, as_json=as_json)
    except NonFiniteLoss as error:
        _fail(str(error), 1)


@app.command()
def evaluate(checkpoint: CheckpointPath, data: DataFolder = None,
             linear_probe: Annotated[bool, typer.Option(
                 "--linear-probe", help="Fit a linear classifier to the backbone's features too.")] = False,
             as_json: Json = False) -> None:
    """k-NN accuracy of a checkpoint's backbone; of a classifier, top-1 and top-5."""
    import json

    from peer.evaluate import evaluate as evaluate_checkpoint
    from peer.evaluate import lines
    figures = evaluate_checkpoint(checkpoint, data, linear_probe=linear_probe)
    print(json.dumps(figures) if as_json else lines(figures))


@app.command()
def export(checkpoint: CheckpointPath,
           file: Annotated[Path, typer.Argument(help="To write: .safetensors, or .pth by torch.save.")],
           as_json: Json = False) -> None:
    """Write a checkpoint's backbone, and the classifier it was trained with, in torchvision's layout."""
    import json

    from peer.export import export as export_checkpoint
    from peer.export import lines
    exported = export_checkpoint(checkpoint, file)
    print(json.dumps(exported) if as_json else lines(exported))


@app.command()
def plot(run_dir: Annotated[Path, typer.Argument(
             help="--run-dir of `covey train`, or --state-dir of `covey join`: any folder with a metrics.csv.")],
         out: Annotated[Path | None, typer.Option(help="folder for the PNGs; default: the same")] = None) -> None:
    """Loss, accuracy and throughput of a run, as PNGs."""
    from peer.plot import plot as plot_run
    print(*plot_run(run_dir, out), sep="\n")


@invite.command("create")
def create_invite(
        label: Annotated[str, typer.Argument(help="Whom it is for; shown to you only.")],
        uses: Annotated[int | None, typer.Option(min=1, help="volunteers that may enrol with it; default: any")] = None,
        expires: Annotated[str | None, typer.Option(help="from now, as in 90m, 12h, 7d; default: never")] = None,
        link: CoordinatorLink = None, state_dir: CoordinatorDir = None, as_json: Json = False) -> None:
    """Print a join link for others."""
    import json
    import time

    from peer.operate import Operator, rows, seconds
    until = time.time() + seconds(expires) if expires else None
    created = _run(Operator(link, state_dir).create_invite(label, uses, until))
    print(json.dumps(rows([created])[0]) if as_json else f"covey join {created.link}")


@invite.command("list")
def list_invites(link: CoordinatorLink = None, state_dir: CoordinatorDir = None, as_json: Json = False) -> None:
    """All invites, the oldest first."""
    import json

    from rich.console import Console

    from peer.operate import Operator, invites_table, rows
    found = _run(Operator(link, state_dir).list_invites())
    if as_json:
        print(*map(json.dumps, rows(found)), sep="\n")
    else:
        Console().print(invites_table(found))


@invite.command("revoke")
def revoke_invite(code: Annotated[str, typer.Argument(metavar="CODE|LABEL")], link: CoordinatorLink = None,
                  state_dir: CoordinatorDir = None) -> None:
    """Nobody enrols with it any more; who has stays (see `covey ban`)."""
    from peer.operate import Operator
    revoked = _run(Operator(link, state_dir).revoke_invite(code))
    print(f"{revoked.label} is revoked; {revoked.used} enrolled with it")


@app.command()
def members(link: CoordinatorLink = None, state_dir: CoordinatorDir = None, as_json: Json = False) -> None:
    """All volunteers who have enrolled with a coordinator of yours."""
    import json

    from rich.console import Console

    from peer.operate import Operator, members_table, rows
    found = _run(Operator(link, state_dir).list_members())
    if as_json:
        print(*map(json.dumps, rows(found)), sep="\n")
    else:
        Console().print(members_table(found))


@app.command()
def ban(peer: Annotated[str, typer.Argument(help="Name or peer id of a member.")],
        reason: Annotated[str, typer.Option(help="told to the one who is banned")] = "",
        lift: Annotated[bool, typer.Option("--lift", help="Let it in again.")] = False,
        link: CoordinatorLink = None, state_dir: CoordinatorDir = None) -> None:
    """Put a volunteer out of the swarm: at the coordinator at once, at all peers within 30 seconds."""
    from peer.operate import Operator
    member = _run(Operator(link, state_dir).ban(peer, reason, lift=lift))
    print(f"{member.name} ({member.peer_id}) is {'banned' if member.banned else 'a member again'}")


@identity.command("export")
def export_identity(file: Annotated[Path, typer.Argument(help="To write; it holds the private key.")],
                    state_dir: StateDir = None) -> None:
    """Copy this volunteer's key into a file, so that a lost disk is not a lost account."""
    from peer.keep_identity import export_to
    print(f"{file}: the identity of {export_to(file, state_dir)}; whoever has the file can take its place")


@identity.command("import")
def import_identity(file: Annotated[Path, typer.Argument(help="What `covey identity export` wrote.")],
                    state_dir: Annotated[Path | None, typer.Option(
                        help="the peer's; default: the one that `covey join` takes first")] = None) -> None:
    """Bring the key back, before `covey join` on a new machine."""
    from peer.keep_identity import import_from
    peer_id, folder = import_from(file, state_dir)
    print(f"{peer_id} is kept in {folder}: `covey join` goes on as that volunteer")


@shards.command("make")
@options_of(Packing)
def make_shards(
        source: Annotated[Path, typer.Argument(help="Folder of JPEG and PNG images, as for --data.")],
        destination: Annotated[Path, typer.Argument(help="Folder for the shards; what was cut short goes on there.")],
        threads: Annotated[int, typer.Option(min=1, help="threads that read and shrink")] = 4,
        as_json: Json = False, **given: Any) -> None:
    """Pack a folder of images into tar shards, each a mix of the classes, for data.dataset=shards."""
    import json
    from dataclasses import asdict

    from peer.shards import line, make
    made = make(source.expanduser(), destination.expanduser(), given, threads=threads, quiet=as_json)
    print(json.dumps(asdict(made)) if as_json else line(made, destination))


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="Show this recipe's options.")] = None,
            overrides: Overrides = None) -> None:
    """What can be trained; one recipe resolved and checked, every option with its meaning."""
    from rich.console import Console

    from peer.recipes import options_list, recipes_table
    Console().print(options_list(name, overrides or []) if name else recipes_table())


if __name__ == "__main__":
    main()
