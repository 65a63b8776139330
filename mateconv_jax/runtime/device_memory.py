"""What a device's allocator says of its memory, in bytes. Not every one says anything: the CPU's does not, and which figures a
GPU's gives depends on XLA_PYTHON_CLIENT_ALLOCATOR.
"""

import os

import jax


def limit(device: jax.Device) -> int | None:
    """What JAX may use; None: not known."""
    return _figure(device, "bytes_limit")


def in_use(device: jax.Device) -> int | None:
    """What arrays and running programs take at the moment; None: not known."""
    return _figure(device, "bytes_in_use")


def peak(device: jax.Device) -> int | None:
    """The most that was ever in use; None: not known."""
    return _figure(device, "peak_bytes_in_use")


def available() -> int:
    """What JAX may use on this process's first device; where that is not known, the machine's memory."""
    return limit(jax.local_devices()[0]) or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def of_program(compiled: jax.stages.Compiled) -> int | None:
    """Beside its arguments, what a compiled program takes while it runs; None: the backend does not say."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def _figure(device: jax.Device, name: str) -> int | None:
    return (device.memory_stats() or {}).get(name)
