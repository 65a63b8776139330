"""A lower bound on a program's run time: every kernel runs at the peak that limits it (roofline, Williams et al., 2009)."""

import dataclasses

from mateconv_jax.planning.hlo_report import GROUPS, Collective, HloReport, Kernel
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
      groups: of the kernels of each of hlo_report.GROUPS, by arithmetic or memory alone, without LAUNCH.
      kernels: launched per run of the program.
    """

    arithmetic: float
    memory: float
    launches: float
    network: float
    network_hidden: float
    groups: dict[str, float]
    kernels: float

    @property
    def seconds(self) -> float:
        return self.arithmetic + self.memory + self.launches + self.network

    @property
    def bound(self) -> str:
        """The largest of the four."""
        return max(("arithmetic", "memory", "launches", "network"), key=lambda name: getattr(self, name))


def roofline(report: HloReport, gpu: Gpu, devices: int, hosts: int) -> Roofline:
    """The lower bound of one run of a program on each of `devices` GPUs on `hosts` hosts."""
    bounds, groups = {"arithmetic": 0.0, "memory": 0.0, "launches": 0.0}, dict.fromkeys(GROUPS, 0.0)
    for kernel in report.kernels:
        bound, seconds = _kernel(kernel, gpu)
        bounds[bound] += kernel.times * seconds
        groups[kernel.group] += kernel.times * max(_work(kernel, gpu))
    launched = sum(kernel.times for kernel in report.kernels)
    network = hidden = 0.0
    for collective in report.collectives:
        seconds = _communication(collective, gpu, devices, hosts)
        overlap = sum(_kernel(kernel, gpu)[1] for kernel in collective.overlapping) if collective.is_async else 0.0
        hidden += collective.times * min(seconds, overlap)
        network += collective.times * max(seconds - overlap, 0.0)
    return Roofline(**bounds, network=network, network_hidden=hidden, groups=groups, kernels=launched)


def _kernel(kernel: Kernel, gpu: Gpu) -> tuple[str, float]:
    arithmetic, memory = _work(kernel, gpu)
    return max((("arithmetic", arithmetic), ("memory", memory), ("launches", LAUNCH)), key=lambda item: item[1])


def _work(kernel: Kernel, gpu: Gpu) -> tuple[float, float]:
    """Seconds of its arithmetic and of its memory traffic, each at the GPU's peak."""
    arithmetic = sum(flops / (gpu.single if "f32" in dtypes else gpu.half) for dtypes, flops in kernel.flops.items())
    return arithmetic, kernel.bytes / gpu.bandwidth


def _communication(collective: Collective, gpu: Gpu, devices: int, hosts: int) -> float:
    """Seconds of a ring algorithm. Between hosts, each GPU of a host sends its share over its own connection."""
    n = collective.devices
    if n < 2:
        return 0.0
    per_host = devices // hosts
    speed = gpu.link if n <= per_host else min(gpu.link, gpu.network * per_host)
    traffic = {"all-reduce": 2 * (n - 1) / n, "all-gather": n - 1}  # per operand byte; an all-gather's operand is one shard
    return collective.bytes * traffic.get(collective.opcode, (n - 1) / n) / speed
