"""Child processes that don't outlive their parent."""

import ctypes
import os
import signal
import sys
import threading
import time

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent_pid: int | None = None) -> None:
    """Have this process killed as soon as its parent is gone, however the parent ended.

    `parent_pid` is the process that must be the parent; None: whatever it is now. Call it first thing in the
    child's main thread, of a child that was made in the parent's main thread: Linux watches the thread that
    forked, not the process. Survives exec. Elsewhere than on Linux a thread looks once a second.
    """
    parent_pid = parent_pid or os.getppid()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    else:
        threading.Thread(target=_watch, args=(parent_pid,), daemon=True).start()
    if os.getppid() != parent_pid:  # it died before we asked
        os.kill(os.getpid(), signal.SIGKILL)


def _watch(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
