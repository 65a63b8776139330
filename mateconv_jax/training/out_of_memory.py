"""What to tell someone whose device is too small for the run."""

import re

import jax


def is_cause_of(error: Exception) -> bool:
    """Whether XLA raised `error` because a device, or its host, had no memory left."""
    return "RESOURCE_EXHAUSTED" in str(error)


def explain(error: Exception) -> str:
    """One line: how much was asked for, how much there is, which keys to lower."""
    asked = re.search(r"allocat\w* ([\d.,]+ ?(?:[KMGT]i?B|bytes))", str(error))
    stats = jax.local_devices()[0].memory_stats() or {}
    limit, used = stats.get("bytes_limit"), stats.get("peak_bytes_in_use")
    device = jax.local_devices()[0].device_kind
    facts = [f"{asked[1]} more were asked for"] if asked else []
    facts += [f"jax may use {limit / 1e9:.1f} GB of it"] if limit else []
    facts += [f"at most {used / 1e9:.1f} GB were in use"] if used else []
    return (
        f"training.batch_size: out of memory on {device}{': ' if facts else ''}{', '.join(facts)} (lower it and raise "
        "training.accumulation_steps, or set training.remat=full, or mesh.fsdp with several GPUs; "
        "`python -m mateconv_jax.plan --gpu=this` says what fits)"
    )
