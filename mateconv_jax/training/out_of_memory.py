"""The error for a run that does not fit its device."""

import re

import jax


def is_cause_of(error: Exception) -> bool:
    """Whether XLA raised `error` because a device or its host ran out of memory."""
    return "RESOURCE_EXHAUSTED" in str(error)


def explain(error: Exception) -> str:
    """One line: how much was requested, how much there is, which keys to change."""
    asked = re.search(r"allocat\w* ([\d.,]+ ?(?:[KMGT]i?B|bytes))", str(error))
    stats = jax.local_devices()[0].memory_stats() or {}
    limit, used = stats.get("bytes_limit"), stats.get("peak_bytes_in_use")
    device = jax.local_devices()[0].device_kind
    facts = [f"{asked[1]} more requested"] if asked else []
    facts += [f"{limit / 1e9:.1f} GB available to jax"] if limit else []
    facts += [f"{used / 1e9:.1f} GB peak usage"] if used else []
    return (
        f"training.batch_size: out of memory on {device}{': ' if facts else ''}{', '.join(facts)} (lower it and raise "
        "training.accumulation_steps, or set training.remat=full, or with several GPUs mesh.fsdp; "
        "`python -m mateconv_jax.plan --gpu=this` shows what fits)"
    )
