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
from training.errors import BadInput

Result = TypeVar("Result")

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


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


def _peer_option(field: str, *flags: str) -> Any:
    info = PeerConfig.model_fields[field]
    shown = "" if info.is_required() or info.default in {None, False} else f"; default {info.default}"
    return typer.Option(*flags, help=f"{info.description}{shown}", show_default=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        from averaging.version import VERSION
        print(VERSION)
        raise typer.Exit


RecipeName = Annotated[str, typer.Argument(help="A recipe that `covey recipes` lists, or a .toml file.")]
Overrides = Annotated[list[str] | None, typer.Argument(
    metavar="[KEY=VALUE]...", help="Laid over the recipe, as in loss.temperature=0.2.")]
JoinLink = Annotated[str, typer.Argument(metavar="LINK", help="What `covey coordinator` printed.")]
Json = Annotated[bool, typer.Option("--json", help="For programs: one JSON object per line.")]
DataFolder = Annotated[Path | None, _peer_option("data", "--data")]
StateDir = Annotated[Path | None, _peer_option("state_dir", "--state-dir")]


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
        recipe: RecipeName, overrides: Overrides = None,
        state_dir: Annotated[Path | None, typer.Option(help="folder of its identity and lock: with the same one "
                                                       "it comes back as the same node")] = None,
        listen: Annotated[str, typer.Option(help="host name or IP address to listen at")] = "0.0.0.0",  # noqa: S104
        announce_host: Annotated[str | None, typer.Option(
            help="what volunteers call this machine, where that is not an address of its own")] = None,
        port: Annotated[int, typer.Option(help="TCP port of libp2p; 0 for any free one")] = 31337,
        grpc_port: Annotated[int, typer.Option(help="TCP port of gRPC, which is in the link")] = 31338,
        http_port: Annotated[int, typer.Option(help="TCP port of the status page and /metrics")] = 31339,
        as_json: Json = False) -> None:
    """Start the first node of an experiment; prints the join link and the status page's address."""
    from platformdirs import user_state_path

    from averaging.experiment import load_experiment, run_id
    experiment = load_experiment(recipe, overrides or [])
    from coordinator.coordinator import run_coordinator
    run_coordinator(experiment, state_dir=state_dir or user_state_path("covey") / "coordinator" / run_id(experiment),
                    host=listen, announce_host=announce_host, p2p_port=port, grpc_port=grpc_port,
                    http_port=http_port, json_output=as_json)


@app.command()
def join(link: JoinLink, data: DataFolder = None, state_dir: StateDir = None,
         name: Annotated[str | None, _peer_option("name", "--name")] = None,
         batch_size: Annotated[int | None, _peer_option("batch_size", "--batch-size")] = None,
         device: Annotated[str | None, _peer_option("device", "--device")] = None,
         threads: Annotated[int | None, _peer_option("threads", "--threads")] = None,
         listen: Annotated[str | None, _peer_option("listen", "--listen")] = None,
         port: Annotated[int | None, _peer_option("port", "--port")] = None,
         http_port: Annotated[int | None, _peer_option("http_port", "--http-port")] = None,
         client_mode: Annotated[bool | None, _peer_option("client_mode", "--client-mode")] = None,
         stop_at_epoch: Annotated[int | None, _peer_option("stop_at_epoch", "--stop-at-epoch")] = None,
         checkpoint_every_epochs: Annotated[
             int | None, _peer_option("checkpoint_every_epochs", "--checkpoint-every-epochs")] = None,
         keep_last_checkpoints: Annotated[
             int | None, _peer_option("keep_last_checkpoints", "--keep-last-checkpoints")] = None,
         as_json: Json = False) -> None:
    """Volunteer this machine. Runs until Ctrl-C, which leaves in good order; twice leaves at once."""
    from coordinator.link import parse_link
    from peer.daemon import volunteer
    from peer.progress import progress
    given = {"data": data and data.expanduser().absolute(), "state_dir": state_dir, "name": name,
             "batch_size": batch_size, "device": device, "threads": threads, "listen": listen, "port": port,
             "http_port": http_port, "client_mode": client_mode, "stop_at_epoch": stop_at_epoch,
             "checkpoint_every_epochs": checkpoint_every_epochs, "keep_last_checkpoints": keep_last_checkpoints}
    options = {field: value for field, value in given.items() if value is not None}
    where = parse_link(link)
    with progress(as_json) as observer:
        ending = _run(volunteer(where, options, observer))
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
def evaluate(checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a folder, for its newest one.")],
             data: DataFolder = None, as_json: Json = False) -> None:
    """k-NN accuracy of a checkpoint's backbone."""
    import json

    from peer.evaluate import evaluate as evaluate_checkpoint
    figures = evaluate_checkpoint(checkpoint, data)
    if as_json:
        print(json.dumps(figures))
    else:
        print(f"{figures['checkpoint']}\nepoch {figures['epoch']}, {figures['train_images']} images to compare with: "
              f"k-NN accuracy {figures['knn_accuracy']:.1%} on {figures['val_images']} images")


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="Show this recipe's options.")] = None,
            overrides: Overrides = None) -> None:
    """What can be trained; one recipe resolved and checked, every option with its meaning."""
    from rich.console import Console

    from peer.recipes import options_list, recipes_table
    Console().print(options_list(name, overrides or []) if name else recipes_table())


if __name__ == "__main__":
    main()
