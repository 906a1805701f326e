"""The worker as a process: started at the head of a group of its own, ended with everything in that group."""

import asyncio
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Worker:
    """A running worker. Whoever started it calls `end()`, whatever happens."""

    process: asyncio.subprocess.Process
    events_fd: int  # read end of its event pipe; peer.events.read_events takes it over

    def ask_to_leave(self) -> None:
        """SIGTERM to the worker alone: its children are its own to end."""
        if self.process.returncode is None:
            self.process.terminate()

    async def end(self) -> int:
        """SIGKILL to all that is left of the group: worker, averagers, DHT, p2pd. The worker's exit code."""
        with suppress(ProcessLookupError):  # nobody left
            os.killpg(self.process.pid, signal.SIGKILL)
        return await self.process.wait()


async def start_worker(command: Sequence[str], log: Path, scratch: Path) -> Worker:
    """Run `command --events-fd N --parent-pid PID`, its output appended to `log`. Call from the main thread.

    `scratch` is the folder of its temporary files.

    The session of its own keeps the terminal's Ctrl-C from it, and makes one group of all that it starts.
    Should this process die, the worker does by `die_with_parent`, and its children do likewise.
    """
    read_end, write_end = os.pipe()
    try:
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *command, "--events-fd", str(write_end), "--parent-pid", str(os.getpid()),
                stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output,
                env=_environment(scratch, log.parent), pass_fds=[write_end], start_new_session=True)
    except BaseException:
        os.close(read_end)
        raise
    finally:
        os.close(write_end)
    return Worker(process, read_end)


def _environment(scratch: Path, state_dir: Path) -> dict[str, str]:
    """Temporary files go to `scratch`; what torch.compile makes stays, for the next worker."""
    return {"TORCHINDUCTOR_CACHE_DIR": str(state_dir / "compiled"), **os.environ, "TMPDIR": str(scratch)}
