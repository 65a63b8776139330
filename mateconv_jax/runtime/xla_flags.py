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


# On GPUs the embedding's gradient is a scatter of atomic additions, and cuDNN's attention sums its gradients in any order. This
# makes XLA sort the scatter's rows first and ask cuDNN for its deterministic kernels: 423 launches for 408, 7.5 % more bytes.
DETERMINISTIC = {"gpu": {"xla_gpu_exclude_nondeterministic_ops": True}}


def compiler_options(platform: str, deterministic: bool = False) -> dict[str, int | bool]:
    """Options for jax.jit on "gpu" or "cpu". Flags that the user sets in XLA_FLAGS are left alone.

    deterministic: only kernels that give the same bits in every run.
    """
    theirs = os.environ.get("XLA_FLAGS", "")
    options = OPTIONS.get(platform, {}) | (DETERMINISTIC.get(platform, {}) if deterministic else {})
    return {flag: value for flag, value in options.items() if flag not in theirs}
