"""Deterministic gradients for cuDNN attention."""

import contextlib
import functools
import threading
from collections.abc import Generator

_thread = threading.local()  # several threads may lower programs at once: only this one's change


@contextlib.contextmanager
def deterministic_attention() -> Generator[None]:
    """Programs that this thread lowers here use cuDNN's deterministic backward pass. Compile them with xla_flags.DETERMINISTIC.

    XLA should set this flag itself, but sets it only on the first of several equal layers and then fails in the first step with
    "IndexError: raw_hash_map::at" (jax 0.11.2; openxla/xla#46500). Remove this when the oldest supported jax has the fix.
    """
    _replace_config_function()
    _thread.is_deterministic = True
    try:
        yield
    finally:
        _thread.is_deterministic = False


@functools.cache
def _replace_config_function() -> None:
    """Once in a process: a call of jax's own function that adds the flag where this thread asks for it."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    original = fused.create_dot_product_attention_backend_config_base

    def with_flag(*args, **kwargs):
        config = original(*args, **kwargs)
        attention = config["cudnn_fmha_backend_config"]
        if getattr(_thread, "is_deterministic", False) and "bmm1_grad_gemm1_dot_dimension_numbers" in attention:  # backward
            attention["force_deterministic"] = True
        return config

    fused.create_dot_product_attention_backend_config_base = with_flag
