"""Multi-process runs, one process per node or per GPU, connected by jax.distributed."""

import dataclasses
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import jax

from mateconv_jax.errors import UserError

BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# What jax's detection reads besides the number of processes.
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among the run's.

    Attributes:
      count, index: processes of the run, and which of them this is.
      launcher: what started them, as jax calls it: slurm, ompi or prrte; deactivate: the environment was set by hand.
      on_machine, local_index: processes on this machine, and which of them this is.
      has_own_gpus: the scheduler shows each process only the GPUs that are its own.
    """

    count: int
    index: int
    launcher: str
    on_machine: int = 1
    local_index: int = 0
    has_own_gpus: bool = False


def initialize() -> None:
    """Connect to the other processes, if the environment describes any. Call it before any other use of JAX.

    Set JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID by hand (launch/multihost.sh);
    under srun and mpirun nothing needs to be set. A process that is alone on its machine takes all of its GPUs; several share
    them evenly.

    Raises:
      UserError: variables that contradict each other or are missing, or fewer GPUs than processes.
    """
    place = find_place(os.environ)
    if place is None:
        if (tasks := os.environ.get("SLURM_NTASKS", "1")) != "1":
            print(f"warning: SLURM_NTASKS is {tasks}, but srun did not start this process: it trains alone", file=sys.stderr)
        return
    jax.config.update("jax_enable_preemption_service", False)  # see training/preemption.py
    try:
        jax.distributed.initialize(
            coordinator_address=os.environ["JAX_COORDINATOR_ADDRESS"] if place.launcher == "deactivate" else None,
            num_processes=place.count,
            process_id=place.index,
            local_device_ids=gpu_indices(place),
            cluster_detection_method=place.launcher,
        )
    except (ValueError, RuntimeError) as error:  # ValueError: jax found no address
        raise UserError(
            f"cannot join the other processes ({' '.join(str(error).split())[:200]}; expected srun, mpirun of Open MPI 4, or "
            f"{', '.join(BY_HAND)} for each process)"
        ) from error


def find_place(environment: Mapping[str, str]) -> Place | None:
    """Where the environment says this process is; None: it is alone."""
    if environment.get("JAX_COORDINATOR_ADDRESS"):
        return _by_hand(environment)
    if _number(environment, "OMPI_COMM_WORLD_SIZE") > 1:  # before SLURM: mpirun inherits the variables of one SLURM task
        return _open_mpi(environment)
    return _slurm(environment)


def _by_hand(environment: Mapping[str, str]) -> Place:
    try:
        count, index = (int(environment[name]) for name in BY_HAND[1:])
    except (KeyError, ValueError) as error:
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS: {environment['JAX_COORDINATOR_ADDRESS']!r} requires JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID (expected two integers)"
        ) from error
    if not 0 <= index < count:
        raise UserError(f"JAX_PROCESS_ID: {index} of {count} processes (expected 0 to {count - 1})")
    return Place(count, index, "deactivate")


def _open_mpi(environment: Mapping[str, str]) -> Place:
    names = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
    count, index, on_machine, local_index = (_number(environment, name) for name in names)
    # Open MPI 5 says in other variables where process 0 is; only newer versions of jax read them.
    launcher = "ompi" if "OMPI_MCA_orte_hnp_uri" in environment else "prrte"
    return Place(count, index, launcher, max(on_machine, local_index + 1), local_index)


def _slurm(environment: Mapping[str, str]) -> Place | None:
    count = _number(environment, "SLURM_NTASKS")
    if count <= 1 or "SLURM_PROCID" not in environment:
        return None
    index = _number(environment, "SLURM_PROCID")
    missing = [name for name in SLURM if name not in environment]
    # The batch script and an interactive shell are tasks of their own: number 0, without a step or alone in it.
    if index == 0 and (missing or environment.get("SLURM_STEP_NUM_TASKS") == "1"):
        return None
    if missing:
        raise UserError(
            f"SLURM_PROCID: {index} of {count}, but {missing[0]} is missing (expected all variables that srun sets; a "
            "container may have to be told to keep them)"
        )
    # Such as "4(x2),3": tasks on each node. An older SLURM sets only the job's.
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", "1")
    on_nodes = [int(n) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks) for _ in range(int(times or 1))]
    local_index, node = _number(environment, "SLURM_LOCALID"), _number(environment, "SLURM_NODEID")
    on_machine = on_nodes[node] if node < len(on_nodes) else 1
    has_own_gpus = (
        "SLURM_GPUS_PER_TASK" in environment
        or environment.get("SLURM_GPU_BIND", "none") != "none"
        or "gpu" in environment.get("SLURM_TRES_PER_TASK", "")
    )
    return Place(count, index, "slurm", max(on_machine, local_index + 1), local_index, has_own_gpus)


def _number(environment: Mapping[str, str], name: str) -> int:
    """0: it is not set."""
    try:
        return int(environment.get(name, "0"))
    except ValueError as error:
        raise UserError(f"{name}: {environment[name]!r} (expected an integer)") from error


# ---- GPUs ---------------------------------------------------------------------------------------------------------


def gpu_indices(place: Place) -> list[int] | None:
    """This process's part of the GPUs that it can see; empty: all. (Under SLURM and Open MPI, jax's own default is one.)

    Raises:
      UserError: fewer GPUs than processes.
    """
    if place.launcher == "deactivate" or os.environ.get("JAX_LOCAL_DEVICE_IDS"):
        return None  # all, or as that variable says
    n_gpus = count_gpus()
    if place.on_machine == 1 or place.has_own_gpus or n_gpus == 0:
        return []
    share = n_gpus // place.on_machine
    if share == 0:
        raise UserError(f"{place.on_machine} processes on a machine with {n_gpus} GPUs (expected at most one process per GPU)")
    return list(range(place.local_index * share, (place.local_index + 1) * share))


def count_gpus() -> int:
    """NVIDIA GPUs that this process can see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return len(list(Path("/dev").glob("nvidia[0-9]*")))
    return len([gpu for gpu in visible.split(",") if gpu.strip()])


def idle_gpus() -> int:
    """GPUs of this machine that are at hand and that no process of the run uses."""
    if jax.default_backend() != "gpu":
        return 0
    place = find_place(os.environ)
    processes = 1 if place is None or place.has_own_gpus else place.on_machine
    return max(0, count_gpus() - processes * jax.local_device_count())


def is_first() -> bool:
    """Whether this process writes the run's log and metrics."""
    return jax.process_index() == 0
