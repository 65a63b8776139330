"""Variants of the training step compared with the base:  python -m benchmarks.gpu.variants --out DIR --data DATASET"""

from concurrent.futures import ThreadPoolExecutor

import jax

from benchmarks.gpu import sizes, timing
from benchmarks.gpu.report import Report
from benchmarks.gpu.sizes import Case
from mateconv_jax.planning import programs
from mateconv_jax.runtime import compilation_cache
from mateconv_jax.training import setup
from mateconv_jax.training.step import lower

EXPERTS = dict(use_moe=True)
SHORT, LONG = "base, 32 x 512", "base, 4 x 4,096"
BASES = {512: SHORT, 4096: LONG}  # {seq_len: what others of that length are compared with}
# {name: (changes to config.model, changes to config.training, XLA options)}.
SHORT_VARIANTS = {
    SHORT: ({}, {}, {}),
    "EMA": ({}, dict(use_ema=True), {}),
    "deterministic": ({}, dict(deterministic=True), {}),
    "remat full": ({}, dict(remat="full"), {}),
    "remat dots": ({}, dict(remat="dots"), {}),
    "document mask, attention auto": ({}, dict(document_mask=True), {}),
    "document mask, attention xla": (dict(attention="xla"), dict(document_mask=True), {}),
    "attention xla": (dict(attention="xla"), {}, {}),
    "4 micro-batches of 8": ({}, dict(accumulation_steps=4, batch_size=8), {}),
    "experts dense": (EXPERTS | dict(experts="dense"), {}, {}),
    "experts ragged": (EXPERTS | dict(experts="ragged"), {}, {}),
    "without command buffers": ({}, {}, {"xla_gpu_enable_command_buffer": ""}),
    "without latency hiding": ({}, {}, {"xla_gpu_enable_latency_hiding_scheduler": False}),
    "without Triton matmuls": ({}, {}, {"xla_gpu_enable_triton_gemm": False}),
    "not donated": ({}, {}, {}),
}
# The same of 4 x 4,096, where the mask's S x S scores are 8 times as many.
LONG_VARIANTS = {
    LONG: ({}, {}, {}),
    "4 x 4,096, document mask, attention auto": ({}, dict(document_mask=True), {}),
    "4 x 4,096, document mask, attention xla": (dict(attention="xla"), dict(document_mask=True), {}),
}
# {name: (case, XLA options)}.
VARIANTS = {
    name: (Case(name, model, rows, seq_len, training), options)
    for rows, seq_len, variants in ((32, 512, SHORT_VARIANTS), (4, 4096, LONG_VARIANTS))
    for name, (model, training, options) in variants.items()
}


def main(args) -> None:
    compilation_cache.enable()
    report = Report(args.out, "variants")
    names = [SHORT, "experts ragged", "not donated", *LONG_VARIANTS] if args.dry_run else list(VARIANTS)
    with ThreadPoolExecutor(8) as pool:
        compiled = {name: pool.submit(compile_variant, name, args.dry_run) for name in names}
    if args.compile_only:
        return
    measured = {}
    for name, result in compiled.items():
        case, options = VARIANTS[name]
        try:
            step, program = result.result()
            running = timing.Step(step, program)
            seconds = running.seconds()
        except Exception as error:  # one variant that fails must not stop the others
            report.row(name, "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", False)
            continue
        measured[name] = seconds
        base = measured.get(BASES[case.seq_len])
        memory = program.memory_analysis()
        gigabytes = (
            memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        ) / 1e9
        ours = f"{1e3 * seconds:.2f} ms, {gigabytes:.2f} GB"
        # Those that only their configuration makes are what `plan` compiles, too; the base itself is of the part training.
        recorded = {}
        if name not in (SHORT, "not donated") and not options:
            recorded = {"config": case.changes(args.dry_run), "dtype": step.c.dtype.name}
        compared = "the base failed" if base is None else f"{seconds / base:.2f} times the base's"
        report.row(name, ours, compared, None, seconds=seconds, **recorded)
        del running


def compile_variant(name: str, dry_run: bool):
    case, options = VARIANTS[name]
    config = case.config(dry_run)
    run = programs.training_step(config, setup.model_config(config), None, 1000)
    train_step = jax.jit(run.train_step.__wrapped__) if name == "not donated" else run.train_step
    lowered = lower(train_step, run.abstract_state, run.abstract_batch, run.c.deterministic)
    return run, lowered.compile(options if run.c.platform == "gpu" else {})


if __name__ == "__main__":
    main(sizes.parse_args(__doc__))
