"""A lower bound on a program's run time: every kernel runs at the peak that limits it (roofline, Williams et al., 2009)."""

import dataclasses

from mateconv_jax.planning.hlo_report import Collective, HloReport, Kernel
from mateconv_jax.planning.target import Gpu

# Minimum seconds from one launch to the next, about what is measured inside a CUDA graph.
LAUNCH = 2e-6


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a program's lower bound, by what limits it.

    Attributes:
      arithmetic: kernels limited by FLOP/s.
      memory: kernels limited by memory bandwidth.
      launches: kernels shorter than LAUNCH.
      network: communication that is not overlapped with kernels.
      network_hidden: communication that is; not part of the total.
    """

    arithmetic: float
    memory: float
    launches: float
    network: float
    network_hidden: float

    @property
    def seconds(self) -> float:
        return self.arithmetic + self.memory + self.launches + self.network

    @property
    def bound(self) -> str:
        """The largest of the four."""
        return max(("arithmetic", "memory", "launches", "network"), key=lambda name: getattr(self, name))


def roofline(report: HloReport, gpu: Gpu, devices: int, hosts: int) -> Roofline:
    """The lower bound of one run of a program on each of `devices` GPUs on `hosts` hosts."""
    bounds = {"arithmetic": 0.0, "memory": 0.0, "launches": 0.0}
    for kernel in report.kernels:
        bound, seconds = _kernel(kernel, gpu)
        bounds[bound] += kernel.times * seconds
    network = hidden = 0.0
    for collective in report.collectives:
        seconds = _communication(collective, gpu, devices, hosts)
        overlap = sum(_kernel(kernel, gpu)[1] for kernel in collective.overlapping) if collective.is_async else 0.0
        hidden += collective.times * min(seconds, overlap)
        network += collective.times * max(seconds - overlap, 0.0)
    return Roofline(**bounds, network=network, network_hidden=hidden)


def _kernel(kernel: Kernel, gpu: Gpu) -> tuple[str, float]:
    arithmetic = sum(flops / (gpu.single if "f32" in dtypes else gpu.half) for dtypes, flops in kernel.flops.items())
    memory = kernel.bytes / gpu.bandwidth
    return max((("arithmetic", arithmetic), ("memory", memory), ("launches", LAUNCH)), key=lambda item: item[1])


def _communication(collective: Collective, gpu: Gpu, devices: int, hosts: int) -> float:
    """Seconds of a ring algorithm. Between hosts, each GPU of a host sends its share over its own connection."""
    n = collective.devices
    if n < 2:
        return 0.0
    per_host = devices // hosts
    speed = gpu.link if n <= per_host else min(gpu.link, gpu.network * per_host)
    traffic = {"all-reduce": 2 * (n - 1) / n, "all-gather": n - 1}  # per operand byte; an all-gather's operand is one shard
    return collective.bytes * traffic.get(collective.opcode, (n - 1) / n) / speed
