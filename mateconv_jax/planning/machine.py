"""The devices that a recipe is for, as functions of a configuration."""

from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from mateconv_jax.planning import step_cost, target
from mateconv_jax.planning.plan import Cluster
from mateconv_jax.planning.recipe import Machine

CPU_FLOPS = 5e10  # of two cores, a first guess: the step is timed anyway
WORTH_COMPILING = 1.5  # times the memory: estimates are nearer than that (docs/recipes.md)


def machine_of(name: str, count: int, hosts: int, log: Callable[[str], None] = lambda text: None) -> Machine:
    """`count` GPUs of a name in target.GPUS, or "this": the devices of this machine.

    Raises:
      UserError: an unknown name, or GPUs that cannot be spread over the hosts.
    """
    if name == "this":
        cluster = Cluster.local()
        count, gpu = len(cluster.devices), cluster.gpu
        guess = CPU_FLOPS if jax.default_backend() == "cpu" else _guess(gpu or target.GPUS["4090"]) * count
        return Machine(cluster.name, count, lambda config: step_cost.compiled(config, cluster, log), guess)
    gpu = target.by_name(name)
    target.check_count(count, hosts)
    if not target.can_compile():
        return Machine(gpu.device_kind, count, lambda config: step_cost.estimated(config, gpu, count), _guess(gpu) * count)
    cluster = Cluster.named(name, count, hosts)

    def may_fit(config: ConfigDict) -> bool:
        estimate = step_cost.estimated(config, gpu, count)
        return estimate.memory < WORTH_COMPILING * estimate.available

    return Machine(
        gpu.device_kind, count, lambda config: step_cost.compiled(config, cluster, log), _guess(gpu) * count, may_fit
    )


def _guess(gpu: target.Gpu) -> float:
    """FLOP/s of a model of 100 M parameters."""
    return gpu.half * step_cost.measured_mfu(100e6)
