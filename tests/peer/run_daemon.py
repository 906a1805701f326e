"""A daemon over the fake worker, as `covey join --json` runs it: `run_daemon.py STATE_DIR BEHAVIOUR`."""

import asyncio
import sys
from pathlib import Path

import uvloop

from averaging.backoff import Backoff
from coordinator.state_dir import open_state_dir
from peer.config import PeerConfig
from peer.daemon import run_job
from peer.job import Job
from peer.progress import progress

FAKE_WORKER = str(Path(__file__).with_name("fake_worker.py"))


def main() -> None:
    state_dir, behaviour = Path(sys.argv[1]), sys.argv[2]
    job = Job(run_id="test-0123456789ab", fingerprint="", authority="", initial_peers=[], experiment=b"{}",
              config=PeerConfig(name="tester", state_dir=state_dir))
    with open_state_dir(state_dir, role="peer", run_id=job.run_id), progress(as_json=True) as observer:
        ending = asyncio.Runner(loop_factory=uvloop.new_event_loop).run(run_job(
            job, [observer], [sys.executable, FAKE_WORKER, behaviour], backoff=Backoff(first_seconds=0.05)))
    if ending.message:
        print(ending.message, file=sys.stderr)
    sys.exit(ending.exit_code)


if __name__ == "__main__":
    main()
