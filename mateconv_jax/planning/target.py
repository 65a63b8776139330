"""Data sheets of GPUs, and compiling for GPUs that this machine does not have."""

import contextlib
import dataclasses
import os
from collections.abc import Generator
from importlib.util import find_spec

import jax
from jax.experimental import topologies

from mateconv_jax.errors import UserError
from mateconv_jax.model.device import Device


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU, from the vendor's data sheet and tuning guide. Peaks are dense; link speeds are per direction.

    Attributes:
      device_kind: JAX's name.
      compute_capability: (major, minor); also determines what cuDNN supports.
      cores: streaming multiprocessors.
      lanes: fp32 units per core.
      clock: GHz.
      memory, l2: bytes.
      bandwidth: of the memory, bytes/s.
      shared, shared_most: bytes of shared memory per core, and the most a block can use.
      half, single: FLOP/s of bfloat16 and float32 (TF32) matmuls.
      link: bytes/s to GPUs of the same host.
      network: bytes/s per GPU to other hosts, in the vendor's own servers.
    """

    device_kind: str
    compute_capability: tuple[int, int]
    cores: int
    lanes: int
    clock: float
    memory: int
    l2: int
    bandwidth: float
    shared: int
    shared_most: int
    half: float
    single: float
    link: float
    network: float

    @property
    def device(self) -> Device:
        return Device("gpu", self.compute_capability)


GiB, MiB, KiB = 2**30, 2**20, 2**10
_AMPERE = dict(
    compute_capability=(8, 0), cores=108, lanes=64, clock=1.41, l2=40 * MiB, shared=164 * KiB, shared_most=163 * KiB,
    half=312e12, single=156e12, link=300e9, network=25e9,
)  # fmt: skip
_HOPPER = dict(
    compute_capability=(9, 0), cores=132, lanes=128, clock=1.98, l2=50 * MiB, shared=228 * KiB, shared_most=227 * KiB,
    half=989e12, single=495e12, link=450e9, network=50e9,
)  # fmt: skip
_ADA = dict(compute_capability=(8, 9), lanes=128, shared=100 * KiB, shared_most=99 * KiB, link=32e9, network=3e9)
GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", memory=80 * GiB, bandwidth=2.039e12, **_AMPERE),
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", memory=40 * GiB, bandwidth=1.555e12, **_AMPERE),
    "h100": Gpu("NVIDIA H100 80GB HBM3", memory=80 * GiB, bandwidth=3.352e12, **_HOPPER),
    "h200": Gpu("NVIDIA H200", memory=140 * GiB, bandwidth=4.8e12, **_HOPPER),
    "b200": Gpu(
        "NVIDIA B200", memory=178 * GiB, bandwidth=7.7e12, compute_capability=(10, 0), cores=148, lanes=128, clock=1.965,
        l2=126 * MiB, shared=228 * KiB, shared_most=227 * KiB, half=2250e12, single=1125e12, link=900e9, network=50e9,
    ),
    "l4": Gpu(
        "NVIDIA L4", memory=22 * GiB, bandwidth=300e9, cores=58, clock=2.04, l2=48 * MiB, half=121e12, single=60e12, **_ADA,
    ),
    "4090": Gpu(
        "NVIDIA GeForce RTX 4090", memory=24 * GiB, bandwidth=1.008e12, cores=128, clock=2.52, l2=72 * MiB, half=165e12,
        single=82.6e12, **_ADA,
    ),
}  # fmt: skip

CUDA, CUDNN = "major: 12 minor: 8 patch: 0", (9, 10)  # assumed for the target


def by_name(name: str) -> Gpu:
    """Raises UserError for a name that is not in GPUS."""
    if name not in GPUS:
        raise UserError(f"--gpu: {name!r} is unknown (expected one of {', '.join(GPUS)}, or this)")
    return GPUS[name]


def by_device_kind(device_kind: str) -> Gpu | None:
    """The GPU with this JAX device kind, such as "NVIDIA H100 80GB HBM3"; None if it is not in GPUS."""
    return next((gpu for gpu in GPUS.values() if gpu.device_kind == device_kind), None)


def usable_memory(gpu: Gpu) -> int:
    """Bytes that JAX preallocates; a program that needs more runs out of memory."""
    return int(float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")) * gpu.memory)


def can_compile() -> bool:
    """Whether XLA's CUDA compiler is installed."""
    return any(find_spec(f"jax_plugins.xla_cuda{cuda}") for cuda in (13, 12) if find_spec("jax_plugins"))


def check_count(count: int, hosts: int) -> None:
    """Raises UserError where count is not a multiple of hosts."""
    if count < 1 or hosts < 1 or count % hosts:
        raise UserError(f"--devices: {count} GPUs cannot be spread over {hosts} hosts (expected a multiple of --hosts)")


def devices(gpu: Gpu, count: int, hosts: int = 1) -> list[jax.Device]:
    """Descriptions of `count` GPUs on `hosts` machines, to compile for but not to run on.

    Raises:
      UserError: XLA's CUDA compiler is not installed, or count is not a multiple of hosts.
    """
    check_count(count, hosts)
    if not can_compile():
        raise UserError(f"--gpu: XLA's CUDA compiler is not installed (pip install jax-cuda13-pjrt=={jax.__version__})")
    topology = topologies.get_topology_desc(
        "planned", platform="cuda", target_config=_target_config(gpu), topology=f"1x{hosts}x{count // hosts}"
    )
    return topology.devices


def _target_config(gpu: Gpu) -> str:
    """XLA's GpuTargetConfigProto in text format."""
    major, minor = gpu.compute_capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: {48 * KiB} shared_memory_per_core: {gpu.shared} shared_memory_per_block_optin: {gpu.shared_most}
  threads_per_core_limit: {1536 if gpu.compute_capability == (8, 9) else 2048}
  core_count: {gpu.cores} fpus_per_core: {gpu.lanes} clock_rate_ghz: {gpu.clock}
  block_dim_limit_x: {2**31 - 1} block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {gpu.bandwidth:.0f} l2_cache_size: {gpu.l2} device_memory_size: {gpu.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
runtime_version {{ {CUDA} }}
dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} }}
device_description_str: "{gpu.device_kind}"
"""


@contextlib.contextmanager
def compiling_for(gpu: Gpu) -> Generator[None]:
    """A context in which programs for `gpu` can be traced and compiled (jax 0.10 to 0.12).

    jax.nn.dot_product_attention(implementation="cudnn") queries the local device's compute capability and cuDNN version; here
    the answers are those of `gpu`. The compilation cache is off, because it cannot read these programs back.
    """
    from jax._src.cudnn import fused_attention_stablehlo as fused

    def as_tuple(capability: str):
        return tuple(map(int, capability.split(".")))

    answers = {
        "check_cudnn_version": lambda: CUDNN[0] * 10_000 + CUDNN[1] * 100,
        "check_compute_capability": lambda capability: gpu.compute_capability >= as_tuple(capability),
        "is_cuda_compute_capability_equal": lambda capability: gpu.compute_capability == as_tuple(capability),
    }
    originals = {name: getattr(fused, name) for name in answers}
    min_compile_time = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    for name, answer in answers.items():
        setattr(fused, name, answer)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    try:
        yield
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", min_compile_time)
        for name, original in originals.items():
            setattr(fused, name, original)
