"""Options of XLA's compilers: those alone that make the training step or decoding better.

Tried without a change of the step (jax 0.10.2, base model, 8 H100): the latency-hiding scheduler on and off (it is always
used), pipelined collectives, collectives as early as possible, command buffers of any size (they are made later). For the
worse: the analytical latency estimator (a fifth less of the exchanges hidden), Triton for fusions without a product (963
launches and not 752). What autotuning found is kept with the compilation cache: jax tells XLA to.
"""

import os

OPTIONS = {
    "gpu": {
        # FSDP's gradients in parts of 32 MB on 8 devices, sent while the backward pass goes on, and not 107 MB at its end: 0.05
        # ms of a step wait for the network, not 0.21.
        "xla_gpu_reduce_scatter_combine_threshold_bytes": 4_000_000,
    },
    "cpu": {
        # Whole AVX-512 vectors where there are some: decoding is 9 % faster at batch 1 and 3 % at 16, training the same.
        "xla_cpu_prefer_vector_width": 512,
    },
}


def compiler_options(platform: str) -> dict[str, int]:
    """For jax.jit, on "gpu" or "cpu". What XLA_FLAGS sets stays as the user wants it."""
    theirs = os.environ.get("XLA_FLAGS", "")
    return {flag: value for flag, value in OPTIONS.get(platform, {}).items() if flag not in theirs}
