"""The base model's numerics on a GPU against float32:  python -m benchmarks.gpu.correct --out DIR --data DATASET

Compares logits and gradients in bfloat16, with the attention that `auto` chooses, with float32 and plain einsums at the highest
precision on the same device. The baseline is bfloat16 with plain einsums: fused attention may have at most 1.5 times its error.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.gpu import sizes
from benchmarks.gpu.report import Report
from benchmarks.gpu.sizes import Case
from mateconv_jax import config as config_lib
from mateconv_jax.losses.next_token import token_losses
from mateconv_jax.model.config import ModelConfig, ModelOptions
from mateconv_jax.model.moe import MixtureOfExperts
from mateconv_jax.model.transformer import abstract_model, init_params

LAYERS = dict(n_layers=2)  # for all cases except the base model, so that 36 programs compile in time
CASES = (
    (Case("base, S 512", {}, 4, 512), False),
    (Case("base, S 512, document mask", {}, 4, 512), True),
    (Case("S 4,096", LAYERS, 1, 4096), False),
    (Case("S 4,096, document mask", LAYERS, 1, 4096), True),
    (Case("no grouped queries", LAYERS | dict(n_kv_heads=16), 4, 512), False),
    (Case("8 queries per key", LAYERS | dict(n_kv_heads=2), 4, 512), False),
    (Case("head_dim 64", LAYERS | dict(n_heads=8, n_kv_heads=4), 4, 512), False),
    (Case("head_dim 128", LAYERS | dict(n_heads=4, n_kv_heads=2), 4, 512), False),
    (Case("head_dim 128, document mask", LAYERS | dict(n_heads=4, n_kv_heads=2), 4, 512), True),
    (Case("QK norm", LAYERS | dict(qk_norm=True), 4, 512), False),
    (Case("mixture of experts", LAYERS | dict(use_moe=True), 4, 512), False),
    (Case("mixture of experts, document mask", LAYERS | dict(use_moe=True), 4, 512), True),
)
STEPS, LOSS_ROWS = 50, 2  # of the run whose losses are compared: 20 s on 16 CPU cores
TOLERANCE = 2e-3  # relative error of each loss of those steps in float32


def main(args) -> None:
    report = Report(args.out, "correct")
    with tempfile.TemporaryDirectory() as folder:
        on_cpu = start_losses(args, Path(folder) / "cpu.json", "float32", "cpu")
        gate(report, args.dry_run)
        with ThreadPoolExecutor(8) as pool:  # XLA compiles without holding the GIL
            cases = CASES[:2] + CASES[-1:] if args.dry_run else CASES
            programs = [(case, pool.submit(compile_case, case, has_documents, args.dry_run)) for case, has_documents in cases]
            for case, program in programs:
                compare(report, case.name, *program.result())
        compare_losses(report, args, Path(folder), on_cpu.result())


# ---- logits and gradients -------------------------------------------------------------------------------------------


def compile_case(case: Case, has_documents: bool, dry_run: bool):
    """(inputs, {name: compiled program}) for one batch and random weights; each program gives (logits, gradients)."""
    config = case.config(dry_run)
    ours = ModelConfig.make(config_lib.options(ModelOptions, config.model), "bfloat16")
    plain = dataclasses.replace(ours, attention="xla")
    reference = dataclasses.replace(plain, dtype=jnp.dtype("float32"))
    params = jax.jit(init_params, static_argnums=(0, 1))(ours, 0)
    random = np.random.default_rng(0)
    tokens_BS1 = random.integers(3, ours.vocab_size, (case.rows, config.data.seq_len + 1), np.int32)
    documents_BS = np.cumsum(random.random((case.rows, config.data.seq_len)) < 0.02, axis=1, dtype=np.int32)
    inputs = params, tokens_BS1, documents_BS if has_documents else None
    programs = {
        ours.attention: compile_program(ours, inputs, {"xla_gpu_autotune_level": 0}),
        "xla": compile_program(plain, inputs, {"xla_gpu_autotune_level": 0}),
        "float32": compile_program(reference, inputs, {"xla_gpu_enable_triton_gemm": False}, "highest"),
    }
    return inputs, programs


def compile_program(c: ModelConfig, inputs, options: dict, precision: str = "default"):
    """options: XLA options on a GPU; they skip autotuning, which would take longer than the one run of each program."""
    graph = abstract_model(c)[0]

    def mean_loss(params, tokens_BS1, documents_BS):
        logits_BSV = nnx.merge(graph, params)(tokens_BS1[:, :-1], documents_BS)
        return jnp.mean(token_losses(logits_BSV, tokens_BS1[:, 1:])[0]), logits_BSV

    def logits_and_gradients(*inputs):
        (_, logits_BSV), grads = jax.value_and_grad(mean_loss, has_aux=True)(*inputs)
        return logits_BSV, grads

    with jax.default_matmul_precision(precision):
        return jax.jit(logits_and_gradients).lower(*inputs).compile(options if c.platform == "gpu" else {})


@jax.jit
def distance(x, reference):
    """|x - reference| / |reference| over all arrays of a tree, computed in fp32."""
    squares = [
        (jnp.sum((a.astype(jnp.float32) - b.astype(jnp.float32)) ** 2), jnp.sum(b.astype(jnp.float32) ** 2))
        for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(reference), strict=True)
    ]
    return jnp.sqrt(sum(d for d, _ in squares) / sum(r for _, r in squares))


def compare(report: Report, name: str, inputs, programs) -> None:
    results = {backend: program(*inputs) for backend, program in programs.items()}
    logits, grads = results.pop("float32")
    off = {backend: [float(distance(x, y)) for x, y in zip(r, (logits, grads), strict=True)] for backend, r in results.items()}
    backend = next(iter(off))
    baseline = off["xla"]
    ok = all(np.isfinite(a) and a <= 1.5 * b + 1e-6 for a, b in zip(off[backend], baseline, strict=True))
    report.row(
        f"{name}: {backend} attention in bfloat16 against float32", "logits {:.2%}, gradients {:.2%}".format(*off[backend]),
        "xla attention in bfloat16 {:.2%}, {:.2%}".format(*baseline), ok, off=off,
    )  # fmt: skip


# ---- the experts' gate ----------------------------------------------------------------------------------------------


def gate(report: Report, dry_run: bool) -> None:
    """The gate must compute in fp32: TF32's 10 bits would give errors of 1e-4."""
    config = Case("", dict(use_moe=True), 1, 512).config(dry_run)
    layer = MixtureOfExperts(ModelConfig.make(config_lib.options(ModelOptions, config.model), "bfloat16"), nnx.Rngs(0))
    x_ND = np.random.default_rng(0).standard_normal((4096, config.model.dim), np.float32)
    gate_ED = np.asarray(layer.gate_ED[...], np.float64)
    logits_NE = x_ND.astype(np.float64) @ gate_ED.T
    expected_NE = np.exp(logits_NE - logits_NE.max(1, keepdims=True))
    expected_NE /= expected_NE.sum(1, keepdims=True)
    off = np.max(np.abs(jax.jit(layer.gate_scores)(x_ND) - expected_NE))
    default_NE = jax.nn.softmax(jax.jit(lambda x, w: x @ w.T)(x_ND, gate_ED.astype(np.float32)))
    report.row(
        "scores of the experts' gate against float64", f"error at most {off:.1e}",
        f"allowed 1e-06; {np.max(np.abs(default_NE - expected_NE)):.1e} at default precision", bool(off < 1e-6),
    )  # fmt: skip


