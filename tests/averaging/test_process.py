"""What must not outlive its parent, doesn't."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
from processes import is_running, until

PARENT = textwrap.dedent("""
    import os, subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-c", '''
    import os, sys, time
    from averaging.process import die_with_parent
    die_with_parent(int(sys.argv[1]))
    print("ready", flush=True)
    time.sleep(600)
    '''.replace("\\n    ", "\\n"), str(os.getpid())], stdout=subprocess.PIPE, text=True)
    child.stdout.readline()
    print(child.pid, flush=True)
    time.sleep(600)
""")


def test_a_child_is_gone_after_its_parents_sigkill() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert is_running(child)
    parent.kill()
    parent.wait()
    until(lambda: not is_running(child), "the child is gone", 5)


def test_a_child_whose_parent_is_gone_before_it_asks_ends_at_once() -> None:
    stranger = os.getppid() if os.getppid() > 1 else 2
    child = subprocess.run([sys.executable, "-c", "from averaging.process import die_with_parent as d; "
                            f"d({stranger})"], check=False, timeout=30)
    assert child.returncode == -9


@pytest.mark.parametrize("victim", ["parent", "dht"])
def test_p2pd_is_gone_after_its_parents_sigkill(victim: str, tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from averaging.dht import open_identity, start_dht
        if __name__ == "__main__":
            path = Path(sys.argv[1])
            open_identity(path)
            dht = start_dht(identity_path=path, host_maddrs=["/ip4/127.0.0.1/tcp/0"])
            print(dht.pid, flush=True)
            time.sleep(600)
    """)
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "identity.key")],
                              stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        dht = int(parent.stdout.readline())
        (p2pd,) = psutil.Process(dht).children()
        assert p2pd.name() == "p2pd"
        psutil.Process(parent.pid if victim == "parent" else dht).kill()
        until(lambda: not is_running(dht), "the DHT is gone", 5)
        until(lambda: not is_running(p2pd.pid), "p2pd is gone", 5)
    finally:
        parent.kill()
        parent.wait()
