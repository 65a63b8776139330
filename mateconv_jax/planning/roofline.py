"""The least time that a program can take: each kernel at the peak that it meets first (Williams et al., 2009)."""

import dataclasses

from mateconv_jax.planning.hlo_report import Collective, HloReport, Kernel
from mateconv_jax.planning.target import Gpu

# The least that a kernel takes from its launch to the next, seconds: about what is measured inside a CUDA graph.
LAUNCH = 2e-6


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds. What each bound adds to the whole: arithmetic, memory, launches (kernels that are shorter than LAUNCH),
    network (exchanges that no kernel hides). And network_hidden: exchanges beside kernels.
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
    """Of one run of a program on one of `devices` GPUs on `hosts` hosts."""
    bounds = {"arithmetic": 0.0, "memory": 0.0, "launches": 0.0}
    for kernel in report.kernels:
        bound, seconds = _kernel(kernel, gpu)
        bounds[bound] += kernel.times * seconds
    network = hidden = 0.0
    for collective in report.collectives:
        seconds = _exchange(collective, gpu, devices, hosts)
        beside = sum(_kernel(kernel, gpu)[1] for kernel in collective.beside) if collective.is_async else 0.0
        hidden += collective.times * min(seconds, beside)
        network += collective.times * max(seconds - beside, 0.0)
    return Roofline(**bounds, network=network, network_hidden=hidden)


def _kernel(kernel: Kernel, gpu: Gpu) -> tuple[str, float]:
    arithmetic = sum(flops / (gpu.single if "f32" in dtypes else gpu.half) for dtypes, flops in kernel.flops.items())
    memory = kernel.bytes / gpu.bandwidth
    return max((("arithmetic", arithmetic), ("memory", memory), ("launches", LAUNCH)), key=lambda item: item[1])


def _exchange(collective: Collective, gpu: Gpu, devices: int, hosts: int) -> float:
    """A ring's time. Between hosts all GPUs of a host share the work, each with its own connection."""
    n = collective.devices
    if n < 2:
        return 0.0
    per_host = devices // hosts
    speed = gpu.link if n <= per_host else min(gpu.link, gpu.network * per_host)
    of_operand = {"all-reduce": 2 * (n - 1) / n, "all-gather": n - 1}  # the operand of an all-gather is one device's part
    return collective.bytes * of_operand.get(collective.opcode, (n - 1) / n) / speed
