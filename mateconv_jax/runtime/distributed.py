"""Several processes: one a node or one a GPU, joined by jax.distributed."""

import os

import jax

from mateconv_jax.errors import UserError


def initialize() -> None:
    """Join the other processes, where the environment says that there are some; must be called before any other use of jax.

    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID say so by hand (launch/multihost.sh);
    srun and mpirun say it themselves.

    Raises:
      UserError: the address alone is given.
    """
    environment = os.environ
    if address := environment.get("JAX_COORDINATOR_ADDRESS"):
        try:
            count, index = int(environment["JAX_NUM_PROCESSES"]), int(environment["JAX_PROCESS_ID"])
        except (KeyError, ValueError) as error:
            raise UserError(
                f"JAX_COORDINATOR_ADDRESS: {address!r} needs JAX_NUM_PROCESSES and JAX_PROCESS_ID, two numbers, beside it"
            ) from error
        jax.distributed.initialize(address, count, index)
    elif "SLURM_PROCID" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        jax.distributed.initialize()
    elif int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        jax.distributed.initialize()


def is_first() -> bool:
    """Whether this process writes the run's log and metrics."""
    return jax.process_index() == 0
