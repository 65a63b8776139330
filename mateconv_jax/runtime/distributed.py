"""Multi-process runs, one process per node or per GPU, connected by jax.distributed."""

import os

import jax

from mateconv_jax.errors import UserError


def initialize() -> None:
    """Connect to the other processes, if the environment describes any. Call it before any other use of JAX.

    Set JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID by hand (launch/multihost.sh);
    under srun and mpirun nothing needs to be set.

    Raises:
      UserError: the address is set without the other two.
    """
    environment = os.environ
    if address := environment.get("JAX_COORDINATOR_ADDRESS"):
        try:
            count, index = int(environment["JAX_NUM_PROCESSES"]), int(environment["JAX_PROCESS_ID"])
        except (KeyError, ValueError) as error:
            raise UserError(
                f"JAX_COORDINATOR_ADDRESS: {address!r} requires JAX_NUM_PROCESSES and JAX_PROCESS_ID (expected two integers)"
            ) from error
        jax.distributed.initialize(address, count, index)
    elif "SLURM_PROCID" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        jax.distributed.initialize()
    elif int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        jax.distributed.initialize()


def is_first() -> bool:
    """Whether this process writes the run's log and metrics."""
    return jax.process_index() == 0
