"""The device properties that backends are chosen by."""

import dataclasses
import re

import jax


@dataclasses.dataclass(frozen=True)
class Device:
    """A device, as far as choosing a backend depends on it.

    Attributes:
      platform: JAX's name: cpu, gpu or tpu.
      compute_capability: (major, minor) of an NVIDIA GPU; None for other devices.
    """

    platform: str
    compute_capability: tuple[int, int] | None = None

    @staticmethod
    def here() -> "Device":
        """This process's first device."""
        device = jax.devices()[0]
        capability = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
        return Device(device.platform, capability and (int(capability[1]), int(capability[2])))