# ---- losses ---------------------------------------------------------------------------------------------------------


def compare_losses(report: Report, args, folder: Path, expected: np.ndarray) -> None:
    """Losses of the first steps against float32 on the CPU.

    Training magnifies any difference: weights that are off by 3e-4 change losses by 1e-5 at first and by 1e-2 within 50 steps.
    So half precision is measured against float32 on the GPU whose initial weights were rounded once to that precision: it
    rounds everything in every step, and may be off 3 times as much.
    """
    runs = {"float32": ("float32", ()), "bfloat16": ("bfloat16", ()), "float16": ("float16", ())}
    runs |= {f"rounded to {dtype}": ("float32", ("--round_weights", dtype)) for dtype in ("bfloat16", "float16")}
    started = {name: start_losses(args, folder / f"{i}.json", dtype, None, *flags)
               for i, (name, (dtype, flags)) in enumerate(runs.items())}  # fmt: skip
    losses = {name: run.result() for name, run in started.items()}
    off = {name: float(np.max(np.abs(found / expected - 1))) for name, found in losses.items()}
    for dtype in ("float32", "bfloat16", "float16"):
        allowed = TOLERANCE if dtype == "float32" else 3 * off[f"rounded to {dtype}"]
        report.row(
            f"losses of {len(expected)} steps in {dtype} against float32 on the CPU", f"relative error {off[dtype]:.1e}",
            f"allowed {allowed:.1e}; from {losses[dtype][0]:.4f} to {losses[dtype][-1]:.4f}, CPU to {expected[-1]:.4f}",
            bool(off[dtype] <= allowed), losses=losses[dtype].tolist(),
        )  # fmt: skip


class start_losses:
    """Runs `benchmarks.gpu.losses` in its own process, so that the GPU does other work while it runs on the CPU."""

    def __init__(self, args, path: Path, dtype: str, platform: str | None, *flags: str):
        command = [sys.executable, "-m", "benchmarks.gpu.losses", "--out", str(path), "--data", args.data, "--dtype", dtype]
        command += ["--steps", str(STEPS if not args.dry_run else 5), "--rows", str(LOSS_ROWS), *flags]
        command += ["--dry_run"] * args.dry_run
        self._path, self._process = path, subprocess.Popen(command + (["--platform", platform] if platform else []))

    def result(self) -> np.ndarray:
        if self._process.wait() != 0:
            raise RuntimeError(f"{self._path.stem}: benchmarks.gpu.losses ended with exit code {self._process.returncode}")
        return np.array(json.loads(self._path.read_text()))


if __name__ == "__main__":
    main(sizes.parse_args(__doc__))
