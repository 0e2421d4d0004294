"""The processes that a launcher started together, by its environment variables.

Understood are the variables of torchrun and of other launchers that set RANK and WORLD_SIZE (the operators of
Kubernetes), and those of a job step of Slurm. Anything else that shows several processes is an error: each of them
would do the complete work.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from opdctl.errors import OpdctlError

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "JSM_NAMESPACE_SIZE")
"""The number of processes, as launchers of MPI report it."""
SLURM_PORTS = range(20_000, 30_000)  # below the ports that Linux gives to clients
HINT = "start with `torchrun … -m opdctl` or `srun opdctl`, or unset these variables for a single process"


@dataclass(frozen=True)
class Launch:
    """This process among those that were started together. local_rank: among those of this machine.

    master_addr, master_port: where the processes meet. shares_gpus: the processes of a machine see the same GPUs, so
    each has to select its own.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    master_addr: str = ""
    master_port: int = 0
    shares_gpus: bool = False


def read_launch(environment: Mapping[str, str]) -> Launch:
    """Return the launch that the environment describes.

    Raises:
        OpdctlError: there are several processes, and the variables do not lead them to each other.
    """
    if environment.get("RANK") or environment.get("WORLD_SIZE"):
        return _read_variables(environment)
    # Of a job step alone. In a batch script SLURM_NTASKS is that of the job, and there is one process.
    if _number(environment, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return _read_job_step(environment)
    for name in MPI_SIZES:
        if _number(environment, name, 1) > 1:
            raise _incomplete(f"{name}={environment[name]}: a launcher of MPI started several processes")
    _check_torchrun_ran(environment, ("PET_NNODES", "PET_NPROC_PER_NODE"))
    return Launch()


def _read_variables(environment: Mapping[str, str]) -> Launch:
    world_size = _number(environment, "WORLD_SIZE", 1)
    if world_size == 1 and _number(environment, "RANK", 0) == 0:
        return Launch()
    missing = [name for name in VARIABLES if not environment.get(name)]
    if missing:
        given = ", ".join(f"{name}={environment[name]}" for name in VARIABLES if environment.get(name))
        raise _incomplete(f"{given}, without {' and '.join(missing)}")
    if "LOCAL_RANK" not in environment:
        _check_torchrun_ran(environment, ("PET_NPROC_PER_NODE",))  # RANK is that of a pod
    rank = _number(environment, "RANK", 0)
    if not 0 <= rank < world_size:
        raise _incomplete(f"RANK={rank}, WORLD_SIZE={world_size}")
    return Launch(
        rank,
        world_size,
        _number(environment, "LOCAL_RANK", _number(environment, "SLURM_LOCALID", 0)),
        environment["MASTER_ADDR"],
        _number(environment, "MASTER_PORT", 0),
        shares_gpus=_number(environment, "LOCAL_WORLD_SIZE", 1) > 1,
    )


def _read_job_step(environment: Mapping[str, str]) -> Launch:
    """Return the task of a job step. The tasks meet on the first node, at a port that follows from job and step."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    address = environment.get("MASTER_ADDR") or _first_host(nodes)
    names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID")
    missing = [name for name in names if not environment.get(name)] + ([] if address else ["SLURM_STEP_NODELIST"])
    if missing:
        given = f"SLURM_STEP_NUM_TASKS={environment['SLURM_STEP_NUM_TASKS']}"
        raise _incomplete(f"{given}, without {' and '.join(missing)}")
    job, step = (_number(environment, name, 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    port = SLURM_PORTS[(job + 101 * step) % len(SLURM_PORTS)]
    return Launch(
        _number(environment, "SLURM_PROCID", 0),
        _number(environment, "SLURM_STEP_NUM_TASKS", 1),
        _number(environment, "SLURM_LOCALID", 0),
        address,
        _number(environment, "MASTER_PORT", port),
    )


def _check_torchrun_ran(environment: Mapping[str, str], names: tuple[str, ...]) -> None:
    """Check that there is one process by PET_*, with which an operator gives torchrun its arguments."""
    for name in names:
        value = environment.get(name, "")
        if value not in ("", "1", "1:1", "auto", "cpu", "gpu"):
            raise _incomplete(f"{name}={value}: an argument of torchrun, which did not start this process")


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name) or str(default)
    if not value.isdecimal():
        raise _incomplete(f"{name}={value} is not a number")
    return int(value)


def _first_host(nodes: str) -> str:
    """Return the first name of Slurm's short form of a list, such as `gpu[007-010,021],cpu1`."""
    first = re.match(r"([^,\[]*)(?:\[(\d+)[^\]]*\])?([^,\[]*)", nodes)
    return "".join(first.groups("")) if first else ""


def _incomplete(detail: str) -> OpdctlError:
    return OpdctlError("incomplete_launch", detail, hint=HINT)
