"""What a computation has to know of the device it is for."""

import dataclasses
import re

import jax


@dataclasses.dataclass(frozen=True)
class Device:
    """Attributes:
    platform: jax's name: cpu, gpu, tpu.
    compute_capability: of an NVIDIA GPU, (major, minor); None: another device.
    """

    platform: str
    compute_capability: tuple[int, int] | None = None

    @staticmethod
    def here() -> "Device":
        """The first of this process's devices."""
        device = jax.devices()[0]
        capability = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
        return Device(device.platform, capability and (int(capability[1]), int(capability[2])))
