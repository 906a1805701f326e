"""The processes that torchrun or Slurm has started for one run, brought together; or the only one there is."""

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # public, but not in its __all__
from torch.distributed.rendezvous import rendezvous

from averaging.process import die_with_parent
from peer.place import Place
from peer.vigil import Vigil, keep_vigil
from training.errors import BadInput

START_SECONDS = 120.0    # within which all processes have to be there
COLLECTIVE_SECONDS = 1800.0  # that a collective may wait for a process that lives; the vigil tells of those that don't
NOTICE_SECONDS = 2.0     # within which the vigil says why a collective has failed


class Crew:
    """The processes of a run. What is not of `rank` 0 only, all must call, in the same order."""

    def __init__(self, rank: int = 0, machines: Sequence[str] = ("",), *, store: Store | None = None,
                 vigil: Vigil | None = None) -> None:
        """`machines`: the name of each process's."""
        self.rank, self.size = rank, len(machines)
        self.here = [other for other, machine in enumerate(machines) if machine == machines[rank]]
        self._store, self._vigil, self._turn = store, vigil, 0
        # small things between CPUs, which neither wait for GPUs nor mix with a model's collectives
        self._side: Any = distributed.new_group(backend="gloo") if store else None
        self._asked: tuple[Any, Tensor] | None = None

    @property
    def group(self) -> distributed.ProcessGroup | None:
        """Of all processes; None where there is but one."""
        return distributed.group.WORLD if self.size > 1 else None

    def any_before(self, flag: bool) -> bool:
        """Whether any process had its `flag` set at the call before this one: the answer takes as long to travel.

        A process on its own is answered at once.
        """
        if self.size == 1:
            return flag
        before = self._asked
        asked = torch.tensor(flag, dtype=torch.int32)
        self._asked = distributed.all_reduce(asked, distributed.ReduceOp.MAX, group=self._side, async_op=True), asked
        if before is None:
            return False
        before[0].wait()
        return bool(before[1])

    def least(self, number: int) -> int:
        """The smallest of the processes' numbers."""
        return self._reduced(number, distributed.ReduceOp.MIN)

    def all(self, flag: bool) -> bool:
        """Whether it is set in all processes."""
        return bool(self.least(int(flag)))

    def _reduced(self, number: int, operation: Any) -> int:
        if self.size == 1:
            return number
        reduced = torch.tensor(int(number))  # of a truth value too
        distributed.all_reduce(reduced, operation, group=self._side)
        return int(reduced)

    def from_first(self, number: int) -> int:
        """That of rank 0."""
        return self._reduced(number if self.rank == 0 else 0, distributed.ReduceOp.SUM)

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Makes `tensors` what they are at rank 0."""
        if self.size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, 0)

    def text_from_first(self, text: str) -> str:
        """That of rank 0."""
        if self._store is None:
            return text
        store, key = self._store, f"text/{self._turn}"
        self.at_first(lambda: store.set(key, text))
        return str(store.get(key).decode())

    def at_first(self, work: Callable[[], None], *, of_machine: bool = False) -> None:
        """Rank 0, or the first process of each machine, works, however long that takes; the others wait for it."""
        self._turn += 1
        first = self.here[0] if of_machine else 0
        if self.rank == first:
            work()
        if self._store is None or self._vigil is None:
            return
        turn = f"turn/{self._turn}/{first}"
        if self.rank == first:
            self._store.set(turn, "done")
        while not self._store.check([turn]):
            self._vigil.require_all(within_seconds=0.1)

    def finish(self) -> None:
        """All have done their work."""
        if self._side is not None:
            if self._asked:
                self._asked[0].wait()
            distributed.barrier(self._side)


@contextmanager
def assemble(place: Place | None, device: torch.device) -> Iterator[Crew]:
    """The processes of a run, until its end; `place` None: this one alone.

    Raises BadInput where they don't come together, and LostProcess once one has ended before its time.
    """
    if place is None:
        yield Crew()
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    store = _meet(place, device)
    store.set(f"machine/{place.rank}", socket.gethostname())
    machines = [store.get(f"machine/{rank}").decode() for rank in range(place.world_size)]
    os.environ["LOCAL_WORLD_SIZE"] = str(machines.count(machines[place.rank]))  # torchrun's word, Slurm has none
    with keep_vigil(place.rank, place.world_size, place.master_addr, publish=lambda where: store.set("vigil", where),
                    read=lambda: store.get("vigil").decode(), this_machine_only=len(set(machines)) == 1) as vigil:
        try:
            crew = Crew(place.rank, machines, store=store, vigil=vigil)
            yield crew
            crew.finish()
        except RuntimeError:  # a collective, perhaps, whose partner is gone
            vigil.require_all(NOTICE_SECONDS)
            raise
    distributed.destroy_process_group()


def _meet(place: Place, device: torch.device) -> Store:
    """Initialises torch.distributed; a store that all processes share."""
    os.environ |= {"RANK": str(place.rank), "WORLD_SIZE": str(place.world_size), "MASTER_ADDR": place.master_addr,
                   "MASTER_PORT": str(place.master_port)}
    start = timedelta(seconds=START_SECONDS)
    try:
        store, *_ = next(rendezvous("env://", place.rank, place.world_size, timeout=start))
        store.set(f"here/{place.rank}", "")
        store.wait([f"here/{rank}" for rank in range(place.world_size)], start)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=PrefixStore("world", store),
            rank=place.rank, world_size=place.world_size, timeout=timedelta(seconds=COLLECTIVE_SECONDS))
    except (distributed.DistNetworkError, distributed.DistStoreError) as error:
        raise BadInput(f"process {place.rank} of {place.world_size} alone at {place.master_addr}:{place.master_port} "
                       f"({str(error).splitlines()[0]})", expected=f"all processes there within {START_SECONDS:g} s",
                       mend="Start them together, with torchrun or srun.") from None
    return PrefixStore("crew", store)


def local_device(wanted: str, place: Place | None) -> str:
    """What of `wanted` (auto, cpu, mps, cuda, cuda:N) this process takes: each of a machine's its own GPU."""
    if place is None or wanted in {"cpu", "mps"} or not torch.cuda.is_available():
        return wanted
    if ":" in wanted:
        raise BadInput(f"--device {wanted} for {place.world_size} processes", expected="auto, cuda or cpu, of which "
                       "each takes its own", mend="Choose GPUs with CUDA_VISIBLE_DEVICES.")
    if (count := torch.cuda.device_count()) == 1:  # Slurm has given each its own, or there is no more than one process
        return "cuda:0"
    if place.local_rank >= count:
        raise BadInput(f"process {place.local_rank} of this machine, which has {count} GPUs", expected="one for each",
                       mend="Start no more processes than GPUs, or take --device cpu.")
    return f"cuda:{place.local_rank}"
