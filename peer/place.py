"""Which of the processes of a run this one is, as torchrun or Slurm says. Imports no torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from training.errors import BadInput

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
FIRST_PORT, PORTS = 20000, 10000  # from which a Slurm job has its own, by its number


@dataclass(frozen=True)
class Place:
    """One process among those of a run."""

    rank: int         # 0 to world_size - 1
    world_size: int
    local_rank: int   # among those of this machine
    master_addr: str  # where rank 0 can be reached
    master_port: int


def find_place(environment: Mapping[str, str]) -> Place | None:
    """This process's place; None where it is the only one. Raises BadInput where half of it is said, or nonsense.

    torchrun's variables count before Slurm's, whose MASTER_ADDR and MASTER_PORT, where nobody set them, are the first
    of its nodes and a port made of the job's number.
    """
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & environment.keys():
        return _place(environment, TORCHRUN, "torchrun")
    if {"SLURM_PROCID", "SLURM_NTASKS"} <= environment.keys():
        return _place(_master_of_slurm(environment) | dict(environment), (*SLURM, *TORCHRUN[3:]), "srun")
    return None


def _place(environment: Mapping[str, str], names: tuple[str, ...], starter: str) -> Place | None:
    if environment.get(names[1]) == "1":
        return None
    if missing := [name for name in names if name not in environment]:
        given = ", ".join(name for name in names if name in environment)
        raise BadInput(f"{given} in the environment, and no {', '.join(missing)}", expected="all of them or none",
                       mend=f"Start it with {starter}, or clear them.")
    size, host = _number(environment, names[1]), environment[names[3]]
    return Place(_number(environment, names[0], size), size, _number(environment, names[2], size), host,
                 _number(environment, names[4], 1 << 16))


def _number(environment: Mapping[str, str], name: str, end: int = 1 << 20) -> int:
    value = environment[name]
    if not (value.isascii() and value.isdigit() and int(value) < end):
        raise BadInput(f"{name} = {value} in the environment", expected=f"a whole number below {end}",
                       mend="Start it with torchrun or srun, or clear it.")
    return int(value)


def _master_of_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    found = {"MASTER_ADDR": first_node(nodes)} if nodes else {}
    if "SLURM_JOB_ID" in environment:
        found["MASTER_PORT"] = str(FIRST_PORT + _number(environment, "SLURM_JOB_ID", 1 << 62) % PORTS)
    return found


def first_node(nodes: str) -> str:
    """The first host of Slurm's list of nodes: "gpu[012-015,020],cpu1" -> "gpu012"."""
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes, maxsplit=1)[0])
