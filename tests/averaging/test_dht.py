"""The DHT node's process takes whatever the threads of its parent say to it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hivemind.utils import get_dht_time

from averaging.dht import open_identity, start_dht

THREADS, VALUES, BYTES = 4, 12, 300_000  # a value is more than the pipe to the process holds


def test_many_threads_store_big_values_at_once(tmp_path: Path) -> None:
    open_identity(tmp_path / "node.key")
    dht = start_dht(identity_path=tmp_path / "node.key", host_maddrs=["/ip4/127.0.0.1/tcp/0"])

    def store(thread: int) -> list[bool]:
        stored = [dht.store(f"{thread}/{number}", bytes([thread]) * BYTES, expiration_time=get_dht_time() + 60,
                            return_future=True) for number in range(VALUES)]
        return [future.result(60) for future in stored]
    try:
        with ThreadPoolExecutor(THREADS) as threads:
            assert all(all(stored) for stored in threads.map(store, range(THREADS)))
        for thread in range(THREADS):
            found = dht.get(f"{thread}/{VALUES - 1}", return_future=True).result(60)
            assert found is not None
            assert found.value == bytes([thread]) * BYTES
    finally:
        dht.shutdown()
