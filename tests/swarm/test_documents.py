"""Every command of the documents is run here as it stands, but for ports, addresses and the home folder."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from processes import until

ROOT = Path(__file__).parents[2]
BLOCKS = [block for document in ("README.md", "docs/averaging.md", "docs/security.md", "docs/operating.md")
          for block in re.findall(r"```sh\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)]
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
STAYS = {"coordinator": "join by", "join": "epoch ", "status --watch": "demo-"}  # what it shows before it is ended


def test_the_first_two_commands_are_targets_of_the_makefile() -> None:
    head = (ROOT / "README.md").read_text().split("\n\n")[1]
    assert re.findall(r"^    make (\w+)", head, re.MULTILINE) == ["demo", "test"]
    for target in ("demo", "test"):
        assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=True).stdout


class Terminal:
    """A command that stays, its output in a file."""

    def __init__(self, arguments: list[str], home: Path, number: int, token: str = "") -> None:
        self.output = home / f"{number}.out"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "peer.cli", *arguments], stdout=output, stderr=output,
                env={**surroundings(home), "COVEY_ADMIN_TOKEN": token}, cwd=ROOT, start_new_session=True)

    def shows(self, text: str) -> None:
        def shown() -> bool:
            assert self.process.poll() is None, self.output.read_text()
            return text in self.output.read_text()
        until(shown, f"{text!r} of {self.process.args}", 120)

    def interrupt(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(15)


def surroundings(home: Path) -> dict[str, str]:
    return {**os.environ, "HOME": str(home), "XDG_RUNTIME_DIR": str(home / "run"),
            "XDG_STATE_HOME": str(home / "state"), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    home.chmod(0o700)
    (home / "Pictures").mkdir()
    for number in range(80):
        Image.new("RGB", (48, 40), (3 * number, 100, 255 - 3 * number)).save(home / "Pictures" / f"{number}.jpg")
    return home


def words(command: str, home: Path, link: str) -> list[str]:
    """The command's arguments, at home in `home`, by `link`, on loopback and any free ports."""
    covey, *arguments = shlex.split(command)
    assert covey in {"covey", "torchrun"}
    arguments = [link if word == "LINK" else word.replace("~", str(home)) for word in arguments]
    if arguments[0] in {"coordinator", "join"}:
        arguments += ["--listen", "127.0.0.1", "--port", "0", "--http-port", "0"]
    if arguments[0] == "coordinator":
        arguments += ["--grpc-port", "0"]
    if arguments[0] == "join":
        arguments += ["--threads", "1"]
    return arguments


@pytest.mark.timeout(600)
def test_the_documents_commands_do_what_they_say(home: Path) -> None:
    assert len(COMMANDS) > 8
    link, token, terminals = "", "", list[Terminal]()
    try:
        for number, command in enumerate(COMMANDS):
            arguments = words(command, home, link)
            # the next swarm: the one before is done with
            if arguments[0] == "coordinator" and "--join" not in arguments:
                assert {terminal.interrupt() for terminal in reversed(terminals)} <= {0}
                terminals.clear()
            if arguments[0] in {"coordinator", "join"} or "--watch" in arguments:
                terminals.append(Terminal(arguments, home, number, token))
                key = "status --watch" if "--watch" in arguments else arguments[0]
                terminals[-1].shows(STAYS[key])
                if key == "coordinator":
                    (link,) = re.findall(r"covey join (covey://\S+)", terminals[-1].output.read_text())
                    token = Path(arguments[arguments.index("--state-dir") + 1], "admin.token").read_text()
                if key == "status --watch":
                    assert terminals.pop().interrupt() in {0, 130}
            else:
                if arguments[0] == "evaluate":
                    until(lambda: list(Path(arguments[1]).glob("*.json")), "a checkpoint", 120)  # noqa: B023
                module = "torch.distributed.run" if command.startswith("torchrun") else "peer.cli"
                done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True,
                                      env=surroundings(home), cwd=ROOT, timeout=180, check=False)
                assert done.returncode == 0, (command, done)
                assert done.stdout.strip(), command
    finally:
        codes = {terminal.interrupt() for terminal in reversed(terminals)}
    assert codes == {0}
