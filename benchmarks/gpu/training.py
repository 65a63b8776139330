"""Training compared with PyTorch on the same card:  python -m benchmarks.gpu.training --out DIR --data DATASET

Tokens/s and model FLOPs utilisation (MFU) from 27 M to 1 B parameters, in bfloat16; PyTorch's side is torch_training.py.
Everything is compiled first, then each case is timed alone. Also breaks the base model's step down by kernel, and compares it
with plan's lower bounds.
"""

import json
from concurrent.futures import ThreadPoolExecutor

import jax

from benchmarks.gpu import sizes, timing
from benchmarks.gpu.peer import Peer
from benchmarks.gpu.report import Report
from benchmarks.gpu.sizes import Case
from mateconv_jax.model import flops
from mateconv_jax.planning import programs, target
from mateconv_jax.planning.hlo_report import read
from mateconv_jax.planning.roofline import roofline
from mateconv_jax.runtime import compilation_cache
from mateconv_jax.training import setup
from mateconv_jax.training.setup import Setup
from mateconv_jax.training.step import lower


def main(args) -> None:
    compilation_cache.enable()
    report = Report(args.out, "training")
    cases = [case for case in sizes.TRAINING if not args.case or case.name.startswith(tuple(args.case))]
    cases = cases[:2] if args.dry_run else cases
    peers = [Peer("benchmarks.gpu.torch_training", "--case", peer_case(case, args.dry_run)) for case in cases]
    try:
        with ThreadPoolExecutor(len(cases) + 1) as pool:
            steps = [pool.submit(compile_step, case, args.dry_run) for case in cases]
            traced = {"our step": {}, "our deterministic step": {"deterministic": True}}
            traced_steps = [
                pool.submit(compile_step, sizes.BASE, args.dry_run, without_command_buffers=True, **keys)
                for keys in traced.values()
            ]
        ready = [peer.ready() for peer in peers]  # all compilation is done
        if args.compile_only:
            return
        for case, step, peer, is_ready in zip(cases, steps, peers, ready, strict=True):
            theirs = peer.measure() if is_ready else None
            try:
                compare(report, case, case.changes(args.dry_run), *step.result(), theirs)
            except Exception as error:  # one size that fails must not stop the others
                report.row(case.name, "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", False)
            if case is sizes.BASE:
                for (name, keys), step in zip(traced.items(), traced_steps, strict=True):
                    changes = case.changes(args.dry_run, **keys)
                    break_down(report, name, changes, *step.result())
    finally:
        for peer in peers:
            peer.stop()


def peer_case(case: Case, dry_run: bool) -> str:
    config = case.config(dry_run)
    values = {"model": config.model.to_dict(), "rows": config.training.batch_size, "seq_len": config.data.seq_len}
    return json.dumps(values | {"seconds": 0.1 if dry_run else 1.5})


def compile_step(case: Case, dry_run: bool, without_command_buffers: bool = False, **training):
    """(config, Setup, compiled)."""
    config = case.config(dry_run, **training)
    run = programs.training_step(config, setup.model_config(config), None, 1000)
    options = {"xla_gpu_enable_command_buffer": ""} if without_command_buffers and run.c.platform == "gpu" else {}
    return config, run, lower(run.train_step, run.abstract_state, run.abstract_batch, run.c.deterministic).compile(options)


def compare(report: Report, case: Case, changes: dict, config, run: Setup, compiled, theirs: dict | None) -> None:
    c, tokens = run.c, config.training.batch_size * config.data.seq_len
    needed, peak = flops.training_flops_per_token(c, config.data.seq_len) * tokens, flops.peak_flops(kind(), c.dtype)
    seconds = timing.Step(run, compiled).seconds()

    def speed(seconds: float) -> str:
        return f"{tokens / seconds:,.0f} tokens/s" + (f", MFU {needed / seconds / peak:.1%}" if peak else "")

    beside, ratio = "PyTorch failed", None
    if theirs is not None:
        ratio = theirs["seconds"] / seconds
        beside = f"PyTorch compiled {speed(theirs['seconds'])}: {ratio:.2f} times as fast"
    memory = compiled.memory_analysis()
    gigabytes = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9
    ours = f"{speed(seconds)}, {1e3 * seconds:.2f} ms, {gigabytes:.1f} GB"
    report.row(case.name, ours, beside, None, ratio=ratio, seconds=seconds, peer=theirs, tokens=tokens,
               config=changes, dtype=c.dtype.name)  # fmt: skip
    if theirs is not None and "kernels" in theirs and case is sizes.BASE:
        report.row("PyTorch's step", timing.in_words(theirs["kernels"]), f"{theirs['peak_gb']:.1f} GB", None)


def kind() -> str:
    return jax.devices()[0].device_kind


def break_down(report: Report, name: str, changes: dict, config, run: Setup, compiled) -> None:
    """Break a step down by kernel. Compiled without command buffers, which a trace shows as a single kernel."""
    running = timing.Step(run, compiled)
    seconds, steps = running.seconds(), 5
    with timing.kernels() as found:
        for _ in range(steps):
            running.run()
        running.wait()
    if not found:
        report.row(f"{name} by kernel", "skipped", f"no kernels in the trace of {kind()}")
        return
    groups = timing.by_group(found, steps)
    busy = sum(group["ms"] for group in groups.values())
    report.row(f"{name}, without command buffers", timing.in_words(groups),
               f"{busy:.2f} of {1e3 * seconds:.2f} ms/step", None, groups=groups, config=changes)  # fmt: skip
    longest = sorted(found.items(), key=lambda item: -item[1][0])[:25]
    for kernel, (total, launches) in longest:
        report.row(f"{name}, kernel {kernel[:80]}", f"{1e3 * total / steps:.3f} ms", f"{launches / steps:.0f} launches")
    gpu = target.by_device_kind(kind())
    if gpu is not None:
        hlo = read(compiled.as_text())
        bounds = roofline(hlo, gpu, 1, 1)
        report.row("plan's lower bound for the same program", f"{1e3 * bounds.seconds:.2f} ms",
                   f"arithmetic {1e3 * bounds.arithmetic:.2f}, memory {1e3 * bounds.memory:.2f}, launches "
                   f"{1e3 * bounds.launches:.2f} ms; {hlo.launches()} launches")  # fmt: skip


if __name__ == "__main__":
    main(sizes.parse_args(__doc__, "--case"))
